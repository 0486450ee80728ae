"""Hidden states and the head → the loss of each supervised token.

The head runs at supervised positions only, in chunks, so that the logits of a whole row never exist at once. Sums
and divisors are the callers'.

torch's `linear_cross_entropy` (2.13, `LinearCrossEntropyOptions()`, `reduction="none"`) does the same as fast in fp32.
For bf16 weights it returns bf16 losses: relative error 1.7e-3 where the cross entropy of fp32 logits, as here, has
3.9e-4, and 4.1e-3 against 2.8e-3 in the head's gradient (512 classes, 128 rows). So torch's own `cross_entropy` it is.
"""

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

CHUNK_LOGITS = 1 << 26
"""Logits that exist at a time (256 MiB in fp32); a longer row is done in chunks that the backward pass repeats."""


def token_losses(hidden: torch.Tensor, head_weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Cross entropy of each target, in float32 (in float64 for a float64 model).

    Args:
        hidden: [L, D], the states that predict the targets.
        head_weight: [V, D].
        targets: int64 [L].

    Returns:
        [L].
    """
    if not len(targets):
        # Still a function of both, so that their gradients exist (as zeros) on a rank without a target.
        return (hidden.sum() + head_weight[:1].sum()) * 0 + hidden.new_zeros(0, dtype=torch.float32)
    rows = max(1, CHUNK_LOGITS // head_weight.shape[0])
    if len(targets) <= rows:
        return _losses(hidden, head_weight, targets)
    chunks = [
        checkpoint(_losses, part, head_weight, ids, use_reentrant=False)
        for part, ids in zip(hidden.split(rows), targets.split(rows), strict=True)
    ]
    return torch.cat(chunks)


def _losses(hidden: torch.Tensor, head_weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    logits = F.linear(hidden, head_weight)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(logits, targets, reduction="none")
