"""An application for this machine only: its security headers and the responses to errors.

Slides are patient data: the browser stores nothing, other sites cannot embed a response, and an error's text contains
no path.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from typing import TypeVar

from pydantic import BaseModel, ValidationError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import BaseRoute
from starlette.types import ASGIApp, Message, Receive, Scope, Send

HOSTS = ("127.0.0.1", "localhost")
SECURITY_HEADERS = {
    # The digest of the empty text, for the empty style element that keeps OpenSeadragon from adding one.
    "Content-Security-Policy": "default-src 'self'; style-src 'self' "
    "'sha256-47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU='; object-src 'none'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    # Keep slides out of the browser's cache on disk.
    "Cache-Control": "no-store",
}

MAX_POSTED = 256 << 10
"""Bytes that a page may send at once."""

Lifespan = Callable[[Starlette], AbstractAsyncContextManager[None]]


def local_application(routes: Sequence[BaseRoute], lifespan: Lifespan) -> Starlette:
    """Return an application of these routes for this machine only. Its responses have the `SECURITY_HEADERS`."""
    return Starlette(
        routes=routes,
        middleware=[
            Middleware(_SecurityHeaders),
            Middleware(TrustedHostMiddleware, allowed_hosts=HOSTS, www_redirect=False),
        ],
        exception_handlers={HTTPException: _plain_error, Exception: _internal_error},
        lifespan=lifespan,
    )


Asked = TypeVar("Asked", bound=BaseModel)


async def posted_json(request: Request, kind: type[Asked]) -> Asked:
    """Return the body of a POST request that a page of this application sent.

    Raises HTTPException 403 if another site sent it: browsers name the site in `Origin` and ask before they send JSON
    elsewhere. Raises 400 if the page canceled the request, 413 for a body above `MAX_POSTED`, and 422 if the body is
    not a valid `kind`.
    """
    own = f"{request.url.scheme}://{request.headers.get('host', '')}"
    if request.headers.get("origin") != own or request.headers.get("content-type") != "application/json":
        raise HTTPException(403, "Only the page itself can save.")
    body = b""
    try:
        async for part in request.stream():
            body += part
            if len(body) > MAX_POSTED:
                raise HTTPException(413, "The request is too large.")
    except ClientDisconnect as error:
        raise HTTPException(400, "The request was canceled.") from error
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        raise HTTPException(422, "The request is not valid; reload the page.") from error


async def _plain_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return PlainTextResponse(error.detail, error.status_code, error.headers)


async def _internal_error(_: Request, __: Exception) -> Response:
    return PlainTextResponse("Internal error; see the terminal for details.", 500, SECURITY_HEADERS)


class _SecurityHeaders:
    """Add `SECURITY_HEADERS` to every response."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._headers = [(name.lower().encode(), value.encode()) for name, value in SECURITY_HEADERS.items()]

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", []), *self._headers]
            await send(message)

        return self._app(scope, receive, send_with_headers)
