"""What Prefect's server and page show of a run."""

from __future__ import annotations

import json
from typing import Any

import pytest
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId, FlowRunFilterParentFlowRunId
from prefect.client.schemas.objects import FlowRun

from tests.flows.servers import until


def newest_run(client: SyncPrefectClient) -> FlowRun:
    return max(client.read_flow_runs(), key=lambda one: one.created or 0)


def newest_parent(client: SyncPrefectClient) -> FlowRun:
    """Return the newest flow run that is not a part of another one."""
    runs = [one for one in client.read_flow_runs() if one.parent_task_run_id is None]
    return max(runs, key=lambda one: one.created or 0)


def part_runs(client: SyncPrefectClient, parent: FlowRun) -> list[FlowRun]:
    """Return the flow runs of a batch's parts."""
    return client.read_flow_runs(
        flow_run_filter=FlowRunFilter(parent_flow_run_id=FlowRunFilterParentFlowRunId(any_=[parent.id]))
    )


def task_states(client: SyncPrefectClient, flow_run: FlowRun, count: int) -> dict[str, str]:
    """Return the names of the states of a run's tasks. The states reach the server shortly after the end of the run."""
    chosen = FlowRunFilter(id=FlowRunFilterId(any_=[flow_run.id]))

    def ended() -> dict[str, str] | None:
        runs = client.read_task_runs(flow_run_filter=chosen)
        states = {one.name: one.state.name or "" for one in runs if one.state is not None and one.state.is_final()}
        return states if len(states) == count else None

    return until(ended, seconds=20, what=f"{count} task runs")


def artifacts(client: SyncPrefectClient, flow_run: FlowRun) -> dict[str, Any]:
    return {one.type or "": one for one in client.read_artifacts() if one.flow_run_id == flow_run.id}


def table_of(client: SyncPrefectClient, flow_run: FlowRun) -> dict[str, dict[str, Any]]:
    return {row["slide"]: row for row in json.loads(artifacts(client, flow_run)["table"].data)}


def shown_tables(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, list[dict[str, object]]]]:
    """Return the list to which `show_table` adds the key and the rows of each table."""
    tables: list[tuple[str, list[dict[str, object]]]] = []
    monkeypatch.setattr("flows.artifacts.create_table_artifact", lambda table, key, **_: tables.append((key, table)))
    return tables
