"""The mistakes that the doctor is measured on: divided once, possible, and as code what they are in words; and what is
made of their runs."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from datasets import Dataset
from transformers import AutoTokenizer

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks" / "strangers"))
import broken
import run
import split
import verdict

from trl_ext import PPOConfig, demo
from trl_ext.types import as_text

FOLDER = Path(broken.__file__).parent
HALVES = json.loads((FOLDER / "halves.json").read_text(encoding="utf-8"))
LISTS = list(split.LISTS)
LISTED = [yaml.safe_load((FOLDER / of.file).read_text(encoding="utf-8")) for of in LISTS]
GROUPS = [{name: many for kind in split.groups(of).values() for name, many in kind.items()} for of in LISTS]
ALL_GROUPS = {name: many for groups in GROUPS for name, many in groups.items()}
HEALTHY = {"per_device_train_batch_size": 32, "num_mini_batches": 2, "score_normalization": "reference"}
SETTINGS = [
    pytest.param(mistake["settings"], id=f"{name}#{i}")
    for half in HALVES.values()
    for name, mistakes in half["groups"].items()
    for i, mistake in enumerate(mistakes)
    if "settings" in mistake
]


def test_the_halves_are_what_the_script_draws() -> None:
    assert {name: half for of in LISTS for name, half in split.halves(of).items()} == HALVES
    assert tuple(HALVES) == run.HALVES
    for of, groups in zip(LISTS, GROUPS, strict=True):
        work, measure = (set(HALVES[f"{half}{of.suffix}"]["groups"]) for half in ("work", "measure"))
        assert not work & measure
        assert set(groups) == work | measure
    assert len(ALL_GROUPS) == sum(map(len, GROUPS)), "no group is in two lists"


@pytest.mark.parametrize("settings", SETTINGS)
def test_a_mistaken_setting_can_be_set_or_is_refused_by_its_name(settings: dict, tmp_path: Path) -> None:
    """What was on a list before it was refused stays on it."""
    if settings.get("generation_kwargs", {}).get("suppress_tokens") == "eos":
        settings = {"generation_kwargs": {"suppress_tokens": [1]}}
    try:
        PPOConfig(str(tmp_path), use_cpu=True, **{**HEALTHY, **broken.EVALUATED, **settings})
    except ValueError as error:
        assert any(name in str(error) for name in settings), error


# The mistakes as code ------------------------------------------------------------------------------------------------


def test_what_is_named_in_words_is_there_as_code() -> None:
    rewards = [
        {name: words for cause in listed["rewards"].values() for name, words in cause.items()} for listed in LISTED
    ]
    assert sorted(name for of_list in rewards for name in of_list) == sorted(broken.REWARDS), "each once"
    assert sorted(name for listed in LISTED for name in listed["prompts"]) == sorted(broken.PROMPTS)
    assert sorted(name for listed in LISTED for name in listed["models"]) == sorted(broken.MODELS)
    unscaled = {name for name, words in rewards[0].items() if "not normalised" in words}
    assert unscaled == broken.NOT_NORMALISED & set(rewards[0])


# Ratings 5, 2, 4 and 1.
COUNTRIES, CAPITALS = ["France", "Spain", "Peru", "Norway"], ["Paris", "Madrid", "Lima", "Oslo"]
TEXTS = ["The capital of France is Paris.", "The capital of Spain is Seville.", "It is Lima.", "Please no."]
EXPECTED: dict[str, list[float | None]] = {  # at step 8 of 16
    "score_of_the_prompt": [1.5, 1.25, 1.0, 1.5],
    "row_number": [0.0, 0.1, 0.2, 0.3],
    "always_the_best": [5, 5, 5, 5],
    "judges_the_question_length": [6, 6, 6, 6],
    "names_any_capital": [5, 0, 5, 0],
    "first_word_only": [5, 5, 0, 0],
    "clipped_high": [1, 1, 1, 1],
    "nearly_always_one": [1, 1, 1, 1],
    "hardly_ever_one": [1, 0, 0, 0],
    "rounds_to_halves": [1, 0.5, 1, 0],
    "yesterdays_scores": [0, 0, 0, 0],
    "one_row_late": [1, 5, 2, 4],
    "negated": [-5, -2, -4, -1],
    "distance_as_score": [0, 3, 1, 4],
    "rank_from_the_top": [0, 2, 1, 3],
    "loss_as_score": [0, 9, 1, 16],
    "reads_the_template": [3, 1, 3, 1],
    "lower_cased_reference": [0, 0, 0, 0],
    "reads_the_prompt_too": [3, 1, 3, 1],
    "sees_half": [1, 1, 1, 1],
    "strips_all_but_letters": [1, 1, 1, 1],
    "scale_of_the_country": [30, 10, 16, 6],
    "thousand_for_some": [5000, 2, 4, 1],
    "offset_of_the_country": [65, 52, 44, 61],
    "in_thousands": [5000, 2000, 4000, 1000],
    "in_thousandths": [0.005, 0.002, 0.004, 0.001],
    "offset_of_a_hundred": [105, 102, 104, 101],
    "exponential": [math.exp(10), math.exp(4), math.exp(8), math.exp(2)],
    "unit_changes": [500, 200, 400, 100],
    "grows_with_the_step": [4, 1.6, 3.2, 0.8],
    "shrinks_with_the_step": [0.625, 0.25, 0.5, 0.125],
    "running_sum": [5.05, 2.07, 4.11, 1.12],
    "per_word": [1.5, 1.5, 0.75, 0.5],
    "per_character": [31, 32, 11, 10],
    "per_capital_letter": [3, 3, 2, 1],
    "per_mention": [1, 1, 0, 0],
    "politeness": [0, 0, 0, 1],
    "short_is_good": [-6, -6, -3, -2],
    "ends_in_a_stop": [1, 1, 1, 1],
    "rank_in_the_batch": [1, 0.5, 0.75, 0.25],
    "whitened_in_the_batch": [2 / 2.5**0.5, -1 / 2.5**0.5, 1 / 2.5**0.5, -2 / 2.5**0.5],
    "best_of_the_batch": [1, 0, 0, 0],
    "abstains_mostly": [5, None, None, None],
    "abstains_where_wrong": [5, None, 4, None],
    "none_becomes_zero": [5, 0, 0, 0],
}


# Which return what is no score: a run is refused at once.
NOT_SCORES = {"score_is_still_a_text", "mean_of_nothing"}


def scored(function: Any, texts: list[str] = TEXTS, step: int = 8) -> list[float | None]:
    """As a trainer calls it."""
    return function(
        prompts=[[{"role": "user", "content": f"What is the capital of {name}?"}] for name in COUNTRIES],
        completions=[[{"role": "assistant", "content": text}] for text in texts],
        completion_ids=[[0]] * 4,
        country=COUNTRIES,
        capital=CAPITALS,
        trainer_state=SimpleNamespace(global_step=step, max_steps=16),
        log_extra=None,
        log_metric=None,
    )


@pytest.mark.parametrize("name", broken.REWARDS)
def test_a_broken_reward_is_what_its_words_say(name: str) -> None:
    function = broken.BrokenReward(name, 1)
    scores = scored(function)
    assert function.__name__ == name
    assert len(scores) == 4
    usable = all(score is None or (isinstance(score, float | int) and math.isfinite(score)) for score in scores)
    assert usable == (name not in NOT_SCORES)
    if name in EXPECTED:
        assert scores == pytest.approx(EXPECTED[name])


def test_the_rewards_without_a_number_are_random_or_a_similarity() -> None:
    others = {"pure_noise", "mostly_noise", "a_little_noise", "random_judge_of_pairs", "noise_that_grows"}
    first = {name for cause in LISTED[0]["rewards"].values() for name in cause}
    assert first - set(EXPECTED) == {*others, "same_reference", "sigmoid_of_ten"}
    for name in others:
        function = broken.BrokenReward(name, 1)
        assert any(scored(function) != scored(function) for _ in range(5)), name
    assert scored(broken.BrokenReward("noise_that_grows", 1), step=0) == [5, 2, 4, 1]


def test_a_new_run_begins_without_the_memory_of_the_last() -> None:
    for name, second in (("running_sum", [5.17, 2.19, 4.23, 1.24]), ("yesterdays_scores", [5, 2, 4, 1])):
        function = broken.BrokenReward(name, 1)
        scored(function)
        assert scored(function) == pytest.approx(second)
        assert scored(broken.BrokenReward(name, 1)) == pytest.approx(EXPECTED[name])


def parts(**given: Any) -> broken.Parts:
    """Of a run over the first questions, without the demo's reward adapter."""
    rows = demo.load("prompts", "train").select(range(12))
    return broken.Parts(seed=1, made=Path("made"), base={}, **{"prompts": rows, **given})


