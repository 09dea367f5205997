"""`megamask launch slurm|jobset|trainjob`: print, write, check and submit a job, with stand-ins for the schedulers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from megamask_pipelines.cli.main import main
from support.command import ROOT, TINY

PODS = (
    "launch.image=images.example/megamask@sha256:" + "0" * 64,
    "launch.kubernetes.claims.data=/data",
    "run.output_dir=/data/runs",
    "data.corpora.main=/data/corpus",
)
_STAND_IN = """#!/bin/bash
printf '%s\\n' "$@" > "$(dirname "$0")/{name}.args"
cat > "$(dirname "$0")/{name}.stdin"
echo {answer}
exit {code}
"""


@pytest.fixture
def scheduler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Puts a stand-in for a scheduler's command first on the PATH; returns its arguments and its stdin."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")

    def install(name: str, *, code: int = 0, answer: str = "17"):
        path = folder / name
        path.write_text(_STAND_IN.format(name=name, code=code, answer=answer))
        path.chmod(0o755)
        return lambda: ((folder / f"{name}.args").read_text().split(), (folder / f"{name}.stdin").read_text())

    return install


def test_job_is_printed_and_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["launch", "slurm", str(TINY)]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("#!/bin/bash\n")
    assert printed.endswith('exit "$code"\n')


@pytest.mark.promise("The config of each scheduler's guide makes a job unchanged")
@pytest.mark.parametrize(
    ("guide", "fence", "target"),
    [
        ("slurm.md", "cat > job.yaml <<'END'\n", "slurm"),
        ("kubernetes.md", "```yaml\n", "jobset"),
        ("kubernetes.md", "```yaml\n", "trainjob"),
    ],
)
def test_config_of_a_guide_makes_a_job(
    guide: str, fence: str, target: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (ROOT / "docs" / "guides" / guide).read_text().partition(fence)[2]
    shown = text.partition("END\n" if target == "slurm" else "```")[0]
    config = tmp_path / "run.yaml"
    config.write_text(shown.replace("- configs/", f"- {ROOT}/configs/").replace(":DIGEST", ":" + "0" * 64))
    assert main(["launch", target, str(config)]) == 0, capsys.readouterr().err


@pytest.mark.parametrize("target", ["jobset", "trainjob"])
def test_objects_are_written_as_yaml(target: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "job.yaml"
    assert main(["launch", target, str(TINY), *PODS, "--output", str(output)]) == 0
    kinds = [document["kind"] for document in yaml.safe_load_all(output.read_text())]
    assert kinds == ["ConfigMap", {"jobset": "JobSet", "trainjob": "TrainJob"}[target]]
    assert str(output) in capsys.readouterr().out


@pytest.mark.parametrize(
    ("target", "command", "arguments"),
    [
        ("slurm", "sbatch", ["--parsable"]),
        ("jobset", "kubectl", ["create", "--filename=-"]),
        ("trainjob", "kubectl", ["create", "--filename=-"]),
    ],
)
def test_submission_hands_over_the_job_that_is_printed(
    target: str, command: str, arguments: list[str], scheduler, capsys: pytest.CaptureFixture[str]
) -> None:
    given = scheduler(command)
    overrides = () if target == "slurm" else PODS
    assert main(["launch", target, str(TINY), *overrides]) == 0
    printed = capsys.readouterr().out
    assert main(["launch", target, str(TINY), *overrides, "--submit"]) == 0
    assert "submitted: 17" in capsys.readouterr().out
    words, text = given()
    assert words == arguments
    assert text.rstrip("\n") == printed.rstrip("\n")


def test_check_asks_and_submits_nothing(scheduler, capsys: pytest.CaptureFixture[str]) -> None:
    given = scheduler("sbatch", answer="would start now")
    assert main(["launch", "slurm", str(TINY), "--check"]) == 0
    assert "the scheduler accepts it: would start now" in capsys.readouterr().out
    assert given()[0] == ["--test-only"]


def test_refusal_of_the_scheduler_ends_with_2_and_its_words(scheduler, capsys: pytest.CaptureFixture[str]) -> None:
    scheduler("sbatch", code=1, answer="no such partition")
    assert main(["launch", "slurm", str(TINY), "--submit"]) == 2
    errors = capsys.readouterr().err
    assert "no such partition" in errors
    assert "Nothing was submitted" in errors


def test_missing_scheduler_is_named_on_submission_and_no_hindrance_to_a_check(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["launch", "slurm", str(TINY), "--submit"]) == 2
    assert "sbatch is not on this machine" in capsys.readouterr().err
    assert main(["launch", "slurm", str(TINY), "--check", "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["asked"] is None


def test_missing_secret_is_named_before_the_submission(
    scheduler, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    scheduler("sbatch")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    assert main(["launch", "slurm", str(TINY), "launch.secrets.HF_TOKEN=env:HF_TOKEN", "--submit"]) == 2
    assert "HF_TOKEN is not set" in capsys.readouterr().err


@pytest.mark.promise("A job holds names of secrets, never a secret")
def test_secret_that_is_written_out_is_refused_and_not_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["launch", "slurm", str(TINY), "launch.environment.HF_TOKEN=hush"]) == 2
    errors = capsys.readouterr().err
    assert "launch.secrets" in errors
    assert "hush" not in errors


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["slurm", str(TINY), "--check", "--submit"], "one of the two"),
        (["node", str(TINY), "--output", "x"], "has no --output"),
        (["slurm", str(TINY), "launch.save_budget_s=60"], "launch.save_budget_s"),
        (["jobset", str(TINY)], "launch.image"),
        (["jobset", str(TINY), *PODS, f"launch.name={'a' * 40}", "launch.nodes=1"], ""),
    ],
)
def test_what_makes_no_job_ends_with_2(arguments: list[str], named: str, capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["launch", *arguments])
    assert code == (2 if named else 0)
    assert named in capsys.readouterr().err


@pytest.mark.promise("a job for GPUs without the kernels of its FP8 recipe is refused before it is submitted (2)")
def test_recipe_without_kernels_on_the_jobs_gpus_ends_with_2(scheduler, capsys: pytest.CaptureFixture[str]) -> None:
    submitted = scheduler("sbatch")
    job = ["launch", "slurm", str(TINY), "--submit", "precision.compute=bf16"]
    shapes = ["model.hidden_size=256", "model.ffn_hidden_size=256"]  # what the recipes' kernels take
    assert main([*job, *shapes, "precision.fp8=mxfp8", "launch.slurm.gpu_type=h100"]) == 2
    errors = capsys.readouterr().err
    assert "precision.fp8 is 'mxfp8', but its kernels need compute capability 10.0" in errors
    assert "allowed: none, tensorwise, delayed, blockwise" in errors
    with pytest.raises(FileNotFoundError):
        submitted()
    for fits in ("launch.slurm.gpu_type=b200", "launch.slurm.gpu_type=unknown"):
        assert main([*job, *shapes, "precision.fp8=mxfp8", fits]) == 0


def test_output_that_cannot_be_written_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["launch", "slurm", str(TINY), "--output", str(tmp_path / "absent" / "job")]) != 0
    assert not (tmp_path / "absent").exists()
    assert "absent" in capsys.readouterr().err
