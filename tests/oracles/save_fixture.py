"""Writes a fixture, or compares the existing one with what would be written."""

import contextlib
import json
import platform
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from tests.oracles.inputs import GENERATOR, inputs_sha256

FIXTURES = Path(__file__).parent / "fixtures"
PLOT = Path(__file__).resolve().parents[2] / "docs" / "images" / "authors_steps.svg"


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
    """Writes `name`.json, or with `check` only compares; returns whether the file is right now.

    Args:
        code: the function whose outputs these are, and where it is from.
        inputs: its inputs, of which a digest is written, so that a test can detect other inputs.
        tensors: float32 tensors, written to `name`.safetensors.
        tolerance: relative difference (2-norm) that floats and tensors may have, since another processor rounds
            differently.
    """
    made_by = {"code": code, "python": platform.python_version()} | _versions()
    known = {"generator": GENERATOR, "sha256": inputs_sha256(inputs)}
    path = FIXTURES / f"{name}.json"
    content = {"inputs": known, **outputs}
    if check:
        saved = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        same = _same({key: value for key, value in saved.items() if key != "made_by"}, content, tolerance)
        same = same and (tensors is None or _same_tensors(path.with_suffix(".safetensors"), tensors, tolerance))
        print(f"  {path.name}: {'unchanged' if same else 'DIFFERS'}", flush=True)
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
    versions = {}
    for package in ("llava-torch", "transformers", "tokenizers", "torch", "deepspeed", "pillow"):
        with contextlib.suppress(PackageNotFoundError):
            versions[package] = version(package)
    return versions


def _same(saved: Any, made: Any, tolerance: float) -> bool:
    if isinstance(saved, dict) and isinstance(made, dict):
        return saved.keys() == made.keys() and all(_same(saved[key], made[key], tolerance) for key in saved)
    if isinstance(saved, list) and isinstance(made, list | tuple):
        return len(saved) == len(made) and all(_same(a, b, tolerance) for a, b in zip(saved, made, strict=True))
    if isinstance(saved, float) and isinstance(made, float):
        return abs(saved - made) <= tolerance * abs(saved)
    return bool(saved == made)


def _same_tensors(path: Path, made: Mapping[str, Any], tolerance: float) -> bool:
    from safetensors.torch import load_file

    saved = load_file(path) if path.exists() else {}
    return saved.keys() == made.keys() and all(
        float((saved[name] - made[name]).norm()) <= tolerance * float(saved[name].norm()) for name in saved
    )
