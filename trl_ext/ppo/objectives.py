"""What the policy is trained on: one object per objective, and the two losses of a micro-batch.

`OBJECTIVES` gives each objective its name. A new one is a subclass of `Objective`, a line there and its name in
`ObjectiveName`; your own goes into `PPOConfig(objective=YourObjective())`.
"""

from __future__ import annotations

import json
from typing import Any, ClassVar, Literal, NoReturn, Protocol

import torch
from torch import Tensor

from trl_ext.controllers import FixedKLController, KLController, PenaltyController
from trl_ext.core import (
    CorrectionMode,
    approx_kl,
    batch_baseline,
    clipped_policy_terms,
    clipped_value_loss,
    estimate_advantages,
    importance_weights,
    kl_penalty_policy_terms,
    log_ratio,
    masked_whiten,
    policy_clipped,
    probability_ratio,
    reinforce_terms,
    rewards_to_go,
    sequence_returns,
    token_mean,
    value_clipped,
)
from trl_ext.types import Experience, ShapedRollout

TokenMetrics = dict[str, Tensor]  # (batch, tokens) by metric name
Baseline = Literal["value", "mean", "leave_one_out"]
Estimates = tuple[Tensor, Tensor]  # advantages and returns, both (batch, tokens), 0 on padding


class Settings(Protocol):
    """What the objectives here read of PPOConfig, which documents it."""

    baseline: Baseline
    cliprange: float
    cliprange_value: float
    dual_clip: float | None
    entropy_coef: float
    gamma: float
    lam: float
    lam_value: float | None
    num_generations: int
    penalty_coef: float
    penalty_target: float
    vf_coef: float
    vllm_importance_sampling_clip_max: float | None
    vllm_importance_sampling_clip_min: float | None
    vllm_importance_sampling_correction: bool | None
    vllm_importance_sampling_mode: CorrectionMode
    whiten_advantages: bool


class Objective:
    """What the policy is trained on; override `terms`, and what else differs from PPO with a critic.

    Attributes:
        single_epoch: it knows no old policy, so a rollout can be trained on once only.
    """

    single_epoch: ClassVar[bool] = False

    def needs_critic(self, args: Settings) -> bool:
        """Whether a value role is trained beside the policy."""
        return True

    def advantages(self, shaped: ShapedRollout, args: Settings) -> Estimates:
        """One advantage and one return per token, of a whole rollout. Here: generalised advantage estimation."""
        advantages, returns = estimate_advantages(
            shaped.rewards, shaped.score_pass.values, shaped.loss_mask, args.gamma, args.lam, args.lam_value
        )
        return masked_whiten(advantages, shaped.loss_mask) if args.whiten_advantages else advantages, returns

    def terms(self, logprobs: Tensor, batch: Experience, args: Settings, coef: float) -> Tensor:
        """Each token's term of the policy's loss, (batch, tokens).

        Args:
            logprobs: (batch, tokens) under the policy in training, nats; carries the gradient.
            batch: the micro-batch; `batch.score_pass.logprobs` are those of the policy before its first step on the
                rollout. Where another distribution sampled, each term is multiplied by its importance weight later.
            coef: the value of `controller`.
        """
        raise NotImplementedError

    def clipped(self, logprobs: Tensor, batch: Experience, args: Settings) -> Tensor:
        """Tokens whose gradient the objective cuts off, (batch, tokens) bool; logged as `policy/clipfrac_avg`."""
        return torch.zeros_like(batch.loss_mask)

    def controller(self, args: Settings) -> KLController:
        """A coefficient that answers to the KL (nats per token) that each update's last epoch made."""
        return FixedKLController(0.0)

    def metrics(self, coef: float) -> dict[str, float]:
        """What is logged of an update beside the usual."""
        return {}


class Clip(Objective):
    """PPO's clipped surrogate: Schulman et al. 2017, arXiv:1707.06347, equation 7."""

    def terms(self, logprobs: Tensor, batch: Experience, args: Settings, coef: float) -> Tensor:
        """See `trl_ext.core.clipped_policy_loss`."""
        ratio = probability_ratio(logprobs, batch.score_pass.logprobs, batch.loss_mask)
        return clipped_policy_terms(ratio, batch.advantages, args.cliprange, args.dual_clip)

    def clipped(self, logprobs: Tensor, batch: Experience, args: Settings) -> Tensor:
        """See `trl_ext.core.policy_clipped`."""
        old, mask = batch.score_pass.logprobs, batch.loss_mask
        return policy_clipped(logprobs, old, batch.advantages, mask, args.cliprange, args.dual_clip)


