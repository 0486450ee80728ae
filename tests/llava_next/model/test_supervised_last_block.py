"""The last block at supervised positions: which modules are restricted, and that losses and gradients do not change."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import llava_next.model.llava_next
from llava_next.config import PARTS
from llava_next.inputs.processor import IGNORE
from llava_next.model.build import Backbone, build_model
from llava_next.model.llava_next import LlavaNext
from llava_next.model.parts import set_recompute, set_trained_parts
from llava_next.model.supervised_last_block import run_at_targets
from tests.llava_next.conftest import MakeBackbone
from tests.llava_next.models import encoded, gradients, mixed, row, worst_difference


def _model(backbone: Backbone) -> LlavaNext:
    model = build_model(backbone, dtype=torch.float64, seed=3, num_sources=8)
    set_trained_parts(model, PARTS)
    return model


@pytest.mark.parametrize("most", [False, True], ids=["few", "most"])
@pytest.mark.parametrize("again", [False, True], ids=["kept", "recomputed"])
def test_equals_an_unrestricted_block(
    make_backbone: MakeBackbone, monkeypatch: pytest.MonkeyPatch, *, most: bool, again: bool
) -> None:
    """Loss and gradients agree to 1e-12 with few and with most tokens supervised, and with grouped-query attention."""
    backbone = make_backbone(num_attention_heads=4, num_key_value_heads=2, attention_bias=True)
    examples = [sample.example for sample in mixed(backbone)]
    if most:
        layouts = [replace(example.layout, labels=example.layout.ids) for example in examples]
        examples = [replace(example, layout=layout) for example, layout in zip(examples, layouts, strict=True)]
    batch = row(backbone, examples)
    assert (2 * len(batch.target_ids) > batch.input_ids.numel()) == most
    results = {}
    for name in ("narrow", "whole"):
        if name == "whole":
            monkeypatch.setattr(llava_next.model.llava_next, "run_at_targets", lambda block: None)
        model = _model(backbone)
        set_recompute(model, ("language_model",) if again else ())
        loss = model(batch)[0]
        loss.backward()
        results[name] = float(loss.detach()), gradients(model)
    assert results["narrow"][0] == pytest.approx(results["whole"][0], rel=1e-12)
    assert worst_difference(results["narrow"][1], results["whole"][1], results["whole"][1]) < 1e-12


def test_restricted_modules(make_backbone: MakeBackbone) -> None:
    """In the last block, queries, output projection and MLP run at supervised tokens, keys and values at all tokens;
    the previous block runs at all tokens."""
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


@pytest.mark.parametrize("again", [False, True], ids=["kept", "recomputed"])
def test_row_without_targets_has_zero_gradients(make_backbone: MakeBackbone, *, again: bool) -> None:
    """Rows without samples, and with samples without targets, give every weight a zero gradient, also after a row with
    targets."""
    backbone = make_backbone()
    model = build_model(backbone, dtype=torch.float32, seed=3, num_sources=8)
    set_trained_parts(model, PARTS)
    set_recompute(model, ("language_model",) if again else ())
    examples = [encoded(backbone, [(45, 61)]).example, encoded(backbone, [], seed=1).example]
    silent = [
        replace(example, layout=replace(example.layout, labels=np.full_like(example.layout.labels, IGNORE)))
        for example in examples
    ]
    model(row(backbone, examples))
    for each in ([], silent[1:], silent):
        model.zero_grad(set_to_none=True)
        total, by_source, tokens = model(row(backbone, each))
        total.backward()
        assert (float(total.detach()), float(by_source.abs().sum()), int(tokens.sum())) == (0.0, 0.0, 0)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        assert len(trained) > 30
        assert not any(parameter.grad is None or parameter.grad.any() for parameter in trained)


@pytest.mark.parametrize("part", ["language_model", "vision_tower"])
def test_recompute_runs_the_same_modules_for_every_row(make_backbone: MakeBackbone, part: str) -> None:
    """ZeRO-3 gathers weights when a module begins and frees them when it ends, also in recomputation. If the modules
    depended on images or targets, ranks with different rows would hang."""
    backbone = make_backbone()
    model = _model(backbone)
    set_recompute(model, (part,))
    events: list[tuple[str, str]] = []
    for name, module in model.named_modules():
        module.register_forward_pre_hook(lambda *_, name=name: events.append(("begins", name)))
        module.register_forward_hook(lambda *_, name=name: events.append(("ends", name)))
    image = encoded(backbone, [(45, 61), (20, 20)]).example
    silent = replace(image, layout=replace(image.layout, labels=np.full_like(image.layout.labels, IGNORE)))
    events_by_row = []
    for examples in ([image], [encoded(backbone, []).example], [silent], []):
        events.clear()
        total = model(row(backbone, examples))[0]
        once = len(events)
        total.backward()
        assert once < len(events)
        events_by_row.append(list(events))
    for each in events_by_row[1:]:
        assert each == events_by_row[0]


class _Experts(nn.Module):
    """An MLP of another kind, which returns more than hidden states."""

    def forward(self, states: torch.Tensor) -> tuple[torch.Tensor, int]:
        return states, states.shape[1]


def test_modules_with_other_names_are_unchanged() -> None:
    """A block whose MLP has no down_proj, and without self_attn, runs at all positions."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mlp = _Experts()

        def forward(self, hidden_states: torch.Tensor, targets: torch.Tensor | None = None) -> int:
            return int(self.mlp(hidden_states)[1])

    block = Block()
    run_at_targets(block)
    assert block(hidden_states=torch.zeros(1, 7, 4), targets=torch.tensor([2])) == 7
