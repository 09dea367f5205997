"""A job as a batch script for Slurm.

The script keeps the exit-code contract where Slurm itself loses it. srun returns the first task's code or 143 by race,
so every node leaves its code to node 0, which writes one verdict file; the script reads it with `read`, because any
child started after Slurm's SIGTERM dies at once. It requeues only a job that Slurm still calls RUNNING: a cancelled
job is COMPLETING, and `scontrol requeue` would bring it back.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator

from megamask.launch.job import DRAIN_CODES, EXCLUDE_CODES, FREE_CODES, STOP_CODES, Job

_MINUTE_S = 60
_HOUR_S = 3600
_DAY_S = 86400


def render(job: Job) -> str:
    """Return the batch script of a job."""
    return "\n".join((*_header(job), "", *_environment(job), "", *_step(job), "", *_verdict(job), "")) + "\n"


def time_of(seconds: int) -> str:
    """Return a duration as Slurm writes it: days-hours:minutes:seconds, rounded up to seconds."""
    days, rest = divmod(seconds, _DAY_S)
    hours, rest = divmod(rest, _HOUR_S)
    minutes, rest = divmod(rest, _MINUTE_S)
    return f"{days}-{hours:02d}:{minutes:02d}:{rest:02d}"


def _header(job: Job) -> Iterator[str]:
    options = job.slurm
    yield "#!/bin/bash"
    yield "# Rendered by `megamask launch slurm`; change the config and render again."
    given: dict[str, object] = {
        "job-name": job.name,
        "nodes": job.nodes,
        "ntasks-per-node": 1,
        "cpus-per-task": job.cpus_per_node,
        "mem": None if job.memory_gib is None else f"{job.memory_gib}G",
        "time": None if job.time_limit_s is None else time_of(job.time_limit_s),
        "partition": options.partition,
        "account": options.account,
        "qos": options.qos,
        "constraint": options.constraint,
        "reservation": options.reservation,
        "gpus-per-node": _gpus(job),
        "exclude": ",".join(options.exclude) or None,
        "mail-user": options.mail,
        "mail-type": "END,FAIL" if options.mail else None,
        "chdir": job.workdir,
        "output": "%x-%j.log",
        "signal": f"TERM@{job.notice_s}",
    }
    for name, value in given.items():
        if value is not None:
            yield f"#SBATCH --{name}={value}"
    yield "#SBATCH --open-mode=append"
    yield "#SBATCH --requeue"
    for option in options.extra:
        yield f"#SBATCH {option}"


def _gpus(job: Job) -> str | None:
    if not job.gpus_per_node:
        return None
    return f"{job.slurm.gpu_type}:{job.gpus_per_node}" if job.slurm.gpu_type else str(job.gpus_per_node)


def _environment(job: Job) -> Iterator[str]:
    yield "set -u"
    yield "unset ${!MEGAMASK_@} RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE  # an outer launcher's"
    yield 'mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")'
    yield "export MASTER_ADDR=${hosts[0]} MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))"
    yield "export MEGAMASK_LAUNCH_TOKEN=slurm-$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}"
    yield "export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK  # srun does not take it from the batch script"
    for name, value in sorted(job.environment.items()):
        yield f"export {name}={shlex.quote(value)}"
    for name, secret in sorted(job.secrets.items()):
        if secret is None:
            yield f': "${{{name}:?is a secret of this job; set it in the environment that submits}}"'


def _step(job: Job) -> Iterator[str]:
    yield "term=0"
    yield "trap 'term=1' TERM"
    words = ["srun", "--kill-on-bad-exit=1", "--label", *_container(job), *job.command]
    yield f"{shlex.join(words)} &"
    yield "child=$!"
    yield 'wait "$child"'
    yield "code=$?"
    yield 'while kill -0 "$child" 2>/dev/null; do wait "$child"; code=$?; done  # a signal ends wait, not the step'


def _container(job: Job) -> list[str]:
    """Words between srun and the command; the batch script itself runs outside, because it needs scontrol."""
    if job.image is None or job.slurm.container == "none":
        return []
    if job.slurm.container == "apptainer":
        bind = [f"--bind={_bound(mount.source, mount.target, mount.is_read_only)}" for mount in job.mounts]
        gpus = ["--nv"] if job.gpus_per_node else []
        workdir = [f"--pwd={job.workdir}"] if job.workdir else []
        return ["apptainer", "exec", *gpus, "--no-home", *bind, *workdir, job.image]
    mounts = ",".join(_bound(mount.source, mount.target, mount.is_read_only) for mount in job.mounts)
    words = [f"--container-image={job.image}", "--no-container-mount-home"]
    words += [f"--container-mounts={mounts}"] if mounts else []
    words += [f"--container-workdir={job.workdir}"] if job.workdir else []
    names = ("MASTER_ADDR", "MASTER_PORT", "MEGAMASK_LAUNCH_TOKEN", *sorted(job.environment), *sorted(job.secrets))
    return [*words, f"--container-env={','.join(names)}"]


def _bound(source: str, target: str, is_read_only: bool) -> str:
    return f"{source}:{target}:ro" if is_read_only else f"{source}:{target}"


def _verdict(job: Job) -> Iterator[str]:
    folder = shlex.quote(f"{job.run_dir}.launch")
    yield "step=-1 attempt=0 node=-"
    yield f"verdict={folder}/$MEGAMASK_LAUNCH_TOKEN/verdict"
    yield '[[ -r $verdict ]] && read -r code step attempt node < "$verdict"'
    yield 'state=$(scontrol show job "$SLURM_JOB_ID" | grep -oE "JobState=\\S+")'
    yield "printf '%(%F %T)T batch: code=%s step=%s attempt=%s node=%s term=%s %s\\n' -1 \\"
    yield '  "$code" "$step" "$attempt" "$node" "$term" "$state"'
    yield f'case $code in 0|{"|".join(map(str, STOP_CODES))}) exit "$code" ;; esac'
    yield "# Slurm is ending the job: it requeues it by itself, or must not"
    yield '[[ $state == JobState=RUNNING && $term == 0 ]] || exit "$code"'
    yield "# restarts are counted here, because Slurm's own count includes preemptions, which are free"
    yield f"counter={folder}/slurm-$SLURM_JOB_ID.restarts restarts=0"
    yield '[[ -r $counter ]] && read -r restarts < "$counter"'
    yield f"case $code in {'|'.join(map(str, FREE_CODES))}) ;; *)"
    yield f"  if (( restarts >= {job.max_restarts} )); then"
    yield f'    echo "batch: {job.max_restarts} restarts are used up; not requeued"'
    yield "    exit 93"
    yield "  fi"
    yield '  echo $((restarts + 1)) > "$counter" ;;'
    yield "esac"
    yield f"case $code in {'|'.join(map(str, DRAIN_CODES))})  # for the site's epilog"
    yield '  [[ $node != - ]] && scontrol update "JobId=$SLURM_JOB_ID" \\'
    yield '    "Comment=megamask: exit code $code, suspect $node" ;;'
    yield "esac"
    if job.exclude_suspects:
        yield 'excluded=$(scontrol show job "$SLURM_JOB_ID" | grep -oP "ExcNodeList=\\K\\S+")'
        yield "[[ $excluded == '(null)' ]] && excluded="
    yield "trap : TERM  # scontrol requeue sends it to this script"
    yield 'scontrol requeue "$SLURM_JOB_ID" || exit "$code"'
    if job.exclude_suspects:
        yield f"case $code in {'|'.join(map(str, EXCLUDE_CODES))})"
        yield "  [[ $node != - ]] && for _ in {1..20}; do  # refused until the job is pending again"
        yield '    scontrol update "JobId=$SLURM_JOB_ID" "ExcNodeList=${excluded:+$excluded,}$node" && break'
        yield "    sleep 0.5"
        yield "  done ;;"
        yield "esac"
    yield "sleep 600  # Slurm ends this script when the job is pending again"
    yield 'exit "$code"'
