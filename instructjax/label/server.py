"""The pages and their addresses: a Starlette app made of a desk.

GET  /              the page: a name to enter, or the screens
GET  /agreement     how labelers agree
POST /enter, /leave who labels in this browser
POST /next          the next screen
POST /earlier       a screen that was labeled, to correct it
POST /labels        a label to keep
"""

import json
import statistics
import unicodedata
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import jinja2
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from instructjax.label import agreement, export
from instructjax.label.answers import FLAGS, LIKERT
from instructjax.label.desk import Desk
from instructjax.label.guard import LARGEST, Guard, refusal

LONGEST_NAME = 64
KEYS = "qwertasdfgz"  # of the flags, in their order


def make_app(desk: Desk, token: str | None, port: int) -> Starlette:
    """The app.

    Args:
      desk: gives screens out and takes labels. All calls come from the one thread of the event
        loop, as its database wants.
      token: as in `Guard`.
      port: of the server. Cookies are shared by all ports of a host, so their names have it.
    """
    who = f"instructjax_labeler_{port}"
    templates = jinja2.Environment(
        loader=jinja2.PackageLoader("instructjax.label", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
    )

    def labeler(request: Request) -> str | None:
        name = unquote(request.cookies.get(who, ""))
        return name if name in desk.store.labelers() else None

    async def page(request: Request) -> Response:
        flags = [(key, *flag) for key, flag in zip(KEYS, FLAGS.items(), strict=True)]
        html = templates.get_template("page.html.jinja").render(
            labeler=labeler(request),
            database=desk.store.about("id"),
            flags=flags,
            likert=range(1, LIKERT + 1),
            longest_name=LONGEST_NAME,
        )
        return HTMLResponse(html)

    async def agreement_page(request: Request) -> Response:
        labels = export.counted(desk.store)
        work: dict[str, list[float]] = {}
        for label in labels:
            work.setdefault(label.labeler, []).append(label.seconds)
        html = templates.get_template("agreement.html.jinja").render(
            report=agreement.report(labels),
            labelers=desk.store.labelers().values(),
            screens=len({label.screen.id for label in labels}),
            counts={name: len(seconds) for name, seconds in work.items()},
            medians={name: statistics.median(seconds) for name, seconds in work.items()},
            screening=any(x.admitted is not None for x in desk.store.labelers().values()),
            admit=desk.admit,
        )
        return HTMLResponse(html)

    async def enter(request: Request) -> Response:
        name = (await body(request)).get("name")
        name = unicodedata.normalize("NFC", name).strip() if isinstance(name, str) else ""
        if not 1 <= len(name) <= LONGEST_NAME or not name.isprintable():
            return refusal(
                HTTPStatus.UNPROCESSABLE_ENTITY, f"a name has 1 to {LONGEST_NAME} characters"
            )
        desk.store.enter(name, desk.now())
        answer = JSONResponse({"labeler": name})
        answer.set_cookie(who, quote(name), 10**7, httponly=True, samesite="strict")
        return answer

    async def leave(request: Request) -> Response:
        answer = JSONResponse({})
        answer.delete_cookie(who, httponly=True, samesite="strict")
        return answer

    def for_labeler(
        answer: Callable[[str, dict[str, Any]], dict[str, Any]],
    ) -> Callable[[Request], Awaitable[Response]]:
        """An endpoint for one who has entered a name; `answer` gets it, and the request's body.

        The body says whom the page takes its visitor for, and which database: another tab may have
        entered another name since, or another labeling may be served here by now. A label must
        never become one of these.
        """
        database = desk.store.about("id")

        async def endpoint(request: Request) -> Response:
            given, name = await body(request), labeler(request)
            if given.get("database") != database:
                return refusal(HTTPStatus.CONFLICT, "another labeling is served here now: reload")
            if name is None or given.get("labeler") != name:
                return refusal(
                    HTTPStatus.CONFLICT, "another name was entered in this browser: reload"
                )
            try:
                return JSONResponse(answer(name, given))
            except KeyError:
                return refusal(HTTPStatus.NOT_FOUND, "this screen was not shown to you")
            except ValueError as error:
                return refusal(HTTPStatus.UNPROCESSABLE_ENTITY, str(error))

        return endpoint

    routes = {
        "/enter": enter,
        "/leave": leave,
        "/next": for_labeler(lambda name, given: desk.next(name)),
        "/earlier": for_labeler(lambda name, given: desk.earlier(name, str(given.get("screen")))),
        "/labels": for_labeler(lambda name, given: {"new": desk.submit(name, given)}),
    }
    static = StaticFiles(directory=Path(__file__).parent / "static")
    return Starlette(
        routes=[
            Route("/", page),
            Route("/agreement", agreement_page),
            *(Route(path, endpoint, methods=["POST"]) for path, endpoint in routes.items()),
            Mount("/static", static),
        ],
        middleware=[Middleware(Guard, token=token, cookie=f"instructjax_token_{port}")],
        exception_handlers={HTTPException: _as_json},
    )


async def body(request: Request) -> dict[str, Any]:
    """The JSON object that a request holds; raises HTTPException."""
    data = b""
    async for part in request.stream():  # a body in chunks does not tell its length before
        data += part
        if len(data) > LARGEST:
            raise HTTPException(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "too much for one request")
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise HTTPException(HTTPStatus.BAD_REQUEST, "expected JSON") from error
    if not isinstance(value, dict):
        raise HTTPException(HTTPStatus.BAD_REQUEST, "expected an object")
    return value


async def _as_json(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return refusal(error.status_code, error.detail)
