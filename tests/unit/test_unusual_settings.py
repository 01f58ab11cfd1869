"""Settings far from the usual: suspected where they can be the cause, and only there."""

import math
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.unit.test_diagnostics import CONFIG, HEALTHY, SICK, rows
from trl_ext import PPOConfig
from trl_ext.diagnostics import Limits, RunLog, diagnose, roots
from trl_ext.diagnostics.remedies import MOVES
from trl_ext.diagnostics.settings import RANGES, Range, doubts

STILL = {**HEALTHY, "objective/scores": 0.1}
RUN = {**CONFIG, "max_steps": 160, "num_ppo_epochs": 4, "num_mini_batches": 2, "lora_r": 16, "lora_alpha": 32}
SIDES = [
    pytest.param(one, end, id=f"{one.setting}-{end}")
    for one in RANGES
    for end in ("below", "above")
    if getattr(one, end)
]


def beyond(one: Range, end: str) -> Any:
    """A value of the setting that lies beyond an end of its range."""
    far = one.low / 100 if end == "below" else 100 * max(one.high, 1e-6)
    if one.setting == "lora_alpha":
        return far * RUN["lora_r"]
    return far * RUN["max_steps"] if one.value is not None else far


def log_with(metrics: dict[str, Any], **settings: Any) -> RunLog:
    return RunLog.of(rows(**metrics), {**RUN, **settings})


def named(log: RunLog) -> list[str]:
    """The settings that are suspected."""
    found = [one for one in diagnose(log) if one.name == "unusual_settings"]
    return [name.removeprefix("times_off/") for one in found for name in one.figures]


@pytest.mark.parametrize(("one", "end"), SIDES)
def test_each_is_suspected_where_it_can_be_the_cause(one: Range, end: str) -> None:
    if one.setting == "gradient_accumulation_steps":
        settings: dict[str, Any] = {"rollout_batch_size": 2}
    elif one.setting in ("total_episodes", "max_steps"):
        settings = {one.setting: 64, "max_steps": 8}
    elif one.unit.startswith("optimizer steps"):
        settings = {"num_ppo_epochs": 1, "max_steps": 2}
    else:
        settings = {one.setting: beyond(one, end)}
    side = getattr(one, end)
    assert set(side.makes) <= set(MOVES), "of the catalogue"
    (doubt,) = [doubt for doubt in doubts(log_with(STILL, **settings), Limits()) if doubt.setting == one.setting]
    assert doubt.far > 1 and one.setting in doubt.text and doubt.side is side


def test_a_prompt_that_opens_no_answer_is_told_of_the_first_rollout() -> None:
    kwargs = {"chat_template_kwargs": {"add_generation_prompt": False}}
    for metrics in (STILL, {**STILL, "completions/clipped_ratio": 0.9}):
        first = diagnose(log_with(metrics, **kwargs))[0]
        assert first.name == "unusual_settings" and "add_generation_prompt False" in first.evidence
    assert named(log_with(STILL, chat_template_kwargs={"enable_thinking": False})) == []


def test_rollouts_are_counted_where_a_run_has_ppos() -> None:
    few = RunLog.of(rows(**STILL), {**RUN, "max_steps": 16})
    assert [doubt.setting for doubt in doubts(few, Limits())] == ["max_steps"]
    assert doubts(replace(few, kind="online"), Limits()) == []


def test_rs_lora_scales_by_the_root_of_the_rank() -> None:
    large = {**HEALTHY, "policy/clipfrac_avg": 0.6}
    adapter = {"lora_r": 64, "lora_alpha": 128}
    assert named(log_with(large, **adapter)) == []
    assert named(log_with(large, **adapter, lora_rslora=True)) == ["lora_alpha"]


def test_a_setting_that_makes_what_is_found_is_its_cause() -> None:
    (top, *others) = roots(diagnose(log_with(STILL, adam_epsilon=1.0)))
    assert top.finding.name == "unusual_settings" and top.finding.remedy.changes == {"adam_epsilon": 1e-5}
    assert "adam_epsilon is 1, and the usual is 0 to 0.0001" in top.finding.evidence
    assert [one.finding.name for one in top][1:] == ["no_progress"] and not others
    assert "denominator" in top.follows[0].because.mechanism and "Kingma" in top.follows[0].because.source


