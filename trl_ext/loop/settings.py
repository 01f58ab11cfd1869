"""Settings of the circle beside PPO's and the model's, and the note of what a folder was made with."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from transformers import TrainingArguments
from trl import ModelConfig

from trl_ext.evaluation import WAYS, Spec
from trl_ext.evaluation.policies import fingerprint
from trl_ext.evaluation.sampling import refuse_others
from trl_ext.launch.ensembles import RewardArguments
from trl_ext.ppo import PPOConfig
from trl_ext.rating import MODES
from trl_ext.reward_models import FeedbackRewardConfig
from trl_ext.runs import write_whole

OBJECTIVES = {"stars": "regression", "pairs": "pairwise", "ranking": "ranking", "labels": "binary"}
# What may differ when a loop is gone on with: how far it goes, and what is seen of it.
FREE = ("rounds", "patience", "port", "browser", "on_error", "read_as")
SEEN = (
    *("output_dir", "log", "report", "disable_tqdm", "save", "run_name"),
    *("project", "trackio", "hub", "push", "resume"),
)
SAME_PLACE = ("use_cpu", "dataloader_pin_memory", "bf16", "fp16", "report_to", "disable_tqdm", "gradient_checkpointing")


@dataclass
class LoopArguments(RewardArguments):
    """What recipes/rlhf_loop.py needs beside PPOConfig and TRL's ModelConfig. `dataset` has the prompts."""

    rounds: int = field(default=4, metadata={"help": "How often to go round."})
    ratings: int = field(default=300, metadata={"help": "Most judgements a round."})
    rater: str = field(
        default="demo",
        metadata={
            "help": "Who judges: 'demo' (the truth of the embedded default), 'page' (people, in a browser), 'file' "
            "(feedback.jsonl that you put into the round's folder), 'reward:FOLDER', or a function by dotted path."
        },
    )
    mode: str = field(
        default="stars", metadata={"help": f"What is asked of an answer or of several: {', '.join(MODES)}."}
    )
    per_prompt: int = field(default=4, metadata={"help": "Answers to a prompt, among which those to judge are picked."})
    prompts: int | None = field(default=None, metadata={"help": "Prompts that are answered a round; None: all."})
    pick: str = field(default="random", metadata={"help": f"What is worth judging: {', '.join(WAYS)}."})
    reward: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Settings of the reward model's training (FeedbackRewardConfig), as JSON."}
    )
    reward_from: str = field(
        default="new", metadata={"help": "The reward model of each round: 'new', or trained further from the 'last'."}
    )
    value: str = field(default="adapter", metadata={"help": "The value role of the first round: 'adapter' or 'head'."})
    reference: str = field(
        default="first", metadata={"help": "The reference: the 'first' policy throughout, or each round's 'last' one."}
    )
    judge: str | None = field(
        default=None,
        metadata={
            "help": "Who compares policies: people (on the page), reward:FOLDER, function:PATH, url:MODEL@URL. None: "
            "the rater; where people rate, the round's reward model."
        },
    )
    comparisons: int = field(default=40, metadata={"help": "Of judge 'people': most pairs a round."})
    held_out: int | None = field(
        default=None, metadata={"help": "Prompts on which policies are compared, of those held out; None: all."}
    )
    patience: int | None = field(
        default=None, metadata={"help": "End after so many rounds in a row that do not win against the one before."}
    )
    port: int = field(default=8765, metadata={"help": "Of the page; 0 takes a free one."})
    browser: bool = field(default=True, metadata={"help": "Open the page in the browser of this machine."})

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("rounds", "ratings", "per_prompt", "prompts", "held_out", "patience", "comparisons"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} is {value}: give at least 1.")
        choices = {"mode": (*MODES,), "pick": WAYS, "reward_from": ("new", "last"), "reference": ("first", "last")}
        for name, known in {**choices, "value": ("adapter", "head")}.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is {getattr(self, name)!r}: choose one of {', '.join(known)}.")
        if self.rater == "demo" and self.dataset != "demo":
            raise ValueError(
                f"rater 'demo' knows the truth about the embedded default only, not about {self.dataset!r}: give "
                "--rater page, file, reward:FOLDER or a dotted path."
            )
        if self.rater not in ("demo", "page", "file") and not ("." in self.rater or self.rater.startswith("reward:")):
            raise ValueError(
                f"rater is {self.rater!r}: give demo, page, file, reward:FOLDER or a function's dotted path."
            )
        self._check_pick()
        asked = self.judge is not None and Spec.of(self.judge).kind == "people"
        if not asked and self.comparisons != type(self).comparisons:
            raise ValueError(f"comparisons is {self.comparisons}, but only judge 'people' reads it: leave it out.")
        if isinstance(self.reward, str):
            try:
                self.reward = json.loads(self.reward)
            except ValueError as error:
                raise ValueError(f"reward is {self.reward!r:.80}, which is no JSON: {error}.") from error
        if not isinstance(self.reward, dict | None):
            raise ValueError(f"reward is {self.reward!r:.80}: give settings of FeedbackRewardConfig, as JSON or YAML.")

    def _check_pick(self) -> None:
        if self.pick == "disagreement" and self.ensemble < 2:
            raise ValueError("pick is 'disagreement', which several reward models have: set ensemble to 2 or more.")
        if self.pick == "closeness" and self.mode != "pairs":
            raise ValueError("pick is 'closeness', which pairs of answers have: set mode to pairs.")
        if self.mode == "ranking" and self.pick != "random":
            raise ValueError(f"pick is {self.pick!r}, but a ranking has all answers to a prompt: leave it at random.")
        if self.mode in ("pairs", "ranking") and self.per_prompt < 2:
            raise ValueError(f"mode {self.mode!r} compares answers to one prompt: set per_prompt to 2 or more.")


