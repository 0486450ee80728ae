"""Configuration of a source: its YAML file, its reader, and the state of its raw folder.

A source is one dataset. `SourceInfo` is read from `configs/source/*.yaml`; the digests computed here show whether the
reader, its options or the raw files have changed since a store was prepared.
"""

import difflib
import hashlib
import importlib
import inspect
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from data_recipes.schema.downloads import Download, parse_downloads
from data_recipes.schema.sample import DataError, Reject, Sample

NOT_STATED = "not stated"
"""Shown for values that the YAML does not give."""

METRICS = (
    "exact_match",
    "vqa_accuracy",
    "relaxed_accuracy",
    "anls",
    "options",
    "edit_similarity",
    "grounding_iou",
    "rouge_l",
)
"""Values of `metric` besides `none`; `train/evaluate/metrics.py` computes them."""

_VALUE_TYPES: dict[str, tuple[type, ...]] = {
    "options": (dict,),
    "citation": (dict,),
    "download": (list,),
    "expected_count": (int,),
    "max_reject_share": (int, float),
}

Reader = Callable[..., Iterator[Sample | Reject]]


@dataclass(frozen=True)
class SourceInfo:
    """Description of one dataset.

    Attributes:
        name: name of the YAML file, without extension.
        reader: name of a module in `data_recipes/readers`, or the import path of a custom module (`mylab.receipts`).
        root: the raw folder, relative to `--raw` or absolute.
        options: keyword arguments of the reader's `samples` function.
        publisher, fetch, size, licence: free text, shown to the user and written to the manifest. `fetch` says how to
            download the raw files, `size` how large they are.
        download: where the raw files are published, for `python -m data_recipes.fetch`; no part of a store's digest.
        citation: a BibTeX entry: `key`, `type` (article, inproceedings, misc) and its fields.
        metric: evaluation metric of the answers, one of `METRICS`, or `none` for sources such as captions and chats, of
            which only the loss is evaluated.
        expected_count: number of samples in the published dataset; None if it is not a fixed number.
        max_reject_share: largest accepted fraction of rejected records, between 0 and 1.
    """

    name: str
    reader: str
    root: str
    options: dict[str, Any] = field(default_factory=dict)
    publisher: str = ""
    fetch: str = ""
    size: str = ""
    licence: str = ""
    download: tuple[Download, ...] = ()
    citation: dict[str, str] = field(default_factory=dict)
    metric: str = "exact_match"
    expected_count: int | None = None
    max_reject_share: float = 0.02

    def raw_folder(self, raw_root: Path) -> Path:
        """Return the path of the raw folder.

        Raises:
            MissingRawFolderError: it does not exist. The message gives publisher, download instructions, size, licence
                and the expected path.
        """
        folder = raw_root / self.root
        if not folder.is_dir():
            raise MissingRawFolderError([self], raw_root)
        return folder

    def samples(self, raw_root: Path) -> Iterator[Sample | Reject]:
        """Return the reader's iterator over the raw folder.

        Reader, options and folder are checked immediately; nothing is read before the first sample is requested.

        Raises:
            DataError: the reader does not exist, does not accept the options, or the raw folder is missing.
        """
        reader: Reader = find_reader(self.name, self.reader)
        folder = self.raw_folder(raw_root)
        self._check_options(reader)
        return reader(folder, **self.options)

    def _check_options(self, reader: Reader) -> None:
        """Raise DataError for unknown options and for missing required ones."""
        origin = f"source {self.name}: `options`"
        parameters = list(inspect.signature(reader).parameters.values())[1:]
        if all(parameter.kind != parameter.VAR_KEYWORD for parameter in parameters):
            known = [parameter.name for parameter in parameters]
            reject_unknown_keys(origin, self.options, known, f"reader {self.reader} takes")
        for parameter in parameters:
            is_required = parameter.default is parameter.empty and parameter.kind != parameter.VAR_KEYWORD
            if is_required and parameter.name not in self.options:
                listed = ", ".join(str(each) for each in parameters)
                raise DataError(f"{origin}: {parameter.name!r} is missing; reader {self.reader} takes: {listed}.")

    def recipe_digest(self) -> str:
        """Compute the sha256 of the configuration that determines the samples: reader, root and options."""
        return _digest([self.reader, self.root, self.options])