def test_the_cause_is_as_severe_as_what_it_makes() -> None:
    for metrics, severity in ((STILL, "warning"), ({**HEALTHY, "policy/clipfrac_avg": 0.6}, "problem")):
        first = diagnose(log_with(metrics, cliprange=20.0))[0]
        assert (first.name, first.severity) == ("unusual_settings", severity)


def test_several_are_named_the_farthest_first() -> None:
    found = named(log_with(STILL, adam_epsilon=1.0, weight_decay=0.2, lam=0.9))
    assert found == ["adam_epsilon", "weight_decay"]


def test_what_is_off_by_orders_of_magnitude_is_told_at_once_and_until_the_score_rises() -> None:
    first = RunLog.of(rows(**STILL)[:1], {**RUN, "adam_epsilon": 1.0, "weight_decay": 0.2})
    (found,) = diagnose(first)
    assert found.severity == "warning" and found.remedy.changes == {"adam_epsilon": 1e-5} and not found.explains
    assert named(log_with(HEALTHY, adam_epsilon=1.0)) == []
    before = RunLog("ppo", [], config={**RUN, "adam_epsilon": 1.0, "generation_kwargs": {"min_new_tokens": 8}})
    (found,) = diagnose(before)
    assert found.remedy.changes == {"adam_epsilon": 1e-5, "generation_kwargs": None}
    assert "before the first step" in str(found)
    assert diagnose(RunLog("ppo", [], config=RUN)) == diagnose(RunLog("dpo", [], config=before.config)) == []


@pytest.mark.parametrize(
    ("settings", "suspected"),
    [
        ({"top_p": 0.5}, ["top_p"]),
        ({"top_p": 0.95, "top_k": 50, "min_p": 0.01, "repetition_penalty": 1.05}, []),
        ({"top_k": 1, "min_p": 0.3, "repetition_penalty": 1.5}, ["top_k", "min_p", "repetition_penalty"]),
        ({"generation_kwargs": {"num_beams": 4, "use_cache": True}}, ["generation_kwargs"]),
        ({"generation_kwargs": {"no_repeat_ngram_size": 1}}, ["generation_kwargs"]),
        ({"generation_kwargs": {"use_cache": True, "num_beams": 1, "min_new_tokens": 0, "bad_words_ids": None}}, []),
        ({"kl_coef": 0.5}, []),  # nobody knows before the scores' spread is
    ],
)
def test_settings_that_cannot_be_meant_are_told_before_the_first_rollout(
    settings: dict[str, Any], suspected: list[str]
) -> None:
    found = diagnose(RunLog("ppo", [], config={**RUN, **settings}))
    assert [one.removeprefix("times_off/") for finding in found for one in finding.figures] == suspected


RECIPES = [path for path in (Path(__file__).parents[2] / "recipes").rglob("*.yaml") if "kl_coef" in path.read_text()]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_no_recipe_begins_with_a_warning(path: Path, tmp_path: Path) -> None:
    known = {field.name for field in fields(PPOConfig)}
    settings = {name: value for name, value in yaml.safe_load(path.read_text()).items() if name in known}
    config = PPOConfig(**{**settings, "output_dir": str(tmp_path), "use_cpu": True, "bf16": False}).to_dict()
    for given in ({}, config):
        assert diagnose(RunLog("ppo", [], config={"rollout_batch_size": 64, "steps_of_run": 400, **given})) == []


def test_what_was_there_before_a_step_is_blamed_on_sampling_alone() -> None:
    cut = {**HEALTHY, "completions/clipped_ratio": 0.9}
    assert named(log_with(cut, learning_rate=1.0)) == []
    assert named(log_with(cut, temperature=5.0)) == ["temperature"]
    later = {**HEALTHY, "completions/clipped_ratio": lambda t: 0.9 * min(1.0, 4 * t)}
    assert named(log_with(later, learning_rate=1.0)) == ["learning_rate"]


