"""The forward pass asks no number of its device: a GPU never has to finish before Python goes on.

Fake tensors have shapes and no values: any `.item()`, `bool(tensor)` or shape that depends on values raises on them,
on every machine. So this needs no GPU; kernels that are called by address (`varlen_attn`, a CPU's own) are left out.
"""

from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode

from llava_next.config import PARTS
from llava_next.inputs.batch import Batch
from llava_next.model.build import build_model
from llava_next.model.llava_next import LlavaNext
from llava_next.model.parts import set_trained_parts
from tests.llava_next.conftest import MakeBackbone
from tests.llava_next.models import mixed, row
from tests.tiny import TowerName


def _without_values(batch: Batch, mode: FakeTensorMode) -> Batch:
    tensors: dict[str, Any] = {
        item.name: mode.from_tensor(getattr(batch, item.name))
        for item in fields(batch)
        if isinstance(getattr(batch, item.name), torch.Tensor)
    }
    return replace(batch, segments=replace(batch.segments, bounds=mode.from_tensor(batch.segments.bounds)), **tensors)


def _forward_without_values(model: LlavaNext, batch: Batch) -> None:
    mode = FakeTensorMode()
    state: dict[str, torch.Tensor] = {name: mode.from_tensor(tensor) for name, tensor in model.named_parameters()}
    state |= {name: mode.from_tensor(tensor) for name, tensor in model.named_buffers()}
    with mode:
        total, _, _ = torch.func.functional_call(model, state, (_without_values(batch, mode),))
    assert total.shape == ()


@pytest.mark.parametrize("kind", ["mixed", "text_only", "empty"])
@pytest.mark.parametrize("tower", ["clip", "siglip", "dinov2"])
def test_forward_waits_for_nothing(make_backbone: MakeBackbone, tower: TowerName, kind: str) -> None:
    """Rows with pictures of several grids, with text alone, and with nothing."""
    backbone = make_backbone(tower)
    model = build_model(backbone, dtype=torch.float32, seed=3, num_sources=8, attention="sdpa")
    set_trained_parts(model, PARTS)
    samples = [sample for sample in mixed(backbone) if kind == "mixed" or not sample.pictures]
    _forward_without_values(model, row(backbone, [sample.example for sample in samples if kind != "empty"]))


def test_a_wait_is_noticed(make_backbone: MakeBackbone, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test can fail: `bincount`, whose result's length depends on values, is found out."""
    backbone = make_backbone("clip")
    model = build_model(backbone, dtype=torch.float32, seed=3, num_sources=8, attention="sdpa")
    plain = LlavaNext.forward

    def waiting(self: LlavaNext, batch: Batch) -> object:
        torch.bincount(batch.target_sources)
        return plain(self, batch)

    monkeypatch.setattr(LlavaNext, "forward", waiting)
    with pytest.raises((DynamicOutputShapeException, DataDependentOutputException)):
        _forward_without_values(model, row(backbone, [sample.example for sample in mixed(backbone)]))
