"""Pictures as bytes: found inside their root, decoded once to be sure, measured, hashed; in parallel.

Owns: the path rule, the decode check and its limits, the pool of processes that runs it and keeps the order.
Leaves: turning pixels into tiles to the model's side, keeping each picture once to `store.py`.
This module imports neither `datasets` nor numpy, so that the processes it starts stay small.
"""

import hashlib
import io
import itertools
import multiprocessing
import os
import signal
import threading
import time
import warnings
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError

from data_recipes.sample import Reason, Reject, Sample

MAX_PIXELS = 100_000_000  # a page scanned at 600 dpi has 35 million; a decompression bomb claims thousands of millions
MAX_BYTES = 256 * 2**20
MAX_ASPECT_RATIO = 100
# Pillow knows more, some of which call other programs (EPS). Cameras' MPO files count as JPEG.
Image.init()
FORMATS = tuple(
    kind for kind in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF") if kind in Image.OPEN
)

_CHUNK_SAMPLES = 8


class PictureError(Exception):
    """One picture cannot be used; carries the reason and what was seen."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True)
class PictureInfo:
    """A picture's sha256 (of its bytes), size in pixels after EXIF rotation, and format."""

    sha256: str
    height: int
    width: int
    format: str


@dataclass(frozen=True)
class LoadedPicture:
    """A picture that decodes, with its original bytes."""

    info: PictureInfo
    data: bytes


def inside(root: Path, name: str) -> Path:
    """The file `name` below `root`.

    Raises:
        PictureError: `path_outside_root` if `name` is absolute, steps up with `..`, or leaves by a symbolic
            link.
    """
    parts = name.replace("\\", "/").split("/")
    if name.startswith(("/", "\\", "~")) or ".." in parts or "\0" in name:
        raise PictureError(Reason.PATH_OUTSIDE_ROOT, f"{name!r} is not a plain path below the image root")
    path = root / name
    real_root = os.path.realpath(root)
    real_path = os.path.realpath(path)
    if real_path != real_root and not real_path.startswith(real_root.rstrip(os.sep) + os.sep):
        raise PictureError(Reason.PATH_OUTSIDE_ROOT, f"{name!r} leaves the image root by a symbolic link")
    return path


def probe(data: bytes) -> PictureInfo:
    """Decode the whole picture and measure it. A file that was cut off, or is something else, does not pass.

    The extension of the file has no say: the bytes tell the format. The size is the one after EXIF rotation,
    which is what the model will see.

    Raises:
        PictureError: `picture_empty`, `picture_too_large`, `aspect_ratio` or `picture_unreadable`.
    """
    if not data:
        raise PictureError(Reason.PICTURE_EMPTY, "zero bytes")
    if len(data) > MAX_BYTES:
        raise PictureError(Reason.PICTURE_TOO_LARGE, f"{len(data)} bytes; the limit is {MAX_BYTES}")
    try:
        with warnings.catch_warnings():
            # Our own limit is below; Pillow's warning about the same thing would be printed per picture.
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(data), formats=FORMATS)
            kind = image.format or "unknown"
            _check_size(image.height, image.width)
            image.load()
            # Both are what every consumer does next, and both can fail on odd files: better here than in a
            # run.
            ImageOps.exif_transpose(image, in_place=True)
            height, width = image.height, image.width
            if image.mode != "RGB":
                image.convert("RGB")
    except PictureError:
        raise
    except Image.DecompressionBombError as error:
        raise PictureError(Reason.PICTURE_TOO_LARGE, str(error)) from error
    except UnidentifiedImageError as error:
        raise PictureError(Reason.PICTURE_UNREADABLE, f"none of {', '.join(FORMATS)}") from error
    except Exception as error:  # Pillow's decoders raise nearly every type there is on damaged bytes
        detail = f"{type(error).__name__}: {error}"[:200]
        raise PictureError(Reason.PICTURE_UNREADABLE, detail) from error
    return PictureInfo(hashlib.sha256(data).hexdigest(), height, width, kind)


