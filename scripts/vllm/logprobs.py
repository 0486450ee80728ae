"""What vLLM makes of prompts with pictures: their tokens, each one's log-probability, and the first words of an answer.

    python -m scripts.vllm.logprobs MODEL INPUTS OUT        inside the environment of scripts/vllm_env.sh

For tests/scripts/test_vllm.py. INPUTS is a JSON list of {"ids": [...], "pictures": [file, ...]}, ids with one image
token where a picture's features go, or {"question": "...", "pictures": [file]}, which goes the way of a chat request.
OUT gets for each {"ids": as vLLM extended them, "logprobs": [null, of token 1, ...], "answer": greedy ids}.
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
    """One user turn as an OpenAI client sends it: the pictures in the request, then the question."""
    content: list[dict[str, Any]] = []
    for path in case["pictures"]:
        encoded = base64.b64encode(Path(path).read_bytes()).decode()
        content.append({"type": "image_url", "image_url": {"url": f"data:image/png;base64,{encoded}"}})
    return [{"role": "user", "content": [*content, {"type": "text", "text": case["question"]}]}]


def as_prompt(case: dict[str, Any]) -> dict[str, Any]:
    """Token ids and decoded pictures."""
    pictures = [Image.open(path).convert("RGB") for path in case["pictures"]]
    return {"prompt_token_ids": case["ids"], "multi_modal_data": {"image": pictures}}


def answered(output: Any) -> dict[str, Any]:
    """Plain values of a vLLM result; a prompt's token may have any rank, and stands in its position's table."""
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
    options = parser.parse_args()
    cases = json.loads(options.inputs.read_text())
    most = max(len(case["pictures"]) for case in cases)
    llm = LLM(
        str(options.model),
        dtype="float32",  # said, since vLLM takes a checkpoint in fp32 down to half precision by itself
        mm_processor_kwargs={"backend": "pil"},  # as in training; torchvision resizes to another level here and there
        limit_mm_per_prompt={"image": most},
        enforce_eager=True,
    )
    greedy = SamplingParams(temperature=0.0, max_tokens=NUM_ANSWER_TOKENS, ignore_eos=True, prompt_logprobs=0)
    found = []
    for case in cases:
        if "question" in case:
            (output,) = llm.chat(as_chat(case), greedy, use_tqdm=False)
        else:
            (output,) = llm.generate(as_prompt(case), greedy, use_tqdm=False)
        found.append(answered(output))
    options.out.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
