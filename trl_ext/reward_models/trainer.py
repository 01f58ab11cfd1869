"""Reward models from ratings, labels and rankings: TRL's RewardTrainer with another loss."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerBase
from transformers.trainer_utils import TrainOutput
from trl import RewardConfig, RewardTrainer

from trl_ext import hub, runs
from trl_ext.callbacks.progress import show_in_notebook
from trl_ext.core.probe import choose_penalty, fit_probe
from trl_ext.core.reward_losses import all_pairs_loss, binary_loss, plackett_luce_loss, regression_loss
from trl_ext.diagnostics import RunLog
from trl_ext.feedback.files import as_dataset
from trl_ext.reward_models.probing import probe_data, score_head
from trl_ext.reward_models.rows import answer_ids, check_written, checked_rows
from trl_ext.roles import adapters as files
from trl_ext.roles import sharing
from trl_ext.tokens import config_of

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RewardObjective:
    """What a reward model is trained on.

    Attributes:
        columns: that its rows need beside `prompt`.
        loss: of the scores (answers,) of a batch and its targets, weights and groups; None: TRL's own, on pairs.
    """

    columns: tuple[str, ...]
    loss: Callable[[Tensor, dict[str, Tensor]], Tensor] | None = None


PAIRS = ("chosen", "rejected")
REWARD_OBJECTIVES: dict[str, RewardObjective] = {
    "pairwise": RewardObjective(PAIRS),
    "regression": RewardObjective(
        ("completion", "rating"), lambda scores, batch: regression_loss(scores, batch["targets"], batch["weights"])
    ),
    "binary": RewardObjective(
        ("completion", "label"), lambda scores, batch: binary_loss(scores, batch["targets"], batch["weights"])
    ),
    "ranking": RewardObjective(
        ("completions", "ranks"), lambda scores, batch: plackett_luce_loss(scores, batch["targets"], batch["groups"])
    ),
    "all_pairs": RewardObjective(
        ("completions", "ranks"), lambda scores, batch: all_pairs_loss(scores, batch["targets"], batch["groups"])
    ),
    "probe": RewardObjective(PAIRS),
}


@dataclass
class FeedbackRewardConfig(hub.PickledWithoutSecrets, RewardConfig):
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
        if self.objective not in REWARD_OBJECTIVES:
            raise ValueError(f"objective is {self.objective!r}: choose one of {', '.join(REWARD_OBJECTIVES)}.")
        super().__post_init__()


def trained_further(start: files.Named, args: RewardConfig, quantization_config: Any | None) -> PeftModel:
    """A reward model over the base of an adapter, whose LoRA (and score head, where it has one) it starts from.

    Raises:
        ValueError: the adapter does not fit the base, or is not one that roles can share it with.
    """
    folder = files.check_folder(str(start.adapter), "reward")
    files.check_head_inside(folder)
    given: dict[str, Any] = {"dtype": "float32", **(args.model_init_kwargs or {}), "revision": start.revision or "main"}
    args.model_init_kwargs = None  # used here
    if quantization_config is not None:
        given |= {"quantization_config": quantization_config, "device_map": {"": args.device}}
    model = AutoModelForSequenceClassification.from_pretrained(
        start.base, num_labels=1, trust_remote_code=args.trust_remote_code, **given
    )
    state = load_file(folder / files.WEIGHTS)
    if other := [key for key in state if not (sharing.is_lora(key) or sharing.is_score(key))]:
        raise ValueError(f"The adapter in {str(folder)!r} holds {other[0]!r} too: merge it into its base first.")
    for name, tensor in model.score.state_dict().items():  # drawn anew where the adapter has none
        state.setdefault(files.SCORE + name, tensor)
    with files.fits(f"The adapter in {str(folder)!r}", start.base):
        peft_model = get_peft_model(model, files.as_sequence_classifier(files.read_lora_config(folder)))
        missing, unexpected = files.put_lora(peft_model, state, peft_model.active_adapter)
        if missing:
            raise ValueError(f"it lacks {missing[0]!r}")
        if unexpected:
            raise ValueError(f"it has no layer for {unexpected[0]!r}")
    return peft_model


class FeedbackRewardTrainer(hub.WritesCard, RewardTrainer):
    """TRL's RewardTrainer for every form of feedback; saving, PEFT, 4 bits and evaluation are TRL's.

    Rows have a `prompt` (text or messages) and, by objective: pairwise and probe `chosen`, `rejected` (`margin`);
    regression `completion`, `rating` (`weight`); binary `completion`, `label` (`weight`); ranking and all_pairs
    `completions`, `ranks`. `trl_ext.feedback` makes them of any form of feedback. Ratings are brought to mean 0 and
    standard deviation 1 of the training set, weights to mean 1.

    Args:
        model: a model's name or folder, or that of an adapter over one: a policy's, whose LoRA the reward model then
            starts from, or a reward model's, which is trained further.
        args: `FeedbackRewardConfig`.
        train_dataset, eval_dataset: rows as above; for evaluation a dict of several such too.
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
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        **kwargs: Any,
    ) -> None:
        self._claim = runs.claimed_by(args)
        hub.check_push(args)
        train_dataset = as_dataset(train_dataset, "train_dataset")
        self._datasets = hub.loaded_from(train_dataset)
        train_dataset = checked(train_dataset, "train_dataset", args.objective)
        if isinstance(eval_dataset, dict):
            eval_dataset = {name: checked(rows, name, args.objective) for name, rows in eval_dataset.items()}
        elif eval_dataset is not None:
            eval_dataset = checked(as_dataset(eval_dataset, "eval_dataset"), "eval_dataset", args.objective)
        evaluated = eval_dataset.values() if isinstance(eval_dataset, dict) else [eval_dataset]
        self._laid_out = [train_dataset, *evaluated]
        if isinstance(model, str):
            start = files.named(model, revision=(args.model_init_kwargs or {}).get("revision"))
            start.check_no_other(model, kwargs.get("peft_config"))
            if start.adapter is not None:
                model = trained_further(start, args, kwargs.pop("quantization_config", None))
                if processing_class is None:
                    processing_class = start.load_tokenizer(args.trust_remote_code)
        elif not isinstance(model, PeftModel) and any(isinstance(part, BaseTunerLayer) for part in model.modules()):
            raise ValueError(
                f"The {type(model).__name__} was loaded with an adapter, over which TRL would lay another: give the "
                "adapter's folder."
            )
        self._config = config_of(model, args.trust_remote_code)
        self._scale = Scale.of(train_dataset, args.objective)
        args.remove_unused_columns = False  # neither collator minds further columns
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            **kwargs,
        )
        show_in_notebook(self)
        if REWARD_OBJECTIVES[args.objective].loss is not None:
            self.data_collator: Any = _Collator(self.processing_class, args.pad_to_multiple_of)

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, dataset_name: str) -> Any:
        """Rows in ids, once TRL has put template and special tokens into the tokenizer; also rows for `evaluate`."""
        if not isinstance(dataset, Dataset) or is_in_ids(dataset):
            return super()._prepare_dataset(dataset, processing_class, args, dataset_name)
        name = f"{dataset_name}_dataset"
        if not any(dataset is known for known in self._laid_out):  # rows that `evaluate` was given
            dataset = checked(dataset, name, args.objective)
        check_written(dataset, name, processing_class, self._config, args.max_length)
        if REWARD_OBJECTIVES[args.objective].loss is None:
            rows = super()._prepare_dataset(dataset, processing_class, args, dataset_name)
            tell_left_out(len(dataset), len(rows), name, args.max_length)
        else:
            rows = encode(dataset, name, processing_class, args, self._scale)
        return _with_lengths(rows, args.length_column_name)

    def _send_telemetry(self) -> None:
        """Nothing: TRL's trainers report each run to the Hub."""

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """As TRL saves, with a note for the base that the role is put on."""
        super()._save(output_dir, state_dict)
        if not self.args.should_save:
            return
        folder = Path(output_dir or str(self.args.output_dir))
        files.write_note(folder, self.accelerator.unwrap_model(self.model))
        self.save_card(folder)

    def card_facts(self) -> tuple[str, RunLog, str, list[str]] | None:
        """See `hub.WritesCard`; a whole model has TRL's card."""
        model = self.accelerator.unwrap_model(self.model)
        if not isinstance(model, PeftModel):
            return None
        log = RunLog.of(self.state.log_history, self.args.to_dict())
        return "reward", log, model.get_base_model().config.name_or_path, self._datasets

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
        """The objective's loss, and of rankings `center_rewards_coefficient` times the mean squared score: nothing else
        holds theirs near 0, as ratings and labels do."""
        objective = REWARD_OBJECTIVES[self.args.objective]
        if objective.loss is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        outputs = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False)
        scores = outputs.logits.squeeze(-1).float()
        loss = objective.loss(scores, inputs)
        if self.args.center_rewards_coefficient is not None and "ranks" in objective.columns:
            loss = loss + self.args.center_rewards_coefficient * (scores**2).mean()
        logged = self._metrics["train" if model.training else "eval"]
        scores = scores.detach()
        # Processes may hold rankings of different lengths, so not the scores themselves are gathered.
        summary = torch.stack([scores.min(), scores.max(), scores.sum(), scores.new_tensor(float(len(scores)))])
        least, most, total, count = self.accelerator.gather(summary).view(-1, 4).unbind(dim=1)
        for name, value in (("min", least.min()), ("mean", total.sum() / count.sum()), ("max", most.max())):
            logged[f"{name}_reward"].append(value.item())
        return (loss, outputs) if return_outputs else loss


