"""The settings of Prefect. The deployments repeat them word for word."""

from __future__ import annotations

import os

ENVIRONMENT = {
    # No traffic to the internet: no telemetry, no advertisements on the page.
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
    # A cold start on a slow disk takes 18 s; the default limit is 20 s.
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
    # The recorder writes task runs in batches. Small batches fall behind if slides are quick.
    "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_BATCH_SIZE": "200",
    # Heartbeats show the server that a flow's process was killed together with its worker.
    "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30",
}
"""Environment variables of every process with Prefect in it: server, worker, flow."""


def apply_defaults() -> None:
    """Set the variables that the environment does not set. It has no effect after Prefect was imported."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
