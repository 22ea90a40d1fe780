"""Servers that the tests of the flows share, because starting a server takes longer than a test."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.testing.utilities import prefect_test_harness

from tests.flows.servers import PrefectServer, postgres


@pytest.fixture(scope="session")
def harness() -> Iterator[SyncPrefectClient]:
    """Yield a client of Prefect's test server. Flows that a test calls use this server."""
    with prefect_test_harness(server_startup_timeout=120), get_client(sync_client=True) as client:
        yield client


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrefectServer]:
    """Yield a real Prefect server with a PostgreSQL database."""
    # The user that PostgreSQL runs as has no access to pytest's folders.
    data = Path(tempfile.mkdtemp())
    data.chmod(0o755)
    try:
        with postgres(data) as database:
            prefect = PrefectServer(tmp_path_factory.mktemp("prefect"), database)
            try:
                prefect.start()
                yield prefect
            finally:
                prefect.kill_worker()
                prefect.kill()
    finally:
        shutil.rmtree(data)
