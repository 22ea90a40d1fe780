"""Serve an application to this machine only."""

from __future__ import annotations

import asyncio
import logging
import socket
import sys
import threading
import webbrowser
from collections.abc import Callable

import uvicorn
from starlette.types import ASGIApp

from pipeline.errors import ViewError

ADDRESS = "127.0.0.1"


def serve(app: ASGIApp, port: int, ready: Callable[[str], None]) -> None:
    """Serve the application until Ctrl-C. Call `ready` with its address as soon as the page can be opened.

    Port 0 selects a free port. Raises ViewError if the port is in use.
    """
    # Threads that decode tiles yield to the responding thread after this many seconds instead of 5 ms.
    sys.setswitchinterval(0.0005)
    with listening(port) as listener:
        server = uvicorn.Server(server_config(app))
        logging.getLogger("uvicorn.error").addFilter(is_news)
        ready(f"http://{ADDRESS}:{listener.getsockname()[1]}/")
        try:
            server.run(sockets=[listener])
        except KeyboardInterrupt:
            return


def server_config(app: ASGIApp) -> uvicorn.Config:
    """Return the configuration of uvicorn."""
    return uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        server_header=False,
        ws="none",
        # A browser keeps its connections open, and shutdown must not wait for them.
        timeout_graceful_shutdown=1,
    )


def is_news(record: logging.LogRecord) -> bool:
    """Return whether to log a message. Ctrl-C prints one line, even if requests are still open."""
    ended = record.exc_info is not None and record.exc_info[0] is asyncio.CancelledError
    return not ended and "graceful shutdown" not in record.getMessage()


def open_browser(url: str) -> None:
    """Open the page in the user's browser without waiting for the browser."""
    threading.Thread(target=webbrowser.open, args=(url,), daemon=True).start()


def listening(port: int) -> socket.socket:
    """Return a socket for this machine only; port 0 selects a free port. Raises ViewError if the port is in use."""
    # asyncio disables Nagle's algorithm, which delays responses by 40 ms, only if the protocol is named.
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((ADDRESS, port))
    except OSError as error:
        listener.close()
        raise ViewError(
            f"port {port} cannot be used ({error.strerror or error}); choose another --port, or omit the option"
        ) from error
    listener.listen()
    return listener
