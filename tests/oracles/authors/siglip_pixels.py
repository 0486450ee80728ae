"""Pixels of the authors' single view for a SigLIP tower: the whole image, resized to a square.

    python -m tests.oracles.authors.siglip_pixels --siglip-py FILE [--check]

Runs in the environment that scripts/oracles.sh makes. The package knows CLIP towers only. The image processor is one
class of one file of the repository; that class and the imports of transformers that it uses are taken out of the file
and run.
"""

import argparse
import ast
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tests.oracles.digests import bytes_digest
from tests.oracles.inputs import SQUASHED_HW, image_bytes
from tests.oracles.save_fixture import save

CLASS = "SigLipImageProcessor"
_MODULES = (
    "functools",
    "transformers.image_processing_utils",
    "transformers.image_transforms",
    "transformers.image_utils",
)


def image_processor_class(siglip_py: Path) -> Any:
    """The class, from the authors' file."""
    tree = ast.parse(siglip_py.read_text(encoding="utf-8"))
    tree.body = [
        node
        for node in tree.body
        if (isinstance(node, ast.ImportFrom) and node.module in _MODULES)
        or (isinstance(node, ast.ClassDef) and node.name == CLASS)
    ]
    space: dict[str, Any] = {"Image": Image, "Dict": dict}
    exec(compile(tree, str(siglip_py), "exec"), space)
    return space[CLASS]


def squashed(index: int, size_hw: tuple[int, int], plain: Any, own: Any) -> dict[str, str]:
    """One image: its bytes before normalisation, or the error that its processor raises.

    Args:
        plain: their processor with a scale of 1, a mean of 0 and a standard deviation of 1: its float32 values are
            whole numbers.
        own: the processor as their tower makes it.
    """
    height, width = size_hw
    image = Image.frombytes("RGB", (width, height), image_bytes(index, size_hw))
    try:
        normalised = own.preprocess(image, return_tensors="np")["pixel_values"][0]
    except ValueError as error:
        return {"error": str(error)}
    values = plain.preprocess(image, return_tensors="np")["pixel_values"][0]
    pixels = values.astype(np.uint8)
    assert (pixels == values).all()
    np.testing.assert_allclose(normalised, (pixels / 255 - 0.5) / 0.5, rtol=0, atol=1e-6)
    return {"squash": bytes_digest(np.ascontiguousarray(pixels.transpose(1, 2, 0)).tobytes())}


def main() -> int:
    """The program; returns 1 if the fixture differs under --check."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--siglip-py", type=Path, required=True)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    processor = image_processor_class(options.siglip_py)
    own, plain = processor(), processor(image_mean=(0.0,) * 3, image_std=(1.0,) * 3, rescale_factor=1.0)
    outputs = {
        "size": list(own.size),
        "mean": list(own.image_mean),
        "std": list(own.image_std),
        "pictures": [squashed(index, size, plain, own) for index, size in enumerate(SQUASHED_HW)],
    }
    code = f"LLaVA-VL/LLaVA-NeXT llava/model/multimodal_encoder/siglip_encoder.py {CLASS}"
    return 0 if save("squash_pixels", code, SQUASHED_HW, outputs, check=options.check) else 1


if __name__ == "__main__":
    raise SystemExit(main())
