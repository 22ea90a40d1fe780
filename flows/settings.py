"""What this project asks of Prefect: the one place of its settings, which deployments repeat word for word."""

from __future__ import annotations

import os

ENVIRONMENT = {
    # Nothing goes out to the internet: no telemetry, no advertisements in the page.
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
    # A cold start on a slow disk takes 18 s, and the limit would be 20.
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
    # The recorder writes task runs one batch at a time; small ones fall behind where slides are quick.
    "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_BATCH_SIZE": "200",
    # How a server learns that a flow's process was killed together with its worker.
    "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30",
}
"""Environment variables of every process with Prefect in it: server, worker, flow."""


def apply_defaults() -> None:
    """Set those variables that the environment does not set itself; does nothing for a Prefect imported before."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
