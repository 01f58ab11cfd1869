"""Who says which of two completions is better: scores, a language model behind a URL, or people."""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any, Protocol

from trl_ext.evaluation.comparisons import Comparison
from trl_ext.evaluation.sampling import Row, append, read_rows
from trl_ext.feedback.records import key_of
from trl_ext.rewards.loop import Loop
from trl_ext.rewards.remote import Refused, post
from trl_ext.types import as_text

KINDS = ("reward", "function", "url", "people")
RUBRIC = """\
You compare two answers to one request. Say which one serves the person who asked better: it does what was asked, what
it says is true, it is clear, and it is no longer than it needs to be. Length alone is no merit, nor is the order in
which the answers stand. Think first, in a few sentences. Then end with one line: [[A]] if answer A is better, [[B]]
if answer B is better, [[C]] if neither is."""
QUESTION = "[Request]\n{prompt}\n\n[Answer A]\n{first}\n\n[Answer B]\n{second}"
OF_ONE = (400, 413, 422)  # statuses by which a server refuses one question, and takes the next
REFUSALS = 64  # of one question each, and no verdict, after which nothing more is asked
UNREADABLE = 8  # replies without a verdict, and none with one, after which nothing more is asked


class JudgeError(ValueError):
    """A judge that is gone or cannot be understood; one sentence with what to do."""


class Judge(Protocol):
    """Whoever compares completions.

    Attributes:
        name: for tables.
    """

    name: str

    def __call__(self, pairs: Sequence[tuple[Row, Row]]) -> list[float | None]:
        """Of each pair of rows 1.0 where the first is better, 0.0 where the second is, 0.5 for a tie; None for no
        verdict."""
        ...


@dataclass(frozen=True)
class Spec:
    """What `--judge` says.

    Attributes:
        kind: "reward", "function", "url" or "people".
        value: the folder, the dotted path, or the URL.
        model: behind the URL.
        function: that the dotted path names.
    """

    kind: str
    value: str = ""
    model: str = ""
    function: Any = None

    def __str__(self) -> str:
        value = f"{self.model}@{self.value}" if self.model else self.value
        return f"{self.kind}:{value}" if value else self.kind

    @classmethod
    def of(cls, text: str) -> Spec:
        """`text` is reward:FOLDER, function:PATH, url:MODEL@URL or people.

        Raises:
            ValueError: it is something else.
        """
        kind, _, value = text.partition(":")
        if kind == "people" and not value:
            return cls(kind)
        if kind not in KINDS or kind == "people" or not value:
            raise ValueError(f"The judge {text!r} must be reward:FOLDER, function:PATH, url:MODEL@URL or people.")
        if kind != "url":
            return cls(kind, value)
        model, at, url = value.rpartition("@")
        if not (model and at and re.match(r"https?://[^/]", url)):
            raise ValueError(f"The judge {text!r} must be url:MODEL@URL, as in url:my-model@http://127.0.0.1:8000/v1.")
        return cls(kind, url, model)


def pairs_of(rows: Sequence[Row], policies: Sequence[str]) -> list[tuple[Row, Row]]:
    """What is compared: of each two policies, the completions with the same number to each prompt; of a prompt that
    stands there twice, each policy's first to it with the others' first."""
    found: dict[tuple[tuple[str, int, int], str], Row] = {}
    times = Counter[tuple[str, int, str]]()
    for row in rows:
        asked = key_of(row["prompt"]), row["sample"]
        found[(*asked, times[*asked, row["policy"]]), row["policy"]] = row
        times[*asked, row["policy"]] += 1
    samples = dict.fromkeys(which for which, _ in found)
    return [
        (found[which, a], found[which, b])
        for a, b in combinations(policies, 2)
        for which in samples
        if (which, a) in found and (which, b) in found
    ]


