"""Servers that the tests of the flows share: they take longer to start than the tests take."""

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
    """Prefect's own server for tests; flows that a test calls run against it."""
    with prefect_test_harness(server_startup_timeout=120), get_client(sync_client=True) as client:
        yield client


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrefectServer]:
    """A real Prefect server on a real PostgreSQL."""
    # Not pytest's folder, which is closed to the user that PostgreSQL runs as.
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
