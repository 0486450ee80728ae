"""Directories of models: found by path or by the id of a model on the hub, and checked before anything is read.

An id is looked up on this machine only: in the folder of downloaded models, and in the hub's own cache. Nothing here
uses the network; `python -m train.fetch` fills the cache.
"""

import argparse
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from llava_next.file_access import permission_problem

MODELS_VARIABLE = "LLAVA_NEXT_MODELS"
"""Environment variable of the folder of downloaded models; `models` if it is not set."""

FETCH_COMMAND = "python -m train.fetch"

Part = Literal["language model", "vision tower", "tokenizer"]

_ID = re.compile(r"(?P<repository>\w[\w.-]*/\w[\w.-]*)(?:@(?P<revision>\w[\w./-]*))?", re.ASCII)
_SNAPSHOT = re.compile(r".*/models--(?P<owner>[^/]+?)--(?P<name>[^/]+)/snapshots/[^/]+/*")
_LFS_POINTER = b"version https://git-lfs.github.com/"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")
_WEIGHTS = {
    "*.safetensors": "model.safetensors.index.json",
    "pytorch_model*.bin": "pytorch_model.bin.index.json",
}
"""Patterns of the files of weights, in the order of preference, and the index of their names."""


@dataclass(frozen=True)
class HubId:
    """The id of a model on the hub, `ORG/NAME` or `ORG/NAME@REVISION`; a branch, a tag or a commit is a revision."""

    repository: str
    revision: str | None = None

    def __str__(self) -> str:
        return self.repository if self.revision is None else f"{self.repository}@{self.revision}"

    @property
    def name(self) -> str:
        """The part of the id behind the slash."""
        return self.repository.partition("/")[2]


def parse_hub_id(text: str) -> HubId | None:
    """Returns the id that a text has the form of; None for other texts. A relative path of two parts has it too."""
    match = _ID.fullmatch(text)
    return None if match is None else HubId(match["repository"], match["revision"])


def models_folder() -> Path:
    """Returns the folder of downloaded models, $LLAVA_NEXT_MODELS or `models`; it need not exist."""
    return Path(os.path.expanduser(os.environ.get(MODELS_VARIABLE, "").strip() or "models"))  # noqa: PTH111


def find_model_directory(text: str) -> str:
    """Returns the directory of a model that is named by its path or by its id on the hub.

    An existing path is returned as it is. Otherwise `ORG/NAME` is the directory NAME of the folder of downloaded models
    if that exists, else the snapshot in the hub's cache. A text that names none of them is returned as it is.
    """
    hub_id = parse_hub_id(text)
    if hub_id is None or Path(text).exists():
        return text
    downloaded = models_folder() / hub_id.name
    if hub_id.revision is None and downloaded.is_dir():
        return str(downloaded)
    return find_cached_snapshot(hub_id) or text


def find_cached_snapshot(hub_id: HubId) -> str | None:
    """Returns the directory of a model in the hub's cache, which may lack files; None without its config.json."""
    from huggingface_hub import constants

    repository = Path(constants.HF_HUB_CACHE) / f"models--{hub_id.repository.replace('/', '--')}"
    if not repository.is_dir():
        return None  # most often; the client takes longer to import
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(
        hub_id.repository, "config.json", cache_dir=constants.HF_HUB_CACHE, revision=hub_id.revision
    )
    return str(Path(found).parent) if isinstance(found, str) else None


def model_argument(text: str) -> Path:
    """A directory of a model on the command line, as a path or as an id on the hub.

    Raises:
        argparse.ArgumentTypeError: the text is empty, or has the form of an id and is neither a path nor in the cache.
    """
    if not text.strip():
        raise argparse.ArgumentTypeError("the path is empty")
    path = Path(find_model_directory(text))
    if not path.exists() and parse_hub_id(text):
        raise argparse.ArgumentTypeError(describe_missing(text))
    return path


def is_hub_snapshot(path: Path) -> bool:
    """Whether a directory belongs to the hub's cache, into which no program of this project writes."""
    return _SNAPSHOT.fullmatch(str(path.absolute())) is not None


def describe_missing(text: str) -> str:
    """Returns a sentence about a directory that does not exist; with the command that fetches it if text is an id."""
    hub_id = parse_hub_id(text)
    if hub_id is None:
        return f"there is no folder {text}"
    return (
        f"there is no folder {text}, and no model of this id in {models_folder() / hub_id.name} or in the hub's cache; "
        f"`{FETCH_COMMAND} {text}` fetches it from the hub"
    )


def get_model_name(path: Path) -> str:
    """Returns the name of a model by its directory: in the hub's cache that of its id, elsewhere the directory's."""
    match = _SNAPSHOT.fullmatch(str(path.absolute()))
    return path.resolve().name if match is None else match["name"]


