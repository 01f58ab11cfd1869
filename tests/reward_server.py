"""A server on this machine that scores completions, or says something else, and has troubles when told to."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Server(ThreadingHTTPServer):
    """Scores a completion by its length, after first doing what `troubles` says, one a request."""

    daemon_threads = True
    path = "/score"

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.troubles: list[Any] = []
        self.requests: list[dict[str, Any]] = []
        self.asked: list[tuple[str, str | None]] = []  # path and key of each
        self.together = self.most_together = 0
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}{self.path}"

    def reply(self, body: dict[str, Any]) -> dict[str, Any]:
        return {"scores": [len(text) for text in body["completions"]]}


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.requests.append(body)
            self.server.asked.append((self.path, self.headers.get("Authorization")))
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
        answer = trouble if isinstance(trouble, dict) else self.server.reply(body)
        self.wfile.write(json.dumps(answer).encode())

    def log_message(self, *args: Any) -> None:
        pass
