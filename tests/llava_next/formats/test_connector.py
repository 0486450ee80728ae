"""Connectors: round trips are bitwise, the authors' file can be loaded instead, and mismatching, damaged or malicious
files are errors that name the tensor."""

import json
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from llava_next.config import ANYRES, ModelError, ProjectorKind
from llava_next.formats.connector import write_connector
from llava_next.formats.hugging_face import write_hf
from llava_next.formats.load_weights import load_weights
from llava_next.model.build import Backbone, build_model, read_backbone
from llava_next.model.llava_next import LlavaNext
from llava_next.model.parts import live_parameters, set_trained_parts
from tests.llava_next.conftest import MakeBackbone
from tests.tiny import HostilePickle

KINDS: tuple[ProjectorKind, ...] = ("mlp2x_gelu", "linear")
AUTHORS = {
    "mm_projector.0.weight": "multi_modal_projector.linear_1.weight",
    "mm_projector.0.bias": "multi_modal_projector.linear_1.bias",
    "mm_projector.2.weight": "multi_modal_projector.linear_2.weight",
    "mm_projector.2.bias": "multi_modal_projector.linear_2.bias",
    "mm_projector.weight": "multi_modal_projector.weight",
    "mm_projector.bias": "multi_modal_projector.bias",
    "image_newline": "image_newline",
}
"""Names of a connector's tensors: the authors' and ours."""


def _model(backbone: Backbone, seed: int = 0, dtype: torch.dtype = torch.float32) -> LlavaNext:
    return build_model(backbone, dtype=dtype, seed=seed)


def _state(model: LlavaNext) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in live_parameters(model)}


def test_other_image_statistics_are_an_error(make_backbone: MakeBackbone, tmp_path: Path) -> None:
    """The projector was trained on images normalized with other statistics. A contract without these keys still
    loads."""
    backbone = make_backbone()
    write_connector(_model(backbone), backbone, tmp_path / "connector")
    tower = replace(backbone.config.vision_tower, image_mean=(0.5, 0.5, 0.5))
    other = replace(backbone, config=replace(backbone.config, vision_tower=tower))
    with pytest.raises(ModelError, match=r"image_mean=\[0\.48.*\[0\.5, 0\.5, 0\.5\]"):
        load_weights(_model(other), other, tmp_path / "connector")
    contract = json.loads((tmp_path / "connector" / "contract.json").read_text())
    older = {key: value for key, value in contract.items() if key not in ("image_mean", "image_std")}
    (tmp_path / "connector" / "contract.json").write_text(json.dumps(older))
    assert "connector from" in load_weights(_model(other), other, tmp_path / "connector")


@pytest.mark.parametrize("kind", KINDS)
def test_connector_round_trip(make_backbone: MakeBackbone, tmp_path: Path, kind: ProjectorKind) -> None:
    """Projector and newline are bitwise equal, other parameters are unchanged, and the contract records what was
    trained."""
    backbone = make_backbone(projector=kind)
    model = _model(backbone, seed=1)
    set_trained_parts(model, ["projector"])
    write_connector(model, backbone, tmp_path / "connector")
    fresh = _model(make_backbone(projector=kind), seed=2)
    before, description = _state(fresh), load_weights(fresh, backbone, tmp_path / "connector")
    assert description.endswith("(image_newline not trained)")
    source, after = _state(model), _state(fresh)
    connector = [name for name in after if "multi_modal_projector" in name or "image_newline" in name]
    assert len(connector) == (5 if kind == "mlp2x_gelu" else 3)
    for name in after:
        assert torch.equal(after[name], source[name] if name in connector else before[name]), name
    set_trained_parts(model, ["projector", "image_newline"])
    write_connector(model, backbone, tmp_path / "connector")
    assert load_weights(fresh, backbone, tmp_path / "connector").endswith("(image_newline trained)")


def test_connector_loads_into_another_precision(make_backbone: MakeBackbone, tmp_path: Path) -> None:
    """A bf16 connector loads into an fp32 model with the same values."""
    backbone = make_backbone()
    model = _model(backbone, seed=1, dtype=torch.bfloat16)
    write_connector(model, backbone, tmp_path / "connector")
    fresh = _model(make_backbone(), seed=2)
    load_weights(fresh, backbone, tmp_path / "connector")
    assert torch.equal(fresh.hf.model.image_newline, model.hf.model.image_newline.float())


