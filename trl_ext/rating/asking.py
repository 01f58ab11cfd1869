"""What a rater is asked next: something new, an item again, or one whose answer is known."""

from __future__ import annotations

from dataclasses import dataclass

ATTENTION_EVERY = 10  # items between two whose answer is known, at most
REPEAT_AFTER = 5  # judgements between an item and its repeat, at least


@dataclass(frozen=True)
class History:
    """How often a rater was asked so far, by kind."""

    ask: int = 0
    repeat: int = 0
    attention: int = 0


def due(history: History, repeats: float, attention_every: int) -> list[str]:
    """Kinds of question, the one that is due first; those after it serve where there is none of a kind.

    Args:
        repeats: the share of a rater's items that are asked a second time. Attention items are not counted.
        attention_every: an attention item comes after every so many others.
    """
    others = history.ask + history.repeat
    kinds = ["ask"]
    if history.repeat + 1 <= repeats * (others + 1) + 1e-9:
        kinds.insert(0, "repeat")
    if history.attention < others // attention_every:
        kinds.insert(0, "attention")
    return kinds


def attention_every(items: int, attention: int) -> int:
    """So many others between attention items that all of these find a place."""
    return max(1, min(ATTENTION_EVERY, items // (attention + 1)))
