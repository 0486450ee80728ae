"""Writes a fixture, or tells whether the one in tests/oracles is what would be written."""

import json
import platform
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from scripts.oracles.inputs import GENERATOR, inputs_sha256

FOLDER = Path(__file__).parents[2] / "tests" / "oracles"


def save(name: str, code: str, inputs: Iterable[object], outputs: dict[str, Any], *, check: bool) -> bool:
    """Write `name`.json, or with `check` only compare; returns whether the file is (now) right.

    Args:
        code: the function of the authors whose outputs these are, and where it is from.
        inputs: what it was given; their digest is kept, so that a test sees when its own inputs are others.
    """
    packages = ("llava-torch", "transformers", "tokenizers", "torch", "pillow")
    made_by = {"code": code, "python": platform.python_version()} | {package: version(package) for package in packages}
    known = {"generator": GENERATOR, "sha256": inputs_sha256(inputs)}
    path = FOLDER / f"{name}.json"
    content = {"inputs": known, **outputs}
    if check:
        kept = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        same = {key: value for key, value in kept.items() if key != "made_by"} == content
        print(f"  {path.name}: {'as kept' if same else 'DIFFERS from what is kept'}", flush=True)
        return same
    # One line a key of the top level: short, and a change shows where it is.
    lines = [
        f" {json.dumps(key)}: {json.dumps(value, separators=(',', ':'))}"
        for key, value in ({"made_by": made_by} | content).items()
    ]
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    print(f"  {path.name}: written, {path.stat().st_size / 1024:.0f} KiB", flush=True)
    return True
