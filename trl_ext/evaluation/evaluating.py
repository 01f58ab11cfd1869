"""Policies side by side: sample, score, measure, judge, compare. What is done is kept in a folder and gone on with."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

from accelerate import PartialState

from trl_ext.evaluation.comparisons import Comparison, agreement, strengths, win_rates
from trl_ext.evaluation.figures import figures
from trl_ext.evaluation.judges import RUBRIC, Judge, ModelJudge, ScoreJudge, Spec, compared, pairs_of
from trl_ext.evaluation.policies import BASE, Cast
from trl_ext.evaluation.result import as_json, write_page
from trl_ext.evaluation.sampling import Row, Sampling, add_scores, check_columns, rollout_of, sample
from trl_ext.rewards import RewardFunction, Scorer
from trl_ext.runs import write_whole

PeopleSay = Callable[[Sequence[Row]], list[Comparison]]


def evaluate(
    cast: Cast,
    prompts: Sequence[Mapping[str, Any]],
    folder: str | Path,
    judge: Spec | None = None,
    how: Sampling | None = None,
    functions: Sequence[RewardFunction] = (),
    loading: Mapping[str, Any] | None = None,
    people: PeopleSay | None = None,
    rubric: str = RUBRIC,
    key: str | None = None,
) -> dict[str, Any]:
    """Figures of each policy on held-out prompts, and how often each wins against each other one.

    All policies answer the same prompts by the same random numbers. `folder` holds answers.jsonl, judge.jsonl (what a
    language model said), and in the end evaluation.json and evaluation.html; the same call goes on where it stopped.

    Args:
        cast: the policies; one alone is compared with the bare base. Its reward roles and `functions` give scores.
        prompts: as for `sample`.
        judge: who says which completion is better; None: figures only.
        how: as for `sample`; seeds are shared.
        loading: as for `sample`.
        people: gives what people said about these rows, where they judge, or where the judge is compared with them.
        rubric: for a language model.
        key: for its URL.

    Returns:
        What evaluation.json holds.

    Raises:
        FileNotFoundError, ValueError: of what is given; nothing is loaded then.
        JudgeError: the judge is gone or says nothing; what it said is kept.
    """
    folder, how = Path(folder), replace(how or Sampling(), shared_seeds=True)
    if len(cast.policies) == 1 and None not in cast.policies.values():
        cast = replace(cast, policies={**cast.policies, _free_name(cast): None})
    number = 0  # of the score that judges
    if judge is not None:
        if len(cast.policies) < 2:
            raise ValueError("A judge compares policies, and the bare base is alone: give one more --policy.")
        if judge.kind == "people" and people is None:
            raise ValueError("People judge, but where is what they said? Give --store FILE.")
        if judge.kind == "reward":
            cast, number = cast.with_reward(judge.value)
        if judge.kind == "function":
            functions = [*functions, *([] if judge.function in functions else [judge.function])]
            number = len(cast.rewards) + functions.index(judge.function)
    check_columns(prompts, functions)
    folder.mkdir(parents=True, exist_ok=True)
    asker = None
    if judge is not None and judge.kind == "url":
        asker = ModelJudge(judge.model, judge.value, folder / "judge.jsonl", rubric, key)
    tokenizer = cast.tokenizer()
    load = cache(partial(cast.loaded, tokenizer, **(loading or {})))
    rows = sample(replace(cast, rewards=()), prompts, folder / "answers.jsonl", how, (), loading, load)
    template = cast.chat_template_kwargs
    scorer = Scorer(
        [*(load().rewards.values() if cast.rewards else ()), *functions],
        device=PartialState().device,
        chat_template_kwargs=template,
    )
    scorer.check(rows[0]["prompt"])
    add_scores(rows, rollout_of(rows, tokenizer, template), scorer)

    names = list(cast.policies)
    by_policy = {name: [row for row in rows if row["policy"] == name] for name in names}
    said = people(rows) if people is not None else []
    pairs, comparisons, agreed = pairs_of(rows, names), [], None
    if judge is not None and judge.kind == "people":
        comparisons = said
    elif judge is not None:
        judged_by: Judge = asker or ScoreJudge(scorer.names[number], rows)
        comparisons = compared(judged_by, pairs)
        found = {row["id"]: row for row in rows}
        asked = [c for c in said if c.rater is not None]  # of completions that read alike nobody was asked
        theirs = [(found[str(c.id_a)], found[str(c.id_b)]) for c in asked]
        agreed = agreement(compared(judged_by, theirs), asked, how.seed) if asked else None
    if judge is not None and not comparisons:
        raise ValueError(_nothing_said(judge, folder))
    result = as_json(
        settings={"base": cast.base, "prompts": len(prompts), "per_prompt": how.per_prompt, "seed": how.seed}
        | {"temperature": how.temperature, "max_new_tokens": how.max_new_tokens},
        adapters={name: None if path is None else str(path) for name, path in cast.policies.items()},
        metrics={name: figures(group, how.seed) for name, group in by_policy.items()},
        judge=str(judge) if judge is not None else None,
        rates=win_rates(comparisons, names, how.seed),
        left_out=0 if judge is None or judge.kind == "people" else len(pairs) - len(comparisons),
        strengths=strengths(comparisons, names, how.seed) if comparisons and len(names) > 2 else {},
        agreement=agreed,
    )
    write_whole(folder / "evaluation.json", json.dumps(result, indent=2, ensure_ascii=False) + "\n")
    write_page(result, folder / "evaluation.html")
    return result


def _free_name(cast: Cast) -> str:
    return BASE if BASE not in cast.policies else "bare base"


def _nothing_said(judge: Spec, folder: Path) -> str:
    if judge.kind == "people":
        return (
            f"No person has compared two policies' answers yet: let some do it (trl-ext rate {folder}/answers.jsonl "
            "--store FILE --mode pairs), and give the same command again."
        )
    return f"The judge {judge} has no verdict on any of the pairs: each of its scores or replies is missing."
