"""Reward models from ratings, labels and rankings: TRL's RewardTrainer with another loss."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.trainer_utils import TrainOutput
from trl import RewardConfig, RewardTrainer

from trl_ext.core.probe import choose_penalty, fit_probe
from trl_ext.core.reward_losses import all_pairs_loss, binary_loss, plackett_luce_loss, regression_loss
from trl_ext.trainers.probing import probe_data, score_head

logger = logging.getLogger(__name__)

# objective -> columns that its rows need
COLUMNS: dict[str, tuple[str, ...]] = {
    "pairwise": ("chosen", "rejected"),
    "regression": ("completion", "rating"),
    "binary": ("completion", "label"),
    "ranking": ("completions", "ranks"),
    "all_pairs": ("completions", "ranks"),
    "probe": ("chosen", "rejected"),
}
ON_PAIRS = ("pairwise", "probe")  # TRL's own rows and loss
LOSSES: dict[str, Callable[[Tensor, dict[str, Tensor]], Tensor]] = {
    "regression": lambda scores, given: regression_loss(scores, given["targets"], given["weights"]),
    "binary": lambda scores, given: binary_loss(scores, given["targets"], given["weights"]),
    "ranking": lambda scores, given: plackett_luce_loss(scores, given["targets"], given["groups"]),
    "all_pairs": lambda scores, given: all_pairs_loss(scores, given["targets"], given["groups"]),
}


@dataclass
class FeedbackRewardConfig(RewardConfig):
    """TRL's RewardConfig and the objective."""

    objective: str = field(
        default="pairwise",
        metadata={
            "help": "'pairwise' (TRL's own), 'regression' on ratings, 'binary' on good and bad, 'ranking' "
            "(Plackett-Luce), 'all_pairs' of a ranking (InstructGPT), or 'probe': pairwise by the score head alone, "
            "solved exactly over the frozen base."
        },
    )

    def __post_init__(self) -> None:
        if self.objective not in COLUMNS:
            raise ValueError(f"objective is {self.objective!r}: choose one of {', '.join(COLUMNS)}.")
        super().__post_init__()


class FeedbackRewardTrainer(RewardTrainer):
    """TRL's RewardTrainer for every form of feedback; saving, PEFT, 4 bits and evaluation are TRL's.

    Rows have a `prompt` (text or messages) and, by objective: pairwise and probe `chosen`, `rejected` (`margin`);
    regression `completion`, `rating` (`weight`); binary `completion`, `label` (`weight`); ranking and all_pairs
    `completions`, `ranks`. `trl_ext.feedback` makes them of any form of feedback. Ratings are brought to mean 0 and
    standard deviation 1 of the training set.

    Args:
        model: a model's name or folder.
        args: `FeedbackRewardConfig`.
        train_dataset, eval_dataset: rows as above.
        processing_class: the tokenizer; None: the model's.
        **kwargs: further arguments of TRL's RewardTrainer (peft_config, quantization_config, callbacks, ...).

    Raises:
        ValueError: a column is missing, nothing is left under `max_length`, or the feedback is constant.
    """

    def __init__(
        self,
        model: Any,
        args: FeedbackRewardConfig,
        train_dataset: Dataset,
        eval_dataset: Dataset | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        **kwargs: Any,
    ) -> None:
        if args.objective not in ON_PAIRS:
            if processing_class is None:
                name = model if isinstance(model, str) else model.config.name_or_path
                processing_class = AutoTokenizer.from_pretrained(name)
            scale = _scale(train_dataset, args.objective)
            train_dataset = encode(train_dataset, "train_dataset", processing_class, args, scale)
            if eval_dataset is not None:
                eval_dataset = encode(eval_dataset, "eval_dataset", processing_class, args, scale)
            kwargs["data_collator"] = _Collator(processing_class)
        args.remove_unused_columns = False  # neither collator minds further columns
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            **kwargs,
        )
        self.train_dataset: Any = _with_lengths(self.train_dataset, args.length_column_name)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As TRL trains; the probe reads the training set once and solves for its head."""
        if self.args.objective != "probe":
            return super().train(*args, **kwargs)
        self.model.eval()
        data = probe_data(self.model, self.train_dataset)
        penalty = choose_penalty(data.features, data.pairs, data.margins)
        weights = fit_probe(data.differences, data.margins, penalty)
        (head,) = [weight for weight in score_head(self.model).parameters() if weight.requires_grad]
        with torch.no_grad():
            head.copy_(weights.unsqueeze(0))
        gaps = data.differences @ weights
        metrics = {
            "train_loss": float(-torch.nn.functional.logsigmoid(gaps - data.margins).mean()),
            "train_accuracy": float((gaps > 0).double().mean()),
            "penalty": penalty,
        }
        self.state.global_step = 1
        self.log(dict(metrics))
        return TrainOutput(1, metrics["train_loss"], metrics)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The objective's loss, and `center_rewards_coefficient` times the mean squared score."""
        objective = self.args.objective
        if objective in ON_PAIRS:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        outputs = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False)
        scores = outputs.logits.squeeze(-1).float()
        loss = LOSSES[objective](scores, inputs)
        if self.args.center_rewards_coefficient is not None and objective in ("ranking", "all_pairs"):
            loss = loss + self.args.center_rewards_coefficient * (scores**2).mean()
        logged = self._metrics["train" if model.training else "eval"]
        gathered = self.accelerator.gather(scores.detach())
        for name, value in (("min", gathered.min()), ("mean", gathered.mean()), ("max", gathered.max())):
            logged[f"{name}_reward"].append(value.item())
        return (loss, outputs) if return_outputs else loss


