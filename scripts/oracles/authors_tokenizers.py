"""The tokenizers as the authors' code loads them: sentencepiece's own (`use_fast=False`) for Llama's family.

Runs inside the oracle environment. Mistral's model file comes from a package; Vicuna's is rebuilt from its
vocabulary and the order of its merges, which is what a model's scores say.
"""

import json
import os
from pathlib import Path
from typing import Any

from transformers import AddedToken, AutoTokenizer, LlamaTokenizer  # type: ignore[import-not-found]
from transformers.convert_slow_tokenizer import import_protobuf  # type: ignore[import-not-found]

MODEL_MAX_LENGTH = 4096
CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")


def cache() -> Path:
    """Where scripts/quickstart/assets.py keeps the tokenizers."""
    return Path(os.environ["LLAVA_NEXT_CACHE"])


def _vicuna_model() -> Path:
    """Vicuna's tokenizer.model: byte-pair merges without normalisation, unknown characters as bytes."""
    table = json.loads((cache() / "tokenizer_vicuna" / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    vocabulary: dict[str, int] = table["vocab"]
    merged = [pair.replace(" ", "") if isinstance(pair, str) else "".join(pair) for pair in table["merges"]]
    scores = {piece: -float(rank) for rank, piece in enumerate(dict.fromkeys(merged))}
    never = -float(len(scores))  # one character, which nothing merges into
    schema = import_protobuf()
    model = schema.ModelProto()
    kinds = schema.ModelProto.SentencePiece
    specials = (kinds.UNKNOWN, kinds.CONTROL, kinds.CONTROL)
    first_piece = len(specials) + 256  # after the bytes
    for piece, row in sorted(vocabulary.items(), key=lambda item: item[1]):
        if row < first_piece:
            kind, score = (specials[row] if row < len(specials) else kinds.BYTE), 0.0
        else:
            kind, score = kinds.NORMAL, scores.get(piece, never)
        model.pieces.add(piece=piece, score=score, type=kind)
    model.trainer_spec.model_type = schema.TrainerSpec.BPE
    model.trainer_spec.vocab_size = len(vocabulary)
    model.trainer_spec.byte_fallback = True
    model.normalizer_spec.name = "identity"
    model.normalizer_spec.add_dummy_prefix = True
    model.normalizer_spec.remove_extra_whitespaces = False
    model.normalizer_spec.escape_whitespaces = True
    path = cache() / "oracle_env" / "vicuna" / "tokenizer.model"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(model.SerializeToString())
    return path


def _sentencepiece(path: Path, *, legacy: bool, bos: bool = True) -> Any:
    tokenizer = LlamaTokenizer(str(path), legacy=legacy, add_bos_token=bos, model_max_length=MODEL_MAX_LENGTH)
    tokenizer.padding_side = "right"
    tokenizer.pad_token = tokenizer.unk_token  # as the authors' train() does for every template but v0
    return tokenizer


def _vicuna_chatml() -> Any:
    """In place of Nous-Hermes-2-Yi-34B's, which no package has: its class and settings over Vicuna's pieces."""
    tokenizer = _sentencepiece(_vicuna_model(), legacy=True, bos=False)
    tokenizer.add_tokens([AddedToken(text, special=True, normalized=False) for text in CHATML_TOKENS])
    return tokenizer


def load(name: str) -> Any:
    """The tokenizer called `name` in the fixtures."""
    if name == "vicuna":
        return _sentencepiece(_vicuna_model(), legacy=False)
    if name == "vicuna_legacy":
        return _sentencepiece(_vicuna_model(), legacy=True)
    if name == "vicuna_chatml":
        return _vicuna_chatml()
    if name == "mistral":
        return _sentencepiece(cache() / "sentencepiece_mistral" / "tokenizer.model", legacy=True)
    # These have no sentencepiece model: fast ones everywhere.
    return AutoTokenizer.from_pretrained(cache() / f"tokenizer_{name}")
