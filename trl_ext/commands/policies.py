"""`trl-ext sample` and `evaluate`."""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from trl_ext import demo, evaluation
from trl_ext.commands.files import check_new
from trl_ext.launch import import_functions, load_prompts, trained
from trl_ext.rating import Store


def sample(chosen: Namespace) -> int:
    cast, functions = _cast(chosen)
    everything, of = chosen.out, chosen.of or "pairs"
    if chosen.pick:
        evaluation.check_pick(chosen.pick, of, len(chosen.reward), len(functions), chosen.items)
        everything = chosen.out.with_name(f"{chosen.out.stem}.all{chosen.out.suffix}")
        if not everything.exists():  # or what is there is an earlier choice of the same answers
            check_new(chosen.out)
    elif chosen.items is not None or chosen.of is not None:
        raise ValueError("--items and --of say what is picked: give --pick WAY, or leave them out.")
    prompts = _prompts(chosen)
    how, loading = _sampling(chosen), trained.loading(chosen.load_in_4bit, chosen.dtype)
    rows = evaluation.sample(cast, prompts, everything, how, functions, loading)
    if chosen.pick:
        rows = evaluation.pick(rows, chosen.pick, chosen.items, of, chosen.seed)
        evaluation.write_rows(chosen.out, rows)
        if (found := rows[-1]["item"] + 1) < chosen.items:
            print(f"There are {found:,} {of} to pick, not {chosen.items:,}.")
    print(f"{len(rows):,} answers to {len(prompts):,} prompts in {chosen.out}")
    return 0


def evaluate(chosen: Namespace) -> int:
    cast, functions = _cast(chosen)
    judge = evaluation.Spec.of(chosen.judge) if chosen.judge else None
    if judge is not None and judge.kind == "reward":
        judge = replace(judge, value=_adapter(judge.value, chosen))
    if judge is not None and judge.kind == "function":
        judge = replace(judge, function=import_functions([judge.value])[0])
    if (judge is None or judge.kind != "url") and (idle := chosen.rubric or chosen.judge_key):
        raise ValueError(
            f"{str(idle)!r} is for a language model that judges: give --judge url:MODEL@URL, or leave it out."
        )
    if judge is None and chosen.store is not None:
        raise ValueError(
            f"{str(chosen.store)!r} is for a judge: give --judge people, or one to be compared with people."
        )
    if chosen.judge_key and chosen.judge_key not in os.environ:
        raise ValueError(f"The environment variable {chosen.judge_key!r} is not set: put the judge's key there.")
    result = evaluation.evaluate(
        cast,
        _prompts(chosen),
        chosen.out,
        judge,
        _sampling(chosen),
        functions,
        trained.loading(chosen.load_in_4bit, chosen.dtype),
        people=None if chosen.store is None else partial(_said_by_people, chosen.store),
        rubric=chosen.rubric.read_text(encoding="utf-8") if chosen.rubric else evaluation.RUBRIC,
        key=os.environ[chosen.judge_key] if chosen.judge_key else None,
    )
    evaluation.print_result(result)
    if chosen.store is not None and chosen.judge != "people" and result["agreement"] is None:
        print(f"Nobody has compared these answers in {chosen.store} yet: there is no agreement with people to give.")
    print(f"{chosen.out / 'evaluation.json'}, {chosen.out / 'evaluation.html'}")
    return 0


def _cast(chosen: Namespace) -> tuple[evaluation.Cast, list[Any]]:
    base = demo.model_path() if chosen.base == "demo" else chosen.base
    rewards = [_adapter(folder, chosen) for folder in chosen.reward]
    cast = evaluation.Cast.checked(base, chosen.policy, rewards, chosen.chat_template_kwargs)
    return cast, import_functions(chosen.function)


def _prompts(chosen: Namespace) -> list[dict[str, Any]]:
    rows, said = load_prompts(chosen.prompts, chosen.columns)
    if said:
        print(f"{chosen.prompts}: {said}")
    return rows


def _adapter(reward: str, chosen: Namespace) -> str:
    return str(demo.reward_adapter(load_in_4bit=chosen.load_in_4bit)) if reward == "demo" else reward


def _sampling(chosen: Namespace) -> evaluation.Sampling:
    return evaluation.Sampling(
        *(chosen.per_prompt, chosen.max_new_tokens, chosen.temperature, chosen.seed),
        batch_size=chosen.batch_size,
        vllm=tuple(chosen.vllm_server_base_url),
    )


def _said_by_people(store: Path, rows: Sequence[evaluation.Row]) -> list[evaluation.Comparison]:
    """What people said about pairs of these answers on the rating page; none where its store is not there yet.

    Raises:
        ValueError: an answer in the store reads otherwise. Ids alone do not tell: those of other policies are the same.
    """
    if not store.exists():
        return []
    with Store.read(store) as judged:
        of_rows = {row["id"]: row["completion"] for row in rows}
        for answer in judged.answers():
            if answer.id in of_rows and not _reads_alike(answer.completion, of_rows[answer.id]):
                raise ValueError(
                    f"{store} holds judgements of other answers: {answer.id} reads otherwise there. Name the store of "
                    "these answers, or leave out --store."
                )
        return evaluation.by_people(((c.id_a, c.id_b, c.outcome, c.rater) for c in judged.comparisons()), rows)


def _reads_alike(stored: Any, sampled: Any) -> bool:
    """A store keeps an answer of spaces as an empty one."""
    return bool(stored == sampled) or (stored == "" and isinstance(sampled, str) and not sampled.strip())
