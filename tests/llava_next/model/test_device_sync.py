"""The forward pass does not read values from the device, so a GPU is never synchronized.

Fake tensors have shapes but no values: `.item()`, `bool(tensor)` and data-dependent shapes raise on them, also without
a GPU. Kernels that are called by address (`varlen_attn`) are not covered.
"""

from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode

from llava_next.config import PARTS, ViewsConfig
from llava_next.inputs.batch import Batch
from llava_next.model.build import build_model
from llava_next.model.llava_next import LlavaNext
from llava_next.model.parts import set_trained_parts
from tests.llava_next.conftest import MakeBackbone
from tests.llava_next.models import encoded, mixed, row
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


@pytest.mark.parametrize(
    ("tower", "kind"),
    [
        *(("clip", kind) for kind in ("mixed", "reduced", "text_only", "empty")),
        *((tower, "mixed") for tower in ("siglip", "dinov2")),
        # A tower runs on tiles only, on a blank one where there are none.
        *(
            pytest.param(tower, kind, marks=pytest.mark.full)
            for tower in ("siglip", "dinov2")
            for kind in ("text_only", "empty")
        ),
    ],
)
def test_forward_does_not_synchronize(make_backbone: MakeBackbone, tower: TowerName, kind: str) -> None:
    """Rows with images in several grids, with reduced feature maps, with text only, and without samples."""
    backbone = make_backbone(tower)
    model = build_model(backbone, dtype=torch.float32, seed=3, num_sources=8, attention="sdpa")
    set_trained_parts(model, PARTS)
    samples = [sample for sample in mixed(backbone) if kind == "mixed" or not sample.images]
    if kind == "reduced":
        samples.append(encoded(backbone, [(56, 56)], views=ViewsConfig("anyres_max_1")))
    batch = row(backbone, [sample.example for sample in samples if kind != "empty"])
    assert (len(batch.reduced_rows) > 0) == (kind == "reduced")
    _forward_without_values(model, batch)


def test_synchronization_is_detected(make_backbone: MakeBackbone, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test can fail: `bincount`, whose output shape depends on values, is detected."""
    backbone = make_backbone("clip")
    model = build_model(backbone, dtype=torch.float32, seed=3, num_sources=8, attention="sdpa")
    plain = LlavaNext.forward

    def waiting(self: LlavaNext, batch: Batch) -> object:
        torch.bincount(batch.target_sources)
        return plain(self, batch)

    monkeypatch.setattr(LlavaNext, "forward", waiting)
    with pytest.raises((DynamicOutputShapeException, DataDependentOutputException)):
        _forward_without_values(model, row(backbone, [sample.example for sample in mixed(backbone)]))
