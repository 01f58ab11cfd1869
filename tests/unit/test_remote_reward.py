"""The remote reward against a real server on this machine."""

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from trl_ext.rewards import RewardError, Scorer
from trl_ext.rewards.remote import remote


class Server(ThreadingHTTPServer):
    """Scores a completion by its length, after first doing what `troubles` says, one a request."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.troubles: list[Any] = []
        self.requests: list[dict[str, Any]] = []
        self.together = self.most_together = 0
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/score"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.requests.append(body)
            trouble = self.server.troubles.pop(0) if self.server.troubles else None
            self.server.together += 1
            self.server.most_together = max(self.server.most_together, self.server.together)
        time.sleep(0.05)
        with self.server.lock:
            self.server.together -= 1
        if trouble == "sleep":
            time.sleep(1.0)
        if trouble == "hang up":
            self.connection.close()
            return
        self.send_response(trouble if isinstance(trouble, int) else 200)
        if trouble == 302:
            self.send_header("Location", "http://127.0.0.1:9/elsewhere")
        self.end_headers()
        answer = trouble if isinstance(trouble, dict) else {"scores": [len(text) for text in body["completions"]]}
        self.wfile.write(json.dumps(answer).encode())

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    running = Server()
    thread = threading.Thread(target=running.serve_forever, daemon=True)
    thread.start()
    yield running
    running.shutdown()
    running.server_close()
    thread.join()


def ask(server_url: str, completions: list[str], **settings: Any) -> list[float | None]:
    settings = {"backoff": 0.01, "timeout": 0.5, **settings}
    reward = remote(server_url, **settings)
    return asyncio.run(
        reward(prompts=["p"] * len(completions), completions=completions, animal=["cat"] * len(completions))
    )


WORDS = ["a", "bb", "ccc", "dddd", "eeeee"]


def test_batches_come_back_in_order(server: Server) -> None:
    assert ask(server.url, WORDS, batch_size=2, columns=["animal"]) == [1, 2, 3, 4, 5]
    assert sorted(len(request["completions"]) for request in server.requests) == [1, 2, 2]
    assert all(set(request) == {"prompts", "completions", "animal"} for request in server.requests)
    assert 2 <= server.most_together <= 3


def test_no_more_requests_at_a_time_than_allowed(server: Server) -> None:
    ask(server.url, WORDS, batch_size=1, concurrency=2)
    assert server.most_together == 2


@pytest.mark.parametrize("trouble", [500, 503, 429, "hang up", "sleep"])
def test_passing_troubles_are_retried(server: Server, trouble: Any) -> None:
    server.troubles = [trouble, trouble]
    assert ask(server.url, WORDS) == [1, 2, 3, 4, 5]
    assert len(server.requests) == 3


def test_pauses_grow(server: Server) -> None:
    server.troubles = [500, 500, 500]
    started = time.perf_counter()
    ask(server.url, WORDS, backoff=0.1)
    assert time.perf_counter() - started >= 0.1 + 0.2 + 0.4


@pytest.mark.parametrize(
    ("trouble", "message"),
    [
        (404, "answered status 404"),
        (302, "answered status 302"),
        ({"points": []}, r'must answer \{"scores"'),
        ({"scores": [1]}, "one score a completion, 5 of them"),
    ],
)
def test_lasting_troubles_are_not_retried(server: Server, trouble: Any, message: str) -> None:
    server.troubles = [trouble]
    with pytest.raises((ConnectionError, ValueError), match=message):
        ask(server.url, WORDS)
    assert len(server.requests) == 1


def test_a_server_that_is_gone_is_one_clear_failure(server: Server) -> None:
    url = server.url
    server.shutdown()
    server.server_close()
    from tests.helpers import rollout

    with pytest.raises(
        RewardError, match=rf"^Reward function 'remote' raised ConnectionError: {url} gave no answer in 3 attempts"
    ):
        Scorer([remote(url, retries=2, backoff=0.01)])(rollout([2, 1], [True, True]), {})


def test_only_http() -> None:
    with pytest.raises(ValueError, match="must begin with http"):
        remote("file:///etc/passwd")
