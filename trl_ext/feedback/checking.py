"""A look at feedback before training: what is there, what is wrong with it, and what to do about it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import fmean, variance
from typing import Any

from trl_ext.feedback.converting import to_preference
from trl_ext.feedback.files import FeedbackError
from trl_ext.feedback.reading import Feedback
from trl_ext.feedback.records import key_of, without_nan
from trl_ext.types import as_text

# Below the first, alpha allows no conclusions; below the second, tentative ones. Source: Krippendorff 2004, "Content
# Analysis", chapter 11.
ALPHA_POOR, ALPHA_TENTATIVE = 0.667, 0.8
# Where length alone picks the winner this often, a reward model learns length.
LENGTH_BIAS = 0.65
MAX_PAIRS_PER_ANSWER = 20


@dataclass(frozen=True)
class FeedbackReport:
    """What `check` found.

    Attributes:
        facts: name to number or text, in the order to print.
        advice: sentences: what is wrong, and what to do about it.
        ratings: every single rating, for a histogram; empty for other forms.
    """

    facts: dict[str, float | int | str]
    advice: list[str] = field(default_factory=list)
    ratings: list[float] = field(default_factory=list)


def check(feedback: Feedback, held_out: Feedback | None = None) -> FeedbackReport:
    """Look at `feedback`, and at the prompts that it shares with `held_out`."""
    facts: dict[str, float | int | str] = {"read as": feedback.read_as}
    if feedback.unused:
        facts["columns not used"] = ", ".join(feedback.unused)
    facts["records"] = len(feedback.records)
    facts["prompts"] = len({key_of(record.prompt) for record in feedback.records})
    if feedback.undecided:
        facts["rows that prefer nothing"] = feedback.undecided
    facts["dropped records"] = len(feedback.dropped)
    advice = []
    if feedback.dropped:
        advice.append(f"{len(feedback.dropped)} records were dropped, the first for {feedback.dropped[0]}: mend them.")
    duplicates = sum(count - 1 for count in Counter(map(_identity, feedback.records)).values())
    facts["duplicates"] = duplicates
    if duplicates:
        advice.append(f"{duplicates} records say what another one says: drop them, or they weigh double.")
    ratings = _look_at_ratings(feedback, facts, advice) if feedback.form == "ratings" else []
    if feedback.form == "labels":
        good = sum(record.label for record in feedback.records)
        facts["good"], facts["bad"] = good, len(feedback.records) - good
        if good in (0, len(feedback.records)):
            advice.append("All labels are the same: nothing can be learned from one class; collect the other one too.")
    _look_at_pairs(feedback, facts, advice)
    if held_out is not None:
        _look_at_overlap(feedback, held_out, facts, advice)
    return FeedbackReport(facts, advice, ratings)


def _identity(record: Any) -> str:
    return repr([key_of(value) if isinstance(value, (str, list)) else value for value in vars(record).values()])


def _look_at_ratings(feedback: Feedback, facts: dict[str, Any], advice: list[str]) -> list[float]:
    by_answer = [without_nan(record.ratings) for record in feedback.records]
    counts = [len(ratings) for ratings in by_answer]
    every = [rating for ratings in by_answer for rating in ratings]
    facts["ratings"] = len(every)
    facts["ratings an answer"] = f"{min(counts)} to {max(counts)}"
    facts["mean rating"] = round(fmean(every), 3)
    facts["scale"] = f"{min(every):g} to {max(every):g}"
    if len(set(every)) == 1:
        advice.append("Every rating is the same: nothing can be learned from a constant; collect ratings that differ.")
    elif max(counts) == 1:
        advice.append("Each answer has one rater, so nobody knows how far raters agree: have some rated twice.")
    else:
        alpha = agreement_alpha([record.ratings for record in feedback.records])
        facts["Krippendorff's alpha (interval)"] = round(alpha, 3)
        if alpha < ALPHA_POOR:
            advice.append(
                f"Raters hardly agree (alpha {alpha:.2f}, below {ALPHA_POOR}): sharpen the instructions, or average "
                "more raters an answer; prefer pairs with a clear margin."
            )
        elif alpha < ALPHA_TENTATIVE:
            advice.append(f"Raters agree moderately (alpha {alpha:.2f}): weigh pairs by margin or agreement.")
    return every


def agreement_alpha(ratings: Sequence[Sequence[float]]) -> float:
    """Krippendorff's alpha for interval data: 1 perfect agreement, 0 that of chance.

        alpha = 1 - sum_u m_u var_u / (n var)

    over the answers u that m_u >= 2 raters rated, with n ratings in all; var_u is an answer's sample variance, var that
    of all n. Source: Krippendorff 2004, "Content Analysis", chapter 11, where 1 - D_o / D_e has squared differences
    between every two ratings: the same, but quadratic in the ratings.

    Args:
        ratings: a row for each answer, with a number for each rater, in any order; NaN where a rater gave none.
    """
    shared = [row for row in map(without_nan, ratings) if len(row) > 1]
    every = [rating for row in shared for rating in row]
    if len(set(every)) < 2:
        return 1.0  # no rater disagrees with another
    return 1 - sum(len(row) * variance(row) for row in shared) / (len(every) * variance(every))


def _look_at_pairs(feedback: Feedback, facts: dict[str, Any], advice: list[str]) -> None:
    try:
        pairs = to_preference(feedback, pairs_per_answer=MAX_PAIRS_PER_ANSWER)
    except FeedbackError:
        facts["pairs"] = 0
        advice.append("No pair can be made: use a rating or a good/bad objective, or collect several answers a prompt.")
        return
    facts["pairs"] = len(pairs)
    won: Counter[tuple[str, str, str]] = Counter()
    longer = unequal = 0
    for pair in pairs:
        chosen, rejected = key_of(pair["chosen"]), key_of(pair["rejected"])
        won[key_of(pair["prompt"]), chosen, rejected] += 1
        lengths = len(as_text(pair["chosen"])), len(as_text(pair["rejected"]))
        unequal += lengths[0] != lengths[1]
        longer += lengths[0] > lengths[1]
    contradictions = sum(a != b and (prompt, b, a) in won for prompt, a, b in won) // 2
    same = sum(a == b for _, a, b in won)
    cycles = _cycles(won)
    facts["identical answers in a pair"] = same
    facts["contradictory pairs"] = contradictions
    facts["prompts with a cycle of preferences"] = cycles
    facts["longer answer preferred"] = f"{longer / unequal:.1%}" if unequal else "no lengths differ"
    if same:
        advice.append(f"{same} pairs compare an answer with itself: drop them.")
    if contradictions:
        advice.append(f"{contradictions} pairs are preferred both ways: drop both, or keep the majority's verdict.")
    if cycles:
        advice.append(f"{cycles} prompts prefer A to B, B to C and C to A: ask again, or train on ratings instead.")
    share = longer / unequal if unequal else 0.5
    if max(share, 1 - share) > LENGTH_BIAS:
        which = "longer" if share > 0.5 else "shorter"
        advice.append(
            f"The {which} answer wins {max(share, 1 - share):.0%} of the pairs: a reward model will learn length. "
            "Balance the lengths, or add a length penalty to the reward."
        )


def _cycles(won: Counter[tuple[str, str, str]]) -> int:
    """Number of prompts whose preferences contain a cycle of three answers or more."""
    import networkx as nx

    graphs: dict[str, Any] = {}
    for prompt, chosen, rejected in won:
        if (prompt, rejected, chosen) not in won:  # two alone are a contradiction, counted elsewhere
            graphs.setdefault(prompt, nx.DiGraph()).add_edge(chosen, rejected)
    return sum(any(len(part) > 2 for part in nx.strongly_connected_components(graph)) for graph in graphs.values())


def _look_at_overlap(feedback: Feedback, held_out: Feedback, facts: dict[str, Any], advice: list[str]) -> None:
    train, test = ({key_of(record.prompt) for record in part.records} for part in (feedback, held_out))
    shared = len(train & test)
    facts["held-out prompts also in the training part"] = f"{shared} of {len(test)}"
    if shared and test != {""}:
        advice.append(f"{shared} held-out prompts are trained on as well: split by prompt (split_by_prompt).")


def draw_ratings(report: FeedbackReport, picture: Path) -> None:
    """Draw the histogram of single ratings.

    Raises:
        FeedbackError: there are none.
        ImportError: matplotlib is missing.
    """
    if not report.ratings:
        raise FeedbackError(f"There are no ratings to draw: it was read as {report.facts['read as']}.")
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("Pictures need matplotlib: pip install 'trl-ext[feedback]'.") from error
    figure = Figure(figsize=(6, 3), layout="constrained")
    axis = figure.subplots()
    values = sorted(set(report.ratings))
    if len(values) <= 21:
        counts = Counter(report.ratings)
        step = min((b - a for a, b in pairwise(values)), default=1.0)
        axis.bar(values, [counts[value] for value in values], width=0.85 * step, color="#0072b2")
    else:
        axis.hist(report.ratings, bins=30, color="#0072b2")
    axis.set_xlabel("rating")
    axis.set_ylabel("ratings")
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(picture)
