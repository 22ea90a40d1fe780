"""deploy/register.sh on a real server."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from prefect.client.schemas.actions import DeploymentUpdate
from prefect.client.schemas.objects import DeploymentSchedule
from prefect.client.schemas.responses import DeploymentResponse

from tests.deploy.files import DEPLOY, output_of
from tests.flows.servers import PrefectServer

pytestmark = pytest.mark.full


@pytest.fixture
def empty_server(tmp_path: Path) -> Iterator[PrefectServer]:
    """Yield a server of its own: the schedule and the automation would disturb other tests."""
    server = PrefectServer(tmp_path, f"sqlite+aiosqlite:///{tmp_path}/prefect.db")
    try:
        server.start()
        yield server
    finally:
        server.kill()


def register(server: PrefectServer, *options: str, scheduler: str = "") -> None:
    programs = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    # As in a narrow terminal, where Prefect wraps its messages.
    environment = server.environment | {"PATH": programs, "WSI_SCHEDULER": scheduler, "COLUMNS": "20"}
    output_of("bash", str(DEPLOY / "register.sh"), *options, env=environment)


def nightly(server: PrefectServer) -> tuple[DeploymentResponse, DeploymentSchedule]:
    with server.client() as client:
        deployment = client.read_deployment_by_name("segment-batch/nightly")
    (schedule,) = deployment.schedules
    return deployment, schedule


def test_registering_again_keeps_a_paused_schedule_and_changed_parameters_unless_it_is_to_replace_them(
    empty_server: PrefectServer,
) -> None:
    address = "/srv/R&D/scheduler.json"
    register(empty_server, scheduler=address)
    deployment, schedule = nightly(empty_server)
    assert (schedule.active, deployment.parameters["hide_paths"]) == (True, False)
    assert deployment.parameters["scheduler"] == address

    with empty_server.client() as client:
        client.update_deployment_schedule(deployment.id, schedule.id, active=False)
        client.update_deployment(
            deployment.id, DeploymentUpdate(parameters=deployment.parameters | {"hide_paths": True})
        )
    register(empty_server)
    deployment, schedule = nightly(empty_server)
    assert (schedule.active, deployment.parameters["hide_paths"]) == (False, True)
    assert deployment.parameters["scheduler"] == address

    register(empty_server, "--replace")
    deployment, schedule = nightly(empty_server)
    assert (schedule.active, deployment.parameters["hide_paths"]) == (True, False)
    assert deployment.parameters["scheduler"] == "local"
