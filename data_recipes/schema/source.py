"""What a source is: its YAML, its reader, and the state of its raw folder.

Owns: `SourceInfo`, reading `configs/source/*.yaml`, finding a reader and checking its options, the digest
that tells whether anything changed since a store was made.
Leaves: raw layouts to `readers/`, the making of stores to `prepare/` and `writing/`.
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

from data_recipes.schema.sample import DataError, Reject, Sample

NOT_STATED = "not stated"

METRICS = ("exact_match", "vqa_accuracy", "relaxed_accuracy", "anls", "options", "edit_similarity", "grounding_iou")
"""What `metric` may name besides `none`; `train/evaluate/metrics.py` computes them."""

Reader = Callable[..., Iterator[Sample | Reject]]


@dataclass(frozen=True)
class SourceInfo:
    """One dataset: where it is, who reads it, and what is to be said about it.

    Attributes:
        name: the YAML's file name.
        reader: a name in `data_recipes/readers`, or the path of a module of one's own (`mylab.receipts`).
        root: the raw folder, relative to `--raw` or absolute.
        options: what the reader's `samples` takes besides the root.
        publisher, fetch, size, licence: shown where they are needed, and kept in the manifest; `size` is what has
            to be fetched, in words.
        citation: a BibTeX entry: `key`, `type` (article, inproceedings, misc) and its fields.
        metric: how answers are judged in an evaluation, one of `METRICS`; `none` where only the loss says anything
            (captions, descriptions, chats).
        expected_count: samples that the published set gives; None where that is not a fixed number.
        max_reject_share: `prepare` fails above this share of rejected records, between 0 and 1.
    """

    name: str
    reader: str
    root: str
    options: dict[str, Any] = field(default_factory=dict)
    publisher: str = ""
    fetch: str = ""
    size: str = ""
    licence: str = ""
    citation: dict[str, str] = field(default_factory=dict)
    metric: str = "exact_match"
    expected_count: int | None = None
    max_reject_share: float = 0.02

    def raw_folder(self, raw_root: Path) -> Path:
        """The raw folder.

        Raises:
            NoRawFolder: it is not there; says who publishes it, how to fetch it, how much it is, under which licence,
                and where to put it.
        """
        folder = raw_root / self.root
        if not folder.is_dir():
            raise NoRawFolder([self], raw_root)
        return folder

    def samples(self, raw_root: Path) -> Iterator[Sample | Reject]:
        """The reader's stream over the raw folder.

        Raises:
            DataError: no such reader, options it does not take, or no raw folder.
        """
        reader: Reader = find_reader(self.name, self.reader)
        folder = self.raw_folder(raw_root)
        self._check_options(reader)
        return reader(folder, **self.options)

    def _check_options(self, reader: Reader) -> None:
        """Every option is one that the reader has, and none that it needs is missing."""
        place = f"source {self.name}: `options`"
        takes = list(inspect.signature(reader).parameters.values())[1:]
        if all(parameter.kind != parameter.VAR_KEYWORD for parameter in takes):
            known = [parameter.name for parameter in takes]
            refuse_unknown(place, self.options, known, f"reader {self.reader} takes")
        for parameter in takes:
            is_needed = parameter.default is parameter.empty and parameter.kind != parameter.VAR_KEYWORD
            if is_needed and parameter.name not in self.options:
                listed = ", ".join(str(each) for each in takes)
                raise DataError(f"{place}: {parameter.name!r} is missing; reader {self.reader} takes: {listed}.")

    def recipe_digest(self) -> str:
        """sha256 of what decides the samples besides the raw files: reader and options."""
        return _digest([self.reader, self.root, self.options])


class NoRawFolder(DataError):
    """Raw folders that are not there, each with all that is known of it."""

    def __init__(self, sources: Sequence[SourceInfo], raw_root: Path) -> None:
        self.sources = sources
        by_folder: dict[Path, list[SourceInfo]] = {}
        for source in sources:
            by_folder.setdefault(raw_root / source.root, []).append(source)
        lines = ["no raw folder at" if len(by_folder) == 1 else f"{len(by_folder)} raw folders are not there:"]
        for folder, group in by_folder.items():
            lines.append(f"  {folder}  (for {', '.join(source.name for source in group)})")
            lines += [f"    {key}:{_known(group, key)}" for key in ("publisher", "fetch", "size", "licence")]
            counts = [source.expected_count for source in group if source.expected_count]
            lines += [f"    expected: {sum(counts):,} samples"] if counts else []
        lines.append("Put each there, or name another folder as `root` in the source's YAML.")
        super().__init__("\n".join(lines))


def _known(sources: Sequence[SourceInfo], key: str) -> str:
    """What the sources say, each thing once; and for which of them, where it differs."""
    said: dict[str, list[str]] = {}
    for source in sources:
        said.setdefault(getattr(source, key) or NOT_STATED, []).append(source.name)
    if len(said) == 1:
        return f" {next(iter(said))}"
    return "".join(f"\n      {', '.join(names)}: {text}" for text, names in said.items())


def find_reader(source: str, reader: str, function: str = "samples") -> Callable[..., Any]:
    """A reader's function.

    Raises:
        DataError: no such module, or it has no such function.
    """
    module_path = reader if "." in reader else f"data_recipes.readers.{reader}"
    try:
        module = importlib.import_module(module_path)
    except ModuleNotFoundError as error:
        if error.name is None or not (module_path + ".").startswith(error.name + "."):
            raise  # the reader is there, and something that it imports is not
        known = sorted(p.stem for p in (Path(__file__).parents[1] / "readers").glob("[a-z]*.py"))
        raise DataError(
            f"source {source}: there is no reader {reader!r}. Known: {', '.join(known)}; a reader of your "
            f"own is "
            "named by its module path (`mylab.receipts`), which Python must be able to import."
        ) from error
    found = getattr(module, function, None)
    if not callable(found):
        raise DataError(f"source {source}: reader {module_path} has no function `{function}(root, **options)`.")
    return found  # type: ignore[no-any-return]


def read_source(configs: Path, name: str) -> SourceInfo:
    """The source `configs/source/<name>.yaml`.

    Raises:
        DataError: there is none (the known ones are listed), or it has unknown keys or values of a wrong
            type.
    """
    values = read_yaml(configs, "source", name)
    known = {f.name for f in fields(SourceInfo)} - {"name"}
    place = f"configs/source/{name}.yaml"
    refuse_unknown(place, values, [*sorted(known), "name"])
    for key in ("reader", "root"):
        if not values.get(key):
            raise DataError(f"{place}: `{key}` is missing; a source needs `reader` and `root`.")
    values = {key: value for key, value in values.items() if value is not None and key != "name"}
    types: dict[str, tuple[type, ...]] = {
        "options": (dict,),
        "citation": (dict,),
        "expected_count": (int,),
        "max_reject_share": (int, float),
    }
    for key, value in values.items():
        wanted = types.get(key, (str,))
        if not isinstance(value, wanted) or isinstance(value, bool):
            names = " or ".join(kind.__name__ for kind in wanted)
            raise DataError(f"{place}: `{key}` is {value!r}, and must be {names}.")
    values["citation"] = _citation(place, values.get("citation", {}))
    info = SourceInfo(name=name, **values)
    if info.metric not in (*METRICS, "none"):
        near = difflib.get_close_matches(info.metric, METRICS, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise DataError(f"{place}: `metric` is {info.metric!r}; known: {', '.join(METRICS)}, none.{hint}")
    if not 0 <= info.max_reject_share <= 1:
        raise DataError(f"{place}: `max_reject_share` is {info.max_reject_share}, and must lie between 0 and 1.")
    return info


def _citation(place: str, entry: dict[str, Any]) -> dict[str, str]:
    """A BibTeX entry with all its values as strings; a year is a number in YAML."""
    for key in ("key", "type", "title"):
        if entry and not entry.get(key):
            raise DataError(f"{place}: `citation` has no `{key}`; a BibTeX entry needs `key`, `type` and `title`.")
    return {str(key): str(value) for key, value in entry.items()}


def refuse_unknown(place: str, values: Mapping[str, Any], known: Sequence[str], what: str = "known keys") -> None:
    """Keys that mean nothing are a mistake, told with the known ones and the nearest of them.

    Raises:
        DataError: `values` has a key that is not known.
    """
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise DataError(f"{place}: unknown key {key!r}; {what}: {', '.join(known) or 'none'}.{hint}")


def read_yaml(configs: Path, group: str, name: str) -> dict[str, Any]:
    """The mapping in `configs/<group>/<name>.yaml`.

    Raises:
        DataError: no such file (the known ones are listed, the nearest one is proposed), or not a mapping.
    """
    known = sorted(path.stem for path in (configs / group).glob("*.yaml"))
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise DataError(
            f"there is no {group} {name!r} in {configs / group}.{hint} Known: {', '.join(known) or 'none'}."
        )
    try:
        values = yaml.safe_load((configs / group / f"{name}.yaml").read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise DataError(f"{configs / group / name}.yaml is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise DataError(f"{configs / group / name}.yaml must hold keys and values.")
    return values


@dataclass(frozen=True)
class RawState:
    """What a raw folder holds: sha256 over name, size and time of change of every file below it, and their bytes."""

    digest: str
    num_bytes: int


def raw_state(folder: Path, leave_out: Path) -> RawState:
    """Has anything been touched? Files are not read. Folders behind links are looked at too, each once.

    Args:
        folder: a source's raw folder.
        leave_out: a folder to pass over where it lies inside (the stores, in a cramped layout).
    """
    digest, num_bytes = hashlib.sha256(), 0
    looked_at = {os.path.realpath(leave_out), os.path.realpath(folder)}
    for current, folders, names in os.walk(folder, followlinks=True):
        below = os.path.relpath(current, folder)
        for name in sorted(names):
            try:
                status = os.stat(f"{current}/{name}")  # noqa: PTH116  (a Path costs more than the call)
            except OSError:  # a link to nowhere; the reader will meet it
                continue
            digest.update(json.dumps([below, name, status.st_size, status.st_mtime_ns]).encode())
            num_bytes += status.st_size
        real = {name: os.path.realpath(f"{current}/{name}") for name in sorted(folders)}
        folders[:] = [name for name, path in real.items() if path not in looked_at]
        looked_at.update(real.values())
    return RawState(digest.hexdigest(), num_bytes)


def describe(info: SourceInfo) -> dict[str, Any]:
    """What the manifest keeps of a source: everything but the place of its raw folder on this machine."""
    return {key: value for key, value in asdict(info).items() if key not in ("root", "max_reject_share")}


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
