"""Answers of several policies in a file, a row a completion: written whole, and gone on with after any interruption."""

from __future__ import annotations

import hashlib
import inspect
import json
import math
import os
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import nn
from transformers import PreTrainedTokenizerBase

from trl_ext.evaluation.policies import BASE, Cast, Policies, fingerprint, uniforms
from trl_ext.rewards import RewardFunction, Scorer, name_of
from trl_ext.rewards.protocol import ARGUMENTS, arguments_of
from trl_ext.runs import write_whole
from trl_ext.tokens import PromptError, config_of, context_limit, fault_of_prompt, padded, tokenize_prompts
from trl_ext.types import Rollout

Row = dict[str, Any]
# What a row says of its own; the prompts' further columns stand beside it.
FIELDS = {
    *("id", "prompt", "completion", "policy", "sample", "tokens", "ended", "logprob", "kl", "score", "scores"),
    *("completion_ids", "item"),
}


@dataclass(frozen=True)
class Sampling:
    """How answers are sampled.

    Attributes:
        per_prompt: answers of each policy to each prompt.
        max_new_tokens: of an answer.
        temperature: 0 takes the likeliest token.
        seed: of the random numbers, which follow from it, the prompt's number, the policy's name and the sample's
            number alone.
        shared_seeds: let all policies have the same random numbers.
        batch_size: answers at a time; it changes nothing but rounding.
        vllm: URLs of vLLM servers that sample, each of the same base; none: the base itself. They have other random
            numbers, which follow from the same things.
    """

    per_prompt: int = 1
    max_new_tokens: int = 256
    temperature: float = 1.0
    seed: int = 0
    shared_seeds: bool = False
    batch_size: int = 32
    vllm: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("per_prompt", "max_new_tokens", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: give at least 1.")
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature is {self.temperature}: give 0 or more.")


def sample(
    cast: Cast,
    prompts: Sequence[Mapping[str, Any]],
    out: str | Path,
    how: Sampling | None = None,
    functions: Sequence[RewardFunction] = (),
    loading: Mapping[str, Any] | None = None,
    load: Callable[[], Policies] | None = None,
) -> list[Row]:
    """Every policy's answers to every prompt, as rows of the JSON lines file `out`, made where they are not there yet.

    Beside it, `out` + ".settings.json" says what they were made with.

    Args:
        cast: the policies, and the reward roles that score.
        prompts: rows with "prompt", texts or conversations; further columns ride along, and reward functions get them.
        functions: reward functions that score, beside the reward roles.
        loading: arguments of `Cast.loaded`, e.g. quantization_config.
        load: gives `cast` loaded, where it may be loaded already.

    Returns:
        The rows: id, prompt, completion, policy, sample; tokens of the completion, ended (by its EOS), logprob (under
        the policy that wrote it) and kl (log-ratio of policy and base), sums in nats; score, the mean of `scores` by
        name; and completion_ids.

    Raises:
        TypeError: a reward function asks for a column that the prompts do not have.
        ValueError: there are no prompts, one that the model cannot read, or the file was made with other settings.
    """
    how, out = how or Sampling(), Path(out)
    if not prompts:
        raise ValueError("There are no prompts to answer.")
    check_columns(prompts, functions)
    for name in sorted({name for row in prompts for name in row} & FIELDS - {"prompt"}):
        warnings.warn(
            f"The prompts' column {name!r} is left out, and no reward function sees it: an answer has a column of its "
            "own that is called so. Rename yours.",
            UserWarning,
            stacklevel=2,
        )
    _check_settings(out, _settings(cast, prompts, how, functions, loading or {}))
    done = read_rows(out)
    order = [(number, sample) for number in range(len(prompts)) for sample in range(how.per_prompt)]
    todo = []
    for start in range(0, len(order), how.batch_size):
        part = order[start : start + how.batch_size]
        for policy in cast.policies:
            # A batch that was broken off is sampled again as a whole, so that its rows come out as they would have.
            if missing := {_id(n, policy, s) for n, s in part} - done.keys():
                todo.append((policy, part, missing))
    if todo:
        tokenizer = cast.tokenizer()
        _check_read(prompts, tokenizer, config_of(cast.base), how.max_new_tokens, cast.chat_template_kwargs)
        policies = load() if load is not None else cast.loaded(tokenizer, **(loading or {}))
        scorer = Scorer(
            [*policies.rewards.values(), *functions],
            device=policies.device,
            chat_template_kwargs=cast.chat_template_kwargs,
        )
        scorer.check(prompts[0]["prompt"])
        with policies.served(how.vllm, cast.policies, {policy for policy, *_ in todo}):
            for policy, part, missing in track(todo, "Sampling", console=Console(stderr=True), transient=True):
                rows = _batch(policies, scorer, prompts, policy, part, how)
                fresh = [row for row in rows if row["id"] in missing]
                append(out, fresh)
                done |= {row["id"]: row for row in fresh}
    return [done[_id(number, policy, s)] for number, s in order for policy in cast.policies]


def check_columns(prompts: Sequence[Mapping[str, Any]], functions: Sequence[RewardFunction]) -> None:
    """Refuse reward functions that ask for a column that the prompts do not have.

    Raises:
        TypeError: names function and column.
    """
    offered = [*ARGUMENTS, "prompt_ids", *sorted({name for row in prompts for name in row} - FIELDS)]
    for function in functions:
        if not isinstance(function, (str, nn.Module)):
            arguments_of(function, offered)


def _check_read(
    prompts: Sequence[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    config: Any | None,
    new_tokens: int,
    template: dict[str, Any] | None = None,
) -> None:
    """Refuse prompts that the chat template or the model cannot read, before it is loaded. A model with rotary
    positions may write beyond those that it knows; others end in an error there.

    Raises:
        PromptError: names the prompt.
    """
    limit = None if config is None else context_limit(config)
    rotary = config is not None and getattr(config.get_text_config(), "rope_parameters", None)
    asked = [row["prompt"] for row in prompts]
    for number, (prompt, ids) in enumerate(zip(asked, tokenize_prompts(asked, tokenizer, template), strict=True)):
        fault = None if isinstance(prompt, str) else fault_of_prompt(prompt, tokenizer, **(template or {}))
        if fault is not None:
            raise PromptError(prompt, number, f"has {fault}.")
        follow = 1 if rotary else new_tokens
        if limit is not None and len(ids) + follow > limit:
            reason = f"has {len(ids)} tokens and {new_tokens} may follow, but the model reads {limit}"
            raise PromptError(prompt, number, f"{reason}: shorten or drop it, or lower max_new_tokens.")


def _batch(
    policies: Policies,
    scorer: Scorer,
    prompts: Sequence[Mapping[str, Any]],
    policy: str,
    part: Sequence[tuple[int, int]],
    how: Sampling,
) -> list[Row]:
    keys = [(how.seed, number, *([] if how.shared_seeds else [policy]), sample) for number, sample in part]
    asked = [prompts[number]["prompt"] for number, _ in part]
    rollout = policies.sample(policy, asked, uniforms(keys, how.max_new_tokens), how.temperature)
    own, base = policies.logprobs_of(rollout, policy, how.temperature)
    rows = []
    for i, (number, sample) in enumerate(part):
        rows.append(
            {
                "id": _id(number, policy, sample),
                "prompt": asked[i],
                "completion": rollout.completions[i],
                "policy": policy,
                "sample": sample,
                "tokens": int(rollout.lengths[i]),
                "ended": bool(rollout.has_eos[i]),
                "logprob": own[i],
                "kl": own[i] - base[i],
                "score": None,
                **({"scores": {}} if scorer.names else {}),
                **{name: value for name, value in prompts[number].items() if name not in FIELDS},
                "completion_ids": rollout.completion_tokens[i],
            }
        )
    add_scores(rows, rollout, scorer)
    return rows


def add_scores(rows: Sequence[Row], rollout: Rollout, scorer: Scorer) -> None:
    """Put into each row its `scores` by each reward function, None where it gave none, and their mean as `score`."""
    if not scorer.names:
        return
    names = {name for row in rows for name in row} - FIELDS
    columns = {name: [row.get(name) for row in rows] for name in names}
    # As trainers call them, who have more to offer.
    context = {"trainer_state": None, "log_extra": _ignore, "log_metric": _ignore}
    for row, line in zip(rows, scorer(rollout, columns, **context).tolist(), strict=True):
        scores = {name: None if math.isnan(x) else x for name, x in zip(scorer.names, line, strict=True)}
        known = [x for x in line if not math.isnan(x)]
        row["score"], row["scores"] = sum(known) / len(known) if known else None, scores


def _ignore(*_: Any) -> None:
    pass


def rollout_of(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, chat_template_kwargs: dict[str, Any] | None = None
) -> Rollout:
    """Rows of a file as the rollout that they were, 0 on padding."""
    prompts = tokenize_prompts([row["prompt"] for row in rows], tokenizer, chat_template_kwargs)
    prompt_ids, prompt_mask = padded(prompts, 0, left=True)
    completion_ids, completion_mask = padded([row["completion_ids"] for row in rows], 0)
    return Rollout(
        prompts=[row["prompt"] for row in rows],
        completions=[row["completion"] for row in rows],
        prompt_ids=prompt_ids,
        prompt_mask=prompt_mask,
        completion_ids=completion_ids,
        completion_mask=completion_mask,
        has_eos=torch.tensor([row["ended"] for row in rows]),
    )


def _id(number: int, policy: str, sample: int) -> str:
    return f"{number}-{policy}-{sample}"


# Files ---------------------------------------------------------------------------------------------------------------


def _lines(rows: Sequence[Row]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)


def append(file: Path, rows: Sequence[Row]) -> None:
    """Write rows at the end of a JSON lines file; they are on the disk when this returns."""
    text = _lines(rows)
    with file.open("a", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())


def read_rows(file: Path, key: str = "id") -> dict[str, Row]:
    """The rows of a JSON lines file by their `key`. A last line that was only half written is cut off.

    Raises:
        ValueError: a line is no row with that key, or two are, and say different things.
    """
    if not file.exists():
        return {}
    written = file.read_bytes()
    whole = written.rfind(b"\n") + 1
    if whole < len(written):
        with file.open("r+b") as stream:
            stream.truncate(whole)
    found: dict[str, Row] = {}
    for number, line in enumerate(written[:whole].split(b"\n")[:-1], start=1):
        row = _row(line)
        if row is None or key not in row:
            fault = "is no row of JSON" if row is None else f"has no {key!r}"
            raise ValueError(f"Line {number} of {str(file)!r} {fault}: mend it, or name another file.")
        if found.setdefault(row[key], row) != row:
            raise ValueError(
                f"Line {number} of {str(file)!r} has the {key} of a line before, {row[key]!r:.60}: leave one of them."
            )
    return found


def _row(line: bytes) -> Row | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


def write_rows(file: Path, rows: Sequence[Row]) -> None:
    """Write a JSON lines file that is never there by half."""
    write_whole(file, _lines(rows))


def _settings(
    cast: Cast,
    prompts: Sequence[Mapping[str, Any]],
    how: Sampling,
    functions: Sequence[RewardFunction],
    loading: Mapping[str, Any],
) -> Row:
    digest = hashlib.sha256(json.dumps([dict(row) for row in prompts], sort_keys=True, default=str).encode())
    rewards = [str(folder.resolve()) for folder in cast.rewards]
    return {
        "base": _with_digest(cast.base),
        "policies": {name: BASE if folder is None else fingerprint(folder) for name, folder in cast.policies.items()},
        "prompts": f"{len(prompts)} with digest {digest.hexdigest()[:16]}",
        **{name: getattr(how, name) for name in ("per_prompt", "max_new_tokens", "temperature", "seed")},
        "shared_seeds": how.shared_seeds,
        "quantized": "quantization_config" in loading,
        **({"dtype": str(dtype)} if (dtype := loading.get("dtype")) not in (None, "float32", torch.float32) else {}),
        **({"chat_template_kwargs": cast.chat_template_kwargs} if cast.chat_template_kwargs else {}),
        **({"sampled_by": "vLLM"} if how.vllm else {}),
        "rewards": [_with_digest(reward) for reward in (*rewards, *functions)],
    }


def _with_digest(made_with: Any) -> str:
    """A model, an adapter or a reward function by its name, with a digest of the folder or the module that it is from;
    the name alone where it is from the Hub, or from no file. What a module imports is not in its digest."""
    if isinstance(made_with, str):
        folder = Path(made_with)
        return f"{made_with} with digest {fingerprint(folder)}" if folder.is_dir() else made_with
    code = getattr(made_with, "func", made_with)  # functools.partial
    code = inspect.unwrap(code) if inspect.isroutine(code) else type(code)
    name = f"{code.__module__}.{name_of(made_with)}"
    module = getattr(sys.modules.get(code.__module__), "__file__", None)
    if module is None or not Path(module).is_file():
        return name
    return f"{name} with digest {hashlib.sha256(Path(module).read_bytes()).hexdigest()[:16]}"


def _check_settings(out: Path, settings: Row) -> None:
    """Write the settings beside a file without answers, and refuse to go on with one that was made with others.

    Raises:
        ValueError: names the first setting that differs.
    """
    if not out.parent.is_dir():
        raise FileNotFoundError(f"The folder {str(out.parent)!r} does not exist: make it, or name another file.")
    beside = out.with_name(out.name + ".settings.json")
    if out.exists() and not beside.is_file():
        raise FileExistsError(f"{out} exists already, without {beside.name}: name another file, or remove it.")
    if not out.exists() or not out.stat().st_size:
        write_whole(beside, json.dumps(settings, indent=2, ensure_ascii=False) + "\n")
        return
    refuse_others(out, json.loads(beside.read_text(encoding="utf-8")), settings, "another file")


def refuse_others(made: Path, before: Mapping[str, Any], settings: Mapping[str, Any], instead: str) -> None:
    """Refuse to go on with what was made with other settings.

    Raises:
        ValueError: names the first setting that differs.
    """
    for name in {**settings, **before}:
        if before.get(name) != settings.get(name):
            raise ValueError(
                f"{made} was made with {name} {before.get(name)}, and not with {settings.get(name)}: give the same "
                f"settings to go on with it, or name {instead}."
            )
