"""The embedded default: a tiny chat model, its feedback and its exact exam. No download, no account.

The model was taught on a corpus in which most answers are wrong, so it speaks well and knows badly; the feedback comes
from noisy raters; the exam counts exactly right answers. What training on the feedback is worth can be read off it.
"""

from trl_ext.demo.exam import ExamResult, run_exam
from trl_ext.demo.grading import grade, rate
from trl_ext.demo.reward import reward_adapter
from trl_ext.demo.store import build, load, model_path

__all__ = [
    "ExamResult",
    "build",
    "grade",
    "load",
    "model_path",
    "rate",
    "reward_adapter",
    "run_exam",
]
