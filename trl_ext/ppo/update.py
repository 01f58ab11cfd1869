"""One PPO update: experience from a batch of prompts, then epochs of optimizer steps on it.

    rollout    = generate(generator, prompts)                 # completions and masks
    pass_      = score_pass(roles, rollout)                   # log-probs, entropy, values; the reward role's scores
    scores     = score(rollout, reward functions)             # (batch, functions), or the reward role's
               -- gathered over all processes --
    scores     = combine(scores)                              # (batch,) normalised, weighted, clipped
    kl         = approx_kl(logprobs, ref_logprobs)            # (batch, tokens)
    rewards    = shape_rewards(scores, kl, kl_coef, mask)     # (batch, tokens): where the KL enters the reward
    advantages = objective.advantages(rewards, values)        # generalised advantage estimation, unless told otherwise
    stats      = update(policy, value, advantages)            # clipped losses, several epochs

Transformers' Trainer keeps the loop: it draws micro-batches, steps the optimizer, logs, saves. Who calls whom:

    Trainer.train                              for each micro-batch of each optimizer step of each rollout:
      PPOTrainer.training_step
        Updater.begin_step                     finds the step's place in the run, a Position
        Updater.collect                        at the first micro-batch of a rollout alone; at its end the objective's
                                               controller hears of the rollout before
          Collector -> rollout, scores, pass_    heard by on_rollout_end, on_scores; with rollouts_ahead the next
                                                 rollout is begun as soon as this one's completions are there
          shape     -> rewards                   heard by on_rewards
          estimate  -> advantages, returns       heard by on_advantages; once it is described, by on_update_begin
        Updater.train_on_next                  forward, losses and backward of one micro-batch, role by role
        Updater.finish_minibatch               after the last micro-batch of a step: may the optimizer step?
      optimizer.step                           unless a guard said no
      _AfterStep.on_step_end -> PPOTrainer._after_step
        Updater.end_step                       after the last step of an epoch: on_ppo_epoch_end; of a rollout:
                                               on_update_end
"""

from __future__ import annotations

import math
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn
from transformers import TrainerState

from trl_ext.callbacks import EpochStats, PPOControl, RolloutEvents
from trl_ext.core import token_mean
from trl_ext.core.evidence import signal_and_noise
from trl_ext.ppo.ahead import Ahead, gathered, share_of
from trl_ext.ppo.batches import micro_batches, mini_batch
from trl_ext.ppo.collector import Collector
from trl_ext.ppo.config import PPOConfig
from trl_ext.ppo.evidence import Evidence, Frozen, rounding_of, sampled
from trl_ext.ppo.experience import estimate, shape
from trl_ext.ppo.failures import RunError, on_all, together
from trl_ext.ppo.metrics import Metrics, name_taken
from trl_ext.ppo.objectives import CheckedObjective, ObjectiveError, TokenMetrics, policy_loss, value_loss
from trl_ext.ppo.pretraining import PretrainMix
from trl_ext.ppo.summary import summarize
from trl_ext.rewards import RewardError
from trl_ext.roles import Role, SharedBase
from trl_ext.roles.sharding import settle, whole
from trl_ext.roles.switching import frozen
from trl_ext.types import Experience

# The metric that each field of EpochStats is the mean of.
EPOCH_METRICS = {
    "approxkl": "policy/approxkl_avg",
    "clipfrac": "policy/clipfrac_avg",
    "ratio": "val/ratio",
    "entropy": "policy/entropy_avg",
    "policy_loss": "loss/policy_avg",
    "value_loss": "loss/value_avg",
}


ROLLOUTS_WITHOUT = 3  # of so many in a row no gradient was finite: the run ends


@dataclass(frozen=True)
class Position:
    """Where an optimizer step stands in the run; all numbers from 0.

    Attributes:
        rollout: which rollout it trains on.
        epoch: which epoch over that rollout.
        minibatch: which minibatch of that epoch.
        first: it is the rollout's first step: nothing has been trained on yet.
        last: it is the rollout's last step.
    """

    rollout: int
    epoch: int
    minibatch: int
    first: bool
    last: bool

    @classmethod
    def of(cls, global_step: int, args: PPOConfig) -> Position:
        """Of the step to come, where `global_step` steps were taken."""
        rollout, step = divmod(global_step, args.steps_per_rollout)
        epoch, minibatch = divmod(step, args.num_mini_batches)
        return cls(rollout, epoch, minibatch, first=step == 0, last=step == args.steps_per_rollout - 1)


