import re
from dataclasses import replace
from pathlib import Path

import kubernetes_validate
import pytest
import yaml
from kubeflow_trainer_api import models

from megamask.launch import jobset, lint, trainjob
from megamask.launch.job import COUNTED_CODES, FREE_CODES, STOP_CODES
from support.launch_jobs import FULL, SMALL
from support.trainjob_emulation import jobset_of

GOLDEN = Path(__file__).parent / "golden"
CORE_VERSION = "1.34"


def _lost(given, kept, path=""):
    """Places that a schema's model dropped or changed: fields that it does not know."""
    if isinstance(given, dict) and isinstance(kept, dict):
        for key, value in given.items():
            yield from _lost(value, kept[key], f"{path}.{key}") if key in kept else [f"{path}.{key}"]
    elif isinstance(given, list) and isinstance(kept, list) and len(given) == len(kept):
        for number, (one, other) in enumerate(zip(given, kept, strict=True)):
            yield from _lost(one, other, f"{path}[{number}]")
    elif given != kept:
        yield path


def _check_model(document, model):
    kept = getattr(models, model).from_dict(document).to_dict()
    assert list(_lost(document, kept)) == []


@pytest.mark.parametrize("name", ["small.jobset", "full.jobset", "small.trainjob", "full.trainjob", "runtime"])
def test_objects_are_the_recorded_ones(name):
    expected = list(yaml.safe_load_all((GOLDEN / f"{name}.yaml").read_text()))
    assert _rendered(name) == expected


def _rendered(name):
    if name == "runtime":
        return [trainjob.runtime("megamask")]
    size, kind = name.split(".")
    return {"jobset": jobset, "trainjob": trainjob}[kind].render({"small": SMALL, "full": FULL}[size])


@pytest.mark.parametrize("job", [SMALL, FULL])
@pytest.mark.promise("Rendered JobSets and TrainJobs pass the published schemas, field by field")
def test_objects_pass_the_published_schemas(job):
    config_map, document = jobset.render(job)
    kubernetes_validate.validate(config_map, CORE_VERSION, strict=True)
    _check_model(document, "JobsetV1alpha2JobSet")
    (replicated,) = document["spec"]["replicatedJobs"]
    inner = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "x"}, "spec": replicated["template"]["spec"]}
    kubernetes_validate.validate(inner, CORE_VERSION, strict=True)
    _check_model(trainjob.render(job)[1], "TrainerV1alpha1TrainJob")
    _check_model(trainjob.runtime("megamask"), "TrainerV1alpha1ClusterTrainingRuntime")


@pytest.mark.parametrize("job", [SMALL, FULL])
def test_rendered_objects_pass_the_lint(job):
    stop_s = job.notice_s - 30
    assert lint.problems(jobset.render(job), stop_s=stop_s) == []
    assert lint.problems(trainjob.render(job), stop_s=stop_s) == []
    assert lint.problems([trainjob.runtime("megamask")], stop_s=stop_s) == []


def _action(job, message):
    """Return the action of the JobSet controller on a failed Job's message: the first rule that matches it."""
    for rule in jobset.jobset(job)["spec"]["failurePolicy"]["rules"]:
        if any(re.search(pattern, message) for pattern in rule["onJobFailureMessagePatterns"]):
            return rule["action"]
    return "RestartJobSet"


@pytest.mark.promise("On Kubernetes each exit code stops the job, restarts it for free, or restarts it counted")
def test_each_code_has_the_action_of_the_contract():
    for code in range(1, 256):
        message = f"Container node for pod a/b failed with exit code {code} matching FailJob rule at index 1"
        expected = "RestartJobSet"
        if code in STOP_CODES:
            expected = "FailJobSet"
        elif code in FREE_CODES:
            expected = "RestartJobSetAndIgnoreMaxRestarts"
        assert _action(SMALL, message) == expected, code
    evicted = "Pod a/b has condition DisruptionTarget matching FailJob rule at index 0"
    assert _action(SMALL, evicted) == "RestartJobSetAndIgnoreMaxRestarts"
    (replicated,) = jobset.jobset(SMALL)["spec"]["replicatedJobs"]
    listed = replicated["template"]["spec"]["podFailurePolicy"]["rules"][1]["onExitCodes"]["values"]
    assert set(listed) == {*STOP_CODES, *FREE_CODES, *COUNTED_CODES}


def test_secrets_are_named_and_never_written():
    _, document = jobset.render(FULL)
    (container,) = document["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"]
    entries = {entry["name"]: entry for entry in container["env"]}
    assert entries["MLFLOW_TRACKING_PASSWORD"] == {
        "name": "MLFLOW_TRACKING_PASSWORD",
        "valueFrom": {"secretKeyRef": {"name": "mlflow", "key": "password"}},
    }
    assert "SITE_TOKEN" not in entries


