"""Several scores a completion into one: normalisation, weights, clipping."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from trl_ext.core import masked_mean, masked_sum, member_spread
from trl_ext.core.evidence import correlation


class ScoreMoments:
    """Mean and variance of each reward function's scores, over all so far.

        n = n_a + n_b,   d = mean_b - mean_a,   mean = mean_a + d n_b / n,   M2 = M2_a + M2_b + d^2 n_a n_b / n

    Source: Chan, Golub and LeVeque 1983, "Algorithms for Computing the Sample Variance"; float64, so that the order of
    the parts hardly matters.

    Args:
        num_functions: columns.
    """

    def __init__(self, num_functions: int) -> None:
        self.count, self.mean, self.squares = torch.zeros(3, num_functions, dtype=torch.float64)

    def update(self, by_function: Tensor) -> None:
        """Take in (batch, functions); NaN marks what a function did not score."""
        values = by_function.double()
        scored = ~values.isnan()
        count, mean = scored.sum(dim=0).double(), masked_mean(values, scored, dim=0)
        squares = masked_sum((values - mean) ** 2, scored, dim=0)
        total, difference = self.count + count, mean - self.mean
        share = count / total.clamp(min=1)
        self.squares = self.squares + squares + difference**2 * self.count * share
        self.mean = self.mean + difference * share
        self.count = total

    def normalize(self, by_function: Tensor) -> Tensor:
        """Mean 0 and standard deviation 1 by the moments so far, (batch, functions). A function whose scores were all
        the same keeps its scale."""
        std = (self.squares / self.count.clamp(min=1)).sqrt()
        std = torch.where(std > 1e-8, std, torch.ones_like(std))
        return ((by_function.double() - self.mean) / std).to(by_function.dtype)

    def state_dict(self) -> dict[str, list[float]]:
        """The three sums, as plain numbers."""
        return {"count": self.count.tolist(), "mean": self.mean.tolist(), "squares": self.squares.tolist()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave.

        Raises:
            ValueError: it belongs to another number of reward functions.
        """
        if len(state["mean"]) != len(self.mean):
            raise ValueError(
                f"The saved reward moments are of {len(state['mean'])} reward functions, but the run has "
                f"{len(self.mean)}: resume with the same reward_funcs, or reward roles."
            )
        self.count, self.mean, self.squares = (
            torch.tensor(state[name], dtype=torch.float64) for name in ("count", "mean", "squares")
        )


class Combination:
    """One score per completion: sum over functions of weight times (normalised) score, clipped.

    Args:
        weights: one per function.
        normalization: "none", "running" or "reference", as in PPOConfig.
        clip_range: least and greatest total; None: any.
        members: how many reward roles score, where they are several. They count as one function, whose score `combine`
            makes of theirs, each normalised by itself.
        combine: (batch, members) -> (batch,), see `trl_ext.core.ensembles`; None: there are no members.
    """

    def __init__(
        self,
        weights: Sequence[float],
        normalization: str = "none",
        clip_range: Sequence[float] | None = None,
        members: int = 0,
        combine: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.weights = torch.tensor(list(weights))
        self.normalization, self.clip_range, self.combine = normalization, clip_range, combine
        self.moments = ScoreMoments(members or len(weights))

    @property
    def needs_reference(self) -> bool:
        """Whether the moments must be made from the reference's completions first."""
        return self.normalization == "reference" and not bool(self.moments.count.any())

    def __call__(self, by_function: Tensor, training: bool = True) -> Tensor:
        """Totals (batch,) of `by_function` (batch, functions or members), those of all processes; NaN where all gave
        None.

        Args:
            training: let running moments take these scores in.
        """
        if self.normalization == "running" and training:
            self.moments.update(by_function)
        total = weighted_total(self._each(by_function), self.weights)
        return total if self.clip_range is None else total.clamp(*self.clip_range)

    def parts(self, by_function: Tensor) -> Tensor:
        """What each function adds to the total before it is clipped, (batch, functions), 0 for None; several reward
        roles count as one function."""
        return (self._each(by_function) * self.weights).nan_to_num(0.0)

    def spread(self, by_function: Tensor) -> Tensor | None:
        """How far the members' normalised scores disagree about each completion, (batch,); None without members."""
        return None if self.combine is None else member_spread(self._scaled(by_function))

    def _each(self, by_function: Tensor) -> Tensor:
        scaled = self._scaled(by_function)
        return scaled if self.combine is None else self.combine(scaled).unsqueeze(1)

    def _scaled(self, by_function: Tensor) -> Tensor:
        return by_function if self.normalization == "none" else self.moments.normalize(by_function)


def weighted_total(by_function: Tensor, weights: Tensor) -> Tensor:
    """Weighted sum over the functions that gave a number, (batch,); NaN where none did that counts: one of weight 0 is
    only watched.

    Args:
        by_function: (batch, functions), NaN for None. weights: (functions,).
    """
    counted = weights != 0 if weights.any() else torch.ones_like(weights, dtype=torch.bool)
    total = (by_function * weights).nansum(dim=1)
    return total.masked_fill(by_function[:, counted].isnan().all(dim=1), float("nan"))


def correlations(by_function: Tensor, names: Sequence[str]) -> dict[str, float]:
    """Pearson correlation of each two functions over the completions that both scored, by "a~b"; 0 where undefined."""
    pairs = {}
    for i, first in enumerate(names):
        for j in range(i + 1, len(names)):
            r = correlation(by_function[:, i], by_function[:, j], least=2, undefined=0.0)
            pairs[f"{first}~{names[j]}"] = r
    return pairs
