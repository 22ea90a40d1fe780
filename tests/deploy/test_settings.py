"""The one file of settings: names that the programs know, and values that reach them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator

import pytest
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from flows.settings import ENVIRONMENT
from tests.deploy.files import DEPLOY, SETTINGS, env_file, read_yaml


def prefect_names() -> set[str]:
    """Every environment variable that Prefect reads, old names too."""
    from prefect.settings.models.root import Settings

    return {name.upper() for model, name, field in fields(Settings) for name in names(model, name, field)}


def fields(model: type[BaseModel]) -> Iterator[tuple[type[BaseModel], str, FieldInfo]]:
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel) and "env_prefix" in kind.model_config:
            yield from fields(kind)
        else:
            yield model, name, field


def names(model: type[BaseModel], name: str, field: FieldInfo) -> list[str]:
    if field.validation_alias is None:
        return [f"{model.model_config.get('env_prefix')}{name}"]
    return [one for one in getattr(field.validation_alias, "choices", []) if isinstance(one, str)]


@pytest.mark.parametrize("file", ["settings.env", "several-servers.env"])
def test_prefect_knows_every_setting(file: str) -> None:
    ours = {name for name in env_file(DEPLOY / "settings" / file) if name.startswith("PREFECT_")}
    assert ours
    assert ours <= prefect_names()
    assert "PREFECT_SERVER_ANALYTICS" not in prefect_names()


def test_values_reach_prefect() -> None:
    settings = env_file(SETTINGS)
    code = """
from prefect.settings import get_current_settings as now
s = now()
print(s.server.analytics_enabled, s.server.ephemeral.startup_timeout_seconds, s.flows.heartbeat_frequency,
      s.server.services.task_run_recorder.batch_size, s.server.ui.show_promotional_content)
"""
    run = subprocess.run([sys.executable, "-c", code], env=os.environ | settings, capture_output=True, check=True)
    assert run.stdout.decode().split() == ["False", "120", "30", "200", "False"]


def test_flows_repeat_the_settings_word_for_word() -> None:
    settings = env_file(SETTINGS)
    assert {name: settings.get(name) for name in ENVIRONMENT} == ENVIRONMENT
    assert {name for name in settings if name.startswith(("PREFECT_", "DO_NOT_TRACK"))} == set(ENVIRONMENT)


def test_dask_knows_its_settings_and_gives_workers_our_malloc() -> None:
    settings = env_file(SETTINGS)
    code = """
import dask.config, distributed
from distributed.nanny import _get_env_variables
given = _get_env_variables("distributed.nanny.pre-spawn-environ")
print(given["MALLOC_TRIM_THRESHOLD_"], dask.config.get("distributed.scheduler.allowed-failures"))
"""
    run = subprocess.run([sys.executable, "-c", code], env=os.environ | settings, capture_output=True, check=True)
    assert run.stdout.decode().split() == ["268435456", "2"]
    assert settings["MALLOC_MMAP_THRESHOLD_"] == "268435456"


@pytest.mark.parametrize("file", sorted(path.name for path in (DEPLOY / "settings").glob("*.env")))
def test_docker_kustomize_and_systemd_read_the_same_from_a_line(file: str) -> None:
    # Quotes, blanks, references and comments behind a value mean something to one of them and nothing to another.
    for name, value in env_file(DEPLOY / "settings" / file).items():
        assert name.replace("_", "").isalnum(), name
        assert not set(value) & set("\"'`$#\\ \t"), f"{name}={value}"
        assert value, name


def test_automation_waits_three_heartbeats_and_spares_states_with_names_of_their_own() -> None:
    from prefect.events.schemas.automations import AutomationCore, EventTrigger

    listed = read_yaml(DEPLOY / "settings" / "automations.yaml")["automations"]
    (automation,) = [AutomationCore.model_validate(one) for one in listed]
    trigger = automation.trigger
    assert isinstance(trigger, EventTrigger)
    assert trigger.within.total_seconds() == 3 * int(env_file(SETTINGS)["PREFECT_FLOWS_HEARTBEAT_FREQUENCY"])
    assert trigger.after == {"prefect.flow-run.heartbeat"}
    assert trigger.expect == {"prefect.flow-run.*"}
    (action,) = automation.actions
    assert action.model_dump(mode="json")["state"] == "CRASHED"


def test_register_script_asks_for_the_automation_by_its_name() -> None:
    script = (DEPLOY / "register.sh").read_text(encoding="utf-8")
    asked = set(re.findall(r"exists automation (\S+)", script))
    assert asked == {one["name"] for one in read_yaml(DEPLOY / "settings" / "automations.yaml")["automations"]}
