"""What a run measures beside its training to tell causes apart: cheaply, on few rows, and without changing anything.

Nothing here moves a weight, a random number of the run or a running mean; a run with `PPOConfig(evidence=False)` takes
the same steps. docs/evidence.md explains each number.
"""

from __future__ import annotations

import copy
import logging
import math
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from statistics import fmean
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, gather_object
from torch import Tensor, nn

from trl_ext.core import evidence, masked_sum, penalize_missing_eos, shape_rewards, token_mean
from trl_ext.generation import TransformersGenerator
from trl_ext.ppo.collector import Collector, RewardLog
from trl_ext.ppo.config import PPOConfig
from trl_ext.ppo.objectives import CheckedObjective, ObjectiveError, same_prompt, value_loss
from trl_ext.ppo.pretraining import PretrainMix
from trl_ext.random_state import RandomState
from trl_ext.roles import SharedBase
from trl_ext.roles.sharding import own_part
from trl_ext.tokens import tokenize_prompts, tokenizer_beside
from trl_ext.types import Experience, Rollout, concatenate

logger = logging.getLogger(__name__)

ROWS = 8  # whose gradient is taken apart, and which are scored again
DIFFERENT = 0.1  # share of a score's variance from which it is asked what does not repeat
TWINS = 16  # prompts that are answered a second time
SHARE = 0.0025  # of an update that gradients may take, and second completions, each over the whole run
# Of a turn or a part of it, in chat templates.
MARKER = re.compile(r"<\|[^\s|<>{}]+\|>|<(?:start|end)_of_turn>|<think>")
ROUNDED = 8  # parameters in which rounding is measured, in every rollout
TENSORS, NUMBERS = 32, 64  # so many numbers of so many parameters stand for the policy's gradient


