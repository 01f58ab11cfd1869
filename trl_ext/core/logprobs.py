"""Log-probabilities straight from hidden states: the (tokens x vocabulary) logits exist one tile at a time."""

from dataclasses import dataclass
from math import isqrt
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Numbers in one tile of logits. A CPU wants the tile in its cache (2**20 float32 numbers are 4 MiB); an accelerator's
# is larger, to launch fewer kernels, and has not been measured.
TILE_ELEMENTS = {"cpu": 2**20, "accelerator": 2**24}


@dataclass(frozen=True)
class _Logits:
    """How a row of hidden states becomes logits: z = cap(scale * (h W^T + b)) / T."""

    weight: Tensor
    bias: Tensor | None
    temperature: float
    softcap: float | None
    scale: float

    def tile(self, hidden: Tensor, columns: slice) -> tuple[Tensor, Tensor | None]:
        """z (rows, columns), float32, and dz/d(h W^T) up to the constant `scale / T` (None: 1)."""
        bias = None if self.bias is None else self.bias[columns]
        z = torch.nn.functional.linear(hidden.to(self.weight.dtype), self.weight[columns], bias).float()
        if self.scale != 1.0:
            z *= self.scale
        slope = None
        if self.softcap:
            capped = torch.tanh(z / self.softcap)
            z, slope = self.softcap * capped, 1 - capped**2
        return (z if self.temperature == 1.0 else z / self.temperature), slope


class _RunningSoftmax:
    """log p(target) and entropy of some rows, and their gradients, over tiles of the vocabulary that come one by one.

    With m the largest z so far and e_v = exp(z_v - m), it keeps

        total = sum_v e_v,   moment = sum_v e_v (z_v - m),   pull = sum_v e_v slope_v W_v,
        torque = sum_v e_v (z_v - m) slope_v W_v

    and rescales them when m grows (Milakov and Gimelshein 2018, arXiv:1805.02867). At the end

        log p(target) = z_target - m - log total,          entropy = log total - moment / total,
        d log p(target) / dh = slope_target W_target - pull / total,
        d entropy / dh = -(torque / total - moment / total * pull / total),      both times scale / T.
    """

    def __init__(self, hidden: Tensor, targets: Tensor, gradients: int) -> None:
        zeros = torch.zeros(hidden.shape[0], dtype=torch.float32, device=hidden.device)
        self.targets = targets
        self.largest = torch.full_like(zeros, -torch.inf)
        self.chosen, self.total, self.moment = zeros, zeros, zeros
        self.sums = [torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device) for _ in range(gradients)]
        self.chosen_slope = torch.ones_like(zeros)

    def add(self, z: Tensor, slope: Tensor | None, weight: Tensor, start: int) -> None:
        """Take in the tile `z` (rows, columns) of the vocabulary from `start` on; `z` is overwritten."""
        at = self.targets - start
        inside = (at >= 0) & (at < z.shape[1])
        at = at.clamp(0, z.shape[1] - 1).unsqueeze(1)
        self.chosen = torch.where(inside, z.gather(1, at).squeeze(1), self.chosen)
        if slope is not None:
            self.chosen_slope = torch.where(inside, slope.gather(1, at).squeeze(1), self.chosen_slope)

        largest = torch.maximum(self.largest, z.amax(dim=1))
        shift = torch.where(self.largest.isinf(), 0.0, self.largest - largest)
        rescale = shift.exp()
        z -= largest.unsqueeze(1)
        e = z.exp()
        self.largest = largest
        if self.sums:
            if len(self.sums) == 2:
                grown = self.sums[1] + shift.unsqueeze(1) * self.sums[0]
                weighed = e * z if slope is None else e * z * slope
                self.sums[1] = grown.mul_(rescale.unsqueeze(1)).add_(weighed.to(weight.dtype) @ weight)
            pulling = e if slope is None else e * slope
            self.sums[0].mul_(rescale.unsqueeze(1)).add_(pulling.to(weight.dtype) @ weight)
        self.moment = rescale * (self.moment + shift * self.total) + (e * z).sum(dim=1)
        self.total = rescale * self.total + e.sum(dim=1)

    def logprobs(self) -> Tensor:
        return self.chosen - self.largest - self.total.log()

    def entropy(self) -> Tensor:
        return self.total.log() - self.moment / self.total

    def gradients(self, logits: _Logits) -> list[Tensor]:
        """d log p(target) / dh and, where `gradients` is 2, d entropy / dh, each (rows, hidden size), float32."""
        if not self.sums:
            return []
        factor, total = logits.scale / logits.temperature, self.total.unsqueeze(1)
        pull = self.sums[0] / total
        chosen = logits.weight[self.targets].float() * self.chosen_slope.unsqueeze(1)
        gradients = [(chosen - pull).mul_(factor)]
        if len(self.sums) == 2:
            mean = (self.moment / self.total).unsqueeze(1)
            gradients.append((mean * pull - self.sums[1] / total).mul_(factor))
        return gradients


