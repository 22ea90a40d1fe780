"""The deployments of prefect.yaml are those that the flows take."""

from __future__ import annotations

import re
from typing import Any

import pytest
from prefect import Flow
from prefect.client.schemas.schedules import CronSchedule
from prefect.flows import load_flow_from_entrypoint
from prefect.utilities.templating import apply_values

from tests.deploy.files import DEPLOY, read_yaml

FILE = DEPLOY / "prefect.yaml"
DEPLOYMENTS: list[dict[str, Any]] = read_yaml(FILE)["deployments"]
ASKED_FOR = {
    "nightly": set[str](),
    "on-demand": {"source"},
    "one-slide": {"slide"},
    "training": {"dataset", "output"},
}
"""Parameters that whoever starts a run is asked for."""


def flow_of(deployment: dict[str, Any]) -> Flow[..., Any]:
    return load_flow_from_entrypoint(deployment["entrypoint"], use_placeholder_flow=False)


def schema(flow: Flow[..., Any]) -> tuple[set[str], set[str]]:
    """Names of a flow's parameters: all of them, and those without a default."""
    return set(flow.parameters.properties), set(flow.parameters.required or ())


def named(name: str) -> dict[str, Any]:
    (found,) = [one for one in DEPLOYMENTS if one["name"] == name]
    return found


def test_prefect_reads_the_file_and_pulls_nothing() -> None:
    from prefect.cli.deploy._models import PrefectYamlModel

    model = PrefectYamlModel.model_validate(read_yaml(FILE))
    assert model.pull == []
    assert {one.name for one in model.deployments} == set(ASKED_FOR)
    assert all(one.work_pool is not None and one.work_pool.name == "slides" for one in model.deployments)
    assert {one.entrypoint for one in model.deployments} == {
        "flows.batch.segment_batch",
        "flows.slide.segment_slide_flow",
        "flows.train.train_flow",
    }


@pytest.mark.parametrize("name", ASKED_FOR)
def test_parameters_are_those_of_the_flow_and_valid(name: str) -> None:
    deployment = named(name)
    flow = flow_of(deployment)
    known, required = schema(flow)
    given = set(deployment["parameters"])
    assert given <= known
    assert required - given == ASKED_FOR[name] - given
    assert not ASKED_FOR[name] & given
    complete = deployment["parameters"] | dict.fromkeys(ASKED_FOR[name], "somewhere")
    assert flow.validate_parameters(complete).keys() >= complete.keys()


def test_a_wrong_parameter_would_be_found() -> None:
    from prefect.exceptions import ParameterTypeError

    flow = flow_of(named("nightly"))
    with pytest.raises(ParameterTypeError):
        flow.validate_parameters(named("nightly")["parameters"] | {"slide_timeout_s": "soon"})


@pytest.mark.parametrize("name", ASKED_FOR)
def test_a_time_limit_comes_with_processes_that_can_be_stopped(name: str) -> None:
    parameters = named(name)["parameters"]
    assert parameters.get("scheduler") is not None or parameters.get("slide_timeout_s") is None


def test_only_the_nightly_deployment_has_a_schedule_and_cron_can_read_it() -> None:
    assert {one["name"] for one in DEPLOYMENTS if one.get("schedules")} == {"nightly"}
    (schedule,) = named("nightly")["schedules"]
    assert CronSchedule.model_validate(schedule).timezone == "Etc/UTC"


@pytest.mark.parametrize("address", ["local", "tcp://scheduler:8786", r"/srv/R&D/a|b\1.json"])
def test_the_scheduler_of_what_segments_slides_is_taken_from_the_environment_as_it_is(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WSI_SCHEDULER", address)
    schedulers = {one["name"]: one["parameters"].get("scheduler") for one in apply_values(DEPLOYMENTS, {})}
    assert schedulers == dict.fromkeys(("nightly", "on-demand", "one-slide"), address) | {"training": None}


def test_register_script_names_every_deployment() -> None:
    script = (DEPLOY / "register.sh").read_text(encoding="utf-8")
    (listed,) = re.findall(r"for deployment in (.*);", script)
    assert listed.split() == [f"{flow_of(one).name}/{one['name']}" for one in DEPLOYMENTS]
