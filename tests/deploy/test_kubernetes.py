"""The manifests: rendered, held against Kubernetes' own schemas, and what they promise of every pod."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate  # type: ignore[import-untyped] # it has none
import pytest

from tests.deploy.files import DEPLOY, debian_tool, documents, env_file, output_of, read_yaml

KUBERNETES = DEPLOY / "kubernetes"
OVERLAYS = ["cpu", "gpu", "nightly"]
VERSION = kubernetes_validate.latest_version()

Manifest = dict[str, Any]


def plain() -> Iterator[tuple[Path, Manifest]]:
    """The resources as they are written, before kustomize."""
    for path in sorted(KUBERNETES.rglob("*.yaml")):
        if path.name not in ("kustomization.yaml", "references.yaml"):
            for manifest in documents(path.read_text(encoding="utf-8")):
                yield path, manifest


@pytest.fixture(scope="module", params=OVERLAYS)
def rendered(request: pytest.FixtureRequest) -> list[Manifest]:
    kubectl = debian_tool("kubectl", "kubernetes-client")
    if "kustomizeVersion" not in output_of(kubectl, "version", "--client", "--output=json"):
        pytest.skip("kubectl is older than 1.24, and its kustomize knows less than these files ask for")
    return documents(output_of(kubectl, "kustomize", str(KUBERNETES / "overlays" / request.param)))


def as_kubernetes_knows_them(manifest: Manifest) -> Iterator[Manifest]:
    """The manifest; of a DaskCluster, of which the schemas know nothing, the pods and the service that it holds."""
    if manifest["kind"] != "DaskCluster":
        yield manifest
        return
    spec = manifest["spec"]
    for role in ("scheduler", "worker"):
        yield {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": role}, "spec": spec[role]["spec"]}
    service = spec["scheduler"]["service"]
    yield {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "scheduler"}, "spec": service}


def pods(manifests: list[Manifest]) -> list[Manifest]:
    """The specifications of all pods."""
    found = []
    for manifest in (one for whole in manifests for one in as_kubernetes_knows_them(whole)):
        spec = manifest.get("spec", {})
        if manifest["kind"] == "Pod":
            found.append(spec)
        elif manifest["kind"] == "Deployment":
            found.append(spec["template"]["spec"])
        elif manifest["kind"] == "CronJob":
            found.append(spec["jobTemplate"]["spec"]["template"]["spec"])
    return found


def check(manifest: Manifest) -> None:
    kubernetes_validate.validate(manifest, VERSION, strict=True)


def test_rendered_manifests_have_the_form_of_kubernetes(rendered: list[Manifest]) -> None:
    assert len(rendered) > 5
    for manifest in rendered:
        for one in as_kubernetes_knows_them(manifest):
            check(one)


def test_written_manifests_have_the_form_of_kubernetes() -> None:
    found = list(plain())
    assert {"Namespace", "PersistentVolumeClaim", "NetworkPolicy", "Deployment", "DaskCluster", "CronJob"} == {
        manifest["kind"] for _, manifest in found
    }
    for _, manifest in found:
        for one in as_kubernetes_knows_them(manifest):
            check(one)


def test_a_wrong_field_in_a_pod_of_dask_would_be_found() -> None:
    (cluster,) = [manifest for _, manifest in plain() if manifest["kind"] == "DaskCluster"]
    cluster["spec"]["worker"]["spec"]["containers"][0]["memory"] = "8Gi"
    with pytest.raises(kubernetes_validate.ValidationError):
        for one in as_kubernetes_knows_them(cluster):
            check(one)


def test_everything_is_in_one_namespace(rendered: list[Manifest]) -> None:
    spaces = {one["metadata"].get("namespace") for one in rendered if one["kind"] != "Namespace"}
    assert spaces == {"wsi-segment"}


def test_kustomizations_name_files_that_are_there_and_leave_none_out() -> None:
    named: set[Path] = set()
    for file in [*KUBERNETES.rglob("kustomization.yaml"), DEPLOY / "settings" / "kustomization.yaml"]:
        kustomization = read_yaml(file)
        assert kustomization["kind"] == "Kustomization"
        listed = [*kustomization.get("resources", []), *kustomization.get("configurations", [])]
        listed += [env for maker in kustomization.get("configMapGenerator", []) for env in maker.get("envs", [])]
        for name in listed:
            path = (file.parent / name).resolve()
            assert path.is_file() or (path / "kustomization.yaml").is_file(), f"{file}: {name}"
            named.add(path)
    assert {path for path, _ in plain()} <= named


def test_settings_reach_every_container(rendered: list[Manifest]) -> None:
    (settings,) = [one for one in rendered if one["metadata"]["name"].startswith("wsi-segment-settings-")]
    assert settings["data"] == env_file(DEPLOY / "settings" / "settings.env")
    containers = [container for pod in pods(rendered) for container in pod["containers"]]
    assert containers
    for container in containers:
        taken = [source["configMapRef"]["name"] for source in container["envFrom"]]
        assert settings["metadata"]["name"] in taken


def test_no_pod_is_root_or_writes_anywhere_but_into_its_volumes(rendered: list[Manifest]) -> None:
    assert pods(rendered)
    for pod in pods(rendered):
        assert pod["automountServiceAccountToken"] is False
        user = pod["securityContext"]
        assert user["runAsNonRoot"] is True
        assert user["runAsUser"] == 10001
        assert user["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in pod["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            assert {"cpu", "memory"} <= container["resources"]["requests"].keys()
            assert "memory" in container["resources"]["limits"]
            mounts = {mount["name"]: mount for mount in container["volumeMounts"]}
            assert mounts.keys() == {volume["name"] for volume in pod["volumes"]}
            assert mounts.get("slides", {}).get("readOnly", True) is True


def test_gpu_overlay_gives_each_dask_worker_one_and_nobody_else(rendered: list[Manifest]) -> None:
    limits = [
        (container["image"].rpartition(":")[2], container["name"], container["resources"]["limits"])
        for pod in pods(rendered)
        for container in pod["containers"]
    ]
    with_gpu = [name for _, name, limit in limits if "nvidia.com/gpu" in limit]
    assert with_gpu == (["worker"] if limits[0][0] == "cuda" else [])


def test_nobody_comes_in_who_is_not_named(rendered: list[Manifest]) -> None:
    policies = {one["metadata"]["name"]: one["spec"] for one in rendered if one["kind"] == "NetworkPolicy"}
    assert policies["nobody"]["podSelector"] == {}
    assert policies["nobody"]["policyTypes"] == ["Ingress", "Egress"]
    assert "ingress" not in policies["nobody"]
    allowed = [peer for spec in policies.values() for rule in spec.get("ingress", []) for peer in rule["from"]]
    assert all("podSelector" in peer or "namespaceSelector" in peer for peer in allowed)


def test_dask_scheduler_is_found_under_the_names_that_its_pods_have() -> None:
    (cluster,) = [manifest for _, manifest in plain() if manifest["kind"] == "DaskCluster"]
    policies = [manifest for path, manifest in plain() if path.parent.name == "cluster" and path.stem == "network"]
    name = cluster["metadata"]["name"]
    assert cluster["spec"]["scheduler"]["service"]["selector"]["dask.org/cluster-name"] == name
    (dask,) = [one for one in policies if one["metadata"]["name"] == "dask"]
    assert dask["spec"]["podSelector"]["matchLabels"] == {"dask.org/cluster-name": name}
