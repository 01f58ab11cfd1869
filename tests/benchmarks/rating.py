"""Fifty people at a time over ten thousand items: how long the page of `trl-ext rate` takes to answer.

    python tests/benchmarks/rating.py --raters 50 --items 10000 --seconds 60

Each rater opens the page, thinks, judges, and gets the next page, in one connection. Prints what a rater waits for:
from sending a judgement to having the next item (both requests together), and each request alone; then what the store
holds.
`--think 0` shows the most that the server can take.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
TOKEN = re.compile(r'name="ask" value="([^"]+)">\s*<fieldset')


class Rater:
    """A browser as far as a server can tell: one connection, cookies, and a form that comes back."""

    def __init__(self, port: int, name: str) -> None:
        self.port, self.name, self.cookies = port, name, ""
        self.waits: dict[str, list[float]] = {"get": [], "post": [], "both": []}

    async def run(self, until: float, think: float) -> None:
        await asyncio.sleep(random.uniform(0, think))
        self.reader, self.writer = await asyncio.open_connection("127.0.0.1", self.port)
        page = await self._request("get", f"/?rater={self.name}")
        while time.monotonic() < until and (token := TOKEN.search(page)):
            await asyncio.sleep(random.uniform(0.5, 1.5) * think)
            start = time.perf_counter()
            await self._request("post", "/judge", f"ask={token[1]}&verdict={random.randint(1, 5)}&comment=")
            page = await self._request("get", "/")
            self.waits["both"].append(time.perf_counter() - start)
        self.writer.close()

    async def _request(self, method: str, path: str, body: str = "") -> str:
        start = time.perf_counter()
        head = f"{method.upper()} {path} HTTP/1.1\r\nHost: 127.0.0.1:{self.port}\r\nCookie: {self.cookies}\r\n"
        form = f"Content-Type: application/x-www-form-urlencoded\r\nContent-Length: {len(body)}\r\n" if body else ""
        self.writer.write(f"{head}{form}\r\n{body}".encode())
        headers = (await self.reader.readuntil(b"\r\n\r\n")).decode()
        length = int((re.search(r"content-length: (\d+)", headers) or [0, 0])[1])
        text = (await self.reader.readexactly(length)).decode()
        self.waits[method].append(time.perf_counter() - start)
        status = int(headers.split()[1])
        assert status in (200, 303), (status, text)
        if found := re.search(r"set-cookie: ([^;]+)", headers):
            self.cookies = found[1]
        return text


async def load(port: int, raters: int, seconds: float, think: float) -> list[Rater]:
    everybody = [Rater(port, f"rater-{number}") for number in range(raters)]
    until = time.monotonic() + seconds
    await asyncio.gather(*(rater.run(until, think) for rater in everybody))
    return everybody


def started(folder: Path, items: int, per_item: int) -> tuple[subprocess.Popen[str], int, Path]:
    answers, store = folder / "answers.jsonl", folder / "feedback.sqlite"
    rows: Any = ({"id": str(n), "prompt": f"Prompt {n}", "completion": f"Answer {n} " * 40} for n in range(items))
    answers.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [sys.executable, "-m", "trl_ext.cli", "rate", str(answers), "--store", str(store), "--mode", "stars"]
    command += ["--per-item", str(per_item), "--repeats", "0.1", "--port", "0", "--no-browser"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    link = next(line for line in process.stdout if line.startswith("http://"))
    return process, int(link.rsplit(":", 1)[1].strip("/\n")), store


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--raters", type=int, default=50)
    parser.add_argument("--items", type=int, default=10_000)
    parser.add_argument("--per-item", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--think", type=float, default=2.0, help="mean seconds before a judgement")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        server, port, path = started(Path(name), chosen.items, chosen.per_item)
        try:
            raters = asyncio.run(load(port, chosen.raters, chosen.seconds, chosen.think))
        finally:
            server.kill()
            server.wait()
        from trl_ext.rating import Store

        with Store.read(path) as store:
            judgements = store.annotations()
    for kind, label in (("both", "judgement and next item"), ("post", "judgement"), ("get", "page")):
        waits = sorted(wait for rater in raters for wait in rater.waits[kind])
        p50, p95, p99 = (waits[int(share * (len(waits) - 1))] * 1000 for share in (0.5, 0.95, 0.99))
        print(
            f"{label}: {len(waits):,}, p50 {p50:.1f} ms, p95 {p95:.1f} ms, p99 {p99:.1f} ms, most {waits[-1] * 1e3:.0f}"
        )
    told = sum(len(rater.waits["post"]) for rater in raters)
    most = max(Counter(j.item for j in judgements if j.kind == "ask").values())
    print(
        f"{told:,} acknowledged, {len(judgements):,} stored; an item was judged by {most} of {chosen.per_item} at most"
    )
    print(f"{told / chosen.seconds:.0f} judgements a second; load of this machine {os.getloadavg()[0]:.1f}")
    return 0 if told == len(judgements) and most <= chosen.per_item else 1


if __name__ == "__main__":
    sys.exit(main())
