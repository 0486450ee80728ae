"""Compiled blocks compute what plain ones do, for rows of any length, and are compiled a few times only."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters

from llava_next.config import PARTS, ModelError
from llava_next.inputs.processor import IGNORE, Example
from llava_next.model.build import build_model
from llava_next.model.parts import set_trained_parts
from llava_next.model.speedups import compile_blocks, use_liger
from tests.llava_next.conftest import MakeBackbone
from tests.llava_next.models import encoded, gradients, mixed, row, worst_difference

BOTH = ("vision_tower", "language_model")


@pytest.mark.full
def test_compiled_blocks_compute_the_same(make_backbone: MakeBackbone) -> None:
    """Losses and gradients to rounding, with real compiled code; a row of another length compiles nothing more."""
    torch._dynamo.reset()
    counters.clear()
    backbone = make_backbone("clip")
    examples = [sample.example for sample in mixed(backbone)]
    alone = encoded(backbone, []).example.layout
    labels = np.where(np.arange(alone.num_tokens) == alone.num_tokens - 1, alone.ids, IGNORE)
    # As dealt to a rank with nothing left, and a row with a single answer of one token.
    one = Example(replace(alone, labels=labels), examples[1].tiles)
    rows = [row(backbone, these) for these in (examples, examples[1:], [], [one], examples[2:])]

    def run(parts: tuple[str, ...]) -> tuple[list[float], list[dict[str, torch.Tensor | None]], list[int]]:
        model = build_model(backbone, dtype=torch.float32, seed=3, num_sources=8)
        set_trained_parts(model, PARTS)
        compile_blocks(model, parts)
        losses, grads, compiled = [], [], []
        for batch in rows:
            model.zero_grad()
            total, _, _ = model(batch)
            total.backward()
            losses.append(float(total.detach()))
            grads.append(gradients(model))
            with torch.no_grad():  # as held-out samples are run in between
                assert float(model(batch)[0]) == pytest.approx(losses[-1], rel=1e-5)
            compiled.append(counters["stats"]["unique_graphs"])
        return losses, grads, compiled

    plain, ours = run(()), run(BOTH)
    assert plain[2][-1] == 0 < ours[2][0]
    assert ours[2][-1] == ours[2][-2]
    assert ours[0] == pytest.approx(plain[0], rel=1e-5)
    for expected, found in zip(plain[1], ours[1], strict=True):
        assert worst_difference(found, expected, expected) < 1e-4


def test_only_blocks_are_compiled(make_backbone: MakeBackbone) -> None:
    """A projector is no stack; nothing asked for is nothing done."""
    model = build_model(make_backbone("clip"), dtype=torch.float32, seed=3)
    before = [block.forward for block in model.hf.model.language_model.layers]
    compile_blocks(model, ())
    assert [block.forward for block in model.hf.model.language_model.layers] == before
    with pytest.raises(ModelError, match="compile: 'projector' is not a stack of blocks"):
        compile_blocks(model, ("projector",))


def test_liger_that_is_not_there_is_said(make_backbone: MakeBackbone, monkeypatch: pytest.MonkeyPatch) -> None:
    """The package and the way out, instead of a traceback."""
    model = build_model(make_backbone("clip"), dtype=torch.float32, seed=3)
    monkeypatch.setattr("llava_next.model.speedups.importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        ModelError, match=r"liger=true: the package liger-kernel .* `pip install liger-kernel`, or set liger=false"
    ):
        use_liger(model)
