"""Image files with more than RGB pixels, as the training data set of the released package decodes them.

    python -m tests.oracles.authors.decoded_images [--check]

Runs in the environment that scripts/oracles.sh makes. `LazySupervisedDataset` of llava.train.train reads each file and
shows it as stage 1 does, in one view.
"""

import argparse
import json
import tempfile
from pathlib import Path
from types import SimpleNamespace

import torch
from llava import conversation as conversation_lib  # type: ignore[import-not-found]
from llava.train import train  # type: ignore[import-not-found]
from transformers import CLIPImageProcessor  # type: ignore[import-not-found]

from tests.oracles.authors.anyres import TILE
from tests.oracles.authors.slow_tokenizers import load
from tests.oracles.digests import bytes_digest
from tests.oracles.image_files import ImageFile, image_files
from tests.oracles.save_fixture import save


def views(files: list[ImageFile], folder: Path) -> list[str]:
    """A digest of each file's uint8 view, [336, 336, 3]."""
    for number, file in enumerate(files):
        (folder / f"{number}.png").write_bytes(file.data)
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A picture."}]
    records = [{"id": str(n), "image": f"{n}.png", "conversations": turns} for n in range(len(files))]
    (folder / "records.json").write_text(json.dumps(records))
    processor = CLIPImageProcessor(
        size={"shortest_edge": TILE}, crop_size={"height": TILE, "width": TILE}, do_rescale=False, do_normalize=False
    )
    options = SimpleNamespace(
        image_folder=str(folder),
        image_processor=processor,
        image_aspect_ratio="square",
        is_multimodal=True,
        mm_use_im_start_end=False,
    )
    conversation_lib.default_conversation = conversation_lib.conv_templates["plain"]
    data = train.LazySupervisedDataset(str(folder / "records.json"), load("vicuna"), options)
    images = [data[number]["image"] for number in range(len(data))]
    assert all(image.dtype == torch.uint8 for image in images)
    return [bytes_digest(image.permute(1, 2, 0).contiguous().numpy().tobytes()) for image in images]


def main() -> int:
    """The program; returns 1 if the fixture differs under --check."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    files = image_files()
    with tempfile.TemporaryDirectory() as folder:
        outputs = {"square": views(files, Path(folder))}
    about = [file.about for file in files]
    code = "llava.train.train.LazySupervisedDataset"
    return 0 if save("image_files", code, about, outputs, check=check) else 1


if __name__ == "__main__":
    raise SystemExit(main())
