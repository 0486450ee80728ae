"""vLLM on prompts with images: their tokens, the log-probability of each token, and the first tokens of an answer.

    python tests/scripts/vllm_logprobs.py MODEL INPUTS OUT

Runs in the environment that scripts/vllm_env.sh makes, for test_vllm.py. INPUTS is a JSON list of {"ids": [...],
"pictures": [file, ...]}, ids with one image token at the place of an image's features, or of {"question": "...",
"pictures": [file]}, which is sent as a chat request. OUT gets for each {"ids": as vLLM extends them, "logprobs": [null,
of token 1, ...], "answer": greedy ids}.
"""

import argparse
import base64
import json
from pathlib import Path
from typing import Any

from PIL import Image
from vllm import LLM, SamplingParams  # type: ignore[import-not-found]

NUM_ANSWER_TOKENS = 4


def as_chat(case: dict[str, Any]) -> list[dict[str, Any]]:
    """One user turn as an OpenAI client sends it: the images in the request, then the question."""
    content: list[dict[str, Any]] = []
    for path in case["pictures"]:
        encoded = base64.b64encode(Path(path).read_bytes()).decode()
        content.append({"type": "image_url", "image_url": {"url": f"data:image/png;base64,{encoded}"}})
    return [{"role": "user", "content": [*content, {"type": "text", "text": case["question"]}]}]


def as_prompt(case: dict[str, Any]) -> dict[str, Any]:
    """Token ids and decoded images."""
    images = [Image.open(path).convert("RGB") for path in case["pictures"]]
    return {"prompt_token_ids": case["ids"], "multi_modal_data": {"image": images}}


def plain_result(output: Any) -> dict[str, Any]:
    """Plain values of a vLLM result; the table of a position has its token at any rank."""
    ids = list(output.prompt_token_ids)
    tables = output.prompt_logprobs
    logprobs = [table and table[token].logprob for token, table in zip(ids, tables, strict=True)]
    return {"ids": ids, "logprobs": logprobs, "answer": list(output.outputs[0].token_ids)}


def main() -> None:
    """The program."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("inputs", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--onevision", action="store_true", help="a LLaVA-OneVision: no videos, images by torchvision")
    options = parser.parse_args()
    cases = json.loads(options.inputs.read_text())
    max_images = max(len(case["pictures"]) for case in cases)
    llm = LLM(
        str(options.model),
        dtype="float32",  # given, since vLLM converts a checkpoint in fp32 to half precision by default
        # As in training; torchvision gives other pixel values in places.
        mm_processor_kwargs=None if options.onevision else {"backend": "pil"},
        limit_mm_per_prompt={"image": max_images} | ({"video": 0} if options.onevision else {}),
        enforce_eager=True,
    )
    greedy = SamplingParams(temperature=0.0, max_tokens=NUM_ANSWER_TOKENS, ignore_eos=True, prompt_logprobs=0)
    results = []
    for case in cases:
        if "question" in case:
            (output,) = llm.chat(as_chat(case), greedy, use_tqdm=False)
        else:
            (output,) = llm.generate(as_prompt(case), greedy, use_tqdm=False)
        results.append(plain_result(output))
    options.out.write_text(json.dumps(results))


if __name__ == "__main__":
    main()