@dataclass(frozen=True)
class Schedule:
    """Every how many rollouts something is measured: as often as `SHARE` allows, by settings alone, so that a run that
    resumes measures where it would have.

    The unit is a forward of one micro-batch. A decoding step counts as much, which is its most; a backward counts two.

    Attributes:
        gradients: the policy's gradient by term, and scoring again.
        twins: second completions; a multiple of the former.
    """

    gradients: int
    twins: int

    @classmethod
    def of(cls, args: PPOConfig, trained_forwards: int) -> Schedule:
        """For `trained_forwards` forwards of each micro-batch: 2 where the value role has a forward of its own."""
        rows = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.num_mini_batches
        generations = -(-rows // args.local_rollout_forward_batch_size)
        micro_batches = args.num_ppo_epochs * args.num_mini_batches * args.gradient_accumulation_steps
        update = generations * args.max_completion_length + 3 * micro_batches * trained_forwards
        terms = 3 + bool(args.entropy_coef) + bool(args.ptx_coef) + (trained_forwards == 1)
        few = min(ROWS / args.per_device_train_batch_size, 1.0)
        forwards = 3 + bool(args.ptx_coef)  # of the terms, of prompts, of what is scored again, and of the texts
        gradients = math.ceil((forwards + 2 * terms) * few / (SHARE * update))
        twins = math.ceil(args.max_completion_length / (SHARE * update))
        return cls(gradients, -(-twins // gradients) * gradients)


class Evidence:
    """Measures a rollout once it is experience, and before it is trained on.

    Args:
        collector: answers and scores once more.
        args: settings.
        accelerator: for autocast, and to gather over processes.
        objective: whose advantages are taken apart.
        policy: the policy's trained parameters.
        value_on_trunk: the value role is a head on the policy's trunk.
        pretrain_mix: gives the PTX loss's texts; None: no such loss.
        frozen: what must not move.
    """

    def __init__(
        self,
        collector: Collector,
        args: PPOConfig,
        accelerator: Accelerator,
        objective: CheckedObjective,
        policy: list[nn.Parameter],
        value_on_trunk: bool,
        pretrain_mix: PretrainMix | None,
        frozen: Frozen,
    ) -> None:
        self.collector, self.args, self.accelerator, self.frozen = collector, args, accelerator, frozen
        self.objective, self.policy, self.pretrain_mix = objective, policy, pretrain_mix
        self.value_on_trunk = value_on_trunk and args.uses_value
        self.schedule = Schedule.of(args, 2 if args.uses_value and not value_on_trunk else 1)
        self._told = False

    def __call__(
        self,
        experience: Experience,
        inputs: list[dict[str, Any]],
        trainer_state: Any,
        rollout: int,
        policy_trains: bool,
    ) -> dict[str, float]:
        """What is logged of a rollout. Every process must call it.

        Args:
            inputs: this process's rows of the dataset, as the rollout was made from.
            rollout: its number, from 0.
            policy_trains: False while the value role alone is trained.
        """
        with self._apart(rollout):
            metrics = {**self._shares(experience), **self._credit(experience), **within_prompts(experience)}
            moved = gather_object([self.frozen.moved()])
            metrics["base_moved"] = max((one for one in moved if math.isfinite(one)), default=math.nan)
            if rollout % self.schedule.gradients == 0:
                written, tokenizer = experience.rollout, self.collector.tokenizer
                metrics |= reading(written.prompts, tokenizer)
                metrics["prompts/other_tokens"] = other_tokens(written.completion_tokens[:TWINS], tokenizer)
                metrics["prompts/otherwise"] = written_otherwise(
                    written.prompts[:ROWS], tokenizer, self._own_tokenizer, self.args.chat_template_kwargs
                )
                metrics |= self.prompts_read(experience.rollout, len(inputs))
                metrics |= self._scored_again(experience, inputs, trainer_state, rollout)
                if rollout % self.schedule.twins == 0:
                    metrics |= self._moved_by_prompt(experience, inputs, trainer_state)
                if policy_trains and self.sees_whole_gradients:
                    step = trainer_state.global_step
                    parts = gather_object([self._attempt(lambda: self._gradients(experience, step))])
                    metrics |= parts[0] if None not in parts else {}  # alike on all, for the doctor may act on it
        return {f"evidence/{name}": value for name, value in metrics.items() if math.isfinite(value)}

    @cached_property
    def _own_tokenizer(self) -> Any:
        return tokenizer_beside(self.collector.base.causal_lm.config, self.collector.tokenizer)

    @property
    def sees_whole_gradients(self) -> bool:
        """Not where processes share out the weights, nor where gradients need a scale to survive."""
        return not (self.accelerator.distributed_type == DistributedType.FSDP or self.args.fp16)

    @contextmanager
    def _apart(self, rollout: int) -> Iterator[None]:
        """Leave all random numbers as they were, and count the seconds by themselves."""
        state, seconds, started = RandomState(), dict(self.collector.seconds), time.perf_counter()
        torch.manual_seed((self.args.seed + 1) * 1_000_003 + rollout * 1_009 + self.accelerator.process_index)
        try:
            yield
        finally:
            state.restore()
            self.collector.seconds.clear()
            self.collector.seconds.update(seconds)
            self.collector.seconds["evidence"] += time.perf_counter() - started

    def _attempt(self, work: Callable[[], Any]) -> Any:
        """What `work` returns; None where it fails here. Training does not need it, so nothing ends for its sake."""
        try:
            return work()
        except Exception as error:
            if not self._told:
                logger.warning(
                    "A measurement beside training is left out (%s: %s). evidence=False turns them off.",
                    type(error).__name__,
                    error,
                )
            self._told = True
            return None

    # From what is there -----------------------------------------------------------------------------------------------

    def _shares(self, experience: Experience) -> dict[str, float]:
        """What of the variance of a completion's whole reward each function makes, the penalty for a missing EOS, the
        KL, and what else changed a score."""
        args, scores, rollout = self.args, experience.scores, experience.rollout
        scored = ~scores.total.isnan()
        if int(scored.sum()) < 2:
            return {}
        columns = self.collector.combination.parts(scores.by_function)
        names = self.collector.score_names if columns.shape[1] == len(self.collector.score_names) else ["reward_roles"]
        parts = {f"share_of/{name}": columns[:, i] for i, name in enumerate(names)}
        zeros = torch.zeros_like(scores.total)
        parts["share/other"] = scores.total - columns.sum(dim=1)
        parts["share/missing_eos_penalty"] = penalize_missing_eos(zeros, rollout.has_eos, args.missing_eos_penalty)
        parts["share/kl"] = -args.kl_coef * masked_sum(experience.kl, rollout.completion_mask, dim=1)
        parts = {name: part[scored] for name, part in parts.items()}
        whole = torch.stack(list(parts.values())).sum(dim=0)
        return {**evidence.shares_of_variance(parts), "reward_std": float(whole.std(unbiased=False))}

    def _credit(self, experience: Experience) -> dict[str, float]:
        """How far back a score at the end reaches."""
        decay = {"clip": self.args.gamma * self.args.lam, "kl_penalty": self.args.gamma * self.args.lam}
        if self.args.objective == "reinforce" and self.args.uses_value:
            decay["reinforce"] = self.args.gamma
        if self.args.objective_name not in decay or not isinstance(self.args.objective, str):
            return {}
        first, mean = evidence.credit_reach(experience.rollout.completion_mask, decay[self.args.objective_name])
        return {"credit/first_token": first, "credit/mean": mean}

    # A second look ----------------------------------------------------------------------------------------------------

    def _scored_again(
        self, experience: Experience, inputs: list[dict[str, Any]], trainer_state: Any, rollout: int
    ) -> dict[str, float]:
        collector, processes = self.collector, self.accelerator.num_processes
        twins = rollout % self.schedule.twins == 0 and self._can_answer_again and self.args.num_generations == 1
        repeatable = [True] if collector.scorer is None else collector.scorer.repeatable
        if not any(repeatable) or (collector.scorer is None and not twins):
            return {}
        count = min(-(-(TWINS if twins else ROWS) // processes), len(inputs))
        rows = torch.arange(count) + self.accelerator.process_index * len(inputs)
        part = self._attempt(lambda: self._second_scores(experience.rows(rows), inputs[:count], trainer_state, twins))
        parts = gather_object([part])
        if any(one is None for one in parts):
            return {}
        first, again, other, unlike = (torch.cat(columns) for columns in zip(*parts, strict=True))
        metrics, variances = dict[str, float](), list[float]()
        if collector.scorer is not None:
            for i, name in enumerate(collector.score_names):
                column = experience.scores.by_function[:, i]
                variance = float(column[~column.isnan()].double().var(unbiased=False))
                metrics[f"noise/{name}"] = evidence.noise_share(first[:, i], again[:, i], variance)
                variances.append(variance)
            if any(share > DIFFERENT for share in metrics.values()):  # NaN, of a function that was not called, is not
                metrics |= self._what_differs(experience.rows(rows), inputs[:count], trainer_state, variances)
        if len(other) and all(repeatable):
            totals = [collector.combination(one, training=False)[unlike] for one in (again, other)]
            metrics |= _within(torch.cat(totals), torch.arange(len(totals[0])).repeat(2))
        return metrics

    def _what_differs(
        self, before: Experience, inputs: list[dict[str, Any]], trainer_state: Any, variances: Sequence[float]
    ) -> dict[str, float]:
        """Of scores that do not repeat, what differs: the share that is not there again when the same rows are scored
        twice in one order (chance, a state), and when they are scored in another order (their places). What both leave
        is decided by who else is scored."""

        def looks() -> list[Tensor]:
            rollout, order = before.rollout, _far_apart(len(inputs))
            again, once_more = (self._scores(rollout, inputs, trainer_state) for _ in range(2))
            moved = self._scores(rollout.rows(order), [inputs[i] for i in order.tolist()], trainer_state)
            return [again, once_more, moved[order.argsort()]]

        parts = gather_object([self._attempt(looks)])
        if any(one is None for one in parts):
            return {}
        again, once_more, moved = (torch.cat(columns) for columns in zip(*parts, strict=True))
        return {
            f"noise_{kind}/{name}": evidence.noise_share(again[:, i], other[:, i], variances[i])
            for i, name in enumerate(self.collector.score_names)
            for kind, other in (("by_chance", once_more), ("by_place", moved))
        }

    @property
    def _can_answer_again(self) -> bool:
        """Whether a second completion leaves what the generator will sample next as it is, and scores can be had."""
        scorer = self.collector.scorer
        return isinstance(self.collector.generator, TransformersGenerator) and (
            scorer is None or all(scorer.repeatable)
        )

    def _second_scores(
        self, before: Experience, inputs: list[dict[str, Any]], trainer_state: Any, twins: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Scores by function of the same completions, as they were and once more, and of second completions of their
        prompts, with which of these are unlike the first (neither where there are no `twins`). All that is scored anew
        is scored in one call, in another order: what its place or its neighbours decide does not repeat. Reward roles
        repeat, so of them only second completions are scored."""
        rollout, own, count = before.rollout, before.scores.by_function, len(inputs)
        same = [replace(rollout, sampling_logprobs=None)] if self.collector.scorer is not None else []
        others = [self.collector.answered(inputs)] if twins else []
        written = concatenate([*same, *others], self._pad)
        order = _far_apart(len(written.prompts))
        scores = self._scores(written.rows(order), [inputs[i % count] for i in order.tolist()], trainer_state)
        scores = scores[order.argsort()]
        again, other = (scores[:count], scores[count:]) if same else (own, scores)
        second = others[0].completion_tokens if others else []
        unlike = [one != two for one, two in zip(rollout.completion_tokens, second, strict=False)]
        return own, again, other, torch.tensor(unlike, dtype=torch.bool)

    def _scores(self, rollout: Rollout, inputs: list[dict[str, Any]], trainer_state: Any) -> Tensor:
        """By function, (batch, functions)."""
        pass_ = None
        if self.collector.scorer is None:
            with self.accelerator.autocast():
                pass_ = self.collector.score_pass(rollout, roles=["reward"])
        return self.collector.score(rollout, pass_, inputs, trainer_state, RewardLog(), measured=True)

    def _moved_by_prompt(
        self, experience: Experience, inputs: list[dict[str, Any]], trainer_state: Any
    ) -> dict[str, float]:
        """How much scores change where a completion is scored as the answer to another row's prompt, with that row's
        columns: mean squared difference over twice the variance. 0: the prompt does not count."""
        scorer, accelerator = self.collector.scorer, self.accelerator
        if scorer is not None and not all(scorer.repeatable):
            return {}
        rows = torch.arange(min(-(-TWINS // accelerator.num_processes), len(inputs)))
        before = experience.rows(rows + accelerator.process_index * len(inputs))
        part = self._attempt(lambda: self._swapped_scores(before, [inputs[i] for i in rows], trainer_state))
        parts = gather_object([part])
        if any(one is None for one in parts):
            return {}
        own, swapped = (
            self.collector.combination(torch.cat(columns), training=False) for columns in zip(*parts, strict=True)
        )
        known = own[~own.isnan()].double()
        variance = float(known.var(unbiased=False)) if len(known) else 0.0
        if len(own) < ROWS or not variance > 0.0:  # scores that are all the same move with nothing
            return {}
        return {"score/moved_by_prompt": evidence.noise_share(own, swapped, variance)}

    def _swapped_scores(
        self, before: Experience, inputs: list[dict[str, Any]], trainer_state: Any
    ) -> tuple[Tensor, Tensor]:
        """Scores by function of completions as they were, and as answers to the prompt of another row; rows whose
        prompt stays the same are left out."""
        rollout, others = before.rollout, torch.arange(len(inputs)).roll(self.args.num_generations)
        theirs = rollout.rows(others)
        mixed = replace(
            rollout,
            prompts=theirs.prompts,
            prompt_ids=theirs.prompt_ids,
            prompt_mask=theirs.prompt_mask,
            sampling_logprobs=None,
        )
        scores = self._scores(mixed, [inputs[i] for i in others], trainer_state)
        unlike = [a != b for a, b in zip(rollout.prompt_tokens, theirs.prompt_tokens, strict=True)]
        return before.scores.by_function[unlike], scores[unlike]

    def prompts_read(self, rollout: Rollout, stride: int) -> dict[str, float]:
        """How surprising the policy finds some prompts: nats per token of each, a mean over prompts and its standard
        error. Every process must call it.

        Args:
            stride: rows of `rollout` from one process's first to the next one's.
        """
        count = min(-(-ROWS // self.accelerator.num_processes), stride)
        rows = torch.arange(count) + self.accelerator.process_index * stride
        few = [rollout.rows(part) for part in rows.split(self.args.local_rollout_forward_batch_size)]
        parts = gather_object([self._attempt(lambda: torch.cat([self._nats_of_prompts(part) for part in few]))])
        if any(part is None for part in parts):
            return {}
        nats = torch.cat(parts)
        nats = nats[~nats.isnan()]
        error = float(nats.std()) / math.sqrt(len(nats)) if len(nats) > 1 else math.nan
        return {"prompts/surprise": float(nats.mean()), "prompts/surprise_error": error}

    def _nats_of_prompts(self, rollout: Rollout) -> Tensor:
        """(prompts,) float64, NaN where a prompt has one token or none."""
        mask = rollout.prompt_mask
        read = mask[:, 1:] & mask[:, :-1]  # what has a token before it
        if mask.shape[1] < 2:  # on all processes alike, which share a forward where the base is shared out
            return torch.full((len(mask),), math.nan, dtype=torch.float64)
        longest = max(int(read.sum(dim=1).max()), 1)
        kept, device = slice(mask.shape[1] - longest - 1, None), self.collector.base.device
        ids, seen = rollout.prompt_ids[:, kept].to(device), mask[:, kept].to(device)
        with torch.no_grad(), self.collector.base.scoring(), self.accelerator.autocast():
            logprobs = self.collector.base(ids, seen, longest, roles=["policy"])["logprobs"].double().cpu()
        read = read[:, -longest:]
        return torch.where(read, -logprobs, 0.0).sum(dim=1) / read.sum(dim=1)

    @property
    def _pad(self) -> int:
        return int(self.collector.generation_config.pad_token_id)

    # The policy's gradient by term ------------------------------------------------------------------------------------

    def _gradients(self, experience: Experience, global_step: int) -> dict[str, float]:
        """Norm of the policy's gradient from each term of its loss, on few rows before the first step, and the cosine
        of each with that from the score. The terms share one forward, as in training, and have a backward each."""
        args = self.args
        rows = torch.arange(min(ROWS, args.per_device_train_batch_size, len(experience.kl)))
        batch = experience.rows(rows).to(self.collector.base.device)
        mask, tokens = batch.loss_mask, batch.loss_mask.sum().clamp(min=1)
        if not self.collector.base.training:
            self.collector.base.train()
        with torch.enable_grad(), self.accelerator.autocast():
            outputs = self._outputs(batch)
            # Before the first step the ratio is 1, where the gradient of every surrogate is that of A log pi.
            losses = {
                name: -token_mean(part[rows].to(mask.device) * outputs["logprobs"], mask, tokens)
                for name, part in self._advantages_by_part(experience).items()
            }
            if args.entropy_coef:
                losses["entropy"] = -args.entropy_coef * token_mean(outputs["entropy"], mask, tokens)
            if self.value_on_trunk:
                losses["value"] = value_loss(batch, outputs, tokens, args)[0]
        gradients = {name: self._gradient_of(loss) for name, loss in losses.items()}
        del outputs, losses  # the texts have a forward of their own, and memory holds no more than one
        if self.pretrain_mix is not None:
            with torch.enable_grad(), self.accelerator.autocast():
                loss = self._pretraining_loss(len(rows), global_step)
            gradients["ptx"] = self._gradient_of(loss)
        norms = {f"gradient/{name}": evidence.norm(gradient) for name, gradient in gradients.items()}
        cosines = {
            f"cosine/score~{name}": evidence.cosine(gradients["score"], gradient)
            for name, gradient in gradients.items()
            if name != "score" and norms[f"gradient/{name}"] > 0
        }
        return norms | cosines

    def _outputs(self, batch: Experience) -> dict[str, Tensor]:
        rollout, args = batch.rollout, self.args
        return self.collector.base(
            rollout.input_ids,
            rollout.attention_mask,
            rollout.completion_ids.shape[1],
            roles=("policy", "value") if self.value_on_trunk else ("policy",),
            temperature=args.temperature,
            entropy_grad=bool(args.entropy_coef),
        )

    def _pretraining_loss(self, rows: int, global_step: int) -> Tensor:
        assert self.pretrain_mix is not None
        base = self.collector.base
        ids, mask = (x.to(base.device) for x in self.pretrain_mix(rows, global_step))
        terms = -base(ids, mask, ids.shape[1], roles=("policy",))["logprobs"][:, 1:]
        return self.args.ptx_coef * token_mean(terms, mask[:, 1:], mask[:, 1:].sum())

    def _gradient_of(self, loss: Tensor) -> list[Tensor]:
        parameters = [parameter for parameter in self.policy if parameter.requires_grad]
        found = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]

    def _advantages_by_part(self, experience: Experience) -> dict[str, Tensor]:
        """Advantages that the score makes, the KL, and what is left: the values, or what is not linear in rewards. They
        add up to the experience's own."""
        args, mask = self.args, experience.rollout.completion_mask
        plain = copy.copy(args)
        plain.whiten_advantages = False
        pass_ = replace(experience.score_pass, values=torch.zeros_like(experience.score_pass.values))
        final = penalize_missing_eos(
            experience.scores.total.nan_to_num(0.0), experience.rollout.has_eos, args.missing_eos_penalty
        )
        rewards = {
            "score": shape_rewards(final, torch.zeros_like(experience.kl), 0.0, mask),
            "kl": torch.where(mask, -args.kl_coef * experience.kl, 0.0),
        }
        kept = experience.loss_mask
        scale = 1.0
        if args.whiten_rewards:
            whole = (rewards["score"] + rewards["kl"])[kept].double()
            scale = 1 / math.sqrt(float(whole.var()) + 1e-8) if len(whole) > 1 else 1.0
        try:
            objective = copy.deepcopy(self.objective)  # one of your own may keep a state
        except Exception as error:
            raise ObjectiveError(f"the objective cannot be copied: {error}") from error
        parts = {
            name: objective.advantages(replace(experience, rewards=scale * part, score_pass=pass_), plain)[0]
            for name, part in rewards.items()
        }
        if args.whiten_advantages and int(kept.sum()) > 1:
            # Whitening is affine: each part loses its own mean, which without a critic is one over completions.
            whole = objective.advantages(experience, plain)[0][kept].double()
            factor = float(experience.advantages[kept].double().std()) / max(float(whole.std()), 1e-12)
            weights = kept / (1 if args.uses_value else kept.sum(dim=1, keepdim=True).clamp(min=1))
            means = {name: (weights * part).sum() / weights.sum() for name, part in parts.items()}
            parts = {name: torch.where(kept, factor * (part - means[name]), 0.0) for name, part in parts.items()}
        parts["baseline"] = torch.where(kept, experience.advantages - parts["score"] - parts["kl"], 0.0)
        return parts


def within_prompts(experience: Experience) -> dict[str, float]:
    """The share of the scores' variance that lies within a prompt, where the rollout has prompts more than once."""
    rollout, total = experience.rollout, experience.scores.total
    groups, first = same_prompt(rollout.prompt_tokens), dict[tuple[int, tuple[int, ...]], int]()
    rows = zip(groups.tolist(), rollout.completion_tokens, total.tolist(), strict=True)
    for i, (group, completion, score) in enumerate(rows):
        if not math.isnan(score):
            first.setdefault((group, tuple(completion)), i)
    kept = list(first.values())
    return _within(total[kept], groups[kept])


def _within(scores: Tensor, groups: Tensor) -> dict[str, float]:
    """Of completions that are unlike each other: those that are the same have the same score, whatever it reads."""
    within, between, freedom = evidence.variance_components(scores, groups)
    if freedom < 4 or within + between == 0.0:  # of fewer nothing can be told
        return {}
    return {"score/within_prompt": within / (within + between), "score/repeats": float(freedom)}


def _far_apart(rows: int) -> Tensor:
    """An order of so many rows in which neighbours lie far apart and no block stays together: steps of the golden
    section, beginning at the last row."""
    step = next(k for k in range(max(round(0.618 * rows), 1), rows + 2) if math.gcd(k, rows) == 1)
    return (rows - 1 - step * torch.arange(rows)) % rows


def reading(prompts: Sequence[Any], tokenizer: Any) -> dict[str, float]:
    """How far prompts are from what a chat model was taught to read.

    Returns:
        "prompts/plain": share of prompts that are texts, though the tokenizer has a chat template.
        "prompts/unknown_markers": of the markers that its template writes, the share that is no single token; not there
        where no prompt is written by the template, or it writes no markers.
    """
    if getattr(tokenizer, "chat_template", None) is None:
        return {}
    messages = [prompt for prompt in prompts if not isinstance(prompt, str)]
    figures = {"prompts/plain": 1 - len(messages) / len(prompts)}
    markers = (
        set(MARKER.findall(tokenizer.chat_template)) if messages and isinstance(tokenizer.chat_template, str) else ()
    )
    if markers:
        none = (None, tokenizer.unk_token_id)
        unknown = [tokenizer.convert_tokens_to_ids(marker) in none for marker in markers]
        figures["prompts/unknown_markers"] = sum(unknown) / len(unknown)
    return figures


def written_otherwise(prompts: Sequence[Any], tokenizer: Any, own: Any, chat_template_kwargs: Any) -> float:
    """The share of prompts that are other ids to another tokenizer, with its own template in the place of one that the
    settings give.

    Args:
        own: the other one; None: there is none.

    Returns:
        NaN where it cannot write them.
    """
    if own is None:
        return math.nan
    own_kwargs = {k: value for k, value in (chat_template_kwargs or {}).items() if k != "chat_template"}
    try:
        pairs = [
            tokenize_prompts(prompts, one, kwargs)
            for one, kwargs in ((tokenizer, chat_template_kwargs), (own, own_kwargs))
        ]
    except Exception as error:  # no template, or one that knows no such messages
        logger.debug("prompts/otherwise is left out: %s", error)
        return math.nan
    return fmean(a != b for a, b in zip(*pairs, strict=True))


def other_tokens(completions: Sequence[Sequence[int]], tokenizer: Any) -> float:
    """The share of a model's own tokens that are others once the tokenizer has read the text of them: near 0 where it
    is the model's own. Most of what a model samples it would also have been given to read.

        1 - |a multiset intersection of the sampled tokens and those that are read| / |sampled|

    The first word of each is left out: some tokenizers begin every text with a space.

    Args:
        completions: token ids of each; special ones do not count.

    Returns:
        NaN where there are no tokens.
    """
    try:
        special = set(tokenizer.all_special_ids)
        own = [_after_a_word([token for token in one if token not in special], tokenizer) for one in completions]
        if not (total := sum(map(len, own))):
            return math.nan
        texts = tokenizer.batch_decode(own, clean_up_tokenization_spaces=False)
        read = tokenizer(texts, add_special_tokens=False)["input_ids"]
    except Exception as error:  # ids that the tokenizer does not know, say: nothing ends for a measurement's sake
        logger.debug("prompts/other_tokens is left out: %s", error)
        return math.nan
    return 1 - sum((Counter(a) & Counter(b)).total() for a, b in zip(own, read, strict=True)) / total


def _after_a_word(ids: list[int], tokenizer: Any) -> list[int]:
    """What begins with a space, by the marks of byte-level and SentencePiece vocabularies; of others all but the
    first."""
    pieces = tokenizer.convert_ids_to_tokens(ids)  # None of an id that only the model has
    return ids[next((i for i, piece in enumerate(pieces) if i and piece and piece[:1] in ("\u0120", "\u2581")), 1) :]


def held_out_gap(trained: Experience | None, held_out: Experience) -> dict[str, float]:
    """How far the scores of held-out prompts lie below those of the training prompts of the rollout in use."""
    if trained is None:
        return {}
    kept = [one.scores.total[~one.scores.total.isnan()] for one in (trained, held_out)]
    gap, z = evidence.score_gap(*kept)
    found = {"evidence/held_out/score_gap": gap, "evidence/held_out/score_gap_z": z}
    return {name: value for name, value in found.items() if math.isfinite(value)}


LOST = 1e6


class Frozen:
    """What nothing may move: the base on which all roles stand, and the adapters that are not trained. Looked at are
    some numbers of each tensor but those that a quantised base packs, which its library may store otherwise.

    Args:
        base: the roles.
        trained: what is trained.
    """

    def __init__(self, base: SharedBase, trained: Sequence[nn.Parameter]) -> None:
        moving = {id(parameter) for parameter in trained}
        still = [one for one in base.parameters() if id(one) not in moving and not one.requires_grad]
        mine = [own_part(one).detach() for one in still]
        self._kept = [one for one in mine if one.is_floating_point() and one.numel() and not one.is_meta]
        self._before = self._some()

    def _some(self) -> Tensor:
        """(tensors, 8) on the CPU; of smaller ones the first number again."""
        few = [one.flatten()[:: max(1, one.numel() // 8)][:8].float() for one in self._kept]
        rows = [torch.cat([one, one[:1].expand(8 - len(one))]).to(few[0].device) for one in few]
        return torch.stack(rows).cpu() if rows else torch.zeros(0, 8)

    def moved(self) -> float:
        """The largest change of some numbers of a tensor since this process began training, over the largest of that
        tensor's; of what this process has of it, where processes share it out. NaN where there is nothing to look at;
        what is no longer finite has changed by `LOST`."""
        if not len(self._before):
            return math.nan
        changes = (self._some() - self._before).abs().nan_to_num(nan=math.inf).amax(dim=1)
        return min(float((changes / self._before.abs().amax(dim=1).clamp(min=1e-12)).max()), LOST)


def _spread(parameters: Sequence[nn.Parameter], about: int) -> Sequence[nn.Parameter]:
    """About so many of them, of all layers. LoRA's matrices come in pairs, of which at first only the second has
    gradients: an odd stride meets both kinds."""
    return parameters[:: max(1, len(parameters) // about) | 1]


def sampled(parameters: Sequence[nn.Parameter]) -> Tensor:
    """Some numbers of the gradient, the same ones every time: (numbers,) float64 on the CPU."""
    parts = []
    for parameter in _spread(parameters, TENSORS):
        stride = max(1, parameter.numel() // NUMBERS)
        whole = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
        parts.append(whole.detach().flatten()[::stride][:NUMBERS].double())
    return torch.cat(parts).cpu() if parts else torch.zeros(0, dtype=torch.float64)


def rounding_of(optimizer: Any, parameters: Sequence[nn.Parameter]) -> float:
    """Share of Adam's step just taken that rounding took away, by squares, over some of the policy's parameters; NaN
    where the optimizer keeps no moments."""
    of_policy = {id(parameter) for parameter in _spread(parameters, ROUNDED)}
    lost = size = 0.0
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            moments = optimizer.state.get(parameter, {})
            if id(parameter) not in of_policy or not {"exp_avg", "exp_avg_sq", "step"} <= set(moments):
                continue
            step, (beta1, beta2) = float(moments["step"]), group["betas"]
            mean = moments["exp_avg"].flatten()[:NUMBERS].double() / (1 - beta1**step)
            square = moments["exp_avg_sq"].flatten()[:NUMBERS].double() / (1 - beta2**step)
            meant = -group["lr"] * mean / (square.sqrt() + group["eps"])
            of_one = evidence.lost_to_rounding(parameter.detach().flatten()[:NUMBERS], meant)
            lost, size = lost + of_one[0], size + of_one[1]
    return lost / size if size > 0 else math.nan
