"""The page: plain forms that a server renders, with a little script for keys and dragging."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import ipaddress
import json
import re
import sqlite3
import unicodedata
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import parse_qsl, quote, unquote, urlsplit

from jinja2 import Environment, PackageLoader, StrictUndefined
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from trl_ext.rating.agreement import agreements, with_others
from trl_ext.rating.modes import LETTERS, as_shown
from trl_ext.rating.records import Annotation, Progress, Shown
from trl_ext.rating.store import LONGEST_NAME, Store

T = TypeVar("T")
LONGEST_FORM, MOST_FIELDS = 64 * 1024, 100  # bytes
A_YEAR = 365 * 24 * 3600
DIFFERENCES = 10  # shown at the end
NOTICES = {  # above the page that follows, by the query of its address
    "late": "The last item took so long that others were asked about it: what you said was not needed.",
    "before": "You had judged that item already, and what you said first stays. Undo takes it back.",
    "gone": "What you skipped was given to others since: it cannot be taken back.",
}
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; form-action 'self'; "
    "base-uri 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
PAGES = Environment(
    loader=PackageLoader("trl_ext.rating"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    auto_reload=False,  # six looks at the disk a page
)


def turns(value: Any, role: str) -> list[tuple[str, str]]:
    """(who, text) of a conversation; a text is one turn of `role`."""
    if isinstance(value, str):
        return [(role, value)] if value else []
    return [(str(message["role"]).capitalize(), _content(message)) for message in value]


def _content(message: dict[str, Any]) -> str:
    content = message.get("content")
    if isinstance(content, list):
        content = "\n".join(str(part.get("text", "")) for part in content)
    called = message.get("tool_calls")
    return "\n".join(filter(None, [content, json.dumps(called, ensure_ascii=False, indent=2) if called else ""]))


PAGES.filters["turns"] = turns
PAGES.globals["LETTERS"] = LETTERS


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a server that listens there."""
    try:
        return host == "localhost" or ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