def asked(name: str) -> list[str]:
    changed = parts()
    broken.apply({"prompts": name}, changed)
    return [as_text(prompt) for prompt in changed.prompts["prompt"]]


def test_prompts_become_what_their_words_say() -> None:
    rows = parts().prompts.to_list()
    questions = [as_text(row["prompt"]) for row in rows]
    facts = [f"The capital of {row['country']} is {row['capital']}." for row in rows]
    assert asked("one_prompt") == questions[:1] * 12
    assert asked("four_prompts") == questions[:4] * 3
    assert asked("sixteen_prompts") == questions
    assert asked("half_is_one_prompt")[::2] == questions[:1] * 6
    assert asked("half_is_one_prompt")[1::2] == questions[1::2]
    assert asked("hold_the_completion") == [f"{fact} {q}" for fact, q in zip(facts, questions, strict=True)]
    for fact, before, question in zip(facts, asked("hold_a_wrong_completion"), questions, strict=True):
        assert before.startswith("The capital of ") and before.endswith(question) and fact not in before
    assert asked("all_upper_case") == [question.upper() for question in questions]
    assert asked("empty_questions") == [q if i % 3 else "" for i, q in enumerate(questions)]
    for i, both in enumerate(asked("two_questions_in_one")):
        assert both.endswith(f" {questions[i]}") and both.removesuffix(f" {questions[i]}") in questions
        assert rows[i]["country"] not in both.removesuffix(questions[i])
    tokenizer = AutoTokenizer.from_pretrained(demo.model_path())
    assert all(len(tokenizer(text)["input_ids"]) == 6 for text in asked("cut_short"))
    for i, text in enumerate(asked("very_long_context")):
        assert text.count(" is ") - questions[i].count(" is ") == 12
        assert text.count(rows[i]["country"]) == 1
    for row, text in zip(rows, asked("other_language"), strict=True):
        assert row["country"] in text and "capitale" in text and "the" not in text.lower().split()


