"""The loss of supervised tokens: chunked and unchunked values and gradients are equal."""

import pytest
import torch
import torch.nn.functional as F

from llava_next.model import loss


@pytest.mark.parametrize("num_targets", [1, 7, 8, 9, 20])
def test_chunked_equals_unchunked(monkeypatch: pytest.MonkeyPatch, num_targets: int) -> None:
    """Losses and both gradients with chunks of four rows, including a shorter last chunk."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(num_targets, 6, generator=generator, dtype=torch.float64).requires_grad_()
    head = torch.randn(11, 6, generator=generator, dtype=torch.float64).requires_grad_()
    targets = torch.randint(0, 11, (num_targets,), generator=generator)
    results = []
    for chunk_logits in (1 << 26, 4 * 11):
        monkeypatch.setattr(loss, "CHUNK_LOGITS", chunk_logits)
        losses = loss.token_losses(hidden, head, targets)
        assert losses.dtype == torch.float64
        results.append((losses, *torch.autograd.grad(losses.sum(), (hidden, head))))
    for whole, chunked in zip(*results, strict=True):
        torch.testing.assert_close(chunked, whole, rtol=1e-6, atol=1e-7)
    expected = F.cross_entropy(hidden @ head.T, targets, reduction="none")
    torch.testing.assert_close(results[0][0].double(), expected, rtol=1e-5, atol=1e-6)


def test_half_precision_logits_are_reduced_in_fp32() -> None:
    """The cross entropy of bf16 states and head is that of their bf16 logits in fp32, not a bf16 number."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(9, 6, generator=generator).bfloat16()
    head = torch.randn(11, 6, generator=generator).bfloat16()
    targets = torch.randint(0, 11, (9,), generator=generator)
    losses = loss.token_losses(hidden, head, targets)
    assert losses.dtype == torch.float32
    expected = F.cross_entropy((hidden @ head.T).double(), targets, reduction="none")
    torch.testing.assert_close(losses.double(), expected, rtol=1e-6, atol=1e-6)


def test_no_targets_give_zero_gradients() -> None:
    """An empty loss depends on the hidden states and the head, so their gradients are zeros."""
    hidden = torch.randn(3, 6, requires_grad=True)
    head = torch.randn(11, 6, requires_grad=True)
    losses = loss.token_losses(hidden[:0], head, torch.zeros(0, dtype=torch.int64))
    assert losses.shape == (0,)
    losses.sum().backward()
    for tensor in (hidden, head):
        assert tensor.grad is not None
        assert not tensor.grad.any()
