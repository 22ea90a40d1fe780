"""Serve an application of ours from a thread, for tests of pages."""

from __future__ import annotations

import gc
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn
from starlette.types import ASGIApp

from pipeline.web.server import listening, server_config


@contextmanager
def serving_app(app: ASGIApp, port: int = 0) -> Iterator[int]:
    """Serve the application at a port, or at a free one for 0; yield the port."""
    with listening(port) as listener:
        server = uvicorn.Server(server_config(app))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        while not server.started:
            time.sleep(0.01)
        try:
            yield listener.getsockname()[1]
        finally:
            # A browser can connect while the server stops. asyncio then leaves a transport that nobody closes, whose
            # warning would fail whatever test runs when it is collected.
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "unclosed", ResourceWarning)
                server.should_exit = True
                thread.join()
                del server
                gc.collect()