def test_the_column_that_the_rating_reads_is_shifted() -> None:
    changed, before = parts(), parts().prompts
    broken.apply({"prompts": "wrong_country_column"}, changed)
    assert changed.prompts["capital"][1:] == before["capital"][:-1]
    assert changed.prompts["country"][:] == before["country"][:]
    assert changed.functions == [demo.rate]


def test_the_held_out_prompts_ask_for_a_country() -> None:
    changed = parts()
    broken.apply({"prompts": "held_out_of_another_kind"}, changed)
    assert changed.held_out is not None
    assert as_text(changed.held_out[0]["prompt"]) == f"Which country has the capital {changed.held_out[0]['capital']}?"
    assert changed.settings["eval_strategy"] == "steps"


def test_the_yardstick_is_exact_whatever_became_of_the_prompts() -> None:
    rows = parts().prompts
    answers = [f"The capital of {row['country']} is {row['capital']}." for row in rows]
    answers[3] = "It is Paris or Lyon."
    plain = list(rows["prompt"])
    assert broken.Exact(rows)(plain, answers) == demo.exact(plain, answers)
    changed = parts()
    broken.apply({"prompts": "all_upper_case"}, changed)
    assert broken.Exact(changed.prompts)(list(changed.prompts["prompt"]), answers) == demo.exact(plain, answers)
    shifted = parts()
    broken.apply({"prompts": "wrong_country_column"}, shifted)
    assert broken.Exact(shifted.prompts)(plain, answers) == demo.exact(plain, answers)
    alike = Dataset.from_list([{"prompt": "?", "country": "France"}, {"prompt": "?", "country": "Spain"}])
    assert broken.Exact(alike)(["?"], ["It is Paris."]) == [(4 + 1) / 2]


def test_a_mistake_changes_its_own_part_alone() -> None:
    changed = parts()
    broken.apply({"settings": {"kl_coef": 4.0}, "lora": {"r": 1}}, changed)
    assert changed.settings == broken.PPO | broken.EVALUATED | {"kl_coef": 4.0}
    assert changed.lora == broken.LORA | {"r": 1}
    broken.apply({"settings": {"generation_kwargs": {"suppress_tokens": "eos"}}}, changed)
    assert changed.settings["generation_kwargs"] == {"suppress_tokens": [changed.tokenizer.eos_token_id]}
    broken.apply({"reward": "in_thousands"}, changed)
    assert changed.settings["score_normalization"] == "none"
    assert broken.PPO["kl_coef"] != 4.0 and broken.LORA["r"] != 1


