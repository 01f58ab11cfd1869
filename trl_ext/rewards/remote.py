"""A reward function that asks a server, over HTTP."""

from __future__ import annotations

import asyncio
import inspect
import random
from collections.abc import Sequence
from keyword import iskeyword
from typing import Any

RETRIED = {408, 425, 429, 500, 502, 503, 504}


class Refused(ConnectionError):
    """A server answered with a status that no retry changes.

    Attributes:
        status: the number.
    """

    def __init__(self, url: str, status: int, text: str) -> None:
        super().__init__(f"{url} answered status {status}: {text[:200]!r}")
        self.status = status


def remote(
    url: str,
    columns: Sequence[str] = (),
    batch_size: int = 32,
    concurrency: int = 4,
    timeout: float = 30.0,
    retries: int = 4,
    backoff: float = 0.5,
    headers: dict[str, str] | None = None,
) -> Any:
    """A reward function that asks a server: batches side by side, each with a time-out and retried with growing pauses.

    A request is POST <url> with the JSON {"prompts": [...], "completions": [...], further columns}; the response is the
    JSON {"scores": [...]}, one number or null a completion. Only this URL is contacted; redirects are not followed.

    Args:
        url: of the server.
        columns: further dataset columns to send along.
        batch_size: completions a request.
        concurrency: requests at a time.
        timeout: seconds a request may take.
        retries: further attempts after a time-out, a lost connection or one of the statuses in `RETRIED`.
        backoff: seconds before the first retry; doubled each time, with up to half as much again at random.
        headers: sent along, for a token say.

    Returns:
        A coroutine function `remote(prompts, completions, **columns)`. It raises ConnectionError where the server
        could not be reached, or failed, after all retries, and ValueError where it returned something else than one
        score per completion.

    Raises:
        ImportError: httpx2 is missing.
        ValueError: no http or https URL.
    """
    try:
        import httpx2
    except ImportError as error:
        raise ImportError("The remote reward needs httpx2: pip install 'trl-ext[remote]'.") from error
    if not url.startswith(("http://", "https://")):
        raise ValueError(f"The remote reward's URL {url!r} must begin with http:// or https://.")

    async def remote(prompts: Sequence[Any], completions: Sequence[Any], **extra: Any) -> list[float | None]:
        if missing := [name for name in columns if name not in {"prompts", "completions", *extra}]:
            raise ValueError(f"the dataset has no column {missing[0]!r}, which is to be sent along")
        payload = {
            **{name: extra[name] for name in columns if name in extra},
            "prompts": prompts,
            "completions": completions,
        }
        parts = [
            {name: list(values[start : start + batch_size]) for name, values in payload.items()}
            for start in range(0, len(completions), batch_size)
        ]
        gate = asyncio.Semaphore(concurrency)
        async with httpx2.AsyncClient(timeout=timeout, headers=headers, follow_redirects=False) as client:
            scored = await asyncio.gather(*(ask(client, gate, part) for part in parts))
        return [score for part in scored for score in part]

    async def ask(client: Any, gate: asyncio.Semaphore, part: dict[str, list[Any]]) -> list[float | None]:
        response = await post(client, gate, url, part, retries, backoff)
        return _scores(response, len(part["completions"]), url)

    # So that what is not there is missed before the run; a name that is none in Python, when it is sent.
    names = dict.fromkeys(["prompts", "completions", *columns])
    asked = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY)
        for name in names
        if name.isidentifier() and not iskeyword(name)
    ]
    if len(asked) < len(names):
        asked.append(inspect.Parameter("extra", inspect.Parameter.VAR_KEYWORD))
    remote.__signature__ = inspect.Signature(asked)  # type: ignore[attr-defined]
    return remote


# `from trl_ext.rewards import remote` gave this module before it gave the function: `remote.remote` works as it did.
remote.remote = remote  # type: ignore[attr-defined]


async def post(
    client: Any, gate: asyncio.Semaphore, url: str, payload: Any, retries: int = 4, backoff: float = 0.5
) -> Any:
    """The response of status 200 to a POST of JSON, after retries where they may help.

    Args:
        client: an httpx2.AsyncClient.
        gate: how many may be under way at a time.
        retries, backoff: as in `remote`.

    Raises:
        ConnectionError: the server could not be reached, or failed, after all retries; `Refused`: it refused.
    """
    import httpx2

    failure = ""
    for attempt in range(retries + 1):
        if attempt:
            await asyncio.sleep(backoff * 2 ** (attempt - 1) * (1 + random.random() / 2))
        try:
            async with gate:
                response = await client.post(url, json=payload)
        except httpx2.TransportError as error:
            failure = f"{type(error).__name__}: {error}"
            continue
        if response.status_code in RETRIED:
            failure = f"status {response.status_code}"
            continue
        if response.status_code != 200:
            raise Refused(url, response.status_code, response.text)
        return response
    raise ConnectionError(f"{url} gave no answer in {retries + 1} attempts (last: {failure})")


def _scores(response: Any, expected: int, url: str) -> list[float | None]:
    try:
        scores = response.json()["scores"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f'{url} must answer {{"scores": [...]}}, not {response.text[:200]!r}') from error
    if not isinstance(scores, list) or len(scores) != expected:
        raise ValueError(f"{url} must answer one score a completion, {expected} of them, not {str(scores)[:200]}")
    return scores