def test_a_setting_that_stands_far_down_in_the_report_is_told_at_its_head() -> None:
    """Three roots, the last of which says to lower the learning rate; the first two say nothing of it."""
    wild = {
        **HEALTHY,
        "completions/repetition": lambda t: 0.7 * t,
        "completions/distinct": lambda t: 0.7 - 0.65 * min(1.0, 2 * t),
        "loss/value_avg": lambda t: 0.5 * math.exp(5 * t),
    }
    found = diagnose(log_with(wild, learning_rate=0.1))
    assert next(one for one in found if one.name == "value_loss_explodes").remedy.changes == {"learning_rate": 1e-3}
    assert roots(found)[0].finding.name == "unusual_settings" and named(log_with(wild, learning_rate=0.1))
    drowned = {**HEALTHY, "objective/kl": 0.001, "objective/kl_coef": 10.0, "objective/scores": 0.1}
    assert named(log_with({**drowned, "val/explained_variance": 0.0}, kl_coef=10.0)) == [], "the first root says it"


def test_what_is_told_once_is_told_again_with_another_setting() -> None:
    one, both = (
        diagnose(RunLog("ppo", [], config={**RUN, **more}))[0].topic
        for more in ({"adam_epsilon": 1.0}, {"adam_epsilon": 1.0, "learning_rate": 1.0})
    )
    assert (one, both) == ("unusual_settings adam_epsilon", "unusual_settings adam_epsilon learning_rate")


def test_a_penalty_is_measured_by_the_scores_spread() -> None:
    assert named(RunLog.of(rows(**STILL)[:1], {**RUN, "kl_coef": 0.05})) == []
    far = {**STILL, "objective/kl_coef": 20.0}
    assert named(RunLog.of(rows(**far)[:1], {**RUN, "kl_coef": 20.0})) == ["kl_coef"]


@pytest.mark.parametrize(("setting", "value", "far"), [("gamma", 0.5, 10.0), ("max_ratio", 1.001, 50.0)])
def test_what_lies_near_1_is_measured_from_there(setting: str, value: float, far: float) -> None:
    (found,) = doubts(RunLog("ppo", [], config={**RUN, setting: value}), Limits())
    assert found.far == pytest.approx(far)


def test_an_unusual_setting_that_works_is_none_of_the_doctor_s_business() -> None:
    assert diagnose(log_with(HEALTHY, adam_epsilon=1.0)) == []


def test_a_setting_is_not_blamed_for_what_something_else_explains() -> None:
    noise = {**STILL, "evidence/noise/judge": 0.9}
    assert [top.finding.name for top in roots(diagnose(log_with(noise, adam_epsilon=4e-4)))] == ["score_not_repeatable"]
    assert named(log_with({**HEALTHY, "completions/clipped_ratio": 0.9}, adam_epsilon=1.0)) == [], "it cuts nothing off"


def test_a_setting_that_the_log_acquits_is_not_blamed() -> None:
    assert named(log_with(STILL, max_ratio=1.001)) == ["max_ratio"]
    assert named(log_with({**STILL, "policy/skipped_minibatches": 0.0}, max_ratio=1.001)) == []
    assert named(log_with(STILL, max_grad_norm=1e-3)) == ["max_grad_norm"]
    assert named(log_with({**STILL, "grad_norm": 1e-4}, max_grad_norm=1e-3)) == [], "none is as large"
    small = {**STILL, **SICK["steps_too_small"], "grad_norm": 3.0, "grad_norm/policy": 3.0}
    assert named(log_with(small, max_grad_norm=0.0)) == [], "which clips nothing, as papers have it"
    assert named(log_with({**STILL, "grad_norm/policy": 200.0}, adam_epsilon=1e-3, max_grad_norm=0.0)) == []
    assert named(log_with({**STILL, "grad_norm/policy": 200.0}, adam_epsilon=1e-3, max_grad_norm=1.0)) == [
        "adam_epsilon"
    ]


