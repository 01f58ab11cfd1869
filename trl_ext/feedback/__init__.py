"""Human feedback in every form: read, looked at, converted to what trainers take."""

from trl_ext.feedback.checking import Report, agreement_alpha, check, draw_ratings
from trl_ext.feedback.converting import (
    agreement,
    balance_labels,
    balance_lengths,
    split_by_prompt,
    to_preference,
    to_prompts,
    to_rankings,
    to_ratings,
    to_unpaired,
)
from trl_ext.feedback.files import FeedbackError
from trl_ext.feedback.judging import Judged, Judgement, judge, save_judgement
from trl_ext.feedback.reading import FORMS, Feedback, read
from trl_ext.feedback.records import Label, Pair, Problem, Ranking, Rating, Record

__all__ = [
    "FORMS",
    "Feedback",
    "FeedbackError",
    "Judged",
    "Judgement",
    "Label",
    "Pair",
    "Problem",
    "Ranking",
    "Rating",
    "Record",
    "Report",
    "agreement",
    "agreement_alpha",
    "balance_labels",
    "balance_lengths",
    "check",
    "draw_ratings",
    "judge",
    "read",
    "save_judgement",
    "split_by_prompt",
    "to_preference",
    "to_prompts",
    "to_rankings",
    "to_ratings",
    "to_unpaired",
]
