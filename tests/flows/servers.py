"""A PostgreSQL server, a Prefect server and a Prefect worker for tests, each in its own process."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import httpx
import psutil
import pytest
from prefect.client.orchestration import SyncPrefectClient

from flows.settings import ENVIRONMENT

Answer = TypeVar("Answer")

POOL = "slides"

# Prefer the user of Debian's package.
UNPRIVILEGED = ("postgres", "nobody")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def until(ask: Callable[[], Answer | None], *, seconds: float, what: str) -> Answer:
    """Call `ask` until it returns a true value, and return that value. Fail the test after `seconds`."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        answer = ask()
        if answer:
            return answer
        time.sleep(0.1)
    pytest.fail(f"{what}: not within {seconds:.0f} s")


def kill(process: subprocess.Popen[bytes]) -> None:
    """Kill a process and its descendants with SIGKILL."""
    with suppress(psutil.NoSuchProcess):
        parent = psutil.Process(process.pid)
        for one in [parent, *parent.children(recursive=True)]:
            with suppress(psutil.NoSuchProcess):
                one.kill()
    process.wait()


def _program(name: str) -> str:
    debian = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"), reverse=True)
    found = shutil.which(name) or (str(debian[0]) if debian else None)
    if found is None:
        pytest.skip(f"no PostgreSQL: {name} is not installed (Debian's package postgresql contains it)")
    return found


def _as_unprivileged(folder: Path) -> list[str]:
    """Return a command prefix that switches to an unprivileged user, because PostgreSQL refuses to run as root."""
    if os.geteuid() != 0:
        return []
    for name in UNPRIVILEGED:
        with suppress(KeyError):
            user = pwd.getpwnam(name)
            os.chown(folder, user.pw_uid, user.pw_gid)
            return ["setpriv", f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups"]
    pytest.skip("PostgreSQL refuses to run as root, and neither the user postgres nor nobody exists")


@contextmanager
def postgres(folder: Path) -> Iterator[str]:
    """Run PostgreSQL with its data in a folder that every user can access. Yield the URL for Prefect's server."""
    initdb, server = _program("initdb"), _program("postgres")
    before, port, data = _as_unprivileged(folder), free_port(), folder / "data"
    subprocess.run(
        [*before, initdb, "-D", str(data), "-U", "prefect", "--auth=trust", "--no-sync", "-E", "UTF8"],
        check=True,
        capture_output=True,
        cwd=folder,
    )
    options = [f"port={port}", "listen_addresses=127.0.0.1", f"unix_socket_directories={folder}", "fsync=off"]
    command = [*before, server, "-D", str(data), *(part for option in options for part in ("-c", option))]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder)
        try:
            until(lambda: _accepts(port, process, folder / "log"), seconds=60, what="PostgreSQL")
            yield f"postgresql+asyncpg://prefect@127.0.0.1:{port}/postgres"
        finally:
            process.send_signal(signal.SIGQUIT)
            process.wait(timeout=30)


def _accepts(port: int, process: subprocess.Popen[bytes], log: Path) -> bool:
    assert process.poll() is None, log.read_text()
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@dataclass
class PrefectServer:
    """A Prefect server with its database and its worker."""

    folder: Path
    database: str
    port: int = field(default_factory=free_port)
    process: subprocess.Popen[bytes] | None = None
    worker: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/api"

    @property
    def environment(self) -> dict[str, str]:
        """Return the environment of every process that uses this server."""
        return {
            **os.environ,
            **ENVIRONMENT,
            "PREFECT_HOME": str(self.folder),
            "PREFECT_API_URL": self.url,
            "PREFECT_SERVER_DATABASE_CONNECTION_URL": self.database,
            "PREFECT_WORKER_QUERY_SECONDS": "1",
            "OMP_NUM_THREADS": "1",
        }

    def command(self, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "prefect", *arguments]

    def begin(self, name: str, command: Sequence[str], cwd: Path | None = None) -> subprocess.Popen[bytes]:
        """Start a process with the server's environment and its output in the folder."""
        with (self.folder / f"{name}.log").open("ab") as log:
            return subprocess.Popen(command, stdout=log, stderr=log, env=self.environment, cwd=cwd or self.folder)

    def start(self) -> None:
        arguments = ("server", "start", "--host", "127.0.0.1", "--port", str(self.port), "--no-ui")
        self.process = self.begin("server", self.command(*arguments))
        until(self._healthy, seconds=120, what="Prefect's server")

    def kill(self) -> None:
        """Kill the server with SIGKILL. Flows and workers keep running."""
        if self.process is not None:
            kill(self.process)

    def start_worker(self) -> None:
        self.worker = self.begin("worker", self.command("worker", "start", "--pool", POOL, "--type", "process"))

    def kill_worker(self) -> None:
        """Kill the worker and its flows with SIGKILL."""
        if self.worker is not None:
            kill(self.worker)

    def flow_process(self) -> psutil.Process:
        """Return the process of the only flow run of the worker."""
        assert self.worker is not None
        started = psutil.Process(self.worker.pid).children()
        assert len(started) == 1, started
        return started[0]

    def client(self) -> SyncPrefectClient:
        return SyncPrefectClient(self.url)

    def _healthy(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, (self.folder / "server.log").read_text()
        try:
            return httpx.get(f"{self.url}/health", timeout=5).status_code == 200
        except httpx.HTTPError:
            return False