def encode(
    dataset: Dataset,
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    args: FeedbackRewardConfig,
    scale: tuple[float, float],
) -> Dataset:
    """Rows of ids: `sequences` (lists of ids), `targets` and `weights` with one number a sequence.

    The columns chosen_ids and rejected_ids, both the longest sequence, are what TRL knows tokenised rows by.

    Raises:
        ValueError: a column is missing, or every row is longer than `max_length`.
    """
    missing = [column for column in COLUMNS[args.objective] if column not in dataset.column_names]
    if missing:
        raise ValueError(
            f"{name} has no {' and no '.join(map(repr, missing))} column, only {dataset.column_names}: the objective "
            f"{args.objective!r} needs {', '.join(COLUMNS[args.objective])} (see trl_ext.feedback)."
        )
    mean, std = scale
    rows: list[dict[str, Any]] = []
    for row in dataset:
        answers = row["completions"] if "completions" in COLUMNS[args.objective] else [row["completion"]]
        sequences = [sequence_ids(tokenizer, row.get("prompt", ""), answer) for answer in answers]
        if args.objective in ("ranking", "all_pairs"):
            targets = [float(rank) for rank in row["ranks"]]
        elif args.objective == "binary":
            targets = [float(row["label"])]
        else:
            targets = [(float(row["rating"]) - mean) / std]
        longest = max(sequences, key=len)
        weight = row.get("weight")
        weights = [1.0 if weight is None else float(weight)] * len(sequences)
        ids = {"sequences": sequences, "chosen_ids": longest, "rejected_ids": longest}
        rows.append(ids | {"targets": targets, "weights": weights})
    kept = [row for row in rows if args.max_length is None or len(row["chosen_ids"]) <= args.max_length]
    if not kept:
        raise ValueError(f"Every row of {name} is longer than max_length {args.max_length}: raise it.")
    if len(kept) < len(rows):
        lost = len(rows) - len(kept)
        logger.warning("%d rows of %s are longer than max_length %s and left out.", lost, name, args.max_length)
    return Dataset.from_list(kept)


def _with_lengths(rows: Dataset, name: str) -> Dataset:
    """The rows with their longest sequence's tokens, by which `train_sampling_strategy: group_by_length` goes."""
    if not isinstance(rows, Dataset) or name in rows.column_names:
        return rows
    pairs = zip(rows["chosen_ids"], rows["rejected_ids"], strict=True)
    return rows.add_column(name, [max(len(chosen), len(rejected)) for chosen, rejected in pairs])


def _scale(dataset: Dataset, objective: str) -> tuple[float, float]:
    """Mean and standard deviation of the ratings; (0, 1) where there are none.

    Raises:
        ValueError: all ratings, all labels, or all ranks of every ranking are the same.
    """
    column = {"regression": "rating", "binary": "label"}.get(objective, "ranks")
    if column not in dataset.column_names:
        return 0.0, 1.0
    if column == "ranks":
        if all(len(set(ranks)) == 1 for ranks in dataset["ranks"]):
            raise ValueError("Every ranking is one tie: nothing can be learned from answers that are all alike.")
        return 0.0, 1.0
    values = torch.tensor([float(value) for value in dataset[column]], dtype=torch.float64)
    if len(values.unique()) == 1:
        raise ValueError(f"Every {column} is {float(values[0]):g}: nothing can be learned from a constant.")
    return (float(values.mean()), float(values.std())) if column == "rating" else (0.0, 1.0)


def sequence_ids(tokenizer: PreTrainedTokenizerBase, prompt: Any, answer: Any) -> list[int]:
    """As TRL's RewardTrainer tokenises: the chat template, or the text with an EOS at its end."""
    if isinstance(answer, str):
        text = (prompt or "") + answer
        text = text if text.endswith(tokenizer.eos_token) else text + tokenizer.eos_token
        return list(tokenizer(text)["input_ids"])
    chat = [*(prompt or []), *answer]
    return list(tokenizer.apply_chat_template(chat, tokenize=True, return_dict=True)["input_ids"])


class _Collator:
    """Rows of sequences to one batch, right-padded with the pad token, by which Transformers finds a row's end."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        sequences = [torch.tensor(ids) for row in rows for ids in row["sequences"]]
        pad = torch.nn.utils.rnn.pad_sequence
        fill = self._tokenizer.pad_token_id
        fill = fill if fill is not None else self._tokenizer.eos_token_id
        return {
            "input_ids": pad(sequences, batch_first=True, padding_value=fill),
            "attention_mask": pad([torch.ones_like(ids) for ids in sequences], batch_first=True),
            "targets": torch.tensor([target for row in rows for target in row["targets"]]),
            "weights": torch.tensor([weight for row in rows for weight in row["weights"]]),
            "groups": torch.tensor([i for i, row in enumerate(rows) for _ in row["sequences"]]),
        }
