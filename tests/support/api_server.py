"""A real API server for custom resources on this machine: etcd and apiextensions-apiserver, on the loopback interface.

MEGAMASK_TEST_APISERVER names the second program, which Kubernetes' sources build (k8s.io/apiextensions-apiserver);
etcd, openssl and kubectl are packages. There are no controllers and no core API, so nothing runs: objects are decoded
and validated as on a cluster. The definitions are those in the folder MEGAMASK_TEST_CRDS, as the projects release
them, or else made from their published models, which lack rules written in CEL and keys of lists.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from kubeflow_trainer_api import models

from support.slurm_cluster import wait_for

BINARY, DEFINITIONS = "MEGAMASK_TEST_APISERVER", "MEGAMASK_TEST_CRDS"
_NEEDED = ("etcd", "openssl", "kubectl")
_WAIT_S = 300.0
_KINDS = {
    "JobSet": (models.JobsetV1alpha2JobSet, "jobset.x-k8s.io/v1alpha2", "jobsets", "Namespaced"),
    "TrainJob": (models.TrainerV1alpha1TrainJob, "trainer.kubeflow.org/v1alpha1", "trainjobs", "Namespaced"),
    "ClusterTrainingRuntime": (
        models.TrainerV1alpha1ClusterTrainingRuntime,
        "trainer.kubeflow.org/v1alpha1",
        "clustertrainingruntimes",
        "Cluster",
    ),
}
Object = dict[str, Any]


def why_not() -> str | None:
    """Return why no API server can be started here, or None."""
    if BINARY not in os.environ:
        return f"{BINARY} names no apiextensions-apiserver"
    missing = [name for name in (*_NEEDED, os.environ[BINARY]) if shutil.which(name) is None]
    return f"{', '.join(missing)} not installed" if missing else None


def path_of(kind: str, namespace: str = "default") -> str:
    """Return the path of the objects of a kind on any API server that knows them."""
    _, version, plural, scope = _KINDS[kind]
    return f"/apis/{version}/{plural}" if scope == "Cluster" else f"/apis/{version}/namespaces/{namespace}/{plural}"


def kubectl(kubeconfig: str, *words: str, document: Object | None = None) -> subprocess.CompletedProcess[str]:
    """Run kubectl, with a document as its input."""
    return subprocess.run(
        ["kubectl", "--kubeconfig", kubeconfig, "--request-timeout=120s", *words],
        input=None if document is None else json.dumps(document),
        capture_output=True,
        text=True,
        timeout=_WAIT_S,
        check=False,
    )


@contextlib.contextmanager
def api_server(folder: Path) -> Iterator[str]:
    """Start an API server that knows JobSet and Kubeflow Trainer; yield the path of its kubeconfig."""
    _certificates(folder)
    store, peer, port = _free_port(), _free_port(), _free_port()
    kubeconfig = folder / "kubeconfig"
    kubeconfig.write_text(yaml.safe_dump(_kubeconfig(folder, port)))
    with contextlib.ExitStack() as stack:
        address, peers = f"http://127.0.0.1:{store}", f"http://127.0.0.1:{peer}"
        words = ["etcd", f"--data-dir={folder / 'etcd'}", "--unsafe-no-fsync", "--log-level=error"]
        words += [f"--listen-client-urls={address}", f"--advertise-client-urls={address}"]
        words += [f"--listen-peer-urls={peers}", f"--initial-advertise-peer-urls={peers}"]
        words += [f"--initial-cluster=default={peers}"]
        stack.enter_context(_running(words, folder / "etcd.log"))
        # a client certificate of the group system:masters may do all, so no core API is asked
        words = [os.environ[BINARY], f"--etcd-servers={address}", "--bind-address=127.0.0.1", f"--secure-port={port}"]
        words += [f"--cert-dir={folder / 'serving'}", f"--client-ca-file={folder / 'ca.crt'}"]
        words += [f"--{name}kubeconfig={kubeconfig}" for name in ("", "authentication-", "authorization-")]
        words += ["--authentication-skip-lookup", "--authorization-always-allow-paths=/*"]
        words += ["--enable-priority-and-fairness=false", f"--disable-admission-plugins={','.join(_ASKING_CORE)}"]
        stack.enter_context(_running(words, folder / "api.log"))
        definitions = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"
        wait_for(
            "the API server", lambda: kubectl(str(kubeconfig), "get", "--raw", definitions).returncode == 0, _WAIT_S
        )
        for definition in _definitions():
            done = kubectl(str(kubeconfig), "create", "--raw", definitions, "-f", "-", document=definition)
            assert done.returncode == 0, done.stderr
        for kind in _KINDS:
            wait_for(
                kind, lambda kind=kind: kubectl(str(kubeconfig), "get", "--raw", path_of(kind)).returncode == 0, _WAIT_S
            )
        yield str(kubeconfig)


_ASKING_CORE = (
    "NamespaceLifecycle",
    "MutatingAdmissionWebhook",
    "ValidatingAdmissionWebhook",
    "ValidatingAdmissionPolicy",
    "MutatingAdmissionPolicy",
)


@contextlib.contextmanager
def _running(words: list[str], log: Path) -> Iterator[None]:
    with log.open("wb") as file:
        process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=file, stderr=file)
    try:
        yield
    finally:
        process.kill()
        process.wait()


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def _certificates(folder: Path) -> None:
    """A certificate authority, and a client of the group that may do all."""

    def openssl(*words: str) -> None:
        subprocess.run(["openssl", *words], cwd=folder, check=True, capture_output=True)

    request = ("req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    openssl(*request, "-x509", "-keyout", "ca.key", "-out", "ca.crt", "-days", "2", "-subj", "/CN=test-ca")
    openssl(*request, "-keyout", "admin.key", "-out", "admin.csr", "-subj", "/O=system:masters/CN=admin")
    signed = ("-in", "admin.csr", "-CA", "ca.crt", "-CAkey", "ca.key", "-CAcreateserial", "-days", "2")
    openssl("x509", "-req", *signed, "-out", "admin.crt")


def _kubeconfig(folder: Path, port: int) -> Object:
    user = {"client-certificate": str(folder / "admin.crt"), "client-key": str(folder / "admin.key")}
    cluster = {"server": f"https://127.0.0.1:{port}", "insecure-skip-tls-verify": True}
    return {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "test", "cluster": cluster}],
        "users": [{"name": "admin", "user": user}],
        "contexts": [{"name": "test", "context": {"cluster": "test", "user": "admin", "namespace": "default"}}],
        "current-context": "test",
    }


def _definitions() -> Iterator[Object]:
    if (folder := os.environ.get(DEFINITIONS)) is not None:
        for path in sorted(Path(folder).glob("*.yaml")):
            yield from (found for found in yaml.safe_load_all(path.read_text()) if found)
        return
    for kind, (model, version, plural, scope) in _KINDS.items():
        group, _, name = version.partition("/")
        schema = model.model_json_schema(by_alias=True)
        served = _structural(schema, schema.get("$defs", {}))
        served["properties"]["metadata"] = {"type": "object"}
        versions = [{"name": name, "served": True, "storage": True, "schema": {"openAPIV3Schema": served}}]
        names = {"kind": kind, "plural": plural, "singular": kind.lower(), "listKind": f"{kind}List"}
        yield {
            "apiVersion": "apiextensions.k8s.io/v1",
            "kind": "CustomResourceDefinition",
            "metadata": {
                "name": f"{plural}.{group}",
                "annotations": {"api-approved.kubernetes.io": "unapproved, of a test"},
            },
            "spec": {"group": group, "names": names, "scope": scope, "versions": versions},
        }


def _structural(schema: Mapping[str, Any], known: Mapping[str, Any]) -> Object:
    """A schema in the form that the API server takes: without references and without choices."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        if name.endswith(("IntOrString", "ResourceQuantity")):  # of either type; the model keeps both
            return {"x-kubernetes-int-or-string": True}
        return _structural(known[name], known)
    if "anyOf" in schema:
        [one] = [choice for choice in schema["anyOf"] if choice.get("type") != "null"]
        return _structural(one, known) | {"nullable": True}
    if schema.get("type") == "array":
        return {"type": "array", "items": _structural(schema["items"], known)}
    if schema.get("type") == "object" or "properties" in schema:
        found: Object = {"type": "object"}
        if "properties" in schema:
            found["properties"] = {name: _structural(entry, known) for name, entry in schema["properties"].items()}
            if required := schema.get("required"):
                found["required"] = required
        elif isinstance(schema.get("additionalProperties"), dict):
            found["additionalProperties"] = _structural(schema["additionalProperties"], known)
        else:
            found["x-kubernetes-preserve-unknown-fields"] = True
        return found
    kept = {name: schema[name] for name in ("type", "enum") if name in schema}
    return kept or {"x-kubernetes-preserve-unknown-fields": True}
