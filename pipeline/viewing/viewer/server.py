"""Serving the application to this machine alone."""

from __future__ import annotations

import asyncio
import logging
import socket
import sys
import threading
import webbrowser
from collections.abc import Callable, Sequence

import uvicorn

from pipeline.errors import ViewError
from pipeline.viewing.viewer.app import make_app
from pipeline.viewing.viewer.results import Result

ADDRESS = "127.0.0.1"


def serve(results: Sequence[Result], port: int, ready: Callable[[str], None]) -> None:
    """Serve the results until Ctrl-C; `ready` is called with the page's address as soon as it answers.

    Port 0 takes a free one. Raises ViewError where the port is taken.
    """
    # Threads that decode tiles hand over to the one that answers after this many seconds, in place of 5 ms.
    sys.setswitchinterval(0.0005)
    with listening(port) as listener:
        server = uvicorn.Server(server_config(results))
        logging.getLogger("uvicorn.error").addFilter(is_news)
        ready(f"http://{ADDRESS}:{listener.getsockname()[1]}/")
        try:
            server.run(sockets=[listener])
        except KeyboardInterrupt:
            return


def server_config(results: Sequence[Result]) -> uvicorn.Config:
    """How uvicorn runs the application."""
    return uvicorn.Config(
        make_app(results),
        log_level="warning",
        access_log=False,
        server_header=False,
        ws="none",
        # A browser keeps its connections open; it need not be waited for.
        timeout_graceful_shutdown=1,
    )


def is_news(record: logging.LogRecord) -> bool:
    """Whether to log a message: Ctrl-C ends in one line, whatever a browser still asks for."""
    ended = record.exc_info is not None and record.exc_info[0] is asyncio.CancelledError
    return not ended and "graceful shutdown" not in record.getMessage()


def open_browser(url: str) -> None:
    """Open the page in the user's browser, without waiting for it."""
    threading.Thread(target=webbrowser.open, args=(url,), daemon=True).start()


def listening(port: int) -> socket.socket:
    """A socket that only this machine can reach; port 0 takes a free one. Raises ViewError where the port is taken."""
    # Only where the protocol is named does asyncio switch Nagle's algorithm off, which holds back answers for 40 ms.
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((ADDRESS, port))
    except OSError as error:
        listener.close()
        raise ViewError(
            f"port {port} cannot be used ({error.strerror or error}); choose another --port, or leave it out"
        ) from error
    listener.listen()
    return listener
