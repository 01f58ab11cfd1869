"""From experience to optimizer steps: which rows, which roles, and when to pass a step over."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from accelerate.utils import gather_object
from accelerate.utils.memory import clear_device_cache
from torch import Tensor, nn

from trl_ext.callbacks import EpochStats
from trl_ext.controllers import PenaltyController
from trl_ext.core import token_mean
from trl_ext.roles import Role
from trl_ext.trainers.batching import micro_batches, mini_batch
from trl_ext.trainers.objective import Watched, policy_loss, value_loss
from trl_ext.trainers.pretraining import PretrainMix
from trl_ext.types import Experience

LOSSES = {"policy": policy_loss, "value": value_loss}
NAMES = {
    "approxkl": "policy/approxkl_avg",
    "clipfrac": "policy/clipfrac_avg",
    "ratio": "val/ratio",
    "entropy": "policy/entropy_avg",
    "policy_loss": "loss/policy_avg",
    "value_loss": "loss/value_avg",
}


@dataclass
class Progress:
    """How far the training on the rollout in use has come; part of what an interrupted run must restore.

    Attributes:
        stopped: no further step is taken on this rollout.
        skipped: minibatches of the pass under way that were not stepped on.
        last_kl: approxkl of the last pass that ended, nats a token; NaN before.
        sums: of the pass under way, each metric's sum over real tokens of all processes, and their number.
    """

    stopped: bool = False
    skipped: int = 0
    last_kl: float = float("nan")
    sums: dict[str, list[float]] = field(default_factory=dict)

    def mean(self, metric: str) -> float:
        """Mean of a metric over the pass so far; NaN where there is none."""
        total, count = self.sums.get(metric, [0.0, 0.0])
        return total / count if count else float("nan")


class Updater:
    """Trains on one micro-batch after the other.

    Args:
        trainer: the PPOTrainer, whose base, settings, accelerator and metrics it uses.
        pretrain_mix: gives the PTX loss's texts; None: no such loss.
    """

    def __init__(self, trainer: Any, pretrain_mix: PretrainMix | None = None) -> None:
        self.trainer, self.pretrain_mix = trainer, pretrain_mix
        self.base, self.args = trainer.base, trainer.args
        self.penalty = PenaltyController(self.args.penalty_coef, self.args.penalty_target)
        self.progress = Progress()
        self._queue: list[Tensor] = []
        self._texts: list[tuple[Tensor, Tensor]] = []
        self._sums: dict[str, Tensor] = {}
        self._num_text_tokens = torch.zeros(())
        self._num_tokens = torch.zeros(())
        self._parameters: dict[Role, list[nn.Parameter]] = {
            "policy": self.base.trainable_parameters("policy"),
            "value": self.base.trainable_parameters("value") if self.args.uses_value else [],
        }
        self._own_trunk = self.base.adapters["value"] != self.base.adapters["policy"]

    def reset(self) -> None:
        """Begin with a new minibatch, also where training ended amid one."""
        self._queue, self._sums = [], {}

    @property
    def idle(self) -> bool:
        """Whether the next micro-batch begins a new minibatch."""
        return not self._queue

    def begin_rollout(self, stopped: bool = False) -> None:
        """Nothing has been trained on yet; `stopped`: nor will it be."""
        self.progress = Progress(stopped=stopped)

    def __call__(self, model: nn.Module, experience: Experience) -> Tensor:
        """Forward, loss and backward of the next micro-batch.

        Returns:
            Its share of the minibatch's loss, times the number of processes; 0 where the rollout is through already.
        """
        if self.idle:
            self._plan(experience)
        rows = self._queue.pop(0)
        loss = torch.zeros((), device=self.trainer.accelerator.device)
        if not self.progress.stopped:
            loss = self._train_on(model, experience.rows(rows).to(self.base.device))
        every = self.args.torch_empty_cache_steps
        if every is not None and self.trainer.state.global_step % every == 0:
            clear_device_cache()
        return loss

    def finish_minibatch(self) -> bool:
        """Take stock after a minibatch's last micro-batch: whether the optimizer may step. Every process must call."""
        if self.progress.stopped:
            return False
        finite = self._watch_gradients()
        sums = {name: entry.tolist() for name, entry in self._sums.items()}
        self._sums = {}
        totals: dict[str, list[float]] = {}
        for local in gather_object([sums]):
            for name, (total, count) in local.items():
                kept = totals.setdefault(name, [0.0, 0.0])
                kept[0], kept[1] = kept[0] + total, kept[1] + count
        mean = {name: total / max(count, 1.0) for name, (total, count) in totals.items()}
        for name, (total, count) in totals.items():
            kept = self.progress.sums.setdefault(name, [0.0, 0.0])
            self.progress.sums[name] = [kept[0] + total, kept[1] + count]
        args = self.args
        too_far = args.max_approx_kl is not None and mean.get(NAMES["approxkl"], 0.0) > args.max_approx_kl
        ratio = mean.get(NAMES["ratio"], 1.0)
        exploded = args.max_ratio is not None and not 1 / args.max_ratio <= ratio <= args.max_ratio
        self.progress.stopped = too_far
        skipped = too_far or exploded or not finite
        self.progress.skipped += int(skipped)
        return not skipped

    def end_epoch(self, epoch: int) -> EpochStats:
        """What the pass just ended did, and a fresh count."""
        stats = EpochStats(
            epoch=epoch, skipped=self.progress.skipped, **{key: self.progress.mean(name) for key, name in NAMES.items()}
        )
        self.progress = Progress(stopped=self.progress.stopped, last_kl=stats.approxkl)
        return stats

    def end_update(self) -> None:
        """The rollout is through: the penalty of the 'kl_penalty' objective answers to the KL of its last pass."""
        self.penalty.update(self.progress.last_kl, 1)

    def state_dict(self) -> dict[str, Any]:
        """What an interrupted run must restore, as plain numbers."""
        return {"progress": asdict(self.progress), "penalty": self.penalty.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        self.progress = Progress(**state["progress"])
        self.penalty.load_state_dict(state["penalty"])

    # One micro-batch --------------------------------------------------------------------------------------------------

    def _plan(self, experience: Experience) -> None:
        """Rows of this process's micro-batches for the optimizer step to come."""
        args, mask, accelerator = self.args, experience.loss_mask, self.trainer.accelerator
        mine = (args.gradient_accumulation_steps, accelerator.num_processes, accelerator.process_index)
        rollout, step = divmod(self.trainer.state.global_step, args.steps_per_rollout)
        rows = mini_batch(len(mask), step, args.num_mini_batches, args.seed, rollout)
        self._num_tokens = mask[rows].sum()
        self._queue = micro_batches(rows, experience.rollout.attention_mask.sum(dim=1), *mine)
        if self.pretrain_mix is not None and not self._warming_up:
            ids, mask = self.pretrain_mix(args.mini_batch_size, self.trainer.state.global_step)
            self._num_text_tokens = mask[:, 1:].sum()  # nothing predicts a text's first token
            parts = micro_batches(torch.arange(len(ids)), mask.sum(dim=1), *mine)
            self._texts = [(ids[part], mask[part]) for part in parts]

    def _roles(self) -> list[tuple[Role, ...]]:
        """Who is trained, in which forwards.

        A value role with an adapter of its own follows the policy instead of joining it: only one graph is alive at a
        time, and what gradient checkpointing recomputes runs under the adapter it belongs to.
        """
        if not self.args.uses_value:
            return [("policy",)]
        if self._warming_up:
            return [("value",)]
        return [("policy",), ("value",)] if self._own_trunk else [("policy", "value")]

    @property
    def _warming_up(self) -> bool:
        return self.trainer.state.global_step < self.args.value_warmup_rollouts * self.args.steps_per_rollout

    def _train_on(self, model: nn.Module, batch: Experience) -> Tensor:
        model.train()
        total = torch.zeros((), device=self.trainer.accelerator.device)
        for roles in self._roles():
            with self.base.use(roles[0]):
                if self._warming_up:  # the trunk may be the policy's
                    for parameter in self.base.trainable_parameters("policy"):
                        parameter.requires_grad_(False)
                total = total + self._backward(self._loss(model, batch, roles))
        if self.pretrain_mix is not None and not self._warming_up:
            with self.base.use("policy"):
                total = total + self._backward(self._pretraining_loss(model))
        return total

    def _backward(self, loss: Tensor) -> Tensor:
        self.trainer.accelerator.backward(loss)
        return loss.detach()

    def _loss(self, model: nn.Module, batch: Experience, roles: tuple[Role, ...]) -> Tensor:
        args, rollout = self.args, batch.rollout
        loss = torch.zeros((), device=self.trainer.accelerator.device)
        with self.trainer.compute_loss_context_manager():
            said = model(
                rollout.input_ids,
                rollout.attention_mask,
                rollout.completion_ids.shape[1],
                roles=roles,
                temperature=args.temperature,
                entropy_grad=bool(args.entropy_coef),
            )
            for role in roles:
                part, watched = LOSSES[role](batch, said, self._num_tokens, args, self.penalty.value)
                self._watch(watched, batch.loss_mask)
                if role == "policy" and self.trainer.state.global_step % args.steps_per_rollout == 0:
                    # Nothing was stepped on since the rollout was scored: policy and sampling policy are the same.
                    first = {"policy/first_approxkl": watched["policy/approxkl_avg"]}
                    self.trainer.metrics.add_tokens(first, batch.loss_mask)
                # DDP averages gradients over processes; the loss is a sum over them.
                loss = loss + part * self.trainer.accelerator.num_processes
        return loss

    def _pretraining_loss(self, model: nn.Module) -> Tensor:
        """-ptx_coef * mean_t log pi(x_t | x_<t) of some texts: the second term of Ouyang et al. 2022, arXiv:2203.02155,
        equation 2, a mean over the tokens of the minibatch's texts as the policy's loss is over its completions'."""
        ids, mask = (part.to(self.base.device) for part in self._texts[len(self._queue)])
        with self.trainer.compute_loss_context_manager():
            said = model(ids, mask, ids.shape[1], roles=("policy",))
            terms = -said["logprobs"][:, 1:]
        self.trainer.metrics.add_tokens({"loss/ptx": terms}, mask[:, 1:])
        loss = token_mean(terms, mask[:, 1:], self._num_text_tokens)
        # DDP averages gradients over processes; the loss is a sum over them.
        return self.args.ptx_coef * loss * self.trainer.accelerator.num_processes

    def _watch_gradients(self) -> bool:
        """Log each role's gradient norm, before it is clipped; whether all are finite. A step on those that are not
        would ruin weights and moments for good, so it is passed over."""
        finite = True
        scaler = getattr(self.trainer.accelerator, "scaler", None)
        scale = scaler.get_scale() if scaler is not None else 1.0
        for role, parameters in self._parameters.items():
            if parameters and (role, self._warming_up) != ("policy", True):
                given = [parameter.grad for parameter in parameters if parameter.grad is not None]
                norm = float(nn.utils.get_total_norm(given)) / scale if given else 0.0
                self.trainer.metrics.add_value(f"grad_norm/{role}", norm)
                finite = finite and math.isfinite(norm)
        # fp16's scaler looks for overflows itself, and needs to see them to lower its scale.
        return finite or scaler is not None

    def _watch(self, watched: Watched, mask: Tensor) -> None:
        for name, entry in self.trainer.metrics.add_tokens(watched, mask).items():
            self._sums[name] = self._sums[name] + entry if name in self._sums else entry
