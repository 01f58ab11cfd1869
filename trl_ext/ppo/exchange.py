"""A part of a run exchanged for one that is known to be good, before training: the experiment that shows what is to
blame, as `trl_ext.diagnostics.try_remedies` makes it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from datasets import Dataset

from trl_ext.callbacks import DiagnosticsCallback
from trl_ext.generation import TransformersGenerator
from trl_ext.ppo.building import build_scorer
from trl_ext.ppo.checks import check_tokenizer
from trl_ext.ppo.stream import PromptStream
from trl_ext.tokens import tokenizer_beside, vocabulary_size


def score_by_yardstick(trainer: Any) -> bool:
    """Have the doctor's yardstick give the scores, alone."""
    callbacks = [one for one in trainer.callback_handler.callbacks if isinstance(one, DiagnosticsCallback)]
    yardsticks = [one.yardstick for one in callbacks if one.yardstick is not None]
    if yardsticks:
        scorer = build_scorer(yardsticks[:1], [None], trainer.args, trainer.accelerator.device)
        trainer.collector.score_by(scorer)
    return bool(yardsticks)


def train_on_held_out(trainer: Any) -> bool:
    """Train on the held-out prompts, over and over until they are as many as those in whose place they stand. They must
    fill a rollout."""
    rows, held_out, args = trainer.train_dataset, trainer.eval_dataset, trainer.args
    least = args.rollout_batch_size // args.num_generations
    if not isinstance(rows, Dataset) or not isinstance(held_out, Dataset) or len(held_out) < least:
        return False
    trainer.train_dataset = held_out.select([i % len(held_out) for i in range(len(rows))])
    return True


def answer_plainly(trainer: Any) -> bool:
    """Have the base itself answer, by Transformers' `generate`."""
    args, base = trainer.args, trainer.base
    if type(trainer.collector.generator) is TransformersGenerator or args.rollouts_ahead:
        return False
    base.check_generates()
    tell = bool(args.vllm_importance_sampling_correction)
    trainer.collector.generator = TransformersGenerator(base, args.local_rollout_forward_batch_size, tell)
    return True


def read_as_the_model_does(trainer: Any) -> bool:
    """Have the tokenizer and the chat template that lie beside the model's weights write prompts and the pretraining
    term's texts, and read completions."""
    base = trainer.base
    tokenizer = tokenizer_beside(base.causal_lm.config, trainer.processing_class)
    if tokenizer is None:
        return False
    rows = trainer.train_dataset
    rows = rows.first() if isinstance(rows, PromptStream) else rows
    try:
        check_tokenizer(tokenizer, rows, trainer.eval_dataset, vocabulary_size(base.config))
    except ValueError:
        return False
    trainer.processing_class = trainer.callback_handler.processing_class = tokenizer
    trainer.collector.write_by(tokenizer)
    if trainer.updater.pretrain_mix is not None:
        trainer.updater.pretrain_mix.tokenizer = tokenizer
    return True


# By the argument of PPOTrainer in whose place something stands; each takes a PPOTrainer, and returns whether there is
# such a thing here.
EXCHANGES: dict[str, Callable[[Any], bool]] = {
    "reward_funcs": score_by_yardstick,
    "train_dataset": train_on_held_out,
    "generator": answer_plainly,
    "processing_class": read_as_the_model_does,
}
