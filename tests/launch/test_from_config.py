"""The job of a config: every setting arrives in what is rendered."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from megamask.config.dump import documents_to_yaml
from megamask.config.load import load_train_config
from megamask.config.validate import validate_train
from megamask.config.validate_launch import Target, validate_launch
from megamask.launch import jobset, lint, slurm, trainjob
from megamask.launch.environment import fabric_environment
from megamask.launch.from_config import job_from_config
from megamask.launch.job import Job

ROOT = Path(__file__).parents[2]
TINY = ROOT / "configs" / "run" / "tiny.yaml"
DIGEST = "@sha256:" + "0" * 64
COMMON = """
defaults: [{tiny}]
run: {{name: Dense.7b, output_dir: /data/runs}}
data: {{corpora: {{main: /data/corpus}}}}
layout: {{data_parallel_size: 4}}
launch:
  nodes: 2
  cpus_per_rank: 3
  memory_gib: 40
  time_limit: "1-02:03:04"
  fabric: roce
  interface: eth1
  environment: {{NCCL_IB_GID_INDEX: "5", NOTE: "a $(id)"}}
  image: images.example/megamask{digest}
"""
SLURM = """
  secrets: {HF_TOKEN: "env:HF_TOKEN"}
  mounts: ["/data:/data", "/lustre:/in:ro"]
  workdir: /data
  slurm:
    partition: gpu
    gpu_type: h100
    container: pyxis
    exclude: [node9]
    extra: ["--switches=1"]
    kill_wait_s: 120
"""
PODS = """
  secrets: {HF_TOKEN: "k8s:hub/token"}
  kubernetes:
    namespace: training
    queue: train-lq
    preferred_topology: example.com/rack
    node_selector: ["example.com/gpu=h200"]
    tolerations: [nvidia.com/gpu]
    rdma_resource: rdma/ib
    claims: {data: /data}
    run_as: 54321
"""


def _job(folder: Path, target: Target, text: str) -> Job:
    path = folder / "run.yaml"
    path.write_text(COMMON.format(tiny=TINY, digest=DIGEST) + text)
    loaded = load_train_config(path, ["training.steps=7"])
    validate_train(loaded.config, loaded.origins)
    validate_launch(loaded.config, loaded.origins, target)
    return job_from_config(loaded.config, target, path="run.yaml", overrides=["training.steps=7"])


def test_slurm_job_holds_every_setting(tmp_path: Path) -> None:
    lines = slurm.render(_job(tmp_path, "slurm", SLURM)).splitlines()
    for option in (
        "job-name=dense-7b",
        "nodes=2",
        "ntasks-per-node=1",
        "cpus-per-task=6",
        "mem=40G",
        "time=1-02:03:04",
        "partition=gpu",
        "gpus-per-node=h100:2",
        "exclude=node9",
        "chdir=/data",
        "signal=TERM@145",  # 25 s to stop, 90 s to save, 30 s to close
        "switches=1",
    ):
        assert f"#SBATCH --{option}" in lines
    assert "export GLOO_SOCKET_IFNAME=eth1" in lines
    assert "export NCCL_IB_GID_INDEX=5" in lines  # the user's, not the fabric's
    assert "export NOTE='a $(id)'" in lines
    (step,) = [line for line in lines if line.startswith("srun ")]
    assert "--container-mounts=/data:/data,/lustre:/in:ro" in step
    assert step.endswith("megamask launch node run.yaml training.steps=7 launch.save_budget_s=90 &")
    assert "verdict=/data/runs/Dense.7b.launch/$MEGAMASK_LAUNCH_TOKEN/verdict" in lines


@pytest.mark.parametrize("target", ["jobset", "trainjob"])
def test_pods_hold_every_setting_and_pass_the_lint(tmp_path: Path, target: Target) -> None:
    job = _job(tmp_path, target, PODS)
    objects = {"jobset": jobset.render, "trainjob": trainjob.render}[target](job)
    assert lint.problems(objects, stop_s=85) == []
    assert lint.problems(objects, stop_s=115)  # the pods' grace period
    config_map, document = yaml.safe_load_all(documents_to_yaml(objects))
    stored = yaml.safe_load(config_map["data"]["config.yaml"])
    assert stored["training"]["steps"] == 7
    text = yaml.safe_dump(document)
    for word in ("training", "train-lq", "example.com/gpu: h200", "nvidia.com/gpu: '2'", "rdma/ib: '2'", "54321"):
        assert word in text
    assert "claimName: data" in text
    assert "key: token" in text
    if target == "jobset":
        assert document["spec"]["replicatedJobs"][0]["template"]["spec"]["parallelism"] == 2
    else:
        assert document["spec"]["trainer"]["numNodes"] == 2


def test_config_of_the_pods_reads_as_the_same_config(tmp_path: Path) -> None:
    job = _job(tmp_path, "jobset", PODS)
    again = tmp_path / "again.yaml"
    again.write_text(job.config_text)
    loaded = load_train_config(again)
    validate_train(loaded.config, loaded.origins)
    assert loaded.config == load_train_config(tmp_path / "run.yaml", ["training.steps=7"]).config


@pytest.mark.parametrize(
    ("fabric", "variables"),
    [
        (None, {}),
        ("infiniband", {}),
        ("roce", {"NCCL_IB_GID_INDEX": "3"}),
        ("efa", {"FI_PROVIDER": "efa"}),
        ("tcp", {"NCCL_IB_DISABLE": "1"}),
    ],
)
def test_fabric_sets_what_it_demands_and_no_more(fabric: str | None, variables: dict[str, str]) -> None:
    assert fabric_environment(fabric, None) == variables
    named = {"GLOO_SOCKET_IFNAME": "eth0", "NCCL_SOCKET_IFNAME": "=eth0"}
    assert fabric_environment(fabric, "eth0") == variables | named


def test_shipped_files_are_what_the_renderers_write() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "tools" / "render_goldens.py", "--check"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout
