"""What a rule returns: a named problem, its evidence, and the remedy."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from trl_ext.diagnostics.limits import Limits
from trl_ext.diagnostics.log import RunLog, Sample

SEVERITIES = ("problem", "warning")


@dataclass(frozen=True, kw_only=True)
class Remedy:
    """What cures a problem.

    Attributes:
        text: one or two sentences.
        changes: config fields and their new values, exact; empty where the cure is not a setting.
        code: lines of code, where the cure is not a setting.
        moves: the logged metric that it moves; empty where nobody said.
        direction: where to, "up" or "down".
    """

    text: str
    changes: dict[str, Any] = field(default_factory=dict)
    code: str = ""
    moves: str = ""
    direction: str = ""

    def __str__(self) -> str:
        settings = ", ".join(f"{name}={value!r}" for name, value in self.changes.items())
        return " ".join(part for part in (self.text, settings and f"Set {settings}.", self.code, self.aim) if part)

    @property
    def aim(self) -> str:
        """What it moves, as a sentence; empty where nobody said."""
        verb = {"up": "raise", "down": "lower"}.get(self.direction)
        return f"This should {verb} {self.moves.rstrip('/')}." if verb else ""


@dataclass(frozen=True, kw_only=True)
class Suspect:
    """One of several causes that the log cannot tell apart.

    Attributes:
        cause: what it may be.
        experiment: what to try or to look at, and what it shows if this is the cause.
        changes: the settings of that experiment; empty where it is not one of settings.
    """

    cause: str
    experiment: str
    changes: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        settings = ", ".join(f"{name}={value!r}" for name, value in self.changes.items())
        return f"{self.cause}: {f'with {settings}, ' if settings else ''}{self.experiment}"


# Where the log does not show the cause: how that is said, and the remedy in the place of one.
CANNOT_TELL = "I cannot tell"
TRY_EACH = Remedy(text="Try these, one at a time: each tells one cause from the others.")


@dataclass(frozen=True, kw_only=True)
class Finding:
    """A problem, named.

    Attributes:
        name: of the catalogue, as in "kl_runs_away"; its page is docs/diagnostics/<name>.md.
        severity: "problem": the run is not doing what it is meant to; "warning": look at it.
        title: the same in words.
        steps: optimizer steps between which the evidence was seen.
        evidence: one sentence with the figures.
        figures: the same by name.
        samples: completions, where they tell more.
        cause: the likely one.
        remedy: what cures it.
        suspects: the likeliest causes, where the log cannot tell which it is; the remedy then has no settings.
        from_the_start: it was there in the first rollout, before a step was taken.
        explains: findings of this run that follow from it, each with the mechanism and its source, where that depends
            on the run; what always holds is in `graph.EDGES`.
    """

    name: str
    severity: str
    title: str
    steps: tuple[int, int]
    evidence: str
    figures: dict[str, float]
    cause: str
    remedy: Remedy
    samples: list[Sample] = field(default_factory=list)
    suspects: tuple[Suspect, ...] = ()
    from_the_start: bool = False
    explains: dict[str, tuple[str, str]] = field(default_factory=dict)

    @property
    def page(self) -> str:
        """The page of the docs that explains it, which `trl-ext explain <name>` prints."""
        return f"docs/diagnostics/{self.name}.md"

    @property
    def topic(self) -> str:
        """Under which it is told once: its name; of settings, with which they are."""
        settings = [name.removeprefix("times_off/") for name in self.figures if name.startswith("times_off/")]
        return f"{self.name} {' '.join(sorted(settings))}".strip()

    def __str__(self) -> str:
        when = f"steps {self.steps[0]} to {self.steps[1]}" if self.steps[1] else "before the first step"
        return (
            f"{self.severity}: {self.title} ({when}). {self.evidence} "
            f"Likely cause: {self.cause} Remedy: {self.remedy} "
            f"{''.join(f'Perhaps {suspect} ' for suspect in self.suspects)}More: trl-ext explain {self.name}."
        )


def worst(findings: Iterable[Finding]) -> str:
    """The worst severity of some findings, at least one."""
    return min((finding.severity for finding in findings), key=SEVERITIES.index)


Rule = Callable[[RunLog, Limits], Finding | None]