@dataclass(frozen=True)
class Scale:
    """What ratings and weights are brought to the scale of the training set by.

    Attributes:
        mean, std: of the ratings; 0 and 1 where there are none.
        weight: mean weight; 1 where there are none.
    """

    mean: float = 0.0
    std: float = 1.0
    weight: float = 1.0

    @classmethod
    def of(cls, dataset: Dataset, objective: str) -> Scale:
        """Of a training set.

        Raises:
            ValueError: all ratings, all labels, or all ranks of every ranking are the same; or all weights are 0.
        """
        column = REWARD_OBJECTIVES[objective].columns[-1]
        if is_in_ids(dataset):  # laid out by a trainer of this objective
            return cls()
        if column == "ranks" and all(len(set(ranks)) == 1 for ranks in dataset["ranks"]):
            raise ValueError("Every ranking is one tie: nothing can be learned from answers that are all alike.")
        if column not in ("rating", "label"):
            return cls()
        values = torch.tensor([float(value) for value in dataset[column]], dtype=torch.float64)
        if len(values.unique()) == 1:
            raise ValueError(f"Every {column} is {float(values[0]):g}: nothing can be learned from a constant.")
        mean, std = float(values.mean()), float(values.std())
        if not math.isfinite(mean) or not math.isfinite(std):
            raise ValueError(f"The ratings go from {float(values.min()):g} to {float(values.max()):g}: rescale them.")
        weights = dataset["weight"] if "weight" in dataset.column_names else [1.0]
        weight = fmean(1.0 if value is None else float(value) for value in weights)
        if weight <= 0:
            raise ValueError("Every weight is 0: nothing can be learned from answers that do not count.")
        return cls(mean, std, weight) if column == "rating" else cls(weight=weight)


