"""Which of two policies wins, how sure that is, and how strong each of several is. Pure functions of numbers.

The prompts are the sample: what is said of one prompt is averaged first, and each prompt counts once.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from statistics import NormalDist
from typing import Any, TypeVar

import numpy as np

T = TypeVar("T")
RESAMPLES = 2000
FLIPS = 10_000
LEVEL = 0.95  # of intervals
ALPHA, POWER = 0.05, 0.8
EXACT = 12  # prompts up to which all 2^n signs are tried
Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Comparison:
    """What a judge says about two completions of one prompt.

    Attributes:
        prompt: its number, or any id.
        a, b: names of the policies.
        outcome: 1.0 where a wins, 0.5 for a tie, 0.0 where b wins.
        tokens_a, tokens_b: lengths of the completions.
        judge: its name.
        rater: who, where people judge.
        id_a, id_b: of the completions, where they are known: by these, two judges' verdicts are laid side by side.
    """

    prompt: int | str
    a: str
    b: str
    outcome: float
    tokens_a: int
    tokens_b: int
    judge: str
    rater: str | None = None
    id_a: str | None = None
    id_b: str | None = None

    @property
    def swapped(self) -> Comparison:
        """The same, said of b and a."""
        return Comparison(
            self.prompt,
            *(self.b, self.a, 1 - self.outcome, self.tokens_b, self.tokens_a),
            *(self.judge, self.rater, self.id_b, self.id_a),
        )


@dataclass(frozen=True)
class Interval:
    """A mean over prompts with the interval that holds the true one in 95 of 100 samples of prompts.

    Attributes:
        low, high: NaN where the prompts do not tell: there is one, or they agree, and the values have no bounds.
        n: prompts.
    """

    mean: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class WinRate:
    """How often one policy wins against another.

    Attributes:
        rate: share of prompts won, ties half.
        length_controlled: what the rate would be between completions of equal length (see `length_controlled`).
        p: how likely so great a difference is by chance between equal policies; `corrected` for the number of pairs.
        more_prompts: how many more would settle it; 0 where it is settled, None where no difference is seen.
    """

    a: str
    b: str
    rate: Interval
    length_controlled: Interval
    p: float
    corrected: float
    more_prompts: int | None

    @property
    def swapped(self) -> WinRate:
        """The same, said of b and a."""
        raw, controlled = (
            Interval(1 - x.mean, 1 - x.high, 1 - x.low, x.n) for x in (self.rate, self.length_controlled)
        )
        return WinRate(self.b, self.a, raw, controlled, self.p, self.corrected, self.more_prompts)

    @property
    def sentence(self) -> str:
        """What the figures say, for people."""
        rate = self.rate
        said = f"{self.a} wins {rate.mean:.0%} against {self.b} ({rate.low:.0%} to {rate.high:.0%}, {rate.n} prompts): "
        p = "p < 0.001" if self.corrected < 0.001 else f"p = {self.corrected:.3f}"
        if self.corrected < ALPHA:
            return said + f"{'more' if rate.mean > 0.5 else 'less'} than chance ({p})."
        if self.more_prompts is None:
            return said + "no difference, so nothing says how many prompts would show one."
        return said + f"could be chance ({p}); about {self.more_prompts} more prompts would settle it."


# One sample of prompts -----------------------------------------------------------------------------------------------


def bootstrap(
    values: Sequence[float], seed: int = 0, bounds: tuple[float, float] | None = None, resamples: int = RESAMPLES
) -> Interval:
    """The mean of `values`, one a prompt, with its percentile bootstrap interval (Efron and Tibshirani 1993,
    "An Introduction to the Bootstrap", chapter 13): the mean of n prompts drawn with replacement, again and again.

    Where all values are the same, the bootstrap would say that there is no doubt. Of values within `bounds`, at most a
    share q = 1 - (alpha / 2)^(1 / n) can be others (Clopper and Pearson 1934, n successes of n):

        [v - q (v - lowest),  v + q (highest - v)]

    Others may lie anywhere, so they have no interval.

    Args:
        bounds: least and greatest possible value; None: any.
    """
    data = np.asarray(values, dtype=float)
    n, tail = len(data), (1 - LEVEL) / 2
    if (data == data[0]).all():
        v, q = float(data[0]), 1 - tail ** (1 / n)
        if bounds is None:
            return Interval(v, math.nan, math.nan, n)
        return Interval(v, v - q * (v - bounds[0]), v + q * (bounds[1] - v), n)
    rng = np.random.default_rng(seed)
    means = np.array([data[rng.integers(n, size=n)].mean() for _ in range(resamples)])
    low, high = np.quantile(means, [tail, 1 - tail])
    return Interval(float(data.mean()), float(low), float(high), n)


def grouped(items: Iterable[tuple[Hashable, T]]) -> list[list[T]]:
    """What has the same key (a prompt, mostly), together, in the keys' order of appearance."""
    groups: defaultdict[Hashable, list[T]] = defaultdict(list)
    for key, item in items:
        groups[key].append(item)
    return list(groups.values())