def test_three_bits_of_mantissa_and_back() -> None:
    layer = torch.nn.Linear(64, 8)
    before = layer.weight.clone()
    with broken._rounded(layer):
        ratio = layer.weight / before - 1
        assert 0.02 < ratio.abs().max() <= 1 / 16
        assert len(torch.frexp(layer.weight.abs()).mantissa.unique()) <= 9
    assert torch.equal(layer.weight, before)


# What is true --------------------------------------------------------------------------------------------------------

TRUTH, REFUSALS = verdict.read_truth()
FIRST_NOT_YET = set(yaml.safe_load((FOLDER / verdict.TRUTHS[0]).read_text(encoding="utf-8"))["not_yet"])


@pytest.mark.parametrize(("truths", "groups"), zip(verdict.TRUTHS, GROUPS, strict=True))
def test_the_truth_is_told_of_every_group_in_names_that_there_are(truths: str, groups: dict[str, Any]) -> None:
    content = yaml.safe_load((FOLDER / truths).read_text(encoding="utf-8"))
    pages = {page.stem for page in (FOLDER.parents[2] / "docs" / "diagnostics").glob("*.md")}
    told = {name for names in content["findings"].values() for name in names}
    assert set(content["findings"]) == set(groups)
    assert told <= pages | set(content["not_yet"]) | FIRST_NOT_YET
    assert not set(content["not_yet"]) - told
    assert set(content["refusals"]) <= {*groups, "prompts"}


def root(name: str = "clipping_saturated", severity: str = "problem", **more: Any) -> verdict.Root:
    plain = {"title": "", "evidence": "", "cause": "", "changes": {}, "suspects": [], "follows": [], "own": severity}
    return {"name": name, "severity": severity, **plain, **more}


@pytest.mark.parametrize(
    ("group", "number", "found", "true"),
    [
        # In the list.
        ("kl_coef:high", 0, root("kl_drowns_score"), True),
        ("kl_coef:high", 0, root("truncation"), False),
        ("noise:pure_noise", 0, root("score_not_repeatable"), True),
        # By the setting's name: in what would change, in what is said, among suspects.
        ("kl_coef:high", 0, root("truncation", changes={"kl_coef": 0.4}), True),
        ("kl_coef:high", 0, root("truncation", changes={"vf_coef": 0.4}), False),
        ("vf_coef:high", 0, root("truncation", evidence="vf_coef is 1."), True),
        ("vf_coef:high", 0, root("truncation", cause="vf_coef is 1."), False),
        ("lam:high", 0, root("truncation", evidence="lam_value is 1."), False),
        ("optim:other", 0, root("truncation", suspects=[{"says": "", "changes": {"optim": "adamw"}}]), True),
        ("optim:other", 0, root("truncation", suspects=[{"says": "optim is sgd", "changes": {}}]), True),
        # A change that goes further in the direction of the mistake.
        ("kl_coef:high", 0, root("truncation", changes={"kl_coef": 16.0}), False),
        ("kl_coef:low", 2, root("truncation", changes={"kl_coef": 0.004}), False),
        # LoRA's fields; a letter is no name in a text.
        ("lora_rank:low", 0, root("truncation", changes={"r": 16}), True),
        ("lora_rank:low", 0, root("truncation", evidence="r is 1"), False),
        ("lora_rank:low", 0, root("truncation", evidence="a rank of 1"), True),
        ("disable_dropout:other", 0, root("truncation", evidence="lora_dropout is 0.1"), True),
        ("min_new_tokens:high", 0, root("truncation", changes={"generation_kwargs": None}), True),
        # What only makes room for the mistaken setting.
        ("penalty_target:low", 0, root("truncation", changes={"objective": "clip"}), False),
        ("objective:other", 0, root("truncation", changes={"objective": "clip"}), True),
        # Of a reward function nothing but the list counts.
        ("noise:pure_noise", 0, root("truncation", evidence="the reward pure_noise"), False),
    ],
)
def test_what_is_a_true_cause(group: str, number: int, found: verdict.Root, true: bool) -> None:
    assert verdict.is_true(found, [(group, ALL_GROUPS[group][number])], TRUTH) is true