class _TokenLogProbs(torch.autograd.Function):
    """log softmax(z)[target] and its entropy.

    Each result is one number per token, so its gradient with respect to that token's hidden state is one vector. It is
    computed while the tiles are at hand. Backward is then a row-wise product: no tile is ever computed twice.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, logits: _Logits, targets: Tensor, entropy_grad: bool
    ) -> tuple[Tensor, Tensor]:
        count = (2 if entropy_grad else 1) if ctx.needs_input_grad[0] else 0
        tile = TILE_ELEMENTS["cpu" if hidden.device.type == "cpu" else "accelerator"]
        rows = min(max(1, hidden.shape[0]), isqrt(tile))
        columns, parts = tile // rows, []
        for start in range(0, max(1, hidden.shape[0]), rows):
            part = hidden[start : start + rows]
            running = _RunningSoftmax(part, targets[start : start + rows], count)
            for column in range(0, logits.weight.shape[0], columns):
                z, slope = logits.tile(part, slice(column, column + columns))
                running.add(z, slope, logits.weight[column : column + columns], column)
            parts.append((running.logprobs(), running.entropy(), *running.gradients(logits)))
        logprobs, entropy, *gradients = map(torch.cat, zip(*parts, strict=True))
        ctx.save_for_backward(*gradients)
        ctx.dtype = hidden.dtype
        if not entropy_grad:
            ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logprobs: Tensor, grad_entropy: Tensor) -> tuple[Tensor | None, ...]:
        by_logprob, *by_entropy = ctx.saved_tensors
        grad = by_logprob * grad_logprobs.unsqueeze(1)
        if by_entropy:
            grad += by_entropy[0] * grad_entropy.unsqueeze(1)
        return grad.to(ctx.dtype), None, None, None


def token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    scale: float = 1.0,
    entropy_grad: bool = False,
) -> tuple[Tensor, Tensor]:
    """Log-probability of each target token, and the entropy of the distribution it was drawn from.

        z = cap(scale * (hidden @ weight.T + bias)) / temperature,   cap(y) = softcap * tanh(y / softcap)
        logprob = log softmax(z)[target],   entropy = -sum_v p_v log p_v

    Only `hidden` receives a gradient: the LM head is frozen here.

    Args:
        hidden: (tokens, hidden size), the trunk's states that predict the targets.
        weight: (vocabulary, hidden size), the LM head. bias: (vocabulary,) or None.
        targets: (tokens,), token ids.
        temperature: sampling temperature; logits are divided by it.
        softcap: final logit soft cap (Gemma 2), None for none.
        scale: factor on the logits (Cohere, Granite).
        entropy_grad: let the entropy carry a gradient too, at the price of a third product with the LM head.

    Returns:
        logprobs (tokens,) and entropy (tokens,), float32, nats.
    """
    logits = _Logits(weight, bias, temperature, softcap, scale)
    logprobs, entropy = _TokenLogProbs.apply(hidden, logits, targets, entropy_grad)
    return logprobs, entropy