def test_a_share_of_the_run_is_known_whatever_the_run_s_length_was_given_as() -> None:
    assert named(log_with(STILL, warmup_steps=0.9)) == ["warmup_steps"], "below 1 it is a share"
    assert named(log_with(STILL, warmup_steps=0.1)) == []
    epochs = {"max_steps": -1, "num_train_epochs": 3.0}
    assert named(log_with(STILL, value_warmup_rollouts=10, **epochs)) == [], "of who knows how many"
    assert named(log_with(STILL, value_warmup_rollouts=10, **epochs, steps_of_run=160)) == ["value_warmup_rollouts"]


def test_a_setting_that_another_finding_names_is_named_once() -> None:
    drowned = {"objective/kl": 0.001, "objective/kl_coef": 10.0, "objective/scores": 0.1}
    log = log_with({**HEALTHY, **drowned}, kl_coef=10.0, reward_weights=[0.01])
    assert named(log) == ["reward_weights"]


def test_weights_that_kl_coef_does_not_suit() -> None:
    away = {"objective/kl": lambda t: 7 * t, "objective/kl_coef": 0.05}
    assert named(log_with({**HEALTHY, **away}, kl_coef=0.05, reward_weights=[100.0])) == ["reward_weights"]
    suits = {**away, "objective/kl_coef": 0.4}
    assert named(log_with({**HEALTHY, **suits}, kl_coef=0.4, reward_weights=[100.0])) == [], "it suits them"


@pytest.mark.parametrize(
    ("settings", "blamed"),
    [
        ({"reward_weights": [-1.0]}, True),
        ({"reward_weights": [1.0]}, False),
        ({"reward_clip_range": [-0.1, 0.1]}, True),  # a standard deviation is 1
        ({"reward_clip_range": [-3.0, 3.0]}, False),
        ({"optim": "sgd"}, True),
        ({"optim": "paged_adamw_8bit"}, False),
        ({"whiten_advantages": False}, True),
    ],
)
def test_choices_that_are_no_numbers(settings: dict[str, Any], blamed: bool) -> None:
    assert named(log_with(STILL, **settings)) == (list(settings)[:1] if blamed else [])


@pytest.mark.parametrize(("alike", "blamed"), [(0.95, True), (0.1, False)])
def test_a_clip_range_that_leaves_out_the_mean_is_blamed_where_scores_are_cut(alike: float, blamed: bool) -> None:
    """Of few scores that dwarf all others the mean lies outside, too, and most of what is left differs."""
    log = log_with(
        {**STILL, "objective/scores_alike": alike}, reward_clip_range=[2.0, 10.0], score_normalization="reference"
    )
    assert named(log) == ["reward_clip_range"] * blamed


def test_what_is_proposed_is_a_setting_and_usual(tmp_path: Path) -> None:
    known = {field.name for field in fields(PPOConfig)}
    for one in RANGES:
        assert one.setting in known or one.setting == "lora_alpha"
        if one.instead is not None and one.value is None:
            assert one.low <= one.instead <= one.high
            objective = {"objective": "kl_penalty"} if one.setting.startswith("penalty") else {}
            reference = {"score_normalization": "reference"} if one.setting == "normalization_samples" else {}
            PPOConfig(str(tmp_path), use_cpu=True, **{**objective, **reference, one.setting: one.instead})


def test_our_own_settings_are_usual(tmp_path: Path) -> None:
    recipe = yaml.safe_load((Path(__file__).parents[2] / "recipes" / "ppo_lora.yaml").read_text(encoding="utf-8"))
    for given in ({}, {name: value for name, value in recipe.items() if name in {f.name for f in fields(PPOConfig)}}):
        args = PPOConfig(**{**given, "output_dir": str(tmp_path), "use_cpu": True})
        log = RunLog.of(rows(**STILL), {**args.to_dict(), "rollout_batch_size": args.rollout_batch_size})
        assert doubts(log, Limits()) == []


