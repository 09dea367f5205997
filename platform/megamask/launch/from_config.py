"""The job of a run, from its config: pure; `validate_launch` has refused what does not fit."""

from __future__ import annotations

from collections.abc import Sequence

from megamask.config.dump import to_yaml
from megamask.config.rules.launch import kubernetes_secret, mount_parts
from megamask.config.schema.launch import KubernetesConfig, SlurmConfig
from megamask.config.schema.roots import TrainConfig
from megamask.config.validate_launch import Target, job_name, notice_s, slurm_save_budget_s
from megamask.launch.environment import fabric_environment
from megamask.launch.job import Job, KubernetesOptions, Mount, SecretKey, SlurmOptions
from megamask.runs.layout import run_path


def job_from_config(config: TrainConfig, target: Target, *, path: str, overrides: Sequence[str] = ()) -> Job:
    """Return the job of a run.

    Args:
        config: composed of the file and the overrides, and checked by `validate_launch` for the target.
        path, overrides: as the nodes of a Slurm job get them; pods get the composed config.
    """
    launch = config.launch
    ranks_per_node = config.layout.num_processes // launch.nodes
    budget = slurm_save_budget_s(launch) if target == "slurm" else launch.effective_save_budget_s
    if target == "slurm" and launch.save_budget_s is None:
        overrides = [*overrides, f"launch.save_budget_s={budget:g}"]
    mounts = [mount_parts(mount) for mount in launch.mounts]
    return Job(
        name=job_name(config),
        nodes=launch.nodes,
        ranks_per_node=ranks_per_node,
        gpus_per_node=ranks_per_node if launch.gpus_per_node is None else launch.gpus_per_node,
        cpus_per_rank=launch.cpus_per_rank,
        memory_gib=launch.memory_gib,
        time_limit_s=None if launch.time_limit is None else _seconds(launch.time_limit),
        program=tuple(launch.command),
        config=path,
        config_text=to_yaml(config),
        overrides=tuple(overrides),
        run_dir=str(run_path(config.run.output_dir, config.run.name)),
        notice_s=notice_s(launch, budget),
        max_restarts=launch.max_restarts,
        exclude_suspects=launch.exclude_suspects,
        environment=fabric_environment(launch.fabric, launch.interface) | dict(launch.environment),
        secrets={name: _secret(reference) for name, reference in launch.secrets.items()},
        image=launch.image,
        mounts=tuple(Mount(source=source, target=target, is_read_only=ro) for source, target, ro in mounts),
        workdir=launch.workdir,
        slurm=_slurm(launch.slurm),
        kubernetes=_kubernetes(launch.kubernetes),
    )


def _slurm(options: SlurmConfig) -> SlurmOptions:
    return SlurmOptions(
        partition=options.partition,
        account=options.account,
        qos=options.qos,
        constraint=options.constraint,
        reservation=options.reservation,
        gpu_type=options.gpu_type,
        container=options.container,
        exclude=tuple(options.exclude),
        mail=options.mail,
        extra=tuple(options.extra),
    )


def _kubernetes(options: KubernetesConfig) -> KubernetesOptions:
    return KubernetesOptions(
        namespace=options.namespace,
        queue=options.queue,
        priority_class=options.priority_class,
        required_topology=options.required_topology,
        preferred_topology=options.preferred_topology,
        node_selector=dict(label.split("=", 1) for label in options.node_selector),
        tolerations=tuple(options.tolerations),
        gpu_resource=options.gpu_resource,
        rdma_resource=options.rdma_resource,
        shm_gib=options.shm_gib,
        tmp_gib=options.tmp_gib,
        claims=dict(options.claims),
        run_as=options.run_as,
        service_account=options.service_account,
        runtime=options.runtime,
    )


def _secret(reference: str) -> SecretKey | None:
    entry = kubernetes_secret(reference)
    return None if entry is None else SecretKey(secret=entry[0], key=entry[1])


def _seconds(limit: str) -> int:
    days, _, clock = limit.rpartition("-")
    hours, minutes, seconds = map(int, clock.split(":"))
    return int(days or 0) * 86400 + hours * 3600 + minutes * 60 + seconds
