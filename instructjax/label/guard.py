"""Requests that are refused before any page sees them, and the headers of all answers.

Only pages of this server may send requests to it. Requests of another site in the same browser have
that site's Origin. If another site's name is made to resolve to this machine (DNS rebinding), the
name is in Host, and a server on loopback answers only to loopback's names. At any other address, a
browser needs the cookie that it gets by opening the address with the token.
"""

import hmac
import http
import ipaddress
from urllib.parse import urlsplit

from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

LARGEST = 1 << 20  # bytes of a request's body

HEADERS = {
    "content-security-policy": (
        "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none';"
        " object-src 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}
# A redirect would count as one from the page that holds the link, and a strict cookie would not be
# sent along: the browser must go on from a page of ours.
_ENTERED = (
    '<!DOCTYPE html><html lang="en"><meta charset="utf-8"><title>Labeling</title>'
    '<meta http-equiv="refresh" content="0; url=/"><p><a href="/">Go on to the page.</a></p></html>'
)


def is_loopback(host: str) -> bool:
    """Whether a host's name or address is this machine's own, for itself alone."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower() == "localhost"


class Guard:
    """Refuses what does not come from the server's own pages.

    Args:
      app: what answers the other requests.
      token: what a visitor must have; None admits all who can reach the server, which must then be
        on loopback.
      cookie: the name of the cookie that keeps the token.
    """

    def __init__(self, app: ASGIApp, token: str | None, cookie: str):
        self._app, self._token, self._cookie = app, token, cookie

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                ours = [(key.encode(), value.encode()) for key, value in HEADERS.items()]
                message["headers"] = [*message.get("headers", []), *ours]
            await send(message)

        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        answer = self._answer(Request(scope)) or self._app
        await answer(scope, receive, send_with_headers)

    def _answer(self, request: Request) -> Response | None:
        """The answer to a request that the app must not see, or None."""
        host = request.headers.get("host", "")
        if self._token is None and not is_loopback(_name(host)):
            return refusal(http.HTTPStatus.MISDIRECTED_REQUEST, "this address is not the server's")
        reads = request.method in ("GET", "HEAD")
        if not reads and not _same(request.headers.get("origin", ""), host):
            return refusal(http.HTTPStatus.FORBIDDEN, "the request comes from another page")
        length = request.headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > LARGEST:
            return refusal(http.HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "too much for one request")
        if self._token is None:
            return None
        given = request.query_params.get("token", "")
        if request.method == "GET" and request.url.path == "/" and self._is_token(given):
            answer = HTMLResponse(_ENTERED)
            answer.set_cookie(self._cookie, given, 10**7, httponly=True, samesite="strict")
            return answer
        if not self._is_token(request.cookies.get(self._cookie, "")):
            return refusal(
                http.HTTPStatus.UNAUTHORIZED,
                "open the address with the token, which the server printed when it started",
            )
        return None

    def _is_token(self, given: str) -> bool:
        assert self._token is not None
        return hmac.compare_digest(given.encode(), self._token.encode())


def refusal(status: int, reason: str) -> Response:
    return JSONResponse({"error": reason}, status)


def _name(host: str) -> str:
    """The name or address in a Host header, without the port."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def _same(origin: str, host: str) -> bool:
    """Whether an Origin is that of a page of the host. A proxy may have taken off the TLS."""
    scheme, _, rest = origin.partition("://")
    return scheme in ("http", "https") and rest != "" and rest.lower() == host.lower()