class KLPenalty(Objective):
    """PPO's penalty on the KL from the policy that sampled, adaptive: Schulman et al. 2017, equation 8."""

    def terms(self, logprobs: Tensor, batch: Experience, args: Settings, coef: float) -> Tensor:
        """See `trl_ext.core.kl_penalty_policy_terms`."""
        moved = log_ratio(logprobs, batch.score_pass.logprobs, batch.loss_mask)
        return kl_penalty_policy_terms(moved, batch.advantages, coef)

    def controller(self, args: Settings) -> KLController:
        """Beta, doubled and halved."""
        return PenaltyController(args.penalty_coef, args.penalty_target)

    def metrics(self, coef: float) -> dict[str, float]:
        """Beta, as the update had it."""
        return {"policy/penalty_coef": coef}


class Reinforce(Objective):
    """The plain policy gradient with a baseline: Williams 1992."""

    single_epoch = True

    def needs_critic(self, args: Settings) -> bool:
        """Where the value role is the baseline."""
        return args.baseline == "value"

    def advantages(self, shaped: ShapedRollout, args: Settings) -> Estimates:
        """Rewards to go less the baseline."""
        if not self.needs_critic(args):
            return without_critic(shaped, args, leave_one_out=args.baseline == "leave_one_out")
        mask = shaped.loss_mask
        returns = rewards_to_go(shaped.rewards, mask, args.gamma)
        advantages = (returns - shaped.score_pass.values) * mask
        return masked_whiten(advantages, mask) if args.whiten_advantages else advantages, returns

    def terms(self, logprobs: Tensor, batch: Experience, args: Settings, coef: float) -> Tensor:
        """See `trl_ext.core.reinforce_terms`."""
        return reinforce_terms(logprobs, batch.advantages)


class Sequence(Clip):
    """Clipped, one advantage per completion, no critic."""

    def needs_critic(self, args: Settings) -> bool:
        """Never."""
        return False

    def advantages(self, shaped: ShapedRollout, args: Settings) -> Estimates:
        """A completion's return less the mean of its group."""
        return without_critic(shaped, args)


class ObjectiveError(RuntimeError):
    """An objective failed or returned something unusable; one sentence that names it."""


class CheckedObjective:
    """Calls an objective's methods and checks what they return: user code may stand behind them.

    Args:
        objective: whose methods are called.

    Raises:
        ObjectiveError: each method, where the objective's own fails or returns something else.
    """

    def __init__(self, objective: Objective) -> None:
        self._objective, self._name = objective, type(objective).__name__

    def advantages(self, shaped: ShapedRollout, args: Settings) -> Estimates:
        """See `Objective`."""
        estimates = self._call("advantages", shaped, args)
        shape = shaped.rewards.shape
        pair = estimates if isinstance(estimates, tuple) else ()
        if len(pair) != 2 or not all(isinstance(x, Tensor) and x.shape == shape for x in pair):
            self._refuse("advantages", f"advantages and returns, two tensors of shape {tuple(shape)}")
        if not all(bool(x[shaped.loss_mask].isfinite().all()) for x in pair):
            self._refuse("advantages", "finite numbers")
        # What does not count is 0: a NaN there would be one in every gradient.
        advantages, returns = (x.where(shaped.loss_mask, 0.0) for x in pair)
        return advantages, returns

    def terms(self, logprobs: Tensor, batch: Experience, args: Settings, coef: float) -> Tensor:
        """See `Objective`."""
        terms = self._call("terms", logprobs, batch, args, coef)
        if not isinstance(terms, Tensor) or terms.shape != logprobs.shape or not terms.requires_grad:
            self._refuse("terms", f"a tensor of shape {tuple(logprobs.shape)} that carries the gradient of logprobs")
        return terms

    def clipped(self, logprobs: Tensor, batch: Experience, args: Settings) -> Tensor:
        """See `Objective`."""
        clipped = self._call("clipped", logprobs, batch, args)
        if not isinstance(clipped, Tensor) or clipped.shape != logprobs.shape or clipped.dtype != torch.bool:
            self._refuse("clipped", f"a tensor of bool of shape {tuple(logprobs.shape)}")
        return clipped

    def metrics(self, coef: float) -> dict[str, float]:
        """See `Objective`."""
        metrics = self._call("metrics", coef)
        if not isinstance(metrics, dict) or not all(isinstance(x, (int, float)) for x in metrics.values()):
            self._refuse("metrics", "a dict of numbers by name")
        return metrics

    def controller(self, args: Settings) -> KLController:
        """See `Objective`."""
        controller = self._call("controller", args)
        if not isinstance(controller, KLController):
            self._refuse("controller", "a controller with value, update, state_dict and load_state_dict")
        try:
            json.dumps(controller.state_dict())
        except (TypeError, ValueError) as error:
            raise ObjectiveError(f"{self._name}.controller: its state_dict is not plain numbers ({error}).") from error
        return controller

    def _call(self, method: str, *arguments: Any) -> Any:
        try:
            return getattr(self._objective, method)(*arguments)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            raise ObjectiveError(f"{self._name}.{method} raised {type(error).__name__}: {error}.") from error

    def _refuse(self, method: str, expected: str) -> NoReturn:
        raise ObjectiveError(f"{self._name}.{method} must return {expected}.")


