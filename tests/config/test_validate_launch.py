"""Settings of a job: what is refused, with the key to change; and the arithmetic of its end."""

from __future__ import annotations

from pathlib import Path

import pytest

from megamask.config.load import Loaded, load_train_config
from megamask.config.schema.roots import TrainConfig
from megamask.config.validate import validate_train
from megamask.config.validate_launch import Target, job_name, notice_s, slurm_save_budget_s, validate_launch
from megamask.errors import UsageError
from megamask.launch.from_config import job_from_config

TINY = Path(__file__).parents[2] / "configs" / "run" / "tiny.yaml"
IMAGE = "images.example/megamask@sha256:" + "0" * 64
PODS = (
    f"launch.image={IMAGE}",
    "launch.kubernetes.claims.data=/data",
    "run.output_dir=/data/runs",
    "data.corpora.main=/data/corpus",
)


def _loaded(*overrides: str) -> Loaded[TrainConfig]:
    return load_train_config(TINY, overrides)


def _refused(target: Target, *overrides: str) -> str:
    loaded = _loaded(*overrides)
    with pytest.raises(UsageError) as refusal:
        validate_train(loaded.config, loaded.origins)
        validate_launch(loaded.config, loaded.origins, target)
    return f"{refusal.value.message} {refusal.value.hint}"


def test_defaults_make_a_slurm_job_that_fits_slurms_own_killwait() -> None:
    loaded = _loaded()
    validate_launch(loaded.config, loaded.origins, "slurm")
    launch = loaded.config.launch
    assert launch.slurm.kill_wait_s == 30  # KillWait where slurm.conf names none
    assert launch.stop_grace_s + slurm_save_budget_s(launch) + 5 == 30


@pytest.mark.parametrize(
    ("overrides", "budget"),
    [
        ([], 0),
        (["launch.slurm.kill_wait_s=120"], 90),
        (["launch.slurm.kill_wait_s=null"], 60),
        (["launch.slurm.kill_wait_s=60", "launch.stop_grace_s=10", "launch.save_budget_s=40"], 40),
    ],
)
def test_save_budget_of_a_slurm_job_is_what_killwait_leaves(overrides: list[str], budget: float) -> None:
    loaded = _loaded(*overrides)
    validate_launch(loaded.config, loaded.origins, "slurm")
    assert slurm_save_budget_s(loaded.config.launch) == budget


def test_ranks_of_context_parallelism_are_shared_among_the_nodes() -> None:
    loaded = _loaded("layout.context_parallel_size=2", "launch.nodes=2", "launch.gpus_per_node=0")
    validate_launch(loaded.config, loaded.origins, "slurm")
    assert job_from_config(loaded.config, "slurm", path="tiny.yaml").ranks_per_node == 1


def test_notice_is_longer_than_stopping_and_saving() -> None:
    launch = _loaded("launch.stop_grace_s=20.5", "launch.save_budget_s=300").config.launch
    assert notice_s(launch, launch.effective_save_budget_s) == 351


@pytest.mark.promise("A save that Slurm or Kubernetes would cut off is refused before the job is submitted (2)")
@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["launch.save_budget_s=60"], "launch.save_budget_s is 60.0"),
        (["launch.stop_grace_s=26"], "launch.stop_grace_s is 26.0"),
        (["launch.slurm.kill_wait_s=20"], "launch.stop_grace_s is 25.0"),
    ],
)
def test_time_to_stop_that_slurm_would_cut_off_is_refused(overrides: list[str], named: str) -> None:
    refusal = _refused("slurm", *overrides)
    assert named in refusal
    assert "launch.slurm.kill_wait_s" in refusal


