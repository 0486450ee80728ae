"""Writes a fixture, or tells whether the one in tests/oracles is what would be written."""

import contextlib
import json
import platform
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from scripts.oracles.inputs import GENERATOR, inputs_sha256

FOLDER = Path(__file__).parents[2] / "tests" / "oracles"


def save(
    name: str,
    code: str,
    inputs: Iterable[object],
    outputs: dict[str, Any],
    *,
    check: bool,
    tensors: Mapping[str, Any] | None = None,
    tolerance: float = 0.0,
) -> bool:
    """Write `name`.json, or with `check` only compare; returns whether the file is (now) right.

    Args:
        code: the function whose outputs these are, and where it is from.
        inputs: what it was given; their digest is kept, so that a test sees when its own inputs are others.
        tensors: float32 tensors that belong to it, kept in `name`.safetensors.
        tolerance: how far numbers with a fraction and tensors may be from what is kept, relative (2-norm): a
            processor of another kind rounds differently.
    """
    made_by = {"code": code, "python": platform.python_version()} | _versions()
    known = {"generator": GENERATOR, "sha256": inputs_sha256(inputs)}
    path = FOLDER / f"{name}.json"
    content = {"inputs": known, **outputs}
    if check:
        kept = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        same = _same({key: value for key, value in kept.items() if key != "made_by"}, content, tolerance)
        same = same and (tensors is None or _same_tensors(path.with_suffix(".safetensors"), tensors, tolerance))
        print(f"  {path.name}: {'as kept' if same else 'DIFFERS from what is kept'}", flush=True)
        return same
    # One line a key of the top level: short, and a change shows where it is.
    lines = [
        f" {json.dumps(key)}: {json.dumps(value, separators=(',', ':'))}"
        for key, value in ({"made_by": made_by} | content).items()
    ]
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    print(f"  {path.name}: written, {path.stat().st_size / 1024:.0f} KiB", flush=True)
    if tensors is not None:
        from safetensors.torch import save_file

        path = path.with_suffix(".safetensors")
        save_file({key: tensors[key].contiguous() for key in sorted(tensors)}, path)
        print(f"  {path.name}: written, {path.stat().st_size / 1024:.0f} KiB", flush=True)
    return True


def _versions() -> dict[str, str]:
    found = {}
    for package in ("llava-torch", "transformers", "tokenizers", "torch", "deepspeed", "pillow"):
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def _same(kept: Any, made: Any, tolerance: float) -> bool:
    if isinstance(kept, dict) and isinstance(made, dict):
        return kept.keys() == made.keys() and all(_same(kept[key], made[key], tolerance) for key in kept)
    if isinstance(kept, list) and isinstance(made, list | tuple):
        return len(kept) == len(made) and all(_same(a, b, tolerance) for a, b in zip(kept, made, strict=True))
    if isinstance(kept, float) and isinstance(made, float):
        return abs(kept - made) <= tolerance * abs(kept)
    return bool(kept == made)


def _same_tensors(path: Path, made: Mapping[str, Any], tolerance: float) -> bool:
    from safetensors.torch import load_file

    kept = load_file(path) if path.exists() else {}
    return kept.keys() == made.keys() and all(
        float((kept[name] - made[name]).norm()) <= tolerance * float(kept[name].norm()) for name in kept
    )
