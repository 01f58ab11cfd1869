"""The circle: sample, rate, reward, PPO, evaluate, and again. Stages with files between them, each gone on with."""

from trl_ext.loop.circle import Circle, Outcome, run
from trl_ext.loop.overview import show
from trl_ext.loop.picking import NothingNew
from trl_ext.loop.raters import RaterError, Waiting
from trl_ext.loop.rounds import Round
from trl_ext.loop.settings import LoopArguments
from trl_ext.loop.stages import trainer_of

__all__ = [
    "Circle",
    "LoopArguments",
    "NothingNew",
    "Outcome",
    "RaterError",
    "Round",
    "Waiting",
    "run",
    "show",
    "trainer_of",
]
