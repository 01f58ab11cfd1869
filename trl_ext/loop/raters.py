"""Who judges a round's answers. Whatever a judgement cost, it is on the disk before the next one is asked for."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from trl_ext import evaluation
from trl_ext.evaluation import Row, read_rows, write_rows
from trl_ext.evaluation.judges import pairs_of
from trl_ext.evaluation.sampling import append
from trl_ext.loop.picking import NothingNew
from trl_ext.loop.rounds import Round
from trl_ext.rating import MODES, Store, export
from trl_ext.rating.answers import Answer, Item, fingerprint, items_of, read_answers
from trl_ext.rating.exporting import feedback_rows
from trl_ext.rating.modes import STARS, Mode, Verdict

AT_A_TIME = 16  # answers that a rater is asked about before what it said is written down
Ask = Callable[[Sequence[Row]], Sequence[float | None]]


class Waiting(ValueError):
    """The loop waits for people; one sentence with what they are to do."""


class RaterError(ValueError):
    """A rater that is gone or makes no sense; one sentence with what to do."""


# No person -----------------------------------------------------------------------------------------------------------


def rate_by_numbers(round_: Round, mode_name: str, budget: int, ask: Ask, name: str) -> None:
    """Let a function judge what people would be asked on the page, and write the round's feedback.

    Stars are the function's own numbers; of pairs and rankings the higher number is better; a label is good above 0.

    Args:
        ask: a number for each row, None where it cannot tell. Reward functions and reward models are such.
        name: of the rater, for messages and the column `rater`.

    Raises:
        RaterError: it failed, or its numbers are no stars; what it said before is kept.
        NothingNew: it said nothing that makes feedback.
    """
    mode, (answers, _) = MODES[mode_name], read_answers(round_.answers)
    rows = list(read_rows(round_.answers).values())
    items = [item for item in items_of(answers, mode, fingerprint(answers)) if item.kind == "ask"][:budget]
    wanted = [rows[number] for number in dict.fromkeys(number for item in items for number in item.answers)]
    numbers = _asked(round_.judged, wanted, ask, name)
    feedback = [row for item in items if (row := _row_of(item, answers, numbers, mode, name)) is not None]
    if not feedback:
        raise NothingNew(f"the rater {name} prefers nothing among {len(items)} items: there is nothing to learn.")
    write_rows(round_.feedback, feedback)


def _asked(file: Path, rows: Sequence[Row], ask: Ask, name: str) -> dict[str, float | None]:
    """What the rater said about each row, by id; only what is not in the file is asked."""
    said = {key: row["said"] for key, row in read_rows(file).items()}
    missing = [row for row in rows if row["id"] not in said]
    for start in range(0, len(missing), AT_A_TIME):
        part = missing[start : start + AT_A_TIME]
        try:
            numbers = list(ask(part))
        except Exception as error:
            raise RaterError(
                f"The rater {name} failed ({error}) after {len(said):,} answers, which are kept in {file}: mend it, "
                "and give the same command again."
            ) from error
        fresh = {row["id"]: number for row, number in zip(part, numbers, strict=True)}
        append(file, [{"id": key, "said": number} for key, number in fresh.items()])
        said |= fresh
    return said


def _row_of(
    item: Item, answers: Sequence[Answer], numbers: Mapping[str, float | None], mode: Mode, name: str
) -> Row | None:
    """The item as feedback; None where the rater cannot tell, or ties a pair."""
    asked = [answers[number] for number in item.answers]
    said = [numbers[answer.id] for answer in asked]
    known = [number for number in said if number is not None and not math.isnan(number)]
    if len(known) < len(said):
        return None
    row = mode.row([answer.completion for answer in asked], _verdict(known, mode, name))
    return None if row is None else {"prompt": asked[0].prompt, **row, "rater": name, "seconds": None}


def _verdict(numbers: Sequence[float], mode: Mode, name: str) -> Verdict:
    if mode.name == "labels":
        return tuple(int(number > 0) for number in numbers)
    if mode.name == "stars":
        if odd := [number for number in numbers if number not in STARS]:
            raise RaterError(
                f"The rater {name} said {odd[0]:g}, which is no number of stars from 1 to 5: let it give stars, or "
                "set mode to pairs or ranking in another output_dir."
            )
        return tuple(int(number) for number in numbers)
    order = sorted(set(numbers), reverse=True)
    return tuple(1 + order.index(number) for number in numbers)


# People --------------------------------------------------------------------------------------------------------------


def rate_on_page(round_: Round, mode: str, budget: int, port: int, browser: bool) -> None:
    """Serve the page until as many items are judged as the budget has, and write the round's feedback.

    Raises:
        NothingNew: nothing that was said makes feedback.
        Waiting, OSError, StoreError, ImportError: as `asked_on_page`.
    """
    with asked_on_page(round_, round_.store, round_.answers, mode, budget, port, browser) as store:
        rows, _ = feedback_rows(store.annotations(), store.mode)
        if not rows:
            raise NothingNew("nobody could tell anything about its answers, or all that was said are ties.")
        exported = export(store, round_.feedback)
        print(exported, end="\n" if str(exported) else "", flush=True)


def compare_on_page(
    round_: Round, rows: Sequence[Row], budget: int, port: int, browser: bool
) -> list[evaluation.Comparison]:
    """What people say about this policy's answers beside those of the one before.

    Args:
        rows: answers to the same prompts, as `evaluation.evaluate` gives them.
        budget: most pairs.

    Raises:
        NothingNew: the two say the same to every prompt, or nobody could tell.
        Waiting, OSError, StoreError, ImportError: as `asked_on_page`.
    """
    two = [row for row in rows if row["policy"] in (round_.name, round_.before.name)]
    if all(a["completion"] == b["completion"] for a, b in pairs_of(two, (round_.before.name, round_.name))):
        raise NothingNew("its policy says what the one before said, to every held-out prompt.")
    if not round_.to_compare.is_file():
        write_rows(round_.to_compare, two)
    with asked_on_page(round_, round_.compared_store, round_.to_compare, "pairs", budget, port, browser) as store:
        said = evaluation.by_people(((c.id_a, c.id_b, c.outcome, c.rater) for c in store.comparisons()), two)
        if not said:
            raise NothingNew("nobody could tell which policy's answers are better.")
        return said


@contextmanager
def asked_on_page(
    round_: Round, file: Path, answers: Path, mode: str, budget: int, port: int, browser: bool
) -> Iterator[Store]:
    """The store, once as many items are judged as the budget has; until then the page is served.

    Raises:
        Waiting: it was stopped before.
        OSError: the port is taken.
        StoreError: another process serves the same store.
        ImportError: the extra `rate` is not installed.
    """
    serve = page()
    with Store.open(file, answers, mode) as store:
        wanted = min(budget, store.items)
        if not _is_judged(file, wanted):
            print(f"Round {round_.number}: {wanted - store.done:,} judgements to go, on this page:", flush=True)
            serve(store, port=port, browser=browser, until=lambda: _is_judged(file, wanted))
        if not _is_judged(file, wanted):
            with Store.read(file) as read:
                done = read.done
            raise Waiting(
                f"Round {round_.number} has {done:,} of {wanted:,} judgements, which are kept: give the same command "
                "again to go on."
            )
        yield store


def page() -> Callable[..., None]:
    """What serves it.

    Raises:
        ImportError: the extra `rate` is not installed.
    """
    try:
        from trl_ext.rating.serving import serve
    except ImportError as error:
        raise ImportError(f"The page needs {error.name}: pip install 'trl-ext[rate]'.") from error
    return serve


def _is_judged(file: Path, wanted: int) -> bool:
    """Whether the budget is spent, or nothing is left that nobody has skipped. Read beside the server."""
    with Store.read(file) as store:
        return store.done >= wanted or store.untouched() == 0


def wait_for_file(round_: Round) -> None:
    """Say which file people are to put where.

    Raises:
        Waiting: it is not there yet.
    """
    if not round_.feedback.is_file():
        raise Waiting(
            f"Round {round_.number} waits for feedback: judge the answers in {round_.answers}, put what was said into "
            f"{round_.feedback} (trl-ext rate ... --export writes such a file), and give the same command again."
        )