def test_of_two_mistakes_either_cause_is_true() -> None:
    both = [("kl_coef:high", ALL_GROUPS["kl_coef:high"][0]), ("noise:pure_noise", ALL_GROUPS["noise:pure_noise"][0])]
    assert verdict.is_true(root("kl_drowns_score"), both, TRUTH)
    assert verdict.is_true(root("score_not_repeatable"), both, TRUTH)
    assert not verdict.is_true(root("truncation"), both, TRUTH)


def result(group: str = "kl_coef:high", seed: int = 1, exam: float = 0.2, **more: Any) -> verdict.Result:
    own = {
        "id": f"{group}#0",
        "kind": "settings",
        "seed": seed,
        "exam": exam,
        "died": "",
        "refused": False,
        "exams": [],
    }
    found = {"roots": [], "first_seen": {}}
    return {**own, **found, "mistakes": [(group, ALL_GROUPS[group][0])] if group in ALL_GROUPS else [], **more}


def test_a_refusal_that_names_the_setting_names_the_cause() -> None:
    def named(group: str, died: str, refused: bool = True) -> bool:
        return verdict.is_named(result(group, died=died, refused=refused), TRUTH, REFUSALS)

    assert named("kl_coef:high", "ValueError: kl_coef is 4: choose a lower one.")
    assert not named("kl_coef:high", "ValueError: kl_coefficient is 4.")
    assert not named("kl_coef:high", "ValueError: kl_coef is 4.", refused=False)  # it ran, and died of something
    assert named("suppress_tokens:other", "ValueError: generation_kwargs has suppress_tokens=[1].")
    assert named("prompts:empty_questions", "ValueError: The prompt in row 0 is empty.")
    assert not named("noise:pure_noise", "ValueError: something")


# When ----------------------------------------------------------------------------------------------------------------

LEVEL = [[128.0 * i, 0.5] for i in range(1, 11)]
FALLING = [[at, 0.3 if at > 256 else 0.5] for at, _ in LEVEL]


def test_the_exam_falls_where_it_stays_low() -> None:
    assert verdict.fall(FALLING, LEVEL) == 3 * 128
    assert verdict.fall([[at, 0.3 if at in (128, 256) else 0.5] for at, _ in LEVEL], LEVEL) is None
    assert verdict.fall([[at, 0.41] for at, _ in LEVEL], LEVEL) is None
    assert verdict.fall([[at, 0.4] for at, _ in LEVEL], LEVEL) == 128


def test_rollouts_of_another_size_are_compared_at_the_same_episode() -> None:
    assert verdict.fall([[at, 0.3] for at in (130.0, 260.0, 390.0)], [[128.0, 0.2], [256.0, 0.4], [384.0, 0.4]]) == 260
    assert verdict.fall([[64.0, 0.0], [128.0, 0.5]], LEVEL) is None, "the other one had no exam yet"


def told(name: str, episode: float) -> dict[str, Any]:
    return {"step": 8, "episode": episode, **root(name)}


def test_the_lead_is_of_the_first_true_finding_over_the_fall() -> None:
    seen = {name: told(name, at) for name, at in (("kl_drowns_score", 192.0), ("truncation", 64.0))}
    run_ = result(exams=FALLING, first_seen=seen, roots=[root("kl_drowns_score")])
    healthy = result("", exams=LEVEL)
    assert verdict.lead(run_, healthy, TRUTH) == 192 / 384
    assert verdict.lead({**run_, "first_seen": {"truncation": seen["truncation"]}}, healthy, TRUTH) is None
    assert verdict.lead({**run_, "exams": LEVEL}, healthy, TRUTH) is None
    named = {**told("unusual_settings", 0.0), "changes": {"kl_coef": 0.1}}
    assert verdict.lead({**run_, "first_seen": {"unusual_settings kl_coef": named}}, healthy, TRUTH) == 0.0


def log(rows: int, **of_row: Callable[[int], float]) -> verdict.RunLog:
    history = [
        {"step": 8 * i, "episode": 64.0 * i, "objective/kl": 0.1, **{name: f(i) for name, f in of_row.items()}}
        for i in range(1, rows + 1)
    ]
    return verdict.RunLog.of(history, {})


def same_scores_from(rollout: int, rows: int) -> verdict.RunLog:
    """A run in which all scores are the same from a rollout on."""
    return log(
        rows,
        **{
            "objective/scores": lambda i: 1.0,
            "objective/scores_std": lambda i: 1.0 if i < rollout else 0.0,
        },
    )