def means(values: Iterable[tuple[Hashable, float]]) -> list[float]:
    """The mean of each prompt's values, in the prompts' order of appearance."""
    return [sum(group) / len(group) for group in grouped(values)]


def chance(outcomes: Sequence[float], seed: int = 0) -> float:
    """Probability of a mean at least as far from 1/2 where the two policies are equal: then each prompt might as well
    have come out the other way round. The sign-flip test (Fisher 1935, "The Design of Experiments", section 21):

        p = share of signs s in {-1, 1}^n with |sum_i s_i d_i| >= |sum_i d_i|,    d_i = outcome_i - 1/2

    For wins and losses this is the exact sign test. All signs are tried for up to 12 prompts that are no tie; beyond,
    10,000 at random, those of the data counted among them.

    Args:
        outcomes: of each prompt, 0 to 1.
    """
    d = np.asarray(outcomes, dtype=float) - 0.5
    d = d[d != 0]
    if not len(d):
        return 1.0
    least = abs(d.sum()) - 1e-9
    if len(d) <= EXACT:
        signs = np.array(list(product([-1, 1], repeat=len(d))))
        return float((abs(signs @ d) >= least).mean())
    rng, reached, part = np.random.default_rng(seed), 1, 1000
    for _ in range(FLIPS // part):
        reached += int((abs(rng.choice([-1.0, 1.0], size=(part, len(d))) @ d) >= least).sum())
    return reached / (FLIPS + 1)


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values corrected for being several, in their order: the k-th smallest of m is multiplied by m - k + 1, and none
    is below the one before (Holm 1979, "A Simple Sequentially Rejective Multiple Test Procedure")."""
    corrected, worst = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        worst = max(worst, min(1.0, p_values[i] * (len(p_values) - rank)))
        corrected[i] = worst
    return corrected


def prompts_needed(outcomes: Sequence[float], pairs: int = 1) -> int | None:
    """Prompts with which a difference as large as the one seen is found in 80 of 100 samples:

        n = ((z_{1 - alpha / (2 pairs)} + z_{0.8}) sd / (mean - 1/2))^2

    Source: the normal approximation for one mean, e.g. Chow, Shao and Wang 2008, "Sample Size Calculations in Clinical
    Research", section 3.1.

    Args:
        outcomes: of each prompt, 0 to 1.
        pairs: of policies that are tested side by side.

    Returns:
        None where there is no difference.
    """
    data = np.asarray(outcomes, dtype=float)
    difference = abs(float(data.mean()) - 0.5)
    if difference < 1e-12:
        return None
    sd = float(data.std(ddof=1)) if len(data) > 1 else 0.0
    sd = sd or 0.5  # all alike, so far: as uncertain as wins and losses can be
    z = NormalDist().inv_cdf(1 - ALPHA / (2 * pairs)) + NormalDist().inv_cdf(POWER)
    return math.ceil((z * sd / difference) ** 2)


# Length --------------------------------------------------------------------------------------------------------------


def length_controlled(comparisons: Sequence[Comparison], seed: int = 0, resamples: int = RESAMPLES) -> Interval:
    """The win rate of a over b were their completions equally long:

        logit P(a wins) = theta + phi tanh((tokens_a - tokens_b) / s),    rate = sigmoid(theta)

    with s the standard deviation of the differences. Source: Dubois et al. 2024, arXiv:2404.04475, section 3, without
    its term for the prompt's difficulty. A tie counts as half a win; each prompt weighs 1; phi has a standard normal
    prior, so that it stays finite where the longer one always wins. The interval is the bootstrap's over prompts.

    NaN where one side is the longer one throughout, and no pair is of nearly the same length, |tanh| < 0.5: theta and
    phi cannot be told apart there.
    """
    prompts = {prompt: i for i, prompt in enumerate(dict.fromkeys(c.prompt for c in comparisons))}
    group = np.array([prompts[c.prompt] for c in comparisons])
    y = np.array([c.outcome for c in comparisons])
    difference = np.array([float(c.tokens_a - c.tokens_b) for c in comparisons])
    spread, n = difference.std(), len(prompts)
    x = np.tanh(difference / spread) if spread > 0 else np.tanh(np.sign(difference))
    if (x > 0.5).all() or (x < -0.5).all():
        return Interval(math.nan, math.nan, math.nan, n)
    share = 1 / np.bincount(group)[group]
    if (y == y[0]).all():  # nothing that a length could explain
        return bootstrap([y[0]] * n, bounds=(0, 1))
    rng = np.random.default_rng(seed)
    drawn = np.stack([np.ones(n), *(np.bincount(rng.integers(n, size=n), minlength=n) for _ in range(resamples))])
    rates = 1 / (1 + np.exp(-_intercepts(x, y, drawn[:, group] * share)))
    low, high = np.quantile(rates[1:], [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    if np.ptp(rates) < 1e-9:  # one prompt, or all alike
        low = high = math.nan
    return Interval(float(rates[0]), float(low), float(high), n)


def _intercepts(x: Array, y: Array, weights: Array, steps: int = 50) -> Array:
    """theta of the regression above for each row of `weights` (fits, comparisons), by Newton's method: (fits,)."""
    theta, phi = np.zeros((2, len(weights)))
    for _ in range(steps):
        p = 1 / (1 + np.exp(-(theta[:, None] + phi[:, None] * x)))
        residual, curve = weights * (y - p), weights * p * (1 - p)
        g0, g1 = residual.sum(axis=1), residual @ x - phi
        h00, h01, h11 = curve.sum(axis=1) + 1e-9, curve @ x, curve @ x**2 + 1
        determinant = h00 * h11 - h01**2
        step0, step1 = (h11 * g0 - h01 * g1) / determinant, (h00 * g1 - h01 * g0) / determinant
        longest = np.maximum(1, np.maximum(abs(step0), abs(step1)) / 2)  # so that none runs away
        # Resamples in which one side won everything have no finite theta: sigmoid(15) is as good as 1.
        theta, phi = np.clip(theta + step0 / longest, -15, 15), phi + step1 / longest
        if max(abs(step0).max(initial=0, where=abs(theta) < 15), abs(step1).max()) < 1e-9:
            break
    return theta


# Several policies ----------------------------------------------------------------------------------------------------


def win_rates(comparisons: Sequence[Comparison], policies: Sequence[str], seed: int = 0) -> list[WinRate]:
    """Of every pair of policies that was compared, in the order of `policies`."""
    pairs: defaultdict[tuple[str, str], list[Comparison]] = defaultdict(list)
    place = {name: i for i, name in enumerate(policies)}
    for c in comparisons:
        c = c if place[c.a] < place[c.b] else c.swapped
        pairs[c.a, c.b].append(c)
    ordered = sorted(pairs, key=lambda pair: (place[pair[0]], place[pair[1]]))
    outcomes = [means((c.prompt, c.outcome) for c in pairs[pair]) for pair in ordered]
    p_values = [chance(values, seed) for values in outcomes]
    rates = []
    for (a, b), values, p, corrected in zip(ordered, outcomes, p_values, holm(p_values), strict=True):
        needed = prompts_needed(values, len(ordered))
        more = None if needed is None else 0 if corrected < ALPHA else max(1, needed - len(values))
        rate = bootstrap(values, seed, bounds=(0, 1))
        rates.append(WinRate(a, b, rate, length_controlled(pairs[a, b], seed), p, corrected, more))
    return rates


def bradley_terry(wins: Array, steps: int = 10_000, tolerance: float = 1e-10) -> Array:
    """Strengths s with P(i beats j) = sigmoid(s_i - s_j), their mean 0, by the MM algorithm (Hunter 2004, "MM
    Algorithms for Generalized Bradley-Terry Models", equation 3), g = exp(s):

        g_i <- W_i / sum_{j != i} n_ij / (g_i + g_j)

    W_i are i's wins, n_ij comparisons of i and j; a tie is half a win of each. Every pair gets one tie more, so that a
    policy that won everything has a finite strength.

    Args:
        wins: (..., policies, policies), how often the row's policy won against the column's.

    Returns:
        (..., policies).
    """
    wins = wins + 0.5 * (1 - np.eye(wins.shape[-1]))
    met, won = wins + np.swapaxes(wins, -1, -2), wins.sum(axis=-1)
    g = np.ones(won.shape)
    for _ in range(steps):
        new = won / (met / (g[..., :, None] + g[..., None, :])).sum(axis=-1)
        new /= np.exp(np.log(new).mean(axis=-1, keepdims=True))
        settled = abs(np.log(new / g)).max() < tolerance
        g = new
        if settled:
            break
    strengths: Array = np.log(g)
    return strengths


def strengths(comparisons: Sequence[Comparison], policies: Sequence[str], seed: int = 0) -> dict[str, Interval]:
    """Bradley-Terry strength of each policy, with its bootstrap interval over prompts. A prompt's comparisons of one
    pair count as one together."""
    place = {name: i for i, name in enumerate(policies)}
    prompts = {prompt: i for i, prompt in enumerate(dict.fromkeys(c.prompt for c in comparisons))}
    won = np.zeros((len(prompts), len(policies), len(policies)))
    for c in comparisons:
        won[prompts[c.prompt], place[c.a], place[c.b]] += c.outcome
        won[prompts[c.prompt], place[c.b], place[c.a]] += 1 - c.outcome
    won /= np.maximum(won + np.swapaxes(won, 1, 2), 1)
    rng, n = np.random.default_rng(seed), len(prompts)
    drawn = np.stack([np.bincount(rng.integers(n, size=n), minlength=n) for _ in range(RESAMPLES // 4)])
    sampled = bradley_terry(np.tensordot(drawn, won, axes=1), tolerance=1e-4)
    low, high = np.quantile(sampled, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
    if (won == won[0]).all():  # one prompt, or all alike
        low = high = np.full(len(policies), math.nan)
    found = bradley_terry(won.sum(axis=0))
    return {name: Interval(float(found[i]), float(low[i]), float(high[i]), n) for name, i in place.items()}


# Judges --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Agreement:
    """How far a judge says what people say, on the pairs of completions that both compared.

    Attributes:
        share: of these pairs, those with the same outcome, ties included.
        kappa: of Cohen; NaN where both always say the same one thing.
        pairs: how many.
    """

    share: Interval
    kappa: float
    pairs: int


def cohen_kappa(first: Sequence[float], second: Sequence[float]) -> float:
    """Agreement beyond chance of two judges' outcomes (Cohen 1960, "A Coefficient of Agreement for Nominal Scales"):

    kappa = (p_o - p_e) / (1 - p_e),    p_e = sum over outcomes of share_1 share_2
    """
    n = len(first)
    observed = sum(x == y for x, y in zip(first, second, strict=True)) / n
    expected = sum(list(first).count(k) * list(second).count(k) for k in {*first, *second}) / n**2
    return (observed - expected) / (1 - expected) if expected < 1 else math.nan


def agreement(judged: Sequence[Comparison], people: Sequence[Comparison], seed: int = 0) -> Agreement | None:
    """A judge's comparisons beside people's, by the ids of the completions; of several people the majority, which is a
    tie where there is none. None where no pair was compared by both."""
    of_judge, of_people = _by_completions(judged), _by_completions(people)
    shared = [pair for pair in of_people if pair in of_judge]
    if not shared:
        return None
    verdicts = [(_majority(of_judge[pair]), _majority(of_people[pair])) for pair in shared]
    same = ((of_people[pair][0].prompt, float(x == y)) for pair, (x, y) in zip(shared, verdicts, strict=True))
    share = bootstrap(means(same), seed, bounds=(0, 1))
    return Agreement(share, cohen_kappa(*map(list, zip(*verdicts, strict=True))), len(shared))


def _by_completions(comparisons: Sequence[Comparison]) -> dict[tuple[str, str], list[Comparison]]:
    found: defaultdict[tuple[str, str], list[Comparison]] = defaultdict(list)
    for c in comparisons:
        if c.id_a is not None and c.id_b is not None:
            c = c if c.id_a < c.id_b else c.swapped
            found[str(c.id_a), str(c.id_b)].append(c)
    return found


def _majority(comparisons: Sequence[Comparison]) -> float:
    mean = sum(c.outcome for c in comparisons) / len(comparisons)
    return 0.5 if abs(mean - 0.5) < 1e-9 else float(mean > 0.5)
