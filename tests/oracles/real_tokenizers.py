"""Tokenizers of the released backbones and of SmolLM2 from the cache, under the names used in the fixtures."""

import functools
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest

from llava_next.cache_root import cache_root
from llava_next.model.build import read_tokenizer

STAND_INS = {
    "vicuna_chatml": ("<|im_start|>", "<|im_end|>"),
    "llama3_chatml": ("<|im_start|>", "<|im_end|>"),
    "mistral_gemma": ("<start_of_turn>", "<end_of_turn>"),
    "qwen_phi": ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
}
"""Tokenizers that no package has, by the one whose pieces they take, with the end tokens of their own: those of
Nous-Hermes-2-Yi-34B, SmolLM3, Gemma and Phi-4-mini."""
NAMES = ("vicuna", "vicuna_legacy", "vicuna_chatml", "mistral", "llama3", "qwen", "smollm2")
COMMAND = "python scripts/quickstart/assets.py --set tokenizers  # npm is needed"
QUICKSTART = "python scripts/quickstart/assets.py --set quickstart"


def tokenizer(name: str) -> Any:
    """One of NAMES or STAND_INS; skips the test if it is not in the cache.

    `vicuna_legacy` is vicuna with the word mark behind end tokens, as before transformers 4.33.
    """
    base = name.split("_")[0]
    return _load(name, asset("smollm2_six_layers" if base == "smollm2" else f"tokenizer_{base}"))


def asset(name: str) -> Path:
    """A folder of the cache; skips the test if it is absent."""
    root = cache_root()
    if not (root / name / "asset.json").is_file():
        pytest.skip(f"{root / name} is absent; fetch it: {COMMAND if name.startswith('tokenizer_') else QUICKSTART}")
    return root / name


@functools.cache
def _load(name: str, folder: Path) -> Any:
    if "_" not in name:
        return read_tokenizer(str(folder))
    with tempfile.TemporaryDirectory() as scratch:
        changed = Path(scratch) / name
        shutil.copytree(folder, changed)
        if name.startswith("vicuna"):
            settings = json.loads((changed / "tokenizer_config.json").read_text(encoding="utf-8"))
            (changed / "tokenizer_config.json").write_text(json.dumps(settings | {"legacy": True}), encoding="utf-8")
        if name in STAND_INS:
            table = json.loads((changed / "tokenizer.json").read_text(encoding="utf-8"))
            first = 1 + max(*table["model"]["vocab"].values(), *(token["id"] for token in table["added_tokens"]))
            for row, text in enumerate(STAND_INS[name], first):
                table["added_tokens"].append(table["added_tokens"][0] | {"id": row, "content": text, "special": True})
            (changed / "tokenizer.json").write_text(json.dumps(table), encoding="utf-8")
        return read_tokenizer(str(changed))