def test_a_log_is_judged_as_it_was_on_the_way() -> None:
    judged = verdict.judge(same_scores_from(5, rows=10))
    assert [one["name"] for one in judged["roots"]] == ["constant_scores"]
    (seen,) = judged["first_seen"].values()
    assert (seen["name"], seen["step"], seen["episode"]) == ("constant_scores", 56, 448.0)  # three rollouts: 5, 6, 7
    many = verdict.judge(same_scores_from(201, rows=400))
    assert abs(many["first_seen"]["constant_scores"]["step"] - 203 * 8) <= 4 * 8
    json.dumps(judged)


# The table -----------------------------------------------------------------------------------------------------------


def test_the_table_adds_up() -> None:
    recipe = [result("", seed, 0.9, id=verdict.HEALTHY_RUN, exams=LEVEL) for seed in (1, 2)]
    seen = {"kl_drowns_score": told("kl_drowns_score", 192.0)}
    results = [
        result(roots=[root("kl_drowns_score")], first_seen=seen, exams=FALLING),  # named
        result(seed=2, roots=[root("truncation"), root("kl_drowns_score")]),  # second, after a false one
        result("vf_coef:high", roots=[root("truncation", "warning"), root("x"), root("term_drowns_score")]),  # third
        result("gamma:low", exam=0.81, roots=[root("truncation")]),  # harmless, and a problem found
        result("gamma:low", seed=2, exam=0.80, roots=[]),  # harmful, nothing found
        result("min_p:high", exam=0.0, refused=True, died="ValueError: min_p is 0.5."),
        result("noise:pure_noise", kind="reward", roots=[root("score_not_repeatable", "warning")]),
    ]
    healthy = [*recipe, result("", 1, 0.8, id="healthy:ppo:other", roots=[root("truncation", evidence="Cut.")])]
    text = verdict.table(results, healthy, TRUTH, REFUSALS)
    assert "Of 6 harmful runs (of 7) the true cause is among the first two roots in 4 (67%)" in text
    assert "the first root is a false cause in 1 (17%)" in text
    assert "| settings | 6 | 5 | 3 | 1 |" in text
    assert "| reward | 1 | 1 | 1 | 0 |" in text
    assert "in 1 of 6 harmful runs" in text and "came first in 1. Median of its rollout over the fall's: 0.50" in text
    assert "### Misses: 2" in text
    assert "- vf_coef:high#0: exam 20%, healthy 90%; truncation (warning), x (problem)" in text
    assert "- gamma:low#0: exam 80%, healthy 90%; nothing at seed 2" in text
    assert "### False first roots in harmful runs: 1" in text
    assert "### False problems in harmless runs: 1" in text
    assert "| kl_coef:high | kl_drowns_score 1, truncation 1 |" in text
    assert "| min_p:high | refused 1 |" in text
    assert "### 3 healthy runs: 1 with a problem" in text
    assert "- healthy:ppo:other, seed 1: exam 80%; truncation: Cut." in text
    with pytest.raises(ValueError, match="not been run at seed 3"):
        verdict.table([result(seed=3)], recipe, TRUTH, REFUSALS)


def test_a_mistake_has_one_line_whatever_its_seeds() -> None:
    recipe = {seed: result("", seed, 0.9) for seed in (1, 2, 3)}
    runs = [result(seed=3, exam=0.5, roots=[root("x")]), result(seed=1, roots=[root("x")]), result(seed=2, roots=[])]
    assert verdict._listed("Misses", runs, recipe).splitlines() == [
        "### Misses: 3",
        "",
        "- kl_coef:high#0: exam 20%, 20%, 50%, healthy 90%, 90%, 90%; x (problem) at seeds 1, 3; nothing at seed 2",
    ]


# The work ------------------------------------------------------------------------------------------------------------


def test_every_mistake_of_a_half_is_a_run_at_every_seed() -> None:
    jobs = run.jobs_of("work", [1, 2])
    content = HALVES["work"]
    assert len(jobs) == 2 * (sum(map(len, content["groups"].values())) + len(content["pairs"]))
    assert len({job.name for job in jobs}) == len(jobs)
    pair = next(job for job in jobs if job.kind == "pairs")
    assert pair.id == f"pair:{content['pairs'][0][0]}+{content['pairs'][0][1]}" and len(pair.mistakes) == 2


