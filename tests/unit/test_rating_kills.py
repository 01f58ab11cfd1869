"""A server that is killed at any moment, under load, and started again: what it acknowledged is there, and once."""

import http.client
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from urllib.parse import urlencode

import pytest

from tests.unit.test_rating_store import write
from trl_ext.rating import Store

ROOT = Path(__file__).parents[2]
RATERS, PER_ITEM = 8, 3
# The server alone: most of what the command imports has nothing to do with this.
SERVER = """
import os, sys
from trl_ext.rating import Store
from trl_ext.rating.serving import serve
print("imported", flush=True)
for line in sys.stdin:
    if not (child := os.fork()):
        serve(Store.open(sys.argv[1], sys.argv[2], "stars", 3, 0.1), port=int(line), browser=False)
        break
    print(child, flush=True)
    os.waitpid(child, 0)
    print("gone", flush=True)
"""


class Rater(threading.Thread):
    """Judges as fast as it can. What it got no answer to it sends again, as a person does who presses reload."""

    def __init__(self, name: str, port: int, stop: threading.Event) -> None:
        super().__init__(daemon=True)
        self.rater, self.port, self.stop = name, port, stop
        self.acknowledged: dict[str, int] = {}
        self.again = self.twice = 0

    def run(self) -> None:
        pending: tuple[str, int] | None = None
        cookie = ""
        while not self.stop.is_set():
            try:
                connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
                connection.request("GET", f"/?rater={self.rater}", headers={"Cookie": cookie})
                answer = connection.getresponse()
                page = answer.read().decode()
                cookie = (answer.getheader("set-cookie") or cookie).split(";")[0]
                if pending is None:
                    found = re.search(r'name="ask" value="([^"]+)">\s*<fieldset', page)
                    if found is None:
                        return
                    pending = found[1], random.randint(1, 5)
                else:
                    self.again += 1
                for _ in range(1 if random.random() < 0.9 else 2):  # some press twice
                    form = urlencode({"ask": pending[0], "verdict": pending[1], "comment": pending[0]})
                    connection.request("POST", "/judge", form, {"Cookie": cookie})
                    answer = connection.getresponse()
                    answer.read()
                    assert answer.status == 303 and answer.getheader("location") == "/", answer.status
                    self.acknowledged[pending[0]] = pending[1]
                pending = None
                connection.close()
            except (OSError, http.client.HTTPException):
                time.sleep(0.01)


def killed(folder: Path, kills: int, items: int) -> tuple[list[Rater], Store]:
    answers, store = folder / "answers.jsonl", folder / "feedback.sqlite"
    write(answers, [{"prompt": f"p{number}", "completion": f"c{number}"} for number in range(items)])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-c", SERVER, str(store), str(answers)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    assert server.stdin is not None and server.stdout is not None
    assert server.stdout.readline() == "imported\n"
    stop = threading.Event()
    raters = [Rater(f"rater-{number}", port, stop) for number in range(RATERS)]
    for number in range(kills + 1):
        server.stdin.write(f"{port}\n")
        server.stdin.flush()
        said = {server.stdout.readline().strip(), server.stdout.readline().strip()}  # its number and its link
        (child,) = (int(line) for line in said if line.isdecimal())
        if number == 0:
            for rater in raters:
                rater.start()
        time.sleep(random.uniform(0.05, 0.6))
        if number == kills:
            time.sleep(0.5)
            stop.set()
            for rater in raters:
                rater.join()
        os.kill(child, signal.SIGKILL)
        assert server.stdout.readline() == "gone\n"
    server.kill()
    server.wait()
    return raters, Store.read(store)


@pytest.mark.parametrize("kills", [5, pytest.param(50, marks=[pytest.mark.long])], ids=["5 kills", "50 kills"])
def test_nothing_acknowledged_is_lost_and_nothing_is_there_twice(tmp_path: Path, kills: int) -> None:
    raters, store = killed(tmp_path, kills, items=60 * (kills + 1))
    with store:
        assert store.connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        judgements = store.annotations()
    stored = {j.comment: j for j in judgements}
    assert len(stored) == len(judgements) > 20 * kills  # no showing is there twice; each has its token as comment
    for rater in raters:
        for token, stars in rater.acknowledged.items():
            assert (stored[token].rater, stored[token].verdict) == (rater.rater, (stars,))
    assert sum(rater.again for rater in raters) > 0  # judgements were cut off
    unanswered = len(judgements) - sum(len(rater.acknowledged) for rater in raters)
    assert 0 <= unanswered <= RATERS
    assert max(Counter(j.item for j in judgements if j.kind == "ask").values()) <= PER_ITEM
    assert max(Counter((j.item, j.rater, j.kind) for j in judgements).values()) == 1
