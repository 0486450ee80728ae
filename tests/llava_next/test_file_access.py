"""Tests of permissions: written files follow the umask, and a file that may not be read is described as such."""

import ast
import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from llava_next.config import ANYRES, ModelError
from llava_next.file_access import permission_problem, write_problem
from llava_next.formats.atomic import atomic_directory
from llava_next.formats.connector import write_connector
from llava_next.formats.hugging_face import write_hf
from llava_next.formats.load_weights import load_weights
from llava_next.formats.tensors import write_safetensors
from llava_next.model.build import build_model, read_backbone
from tests.llava_next.conftest import MakeBackbone
from tests.llava_next.models import pretrained
from tests.permissions import public_folder, unprivileged

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(params=[0o022, 0o077, 0o027], ids=oct)
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    """The umask of the process during the test."""
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def modes(folder: Path) -> dict[str, int]:
    """Permissions of all files below a folder."""
    return {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.rglob("*") if path.is_file()}


def test_results_follow_the_umask(make_backbone: MakeBackbone, tmp_path: Path, umask: int) -> None:
    """Every file of a connector and of an export has the permissions of a newly created file."""
    backbone = make_backbone()
    model = build_model(backbone, dtype=torch.float32, seed=0)
    processor = backbone.processor(template=None, views=ANYRES, max_length=512)
    (tmp_path / "data.json").write_text("{}")
    attachments = (tmp_path / "data.json",)
    write_connector(model, backbone, tmp_path / "connector", attachments=attachments)
    write_hf(model, backbone, processor, tmp_path / "export", attachments=attachments)
    for folder, tensors in (("connector", "connector.safetensors"), ("export", "model.safetensors")):
        files = modes(tmp_path / folder)
        assert {tensors, "data.json"} <= set(files)
        assert set(files.values()) == {0o666 & ~umask}, files


def test_rewritten_file_follows_the_umask(tmp_path: Path, umask: int) -> None:
    """Also where a file of that name exists, and no other file remains."""
    path = tmp_path / "a.safetensors"
    for _ in range(2):
        write_safetensors({"x": torch.zeros(1)}, path)
        assert modes(tmp_path) == {"a.safetensors": 0o666 & ~umask}


def test_one_function_writes_safetensors() -> None:
    """safetensors' own functions write files that only their owner can read; two modules correct that."""
    callers = set()
    for folder in ("llava_next", "data_recipes", "train", "scripts"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Call) and (name := getattr(node.func, "id", getattr(node.func, "attr", ""))):
                    callers |= {path.relative_to(ROOT).as_posix()} if name in ("save_file", "serialize_file") else set()
    bench = "scripts/bench/training_step/competitor_authors.py"  # temporary files of one process
    assert callers == {"llava_next/formats/tensors.py", "scripts/quickstart/offline_fallback.py", bench}


def test_denied_connector_is_a_permission_problem(make_backbone: MakeBackbone) -> None:
    """The message names the file and its owner; neither a closed file nor a closed directory is damaged or missing."""
    backbone = make_backbone()
    model = build_model(backbone, dtype=torch.float32, seed=0)
    with public_folder() as folder:
        connector = folder / "connector"
        write_connector(model, backbone, connector)
        load_weights(model, backbone, connector)
        owner = connector.owner()
        for path, mode in ((connector / "connector.safetensors", 0o600), (connector, 0o700), (folder, 0o700)):
            before = stat.S_IMODE(path.stat().st_mode)
            path.chmod(mode if os.geteuid() == 0 else 0)
            with pytest.raises(ModelError, match=rf"{path} exists but .*owner {owner}") as error, unprivileged():
                load_weights(model, backbone, connector)
            assert "damaged" not in str(error.value)
            assert "stage.init_from" in str(error.value)
            path.chmod(before)


@pytest.mark.parametrize(
    ("part", "name"),
    [
        ("language_model", "model.safetensors"),
        ("vision_tower", "model.safetensors"),
        ("language_model", "config.json"),
        ("vision_tower", "config.json"),
        ("language_model", "tokenizer.json"),
    ],
)
def test_denied_model_is_a_permission_problem(part: str, name: str) -> None:
    """A file of a model's directory that belongs to somebody else: the message has the key, the file and the owner."""
    with public_folder() as folder:
        config = pretrained(folder, "clip")
        for path in folder.rglob("*.safetensors"):
            path.chmod(0o644)  # transformers leaves safetensors' 0600
        build_model(read_backbone(config), dtype=torch.float32, seed=0)  # imports what it needs
        path = Path(getattr(config, part).path) / name
        path.chmod(0o600 if os.geteuid() == 0 else 0)
        with pytest.raises(ModelError, match=rf"{path} exists but .*owner {path.owner()}"), unprivileged():
            build_model(read_backbone(config), dtype=torch.float32, seed=0)


def test_readable_files_are_no_problem(tmp_path: Path) -> None:
    """Nor is a path that does not exist."""
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "file").touch()
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for path in (tmp_path, tmp_path / "a" / "file", tmp_path / "missing", tmp_path / "a" / "file" / "below"):
        assert permission_problem(path, depth=3) == ""


def test_write_problem_names_the_directory_and_its_owner(tmp_path: Path) -> None:
    """Of a path that does not exist, the nearest directory that does."""
    error = PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    sentence = write_problem(tmp_path / "a" / "b", error)
    assert sentence.startswith(f"{tmp_path / 'a' / 'b'} cannot be written: Permission denied (owner {tmp_path.owner()}")
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert write_problem(tmp_path / "a", full) == f"{tmp_path / 'a'} cannot be written: No space left on device"


def test_results_are_synced_before_they_have_their_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each file and directory is brought to the disk under the temporary name, then the parent directory."""
    synced: list[tuple[int, bool]] = []
    target = tmp_path / "export"
    fsync = os.fsync

    def record(descriptor: int) -> None:
        fsync(descriptor)
        synced.append((os.fstat(descriptor).st_ino, target.exists()))

    monkeypatch.setattr(os, "fsync", record)
    with atomic_directory(target) as folder:
        assert folder is not None
        (folder / "below").mkdir()
        for path in (folder / "a", folder / "below" / "b"):
            path.write_text("x")
    expected = {path.stat().st_ino for path in (target, *target.rglob("*"))}
    assert {number for number, has_name in synced if not has_name} == expected
    assert synced[-1] == (tmp_path.stat().st_ino, True)


@pytest.mark.parametrize("fails", ["body", "attachment", "fsync"])
def test_failed_result_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str) -> None:
    """An earlier directory of the name is unchanged, and there is no partial one."""
    target = tmp_path / "export"
    target.mkdir()
    (target / "earlier").touch()

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    if fails == "fsync":
        monkeypatch.setattr(os, "fsync", full)
    attachments = (tmp_path / "missing.json",) if fails == "attachment" else ()

    def write() -> None:
        with atomic_directory(target, attachments) as folder:
            assert folder is not None
            (folder / "a").write_text("x")
            if fails == "body":
                full(0)

    with pytest.raises(OSError, match="No "):
        write()
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")] == ["export", "export/earlier"]