@dataclass
class EpochProgress:
    """How far the training on the rollout in use has come; part of what an interrupted run must restore.

    Attributes:
        stopped: no further step is taken on this rollout.
        skipped: minibatches of the epoch under way that a guard refused; those after an early stop do not count.
        last_kl: approxkl of the last epoch that ended, nats per token; NaN before.
        sums: of the epoch under way, each metric's sum over real tokens of all processes, and their number.
        gradient_sum, gradient_squares, gradients: of some numbers of the policy's gradients in the first epoch, their
            sum, the sum of their squared norms, and how many there were.
    """

    stopped: bool = False
    skipped: int = 0
    last_kl: float = float("nan")
    sums: dict[str, list[float]] = field(default_factory=dict)
    gradient_sum: list[float] = field(default_factory=list)
    gradient_squares: float = 0.0
    gradients: int = 0

    def add(self, totals: dict[str, list[float]]) -> None:
        """Take in a minibatch's sums and counts."""
        _add_up(self.sums, totals)

    def add_gradient(self, gradient: Tensor) -> None:
        """Take in one more of the policy's gradients."""
        self.gradient_sum = (
            torch.tensor(self.gradient_sum, dtype=torch.float64) + gradient if self.gradients else gradient
        ).tolist()
        self.gradient_squares += float(gradient.pow(2).sum())
        self.gradients += 1

    def mean(self, metric: str) -> float:
        """Mean of a metric over the epoch so far; NaN where there is none."""
        total, count = self.sums.get(metric, [0.0, 0.0])
        return total / count if count else float("nan")


