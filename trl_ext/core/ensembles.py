"""One score out of those of several reward models: the members of an ensemble.

Members' scores are comparable only once each has been brought to one scale: a reward model's zero and unit are
arbitrary, so the least of raw scores is mostly that of the member with the lowest zero.
"""

from typing import Literal

from torch import Tensor

EnsembleName = Literal["mean", "min", "uncertainty"]


def mean_score(members: Tensor) -> Tensor:
    """The members' mean.

        R = 1/k sum_i R_i

    Args:
        members: (batch, members).

    Returns:
        (batch,).
    """
    return members.mean(dim=1)


def worst_case(members: Tensor) -> Tensor:
    """The least of the members' scores.

        R = min_i R_i

    Source: Coste et al. 2023, "Reward Model Ensembles Help Mitigate Overoptimization", arXiv:2310.02743 (worst-case
    optimisation); Eisenstein et al. 2023, "Helping or Herding?", arXiv:2312.09244.

    Args:
        members: (batch, members), each on the same scale.

    Returns:
        (batch,).
    """
    return members.amin(dim=1)


def uncertainty_weighted(members: Tensor, coef: float) -> Tensor:
    """The members' mean, less a multiple of their variance.

        R = mean - coef * 1/k sum_i (R_i - mean)^2

    Source: Coste et al. 2023, arXiv:2310.02743 (uncertainty-weighted optimisation).

    Args:
        members: (batch, members), each on the same scale.
        coef: weight of the variance, one over score units.

    Returns:
        (batch,).
    """
    return members.mean(dim=1) - coef * members.var(dim=1, unbiased=False)


def member_spread(members: Tensor) -> Tensor:
    """How far the members disagree: their standard deviation, in score units.

    Args:
        members: (batch, members), each on the same scale.

    Returns:
        (batch,); 0 of a single member.
    """
    return members.std(dim=1, unbiased=False)


def combine_members(members: Tensor, how: EnsembleName, coef: float) -> Tensor:
    """`mean_score`, `worst_case` or `uncertainty_weighted` (which alone reads `coef`), (batch,)."""
    if how == "uncertainty":
        return uncertainty_weighted(members, coef)
    return worst_case(members) if how == "min" else mean_score(members)
