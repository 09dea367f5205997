import shlex
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from megamask.launch.slurm import render, time_of
from support.launch_jobs import FULL, SMALL

GOLDEN = Path(__file__).parent / "golden"

# srun leaves with SRUN_CODE after writing the verdict; scontrol answers like Slurm's and records what it was asked.
_SRUN = """#!/bin/bash
printf '%s\\n' "$@" > "$STUBS/srun.args"
[[ -n $VERDICT ]] && mkdir -p "$RUN.launch/$MEGAMASK_LAUNCH_TOKEN" && \
  echo "$VERDICT" > "$RUN.launch/$MEGAMASK_LAUNCH_TOKEN/verdict"
[[ -n $TERM_BATCH ]] && kill -TERM "$PPID"
exit "$SRUN_CODE"
"""
_SCONTROL = """#!/bin/bash
echo "$@" >> "$STUBS/scontrol.log"
case "$1 $2" in
  "show hostnames") printf 'node1\\nnode2\\n' ;;
  "show job") echo "JobState=$STATE Reason=None ExcNodeList=${EXCLUDED:-(null)}" ;;
esac
"""


@pytest.mark.parametrize(("name", "job"), [("small", SMALL), ("full", FULL)])
def test_script_is_the_recorded_one(name, job):
    assert render(job) == (GOLDEN / f"{name}.sbatch").read_text()


