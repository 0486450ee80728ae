"""`python -m train.fetch NAME...`: fetches language models and vision towers from the hub into its cache.

A name is a file of configs/model/language_model or configs/model/vision_tower, or the id of any model on the hub
(ORG/NAME or ORG/NAME@REVISION). Of a repository only what a run reads is fetched: configs, tokenizer and one form of
the weights. Nothing else of this project downloads models.

Exit codes: 0 success; 1 the network, the hub or the disk failed, or a file is not the expected one; 2 user error; 130
interrupted by Ctrl-C.
"""

import argparse
import fnmatch
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from huggingface_hub import constants, try_to_load_from_cache

from data_recipes.fetch.byte_progress import ByteProgress
from data_recipes.fetch.hub import HubFile, Repository, download_file, page_of, pin_branch, read_repository
from data_recipes.fetch.lock_file import LockFile
from data_recipes.fetch.remote_file import FetchError, RemoteFile, describe_difference, read_content
from data_recipes.fetch.transfer import run_parallel
from data_recipes.schema.arguments import ArgumentParser, output_file, path_argument, positive_argument, text_argument
from data_recipes.schema.config_dir import CONFIG_DIR
from data_recipes.schema.console import run_program
from data_recipes.schema.sample import DataError
from data_recipes.schema.source import read_yaml
from data_recipes.writing.progress import format_bytes
from llava_next.cache_root import cache_root
from llava_next.config import ModelError
from llava_next.model_directory import HubId, find_model_directory, is_hub_snapshot, parse_hub_id
from train.config.compose import check_config_dir
from train.config.exit_codes import report_mistake
from train.config.schema import ConfigError

_GROUPS = ("language_model", "vision_tower")
_METADATA = ("*.json", "*.jinja", "*.model", "*.txt")
_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
"""Forms of the weights in the order of preference; only the first one of a repository is fetched."""
_LOCK_NAME = "models.lock.json"


