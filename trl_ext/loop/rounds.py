"""Where the files of a round lie. What bears its name is whole: it is written elsewhere first, and then moved."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

UNFINISHED = ".unfinished"  # behind the name of a folder that a stage is at work in


@dataclass(frozen=True)
class Round:
    """One turn of the circle.

    Attributes:
        out: the folder of the whole loop.
        number: from 1.
    """

    out: Path
    number: int

    @property
    def name(self) -> str:
        """Of its policy: "base" before the first round, then "round_1", ..."""
        return f"round_{self.number}" if self.number else "base"

    @property
    def before(self) -> Round:
        """The round before it; before the first, one that has no files."""
        return Round(self.out, self.number - 1)

    @property
    def folder(self) -> Path:
        return self.out / self.name

    @property
    def sampled(self) -> Path:
        """All answers that were sampled."""
        return self.folder / "answers.all.jsonl"

    @property
    def answers(self) -> Path:
        """Those that are to be judged."""
        return self.folder / "answers.jsonl"

    @property
    def store(self) -> Path:
        """What people said on the page, as they say it."""
        return self.folder / "ratings.sqlite"

    @property
    def judged(self) -> Path:
        """What a rater that is no person said, as it says it."""
        return self.folder / "judged.jsonl"

    @property
    def feedback(self) -> Path:
        return self.folder / "feedback.jsonl"

    @property
    def reward(self) -> Path:
        return self.folder / "reward"

    @property
    def ppo(self) -> Path:
        return self.folder / "ppo"

    @property
    def compared(self) -> Path:
        """Answers to held-out prompts, and what is made of them."""
        return self.folder / "evaluation"

    @property
    def to_compare(self) -> Path:
        """Answers of this policy and the one before, where people compare them."""
        return self.folder / "to_compare.jsonl"

    @property
    def compared_store(self) -> Path:
        """What they said, as they say it."""
        return self.folder / "compared.sqlite"

    @property
    def evaluation(self) -> Path:
        return self.folder / "evaluation.json"

    def rewards(self, ensemble: int) -> list[Path]:
        """The folder of each reward model; none before the first round."""
        if not self.number:
            return []
        return [self.reward] if ensemble == 1 else [self.reward / str(i) for i in range(ensemble)]


def unfinished(folder: Path) -> Path:
    """Where what will be `folder` is made."""
    return folder.with_name(folder.name + UNFINISHED)