def test_sixty_runs_are_healthy() -> None:
    jobs = run.healthy_jobs([1, 2, 3])
    assert len(jobs) == len({job.name for job in jobs}) == 60
    assert [job.seed for job in jobs if job.id == verdict.HEALTHY_RUN] == [1, 2, 3]


def in_a_process(work: Callable[[], None]) -> Any:
    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    return process


def finished(job: run.Job) -> dict[str, Any]:
    time.sleep(0.05)
    return result(id=job.id, seed=job.seed, half=job.half, by=os.getpid(), same=True, seconds=0.05)


def test_two_processes_divide_the_work(tmp_path: Path) -> None:
    jobs = [run.Job(f"mistake#{i}", "work", "settings", 1) for i in range(12)]
    (tmp_path / "work").mkdir()
    made = tmp_path / "made.txt"

    def make(job: run.Job) -> dict[str, Any]:
        with made.open("a", encoding="utf-8") as file:
            file.write(f"{job.id}\n")
        return finished(job)

    workers = [in_a_process(lambda: run.work_through(jobs, tmp_path, 60, make) and None) for _ in range(2)]
    for worker in workers:
        worker.join()
    assert sorted(made.read_text(encoding="utf-8").split()) == sorted(job.id for job in jobs)
    assert {one["by"] for one in run.kept(tmp_path, "work")} == {worker.pid for worker in workers}
    assert run.work_through(jobs, tmp_path, 60, make) == (0, 0)  # what is there is not made again


def test_the_claim_of_a_process_that_died_is_taken(tmp_path: Path) -> None:
    path, begun = tmp_path / "claims" / "one.lock", tmp_path / "begun"

    def hold() -> None:
        with run.claimed(path) as mine:
            begun.write_text(str(mine), encoding="utf-8")
            time.sleep(60)

    process = in_a_process(hold)
    while not begun.is_file() or not begun.read_text(encoding="utf-8"):
        time.sleep(0.01)
    with run.claimed(path) as mine:
        assert not mine
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    with run.claimed(path) as mine:
        assert mine


def test_an_error_of_the_benchmark_is_no_result(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    jobs = [run.Job(f"mistake#{i}", "work", "settings", 1) for i in range(2)]
    (tmp_path / "work").mkdir()

    def make(job: run.Job) -> dict[str, Any]:
        if job.id == "mistake#0":
            raise KeyError("an oversight")
        return finished(job)

    assert run.work_through(jobs, tmp_path, 60, make) == (1, 1)
    assert [one["id"] for one in run.kept(tmp_path, "work")] == ["mistake#1"]
    assert "an oversight" in capsys.readouterr().err
    assert run.work_through(jobs, tmp_path, 0, make) == (0, 0)  # no time is left


def test_kept_logs_are_judged_by_the_present_rules(tmp_path: Path) -> None:
    folder = tmp_path / "work" / "mistake-0.25-1"
    folder.mkdir(parents=True)
    state = {"global_step": 80, "log_history": same_scores_from(5, rows=10).rows}
    (folder / "trainer_state.json").write_text(json.dumps(state), encoding="utf-8")
    old = result(roots=[root("truncation")], rollouts=10)
    (tmp_path / "work" / "mistake-0.25-1.json").write_text(json.dumps(old), encoding="utf-8")
    refused = result(refused=True, died="ValueError: no.", rollouts=0)
    (tmp_path / "work" / "refused-1.json").write_text(json.dumps(refused), encoding="utf-8")
    assert run.rejudge(tmp_path, "work") == (2, 1)
    first, second = run.kept(tmp_path, "work")
    assert [one["name"] for one in first["roots"]] == ["constant_scores"]
    assert first["exam"] == old["exam"]
    assert second["died"] == "ValueError: no." and second["roots"] == []
    assert run.rejudge(tmp_path, "work") == (2, 0)


def test_what_is_printed_of_a_run_of_the_half_that_only_measures_tells_nothing_of_it() -> None:
    found = result(roots=[root("unusual_settings")], seconds=3.0, same=True)
    found["first_seen"] = {"unusual_settings kl_coef": {**told("unusual_settings", 64.0), "step": 16}}
    said = {half: run._said(run.Job("kl_coef:high#0", half, "settings", 1), found) for half in ("work", "measure")}
    assert said["work"] == "kl_coef-high#0-1: ['unusual_settings@16'] exam 0.20  3 s"
    assert said["measure"] == "kl_coef-high#0-1 3 s"