class MissingRawFolderError(DataError):
    """One or more raw folders do not exist; the message says how to obtain each of them."""

    def __init__(self, sources: Sequence[SourceInfo], raw_root: Path) -> None:
        self.sources = sources
        by_folder: dict[Path, list[SourceInfo]] = {}
        for source in sources:
            by_folder.setdefault(raw_root / source.root, []).append(source)
        lines = ["missing raw folder:" if len(by_folder) == 1 else f"{len(by_folder)} missing raw folders:"]
        for folder, group in by_folder.items():
            lines.append(f"  {folder}  (for {', '.join(source.name for source in group)})")
            lines += [f"    {key}:{_format_facts(group, key)}" for key in ("publisher", "fetch", "size", "licence")]
            counts = [source.expected_count for source in group if source.expected_count]
            lines += [f"    expected: {sum(counts):,} samples"] if counts else []
        published = [source.name for source in sources if source.download]
        if published:
            lines.append(
                f"`python -m data_recipes.fetch --source {' '.join(published)} --raw {raw_root}` fetches them."
            )
        lines.append("Download them to these paths, or set `root` in the source's YAML.")
        super().__init__("\n".join(lines))


def _format_facts(sources: Sequence[SourceInfo], key: str) -> str:
    """Format one attribute of several sources; with their names if the values differ."""
    names_by_value: dict[str, list[str]] = {}
    for source in sources:
        names_by_value.setdefault(getattr(source, key) or NOT_STATED, []).append(source.name)
    if len(names_by_value) == 1:
        return f" {next(iter(names_by_value))}"
    return "".join(f"\n      {', '.join(names)}: {value}" for value, names in names_by_value.items())


def find_reader(source: str, reader: str, function: str = "samples") -> Callable[..., Any]:
    """Import a function of a reader module.

    Args:
        source: name of the source, for error messages.
        reader: name or import path of the reader.
        function: name of the function.

    Raises:
        DataError: there is no such module, or it has no such function.
    """
    module_path = reader if "." in reader else f"data_recipes.readers.{reader}"
    try:
        module = importlib.import_module(module_path)
    except ModuleNotFoundError as error:
        if error.name is None or not (module_path + ".").startswith(error.name + "."):
            raise  # the reader exists, but one of its own imports does not
        known = sorted(p.stem for p in (Path(__file__).parents[1] / "readers").glob("[a-z]*.py"))
        raise DataError(
            f"source {source}: there is no reader {reader!r}. Known: {', '.join(known)}. For a custom reader, give the "
            "import path of its module (`mylab.receipts`)."
        ) from error
    loaded = getattr(module, function, None)
    if not callable(loaded):
        raise DataError(f"source {source}: reader {module_path} has no function `{function}(root, **options)`.")
    return loaded  # type: ignore[no-any-return]


def read_source(configs: Path | Sequence[Path], name: str) -> SourceInfo:
    """Read and validate `source/<name>.yaml`, of the first of the folders that has it.

    Raises:
        DataError: the file does not exist, or it has unknown keys or invalid values.
    """
    values = read_yaml(configs, "source", name)
    known = {f.name for f in fields(SourceInfo)} - {"name"}
    origin = f"configs/source/{name}.yaml"
    reject_unknown_keys(origin, values, [*sorted(known), "name"])
    for key in ("reader", "root"):
        if not values.get(key):
            raise DataError(f"{origin}: `{key}` is missing; `reader` and `root` are required.")
    values = {key: value for key, value in values.items() if value is not None and key != "name"}
    for key, value in values.items():
        expected_types = _VALUE_TYPES.get(key, (str,))
        if not isinstance(value, expected_types) or isinstance(value, bool):
            names = " or ".join(kind.__name__ for kind in expected_types)
            raise DataError(f"{origin}: `{key}` is {value!r}, but must be {names}.")
    values["download"] = parse_downloads(origin, values.get("download", []), reject_unknown_keys)
    values["citation"] = _parse_citation(origin, values.get("citation", {}))
    info = SourceInfo(name=name, **values)
    if info.metric not in (*METRICS, "none"):
        known_metrics = f"known: {', '.join(METRICS)}, none.{_suggest(info.metric, METRICS)}"
        raise DataError(f"{origin}: `metric` is {info.metric!r}; {known_metrics}")
    if not 0 <= info.max_reject_share <= 1:
        raise DataError(f"{origin}: `max_reject_share` is {info.max_reject_share}, but must be between 0 and 1.")
    return info


