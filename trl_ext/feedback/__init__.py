"""Human feedback of every form: read, checked, converted to the rows that trainers take."""

from trl_ext._moved import moved
from trl_ext.feedback.balancing import balance_labels, balance_lengths
from trl_ext.feedback.checking import FeedbackReport, agreement_alpha, check, draw_ratings
from trl_ext.feedback.converting import (
    agreement,
    split_by_prompt,
    to_preference,
    to_prompts,
    to_rankings,
    to_ratings,
    to_rows,
    to_unpaired,
)
from trl_ext.feedback.files import FeedbackError, Unusable
from trl_ext.feedback.forms import FORMS, Form
from trl_ext.feedback.judging import Judgement, ScoredAnswer, judge, save_judgement
from trl_ext.feedback.layouts import LAYOUTS, Layout, Made
from trl_ext.feedback.reading import Feedback, Prompts, read, read_prompts, rows_of
from trl_ext.feedback.records import Label, Pair, Problem, Ranking, Rating, Record

__all__ = [
    "FORMS",
    "LAYOUTS",
    "Feedback",
    "FeedbackError",
    "FeedbackReport",
    "Form",
    "Judgement",
    "Label",
    "Layout",
    "Made",
    "Pair",
    "Problem",
    "Prompts",
    "Ranking",
    "Rating",
    "Record",
    "ScoredAnswer",
    "Unusable",
    "agreement",
    "agreement_alpha",
    "balance_labels",
    "balance_lengths",
    "check",
    "draw_ratings",
    "judge",
    "read",
    "read_prompts",
    "rows_of",
    "save_judgement",
    "split_by_prompt",
    "to_preference",
    "to_prompts",
    "to_rankings",
    "to_ratings",
    "to_rows",
    "to_unpaired",
]

__getattr__ = moved(__name__, {"Judged": "trl_ext.feedback.ScoredAnswer", "Report": "trl_ext.feedback.FeedbackReport"})
