"""Weighted sums of rows of a table, with a backward pass that is deterministic on every device.

torch's own backward pass of an indexed read adds to the same rows from several threads, or sorts all indices. Here the
worker has listed, for every row, the sums that it is part of, so that the gradient is again a sum over an indexed read.
"""

from typing import Any

import torch
from torch.autograd.function import once_differentiable

_ROWS_AT_ONCE = 8192
"""Number of sums that are computed at a time, which bounds the size of the fp32 intermediates."""


def weighted_rows(
    table: torch.Tensor, rows: torch.Tensor, weights: torch.Tensor, uses: torch.Tensor, use_weights: torch.Tensor
) -> torch.Tensor:
    """The sums over k of weights[i, k] * table[rows[i, k]].

    Sums are computed in fp32, or in fp64 for a table in fp64, and rounded to the table's dtype.

    Args:
        table: [num_rows, D].
        rows: int64 [num_sums, K].
        weights: float32 [num_sums, K].
        uses, use_weights: int64 and float32 [num_rows, U], the same sums by row (`llava_next.inputs.bilinear.by_row`).

    Returns:
        [num_sums, D], in the dtype of `table`.
    """
    result: torch.Tensor = _WeightedRows.apply(table, rows, weights, uses, use_weights)  # type: ignore[no-untyped-call]
    return result


class _WeightedRows(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        table: torch.Tensor,
        rows: torch.Tensor,
        weights: torch.Tensor,
        uses: torch.Tensor,
        use_weights: torch.Tensor,
    ) -> torch.Tensor:
        ctx.save_for_backward(uses, use_weights)
        return _sums(table, rows, weights)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        uses, use_weights = ctx.saved_tensors
        return _sums(gradient, uses, use_weights), None, None, None, None


def _sums(table: torch.Tensor, rows: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    dtype = torch.promote_types(table.dtype, torch.float32)
    result = table.new_empty(len(rows), table.shape[1])
    parts = zip(*(tensor.split(_ROWS_AT_ONCE) for tensor in (result, rows, weights)), strict=True)
    for part, part_rows, part_weights in parts:
        total = torch.zeros(part.shape, dtype=dtype, device=table.device)
        for each in range(rows.shape[1]):
            total.addcmul_(table[part_rows[:, each]].to(dtype), part_weights[:, each : each + 1].to(dtype))
        part.copy_(total)
    return result