@pytest.mark.parametrize(("job", "added"), [(SMALL, None), (FULL, ["IPC_LOCK"])])
@pytest.mark.promise("Pods run without root, with a read-only root file system and no token of the API server")
def test_pods_are_confined(job, added):
    _, document = jobset.render(job)
    pod = document["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    assert pod["automountServiceAccountToken"] is False
    assert pod["enableServiceLinks"] is False
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert not {"hostNetwork", "hostPID", "hostIPC"} & pod.keys()
    (container,) = pod["containers"]
    context = container["securityContext"]
    assert (context["allowPrivilegeEscalation"], context["readOnlyRootFilesystem"]) == (False, True)
    assert (context["capabilities"]["drop"], context["capabilities"].get("add")) == (["ALL"], added)


def test_the_command_is_a_list_that_no_shell_reads():
    _, document = jobset.render(FULL)
    (container,) = document["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"]
    assert container["command"] == ["megamask", "launch", "node", "/etc/megamask/config.yaml"]
    assert trainjob.render(FULL)[1]["spec"]["trainer"]["command"] == container["command"]


def _pod(objects):
    return objects[1]["spec"]["replicatedJobs"][0]["template"]["spec"]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda o: o[1]["metadata"].update(name="Big_Name"), "not a DNS label"),
        (lambda o: _pod(o)["podFailurePolicy"]["rules"][1]["onExitCodes"].update(values=[2, 1]), "ascending"),
        (lambda o: _pod(o)["podFailurePolicy"]["rules"][1]["onExitCodes"].update(values=[0, 2]), "without 0"),
        (lambda o: _pod(o)["podFailurePolicy"]["rules"][1]["onExitCodes"].update(containerName="x"), "not a container"),
        (lambda o: _pod(o)["template"]["spec"]["volumes"].append({"name": "more"}), "mounted nowhere"),
        (lambda o: _pod(o)["template"]["spec"]["volumes"].pop(0), "which the pod does not have"),
        (lambda o: _pod(o)["template"]["spec"].update(restartPolicy="OnFailure"), "restartPolicy"),
        (lambda o: _pod(o)["template"]["spec"].update(terminationGracePeriodSeconds=30), "is ended after 30 s"),
        (lambda o: _pod(o)["template"]["spec"]["containers"][0].update(image="a:latest"), "no @sha256"),
        (
            lambda o: _pod(o)["template"]["spec"]["containers"][0]["env"].append({"name": "A_TOKEN", "value": "x"}),
            "A_TOKEN is written out",
        ),
        (
            lambda o: _pod(o)["template"]["spec"]["containers"][0]["volumeMounts"][0].update(mountPath="/tmp"),
            "two volumes are mounted at /tmp",
        ),
        (lambda o: o[1]["spec"]["network"].update(subdomain="other"), "MASTER_ADDR"),
        (
            lambda o: o[1]["spec"]["failurePolicy"]["rules"][0].update(onJobFailureMessagePatterns=["(2|"]),
            "not a regular expression",
        ),
        (
            lambda o: o[1]["spec"]["failurePolicy"]["rules"][0].update(onJobFailureMessagePatterns=["(?=2)"]),
            "RE2 does not have",
        ),
    ],
)
def test_lint_names_what_no_schema_finds(change, named):
    objects = jobset.render(SMALL)
    change(objects)
    assert any(named in problem for problem in lint.problems(objects, stop_s=90)), lint.problems(objects, stop_s=90)


@pytest.mark.parametrize("pattern", ["(?=2)", "(?<!1)2", r"(2)\1", "(2)?(?(1)3|4)", "2(?#two)", "(?>2)", "2++", r"2\Z"])
def test_lint_finds_what_go_does_not_compile(pattern):
    objects = jobset.render(SMALL)
    objects[1]["spec"]["failurePolicy"]["rules"][0]["onJobFailureMessagePatterns"] = [pattern]
    (problem,) = lint.problems(objects, stop_s=90)
    assert "it would never match" in problem


def test_lint_counts_the_characters_of_a_pods_name():
    longest = replace(SMALL, name="a" * 48)
    assert lint.problems(jobset.render(longest), stop_s=90) == []
    (problem,) = lint.problems(jobset.render(replace(SMALL, name="a" * 49)), stop_s=90)
    assert "the name of the job may have 48" in problem


@pytest.mark.parametrize("job", [SMALL, FULL])
@pytest.mark.promise("A TrainJob on the shipped runtime makes the pods of the JobSet")
def test_trainjob_makes_the_pods_of_the_jobset(job):
    # a TrainJob is refused with a priority class or a working folder
    job = replace(job, workdir=None, kubernetes=replace(job.kubernetes, priority_class=None))
    made = jobset_of(trainjob.render(job)[1], trainjob.runtime("megamask"))["spec"]
    expected = jobset.render(job)[1]["spec"]
    (replicated,), (own,) = made["replicatedJobs"], expected["replicatedJobs"]
    assert replicated["template"]["spec"] == own["template"]["spec"]
    assert made["failurePolicy"] == expected["failurePolicy"]
    assert made["successPolicy"] == expected["successPolicy"]