@pytest.mark.parametrize(
    ("given", "steps", "changes"),
    [
        ({"num_ppo_epochs": 1, "num_mini_batches": 4, "objective": "clip"}, 24, {"num_ppo_epochs": 4}),
        ({"num_ppo_epochs": 1, "objective": "reinforce", "total_episodes": 640}, 10, {"total_episodes": 2560}),
        ({"num_ppo_epochs": 1, "objective": "Mine", "max_steps": 10}, 10, {"max_steps": 40}),
        ({"num_ppo_epochs": 4, "num_mini_batches": 2, "total_episodes": 256}, 32, {"total_episodes": 512}),
        ({"num_ppo_epochs": 4, "max_steps": 12}, 12, {"max_steps": 48}),
        ({"num_ppo_epochs": 4, "num_train_epochs": 3.0}, 12, {"num_train_epochs": 12}),
        ({"num_ppo_epochs": 4, "num_mini_batches": 2}, 40, None),
    ],
)
def test_a_run_of_few_steps_is_told_once_before_it_begins_and_when_it_has_learned(
    given: dict[str, Any], steps: int, changes: dict[str, int] | None
) -> None:
    known = {"rollout_batch_size": 64, "per_device_train_batch_size": 64, "steps_of_run": steps, **given}
    for rows_ in ([], log_with({}).rows):
        found = [one for one in diagnose(RunLog("ppo", rows_, config={**known})) if one.name == "unusual_settings"]
        assert [one.remedy.changes for one in found] == ([changes] if changes else [])
        assert all(f"{steps} optimizer steps in all" in one.evidence and ";" not in one.evidence for one in found)
        assert all(one.severity == "warning" for one in found)


@pytest.mark.parametrize(("objective", "changes"), [("clip", {"num_ppo_epochs": 4}), ("reinforce", {}), ("Mine", {})])
def test_epochs_are_proposed_where_the_objective_takes_them(objective: str, changes: dict[str, int]) -> None:
    given = {"objective": objective, "num_ppo_epochs": 1, "num_mini_batches": 4, "max_steps": -1, "steps_of_run": 64}
    (found,) = [one for one in diagnose(log_with(STILL, **given)) if one.name == "unusual_settings"]
    assert "num_ppo_epochs is 1, which makes 64 optimizer steps" in found.evidence and found.remedy.changes == changes


def test_an_end_that_is_an_ordinary_word_is_told_at_once() -> None:
    given = {"generation_kwargs": {"eos_token_id": [1, 271]}, "stop_words": [" capital"]}
    (found,) = [
        one for one in diagnose(RunLog("ppo", [], config={**CONFIG, **given})) if one.name == "unusual_settings"
    ]
    assert "ends at ' capital', which is an ordinary word" in found.evidence and found.remedy.changes == {
        "generation_kwargs": None
    }
    assert not diagnose(RunLog("ppo", [], config={**CONFIG, **given, "stop_words": []}))
    given["generation_kwargs"]["num_beams"] = 4  # two of one setting are told once
    (found,) = diagnose(RunLog("ppo", [], config={**CONFIG, **given}))
    assert found.title == "generation_kwargs is far from the usual" and "num_beams" in found.evidence


PAGE = Path(__file__).parents[2] / "docs" / "diagnostics" / "unusual_settings.md"
START, END = "<!-- ranges: begin -->", "<!-- ranges: end -->"


def table() -> str:
    """The ranges as the page shows them."""
    lines = ["| setting | usual | what a value beyond it does (source of the setting) |", "|---|---|---|"]
    for one in RANGES:
        unit = f" {one.unit}" if one.unit else ""
        usual = f"at least {one.low:g}" if one.high == float("inf") else f"{one.low:g} to {one.high:g}"
        told = [f"{end}: {side.why}" for end in ("below", "above") if (side := getattr(one, end)) is not None]
        lines.append(f"| `{one.setting}` | {usual}{unit} | {'; '.join(told)} ({one.source}) |")
    return "\n".join(lines)


def test_the_page_lists_the_ranges() -> None:
    """`python -m tests.unit.test_unusual_settings` writes them."""
    assert PAGE.read_text(encoding="utf-8").split(START)[1].split(END)[0].strip() == table()


if __name__ == "__main__":
    before, rest = PAGE.read_text(encoding="utf-8").split(START)
    PAGE.write_text(f"{before}{START}\n{table()}\n{END}{rest.split(END)[1]}", encoding="utf-8")
