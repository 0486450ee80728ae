"""The last block at supervised positions only: what runs there, and that no loss and no gradient knows of it."""

from dataclasses import replace

import pytest
import torch
from torch import nn

import llava_next.model
from llava_next.build import Backbone, build_model
from llava_next.config import PARTS
from llava_next.last_block import run_at_targets
from llava_next.model import LlavaNext, set_recompute, set_trained_parts
from tests.llava_next.conftest import MakeBackbone
from tests.llava_next.models import encoded, gradients, mixed, row, worst_difference


def _model(backbone: Backbone) -> LlavaNext:
    model = build_model(backbone, dtype=torch.float64, seed=3, num_sources=8)
    set_trained_parts(model, PARTS)
    return model


@pytest.mark.parametrize("most", [False, True], ids=["few", "most"])
@pytest.mark.parametrize("again", [False, True], ids=["kept", "recomputed"])
def test_equals_a_block_that_runs_whole(
    make_backbone: MakeBackbone, monkeypatch: pytest.MonkeyPatch, *, most: bool, again: bool
) -> None:
    """Loss and every gradient to 1e-12, few or most tokens being supervised, grouped heads included."""
    backbone = make_backbone(num_attention_heads=4, num_key_value_heads=2, attention_bias=True)
    examples = [sample.example for sample in mixed(backbone)]
    if most:
        layouts = [replace(example.layout, labels=example.layout.ids) for example in examples]
        examples = [replace(example, layout=layout) for example, layout in zip(examples, layouts, strict=True)]
    batch = row(backbone, examples)
    assert (2 * len(batch.target_ids) > batch.input_ids.numel()) == most
    found = {}
    for name in ("narrow", "whole"):
        if name == "whole":
            monkeypatch.setattr(llava_next.model, "run_at_targets", lambda block: None)
        model = _model(backbone)
        set_recompute(model, ("language_model",) if again else ())
        loss = model(batch)[0]
        loss.backward()
        found[name] = float(loss.detach()), gradients(model)
    assert found["narrow"][0] == pytest.approx(found["whole"][0], rel=1e-12)
    assert worst_difference(found["narrow"][1], found["whole"][1], found["whole"][1]) < 1e-12


def test_only_what_is_read_runs(make_backbone: MakeBackbone) -> None:
    """Of the last block queries, output projection and MLP see the supervised tokens, keys and values all; the block
    before it sees all of the row everywhere."""
    backbone = make_backbone()
    model = _model(backbone)
    batch = row(backbone, [sample.example for sample in mixed(backbone)])
    seen: dict[tuple[int, str], int] = {}
    layers = model.hf.model.language_model.layers
    for index, layer in enumerate(layers):
        for name, module in layer.named_modules():
            if isinstance(module, nn.Linear):
                module.register_forward_hook(
                    lambda _, args, __, key=(index, name): seen.__setitem__(key, args[0].shape[1])
                )
    model(batch)
    num_tokens, num_targets, last = batch.input_ids.numel(), len(batch.target_ids), len(layers) - 1
    whole = {"self_attn.k_proj", "self_attn.v_proj"}
    for (index, name), count in seen.items():
        assert count == (num_targets if index == last and name not in whole else num_tokens), name
    assert 0 < num_targets < num_tokens
    assert len(seen) == 7 * len(layers)


def test_a_row_without_targets_runs_whole(make_backbone: MakeBackbone) -> None:
    """After a row that has some: nothing of that row is left over, and all weights get their zeros."""
    backbone = make_backbone()
    model = _model(backbone)
    model(row(backbone, [encoded(backbone, []).example]))
    model(row(backbone, []))[0].backward()
    last = [parameter.grad for parameter in model.hf.model.language_model.layers[-1].parameters()]
    assert len(last) == 9
    assert not any(gradient is None or gradient.any() for gradient in last)


class _Experts(nn.Module):
    """An MLP of another kind, which returns more than states."""

    def forward(self, states: torch.Tensor) -> tuple[torch.Tensor, int]:
        return states, states.shape[1]


def test_parts_under_other_names_are_left_alone() -> None:
    """A block whose MLP has no down_proj, and that has no self_attn, runs as it is."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mlp = _Experts()

        def forward(self, hidden_states: torch.Tensor, targets: torch.Tensor | None = None) -> int:
            return int(self.mlp(hidden_states)[1])

    block = Block()
    run_at_targets(block)
    assert block(hidden_states=torch.zeros(1, 7, 4), targets=torch.tensor([2])) == 7