def reward_config(script: LoopArguments, args: PPOConfig, folder: Path, seed: int) -> FeedbackRewardConfig:
    """The settings of a reward model's training: what `reward` says, and where that says nothing, what of PPO's is
    about the machine.

    Raises:
        ValueError, TypeError: a setting is unknown or wrong.
    """
    given: dict[str, Any] = {
        **{name: getattr(args, name) for name in SAME_PLACE},
        **{"objective": OBJECTIVES[script.mode], "save_strategy": "no"},
        **(script.reward if isinstance(script.reward, dict) else {}),
    }
    known = FeedbackRewardConfig.__dataclass_fields__
    if unknown := sorted(given.keys() - known.keys()):
        raise ValueError(f"reward has the setting {unknown[0]!r}, which FeedbackRewardConfig does not have.")
    config: Any = FeedbackRewardConfig(**{**given, "output_dir": str(folder), "seed": seed})
    config.recipe = _recipe(args, "reward", reward=script.reward or {})
    return cast(FeedbackRewardConfig, config)


def ppo_config(args: PPOConfig, folder: Path, seed: int) -> PPOConfig:
    """PPO's settings for one round."""
    own: Any = copy.copy(args)
    own.output_dir, own.seed, own.recipe = str(folder), seed, _recipe(args, "ppo")
    return cast(PPOConfig, own)


def _recipe(args: PPOConfig, stage: str, **settings: Any) -> dict[str, Any] | None:
    """What run.json says of the recipe, by which `trl-ext doctor --try` makes the stage's trainer anew; None where no
    recipe was called.

    Args:
        stage: "reward", whose settings lie under that name, or "ppo".
        settings: in the form in which changes can be laid over them.
    """
    recipe = getattr(args, "recipe", None)
    return None if recipe is None else {**recipe, "settings": {**recipe["settings"], **settings}, "stage": stage}


def record(
    script: LoopArguments,
    args: PPOConfig,
    model_args: ModelConfig,
    train: Sequence[Mapping[str, Any]],
    test: Any,
    folders: Mapping[str, Path],
) -> dict[str, Any]:
    """All by which the end of a loop is decided, in what JSON can hold.

    Args:
        folders: of models and adapters, by what they are to the loop: they may be trained further in their place.
    """
    of_ppo = {name: value for name, value in _shown(args).items() if not name.startswith(SEEN)}
    of_loop = {name: value for name, value in vars(script).items() if name not in FREE}
    made_with = {
        **of_ppo,
        **vars(model_args),
        **of_loop,
        "train_prompts": _digest(train),
        "test_prompts": _digest(test),
        **{f"files of the {name}": fingerprint(folder) for name, folder in folders.items()},
    }
    plain: dict[str, Any] = json.loads(json.dumps(made_with, default=str, sort_keys=True))
    return plain


def check_record(file: Path, settings: Mapping[str, Any]) -> None:
    """Write down what a new folder is made with, and refuse to go on in one that was made with something else.

    Raises:
        ValueError: names the first setting that differs.
    """
    if not file.exists():
        write_whole(file, json.dumps(settings, indent=2, sort_keys=True) + "\n")
        return
    refuse_others(file.parent, json.loads(file.read_text(encoding="utf-8")), settings, "another output_dir")


def _shown(args: TrainingArguments) -> dict[str, Any]:
    shown: dict[str, Any] = args.to_dict()
    return shown


def _digest(rows: Sequence[Mapping[str, Any]]) -> str:
    text = json.dumps([dict(row) for row in rows], sort_keys=True, default=str)
    return f"{len(rows)} with digest {hashlib.sha256(text.encode()).hexdigest()[:16]}"