def compared(judge: Judge, pairs: Sequence[tuple[Row, Row]]) -> list[Comparison]:
    """What `judge` says about the pairs; those without a verdict are left out. Equal completions are a tie, about which
    nobody is asked."""
    unlike = [i for i, (a, b) in enumerate(pairs) if a["completion"] != b["completion"]]
    outcomes: dict[int, float | None] = dict.fromkeys(range(len(pairs)), 0.5)
    outcomes |= zip(unlike, judge([pairs[i] for i in unlike]), strict=True)
    return [_comparison(*pairs[i], outcome, judge.name, None) for i, outcome in outcomes.items() if outcome is not None]


def _comparison(a: Row, b: Row, outcome: float, judge: str, rater: str | None) -> Comparison:
    return Comparison(
        *(key_of(a["prompt"]), a["policy"], b["policy"], outcome, a["tokens"], b["tokens"], judge, rater),
        *(a["id"], b["id"]),
    )


# Scores --------------------------------------------------------------------------------------------------------------


class ScoreJudge:
    """The completion with the higher score is better.

    Args:
        name: of the reward among the rows' scores.
        rows: all that it will be asked about.
    """

    def __init__(self, name: str, rows: Sequence[Row]) -> None:
        self.name, self.scores = name, {row["id"]: row["scores"][name] for row in rows}

    def __call__(self, pairs: Sequence[tuple[Row, Row]]) -> list[float | None]:
        """See `Judge`."""
        return [self._outcome(self.scores[a["id"]], self.scores[b["id"]]) for a, b in pairs]

    def _outcome(self, a: float | None, b: float | None) -> float | None:
        return None if a is None or b is None else 0.5 if a == b else float(a > b)


# A language model ----------------------------------------------------------------------------------------------------


class ModelJudge:
    """A language model behind an OpenAI-compatible URL, asked about each pair in both orders, since such judges prefer
    a side (Zheng et al. 2023, arXiv:2306.05685, section 3.4): where the orders disagree, it is a tie.

    What it said is kept in a file, by question, and asked once; only replies without a verdict are asked for again.

    Args:
        model: its name at the server.
        url: up to and with /v1, or the whole of .../chat/completions; nothing else is contacted.
        file: where the replies are kept, .jsonl.
        rubric: what the judge is told to go by; it must end its reply with [[A]], [[B]] or [[C]].
        key: sent as a bearer token.
        concurrency: requests at a time.
        timeout: seconds a request may take.
        retries, backoff: as in `trl_ext.rewards.remote`.

    Raises:
        ImportError: httpx2 is missing.
    """

    def __init__(
        self,
        model: str,
        url: str,
        file: Path,
        rubric: str = RUBRIC,
        key: str | None = None,
        concurrency: int = 8,
        timeout: float = 120.0,
        retries: int = 4,
        backoff: float = 0.5,
    ) -> None:
        try:
            import httpx2
        except ImportError as error:
            raise ImportError("A judge behind a URL needs httpx2: pip install 'trl-ext[remote]'.") from error
        self.name = model
        self.url = url.rstrip("/") + ("" if url.rstrip("/").endswith("/chat/completions") else "/chat/completions")
        self.file, self.rubric, self._concurrency = file, rubric, concurrency
        self._retries, self._backoff, self._loop = retries, backoff, Loop()
        headers = {"Authorization": f"Bearer {key}"} if key else None
        self._client = lambda: httpx2.AsyncClient(timeout=timeout, headers=headers, follow_redirects=False)

    def __call__(self, pairs: Sequence[tuple[Row, Row]]) -> list[float | None]:
        """See `Judge`.

        Raises:
            JudgeError: the judge cannot be reached, or it refuses all that it is asked, or none of its replies has a
                verdict.
        """
        both = [(self._payload(a, b), self._payload(b, a)) for a, b in pairs]
        known = {name: row["verdict"] for name, row in read_rows(self.file, "question").items()}
        unknown = {name: payload for orders in both for payload in orders if (name := _name(payload)) not in known}
        self._loop.run(self._ask_all(unknown, known))
        return [_of_both(*(known.get(_name(payload)) for payload in orders)) for orders in both]

    def _payload(self, first: Row, second: Row) -> dict[str, Any]:
        asked = QUESTION.format(
            prompt=_shown(first["prompt"]), first=_shown(first["completion"]), second=_shown(second["completion"])
        )
        messages = [{"role": "system", "content": self.rubric}, {"role": "user", "content": asked}]
        return {"model": self.name, "messages": messages, "temperature": 0}

    async def _ask_all(self, unknown: Mapping[str, dict[str, Any]], known: dict[str, str]) -> None:
        slots, refused, unreadable = asyncio.Semaphore(self._concurrency), dict[str, Refused](), list[str]()
        troubles: list[Exception] = []  # after the first one nothing more is asked, and what is under way is waited for

        async def ask(client: Any, name: str, payload: dict[str, Any]) -> None:
            async with slots:
                if troubles:
                    return
                try:
                    response = await post(client, asyncio.Semaphore(), self.url, payload, self._retries, self._backoff)
                    reply = _content(response)
                    verdict = verdict_of(reply)
                except ConnectionError as error:
                    if isinstance(error, Refused) and error.status in OF_ONE:  # it may be too long for the model
                        refused[name] = error
                    if name not in refused or (len(refused) >= REFUSALS and not known):
                        troubles.append(error)
                    return
            if verdict is not None:
                known[name] = verdict
                append(self.file, [{"question": name, "verdict": verdict, "reply": reply, "model": self.name}])
                return
            unreadable.append(reply)
            if not known and len(unreadable) >= min(UNREADABLE, len(unknown) - len(refused)):
                troubles.append(JudgeError(f"names no winner: it said {reply[-80:]!r}"))

        async with self._client() as client:
            await asyncio.gather(*(ask(client, name, payload) for name, payload in unknown.items()))
        if refused and not known and not unreadable and all(trouble in refused.values() for trouble in troubles):
            raise JudgeError(f"The judge {self.name!r} refuses all that it is asked: {next(iter(refused.values()))}.")
        for trouble in troubles:
            if isinstance(trouble, JudgeError):
                remedy = "the rubric has to tell it to end with [[A]], [[B]] or [[C]]"
                raise JudgeError(f"The judge {self.name!r} {trouble}; {remedy}.")
            raise JudgeError(
                f"The judge {self.name!r} is gone: {trouble}; what it said so far is kept in {self.file}, and the same "
                "command goes on from there."
            )


