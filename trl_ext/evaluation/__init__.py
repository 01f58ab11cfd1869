"""Policies side by side on held-out prompts: their answers, figures, and win rates, each with its interval."""

from trl_ext.evaluation.comparisons import (
    Agreement,
    Comparison,
    Interval,
    WinRate,
    agreement,
    bootstrap,
    bradley_terry,
    cohen_kappa,
    length_controlled,
    prompts_needed,
    strengths,
    win_rates,
)
from trl_ext.evaluation.evaluating import evaluate
from trl_ext.evaluation.figures import figures
from trl_ext.evaluation.judges import RUBRIC, Judge, JudgeError, ModelJudge, ScoreJudge, Spec, by_people
from trl_ext.evaluation.picking import WAYS, check_pick, pick
from trl_ext.evaluation.policies import Cast, Policies
from trl_ext.evaluation.result import print_result, section
from trl_ext.evaluation.sampling import Row, Sampling, read_rows, sample, write_rows

__all__ = [
    "RUBRIC",
    "WAYS",
    "Agreement",
    "Cast",
    "Comparison",
    "Interval",
    "Judge",
    "JudgeError",
    "ModelJudge",
    "Policies",
    "Row",
    "Sampling",
    "ScoreJudge",
    "Spec",
    "WinRate",
    "agreement",
    "bootstrap",
    "bradley_terry",
    "by_people",
    "check_pick",
    "cohen_kappa",
    "evaluate",
    "figures",
    "length_controlled",
    "pick",
    "print_result",
    "prompts_needed",
    "read_rows",
    "sample",
    "section",
    "strengths",
    "win_rates",
    "write_rows",
]