class Updater:
    """Makes experience, and trains on it one micro-batch after the other.

    Args:
        base: the roles.
        args: settings.
        accelerator: for autocast, backward and gathering over processes.
        collector: answers prompts and has the completions scored.
        events: hears of each stage.
        pretrain_mix: gives the PTX loss's texts; None: no such loss.

    Attributes:
        experience: the rollout in use; None before the first.
        rollout_metrics: what describes it.
        metrics: what is logged next.
    """

    def __init__(
        self,
        base: SharedBase,
        args: PPOConfig,
        accelerator: Accelerator,
        collector: Collector,
        events: RolloutEvents,
        pretrain_mix: PretrainMix | None = None,
    ) -> None:
        self.base, self.args, self.accelerator = base, args, accelerator
        self.collector, self.events, self.pretrain_mix = collector, events, pretrain_mix
        self.objective = CheckedObjective(args.policy_objective)
        self.controller = self.objective.controller(args)
        self.metrics, self.progress = Metrics(), EpochProgress()
        self.experience: Experience | None = None
        self.rollout_metrics: dict[str, float] = {}
        self.position = Position.of(0, args)
        self._before: tuple[Metrics, EpochProgress, Ahead | None] | None = None
        self._controller_before: dict[str, Any] | None = None
        self._finite: set[bool] = set()  # what the gradients of the rollout's minibatches were
        self._rollouts_without = 0
        self._queue: list[Tensor] = []
        self._texts: list[tuple[Tensor, Tensor]] = []
        self._sums: dict[str, Tensor] = {}
        self._num_text_tokens = self._num_tokens = torch.zeros(())
        self._parameters: dict[Role, list[nn.Parameter]] = {}
        self._value_has_adapter = base.adapters["value"] != base.adapters["policy"]
        self.evidence: Evidence | None = None  # until training begins
        self._gradient_before: Tensor | None = None  # of the micro-batches of the minibatch so far

    def reset(self) -> None:
        """Drop a minibatch that an earlier training left unfinished, and what it has sampled ahead."""
        self.collector.drop_ahead()
        self._queue, self._sums, self._before, self._controller_before = [], {}, None, None
        self._gradient_before = None

    def begin(self) -> None:
        """Training begins, and the base is as it will be trained: FSDP2 has put parts of the parameters in their
        place."""
        settle(self.base, "logprobs", "generate")
        self._parameters = {
            "policy": self.base.trainable_parameters("policy"),
            "value": self.base.trainable_parameters("value") if self.args.uses_value else [],
        }
        if self.args.evidence:
            self.evidence = Evidence(
                self.collector,
                self.args,
                self.accelerator,
                self.objective,
                self._parameters["policy"],
                not self._value_has_adapter,
                self.pretrain_mix,
                Frozen(self.base, [one for role in self._parameters.values() for one in role]),
            )

    def held_out_evidence(self, held_out: Experience) -> dict[str, float]:
        """What is measured of an evaluation's prompts, as of a rollout's; nothing before training begins."""
        share = len(held_out.kl) // self.accelerator.num_processes
        if self.evidence is None or not share:
            return {}
        read = self.evidence.prompts_read(held_out.rollout, share)
        return {f"evidence/{name}": value for name, value in read.items() if math.isfinite(value)}

    # Experience -------------------------------------------------------------------------------------------------------

    def begin_step(self, global_step: int) -> None:
        """Before an optimizer step's first micro-batch: find its place."""
        if self.idle:
            self.position = Position.of(global_step, self.args)
            self._before = self.metrics.copy(), deepcopy(self.progress), self.collector.ahead
            self._controller_before = None

    @property
    def idle(self) -> bool:
        """Whether the next micro-batch begins a new minibatch."""
        return not self._queue

    @property
    def needs_rollout(self) -> bool:
        """Whether the step to come begins a rollout, or has none to train on."""
        return self.idle and (self.position.first or self.experience is None)

    def collect(
        self,
        prompts: list[dict[str, Any]],
        state: TrainerState,
        control: PPOControl,
        following: list[Any] | None = None,
    ) -> Experience:
        """Answer this process's prompts (rows of the dataset) and turn all processes' completions into experience.
        `following`: prompts of the next rollout, where that is begun ahead."""
        control.should_update_stop, earlier = False, self.experience is not None
        scored = self.events.on_scores(self.collector(prompts, state, following))
        shaped = self.events.on_rewards(together(lambda: shape(scored, self.args)))
        self.experience = experience = self.events.on_advantages(together(lambda: estimate(shaped, self.args)))
        self.metrics.take_in(self.collector.log.metrics)
        self.rollout_metrics = together(lambda: self._described(experience))
        if self.evidence is not None:
            number, trains = self.position.rollout, not self._warming_up
            self.rollout_metrics |= self.evidence(experience, prompts, state, number, trains)
        self.metrics.add_rollout(self.rollout_metrics)
        if earlier:  # at the end of a rollout a run that resumes would not repeat it, if it failed
            together(self._update_controller)
        self.events.on_update_begin(experience, self.rollout_metrics)
        self.progress = EpochProgress(stopped=control.should_update_stop)
        return experience

    def _update_controller(self) -> None:
        self._controller_before = self.controller.state_dict()
        self.controller.update(self.progress.last_kl, 1)

    def _described(self, experience: Experience) -> dict[str, float]:
        metrics = summarize(experience, self.args, self.collector.score_names)
        taken = name_taken(self.collector.log.metrics.names, metrics)
        if taken is not None:
            raise RewardError(f"A reward function logged {taken!r}, which the trainer logs itself: rename it.")
        return metrics

    # Training ---------------------------------------------------------------------------------------------------------

    def train_on_next(self, model: nn.Module, global_step: int) -> Tensor:
        """Forward, loss and backward of the next micro-batch.

        Returns:
            Its share of the minibatch's loss, times the number of processes; 0 once the rollout's training has stopped.
        """
        assert self.experience is not None
        if self.idle:
            experience = self.experience
            on_all(lambda: self._plan(experience, global_step))
        rows = self._queue.pop(0)
        loss = torch.zeros((), device=self.accelerator.device)
        if not self.progress.stopped:
            experience, device = self.experience, self.base.device
            loss = self._train_on(model, on_all(lambda: experience.rows(rows).to(device)))
            if self.accelerator.num_processes == 1 and self._queue:
                self._note_gradient()
        # Transformers' own sum of losses since the last log is lost with an interrupted run.
        self.metrics.add_value("loss", loss * self.args.gradient_accumulation_steps)
        if loss.is_cuda:
            torch.cuda.synchronize(loss.device)  # CUDA is asynchronous: the timer would stop before backward has run
        return loss

    def _plan(self, experience: Experience, global_step: int) -> None:
        """Rows of this process's micro-batches for the optimizer step to come."""
        args, mask, at = self.args, experience.loss_mask, self.position
        share = (args.gradient_accumulation_steps, self.accelerator.num_processes, self.accelerator.process_index)
        rows = mini_batch(len(mask), at.minibatch, args.num_mini_batches, args.seed, at.rollout, at.epoch)
        self._num_tokens = mask[rows].sum()
        self._queue = micro_batches(rows, experience.rollout.attention_mask.sum(dim=1), *share)
        if self.pretrain_mix is not None and not self._warming_up:
            ids, text_mask = self.pretrain_mix(args.mini_batch_size, global_step)
            self._num_text_tokens = text_mask[:, 1:].sum()  # nothing predicts a text's first token
            parts = micro_batches(torch.arange(len(ids)), text_mask.sum(dim=1), *share)
            self._texts = [(ids[part], text_mask[part]) for part in parts]

    @property
    def _warming_up(self) -> bool:
        return self.position.rollout < self.args.value_warmup_rollouts

    def _roles(self) -> list[tuple[Role, ...]]:
        """Who is trained, in which forwards.

        A value role with an adapter of its own follows the policy instead of joining it: only one graph is alive at a
        time, and what gradient checkpointing recomputes runs under the adapter it belongs to.
        """
        if not self.args.uses_value:
            return [("policy",)]
        if self._warming_up:
            return [("value",)]
        return [("policy",), ("value",)] if self._value_has_adapter else [("policy", "value")]

    def _train_on(self, model: nn.Module, batch: Experience) -> Tensor:
        if not self.base.training:  # train() visits every module
            model.train()
        total = torch.zeros((), device=self.accelerator.device)
        with frozen(self._parameters["policy"] if self._warming_up else []):  # the value's trunk may be the policy's
            for roles in self._roles():
                total = total + self._backward(on_all(partial(self._loss, model, batch, roles)))
        if self.pretrain_mix is not None and not self._warming_up:
            total = total + self._backward(on_all(partial(self._pretraining_loss, model)))
        return total

    def _backward(self, loss: Tensor) -> Tensor:
        self.accelerator.backward(loss)
        return loss.detach()

    def _loss(self, model: nn.Module, batch: Experience, roles: tuple[Role, ...]) -> Tensor:
        """The losses of `roles`, which share this forward."""
        args, rollout = self.args, batch.rollout
        loss = torch.zeros((), device=self.accelerator.device)
        with self.accelerator.autocast():
            outputs = model(
                rollout.input_ids,
                rollout.attention_mask,
                rollout.completion_ids.shape[1],
                roles=roles,
                temperature=args.temperature,
                entropy_grad=bool(args.entropy_coef),
            )
            if "policy" in roles:
                coef = self.controller.value
                part, metrics = policy_loss(self.objective, batch, outputs, self._num_tokens, args, coef)
                self._note(metrics, batch.loss_mask)
                if self.position.first:
                    # Nothing was stepped on since the rollout was scored: policy and sampling policy are the same.
                    first = {"policy/first_approxkl": metrics["policy/approxkl_avg"]}
                    self.metrics.add_tokens(first, batch.loss_mask)
                loss = loss + part * self.accelerator.num_processes  # DDP averages gradients; the loss is a sum
            if "value" in roles:
                part, metrics = value_loss(batch, outputs, self._num_tokens, args)
                self._note(metrics, batch.loss_mask)
                loss = loss + part * self.accelerator.num_processes
        return loss

    def _pretraining_loss(self, model: nn.Module) -> Tensor:
        """-ptx_coef * mean_t log pi(x_t | x_<t) of some texts: the second term of Ouyang et al. 2022, arXiv:2203.02155,
        equation 2, a mean over the tokens of the minibatch's texts as the policy's loss is over its completions'."""
        ids, mask = (part.to(self.base.device) for part in self._texts[len(self._queue)])
        with self.accelerator.autocast():
            outputs = model(ids, mask, ids.shape[1], roles=("policy",))
            terms = -outputs["logprobs"][:, 1:]
        self.metrics.add_tokens({"loss/ptx": terms}, mask[:, 1:])
        loss = token_mean(terms, mask[:, 1:], self._num_text_tokens)
        return self.args.ptx_coef * loss * self.accelerator.num_processes

    def _note(self, metrics: TokenMetrics, mask: Tensor) -> None:
        for name, entry in self.metrics.add_tokens(metrics, mask).items():
            self._sums[name] = self._sums[name] + entry if name in self._sums else entry

    # The end of a minibatch, an epoch, a rollout ----------------------------------------------------------------------

    def finish_minibatch(self) -> bool:
        """Add up the minibatch's metrics and check the guards: whether the optimizer may step. Every process must call
        it after a minibatch's last micro-batch."""
        if self.progress.stopped:
            return False
        self._note_gradient()
        self._gradient_before = None
        finite = self._gradients_finite()
        self._finite.add(finite)
        totals: dict[str, list[float]] = {}
        for sums in gather_object([{name: entry.tolist() for name, entry in self._sums.items()}]):
            _add_up(totals, sums)
        self._sums = {}
        self.progress.add(totals)
        mean = {name: total / max(count, 1.0) for name, (total, count) in totals.items()}
        args, kl, ratio = self.args, mean.get("policy/approxkl_avg", 0.0), mean.get("val/ratio", 1.0)
        too_far = args.max_approx_kl is not None and kl > args.max_approx_kl
        exploded = args.max_ratio is not None and not 1 / args.max_ratio <= ratio <= args.max_ratio
        self.progress.stopped = too_far
        skip = too_far or exploded or not finite
        self.progress.skipped += int(skip)
        return not skip

    def _gradients_finite(self) -> bool:
        """Log each role's gradient norm, before it is clipped; whether all are finite. A step on those that are not
        would ruin weights and moments for good, so it is skipped."""
        finite = True
        scaler = getattr(self.accelerator, "scaler", None)
        scale = scaler.get_scale() if scaler is not None else 1.0
        for role, parameters in self._parameters.items():
            if parameters and (role, self._warming_up) != ("policy", True):
                gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
                norm = float(whole(nn.utils.get_total_norm(gradients))) / scale if gradients else 0.0
                self.metrics.add_value(f"grad_norm/{role}", norm)
                finite = finite and math.isfinite(norm)
        # fp16's scaler looks for overflows itself, and needs to see them to lower its scale.
        return finite or scaler is not None

    def _note_gradient(self) -> None:
        """Take in what the policy's gradient has grown by: a micro-batch, or, of several processes, a minibatch. In the
        first epoch alone, where each completion counts once."""
        if self.evidence is None or self.position.epoch or self._warming_up or not self.evidence.sees_whole_gradients:
            return
        whole = sampled(self._parameters["policy"])
        self.progress.add_gradient(whole if self._gradient_before is None else whole - self._gradient_before)
        self._gradient_before = whole

    def _log_gradients(self) -> None:
        """What the gradients of the epoch that has ended had in common, and what not."""
        progress = self.progress
        if progress.gradients > 1:
            total = torch.tensor(progress.gradient_sum, dtype=torch.float64)
            signal, noise = signal_and_noise(total, progress.gradient_squares, progress.gradients)
            self.metrics.add_value("evidence/gradient/signal", signal)
            self.metrics.add_value("evidence/gradient/noise", noise)

    def note_rounding(self, optimizer: Any) -> None:
        """Log what rounding took of the policy's step just taken, at each rollout's first step: in a run's first one,
        where LoRA's second matrices are 0, it takes nothing."""
        if self.evidence is not None and self.position.first:
            share = rounding_of(optimizer, self._parameters["policy"])
            if math.isfinite(share) and not self.progress.skipped:
                self.metrics.add_value("evidence/lost_to_rounding", share)

    def undo_step(self) -> None:
        """Forget what the step under way, if there is one, has added to the numbers: it failed, and a run that resumes
        takes it again."""
        if self._before is not None:
            (self.metrics, self.progress, ahead), self._before = self._before, None
            if self.collector.ahead is not ahead:
                self.collector.drop_ahead()
            self.collector.ahead = ahead
        if self._controller_before is not None:
            self.controller.load_state_dict(self._controller_before)
            self._controller_before = None

    def end_step(self, state: TrainerState, control: PPOControl) -> None:
        """After an optimizer step, taken or skipped: tell the callbacks of an epoch and an update that have ended."""
        assert self.experience is not None
        self._before = self._controller_before = None
        if self.position.first:
            state.num_input_tokens_seen += int(self.experience.rollout.attention_mask.sum())
        at, stats = self.position, None
        if at.minibatch == self.args.num_mini_batches - 1 and self.progress.sums:
            self.metrics.add_value("policy/skipped_minibatches", self.progress.skipped)
            means = {key: self.progress.mean(name) for key, name in EPOCH_METRICS.items()}
            stats = EpochStats(epoch=at.epoch, skipped=self.progress.skipped, **means)
            self._log_gradients()
            self.progress = EpochProgress(stopped=self.progress.stopped, last_kl=stats.approxkl)
        if at.last:
            self._check_gradients()
            together(self._note_objective)
        if stats is not None:
            self.events.on_ppo_epoch_end(self.experience, stats)
        if at.last:
            self.events.on_update_end(self.experience, self.rollout_metrics)
        if control.should_update_stop:
            self.progress.stopped = True

    def _check_gradients(self) -> None:
        if self._finite:
            self._rollouts_without = 0 if True in self._finite else self._rollouts_without + 1
        self._finite = set()
        if self._rollouts_without == ROLLOUTS_WITHOUT:
            self._rollouts_without = 0
            raise RunError(
                f"No gradient of the last {ROLLOUTS_WITHOUT} rollouts was finite, so no step was taken on them: look "
                "for what is not finite in model or objective, or go on from an earlier checkpoint with a lower "
                "learning_rate."
            )

    def _note_objective(self) -> None:
        metrics = self.objective.metrics(self.controller.value)
        taken = name_taken(metrics, self.rollout_metrics)
        if taken is not None:
            name = self.args.objective_name
            raise ObjectiveError(f"{name}.metrics returned {taken!r}, which the trainer logs itself: rename it.")
        for name, value in metrics.items():
            self.metrics.add_value(name, value)

    # What an interrupted run must restore -----------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """All that changes here but the experience itself, as plain numbers. Every process must call it."""
        return {
            "updater": {"progress": asdict(self.progress), "penalty": self.controller.state_dict()},
            "reward_moments": self.collector.combination.moments.state_dict(),
            "metrics": self.metrics.state_dict(),
            "rollout_metrics": self.rollout_metrics,
            "ahead": gathered(self.collector.ahead),
        }

    def load_state_dict(self, state: dict[str, Any], experience: Experience | None) -> None:
        """Go on from what `state_dict` gave (empty: from the start), with the rollout in use then."""
        self.experience = experience
        if state:
            self.progress = EpochProgress(**state["updater"]["progress"])
            self.controller.load_state_dict(state["updater"]["penalty"])
            self.collector.combination.moments.load_state_dict(state["reward_moments"])
            self.metrics.load_state_dict(state["metrics"], keep=self.args.process_index == 0)
            self.rollout_metrics = state["rollout_metrics"]
            processes, process = self.accelerator.num_processes, self.accelerator.process_index
            self.collector.ahead = share_of(state.get("ahead"), processes, process)


def _add_up(sums: dict[str, list[float]], more: dict[str, list[float]]) -> None:
    """Add sums and counts by metric name."""
    for name, (total, count) in more.items():
        before = sums.get(name, [0.0, 0.0])
        sums[name] = [before[0] + total, before[1] + count]
