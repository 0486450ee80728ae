"""The tokenizers as the authors' code loads them: sentencepiece's own (`use_fast=False`) for Llama's family.

Runs in the environment that scripts/oracles.sh makes. Mistral's model file comes from a package; Vicuna's is rebuilt
from its vocabulary and the order of its merges, which is what a model's scores say.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AddedToken, AutoTokenizer, LlamaTokenizer  # type: ignore[import-not-found]
from transformers.convert_slow_tokenizer import import_protobuf  # type: ignore[import-not-found]

MODEL_MAX_LENGTH = 4096
CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")


def cache() -> Path:
    """Where scripts/quickstart/assets.py keeps the tokenizers."""
    return Path(os.environ["LLAVA_NEXT_CACHE"])


def write_sentencepiece(path: Path, pieces: Sequence[tuple[str, float]], *, bytes_after_specials: bool) -> Path:
    """A byte-pair tokenizer.model without normalisation, as Llama's: three specials, and pieces with their scores.

    Args:
        path: is written, its folder made.
        pieces: in the order of their ids, specials and (with `bytes_after_specials`) the 256 bytes included.
    """
    schema = import_protobuf()
    model = schema.ModelProto()
    kinds = schema.ModelProto.SentencePiece
    first_kinds = [kinds.UNKNOWN, kinds.CONTROL, kinds.CONTROL] + [kinds.BYTE] * (256 * bytes_after_specials)
    for row, (piece, score) in enumerate(pieces):
        model.pieces.add(piece=piece, score=score, type=first_kinds[row] if row < len(first_kinds) else kinds.NORMAL)
    model.trainer_spec.model_type = schema.TrainerSpec.BPE
    model.trainer_spec.vocab_size = len(pieces)
    model.trainer_spec.byte_fallback = bytes_after_specials
    model.normalizer_spec.name = "identity"
    model.normalizer_spec.add_dummy_prefix = True
    model.normalizer_spec.remove_extra_whitespaces = False
    model.normalizer_spec.escape_whitespaces = True
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(model.SerializeToString())
    return path


def _vicuna_model() -> Path:
    """Vicuna's tokenizer.model: byte-pair merges without normalisation, unknown characters as bytes."""
    table = json.loads((cache() / "tokenizer_vicuna" / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    vocabulary: dict[str, int] = table["vocab"]
    merged = [pair.replace(" ", "") if isinstance(pair, str) else "".join(pair) for pair in table["merges"]]
    scores = {piece: -float(rank) for rank, piece in enumerate(dict.fromkeys(merged))}
    never = -float(len(scores))  # one character, which nothing merges into
    first_piece = 3 + 256  # after specials and bytes
    pieces = [
        (piece, 0.0 if row < first_piece else scores.get(piece, never))
        for piece, row in sorted(vocabulary.items(), key=lambda item: item[1])
    ]
    return write_sentencepiece(cache() / "oracle_env" / "vicuna" / "tokenizer.model", pieces, bytes_after_specials=True)


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
