"""Completions and their scores: the part of an update that needs no gradient."""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import GenerationConfig, PreTrainedTokenizerBase, set_seed

from trl_ext.callbacks import RolloutEvents
from trl_ext.core import combine_members
from trl_ext.generation import (
    Answers,
    ContinuousGenerator,
    GenerationError,
    Generator,
    TransformersGenerator,
    begin,
    generate,
)
from trl_ext.ppo.ahead import Ahead
from trl_ext.ppo.batches import permutation
from trl_ext.ppo.config import PPOConfig
from trl_ext.ppo.failures import together
from trl_ext.ppo.metrics import Metrics
from trl_ext.random_state import RandomState
from trl_ext.rewards import Combination, RewardError, Scorer
from trl_ext.roles import Role, SharedBase
from trl_ext.tokens import as_ids, eos_ids, reward_suffix
from trl_ext.types import Rollout, ScoredRollout, ScorePass, Scores, concatenate

logger = logging.getLogger(__name__)


@dataclass
class RewardLog:
    """What reward functions log of their own: numbers, and columns for the table of completions."""

    metrics: Metrics = field(default_factory=Metrics)
    columns: defaultdict[str, list[Any]] = field(default_factory=lambda: defaultdict(list))


class Collector:
    """Has prompts answered, and the completions scored.

    Args:
        base: the roles.
        tokenizer: of the base.
        generator: who answers.
        scorer: the reward functions; None: the reward role scores, or several do, which count as one function.
        args: settings.
        accelerator: for autocast and to gather over processes.
        events: hears of each rollout before it is scored.

    Attributes:
        ahead: the next rollout, where it is begun already.
    """

    def __init__(
        self,
        base: SharedBase,
        tokenizer: PreTrainedTokenizerBase,
        generator: Generator,
        scorer: Scorer | None,
        args: PPOConfig,
        accelerator: Accelerator,
        events: RolloutEvents,
    ) -> None:
        self.base, self.generator = base, generator
        self.args, self.accelerator, self.events = args, accelerator, events
        self.write_by(tokenizer)
        self.score_by(scorer, args.reward_weights)
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.log = RewardLog()
        self.ahead: Ahead | None = None
        self._told = False

    def write_by(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Who writes prompts and reads completions from now on."""
        self.tokenizer, self.generation_config = tokenizer, sampling_config(self.args, self.base, tokenizer)

    def score_by(self, scorer: Scorer | None, weights: list[float] | None = None) -> None:
        """Who scores from now on, with nothing known of their scores yet."""
        self.scorer, args = scorer, self.args
        members = self.base.reward_roles if scorer is None and len(self.base.reward_roles) > 1 else ()
        self.score_names = scorer.names if scorer is not None else list(members) or ["reward_role"]
        weights = weights or [1.0] * (1 if members else len(self.score_names))
        combine = partial(combine_members, how=args.reward_ensemble, coef=args.reward_uncertainty_coef)
        self.combination = Combination(
            weights, args.score_normalization, args.reward_clip_range, len(members), combine if members else None
        )

    def __call__(
        self, inputs: list[dict[str, Any]], trainer_state: Any, following: list[Any] | None = None
    ) -> ScoredRollout:
        """Answer this process's prompts, unless that was begun ahead, and score the completions, for training.

        Args:
            inputs: rows of the dataset, each a dict with "prompt".
            trainer_state: passed on to the reward functions.
            following: prompts of the next rollout, which is begun ahead; None: it is not.

        Returns:
            Rollout, scores and score pass of all processes, the same on each, on the CPU.
        """
        self.log = RewardLog()
        answered = together(lambda: self.answered(inputs, begun=self._begun([row["prompt"] for row in inputs])))
        # At once, so that it is sampled while this one is scored, too; but once every process has its answers, for the
        # adapter that gave them goes now.
        self.ahead = None if following is None else together(lambda: self._begin(following))
        rollout = self.events.on_rollout_end(answered)
        part = together(lambda: self._scored(rollout, inputs, trainer_state, self.log))
        return self._combined([part], training=True)

    def all_of(self, dataloader: DataLoader[Any], trainer_state: Any) -> tuple[ScoredRollout, dict[str, float]]:
        """Answer every prompt of `dataloader` once and score the completions, always with the same random numbers, and
        without moving those of training.

        Returns:
            What `__call__` returns, and the means of what reward functions logged.
        """
        log = RewardLog()

        def part(inputs: list[dict[str, Any]]) -> tuple[Rollout, Tensor, ScorePass]:
            return self._scored(self.answered(inputs), inputs, trainer_state, log)

        if self.ahead is not None:
            together(self.ahead.wait)  # on every process: the adapter that answers there goes now
        with self._apart(self.args.seed):
            batches = iter(dataloader)  # as many in each process
            parts = [together(lambda: part(next(batches))) for _ in range(len(dataloader))]
            next(batches, None)  # which tells accelerate that it has ended
        scored = self._combined(parts, training=False)
        # The last batch may hold repeated rows that only make the processes' shares equal.
        count = min(len(dataloader.dataset), len(scored.scores.total))  # type: ignore[arg-type]
        return scored.rows(torch.arange(count)), log.metrics.drain()

    def normalize_by_reference(self, dataset: Any, trainer_state: Any) -> None:
        """Make each reward function's scores have mean 0 and standard deviation 1 on the reference's completions.

        Source: Huang et al. 2024, "The N+ Implementation Details of RLHF with PPO", arXiv:2403.17031, detail 6; Ziegler
        et al. 2019, arXiv:1909.08593, section 2.1.
        """
        count = min(self.args.normalization_samples, len(dataset))
        drawn = permutation(len(dataset), self.args.seed)[:count].tolist()
        processes, index = self.accelerator.num_processes, self.accelerator.process_index
        share = drawn[index::processes]
        asked = share + drawn[: -(-count // processes) - len(share)]  # as many in each process
        batches = [asked[i : i + self._batch] for i in range(0, len(asked), self._batch)]

        def row(number: int) -> dict[str, Any]:  # as training gets it, of a dataset with a transform too
            whole = dataset[number]
            return {"prompt": whole["prompt"]} if self.args.remove_unused_columns else whole

        def scores(rows: list[int]) -> Tensor:
            return self._reference_scores([row(i) for i in rows], trainer_state)

        with self._apart(self.args.seed):
            parts = [together(partial(scores, rows)) for rows in batches]
        self.combination.moments.update(torch.cat(gather_object([torch.cat(parts)[: len(share)]])))

    def _reference_scores(self, inputs: list[dict[str, Any]], trainer_state: Any) -> Tensor:
        rollout, pass_ = self.answered(inputs, "reference"), None
        if self.scorer is None:
            with self.accelerator.autocast():
                pass_ = self.score_pass(rollout, roles=["reward"])
        return self.score(rollout, pass_, inputs, trainer_state, RewardLog())

    def drop_ahead(self) -> None:
        """Forget the next rollout, once nobody works on it any more."""
        if self.ahead is not None:
            self.ahead.wait()
        self.ahead = None

    def _begin(self, prompts: list[Any]) -> Ahead:
        config, template = self.generation_config, self.args.chat_template_kwargs
        return Ahead(prompts, begin(self.generator, prompts, self.tokenizer, config, template))  # type: ignore[arg-type]

    def _begun(self, prompts: list[Any]) -> Future[Answers] | None:
        """What was begun ahead for these prompts; None where nothing was."""
        if self.ahead is None:
            return None
        if self.ahead.prompts != prompts:
            logger.warning("The rollout that was sampled ahead has other prompts than come now: it is dropped.")
            self.drop_ahead()
            return None
        return self.ahead.answers

    def answered(
        self, inputs: list[dict[str, Any]], role: Role = "policy", begun: Future[Answers] | None = None
    ) -> Rollout:
        """One completion of each of this process's prompts; `begun`: those that are under way."""
        with self.timed("generate"), self.accelerator.autocast():
            rollout = generate(
                self.generator,
                [row["prompt"] for row in inputs],
                self.tokenizer,
                self.generation_config,
                self.args.chat_template_kwargs,  # type: ignore[arg-type]
                role=role,
                vocab_size=self.base.config.get_text_config().vocab_size,
                begun=begun,
            )
        if role == "policy" and rollout.sampling_logprobs is None:
            self._check_correction()
        return rollout

    def _check_correction(self) -> None:
        """Refuse, or tell once, that the generator's log-probs are not known and cannot be corrected by.

        Raises:
            GenerationError: the correction was asked for.
        """
        name, asked = type(self.generator).__name__, self.args.vllm_importance_sampling_correction
        missing = f"{name} tells no log-probabilities of its completions, so no importance weight can be taken"
        if asked or self.args.rollouts_ahead:
            setting = "vllm_importance_sampling_correction is True" if asked else "rollouts_ahead is 1"
            raise GenerationError(f"{setting}, but {missing}: return Answers(ids, logprobs), or leave the setting out.")
        own = isinstance(self.generator, (ContinuousGenerator, TransformersGenerator))
        if asked is None and not own and not self._told:
            logger.warning("%s; val/sampling_gap says whether it samples as the policy would.", missing)
        self._told = True

    def _scored(
        self, rollout: Rollout, inputs: list[dict[str, Any]], trainer_state: Any, log: RewardLog
    ) -> tuple[Rollout, Tensor, ScorePass]:
        """This process's rollout, its scores by function, its score pass."""
        with self.timed("roles"), self.accelerator.autocast():
            pass_ = self.score_pass(rollout)
        with self.timed("score"):
            return rollout, self.score(rollout, pass_, inputs, trainer_state, log), pass_

    def _combined(self, parts: list[tuple[Rollout, Tensor, ScorePass]], training: bool) -> ScoredRollout:
        """All processes' parts in one, the processes' rows of each part side by side."""
        pad = int(self.generation_config.pad_token_id)
        gathered = [part for one in parts for part in gather_object([one])]
        rollouts, columns, passes = zip(*gathered, strict=True)
        by_function = torch.cat(columns)
        if bool(by_function.isnan().all()):
            raise RewardError(
                f"No reward function ({', '.join(self.score_names)}) scored any of {len(by_function)} completions: all "
                "returned None."
            )
        total = self.combination(by_function, training)
        scores = Scores(total, by_function, self.combination.spread(by_function))
        return ScoredRollout(concatenate(rollouts, pad), scores, concatenate(passes, pad))

    def score_pass(self, rollout: Rollout, roles: Sequence[Role] | None = None) -> ScorePass:
        """What policy, reference, value and, where no function scores, the reward roles make of this process's rollout.

        Rows of like length travel together, so that little padding is computed.

        Args:
            roles: who is asked; None: all of these.
        """
        if roles is None:
            value: list[Role] = ["value"] if self.args.uses_value else []
            reward: list[Role] = ["reward"] if self.scorer is None else []
            roles = ["policy", "reference", *value, *reward]
        order = rollout.attention_mask.sum(dim=1).argsort(descending=True, stable=True)
        with self.base.scoring():
            parts = [self._forward(rollout.rows(rows), roles) for rows in order.split(self._batch)]
        return concatenate(parts, pad_token_id=0).rows(order.argsort())

    def _forward(self, part: Rollout, roles: Sequence[Role]) -> ScorePass:
        eos, template = self.generation_config.eos_token_id, self.args.chat_template_kwargs
        part = part.to(self.base.device)
        outputs = self.base(
            part.input_ids,
            part.attention_mask,
            part.completion_ids.shape[1],
            roles=roles,
            temperature=self.args.temperature,
            reward_suffix_ids=reward_suffix(part.prompts, self.tokenizer, eos, template),  # type: ignore[arg-type]
            reward_suffix_rows=part.has_eos,
        )
        missing = torch.zeros(part.completion_ids.shape, device=self.base.device)
        scores = outputs.get("scores", torch.full((len(missing),), float("nan"), device=self.base.device))
        return ScorePass(
            logprobs=outputs.get("logprobs", missing),
            entropy=outputs.get("entropy", missing),
            ref_logprobs=outputs.get("ref_logprobs", missing),
            values=outputs.get("values", missing),
            reward_scores=outputs.get("scores_by_role", scores.unsqueeze(1)),
        ).to("cpu")

    def score(
        self,
        rollout: Rollout,
        pass_: ScorePass | None,
        inputs: list[dict[str, Any]],
        trainer_state: Any,
        log: RewardLog,
        measured: bool = False,
    ) -> Tensor:
        """Scores (batch, functions) of this process's completions, from the reward functions, or else those of the
        reward roles in `pass_`. `measured`: training does not need them, see `Scorer.once_more`."""
        if self.scorer is None:
            assert pass_ is not None
            return pass_.reward_scores
        call = self.scorer.once_more if measured else self.scorer
        return call(
            rollout,
            {key: [row[key] for row in inputs] for key in inputs[0] if key != "prompt"},
            trainer_state=trainer_state,
            log_extra=lambda column, values: log.columns[column].extend(values),
            log_metric=log.metrics.add_value,
        )

    @property
    def _batch(self) -> int:
        return self.args.local_rollout_forward_batch_size

    @contextmanager
    def _apart(self, seed: int) -> Iterator[None]:
        """Leave random numbers and the timers as they were."""
        state, seconds = RandomState(), dict(self.seconds)
        set_seed(seed + self.accelerator.process_index)
        try:
            yield
        finally:
            state.restore()
            self.seconds.clear()
            self.seconds.update(seconds)

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Add the seconds spent within to `seconds[phase]`."""
        started = time.perf_counter()
        yield
        self.seconds[phase] += time.perf_counter() - started


def sampling_config(args: PPOConfig, base: SharedBase, tokenizer: PreTrainedTokenizerBase) -> GenerationConfig:
    """How completions are sampled: by `args` alone. Every EOS id that the model or the tokenizer names ends one."""
    settings: dict[str, Any] = {
        "max_new_tokens": args.max_completion_length,
        "do_sample": True,
        "temperature": args.temperature,
        "top_p": args.top_p,
        "top_k": args.top_k,
        "min_p": args.min_p,
        "repetition_penalty": args.repetition_penalty,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": eos_ids(base.causal_lm, tokenizer),
        "use_cache": True,
        **(args.generation_kwargs or {}),  # type: ignore[dict-item]
    }
    settings["eos_token_id"], settings["pad_token_id"] = as_ids(settings["eos_token_id"]), int(settings["pad_token_id"])
    return GenerationConfig(**settings)
