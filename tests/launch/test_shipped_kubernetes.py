"""k8s/: schemas, and rules that no schema has; no secret, no image without digest."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

K8S = Path(__file__).parents[2] / "k8s"
BASE = K8S / "base"
OVERLAYS = sorted((K8S / "overlays").iterdir())
RUNTIME = Path(__file__).parent / "golden" / "runtime.yaml"
CORE_VERSION = "1.34"
KUEUE = {"Topology", "ResourceFlavor", "ClusterQueue", "LocalQueue", "WorkloadPriorityClass"}
Object = dict[str, Any]


def _built(folder: Path) -> list[Object]:
    """Render a folder as kustomize does: by its binary where there is one, else the files that it lists."""
    for command in (["kustomize", "build"], ["kubectl", "kustomize"]):
        if shutil.which(command[0]):
            done = subprocess.run([*command, folder], capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            return [found for found in yaml.safe_load_all(done.stdout) if found]
    return list(_listed(folder))


def _listed(folder: Path) -> Iterator[Object]:
    kustomization = yaml.safe_load((folder / "kustomization.yaml").read_text())
    assert set(kustomization) <= {"apiVersion", "kind", "namespace", "resources"}, "a field that is not followed here"
    for name in kustomization["resources"]:
        path = folder / name
        yield from _listed(path) if path.is_dir() else filter(None, yaml.safe_load_all(path.read_text()))


def _pods(found: Object) -> Iterator[Object]:
    """Pod specs anywhere in an object."""
    if isinstance(found, dict):
        if "containers" in found and "containerName" not in found:
            yield found
        for value in found.values():
            yield from _pods(value)
    elif isinstance(found, list):
        for value in found:
            yield from _pods(value)


each_folder = pytest.mark.parametrize("folder", [BASE, *OVERLAYS], ids=lambda path: path.name)


@each_folder
@pytest.mark.promise("Every object of k8s/ passes its published schema")
def test_objects_pass_the_published_schemas(folder: Path) -> None:
    for found in _built(folder):
        if found["kind"] == "ClusterTrainingRuntime":
            assert found == yaml.safe_load(RUNTIME.read_text())  # which test_jobset.py holds against its schema
        elif found["kind"] in KUEUE:  # no schema is published offline
            assert found["apiVersion"] == "kueue.x-k8s.io/v1beta2"
        else:
            kubernetes_validate.validate(found, CORE_VERSION, strict=True)


@each_folder
def test_every_file_is_listed_once_and_names_are_unique(folder: Path) -> None:
    listed = yaml.safe_load((folder / "kustomization.yaml").read_text())["resources"]
    own = [name for name in listed if name.endswith(".yaml")]
    assert sorted(own) == sorted(path.name for path in folder.glob("*.yaml") if path.name != "kustomization.yaml")
    names = [(found["kind"], found["metadata"]["name"]) for found in _built(folder)]
    assert len(set(names)) == len(names)


@each_folder
def test_objects_lie_in_the_one_namespace(folder: Path) -> None:
    cluster_wide = KUEUE - {"LocalQueue"} | {"Namespace", "PriorityClass", "ClusterTrainingRuntime"}
    for found in _built(folder):
        namespace = found["metadata"].get("namespace")
        assert namespace == (None if found["kind"] in cluster_wide else "megamask"), found["metadata"]["name"]


@each_folder
@pytest.mark.promise("No object of k8s/ holds a secret, runs as root, or names an image without a digest")
def test_pods_are_confined_and_hold_no_secret(folder: Path) -> None:
    for found in _built(folder):
        assert found["kind"] != "Secret"
        for pod in _pods(found):
            assert pod["automountServiceAccountToken"] is False
            assert pod["enableServiceLinks"] is False
            assert pod["securityContext"]["runAsNonRoot"] is True
            assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
            for container in pod["containers"]:
                assert re.search(r"@sha256:[0-9a-f]{64}$", container["image"])
                context = container["securityContext"]
                assert context["allowPrivilegeEscalation"] is False
                assert context["readOnlyRootFilesystem"] is True
                assert context["capabilities"]["drop"] == ["ALL"]
                for entry in container.get("env", ()):
                    assert not ("value" in entry and re.search("PASSWORD|TOKEN|SECRET", entry["name"]))
                if "volumes" in pod:
                    names = {volume["name"] for volume in pod["volumes"]}
                    names |= {claim["metadata"]["name"] for claim in found["spec"].get("volumeClaimTemplates", ())}
                    assert {mount["name"] for mount in container["volumeMounts"]} == names


def test_policies_let_a_job_reach_itself_names_and_mlflow_and_nothing_else() -> None:
    policies = {found["metadata"]["name"]: found["spec"] for found in _built(BASE) if found["kind"] == "NetworkPolicy"}
    assert policies["deny-by-default"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    training = policies["training"]
    assert [rule.get("ports") for rule in training["ingress"]] == [None]
    ports = [{port["port"] for port in rule.get("ports", ())} for rule in training["egress"]]
    assert ports == [set(), {53}, {5000}]


def test_services_and_workloads_select_pods_that_exist() -> None:
    for folder in OVERLAYS:
        found = _built(folder)
        labels = [
            each["spec"]["template"]["metadata"]["labels"]
            for each in found
            if "template" in each.get("spec", {}) and "metadata" in each["spec"]["template"]
        ]
        for each in found:
            if each["kind"] == "Service":
                assert any(each["spec"]["selector"].items() <= own.items() for own in labels), each["metadata"]["name"]
            elif each["kind"] in ("Deployment", "StatefulSet"):
                own = each["spec"]["template"]["metadata"]["labels"]
                assert each["spec"]["selector"]["matchLabels"].items() <= own.items()


def test_queue_hands_out_what_a_job_asks_for() -> None:
    (queue,) = [found for found in _built(K8S / "overlays" / "kueue") if found["kind"] == "ClusterQueue"]
    (group,) = queue["spec"]["resourceGroups"]
    assert set(group["coveredResources"]) == {"cpu", "memory", "ephemeral-storage", "nvidia.com/gpu"}
    for flavor in group["flavors"]:
        assert [resource["name"] for resource in flavor["resources"]] == group["coveredResources"]
