"""Files of slurm/ and container/: every script's words, codes and refusals."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SLURM = ROOT / "slurm"
DIGEST = "sha256:" + "a" * 64


@pytest.mark.parametrize("path", sorted([*SLURM.glob("*.sh"), *SLURM.glob("*.sbatch")]), ids=lambda path: path.name)
def test_scripts_are_bash(path: Path) -> None:
    done = subprocess.run(["bash", "-n", path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert path.read_text().startswith("#!/bin/bash\n")


def _prepare(tmp_path: Path, *words: str, **variables: str) -> tuple[int, list[str]]:
    stand_in = tmp_path / "megamask"
    stand_in.write_text('#!/bin/bash\nprintf "%s\\n" "$@"\nexit 75\n')
    stand_in.chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_CPUS_PER_TASK": "4", **variables}
    done = subprocess.run(
        ["bash", SLURM / "prepare_array.sbatch", *words], env=environment, capture_output=True, text=True
    )
    return done.returncode, done.stdout.splitlines()


def test_array_job_prepares_its_task_and_leaves_with_its_code(tmp_path: Path) -> None:
    array = {"SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_MAX": "63"}
    words = ["prepare", "corpus.yaml", "corpus.output_dir=/shared/it's here", "--task", "7/64"]
    assert _prepare(tmp_path, "corpus.yaml", "corpus.output_dir=/shared/it's here", **array) == (75, words)


def test_array_job_of_one_repeated_task_keeps_the_number_of_tasks(tmp_path: Path) -> None:
    array = {"SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_MAX": "7", "NUM_TASKS": "64"}
    assert _prepare(tmp_path, "corpus.yaml", **array)[1][-1] == "7/64"


def test_job_without_an_array_merges(tmp_path: Path) -> None:
    assert _prepare(tmp_path, "corpus.yaml")[1] == ["prepare", "corpus.yaml", "--merge"]
    assert _prepare(tmp_path)[0] == 2


def _preflight(tmp_path: Path, folder: Path, *words: str, nvidia_smi: str | None = None) -> tuple[int, str]:
    if nvidia_smi is not None:
        (tmp_path / "nvidia-smi").write_text(f"#!/bin/bash\n{nvidia_smi}\n")
        (tmp_path / "nvidia-smi").chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURMD_NODENAME": "node7"}
    done = subprocess.run(
        ["bash", SLURM / "preflight.sh", folder, *words], env=environment, capture_output=True, text=True
    )
    return done.returncode, done.stdout + done.stderr


def test_preflight_passes_a_node_that_is_well_and_leaves_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "runs"
    folder.mkdir()
    code, printed = _preflight(tmp_path, folder)
    assert (code, printed) == (0, "preflight: node7: well\n")
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(
    ("nvidia_smi", "code", "words"),
    [
        ('case "$*" in *uuid*) echo a; echo b ;; *) echo 0; echo 0 ;; esac', 0, "well"),
        ('case "$*" in *uuid*) echo a ;; *) echo 0 ;; esac', 70, "1 GPUs answer, 2 are needed"),
        ('case "$*" in *uuid*) echo a; echo b ;; *) echo 0; echo 3 ;; esac', 70, "1 GPUs have uncorrected"),
        ("exit 9", 70, "0 GPUs answer"),
    ],
)
def test_preflight_looks_at_the_gpus(tmp_path: Path, nvidia_smi: str, code: int, words: str) -> None:
    found, printed = _preflight(tmp_path, tmp_path, "2", nvidia_smi=nvidia_smi)
    assert (found, words in printed, "node7" in printed) == (code, True, True), printed


def test_preflight_names_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    code, printed = _preflight(tmp_path, tmp_path / "absent")
    assert code == 74
    assert "absent cannot be written" in printed


def _dockerfile() -> str:
    return (ROOT / "container" / "Dockerfile").read_text()


@pytest.mark.promise("The container is built on a base with a digest, or not at all")
@pytest.mark.parametrize(
    ("image", "code"),
    [(f"registry/pytorch@{DIGEST}", 0), ("", 2), ("pytorch", 2), ("pytorch:25.01", 2), (f"a@{DIGEST[:-1]}", 2)],
)
def test_dockerfile_refuses_a_base_without_a_digest(image: str, code: int) -> None:
    assert re.search(r"^ARG BASE_IMAGE$", _dockerfile(), re.MULTILINE), "BASE_IMAGE must have no default"
    (guard,) = re.findall(r"^RUN (echo \"\$\{BASE_IMAGE\}\".*?)(?<!\\)$", _dockerfile(), re.MULTILINE | re.DOTALL)
    done = subprocess.run(["sh", "-c", guard], env={"BASE_IMAGE": image, "PATH": "/usr/bin:/bin"}, capture_output=True)
    assert done.returncode == code


def test_dockerfile_checks_the_base_before_it_installs_and_runs_without_root() -> None:
    steps = re.findall(r"^(ARG|FROM|RUN|COPY|ENV|USER|WORKDIR|CMD|ENTRYPOINT)\b", _dockerfile(), re.MULTILINE)
    assert steps[:4] == ["ARG", "FROM", "ARG", "RUN"]
    assert "ENTRYPOINT" not in steps
    assert re.search(r"^USER 1000:1000$", _dockerfile(), re.MULTILINE)
    copied = re.findall(r"^COPY (.+) \S+$", _dockerfile(), re.MULTILINE)
    assert all((ROOT / name).exists() for line in copied for name in line.split())


def test_dockerfile_keeps_what_the_base_brings(tmp_path: Path) -> None:
    """The step that makes the constraints, with stand-ins for pip and python."""
    (step,) = re.findall(r"^RUN (python -m pip freeze.*?)(?<!\\)$", _dockerfile(), re.MULTILINE | re.DOTALL)
    (tmp_path / "python").write_text(
        '#!/bin/bash\ncase "$*" in\n'
        '*freeze*) printf "%s\\n" torch==2.9.0a0+nv numpy==2.1.0 transformer_engine==2.9 "apex @ file:/x" rich==1 ;;\n'
        f"*install*) cp constraints.txt {tmp_path}/kept.txt ;;\nesac\n"
    )
    (tmp_path / "python").chmod(0o755)
    (tmp_path / "constraints_in.txt").write_text("torch==2.13.0\nnumpy==2.4.0\ntorchvision==1\nrich==14\n")
    script = step.replace("/opt/megamask/constraints.txt", "constraints_in.txt").replace("/tmp/", "")
    done = subprocess.run(
        ["sh", "-ec", script], cwd=tmp_path, env={"PATH": f"{tmp_path}:/usr/bin:/bin"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "kept.txt").read_text().split() == [
        "torchvision==1",
        "rich==14",
        "torch==2.9.0a0+nv",
        "numpy==2.1.0",
        "transformer_engine==2.9",
    ]


def test_apptainer_definition_has_its_sections_and_takes_the_image_as_an_argument() -> None:
    text = (ROOT / "container" / "apptainer.def").read_text()
    assert "From: {{ IMAGE }}" in text
    assert set(re.findall(r"^%(\w+)", text, re.MULTILINE)) == {"environment", "test", "runscript", "help"}