@pytest.mark.parametrize(
    ("target", "overrides", "named"),
    [
        ("slurm", ["launch.nodes=3", "layout.data_parallel_size=4"], "launch.nodes is 3"),
        ("slurm", ["launch.ranks_per_node=2", "layout.data_parallel_size=4"], "launch.ranks_per_node is 2"),
        ("slurm", ["run.name=7b"], "launch.name is null"),
        ("slurm", ["launch.secrets.TOKEN=k8s:a/b"], "launch.secrets"),
        ("slurm", [f"launch.image={IMAGE}"], "launch.slurm.container is 'none'"),
        ("slurm", ["launch.slurm.container=pyxis"], "launch.image is null"),
        ("slurm", ["launch.slurm.container=pyxis", f"launch.image={IMAGE}"], "run.output_dir is 'runs'"),
        (
            "slurm",
            [
                "launch.slurm.container=pyxis",
                f"launch.image={IMAGE}",
                "run.output_dir=/data/runs",
                'launch.mounts=["/lustre:/data"]',
            ],
            "run.output_dir is '/data/runs'",
        ),
        ("jobset", [], "launch.image is null"),
        ("jobset", [*PODS, "launch.image=/images/a.sqsh"], "launch.image is '/images/a.sqsh'"),
        ("jobset", [*PODS, "run.output_dir=runs"], "run.output_dir is 'runs'"),
        ("jobset", [*PODS, "data.corpora.main=/database/x"], "data.corpora"),
        ("jobset", [*PODS, "launch.metrics_folder=/metrics"], "launch.metrics_folder is '/metrics'"),
        ("jobset", [*PODS, "launch.secrets.TOKEN=env:TOKEN"], "launch.secrets"),
        ("jobset", [*PODS, 'launch.mounts=["/a:/a"]'], "launch.mounts"),
        ("trainjob", [*PODS, "launch.max_restarts=3"], "launch.max_restarts is 3"),
        ("trainjob", [*PODS, "launch.workdir=/data"], "launch.workdir is '/data'"),
        ("trainjob", [*PODS, "launch.kubernetes.priority_class=high"], "launch.kubernetes.priority_class"),
    ],
)
def test_config_that_makes_no_job_is_refused_with_its_key(target: Target, overrides: list[str], named: str) -> None:
    refusal = _refused(target, *overrides)
    assert named in refusal
    assert "Nothing was started" in refusal


@pytest.mark.promise("No word of a config reaches a shell unquoted")
@pytest.mark.parametrize(
    "override",
    [
        "launch.slurm.partition=a b",
        "launch.slurm.account=`id`",
        "launch.slurm.qos=a;b",
        "launch.slurm.constraint=$(id)",
        "launch.slurm.gpu_type=a b",
        "launch.slurm.mail=a b",
        'launch.slurm.exclude=["a b"]',
        'launch.slurm.extra=["--comment=a b"]',
        'launch.slurm.extra=["--nodes=9"]',
        'launch.slurm.extra=["-N9"]',
        'launch.slurm.extra=["--x=$(id)"]',
        "launch.workdir=/a b",
        "launch.workdir=a",
        'launch.mounts=["/a:/b:rw"]',
        'launch.mounts=["/a:/b,/c"]',
        'launch.mounts=["/a:/b", "/c:/b"]',
        "launch.name=Big",
        "launch.time_limit=1h",
        "launch.image=a:latest",
        "launch.interface=eth0;id",
        "launch.command=[]",
        'launch.command=[""]',
        "launch.environment.A-B=1",
        "launch.environment.RANK=1",
        "launch.environment.SLURM_JOB_ID=1",
        "launch.environment.MEGAMASK_X=1",
        "launch.kubernetes.namespace=A",
        "launch.kubernetes.run_as=0",
        'launch.kubernetes.node_selector=["a"]',
        'launch.kubernetes.tolerations=["a b"]',
        "launch.kubernetes.claims.tmp=/x",
        "launch.kubernetes.claims.a=/tmp/x",
        "launch.kubernetes.claims.a=x",
    ],
)
def test_words_that_a_shell_or_a_scheduler_would_read_otherwise_are_refused(override: str) -> None:
    loaded = None
    with pytest.raises(UsageError) as refusal:
        loaded = _loaded(override)
        validate_train(loaded.config, loaded.origins)
    assert override.split("=", maxsplit=1)[0].rsplit(".", 1)[0] in str(refusal.value)


@pytest.mark.promise("A job holds names of secrets, never a secret")
@pytest.mark.parametrize("name", ["HF_TOKEN", "MLFLOW_TRACKING_PASSWORD", "AWS_SECRET_ACCESS_KEY", "WANDB_API_KEY"])
def test_variable_that_is_a_secret_by_its_name_is_refused(name: str) -> None:
    assert "launch.secrets" in _refused("slurm", f"launch.environment.{name}=hush")


def test_secret_that_is_no_reference_is_refused() -> None:
    assert "not a reference" in _refused("slurm", "launch.secrets.HF_TOKEN=hush")
    assert "as well" in _refused("slurm", "launch.secrets.A=env:A", "launch.environment.A=1")
    assert "not a reference" in _refused("slurm", "launch.secrets.A=env:B")


def test_a_variable_that_only_resembles_a_secret_is_allowed() -> None:
    loaded = _loaded("launch.environment.TOKENIZERS_PARALLELISM=false")
    validate_train(loaded.config, loaded.origins)


def test_job_is_named_after_its_run() -> None:
    assert job_name(_loaded("run.name=Dense_7b.v2").config) == "dense-7b-v2"
    assert job_name(_loaded("run.name=Dense_7b.v2", "launch.name=other").config) == "other"