def _run(tmp_path, job, *, code=0, verdict="", state="RUNNING", term=False, restarts=0, excluded="", run_dir=None):
    """Runs a rendered script with stand-ins for Slurm's commands; returns its code and what scontrol was asked."""
    stubs = tmp_path / "stubs"
    stubs.mkdir()
    for name, text in (("srun", _SRUN), ("scontrol", _SCONTROL), ("sleep", "#!/bin/bash\n")):
        (stubs / name).write_text(text)
        (stubs / name).chmod(0o755)
    job = replace(job, run_dir=str(run_dir or tmp_path / "it's a run"))
    environment = {
        "PATH": f"{stubs}:/usr/bin:/bin",
        "STUBS": str(stubs),
        "RUN": job.run_dir,
        "SLURM_JOB_ID": "17",
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_CPUS_PER_TASK": "1",
        "SLURM_RESTART_COUNT": str(restarts),
        "SRUN_CODE": str(code),
        "VERDICT": verdict,
        "STATE": state,
        "TERM_BATCH": "1" if term else "",
        "EXCLUDED": excluded,
        "SITE_TOKEN": "hush",
    }
    done = subprocess.run(
        ["bash", "-c", render(job)], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    asked = (stubs / "scontrol.log").read_text().splitlines()
    return done, asked


STOPS = (0, 2, 64, 65, 66, 93, 130)
STARTS_AGAIN = (1, 16, 17, 70, 71, 74, 75, 137, 139, 143)


@pytest.mark.parametrize("code", [*STOPS, *STARTS_AGAIN])
@pytest.mark.parametrize("state", ["RUNNING", "COMPLETING"])
@pytest.mark.parametrize("term", [False, True])
@pytest.mark.promise("A Slurm job is requeued exactly when its code asks for it and Slurm is not already ending it")
def test_decision_for_every_code_state_and_signal(tmp_path, code, state, term):
    # srun's own code is never trusted when there is a verdict
    done, asked = _run(tmp_path, SMALL, code=143, verdict=f"{code} 40 2 node2", state=state, term=term)
    requeues = [line for line in asked if line.startswith("requeue")]
    assert requeues == (["requeue 17"] if code in STARTS_AGAIN and state == "RUNNING" and not term else [])
    assert done.returncode == code, done.stderr
    assert f"code={code} step=40 attempt=2 node=node2" in done.stdout


def test_without_a_verdict_the_code_is_that_of_srun(tmp_path):
    done, asked = _run(tmp_path, SMALL, code=137)
    assert done.returncode == 137
    assert "requeue 17" in asked


def test_restarts_are_counted_but_preemptions_are_free(tmp_path):
    job, codes = replace(SMALL, max_restarts=2), []
    for number, code in enumerate([71, 75, 75, 1, 75, 71]):
        (tmp_path / str(number)).mkdir()
        run_dir = tmp_path / "run"
        done, asked = _run(tmp_path / str(number), job, verdict=f"{code} 1 1 node1", run_dir=run_dir, restarts=number)
        codes.append(done.returncode)
        assert ("requeue 17" in asked) == (done.returncode != 93)
    assert codes == [71, 75, 75, 1, 75, 93]


@pytest.mark.parametrize("code", [16, 17, 70])
def test_a_suspect_node_is_added_to_those_that_were_excluded(tmp_path, code):
    _, asked = _run(tmp_path, SMALL, verdict=f"{code} 1 1 node2", excluded="node5")
    assert asked[-1] == "update JobId=17 ExcNodeList=node5,node2"


def test_without_a_suspect_no_node_is_excluded(tmp_path):
    for number, (job, verdict) in enumerate(
        [(SMALL, "70 1 1 -"), (SMALL, "71 1 1 node2"), (replace(SMALL, exclude_suspects=False), "70 1 1 node2")]
    ):
        (tmp_path / str(number)).mkdir()
        _, asked = _run(tmp_path / str(number), job, verdict=verdict)
        assert not any("ExcNodeList=" in line for line in asked if line.startswith("update"))


@pytest.mark.parametrize(("code", "names"), [(17, True), (70, True), (16, False), (71, False), (1, False)])
def test_node_to_look_at_is_named_for_the_sites_epilog(tmp_path, code, names):
    _, asked = _run(tmp_path, SMALL, verdict=f"{code} 1 1 node2")
    comment = f"update JobId=17 Comment=megamask: exit code {code}, suspect node2"
    assert (comment in asked) == names
    script = Path(__file__).parents[2] / "slurm" / "epilog.sh"
    environment = {
        "PATH": f"{tmp_path}/stubs:/usr/bin:/bin",
        "STUBS": str(tmp_path / "stubs"),
        "SLURM_JOB_ID": "17",
        "SLURM_JOB_COMMENT": comment.partition("Comment=")[2],
    }
    assert subprocess.run(["bash", script], env=environment).returncode == 0
    drained = (tmp_path / "stubs" / "scontrol.log").read_text().splitlines()[-1]
    assert drained.startswith("update NodeName=node2 State=DRAIN") == (code in (17, 70))


@pytest.mark.parametrize(
    "comment", ["", "mine", "megamask: exit code 70, suspect a b", "megamask: exit code 1, suspect a"]
)
def test_epilog_leaves_other_jobs_alone(tmp_path, comment):
    (tmp_path / "scontrol").write_text('#!/bin/bash\ntouch "$(dirname "$0")/asked"\n')
    (tmp_path / "scontrol").chmod(0o755)
    script = Path(__file__).parents[2] / "slurm" / "epilog.sh"
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_COMMENT": comment}
    assert subprocess.run(["bash", script], env=environment).returncode == 0
    assert not (tmp_path / "asked").exists()


@pytest.mark.promise("No word of a config reaches a shell unquoted")
def test_words_arrive_as_they_were_given(tmp_path):
    job = replace(FULL, overrides=("run.name=a b", "x=$(touch leaked)`id`", "y=\"'\\", "z=*"))
    _run(tmp_path, job)
    words = (tmp_path / "stubs" / "srun.args").read_text().splitlines()
    assert words[-7:] == ["megamask", "launch", "node", "configs/run/8b.yaml", *job.overrides][-7:]
    assert not (tmp_path / "leaked").exists()
    assert "SITE_TOKEN" in words[-9]
    assert "hush" not in render(job)


def test_a_missing_secret_stops_the_job_before_the_step(tmp_path):
    script = render(replace(FULL, secrets={"ABSENT": None}))
    done = subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert ': "${ABSENT:?' in script


@pytest.mark.parametrize("container", ["pyxis", "apptainer", "none"])
def test_container_surrounds_the_command_and_not_the_script(container):
    job = replace(FULL, slurm=replace(FULL.slurm, container=container))
    (step,) = [line for line in render(job).splitlines() if line.startswith("srun ")]
    words = shlex.split(step.removesuffix(" &"))
    command = words[words.index("megamask") :]
    assert command == list(job.command)
    assert ("--container-image=" + job.image in words) == (container == "pyxis")
    assert (words[3:5] == ["apptainer", "exec"]) == (container == "apptainer")
    assert not any("container" in line for line in render(job).splitlines() if line.startswith("#SBATCH"))


@pytest.mark.parametrize(("seconds", "text"), [(59, "0-00:00:59"), (3600, "0-01:00:00"), (90061, "1-01:01:01")])
def test_time_is_written_as_slurm_reads_it(seconds, text):
    assert time_of(seconds) == text
