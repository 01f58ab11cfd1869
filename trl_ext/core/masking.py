"""Statistics over the real tokens of a padded batch, and the layout of padded rows.

Masks are bool tensors everywhere in this package: True marks a real token, False marks padding.
"""

import torch
from torch import Tensor


def masked_sum(x: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Sum of `x` over the positions where `mask` is True; what lies at the others, NaN included, is ignored."""
    real = torch.where(mask.bool(), x, torch.zeros_like(x))
    return real.sum() if dim is None else real.sum(dim)


def masked_mean(x: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Mean of `x` over the positions where `mask` is True.

    Args:
        x: any shape.
        mask: same shape as `x`; True marks a real position.
        dim: reduce this dimension only; None reduces all.

    Returns:
        A scalar, or `x`'s shape without `dim`. An empty selection has mean 0.
    """
    mask = mask.bool()
    count = mask.sum() if dim is None else mask.sum(dim)
    return masked_sum(x, mask, dim) / count.clamp(min=1)


def masked_var(x: Tensor, mask: Tensor, unbiased: bool = True) -> Tensor:
    """Variance of `x` over the positions where `mask` is True, a scalar.

    Args:
        x: any shape.
        mask: same shape as `x`; True marks a real position.
        unbiased: divide by n - 1 (Bessel's correction) instead of n. A single position has variance 0.
    """
    mask = mask.bool()
    squared = masked_sum((x - masked_mean(x, mask)) ** 2, mask)
    count = mask.sum() - (1 if unbiased else 0)
    return squared / count.clamp(min=1)


def masked_whiten(x: Tensor, mask: Tensor, shift_mean: bool = True, eps: float = 1e-8) -> Tensor:
    """Scale `x` to variance 1 over the real positions: (x - mean) / sqrt(var + eps), unbiased variance.

    Args:
        x: any shape.
        mask: same shape as `x`; True marks a real position.
        shift_mean: also move the mean to 0. With False the mean is kept, as is usual for rewards.
        eps: added to the variance, so that a constant input stays finite.

    Returns:
        Same shape as `x`; masked positions are 0.
    """
    mean = masked_mean(x, mask)
    whitened = (x - mean) * torch.rsqrt(masked_var(x, mask) + eps)
    if not shift_mean:
        whitened = whitened + mean
    return torch.where(mask.bool(), whitened, torch.zeros_like(whitened))


def last_true(mask: Tensor) -> Tensor:
    """Column of the last True in every row of `mask` (batch, columns): shape (batch,); -1 for an all-False row."""
    columns = torch.arange(mask.shape[1], device=mask.device)
    return torch.where(mask.bool(), columns, -1).amax(dim=1)


def left_align(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Where each row's real tokens lie once its padding, wherever it is, has moved to the right.

    Causal attention never looks right, so left-aligned rows need neither an attention mask nor position ids: what a
    model computes for a row is then independent of how the batch was padded.

    Args:
        mask: (batch, columns), True marks a real token.

    Returns:
        `order` (batch, longest): column of `mask` that comes at each new position (padding columns fill the rest),
        `aligned` (batch, longest): the mask in the new layout, `longest` being the longest row's count of real tokens.
    """
    mask = mask.bool()
    longest = int(mask.sum(dim=1).max()) if mask.numel() else 0
    order = (~mask).to(torch.uint8).argsort(dim=1, stable=True)[:, :longest]
    return order, mask.gather(1, order)
