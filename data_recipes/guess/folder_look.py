"""What is in a raw folder, by the names of its files: a look of bounded size that opens none of them."""

import os
from collections import deque
from dataclasses import dataclass
from pathlib import Path

# No further folder is opened after this many entries. A folder that has been opened is read to its end, because the
# table of an imagefolder is one entry among its images.
_MAX_ENTRIES = 20_000
_MAX_ENTRIES_OF_FOLDER = 1_000_000
_MAX_NAMES = 1000  # of each kind

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".heic", ".heif", ".avif")
TABLE_SUFFIXES = (".json", ".jsonl", ".csv")
TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
ARCHIVE_SUFFIXES = (".zip", *TAR_SUFFIXES)
# Files that describe a dataset, a model or a store and have no records.
_DESCRIPTIONS = (
    "dataset_info.json",
    "dataset_infos.json",
    "dataset_dict.json",
    "state.json",
    "config.json",
    "manifest.json",
    "inputs.json",
)


@dataclass
class FolderLook:
    """The names in a raw folder, relative to it, with `/` between folders.

    Attributes:
        root: the raw folder.
        folders: folders that were opened, `.` first, in the order of their depth.
        tables: files of records: .json, .jsonl, .csv.
        parquet: parquet files.
        archives: zip and tar files.
        arrow: Arrow files of `datasets.save_to_disk`.
        num_images: number of image files.
        num_entries: number of files and folders that were seen.
        is_cut: whether there is more than was looked at.
    """

    root: Path
    folders: list[str]
    tables: list[str]
    parquet: list[str]
    archives: list[str]
    arrow: list[str]
    num_images: int = 0
    num_entries: int = 0
    is_cut: bool = False

    def keep_only(self, file: str) -> None:
        """Leave out all other files of records; archives with images are kept."""
        name = file.lower()
        self.tables = [file] if name.endswith(TABLE_SUFFIXES) else []
        self.parquet = [file] if name.endswith(".parquet") else []
        self.archives = [file] if name.endswith(TAR_SUFFIXES) else self.archives
        self.arrow = []


def look_at(root: Path) -> FolderLook:
    """Look at a folder, the folders in it, and so on, until enough has been seen. Hidden files are not looked at.

    Raises:
        OSError: `root` cannot be read. Folders below it that cannot be read are left out.
    """
    look = FolderLook(root, [], [], [], [], [])
    waiting = deque(["."])
    visited: set[str] = set()
    while waiting:
        if look.num_entries >= _MAX_ENTRIES:
            look.is_cut = True
            break
        folder = waiting.popleft()
        real = os.path.realpath(root / folder)
        if real in visited:  # a link to a folder around it
            continue
        visited.add(real)
        try:
            below = _list_folder(look, folder)
        except OSError:
            if folder == ".":
                raise
            continue
        look.folders.append(folder)
        waiting.extend(sorted(below))
    for names in (look.tables, look.parquet, look.archives, look.arrow):
        names.sort(key=lambda name: (name.count("/"), name))
    return look


def _list_folder(look: FolderLook, folder: str) -> list[str]:
    """Add the entries of a folder to the look and return the folders in it."""
    below = []
    prefix = "" if folder == "." else f"{folder}/"
    kinds = (
        (TABLE_SUFFIXES, look.tables),
        ((".parquet",), look.parquet),
        (ARCHIVE_SUFFIXES, look.archives),
        ((".arrow",), look.arrow),
    )
    with os.scandir(look.root / folder) as entries:
        for number, entry in enumerate(entries):
            if number >= _MAX_ENTRIES_OF_FOLDER:
                look.is_cut = True
                break
            look.num_entries += 1
            name = entry.name.lower()
            if name.startswith("."):
                continue
            if name.endswith(IMAGE_SUFFIXES):
                look.num_images += 1
                continue
            if entry.is_dir():
                below.append(prefix + entry.name)
                continue
            for suffixes, names in kinds:
                if name.endswith(suffixes) and name not in _DESCRIPTIONS and len(names) < _MAX_NAMES:
                    names.append(prefix + entry.name)
    return below
