"""Round after round. Each stage makes what is not there yet, so the same command goes on with a loop that stopped."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import PreTrainedTokenizerBase
from trl import ModelConfig, get_quantization_config

from trl_ext import demo, launch, runs
from trl_ext.evaluation import Cast, Spec
from trl_ext.evaluation.sampling import check_columns
from trl_ext.loop import overview, stages
from trl_ext.loop.picking import NothingNew
from trl_ext.loop.raters import page
from trl_ext.loop.rounds import Round
from trl_ext.loop.settings import LoopArguments, check_record, ppo_config, record, reward_config
from trl_ext.ppo import PPOConfig
from trl_ext.ppo.building import args_of_gpu
from trl_ext.roles import SharedBase
from trl_ext.roles.adapters import Named

ROUND_OF_SEEDS = 1000  # rounds and seeds do not meet: round 2 of seed 1 draws nothing that round 1 of seed 2 draws

TRUTH = Spec("function", "trl_ext.demo.rate", function=demo.rate)  # about the embedded default


@dataclass(frozen=True)
class Circle:
    """What all rounds share.

    Attributes:
        script: the circle's own settings.
        args: PPO's; output_dir is the folder of the whole loop.
        model_args: the model and its LoRA.
        train: rows with `prompt` and what reward functions want, whose answers are judged and trained on.
        test: such rows, on which policies are compared.
    """

    script: LoopArguments
    args: PPOConfig
    model_args: ModelConfig
    train: Sequence[Mapping[str, Any]]
    test: Sequence[Mapping[str, Any]]

    @property
    def out(self) -> Path:
        return Path(str(self.args.output_dir))

    @cached_property
    def model(self) -> Named:
        """The model that everything lies on, and the adapter where one is named."""
        return launch.named_model(self.model_args)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.cast({"base": self.policy(Round(self.out, 0))}).tokenizer()

    @cached_property
    def rater(self) -> Spec | None:
        """Who judges, where it is no person."""
        named = self.script.rater
        if named in ("page", "file"):
            return None
        if named == "demo":
            return TRUTH
        kind = "reward" if named.startswith("reward:") else "function"
        return _imported(Spec(kind, named.removeprefix("reward:")))

    @cached_property
    def judge(self) -> Spec | None:
        """Who compares policies; None: the round's own reward model."""
        if self.script.judge is not None:
            return _imported(Spec.of(self.script.judge))
        return TRUTH if self.rater is None and self.script.dataset == "demo" else self.rater

    @property
    def loading(self) -> dict[str, Any]:
        """How a base is loaded, as `launch.load_shared_base` does."""
        how = {
            "quantization_config": get_quantization_config(self.model_args),
            "dtype": self.model_args.dtype,
            "attn_implementation": self.model_args.attn_implementation,
        }
        place = args_of_gpu(PartialState().device, quantized=how["quantization_config"] is not None)
        return place | {name: value for name, value in how.items() if value is not None}

    def seed(self, number: int) -> int:
        """Of a round: every stage begins with it, so that one which is begun again draws the same."""
        return self.args.seed * ROUND_OF_SEEDS + number

    def policy(self, round_: Round) -> Path | None:
        """The adapter that the round ended with; before the first, the named one, or None for the bare base."""
        return round_.ppo if round_.number else self.model.adapter

    def rewards(self, round_: Round) -> list[Path]:
        return round_.rewards(self.script.ensemble)

    def cast(self, policies: Mapping[str, Path | None], rewards: Sequence[Path] = ()) -> Cast:
        """Policies and reward models for sampling and comparing."""
        return Cast(self.model.base, policies, tuple(rewards))

    def shared_base(self, **roles: Any) -> SharedBase:
        """All roles for training, or for looking at what was trained."""
        base: SharedBase = launch.load_shared_base(
            self.model_args, trust_remote_code=self.args.trust_remote_code, **roles
        )
        return base

    def prompts_of(self, number: int) -> list[Mapping[str, Any]]:
        """The prompts that are answered in a round."""
        count = min(self.script.prompts or len(self.train), len(self.train))
        return random.Random(f"prompts {self.seed(number)}").sample(list(self.train), count)

    def check(self) -> None:
        """Refuse what would fail later, before anything is made.

        Raises:
            FileNotFoundError: there is no such reward adapter.
            ImportError: people are asked, and the page's packages are missing.
            TypeError: a function asks for a column that the prompts do not have.
            ValueError: settings contradict each other, or those that the folder was made with.
        """
        if runs.launched_as_one_of()[1] > 1:
            raise ValueError("The loop's stages run in one process each: start it by `python`, not on several GPUs.")
        for name in ("generation_kwargs", "top_k", "top_p", "min_p", "repetition_penalty"):
            if getattr(self.args, name) != (usual := type(self.args).__dataclass_fields__[name].default):
                raise ValueError(
                    f"{name} is {getattr(self.args, name)!r:.80}, and the loop samples what is rated and compared by "
                    f"temperature alone, so that others would be judged than PPO trains on: leave it at {usual!r}."
                )
        if self.args.chat_template_kwargs:
            raise ValueError(
                f"chat_template_kwargs is {self.args.chat_template_kwargs!r:.80}, which the loop's reward models are "
                "not trained with: write it into the tokenizer's chat template, and leave it out."
            )
        if self.args.push_to_hub:
            raise ValueError(
                "push_to_hub is set, and each round of the loop would push over the one before: leave it out, and push "
                "the last round's folder ppo."
            )
        if self.model_args.model_revision not in (None, "main"):
            raise ValueError(
                f"model_revision is {self.model_args.model_revision!r}, and the loop's sampling takes 'main': download "
                "that revision, and give its folder as model_name_or_path."
            )
        if self.script.patience is not None and self.judge is None:
            raise ValueError("patience goes by who wins against the round before, which a judge says: give --judge.")
        for spec, prompts in ((self.rater, self.train), (self.judge, self.test)):
            if spec is not None and spec.kind == "reward":
                self.cast({}).with_reward(spec.value)
            elif spec is not None and spec.kind == "function":
                check_columns(prompts, [spec.function])
        if self.script.rater == "page" or (self.judge is not None and self.judge.kind == "people"):
            page()
        reward_config(self.script, self.args, self.out / "reward", self.args.seed)
        ppo_config(self.args, self.out / "ppo", self.args.seed)
        settings = record(self.script, self.args, self.model_args, self.train, self.test, self._folders())
        self.out.mkdir(parents=True, exist_ok=True)
        check_record(self.out / "settings.json", settings)

    def _folders(self) -> dict[str, Path]:
        """What must stay as it is from round to round, where it lies on this machine."""
        judges = {"rater": self.rater, "judge": self.judge}
        named = {name: spec.value for name, spec in judges.items() if spec is not None and spec.kind == "reward"}
        every = {"model": self.model.base, "first policy": self.model.adapter, **named}
        return {name: Path(str(where)) for name, where in every.items() if where and Path(str(where)).is_dir()}


