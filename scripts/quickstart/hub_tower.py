"""Fetches TinyCLIP, the tower of `quickstart.sh --hub`, from the model hub into the cache.

    python scripts/quickstart/hub_tower.py --cache ~/.cache/llava_next

The commit and the content of the weights are pinned. Only safetensors and JSON are fetched.
"""

import argparse
import shutil
import sys
from pathlib import Path

from assets import locked
from httpx import HTTPError
from huggingface_hub import hf_hub_download
from package_downloads import AssetError, file_sha256
from stamped_folder import is_current, replaced_folder

from llava_next.cache_root import cache_root
from llava_next.config import ModelError

NAME = "tinyclip_8m"  # of the folder in the cache, which quickstart.sh names
REPOSITORY = "wkcn/TinyCLIP-ViT-8M-16-Text-3M-YFCC15M"  # MIT licence, 94 MB
REVISION = "a2a8c6eaa2549ad66eb7c31b85022bf58273a26c"
WEIGHTS = "model.safetensors"
WEIGHTS_SHA256 = "9339ee3d736344d0ddcaa6c03edc9f89688f08caaea5401220885233da726fcc"
FILES = (WEIGHTS, "config.json", "preprocessor_config.json")


def fetch(cache: Path, endpoint: str | None = None) -> Path:
    """Returns the tower's folder in the cache, which is fetched unless it is complete.

    Args:
        cache: folder of the assets.
        endpoint: address of the hub; None means HF_ENDPOINT, or huggingface.co.

    Raises:
        AssetError: the hub does not answer, or the weights are not the pinned ones.
    """
    stamp = {"repository": REPOSITORY, "revision": REVISION, "weights": WEIGHTS_SHA256}
    stamp_file = cache / NAME / "asset.json"
    if is_current(stamp_file, stamp):
        return stamp_file.parent
    cache.mkdir(parents=True, exist_ok=True)
    with locked(cache), replaced_folder(stamp_file, stamp) as folder:
        try:
            for name in FILES:
                hf_hub_download(REPOSITORY, name, revision=REVISION, local_dir=folder, endpoint=endpoint, token=False)
        except (OSError, HTTPError) as error:
            reason = str(error).strip().splitlines()[0]
            raise AssetError(
                f"--hub: {REPOSITORY} could not be fetched from the model hub ({reason}); run the quickstart without "
                "--hub, which needs no hub, or set HF_ENDPOINT to a mirror."
            ) from error
        shutil.rmtree((folder / ".cache/huggingface").parent, ignore_errors=True)  # the client's notes on the download
        actual = file_sha256(folder / WEIGHTS)
        if actual != WEIGHTS_SHA256:
            raise AssetError(
                f"--hub: {WEIGHTS} of {REPOSITORY} has sha256 {actual}, but {WEIGHTS_SHA256} is pinned in "
                "scripts/quickstart/hub_tower.py; it was not used: try again, or run the quickstart without --hub."
            )
    return stamp_file.parent


def main(arguments: list[str] | None = None) -> int:
    """The program; returns its exit code (2 if the tower could not be fetched)."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--cache", type=Path, help="folder for the tower (default: that of all assets)")
    options = parser.parse_args(arguments)
    try:
        cache: Path = (options.cache or cache_root()).expanduser().resolve()
        print(f"{REPOSITORY}: {fetch(cache)}")
    except (AssetError, ModelError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