@dataclass(frozen=True)
class Model:
    """A model to fetch.

    Attributes:
        hub_id: its id.
        repository: what the hub says about it.
        files: the files that a run reads.
    """

    hub_id: HubId
    repository: Repository
    files: tuple[RemoteFile, ...]

    @property
    def missing(self) -> list[RemoteFile]:
        """The files that are not in the hub's cache."""
        return [file for file in self.files if _cached(file) is None]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the program; returns the exit code."""
    options = _parse(arguments)
    try:
        models = _plan(options)
        print("\n".join(_describe(models)), flush=True)
        if not options.dry_run:
            _fetch(models, options)
    except (DataError, ConfigError, ModelError) as error:
        return report_mistake(error)
    except (FetchError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def select_files(files: Sequence[HubFile]) -> list[HubFile]:
    """The files of a repository that a run reads: configs, tokenizer, and one form of the weights with its index."""
    top = [file for file in files if "/" not in file.path and not file.path.startswith("consolidated")]
    forms = [[file for file in top if fnmatch.fnmatchcase(file.path, pattern)] for pattern in _WEIGHTS]
    weights = next(filter(None, forms), [])
    prefixes = {file.path.partition(".")[0].partition("-")[0] for file in weights}
    metadata = [
        file
        for file in top
        if _fits(file.path, _METADATA)
        and (not file.path.endswith(".index.json") or file.path.partition(".")[0] in prefixes)
    ]
    return [*metadata, *weights]


def _fits(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _plan(options: argparse.Namespace) -> list[Model]:
    """Looks up all models before anything is fetched.

    Raises:
        DataError, ConfigError: a name is unknown, a model does not exist or may not be fetched by this account.
        FetchError: the hub cannot be reached.
    """
    ids = dict.fromkeys(_resolve(name, options.config_dir) for name in options.names)
    expected = LockFile.read(options.locked, required=True) if options.locked is not None else None
    models = [_look_up(hub_id, expected) for hub_id in ids]
    refusals = [model.repository.refusal for model in models if model.repository.refusal]
    if refusals and not options.dry_run:
        raise DataError(" ".join(refusals))
    return models


def _resolve(name: str, config_dir: str | None) -> HubId:
    """The id of a model that is named by a file of configs/model or by itself."""
    folders = [CONFIG_DIR] if config_dir is None else [check_config_dir(config_dir), CONFIG_DIR]
    for group in _GROUPS:
        if any((folder / "model" / group / f"{name}.yaml").is_file() for folder in folders):
            path = str(read_yaml(folders, f"model/{group}", name).get("path"))
            hub_id = parse_hub_id(path)
            if hub_id is None:
                raise DataError(
                    f"{name}: its path in configs/model/{group}/{name}.yaml is {path}, not the id of a model on the "
                    "hub; see the comments of that file."
                )
            return hub_id
    hub_id = parse_hub_id(name)
    if hub_id is None:
        known = sorted(
            file.stem
            for folder in folders
            for group in _GROUPS
            for file in (folder / "model" / group).glob("*.yaml")
            if parse_hub_id(str(read_yaml(folders, f"model/{group}", file.stem).get("path")))
        )
        raise DataError(f"there is no model {name!r}; the names are {', '.join(known)}, and ORG/NAME of the hub.")
    return hub_id


def _look_up(hub_id: HubId, expected: LockFile | None) -> Model:
    source, requested = f"models/{hub_id.repository}", hub_id.revision or "main"
    if expected is not None:
        entries = {name: each for name, each in expected.files.items() if each.source == source}
        locked = [each.as_remote(name) for name, each in entries.items() if each.requested == requested]
        if not locked:
            raise DataError(f"{expected.path} has no file of {hub_id}; it was written for other models.")
        return Model(hub_id, Repository(source, locked[0].revision, "", False, "", ()), tuple(locked))
    repository = read_repository(source, requested)
    files = [
        RemoteFile(
            f"{source}/{file.path}",
            source,
            file.path,
            requested,
            repository.revision,
            file.size,
            file.sha256,
            file.git_blob,
        )
        for file in select_files(repository.files)
    ]
    if not any(_fits(file.path, _WEIGHTS) for file in files):
        raise DataError(
            f"{hub_id} has no weights that a run can read ({' or '.join(_WEIGHTS)}); see {page_of(source)}."
        )
    return Model(hub_id, repository, tuple(files))


def _describe(models: Sequence[Model]) -> list[str]:
    """Says what is fetched, how much, under which licence, and the space that it takes."""
    lines = []
    for model in models:
        size = format_bytes(sum(file.size or 0 for file in model.files))
        missing = sum(file.size or 0 for file in model.missing)
        state = f"{format_bytes(missing)} to fetch" if model.missing else "all in the cache"
        lines.append(f"{model.hub_id}: {len(model.files)} files, {size}, {state}, at {model.repository.revision[:12]}")
        lines.append(f"  licence: {model.repository.licence or 'not stated'}; {page_of(model.repository.source)}")
        if model.repository.refusal:
            lines.append(f"  {model.repository.refusal}")
        elif model.repository.is_gated:
            lines.append("  its terms must be accepted on that page, which this account has done")
        found = Path(find_model_directory(str(model.hub_id)))
        if found.is_dir() and not is_hub_snapshot(found):
            lines.append(f"  a run that starts here reads {found}, which takes precedence over the hub's cache")
    total = sum(file.size or 0 for model in models for file in model.missing)
    lines.append(f"total: {format_bytes(total)} to fetch into {constants.HF_HUB_CACHE}")
    return lines


def _fetch(models: Sequence[Model], options: argparse.Namespace) -> None:
    lock = LockFile.read(options.lock or cache_root() / _LOCK_NAME)
    files = [file for model in models for file in model.files]
    for model in models:
        requested = model.files[0].requested
        if options.locked is None and requested != model.repository.revision:
            pin_branch(model.repository.source, requested, model.repository.revision)
    total = sum(file.size or 0 for model in models for file in model.missing)
    with ByteProgress(" ".join(options.names), total) as progress:
        jobs = [partial(_fetch_file, file, lock, options.locked, progress) for file in files]
        run_parallel(jobs, options.threads, progress)
    for model in models:
        print(f"{model.hub_id}: complete, in {Path(str(_cached(model.files[0]))).parent}")
        if options.locked is not None:
            pinned = HubId(model.hub_id.repository, model.repository.revision)
            print(f"  named by its path or as {pinned} in a run, whatever the hub's newest revision is")
    print(f"recorded in {lock.path}")


def _fetch_file(file: RemoteFile, lock: LockFile, expected: Path | None, progress: ByteProgress) -> None:
    """Downloads one file into the hub's cache unless it is there, and checks it.

    Raises:
        FetchError: it is not the expected one; it is removed from the cache.
    """
    cached = _cached(file)
    if cached is not None and expected is None and lock.has(file, cached.stat().st_size):
        return
    path = cached or download_file(file.source, file.path, file.revision, None, progress.add)
    content = read_content(path)
    difference = describe_difference(content, file)
    if difference:
        for each in (path.resolve(), path):  # the content, and its name in the snapshot
            each.unlink(missing_ok=True)
        origin = "what is published" if expected is None else f"as {expected} records it"
        raise FetchError(
            f"{file.name} is not {origin}: {difference}; it is removed from the cache, run the same command again to "
            "fetch it"
        )
    lock.record(file, content)


def _cached(file: RemoteFile) -> Path | None:
    repository = file.source.removeprefix("models/")
    found = try_to_load_from_cache(repository, file.path, revision=file.revision)
    return Path(found) if isinstance(found, str) else None


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = ArgumentParser(
        prog="python -m train.fetch",
        description=(__doc__ or "").split("\n\n")[0],
        epilog="Raw files of data are fetched by `python -m data_recipes.fetch --mixture NAME --raw DIR`.",
    )
    parser.add_argument(
        "names",
        type=text_argument,
        nargs="+",
        metavar="NAME",
        help="a language model or vision tower of configs/model, or an id on the hub: ORG/NAME or ORG/NAME@REVISION",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="only print what would be fetched, how much, and under which licence"
    )
    parser.add_argument(
        "--lock",
        type=output_file,
        metavar="FILE",
        help=f"file of revisions, sizes and sha256 ({_LOCK_NAME} in the cache folder of this project)",
    )
    parser.add_argument(
        "--locked", type=path_argument, metavar="FILE", help="fetch exactly what this lock file records, or fail"
    )
    parser.add_argument("--threads", type=positive_argument, default=4, help="files at the same time (%(default)s)")
    parser.add_argument("--config-dir", metavar="MINE", help="a folder of further YAML files, which take precedence")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(run_program(main))