class Door:
    """Lets in who may come in, and puts the headers on what goes out.

    On loopback the Host header must name this machine, which a page that had its name rebound to 127.0.0.1 cannot do;
    anywhere else the link's token is asked for, and then its cookie. What changes something must come from a page of
    our own: browsers say so in Sec-Fetch-Site and Origin.
    """

    def __init__(self, app: ASGIApp, host: str, token: str | None, cookie: str) -> None:
        self.app, self.host, self.token, self.cookie = app, host, token, cookie

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request = Request(scope)
        given = request.query_params.get("token")

        async def sealed(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = [(name.lower().encode(), value.encode()) for name, value in HEADERS.items()]
                if given and self.token is not None and self._knows(given):  # without a token, anything is known
                    kept = f"{self.cookie}={given}; Max-Age={A_YEAR}; Path=/; HttpOnly; SameSite=Strict"
                    headers.append((b"set-cookie", kept.encode()))
                message["headers"] = [*message["headers"], *headers]
            await send(message)

        refusal = self._refusal(request, given)
        answer = self.app if refusal is None else message_page(*refusal)
        await answer(scope, receive, sealed)

    def _refusal(self, request: Request, given: str | None) -> tuple[int, str] | None:
        host = request.headers.get("host", "")
        if self.token is None and not is_loopback(urlsplit(f"//{host}").hostname or ""):
            return 403, f"This page is for this machine only, not for {host[:100]!r}: open the link that was printed."
        if not (self._knows(given or "") or self._knows(request.cookies.get(self.cookie, ""))):
            return 403, "This page opens by a link with a token: ask whoever started it for the link."
        reads = request.method in ("GET", "HEAD") and request.headers.get("sec-fetch-dest", "document") == "document"
        if not reads and not _is_from_our_page(request, host):  # a link elsewhere may open the page, an image may not
            return 403, "This came from another site: use the form on the page itself."
        return None

    def _knows(self, given: str) -> bool:
        return self.token is None or hmac.compare_digest(given.encode(), self.token.encode())


def _is_from_our_page(request: Request, host: str) -> bool:
    """Programs that are no browsers send neither header."""
    fetched, origin = request.headers.get("sec-fetch-site"), request.headers.get("origin")
    if fetched is not None:
        return fetched == "same-origin"
    return origin is None or urlsplit(origin).netloc == host


def _mark(store: Store) -> str:
    """Tells a store's cookies from those of others on this machine, also of the same answers: cookies know no ports."""
    return hashlib.sha256(str(store.settings["secret"]).encode()).hexdigest()[:8]


def message_page(status: int, sentence: str) -> HTMLResponse:
    return HTMLResponse(PAGES.get_template("message.html").render(sentence=sentence), status)


class Clerk:
    """Does what is asked of the store, in a thread of its own: the page answers while the disk is waited for. What
    comes in meanwhile is then done and committed together."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.thread = ThreadPoolExecutor(1, "store")
        self.waiting: list[tuple[Callable[[], Any], asyncio.Future[Any]]] = []
        self.busy: asyncio.Task[None] | None = None

    async def do(self, work: Callable[..., T], *values: Any) -> T:
        """The result of this work, once it is committed."""
        result: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self.waiting.append((partial(work, *values), result))
        if self.busy is None or self.busy.done():
            self.busy = asyncio.create_task(self._work())
        return await result

    async def _work(self) -> None:
        while self.waiting:
            jobs, self.waiting = self.waiting, []
            works = [work for work, _ in jobs]
            results = await asyncio.get_running_loop().run_in_executor(self.thread, self.store.together, works)
            for (_, waiting), result in zip(jobs, results, strict=True):
                if waiting.cancelled():  # the browser is gone
                    continue
                if isinstance(result, Exception):
                    waiting.set_exception(result)
                else:
                    waiting.set_result(result)


class RatingPage:
    """The routes over a store."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.do = Clerk(store).do
        self.cookie = f"rater_{_mark(store)}"

    async def item(self, request: Request) -> Response:
        """What the rater is asked now. Their name is in the link, or in the cookie, or ours to give."""
        named = _name(request.query_params.get("rater")) or self._cookie_name(request)
        if named is None and ("token" in request.query_params or request.headers.get("sec-fetch-site") == "cross-site"):
            # From a link elsewhere, where browsers keep our cookie back: they send it when our own page asks again.
            return self._html("again.html")
        shown, (rater, last, progress) = await self.do(self._look, named)
        page = {"rater": rater, "mode": self.store.mode, "progress": progress, "last": last, "said": self._said(last)}
        page["notice"] = next((said for name, said in NOTICES.items() if name in request.query_params), "")
        if shown is None:
            response = self._html("end.html", finished=True, **page, **await self._figures(rater))
        else:
            asked_for_name = progress.mine == 0 and re.fullmatch(r"rater \d+", rater) is not None
            response = self._html("item.html", shown=shown, asked_for_name=asked_for_name, **page)
        return self._with_cookie(response, rater)

    def _look(self, named: str | None) -> tuple[Shown | None, tuple[str, Shown | None, Progress]]:
        rater = self.store.rater(named)
        return self.store.next(rater), self._stand(rater)

    def _stand(self, rater: str) -> tuple[str, Shown | None, Progress]:
        return rater, self.store.last(rater), self.store.progress(rater)

    async def figures(self, request: Request) -> Response:
        """What the rater agreed on so far."""
        named = self._known_rater(request)
        rater, last, progress = await self.do(lambda: self._stand(self.store.rater(named)))
        page = {"rater": rater, "mode": self.store.mode, "progress": progress, "last": last, "said": self._said(last)}
        return self._html("end.html", finished=False, notice="", **page, **await self._figures(rater))

    async def judge(self, request: Request) -> Response:
        rater, form = self._known_rater(request), await _form(request)
        return RedirectResponse(await self.do(self._judge, rater, form), 303)

    def _judge(self, rater: str, form: dict[str, str]) -> str:
        token, said = form.get("ask", ""), form.get("verdict", "")
        state = {"skip": "skipped", "unsure": "unsure"}.get(said, "judged")
        shown = self.store.shown(token)
        verdict = self.store.mode.verdict(form, len(shown.completions) if shown else 0) if state == "judged" else None
        if state == "judged" and verdict is None:
            raise HTTPException(400, "The form says no judgement: go back and press one of the buttons.")
        comment = form.get("comment", "").replace("\r\n", "\n").strip()  # forms send lines so
        if not self.store.judge(self.store.rater(rater), token, state, verdict, comment):
            return "/?late"
        if shown is None or shown.state == "open":
            return "/"
        return "/" if (shown.state, shown.verdict, shown.comment) == (state, verdict, comment) else "/?before"

    async def undo(self, request: Request) -> Response:
        rater, form = self._known_rater(request), await _form(request)
        return RedirectResponse(await self.do(self._undo, rater, form.get("ask", "")), 303)

    def _undo(self, rater: str, token: str) -> str:
        if self.store.undo(self.store.rater(rater), token):
            return "/"
        shown = self.store.shown(token)
        return "/?gone" if shown and shown.state == "skipped" else "/"

    async def name(self, request: Request) -> Response:
        rater, new = self._known_rater(request), _name((await _form(request)).get("name"))
        if new is None:
            raise HTTPException(400, "A name has a letter or more: go back and write one.")
        await self.do(self.store.rename, rater, new)
        return self._with_cookie(RedirectResponse("/", 303), new)

    def _known_rater(self, request: Request) -> str:
        """Cookies of ours come from our own pages alone (SameSite=Strict)."""
        if (rater := self._cookie_name(request)) is None:
            raise HTTPException(403, "Nobody knows who you are: open the link first, and allow its cookie.")
        return rater

    def _cookie_name(self, request: Request) -> str | None:
        return _name(unquote(request.cookies.get(self.cookie, "")))

    def _with_cookie(self, response: Response, rater: str) -> Response:
        response.set_cookie(self.cookie, quote(rater), A_YEAR, httponly=True, samesite="strict")
        return response

    def _said(self, last: Shown | None) -> str:
        if last is None or last.verdict is None:
            return {"unsure": "Cannot tell", "skipped": "Skipped"}.get(last.state, "") if last else ""
        return self.store.mode.said(last.verdict)

    async def _figures(self, rater: str) -> dict[str, Any]:
        """Read beside the store's own thread: others go on rating."""
        return await asyncio.to_thread(figures_of, self.store.path, rater)

    def _html(self, name: str, **page: Any) -> HTMLResponse:
        return HTMLResponse(PAGES.get_template(name).render(page))


def figures_of(path: Path, rater: str) -> dict[str, Any]:
    """What the end says: the rater's agreement, and where others said something else."""
    with Store.read(path) as store:
        judgements, mode = store.annotations(rater), store.mode
    mine = {j.item: j for j in judgements if j.rater == rater and j.kind == "ask"}
    differ: list[dict[str, Any]] = []
    for (own, other), theirs in with_others(judgements, rater):
        if own != other and len(differ) < DIFFERENCES:
            judgement = mine[theirs.item]
            said = [mode.said(as_shown(verdict, judgement.order)) for verdict in (own, other)]
            differ.append({"judgement": judgement, "answers": _as_shown(judgement), "mine": said[0], "other": said[1]})
    return {"agreements": agreements(judgements, mode, rater), "differ": differ}


def _as_shown(judgement: Annotation) -> list[Any]:
    return [judgement.answers[place].completion for place in judgement.order]


def _name(given: str | None) -> str | None:
    """A name without what does not print; None where nothing is left. However a keyboard composes a letter, it is one.

    Raises:
        HTTPException: it is too long; cut off, it might be another's.
    """
    name = " ".join("".join(c if c.isprintable() else " " for c in given or "").split())
    if len(name := unicodedata.normalize("NFC", name)) > LONGEST_NAME:
        raise HTTPException(400, f"A name has {LONGEST_NAME} characters at most: give a shorter one.")
    return name or None


async def _form(request: Request) -> dict[str, str]:
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > LONGEST_FORM:
            raise HTTPException(413, f"The form is longer than {LONGEST_FORM // 1024} KiB: shorten the comment.")
    try:
        return dict(parse_qsl(body.decode("utf-8", "replace"), keep_blank_values=True, max_num_fields=MOST_FIELDS))
    except ValueError as error:
        raise HTTPException(400, f"The form has more than {MOST_FIELDS} fields: use the one on the page.") from error


async def _told(_: Request, error: Exception) -> Response:
    status, sentence = (error.status_code, error.detail) if isinstance(error, HTTPException) else (500, str(error))
    return message_page(status, f"{sentence}." if not sentence.endswith(".") else sentence)


async def _not_stored(_: Request, error: Exception) -> Response:
    return message_page(503, f"Nothing was stored ({error}): go back and try again, or tell whoever started this page.")


async def _icon(_: Request) -> Response:
    return Response(status_code=204)


def app_for(store: Store, host: str = "127.0.0.1", token: str | None = None) -> Door:
    """The page over a store.

    Args:
        host: where it listens.
        token: that the link must have; None: only this machine can reach it.
    """
    page = RatingPage(store)
    routes = [
        Route("/", page.item),
        Route("/judge", page.judge, methods=["POST"]),
        Route("/undo", page.undo, methods=["POST"]),
        Route("/name", page.name, methods=["POST"]),
        Route("/figures", page.figures),
        Route("/favicon.ico", _icon),
        Mount("/static", StaticFiles(packages=[("trl_ext.rating", "static")])),
    ]
    handlers: Any = {HTTPException: _told, sqlite3.Error: _not_stored}
    app = Starlette(routes=routes, exception_handlers=handlers)
    return Door(app, host, token, f"access_{_mark(store)}")
