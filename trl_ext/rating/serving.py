"""The page on a port of this machine."""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
import webbrowser
from collections.abc import Callable

import uvicorn

from trl_ext.rating.app import app_for, is_loopback
from trl_ext.rating.store import Store

PORT = 8765
POLL, LAST_LOOK = 0.5, 3.0  # seconds


def serve(
    store: Store,
    host: str = "127.0.0.1",
    port: int = PORT,
    browser: bool = True,
    say: Callable[[str], None] = lambda line: print(line, flush=True),
    until: Callable[[], bool] | None = None,
) -> None:
    """Serve the page until the process is interrupted, and print its link once it can be opened.

    Args:
        host: an address of this machine. Where others reach it, the link has a token.
        port: 0 takes a free one.
        browser: open the link in the browser of this machine.
        until: serve only until this says True, and still does when the rater has seen that all is judged. It is
            called in a thread of its own.

    Raises:
        OSError: the port is taken, or the address is none of this machine's.
    """
    token = None if is_loopback(host) else str(store.settings["secret"])
    with listening(host, port) as listener:
        link = f"http://{_reachable(host)}:{listener.getsockname()[1]}/" + (f"?token={token}" if token else "")
        config = uvicorn.Config(
            app_for(store, host, token),
            log_level="warning",
            access_log=False,
            lifespan="off",
            ws="none",
            proxy_headers=False,
            server_header=False,
            timeout_graceful_shutdown=2,
        )
        say(link)
        if browser and (sys.platform in ("darwin", "win32") or {"DISPLAY", "WAYLAND_DISPLAY"} & set(os.environ)):
            webbrowser.open(link)
        server = uvicorn.Server(config)
        if until is not None:
            threading.Thread(target=_stop, args=(server, until), name="trl_ext-until", daemon=True).start()
        try:
            server.run(sockets=[listener])
        except KeyboardInterrupt:
            say(f"Stopped. Every judgement is in {store.path}; the same command goes on.")


def _stop(server: uvicorn.Server, until: Callable[[], bool]) -> None:
    """End the server once `until` says so. What was judged last may be taken back meanwhile."""
    while not server.should_exit:
        time.sleep(POLL)
        if until():
            time.sleep(LAST_LOOK)
            server.should_exit = until()


def listening(host: str, port: int) -> socket.socket:
    """A socket that connections wait at.

    Raises:
        OSError: as `serve` does.
    """
    if not 0 <= port <= 65535:
        raise ValueError(f"--port is {port}: give one from 0 to 65535.")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # With the protocol named, asyncio sends each part of an answer at once instead of waiting 40 ms for the last one.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        if os.name == "posix":
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host.strip("[]"), port))
        listener.listen(128)
    except OSError as error:
        listener.close()
        raise OSError(
            f"The page cannot listen on {host}:{port} ({error.strerror or error}): name another with --port, or "
            "--port 0 for any that is free."
        ) from error
    return listener


def _reachable(host: str) -> str:
    """The host in a link: where the page listens on every address, the one that others know this machine by."""
    if host not in ("0.0.0.0", "::"):
        return f"[{host}]" if ":" in host else host
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect(("192.0.2.1", 9))  # chooses the way out; nothing is sent
            return str(probe.getsockname()[0])
    except OSError:
        return socket.gethostname()