def _imported(spec: Spec) -> Spec:
    return replace(spec, function=launch.import_functions([spec.value])[0]) if spec.kind == "function" else spec


@dataclass(frozen=True)
class Outcome:
    """What a loop came to.

    Attributes:
        rows: a line for each round that is done, as `overview` has it.
        ended: why it ended, in a sentence.
        last: the last round that is done; None where the first found nothing to judge.
    """

    rows: list[dict[str, Any]]
    ended: str
    last: Round | None


def run(circle: Circle) -> Outcome:
    """Go round as often as the settings say, beginning where an earlier call stopped, and draw what came of it.

    Raises:
        Waiting: people have not judged yet what they are asked.
        RaterError: the rater is gone or makes no sense.
        ValueError: the folder was made with other settings, or is in use.
    """
    _claim = runs.claimed(circle.out)  # until this returns
    circle.check()
    rows: list[dict[str, Any]] = []
    ended = "All rounds are done."
    for number in range(1, circle.script.rounds + 1):
        round_ = Round(circle.out, number)
        round_.folder.mkdir(exist_ok=True)
        try:
            for stage in stages.ALL:
                stage(circle, round_)
        except NothingNew as reason:
            ended = f"Round {number} ends the loop, for {reason}"
            break
        rows.append(json.loads(round_.evaluation.read_text(encoding="utf-8"))["round"])
        overview.write(circle.out, rows)
        overview.show_round(rows[-1])
        patience = circle.script.patience
        if patience is not None and overview.idle(rows) >= patience:
            ended = f"The loop ends: {patience} rounds in a row did not win against the one before."
            break
    return Outcome(rows, ended, Round(circle.out, len(rows)) if rows else None)