ObjectiveName = Literal["clip", "kl_penalty", "reinforce", "sequence"]
OBJECTIVES: dict[str, Objective] = {
    "clip": Clip(),
    "kl_penalty": KLPenalty(),
    "reinforce": Reinforce(),
    "sequence": Sequence(),
}


def without_critic(shaped: ShapedRollout, args: Settings, leave_one_out: bool = False) -> Estimates:
    """A completion's return less its baseline, at each of its tokens."""
    mask = shaped.loss_mask
    scored = mask.any(dim=1)
    returns = sequence_returns(shaped.rewards, mask)
    groups = same_prompt(shaped.rollout.prompt_tokens) if args.num_generations > 1 else None
    advantages = returns - batch_baseline(returns, scored, leave_one_out, groups)
    if args.whiten_advantages:
        advantages = masked_whiten(advantages, scored)
    by_token = advantages.unsqueeze(1) * mask
    return by_token, by_token


def same_prompt(prompt_ids: list[list[int]]) -> Tensor:
    """A number per row, (batch,), the same for completions of the same prompt."""
    numbers: dict[tuple[int, ...], int] = {}
    return torch.tensor([numbers.setdefault(tuple(ids), len(numbers)) for ids in prompt_ids])


# The losses of a micro-batch -----------------------------------------------------------------------------------------


def policy_loss(
    objective: Objective | CheckedObjective,
    batch: Experience,
    outputs: dict[str, Tensor],
    num_tokens: Tensor,
    args: Settings,
    coef: float,
) -> tuple[Tensor, TokenMetrics]:
    """The policy's share of the minibatch loss, a scalar, and (batch, tokens) tensors by metric name.

        loss = mean_t (w_t * objective_t - entropy_coef * H_t)

    w_t is 1, or that of `sampling_weights` where another distribution sampled than the one that is trained. Source of
    the entropy bonus: Schulman et al. 2017, arXiv:1707.06347, equation 9.

    Args:
        batch: the micro-batch.
        outputs: "logprobs" (with gradient) and "entropy", (batch, tokens).
        num_tokens: real tokens of the whole minibatch, over all processes.
        coef: the value of the objective's controller.
    """
    new, old, mask = outputs["logprobs"], batch.score_pass.logprobs, batch.loss_mask
    terms, weights = objective.terms(new, batch, args, coef), sampling_weights(batch, args)
    if weights is not None:
        terms = terms * weights
    metrics = {
        "policy/approxkl_avg": approx_kl(new.detach(), old, "k2"),
        "policy/clipfrac_avg": objective.clipped(new.detach(), batch, args),
        "policy/entropy_avg": outputs["entropy"].detach(),
        "loss/policy_avg": terms.detach(),
        "val/ratio": probability_ratio(new.detach(), old, mask),
    }
    if args.entropy_coef:
        terms = terms - args.entropy_coef * outputs["entropy"]
    return token_mean(terms, mask, num_tokens), metrics


def sampling_weights(batch: Experience, args: Settings) -> Tensor | None:
    """See `trl_ext.core.importance_weights`; None where nothing is corrected."""
    told = batch.rollout.sampling_logprobs
    if told is None or args.vllm_importance_sampling_correction is False:
        return None
    return importance_weights(
        batch.score_pass.logprobs,
        told,
        batch.loss_mask,
        args.vllm_importance_sampling_mode,
        args.vllm_importance_sampling_clip_max,
        args.vllm_importance_sampling_clip_min,
    )


def value_loss(
    batch: Experience, outputs: dict[str, Tensor], num_tokens: Tensor, args: Settings
) -> tuple[Tensor, TokenMetrics]:
    """The value role's share of the minibatch loss, `vf_coef` included, and (batch, tokens) tensors by metric name.
    Arguments as of `policy_loss`, of `outputs` "values" (with gradient)."""
    new, old, returns, mask = outputs["values"], batch.score_pass.values, batch.returns, batch.loss_mask
    loss = clipped_value_loss(new, old, returns, mask, args.cliprange_value, num_tokens)
    detached = new.detach()
    clipped = value_clipped(detached, old, returns, mask, args.cliprange_value)
    bounded = detached.clamp(old - args.cliprange_value, old + args.cliprange_value)
    return args.vf_coef * loss, {
        "loss/value_avg": 0.5 * (detached.where(~clipped, bounded) - returns) ** 2,
        "val/clipfrac_avg": clipped,
    }