def find_hub_id(path: Path) -> str:
    """Returns the id of the model that a directory of the hub's cache has; empty for other directories."""
    match = _SNAPSHOT.fullmatch(str(path.absolute()))
    return "" if match is None else f"{match['owner']}/{match['name']}"


def check_directories(named: Sequence[tuple[str, str, Part, bool]]) -> str:
    """Describes what is wrong with the directories of a model's parts, all at once.

    Args:
        named: key of the configuration, directory, what it must contain, and whether its weights are read.

    Returns:
        One sentence with each key, its problem, and the command that fetches what is on the hub; empty if nothing is
        wrong.
    """
    problems: dict[str, list[str]] = {}
    ids: list[str] = []
    for key, text, part, has_weights in named:
        problem = _problem(text, part, has_weights)
        if not problem:
            continue
        keys = problems.setdefault(problem, [])
        if key not in keys:
            keys.append(key)
        fetched = _fetchable(text)
        if fetched is not None and fetched not in ids:
            ids.append(fetched)
    if not problems:
        return ""
    sentence = "; ".join(f"{', '.join(keys)}: {problem}" for problem, keys in problems.items())
    fix = f"run `{FETCH_COMMAND} {' '.join(ids)}`, or name" if ids else "name"
    return f"{sentence}; {fix} a Hugging Face directory on disk"


def _fetchable(text: str) -> str | None:
    """The id with which a directory can be fetched: one that is named, or that of a snapshot in the hub's cache."""
    hub_id = parse_hub_id(text)
    if hub_id is not None:
        return None if Path(text).exists() else str(hub_id)
    match = _SNAPSHOT.fullmatch(str(Path(text).absolute()))
    return None if match is None else f"{match['owner']}/{match['name']}"


def _problem(text: str, part: Part, has_weights: bool) -> str:
    """Describes why a directory cannot be used for a part; empty if it can, as far as its files tell."""
    path = Path(text)
    if not path.exists():
        hub_id = parse_hub_id(text)
        if hub_id is None:
            return f"there is no folder {text}"
        return f"{text} is neither a folder, nor in {models_folder() / hub_id.name}, nor in the hub's cache"
    if not path.is_dir():
        return f"{text} is a file, not a folder"
    denied = permission_problem(path)
    if denied:
        return denied
    if part == "tokenizer":
        return "" if has_tokenizer(path) else f"{text} has no tokenizer (none of {', '.join(_TOKENIZER_FILES)})"
    config = path / "config.json"
    if not config.is_file():
        return f"{text} has no config.json"
    try:
        values = json.loads(config.read_text(encoding="utf-8"))
    except ValueError:
        kind = "a git-lfs pointer, not the file itself" if _is_lfs_pointer(config) else "not valid JSON"
        return f"{config} is {kind}"
    if not isinstance(values, dict):
        return f"{config} is not a JSON object"
    wrong = _other_kind(values, part)
    if wrong:
        return f"{text} contains {wrong}, not a {part}"
    return _weights_problem(path) if has_weights else ""


def has_tokenizer(path: Path) -> bool:
    """Whether a directory has a file of a tokenizer."""
    return any((path / name).is_file() for name in _TOKENIZER_FILES)


def _weights_problem(path: Path) -> str:
    """Describes which weights a directory lacks. Only names and the first bytes are read."""
    lacking = ""
    for pattern, index in _WEIGHTS.items():
        files = {file.name: file for file in sorted(path.glob(pattern)) if file.is_file()}
        missing = sorted(_listed_files(path / index) - files.keys())
        if missing and not lacking:
            lacking = f"{path} lacks {len(missing)} of the files that {index} lists, the first is {missing[0]}"
        if files and missing:
            return lacking
        if files:
            pointers = [str(file) for file in files.values() if _is_lfs_pointer(file)]
            return f"{pointers[0]} is a git-lfs pointer, not the file itself" if pointers else ""
    return lacking or f"{path} has a config.json but no weights (neither {' nor '.join(_WEIGHTS)})"


def _listed_files(index: Path) -> set[str]:
    """The files that an index of weights lists; none without an index. What reads the weights reports a damaged one."""
    try:
        return set(map(str, json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return set()


def _is_lfs_pointer(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(len(_LFS_POINTER)) == _LFS_POINTER
    except OSError:  # a broken link
        return False


def _other_kind(config: dict[str, Any], part: Part) -> str:
    """Names the kind of model that a config.json describes if it is certainly not `part`; empty otherwise."""
    classes = config.get("architectures") or []
    generates = any(str(name).endswith(("ForCausalLM", "ForConditionalGeneration")) for name in classes)
    sees = "patch_size" in config or "vision_config" in config
    is_complete = generates or "image_token_index" in config or "image_token_id" in config
    if part == "language model" and sees and not is_complete:
        return f"a vision tower (model_type {config.get('model_type')})"
    if part == "vision tower" and not sees and (generates or "vocab_size" in config):
        return f"a language model (model_type {config.get('model_type')})"
    return ""