def is_in_ids(dataset: Any) -> bool:
    """Whether the rows are tokenised already, by this trainer or by TRL's."""
    known = ("sequences", "chosen_ids", "chosen_input_ids")
    return any(column in (dataset.column_names or []) for column in known)


def checked(dataset: Any, name: str, objective: str) -> Any:
    """Rows of `objective` as `checked_rows` lays them out; rows in ids as they are."""
    if hasattr(dataset, "column_names"):
        if is_in_ids(dataset):
            return dataset
        if dataset.column_names is not None:
            check_columns(dataset, name, objective)
    return checked_rows(dataset, name, REWARD_OBJECTIVES[objective].columns)


def tell_left_out(before: int, after: int, name: str, max_length: int | None) -> None:
    """Say how many rows `max_length` leaves out.

    Raises:
        ValueError: all.
    """
    if not after:
        raise ValueError(f"Every row of {name} is longer than max_length {max_length}: raise it.")
    if after < before:
        lost = before - after
        logger.warning("%d rows of %s are longer than max_length %s and left out.", lost, name, max_length)


def check_columns(dataset: Dataset, name: str, objective: str) -> None:
    """Refuse rows that lack a column of `objective`.

    Raises:
        ValueError: says which.
    """
    columns = REWARD_OBJECTIVES[objective].columns
    missing = [column for column in columns if column not in dataset.column_names]
    if missing:
        raise ValueError(
            f"{name} has no {' and no '.join(map(repr, missing))} column, only {dataset.column_names}: the objective "
            f"{objective!r} needs {', '.join(columns)} (see trl_ext.feedback)."
        )