def test_damaged_connector_error_names_the_tensor(make_backbone: MakeBackbone, tmp_path: Path) -> None:
    """A flipped bit, a missing and an unexpected tensor are errors that name the tensor."""
    backbone = make_backbone()
    write_connector(_model(backbone), backbone, tmp_path / "connector")
    file = tmp_path / "connector" / "connector.safetensors"
    good = file.read_bytes()
    file.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    fresh = _model(make_backbone())
    with pytest.raises(ModelError, match=r"checksum of \S+ .*contract\.json.*damaged"):
        load_weights(fresh, backbone, tmp_path / "connector")
    file.write_bytes(good)
    tensors = load_file(file)
    save_file({name: t for name, t in tensors.items() if name != "image_newline"}, file)
    with pytest.raises(ModelError, match=r"lacks 1 tensor.*image_newline"):
        load_weights(fresh, backbone, tmp_path / "connector")
    save_file({**tensors, "resampler": torch.zeros(1)}, file)
    with pytest.raises(ModelError, match=r"1 tensor\(s\) that this model lacks.*resampler"):
        load_weights(fresh, backbone, tmp_path / "connector")
    file.write_bytes(good[: len(good) // 2])
    with pytest.raises(ModelError, match="damaged"):
        load_weights(fresh, backbone, tmp_path / "connector")
    file.unlink()
    with pytest.raises(ModelError, match="missing"):
        load_weights(fresh, backbone, tmp_path / "connector")
    (tmp_path / "connector" / "contract.json").write_text("{")
    with pytest.raises(ModelError, match="damaged"):
        load_weights(fresh, backbone, tmp_path / "connector")


def test_connector_of_another_tower_is_an_error(make_backbone: MakeBackbone, tmp_path: Path) -> None:
    """The message has the contract's key, both values and the fix. No parameter is modified."""
    backbone = make_backbone("clip")
    write_connector(_model(backbone), backbone, tmp_path / "connector")
    other = make_backbone("siglip")
    fresh = _model(other, seed=9)
    before = _state(fresh)
    with pytest.raises(ModelError, match=r"vision_tower=tiny_clip, this model has tiny_siglip.*init_from=null"):
        load_weights(fresh, other, tmp_path / "connector")
    assert all(torch.equal(tensor, before[name]) for name, tensor in _state(fresh).items())


@pytest.mark.parametrize(
    ("part", "key", "value", "message"),
    [
        ("vision_tower", "feature_layer", -1, "feature_layer=-2, this model has -1"),
        ("language_model", "name", "other", "language_model=tiny_llama, this model has other"),
    ],
    ids=("layer", "language_model"),
)
def test_connector_of_another_layer_or_language_model_is_an_error(
    make_backbone: MakeBackbone, tmp_path: Path, part: str, key: str, value: object, message: str
) -> None:
    """The shapes agree, but the projector's inputs or outputs are others than those that it was trained on."""
    backbone = make_backbone()
    write_connector(_model(backbone), backbone, tmp_path / "connector")
    config = backbone.config
    other = read_backbone(replace(config, **{part: replace(getattr(config, part), **{key: value})}))
    with pytest.raises(ModelError, match=f"{message}.*init_from=null"):
        load_weights(_model(other), other, tmp_path / "connector")


@pytest.mark.parametrize("kind", KINDS)
def test_connector_of_another_kind_is_an_error(
    make_backbone: MakeBackbone, tmp_path: Path, kind: ProjectorKind
) -> None:
    """The message has both kinds of projector and the setting."""
    other: ProjectorKind = "linear" if kind == "mlp2x_gelu" else "mlp2x_gelu"
    backbone = make_backbone(projector=other)
    write_connector(_model(backbone), backbone, tmp_path / "connector")
    backbone_of_kind = make_backbone(projector=kind)
    with pytest.raises(ModelError, match=rf"projector={other}, this model has {kind}; set model.projector={other}"):
        load_weights(_model(backbone_of_kind), backbone_of_kind, tmp_path / "connector")


# ------------------------------------------------------------------------------------ the authors' mm_projector.bin


def _authors_tensors(
    model: LlavaNext, prefix: str = "model.", *, newline: bool = False, dtype: torch.dtype = torch.float32
) -> dict[str, torch.Tensor]:
    """A connector as the authors' trainer writes it: the tensors whose names contain `mm_projector`."""
    state = {name.removeprefix("hf.model."): tensor for name, tensor in _state(model).items()}
    return {
        prefix + authors_name: state[name].to(dtype)
        for authors_name, name in AUTHORS.items()
        if name in state and (newline or authors_name != "image_newline")
    }


@pytest.mark.parametrize("newline", [False, True])
@pytest.mark.parametrize("prefix", ["model.", "", "base_model.model.model.", "module.model."])
@pytest.mark.parametrize("kind", KINDS)
def test_authors_connector_is_loaded(
    make_backbone: MakeBackbone, tmp_path: Path, kind: ProjectorKind, prefix: str, newline: bool
) -> None:
    """The tensors load under each prefix and kind, other parameters are unchanged, and the log says whether the newline
    was loaded."""
    backbone = make_backbone(projector=kind)
    source, fresh = _model(backbone, seed=1), _model(backbone, seed=2)
    torch.save(_authors_tensors(source, prefix, newline=newline), tmp_path / "mm_projector.bin")
    before, description = _state(fresh), load_weights(fresh, backbone, tmp_path / "mm_projector.bin")
    expected, after = _state(source), _state(fresh)
    for name in after:
        arrived = "multi_modal_projector" in name or (newline and "image_newline" in name)
        assert torch.equal(after[name], expected[name] if arrived else before[name]), name
    assert f"projector ({kind}, float32) from {tmp_path / 'mm_projector.bin'}" in description
    assert ("without image_newline" in description) != newline
    assert "only shapes were compared" in description


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("zipped", [True, False])
def test_half_precision_connector_loads_into_full_precision(
    make_backbone: MakeBackbone, tmp_path: Path, dtype: torch.dtype, zipped: bool
) -> None:
    """LLaVA-1.5's connectors are fp16, some in torch's old file format; they load with the same values in the model's
    dtype."""
    backbone = make_backbone()
    source, fresh = _model(backbone, seed=1), _model(backbone, seed=2)
    tensors = _authors_tensors(source, dtype=dtype)
    torch.save(tensors, tmp_path / "mm_projector.bin", _use_new_zipfile_serialization=zipped)
    description = load_weights(fresh, backbone, tmp_path / "mm_projector.bin")
    loaded = fresh.hf.model.multi_modal_projector.linear_2.weight
    assert loaded.dtype == torch.float32
    assert torch.equal(loaded, tensors["model.mm_projector.2.weight"].float())
    assert str(dtype).removeprefix("torch.") in description


def test_directory_with_authors_connector(make_backbone: MakeBackbone, tmp_path: Path) -> None:
    """A directory with the authors' config.json loads. A complete model in the same directory is an error."""
    backbone = make_backbone()
    source, fresh = _model(backbone, seed=1), _model(backbone, seed=2)
    torch.save(_authors_tensors(source), tmp_path / "mm_projector.bin")
    (tmp_path / "config.json").write_text('{"model_type": "llava_llama", "mm_projector_type": "mlp2x_gelu"}')
    assert "mm_projector.bin" in load_weights(fresh, backbone, tmp_path)
    actual, expected = (model.hf.model.multi_modal_projector.linear_1.weight for model in (fresh, source))
    assert torch.equal(actual, expected)
    (tmp_path / "pytorch_model-00001-of-00002.bin").write_bytes(b"")
    with pytest.raises(ModelError, match=r"mm_projector\.bin\) and a model \(pytorch_model-00001.*path of the file"):
        load_weights(fresh, backbone, tmp_path)


def test_mismatching_authors_connector_is_an_error(make_backbone: MakeBackbone, tmp_path: Path) -> None:
    """Another width or kind, other tensors, none, duplicates and integers are errors with the values and the fix. No
    parameter is modified."""
    backbone = make_backbone()
    model = _model(backbone)
    before, good = _state(model), _authors_tensors(model)
    linear = _authors_tensors(_model(make_backbone(projector="linear")))
    file = tmp_path / "mm_projector.bin"
    wide = {name: torch.zeros(64, 24) if name.endswith("0.weight") else tensor for name, tensor in good.items()}
    whole_numbers = {name: tensor.long() for name, tensor in good.items()}
    for tensors, message in (
        (
            wide,
            r"model\.mm_projector\.0\.weight has shape \[64, 24\], this model needs \[32, 24\]; use the language",
        ),
        (linear, r"of kind linear, this model's is mlp2x_gelu; set model.projector=linear"),
        (
            good | {"model.mm_projector.4.weight": torch.zeros(1)},
            r"not a supported connector.*mm_projector\.4\.weight",
        ),
        (good | {"model.embed_tokens.weight": torch.zeros(1)}, r"not a supported connector.*embed_tokens\.weight"),
        ({}, r"not a supported connector"),
        (good | {"mm_projector.0.bias": torch.zeros(32)}, r"a tensor under two prefixes.*mm_projector\.0\.bias"),
        (whole_numbers, r"model\.mm_projector\.0\.weight has dtype int64"),
        ({"state_dict": good}, "not contain a dictionary of tensors"),
        (list(good.values()), "not contain a dictionary of tensors"),
        ({name: tensor.to_sparse() for name, tensor in good.items()}, "not contain a dictionary of tensors"),
    ):
        torch.save(tensors, file)
        with pytest.raises(ModelError, match=message) as caught:
            load_weights(model, backbone, file)
        assert str(file) in str(caught.value)
        assert "\n" not in str(caught.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in _state(model).items())


@pytest.mark.parametrize("written_by", ["torch", "torch_old", "pickle"])
def test_malicious_pickle_is_not_executed(make_backbone: MakeBackbone, tmp_path: Path, written_by: str) -> None:
    """A file that runs a command when it is unpickled is an error, and the command is not run."""
    backbone = make_backbone()
    model = _model(backbone)
    marker, file = tmp_path / "it_ran", tmp_path / "mm_projector.bin"
    content = {**_authors_tensors(model), "model.mm_projector.0.weight": HostilePickle(marker)}
    if written_by == "pickle":
        file.write_bytes(pickle.dumps(HostilePickle(marker)))
        pickle.loads(file.read_bytes())
    else:
        torch.save(content, file, _use_new_zipfile_serialization=written_by == "torch")
        torch.load(file, weights_only=False)
    assert marker.exists()  # unsafe loading runs the command
    marker.unlink()
    with pytest.raises(ModelError) as caught:
        load_weights(model, backbone, file)
    assert not marker.exists()
    message = str(caught.value)
    assert "\n" not in message
    assert str(file) in message
    assert "no code was executed" in message
    assert written_by == "pickle" or "imports posix.system" in message


@pytest.mark.parametrize("damage", ["half", "empty", "text"])
def test_damaged_authors_connector_is_an_error(make_backbone: MakeBackbone, tmp_path: Path, damage: str) -> None:
    """A truncated download and an HTML page are errors of one sentence."""
    backbone = make_backbone()
    model = _model(backbone)
    file = tmp_path / "mm_projector.bin"
    torch.save(_authors_tensors(model), file)
    good = file.read_bytes()
    file.write_bytes({"half": good[: len(good) // 2], "empty": b"", "text": b"<html>not found</html>"}[damage])
    with pytest.raises(ModelError, match=r"mm_projector\.bin (is damaged|is not a pickle of plain)") as caught:
        load_weights(model, backbone, file)
    assert "\n" not in str(caught.value)


def test_connector_file_of_any_name_is_loaded(make_backbone: MakeBackbone, tmp_path: Path) -> None:
    """The authors' trainer also writes `mm_projector/checkpoint-100.bin`. A connector in an export's directory is an
    error."""
    backbone = make_backbone()
    source, fresh = _model(backbone, seed=1), _model(backbone, seed=2)
    torch.save(_authors_tensors(source), tmp_path / "checkpoint-100.bin")
    load_weights(fresh, backbone, tmp_path / "checkpoint-100.bin")
    assert torch.equal(
        fresh.hf.model.multi_modal_projector.linear_1.bias, source.hf.model.multi_modal_projector.linear_1.bias
    )
    processor = backbone.processor(template=None, views=ANYRES, max_length=64)
    write_hf(source, backbone, processor, tmp_path / "export")
    (tmp_path / "checkpoint-100.bin").rename(tmp_path / "export" / "mm_projector.bin")
    with pytest.raises(ModelError, match=r"a model \(model\.safetensors\)"):
        load_weights(fresh, backbone, tmp_path / "export")
