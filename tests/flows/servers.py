"""A PostgreSQL, a Prefect server and a process worker for tests, each in a process that can be killed."""

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

# The user of Debian's package first.
UNPRIVILEGED = ("postgres", "nobody")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def until(ask: Callable[[], Answer | None], *, seconds: float, what: str) -> Answer:
    """The first answer that is one; fails the test where there is none in time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        answer = ask()
        if answer:
            return answer
        time.sleep(0.1)
    pytest.fail(f"{what}: not within {seconds:.0f} s")


def kill(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL a process and all that it has started."""
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
        pytest.skip(f"no PostgreSQL: {name} is not installed (Debian's package postgresql has it)")
    return found


def _as_unprivileged(folder: Path) -> list[str]:
    """What stands before a command to run it as a user that may start PostgreSQL, which refuses root."""
    if os.geteuid() != 0:
        return []
    for name in UNPRIVILEGED:
        with suppress(KeyError):
            user = pwd.getpwnam(name)
            os.chown(folder, user.pw_uid, user.pw_gid)
            return ["setpriv", f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups"]
    pytest.skip("no PostgreSQL: it refuses root, and there is no user postgres or nobody to run it as")


@contextmanager
def postgres(folder: Path) -> Iterator[str]:
    """A PostgreSQL with its data in a folder that any user can reach; yields the URL for Prefect's server."""
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
    """A Prefect server on a database, and what connects to it."""

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
        """Of every process that has to do with this server."""
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
        """A process beside the server, with its output in the folder."""
        with (self.folder / f"{name}.log").open("ab") as log:
            return subprocess.Popen(command, stdout=log, stderr=log, env=self.environment, cwd=cwd or self.folder)

    def start(self) -> None:
        arguments = ("server", "start", "--host", "127.0.0.1", "--port", str(self.port), "--no-ui")
        self.process = self.begin("server", self.command(*arguments))
        until(self._healthy, seconds=120, what="Prefect's server")

    def kill(self) -> None:
        """SIGKILL the server; flows and workers are left alone."""
        if self.process is not None:
            kill(self.process)

    def start_worker(self) -> None:
        self.worker = self.begin("worker", self.command("worker", "start", "--pool", POOL, "--type", "process"))

    def kill_worker(self) -> None:
        """SIGKILL the worker and the flows that it runs."""
        if self.worker is not None:
            kill(self.worker)

    def flow_process(self) -> psutil.Process:
        """The process of the one flow run that the worker has at the moment."""
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
