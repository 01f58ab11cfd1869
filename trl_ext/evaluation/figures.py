"""What is measured of one policy's completions: each figure a mean over prompts, with its interval."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial

from trl_ext.evaluation.comparisons import Interval, bootstrap, means
from trl_ext.evaluation.sampling import Row
from trl_ext.feedback.records import key_of
from trl_ext.rewards import repetition_penalty

NGRAM = 3  # words of a repetition
# What each figure is, for those who read a table.
MEANING = {
    "kl": "KL to the base, nats a completion",
    "length": "tokens a completion",
    "ended": "share that ended by themselves",
    "repetition": f"share of a completion's {NGRAM}-grams of words that it said before",
    "distinct": "distinct completions over completions",
    "perplexity": "of the completions under the base",
    "score": "mean by the reward",
}


def figures(rows: Sequence[Row], seed: int = 0) -> dict[str, Interval]:
    """The figures of one policy's rows; those that cannot be had are left out.

    - score/NAME: mean of the scores by that reward.
    - kl: mean of log p_policy(completion) - log p_base(completion), which estimates KL(policy || base); nats.
    - length: tokens. ended: share that ended by an EOS.
    - repetition: 1 - distinct n-grams / n-grams of a completion's words, n = 3, as `rewards.repetition_penalty`.
    - distinct: distinct completions / completions, as the mean of 1 / (how often the policy wrote this one); these
      counts stay those of the whole sample when prompts are drawn for the interval.
    - perplexity: exp(-m), m the mean over completions of the mean log p_base of their tokens: fluency.
    """
    count = Counter(key_of(row["completion"]) for row in rows)
    repetition = repetition_penalty(NGRAM)
    measures: dict[str, Callable[[Row], float | None]] = {
        **{f"score/{name}": partial(_score, name) for name in rows[0].get("scores") or {}},
        "kl": lambda row: row["kl"],
        "length": lambda row: float(row["tokens"]),
        "ended": lambda row: float(row["ended"]),
        "repetition": lambda row: -float(repetition([row["completion"]])[0] or 0),
        "distinct": lambda row: 1 / count[key_of(row["completion"])],
        "perplexity": lambda row: (row["logprob"] - row["kl"]) / row["tokens"] if row["tokens"] else None,
    }
    shares = dict.fromkeys(("ended", "repetition", "distinct"), (0.0, 1.0))
    found = {}
    for name, measure in measures.items():
        if measured := [(key_of(row["prompt"]), value) for row in rows if (value := measure(row)) is not None]:
            found[name] = bootstrap(means(measured), seed, shares.get(name))
    if (fluency := found.get("perplexity")) is not None:
        ends = math.exp(-fluency.high), math.exp(-fluency.low)
        found["perplexity"] = Interval(math.exp(-fluency.mean), *ends, fluency.n)
    return found


def _score(name: str, row: Row) -> float | None:
    score: float | None = row["scores"][name]
    return score