def load(picture: Path | bytes) -> LoadedPicture:
    """Read one picture and probe it.

    Raises:
        PictureError: as `probe`, and `picture_missing` where there is no such file.
    """
    if isinstance(picture, bytes):
        return LoadedPicture(probe(picture), picture)
    try:
        if not picture.is_file():
            raise PictureError(Reason.PICTURE_MISSING, f"no file {picture.name!r} in {picture.parent.name!r}")
        num_bytes = picture.stat().st_size
        if num_bytes > MAX_BYTES:
            raise PictureError(Reason.PICTURE_TOO_LARGE, f"{num_bytes} bytes; the limit is {MAX_BYTES}")
        data = picture.read_bytes()
    except FileNotFoundError as error:
        raise PictureError(Reason.PICTURE_MISSING, f"no file {picture.name!r}") from error
    except OSError as error:
        raise PictureError(Reason.PICTURE_UNREADABLE, f"{error.strerror or error}") from error
    try:
        return LoadedPicture(probe(data), data)
    except PictureError as error:
        raise PictureError(error.reason, f"{picture.name}: {error.detail}") from error


class PicturePool:
    """Loads the pictures of samples in `num_workers` processes and hands them back in the order they came.

    With one worker everything happens in this process. At most a few chunks per worker are under way at any
    time, so memory does not grow with the number of samples. Open it before other threads are started:
    workers are forked, because a spawned one would import the whole calling program first.
    """

    def __init__(self, num_workers: int = 1) -> None:
        self._num_workers = num_workers
        self._executor: ProcessPoolExecutor | None = None
        if num_workers > 1:
            context = multiprocessing.get_context("fork")
            self._executor = ProcessPoolExecutor(num_workers, context, follow_parent, (os.getpid(),))

    def __enter__(self) -> "PicturePool":
        return self

    def __exit__(self, *_: object) -> None:
        if self._executor is not None:
            self._executor.shutdown(wait=True, cancel_futures=True)

    def load_in_order(self, items: Iterable[Sample | Reject]) -> Iterator[tuple[Sample, list[LoadedPicture]] | Reject]:
        """Each sample with its loaded pictures, or a `Reject` if one cannot be used. Rejects pass."""
        source = iter(items)
        under_way: deque[tuple[list[Sample | Reject], Future[list[_Outcome]] | list[_Outcome]]] = deque()
        most_under_way = 2 * self._num_workers if self._executor else 0
        while chunk := list(itertools.islice(source, _CHUNK_SAMPLES)):
            wanted = [item.pictures for item in chunk if isinstance(item, Sample)]
            outcome = self._executor.submit(_load_chunk, wanted) if self._executor else _load_chunk(wanted)
            under_way.append((chunk, outcome))
            while len(under_way) > most_under_way:
                yield from _join(*under_way.popleft())
        while under_way:
            yield from _join(*under_way.popleft())


# The pictures of one sample, or why they cannot be used. Exceptions with two arguments do not survive
# pickling.
_Outcome = list[LoadedPicture] | tuple[Reason, str]


def _join(
    chunk: list[Sample | Reject], outcome: "Future[list[_Outcome]] | list[_Outcome]"
) -> Iterator[tuple[Sample, list[LoadedPicture]] | Reject]:
    outcomes = iter(outcome.result() if isinstance(outcome, Future) else outcome)
    for item in chunk:
        if isinstance(item, Reject):
            yield item
            continue
        loaded = next(outcomes)
        yield (Reject(item.id, loaded[0], loaded[1], item.place) if isinstance(loaded, tuple) else (item, loaded))


def _load_chunk(wanted: list[tuple[Path | bytes, ...]]) -> list[_Outcome]:
    outcomes: list[_Outcome] = []
    for pictures in wanted:
        try:
            outcomes.append([load(picture) for picture in pictures])
        except PictureError as error:
            outcomes.append((error.reason, error.detail))
    return outcomes


def _check_size(height: int, width: int) -> None:
    if height * width > MAX_PIXELS:
        raise PictureError(Reason.PICTURE_TOO_LARGE, f"{height} x {width} pixels; the limit is {MAX_PIXELS} in all")
    if min(height, width) < 1 or max(height, width) > MAX_ASPECT_RATIO * min(height, width):
        raise PictureError(Reason.ASPECT_RATIO, f"{height} x {width} pixels; the limit is 1:{MAX_ASPECT_RATIO}")


def follow_parent(parent: int) -> None:
    """First call of a pool's worker: Ctrl-C is the parent's to handle, and a killed parent takes its workers along."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def leave_with_parent() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os._exit(1)

    threading.Thread(target=leave_with_parent, daemon=True).start()
