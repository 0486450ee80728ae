"""The private method of DeepSpeed that a run replaces; where it is absent, a warning names it."""

import logging

import pytest
import torch
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

from train.engine.deepspeed_engine import add_gradients_without_copy


class _WithMethod:
    def _add_to_grad_partition_buffer(self, output: torch.Tensor | None, source: torch.Tensor) -> None:
        raise AssertionError("DeepSpeed's own addition was called")


def test_the_installed_version_has_the_method() -> None:
    """Otherwise every run at ZeRO 1 and 2 would log the warning."""
    assert hasattr(DeepSpeedZeroOptimizer, "_add_to_grad_partition_buffer")


def test_the_addition_converts_to_the_same_bits(caplog: pytest.LogCaptureFixture) -> None:
    """An fp32 sum of bf16 gradients is that of their fp32 copies; an absent buffer is left alone."""
    optimizer = _WithMethod()
    with caplog.at_level(logging.WARNING):
        add_gradients_without_copy(optimizer)
    total, gradient = torch.randn(100), torch.randn(100).bfloat16()
    expected = total + gradient.float()
    optimizer._add_to_grad_partition_buffer(total, gradient)
    optimizer._add_to_grad_partition_buffer(None, gradient)
    assert torch.equal(total, expected)
    assert caplog.records == []


def test_a_version_without_the_method_is_named_in_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    """The run goes on with DeepSpeed's own addition, and nothing is set that DeepSpeed would not read."""
    optimizer = object()
    with caplog.at_level(logging.WARNING):
        add_gradients_without_copy(optimizer)
    [record] = caplog.records
    assert "_add_to_grad_partition_buffer" in record.getMessage()
    assert not hasattr(optimizer, "_add_to_grad_partition_buffer")
