"""Tries readers on the first records of a raw folder and says which one fits."""

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from data_recipes.guess.candidates import Candidate, list_candidates, list_published
from data_recipes.guess.first_records import shorten
from data_recipes.guess.folder_look import FolderLook
from data_recipes.guess.time_limit import OutOfTime, time_limit
from data_recipes.raw.image_files import ImageError, ImageInfo, load_image
from data_recipes.schema.sample import DataError, Reject, Sample, check_sample
from data_recipes.schema.source import SourceInfo

NUM_RECORDS = 50
"""Records that each reader is tried on; more if none of them is kept."""
_MAX_RECORDS = 1000  # a file may begin with records that are rejected for what they say
_NUM_SHOWN = 3
_NUM_DECODED = 8  # samples whose images are decoded; of the others, only missing files are noticed
_SECONDS = 30.0  # for one reader: those of published layouts read all questions before the first sample


@dataclass
class Trial:
    """What a reader makes of the first records.

    Attributes:
        candidate: the reader with its options.
        num_records: number of records that it was tried on.
        num_kept: number of those that are valid samples with their images.
        rejects: {reason: number of records}.
        first_reject: the first rejected record.
        shown: the first samples, with the properties of their images.
        error: why the reader could not be tried; empty if it was.
        has_files: whether the files that it reads are there.
    """

    candidate: Candidate
    num_records: int = 0
    num_kept: int = 0
    rejects: Counter[str] = field(default_factory=Counter)
    first_reject: Reject | None = None
    shown: list[tuple[Sample, list[ImageInfo]]] = field(default_factory=list)
    error: str = ""
    has_files: bool = True

    @property
    def kept_share(self) -> float:
        """Fraction of the records that were kept; 0 if there were none."""
        return self.num_kept / self.num_records if self.num_records else 0.0


def try_readers(look: FolderLook, published: bool = True) -> list[Trial]:
    """Try every reader that may fit, the best first: the one that keeps the largest share of the records.

    Args:
        look: a look at the raw folder.
        published: whether readers of published layouts, which need the whole folder, are tried too.
    """
    candidates = (list_published() if published else []) + list_candidates(look)
    trials = [try_reader(look.root, candidate) for candidate in candidates]
    return sorted(
        trials, key=lambda trial: -trial.kept_share
    )  # stable: the order of the candidates is that of preference


def try_reader(root: Path, candidate: Candidate) -> Trial:
    """Read the first records of a folder with one reader, and check samples and images as a preparation does."""
    trial = Trial(candidate)
    source = SourceInfo("guess", candidate.reader, str(root.absolute()), dict(candidate.options))
    try:
        with time_limit(_SECONDS):
            for item in itertools.islice(source.samples(Path()), _MAX_RECORDS):
                _count(trial, item)
                if trial.num_records >= NUM_RECORDS and trial.num_kept:
                    break
    except OutOfTime:
        if trial.num_records == 0:
            trial.error = f"it did not read a record within {_SECONDS:.0f} seconds"
    except (DataError, FileNotFoundError) as error:
        trial.error = shorten(str(error), 300)
        trial.has_files = bool(candidate.file)
    except Exception as error:  # a reader may fail in any way on files that it was not made for
        trial.error = shorten(f"{type(error).__name__}: {error}", 300)
    return trial


def _count(trial: Trial, item: Sample | Reject) -> None:
    trial.num_records += 1
    reject = item if isinstance(item, Reject) else check_sample(item)
    images: list[ImageInfo] = []
    if reject is None and isinstance(item, Sample):
        try:
            images = list(_check_images(item, decoded=trial.num_kept < _NUM_DECODED))
        except ImageError as error:
            reject = Reject(item.id, error.reason, error.detail, item.location)
    if reject is not None:
        trial.rejects[reject.reason.value] += 1
        trial.first_reject = trial.first_reject or reject
    elif isinstance(item, Sample):
        trial.num_kept += 1
        if len(trial.shown) < _NUM_SHOWN:
            trial.shown.append((item, images))


def _check_images(sample: Sample, decoded: bool) -> Iterator[ImageInfo]:
    """Yield the properties of a sample's images, if they are to be decoded.

    Raises:
        ImageError: an image does not exist or cannot be decoded.
    """
    for image in sample.images:
        if decoded or (isinstance(image, Path) and not image.is_file()):
            yield load_image(image).info


def best_of(trials: Sequence[Trial]) -> Trial | None:
    """The trial that keeps most, or None if none keeps a record."""
    return trials[0] if trials and trials[0].num_kept else None
