"""The maths of RLHF with PPO as pure tensor functions, each beside its equation and its source."""

from trl_ext.core.advantages import batch_baseline, estimate_advantages, rewards_to_go, sequence_returns
from trl_ext.core.ensembles import (
    EnsembleName,
    combine_members,
    mean_score,
    member_spread,
    uncertainty_weighted,
    worst_case,
)
from trl_ext.core.kl import KLEstimator, approx_kl
from trl_ext.core.logprobs import token_logprobs
from trl_ext.core.losses import (
    clipped_policy_loss,
    clipped_policy_terms,
    clipped_value_loss,
    kl_penalty_policy_terms,
    log_ratio,
    policy_clipped,
    probability_ratio,
    reinforce_terms,
    token_mean,
    value_clipped,
)
from trl_ext.core.masking import last_true, left_align, masked_mean, masked_sum, masked_var, masked_whiten
from trl_ext.core.sampling import CorrectionMode, importance_ratio, importance_weights, share_cut
from trl_ext.core.shaping import penalize_missing_eos, shape_rewards

__all__ = [
    "CorrectionMode",
    "EnsembleName",
    "KLEstimator",
    "approx_kl",
    "batch_baseline",
    "clipped_policy_loss",
    "clipped_policy_terms",
    "clipped_value_loss",
    "combine_members",
    "estimate_advantages",
    "importance_ratio",
    "importance_weights",
    "kl_penalty_policy_terms",
    "last_true",
    "left_align",
    "log_ratio",
    "masked_mean",
    "masked_sum",
    "masked_var",
    "masked_whiten",
    "mean_score",
    "member_spread",
    "penalize_missing_eos",
    "policy_clipped",
    "probability_ratio",
    "reinforce_terms",
    "rewards_to_go",
    "sequence_returns",
    "shape_rewards",
    "share_cut",
    "token_logprobs",
    "token_mean",
    "uncertainty_weighted",
    "value_clipped",
    "worst_case",
]
