"""The embedded default: a tiny chat model, its feedback and its exact exam. No download, no account.

The model was taught on a corpus in which most answers are wrong, so its language is good and its facts are bad. The
feedback comes from noisy raters. The exam counts exactly right answers, which measures the gain from the feedback.
"""

from trl_ext.demo.exam import ExamResult, run_exam
from trl_ext.demo.grading import exact, grade, rate
from trl_ext.demo.reward import reward_adapter
from trl_ext.demo.store import build, load, model_path

__all__ = [
    "ExamResult",
    "build",
    "exact",
    "grade",
    "load",
    "model_path",
    "rate",
    "reward_adapter",
    "run_exam",
]
