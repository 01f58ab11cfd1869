"""A reward that a server gives, over HTTP."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from typing import Any

RETRIED = {408, 425, 429, 500, 502, 503, 504}


class RemoteReward:
    """Asks a server for scores: batches side by side, each with a time-out and retried with growing pauses.

    A request is POST <url> with the JSON {"prompts": [...], "completions": [...], further columns}; the answer is the
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

    Raises:
        ImportError: httpx2 is missing.
        ValueError: no http or https URL.
    """

    def __init__(
        self,
        url: str,
        columns: Sequence[str] = (),
        batch_size: int = 32,
        concurrency: int = 4,
        timeout: float = 30.0,
        retries: int = 4,
        backoff: float = 0.5,
        headers: dict[str, str] | None = None,
    ) -> None:
        try:
            import httpx2
        except ImportError as error:
            raise ImportError("The remote reward needs httpx2: pip install 'trl-ext[remote]'.") from error
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"The remote reward's URL {url!r} must begin with http:// or https://.")
        self.url, self.columns, self.batch_size = url, list(columns), batch_size
        self.concurrency, self.retries, self.backoff = concurrency, retries, backoff
        self._settings: dict[str, Any] = {"timeout": timeout, "headers": headers, "follow_redirects": False}
        self._http = httpx2

    async def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float | None]:
        """Scores of `completions`, in their order.

        Raises:
            ConnectionError: the server could not be reached, or failed, after all retries.
            ValueError: it answered something else than one score a completion.
        """
        sent = {name: columns[name] for name in self.columns}
        sent |= {"prompts": prompts, "completions": completions}
        parts = [
            {name: list(values[start : start + self.batch_size]) for name, values in sent.items()}
            for start in range(0, len(completions), self.batch_size)
        ]
        gate = asyncio.Semaphore(self.concurrency)
        async with self._http.AsyncClient(**self._settings) as client:
            scored = await asyncio.gather(*(self._ask(client, gate, part) for part in parts))
        return [score for part in scored for score in part]

    async def _ask(self, client: Any, gate: asyncio.Semaphore, part: dict[str, list[Any]]) -> list[float | None]:
        failure = ""
        for attempt in range(self.retries + 1):
            if attempt:
                await asyncio.sleep(self.backoff * 2 ** (attempt - 1) * (1 + random.random() / 2))
            try:
                async with gate:
                    response = await client.post(self.url, json=part)
            except self._http.TransportError as error:
                failure = f"{type(error).__name__}: {error}"
                continue
            if response.status_code in RETRIED:
                failure = f"status {response.status_code}"
                continue
            if response.status_code != 200:
                raise ConnectionError(f"{self.url} answered status {response.status_code}: {response.text[:200]!r}")
            return _scores(response, len(part["completions"]), self.url)
        raise ConnectionError(f"{self.url} gave no answer in {self.retries + 1} attempts (last: {failure})")


def _scores(response: Any, expected: int, url: str) -> list[float | None]:
    try:
        scores = response.json()["scores"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f'{url} must answer {{"scores": [...]}}, not {response.text[:200]!r}') from error
    if not isinstance(scores, list) or len(scores) != expected:
        raise ValueError(f"{url} must answer one score a completion, {expected} of them, not {str(scores)[:200]}")
    return scores


def remote(url: str, **settings: Any) -> Any:
    """A reward function that asks the server at `url`; settings as of `RemoteReward`. Unlike a bare `RemoteReward` it
    has a name and is a coroutine function, which TRL's trainers ask for."""
    client = RemoteReward(url, **settings)

    async def remote(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float | None]:
        return await client(prompts, completions, **columns)

    return remote
