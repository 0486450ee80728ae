"""Loss and every gradient of the tiny model against the authors' own classes: one and several pictures, text only,
square and AnyRes, and a padded micro-batch of theirs against a packed row of ours.

The fixture is made by ./scripts/oracles.sh, which runs the authors' code in a separate environment. Their tower runs
without gradients: the tower's are compared with stock transformers' in tests/llava_next/model/test_llava_next.py.
"""

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from data_recipes.schema.sample import Message
from llava_next.formats.tensor_names import published_name
from llava_next.inputs.batch import collate
from llava_next.inputs.processor import Example
from llava_next.model.build import Backbone
from llava_next.model.llava_next import LlavaNext
from llava_next.model.parts import part_of
from tests.oracles import our_model, tiny_model, tiny_runs
from tests.oracles.digests import IGNORE, IMAGE, numbers_digest
from tests.oracles.inputs import GENERATOR, inputs_sha256
from tests.oracles.tiny_runs import CASES, Case, Record

FIXTURES = Path(__file__).parent / "fixtures"
HINT = "make the fixtures again: ./scripts/oracles.sh"
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> tuple[Backbone, LlavaNext]:
    """Our model with the authors' weights."""
    torch.set_num_threads(1)
    return our_model.build(our_model.write_directories(tmp_path_factory.mktemp("oracle")))


@pytest.fixture(scope="module")
def authors() -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The fixture: what is known of each case, and gradients by "case/published name"."""
    fixture = json.loads((FIXTURES / "gradients.json").read_text(encoding="utf-8"))
    assert fixture["inputs"] == {"generator": GENERATOR, "sha256": inputs_sha256(tiny_runs.inputs(CASES))}, HINT
    return fixture, load_file(FIXTURES / "gradients.safetensors")


def _encoded(backbone: Backbone, case: Case, record: Record) -> Example:
    views = our_model.VIEWS[case.image_mode]
    processor = backbone.processor(template=case.template, views=views, max_length=tiny_model.MAX_LENGTH)
    messages = [
        Message("user" if turn["from"] == "human" else "assistant", turn["value"]) for turn in record["conversations"]
    ]
    names = tiny_runs.image_names(record)
    files = []
    for name in names:
        stream = io.BytesIO()
        tiny_runs.draw_image(name).save(stream, "PNG")
        files.append(stream.getvalue())
    return processor.encode(messages, [tiny_runs.image_size_hw(name) for name in names], files)


def _narrowed(example: Example) -> tuple[list[int], list[int]]:
    """Ids and labels with one IMAGE where the features of a picture stand, as the authors' have it."""
    layout = example.layout
    ids: list[int] = []
    labels: list[int] = []
    position, images = 0, iter(layout.images)
    while position < layout.num_tokens:
        is_image = layout.ids[position] == layout.image_token_id
        ids.append(IMAGE if is_image else int(layout.ids[position]))
        labels.append(IGNORE if is_image else int(layout.labels[position]))
        position += next(images).num_tokens if is_image else 1
    return ids, labels


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_loss_and_gradients_are_the_authors(
    ours: tuple[Backbone, LlavaNext], authors: tuple[dict[str, Any], dict[str, torch.Tensor]], case: Case
) -> None:
    """The same ids and labels, the loss to 1e-5, and every gradient to 1e-5 of its tensor (‖a - b‖ / ‖b‖); what has
    none there has none here."""
    backbone, model = ours
    known, tensors = authors
    examples = [_encoded(backbone, case, record) for record in case.records]
    encoded = [_narrowed(example) for example in examples]
    assert [numbers_digest(ids) for ids, _ in encoded] == known[case.name]["ids"]
    assert [numbers_digest(labels) for _, labels in encoded] == known[case.name]["labels"]

    model.zero_grad()
    batch = collate(examples, tile=backbone.tile, patches_per_tile=backbone.patches_per_side**2)
    loss = model(batch)[0] / len(batch.target_ids)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(known[case.name]["loss"], rel=TOLERANCE)
    compared = set()
    for live, parameter in model.named_parameters():
        if part_of(live) == "vision_tower":
            continue
        name = f"{case.name}/{published_name(live, 'clip_vision_model')}"
        gradient = parameter.grad
        assert gradient is not None, name
        if name in tensors:
            compared.add(name)
            assert float((gradient - tensors[name]).norm()) <= TOLERANCE * float(tensors[name].norm()), name
        else:
            assert not gradient.any(), name
    assert compared == {name for name in tensors if name.startswith(f"{case.name}/")}


def test_cases_reach_every_part(authors: tuple[dict[str, Any], dict[str, torch.Tensor]]) -> None:
    """The fixture holds what its names say: the newline in AnyRes alone, the projector wherever there is a picture."""
    _, tensors = authors
    for case in CASES:
        names = {name.removeprefix(f"{case.name}/") for name in tensors if name.startswith(f"{case.name}/")}
        has_pictures = case.name != "text_only"
        assert ("multi_modal_projector.linear_1.weight" in names) == has_pictures
        assert ("image_newline" in names) == (has_pictures and case.image_mode == "anyres")
        assert "language_model.model.layers.0.self_attn.q_proj.weight" in names
        assert "language_model.lm_head.weight" in names
