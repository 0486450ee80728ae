"""The loss of supervised tokens: chunked and whole are the same number and the same gradient."""

import pytest
import torch
import torch.nn.functional as F

from llava_next.model import loss


@pytest.mark.parametrize("num_targets", [1, 7, 8, 9, 20])
def test_chunked_equals_whole(monkeypatch: pytest.MonkeyPatch, num_targets: int) -> None:
    """Losses and both gradients, with chunks of four rows, also where the last one is short."""
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


def test_no_target_is_a_zero_with_gradients() -> None:
    """An empty loss still depends on the states and the head: its gradients are zeros."""
    hidden = torch.randn(3, 6, requires_grad=True)
    head = torch.randn(11, 6, requires_grad=True)
    losses = loss.token_losses(hidden[:0], head, torch.zeros(0, dtype=torch.int64))
    assert losses.shape == (0,)
    losses.sum().backward()
    for tensor in (hidden, head):
        assert tensor.grad is not None
        assert not tensor.grad.any()