def encode(
    dataset: Dataset, name: str, tokenizer: PreTrainedTokenizerBase, args: FeedbackRewardConfig, scale: Scale
) -> Dataset:
    """Rows of ids: `sequences` (lists of ids), `targets` and `weights` with one number a sequence.

    The columns chosen_ids and rejected_ids, both the longest sequence, are what TRL knows tokenised rows by.

    Raises:
        ValueError: every row is longer than `max_length`.
    """
    columns = REWARD_OBJECTIVES[args.objective].columns
    rows: list[dict[str, Any]] = []
    for row in dataset:
        completions = row["completions"] if "completions" in columns else [row["completion"]]
        sequences = [answer_ids(tokenizer, row, completion) for completion in completions]
        if "ranks" in columns:
            targets = [float(rank) for rank in row["ranks"]]
        elif "label" in columns:
            targets = [float(row["label"])]
        else:
            targets = [(float(row["rating"]) - scale.mean) / scale.std]
        longest = max(sequences, key=len)
        weight = row.get("weight")
        weights = [(1.0 if weight is None else float(weight)) / scale.weight] * len(sequences)
        ids = {"sequences": sequences, "chosen_ids": longest, "rejected_ids": longest}
        rows.append(ids | {"targets": targets, "weights": weights})
    fitting = [row for row in rows if args.max_length is None or len(row["chosen_ids"]) <= args.max_length]
    tell_left_out(len(rows), len(fitting), name, args.max_length)
    return Dataset.from_list(fitting)


def _with_lengths(rows: Dataset, name: str) -> Dataset:
    """The rows with their longest sequence's tokens, by which `train_sampling_strategy: group_by_length` goes."""
    if not isinstance(rows, Dataset) or name in rows.column_names:
        return rows
    pairs = zip(rows["chosen_ids"], rows["rejected_ids"], strict=True)
    return rows.add_column(name, [max(len(chosen), len(rejected)) for chosen, rejected in pairs])


class _Collator:
    """Rows of sequences to one batch, right-padded with the pad token, by which Transformers finds a row's end."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, multiple: int | None = None) -> None:
        self._tokenizer, self._multiple = tokenizer, multiple or 1

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        sequences = [ids for row in rows for ids in row["sequences"]]
        width = -(-max(map(len, sequences)) // self._multiple) * self._multiple
        fill = self._tokenizer.pad_token_id
        fill = fill if fill is not None else self._tokenizer.eos_token_id
        return {
            "input_ids": torch.tensor([ids + [fill] * (width - len(ids)) for ids in sequences]),
            "attention_mask": torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids in sequences]),
            "targets": torch.tensor([target for row in rows for target in row["targets"]]),
            "weights": torch.tensor([weight for row in rows for weight in row["weights"]]),
            "groups": torch.tensor([i for i, row in enumerate(rows) for _ in row["sequences"]]),
        }