def _parse_citation(origin: str, entry: dict[str, Any]) -> dict[str, str]:
    """Validate a BibTeX entry and convert its values to strings; YAML reads a year as a number."""
    for key in ("key", "type", "title"):
        if entry and not entry.get(key):
            raise DataError(f"{origin}: `citation` has no `{key}`; `key`, `type` and `title` are required.")
    return {str(key): str(value) for key, value in entry.items()}


def reject_unknown_keys(
    origin: str, values: Mapping[str, Any], known: Sequence[str], title: str = "known keys"
) -> None:
    """Check that `values` has known keys only.

    Args:
        origin: file or key that `values` come from, for the error message.
        values: the mapping to check.
        known: the accepted keys.
        title: introduces the accepted keys in the error message.

    Raises:
        DataError: `values` has an unknown key. The message lists the known ones and suggests the closest.
    """
    for key in values:
        if key not in known:
            listed = f"{title}: {', '.join(known) or 'none'}.{_suggest(str(key), known)}"
            raise DataError(f"{origin}: unknown key {key!r}; {listed}")


def read_yaml(configs: Path | Sequence[Path], group: str, name: str) -> dict[str, Any]:
    """Read the mapping in `<group>/<name>.yaml`, of the first of the folders that has it.

    Raises:
        DataError: the file does not exist (the message lists the known names), is not valid YAML, or is not a mapping.
    """
    folders = [configs / group] if isinstance(configs, Path) else [folder / group for folder in configs]
    paths = {path.stem: path for folder in reversed(folders) for path in folder.glob("*.yaml")}
    if name not in paths:
        known = sorted(paths)
        listed = f"{_suggest(name, known)} Known: {', '.join(known) or 'none'}."
        raise DataError(f"there is no {group} {name!r} in {' or '.join(map(str, folders))}.{listed}")
    path = paths[name]
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise DataError(f"{path} must be a mapping of keys to values.")
    return values


def _suggest(name: str, known: Sequence[str]) -> str:
    """Return " Did you mean ...?" with the closest known name, or an empty string."""
    closest = difflib.get_close_matches(name, known, n=1)
    return f" Did you mean {closest[0]}?" if closest else ""


@dataclass(frozen=True)
class RawState:
    """State of a raw folder.

    Attributes:
        digest: sha256 over path, size and modification time of every file.
        num_bytes: total size of the files.
    """

    digest: str
    num_bytes: int


def scan_raw_folder(folder: Path, exclude_folder: Path) -> RawState:
    """Compute the state of a raw folder without reading its files.

    Symbolic links to folders are followed; each folder is visited once.

    Args:
        folder: a source's raw folder.
        exclude_folder: a folder to skip if it is inside `folder`, such as the stores.
    """
    digest, num_bytes = hashlib.sha256(), 0
    visited = {os.path.realpath(exclude_folder), os.path.realpath(folder)}
    for current, folders, names in os.walk(folder, followlinks=True):
        relative = os.path.relpath(current, folder)
        for name in sorted(names):
            try:
                status = os.stat(f"{current}/{name}")  # noqa: PTH116  (a Path costs more than the call)
            except OSError:  # a broken link; the reader reports it
                continue
            digest.update(json.dumps([relative, name, status.st_size, status.st_mtime_ns]).encode())
            num_bytes += status.st_size
        real = {name: os.path.realpath(f"{current}/{name}") for name in sorted(folders)}
        folders[:] = [name for name, path in real.items() if path not in visited]
        visited.update(real.values())
    return RawState(digest.hexdigest(), num_bytes)


def describe_source(info: SourceInfo) -> dict[str, Any]:
    """Return the attributes that are written to the manifest; `root`, which depends on the machine, is not."""
    omitted = ("root", "max_reject_share", "download")
    return {key: value for key, value in asdict(info).items() if key not in omitted}


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
