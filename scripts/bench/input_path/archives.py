"""Preparation from archives: time, memory and disk space for the same images as files, zip, tar and tar.gz.

    python scripts/bench/input.py archives [--images 100000] [--side 96] [--folder TEMPORARY]

Each form is prepared by `data_recipes.prepare` in a process of its own with two workers, from the page cache. The index
of an archive, and the copy of a tar.gz, are written in this time. Images are JPEGs of noise, each with other bytes;
records name them in another order than the archive. All stores must have one fingerprint. Results:
scripts/bench/results/archives.json.
"""

import argparse
import io
import json
import random
import shutil
import sys
import tarfile
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from input_path.stores import prepare_alone, write_source
from measuring.processes import run_alone
from measuring.result_files import RESULTS, columns_table, save
from PIL import Image

from data_recipes.store.reader import Store

PROGRAM = "input.py archives"
NUM_DISTINCT = 50

Result = dict[str, Any]


def iter_images(num_images: int, side: int) -> Iterator[tuple[str, bytes]]:
    """Names and bytes of images; a number after the end of the JPEG makes their bytes differ."""
    noise = np.random.default_rng(0).integers(0, 256, (NUM_DISTINCT, side, side, 3), dtype=np.uint8)
    encoded = []
    for pixels in noise:
        stream = io.BytesIO()
        Image.fromarray(pixels).save(stream, "JPEG", quality=90)
        encoded.append(stream.getvalue())
    for number in range(num_images):
        yield f"{number // 1000:05d}/{number:09d}.jpg", encoded[number % NUM_DISTINCT] + number.to_bytes(8, "big")


def write_files(folder: Path, images: Iterator[tuple[str, bytes]]) -> None:
    """Writes the images as files below `folder`/images."""
    for name, data in images:
        path = folder / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def write_zip(folder: Path, images: Iterator[tuple[str, bytes]]) -> None:
    """Writes `folder`/images.zip."""
    with zipfile.ZipFile(folder / "images.zip", "w") as archive:
        for name, data in images:
            archive.writestr(f"images/{name}", data)


def write_tar(folder: Path, images: Iterator[tuple[str, bytes]], name: str = "images.tar", mode: str = "w:") -> None:
    """Writes `folder`/images.tar, or another archive of `tarfile`."""
    with tarfile.open(folder / name, mode) as archive:  # type: ignore[call-overload]
        for member, data in images:
            info = tarfile.TarInfo(f"images/{member}")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


FORMS: dict[str, Callable[[Path, Iterator[tuple[str, bytes]]], None]] = {
    "files": write_files,
    "zip": write_zip,
    "tar": write_tar,
    "tar.gz": lambda folder, images: write_tar(folder, images, "images.tar.gz", "w:gz"),
}


def write_raw(root: Path, form: str, num_images: int, side: int) -> None:
    """Writes the source `bench` below `root`: its YAML, LLaVA JSON and the images in one form."""
    folder = root / "raw" / "bench"
    folder.mkdir(parents=True)
    FORMS[form](folder, iter_images(num_images, side))
    order = list(range(num_images))
    random.Random(0).shuffle(order)
    turns = [{"from": "human", "value": "<image>\nWhat is shown?"}, {"from": "gpt", "value": "Noise."}]
    with (folder / "bench.json").open("w", encoding="utf-8") as stream:
        for number in order:
            image = f"{number // 1000:05d}/{number:09d}.jpg"
            stream.write(json.dumps({"id": str(number), "image": image, "conversations": turns}) + "\n")
    write_source(root, "reader: llava_json\noptions: {annotations: bench.json, image_root: images}\n")


def measure(num_images: int, side: int, forms: Sequence[str], parent: Path | None) -> Result:
    """Prepares each form; sizes in bytes, times in seconds, memory in MiB."""
    results: Result = {}
    for form in forms:
        with TemporaryDirectory(dir=parent) as folder:
            root = Path(folder)
            began = time.perf_counter()
            write_raw(root, form, num_images, side)
            written = time.perf_counter() - began
            times = run_alone(PROGRAM, form, root, num_images)
            cache = root / "stores" / ".archives"
            results[form] = times | {
                "write_s": written,
                "raw_mib": folder_mib(root / "raw"),
                "cache_mib": folder_mib(cache) if cache.exists() else 0.0,
                "images_per_s": num_images / times["wall_s"],
                "fingerprint": Store.open(root / "stores" / "bench").fingerprint,
            }
            shutil.rmtree(root / "raw")
    return results


def folder_mib(folder: Path) -> float:
    """Size of the files of a folder in MiB."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 2**20


def results_table(results: Result) -> str:
    """One line for each form."""
    columns = (
        ("raw_mib", "MiB raw", ",.0f"),
        ("cache_mib", "MiB cache", ",.0f"),
        ("wall_s", "s", ",.0f"),
        ("cpu_s", "cpu s", ",.0f"),
        ("images_per_s", "images/s", ",.0f"),
        ("program_mib", "MiB program", ",.0f"),
        ("worker_mib", "MiB a worker", ",.0f"),
    )
    return columns_table(columns, results, "form")


def main(arguments: Sequence[str] | None = None) -> int:
    """The program; returns 1 if the stores differ."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(PROGRAM, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=100_000, help="number of images")
    parser.add_argument("--side", type=int, default=96, help="height and width of an image in pixels")
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS))
    parser.add_argument("--folder", type=Path, help="parent of the temporary folders")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON file")
    parser.add_argument("--alone", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args(words)
    if options.alone:
        _, root, num_images = options.alone
        print(json.dumps(prepare_alone(Path(root), int(num_images))))
        return 0
    results = measure(options.images, options.side, options.forms, options.folder)
    print(results_table(results), flush=True)
    save("archives", PROGRAM, words, results, options.out)
    is_same = len({row["fingerprint"] for row in results.values()}) == 1
    print("all stores have one fingerprint" if is_same else "the stores differ")
    return int(not is_same)
