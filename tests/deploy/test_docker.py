"""The image and the compose files: linted, and what they promise of users, files and ports."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

from tests.deploy.files import DEPLOY, debian_tool, env_file, output_of, read_yaml, tool
from tests.repository import REPOSITORY

DOCKERFILE = DEPLOY / "docker" / "Dockerfile"
COMPOSE = DEPLOY / "compose"
FILLED_IN = {"POSTGRES_PASSWORD": "secret", "PREFECT_AUTH": "user:secret"}


def stages() -> dict[str, list[str]]:
    """The Dockerfile's instructions by stage, each on one line."""
    text = re.sub(r"\\\n\s*", "", re.sub(r"(?m)^#.*\n", "", DOCKERFILE.read_text(encoding="utf-8")))
    found: dict[str, list[str]] = {}
    for line in filter(None, text.splitlines()):
        if line.startswith("FROM "):
            found[line.split()[-1]] = []
        elif found:
            found[list(found)[-1]].append(line)
    return found


def test_hadolint_finds_nothing() -> None:
    assert output_of(tool("hadolint"), "--failure-threshold", "style", str(DOCKERFILE)) == ""


def test_hadolint_would_find_something(tmp_path: Path) -> None:
    worse = tmp_path / "Dockerfile"
    worse.write_text(DOCKERFILE.read_text(encoding="utf-8") + "USER root\nRUN cd / && sudo pip install dask\n")
    with pytest.raises(AssertionError, match="DL3004"):
        output_of(tool("hadolint"), "--failure-threshold", "style", str(worse))


def test_final_images_run_as_nobody_special_and_are_built_elsewhere() -> None:
    built = stages()
    assert list(built)[-1] == "cpu"
    for variant in ("cpu", "cuda"):
        assert f"COPY --from=build-{variant} /app /app" in built[variant]
        # The final stage installs and compiles nothing.
        assert not any(line.startswith("RUN") for line in built[variant])
    assert "USER 10001:10001" in built["runtime"]
    assert any(line.startswith("HEALTHCHECK") for line in built["runtime"])
    runs = [line for line in built["runtime"] if line.startswith("RUN")]
    assert all("apt-get" not in run and "pip" not in run for run in runs)
    assert any("--only-binary=:all:" in line for line in built["build"])


def test_image_has_all_packages_of_the_wheel_and_the_version_of_torch_that_was_tested() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))
    packages = project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    copied = " ".join(line for line in stages()["build"] if line.startswith("COPY")).split()
    assert set(packages) <= set(copied)
    (pattern,) = re.findall(r"grep -E '([^']+)' constraints.txt", DOCKERFILE.read_text(encoding="utf-8"))
    constraints = (REPOSITORY / "constraints.txt").read_text(encoding="utf-8").splitlines()
    assert [line.partition("==")[0] for line in constraints if re.match(pattern, line)] == ["torch", "torchvision"]


def test_what_the_image_copies_is_let_through_to_the_build() -> None:
    ignore = (DOCKERFILE.parent / "Dockerfile.dockerignore").read_text(encoding="utf-8").splitlines()
    let_through = {line[1:] for line in ignore if line.startswith("!")}
    assert "*" in ignore
    copies = [line.split()[1:-1] for line in stages()["build"] if line.startswith("COPY")]
    assert {source for sources in copies for source in sources} == let_through
    assert all((REPOSITORY / path).exists() for path in let_through)


@pytest.mark.parametrize("file", sorted(path.name for path in COMPOSE.glob("*.yaml")))
def test_compose_file_has_the_form_of_the_specification(file: str) -> None:
    check = output_of(tool("check-jsonschema"), "--builtin-schema", "vendor.compose-spec", str(COMPOSE / file))
    assert "ok" in check


@pytest.mark.parametrize("added", [[], ["compose.gpu.yaml"], ["compose.redis.yaml"]])
def test_docker_compose_puts_the_files_together(added: list[str], tmp_path: Path) -> None:
    services = put_together(debian_tool("docker-compose", "docker-compose"), added, tmp_path)["services"]
    settings = env_file(DEPLOY / "settings" / "settings.env")
    for name in ("server", "deploy", "worker", "scheduler", "dask-worker"):
        service = services[name]
        assert service["environment"].items() >= settings.items()
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
    for name in ("worker", "dask-worker"):
        assert sorted(services[name]["volumes"]) == ["/srv/results:/data/results:rw", "/srv/slides:/data/slides:ro"]
    assert ("redis" in services) == ("compose.redis.yaml" in added)
    server = services["server"]["environment"]
    assert server.get("PREFECT_MESSAGING_BROKER") == ("prefect_redis.messaging" if "redis" in services else None)
    # Prefect has three clients of Redis. Each of them connects to its own machine by default.
    addresses = ("REDIS_MESSAGING_URL", "REDIS_WORKER_CLEANUP_QUEUE_URL", "SERVER_DOCKET_URL")
    expected = "redis://redis:6379/0" if "redis" in services else None
    assert {server.get(f"PREFECT_{name}") for name in addresses} == {expected}


def test_docker_compose_asks_for_a_password_that_is_missing(tmp_path: Path) -> None:
    program = debian_tool("docker-compose", "docker-compose")
    with pytest.raises(AssertionError, match=r"set PREFECT_AUTH in \.env"):
        put_together(program, [], tmp_path, PREFECT_AUTH="")


def put_together(program: str, added: list[str], tmp_path: Path, **changed: str) -> Any:
    lines = env_file(COMPOSE / "example.env") | FILLED_IN | changed
    env = tmp_path / "env"
    env.write_text("".join(f"{name}={value}\n" for name, value in lines.items()), encoding="utf-8")
    merged = tmp_path / "merged.yaml"
    files = [word for file in ("compose.yaml", *added) for word in ("-f", str(COMPOSE / file))]
    merged.write_text(output_of(program, "--env-file", str(env), *files, "config"), encoding="utf-8")
    return read_yaml(merged)


def test_ports_are_published_on_this_machine_only_and_services_come_back() -> None:
    services = read_yaml(COMPOSE / "compose.yaml")["services"]
    ports = [port for service in services.values() for port in service.get("ports", [])]
    assert len(ports) == 2
    assert all(port.startswith("127.0.0.1:") for port in ports)
    assert {name: service["restart"] for name, service in services.items()} == (
        dict.fromkeys(services, "unless-stopped") | {"deploy": "no"}
    )


def test_every_variable_of_the_compose_files_is_in_the_example() -> None:
    used = {
        name
        for file in COMPOSE.glob("*.yaml")
        for name in re.findall(r"\$\{([A-Z_]+)", re.sub(r"(?m)^\s*#.*$", "", file.read_text(encoding="utf-8")))
    }
    example = (COMPOSE / "example.env").read_text(encoding="utf-8")
    assert used == set(re.findall(r"(?m)^(?:# )?([A-Z_]+)=", example)) - {"COMPOSE_PROJECT_NAME"}


def test_health_checks_ask_the_address_at_which_each_program_answers() -> None:
    services = read_yaml(COMPOSE / "compose.yaml")["services"]
    for name, port in {"server": "4200", "scheduler": "8787", "dask-worker": "8788"}.items():
        assert f":{port}/" in services[name]["environment"]["HEALTH_URL"]
        assert any(port in word for word in services[name]["command"])
    # Prefect's worker: the image's own command and address.
    from prefect.settings import get_current_settings

    assert f"127.0.0.1:{get_current_settings().worker.webserver.port}/health" in DOCKERFILE.read_text(encoding="utf-8")
    assert "command" not in services["worker"]
