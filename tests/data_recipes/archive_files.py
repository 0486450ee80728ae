"""Packs small folders into archives of the kinds that publishers ship."""

import io
import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path

from tests.data_recipes.raw_folders import write_file

Files = Mapping[str, bytes]


def zip_bytes(files: Files, compression: int = zipfile.ZIP_STORED) -> bytes:
    """Return a zip archive of these files."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", compression) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return stream.getvalue()


def tar_bytes(files: Files, mode: str = "w:") -> bytes:
    """Return a tar archive of these files; `mode` is that of `tarfile`, such as `w:gz`."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode=mode) as archive:  # type: ignore[call-overload]
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return stream.getvalue()


def pack(path: Path, files: Files) -> Path:
    """Write an archive whose type follows from the extension of `path`."""
    if path.suffix == ".zip":
        return write_file(path, zip_bytes(files))
    modes = {".tar": "w:", ".gz": "w:gz", ".tgz": "w:gz", ".bz2": "w:bz2", ".xz": "w:xz"}
    return write_file(path, tar_bytes(files, modes[path.suffix]))


def split(path: Path, num_parts: int, name: str = "{path}.{number:03d}") -> list[Path]:
    """Replace a file by its parts, which are numbered from 1."""
    data = path.read_bytes()
    step = -(-len(data) // num_parts)
    parts = []
    for number in range(1, num_parts + 1):
        letters = f"{chr(ord('a') + (number - 1) // 26)}{chr(ord('a') + (number - 1) % 26)}"
        part = path.with_name(name.format(path=path.name, stem=path.stem, number=number, letters=letters))
        parts.append(write_file(part, data[(number - 1) * step : number * step]))
    path.unlink()
    return parts


def files_of(folder: Path) -> dict[str, bytes]:
    """Return the files of a folder by their relative path, in order."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}