def verdict_of(reply: str) -> str | None:
    """The last [[A]], [[B]] or [[C]] of a judge's reply; None where there is none."""
    found: list[str] = re.findall(r"\[\[([ABC])\]\]", reply)
    return found[-1] if found else None


def _of_both(as_asked: str | None, swapped: str | None) -> float | None:
    """The outcome for the first of a pair from its two verdicts, the second one in the other order."""
    if as_asked is None or swapped is None:
        return None
    agreed = {("A", "B"): 1.0, ("B", "A"): 0.0}
    return agreed.get((as_asked, swapped), 0.5)


def _content(response: Any) -> str:
    try:
        return str(response.json()["choices"][0]["message"]["content"] or "")
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise ConnectionError(f"what it answers is no chat completion, but {response.text[:80]!r}") from error


def _name(payload: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(payload, sort_keys=True).encode()).hexdigest()[:32]


def _shown(item: Any) -> str:
    """A prompt or completion as the judge reads it; of a conversation with several messages, who says what."""
    if isinstance(item, str) or len(item) == 1:
        return as_text(item)
    return "\n\n".join(f"{message['role']}: {as_text([message])}" for message in item)


# People --------------------------------------------------------------------------------------------------------------


Said = tuple[str, str, float, str | None]


def by_people(said: Iterable[Said], rows: Sequence[Row]) -> list[Comparison]:
    """What people said about pairs of these rows' completions.

    Args:
        said: ids of two rows; 1.0 where the first is better, 0.5 for a tie, 0.0 where the second is; and who said so.
            Pairs of one policy, and of other rows, say nothing here.
        rows: as `sample` makes them.
    """
    found = {row["id"]: row for row in rows}
    known = ((found[a], found[b], outcome, rater) for a, b, outcome, rater in said if a in found and b in found)
    return [_comparison(a, b, x, "people", rater) for a, b, x, rater in known if a["policy"] != b["policy"]]
