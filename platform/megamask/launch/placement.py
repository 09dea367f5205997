"""The place of a process in its job, read from the environment of the launcher that started it.

A rank is placed by RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT, as torchrun sets them. A node is placed by its
scheduler: a step of Slurm, an Indexed Job of Kubernetes, or SkyPilot. Contradictions are refused.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from megamask.errors import UsageError

_NOTHING = "Nothing was started."
_UNSET = "unset RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT to start without a launcher"
# Set by torchrun and ft_launcher, whose agent serves the store that all ranks meet at.
_AGENT_STORE = "TORCHELASTIC_USE_AGENT_STORE"


@dataclass(frozen=True, kw_only=True)
class RankPlace:
    """The place of one rank.

    Args:
        rank, world_size: among all ranks of the job.
        local_rank, local_world_size: among the ranks of this node.
        address, port: where rank 0 is met.
    """

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    address: str
    port: int

    def check_world_size(self, needed: int, *, nearest: str | None = None) -> None:
        """Refuse a job of another size than the layout's.

        Args:
            needed: processes of the layout.
            nearest: a layout for about as many processes as there are, as a phrase.

        Raises:
            UsageError: names both numbers of processes.
        """
        if self.world_size != needed:
            raise UsageError(
                f"the launcher started {self.world_size} processes (WORLD_SIZE), but layout.tensor_parallel_size x "
                "pipeline_parallel_size x context_parallel_size x data_parallel_size is "
                f"{needed}{'' if nearest is None else f'; nearest: {nearest}'}. Nothing was started.",
                hint=f"start {needed} processes, or change layout.data_parallel_size",
            )


def rank_place(environment: Mapping[str, str] = os.environ) -> RankPlace | None:
    """The place of this process among the ranks of a job, or None when no launcher placed it.

    Raises:
        UsageError: the variables are incomplete, no numbers, or contradict one another; or this is one of several
            tasks of a Slurm step that were given no ranks.
    """
    given = [name for name in ("RANK", "WORLD_SIZE") if name in environment]
    if not given:
        _refuse_bare_step(environment)
        return None
    missing = [name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if not environment.get(name)]
    if missing:
        raise UsageError(
            f"the environment has {' and '.join(given)}, but not {' and '.join(missing)}: a launcher sets all four. "
            f"{_NOTHING}",
            hint=f"{_UNSET}, or set {' and '.join(missing)}",
        )
    rank, world_size = _number(environment, "RANK"), _number(environment, "WORLD_SIZE", minimum=1)
    local_rank = _number(environment, "LOCAL_RANK") if "LOCAL_RANK" in environment else 0
    local_size = _number(environment, "LOCAL_WORLD_SIZE", minimum=1) if "LOCAL_WORLD_SIZE" in environment else 1
    port = _number(environment, "MASTER_PORT", minimum=1)
    if port > 65535:
        raise UsageError(f"MASTER_PORT is {port}; ports go from 1 to 65535. {_NOTHING}", hint="choose a free port")
    if rank >= world_size:
        raise UsageError(
            f"RANK is {rank}, but WORLD_SIZE is {world_size}: ranks are counted from 0. {_NOTHING}", hint=_UNSET
        )
    return RankPlace(
        rank=rank,
        world_size=world_size,
        local_rank=local_rank,
        local_world_size=max(local_size, local_rank + 1),
        address=environment["MASTER_ADDR"],
        port=port,
    )


def uses_agent_store(environment: Mapping[str, str] = os.environ) -> bool:
    """Return whether a launcher's own process, and not rank 0, serves the store at MASTER_ADDR."""
    return environment.get(_AGENT_STORE) == "True"


def _refuse_bare_step(environment: Mapping[str, str]) -> None:
    """Refuse a task of `srun -N2 megamask train`: every task would start all ranks of the layout on the same run."""
    tasks = environment.get("SLURM_STEP_NUM_TASKS", "1")
    if "SLURM_PROCID" in environment and tasks.isdecimal() and int(tasks) > 1:
        raise UsageError(
            f"this is one of the {tasks} tasks of a Slurm step, and each would start a training run of its own. "
            f"{_NOTHING}",
            hint="start one task a node with `srun --ntasks-per-node=1 megamask launch node CONFIG`; "
            "`megamask launch slurm CONFIG` writes the batch script",
        )


def _number(environment: Mapping[str, str], name: str, *, minimum: int = 0) -> int:
    text = environment[name]
    if not re.fullmatch(r"[0-9]{1,9}", text) or int(text) < minimum:
        raise UsageError(f"{name} is {text!r}; allowed: an integer from {minimum}. {_NOTHING}", hint=_UNSET)
    return int(text)


@dataclass(frozen=True, kw_only=True)
class NodePlace:
    """The place of one node in its job.

    Args:
        node, num_nodes: counted from 0.
        address: name of node 0, as the other nodes know it.
        token: names this start of the job; the same on every node, another one after a restart.
    """

    node: int
    num_nodes: int
    address: str
    token: str


def node_place(environment: Mapping[str, str] = os.environ) -> NodePlace:
    """The place of this node, from MEGAMASK_NODE_RANK, a Slurm step, an Indexed Job, SkyPilot, or a single machine.

    Raises:
        UsageError: the variables are incomplete or contradict one another.
    """
    found = {
        name: (_number(environment, node), _number(environment, count, minimum=1))
        for name, node, count in (
            ("MEGAMASK_NODE_RANK", "MEGAMASK_NODE_RANK", "MEGAMASK_NUM_NODES"),
            ("Slurm", "SLURM_NODEID", "SLURM_STEP_NUM_NODES"),
            ("Kubernetes", "JOB_COMPLETION_INDEX", "MEGAMASK_NUM_NODES"),
            ("SkyPilot", "SKYPILOT_NODE_RANK", "SKYPILOT_NUM_NODES"),
        )
        if node in environment and count in environment
    }
    tasks = environment.get("SLURM_STEP_NUM_TASKS", "")
    if "Slurm" in found and tasks.isdecimal() and int(tasks) != found["Slurm"][1]:
        raise UsageError(
            f"the Slurm step has {tasks} tasks on {found['Slurm'][1]} nodes; allowed is one task a node. {_NOTHING}",
            hint="srun --ntasks-per-node=1",
        )
    places = set(found.values())
    if len(places) > 1:
        conflicts = ", ".join(f"{name} names node {node} of {count}" for name, (node, count) in found.items())
        raise UsageError(f"the environment contradicts itself: {conflicts}. {_NOTHING}", hint="unset what is left over")
    node, num_nodes = places.pop() if places else (0, 1)
    if node >= num_nodes:
        raise UsageError(f"this is node {node} of {num_nodes}: nodes are counted from 0. {_NOTHING}", hint=_UNSET)
    address = environment.get("MASTER_ADDR") or environment.get("SKYPILOT_NODE_IPS", "").partition("\n")[0]
    address = address or first_host(environment.get("SLURM_STEP_NODELIST", ""))
    if not address and num_nodes > 1:
        raise UsageError(
            f"{num_nodes} nodes, but not MASTER_ADDR: the name of node 0. {_NOTHING}",
            hint="the scripts that `megamask launch slurm` and `jobset` write set it",
        )
    token = environment.get("MEGAMASK_LAUNCH_TOKEN") or _own_token(environment, num_nodes)
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,200}", token):
        raise UsageError(
            f"MEGAMASK_LAUNCH_TOKEN is {token!r}; allowed: letters, digits and . _ -. {_NOTHING}",
            hint="one word for this start of the job",
        )
    if num_nodes == 1:  # its ranks meet on the loopback interface, regardless of the node's name
        address = "127.0.0.1"
    return NodePlace(node=node, num_nodes=num_nodes, address=address, token=token)


def first_host(nodes: str) -> str:
    """Return the first name of Slurm's list of nodes, as gpu-001 of gpu-[001-004,7],login; "" of an empty list."""
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", nodes).partition(",")[0]


def _own_token(environment: Mapping[str, str], num_nodes: int) -> str:
    if "SLURM_JOB_ID" in environment:
        # one allocation may start several steps, one after the other
        step = f".s{environment['SLURM_STEP_ID']}" if "SLURM_STEP_ID" in environment else ""
        return f"slurm-{environment['SLURM_JOB_ID']}.{environment.get('SLURM_RESTART_COUNT', '0')}{step}"
    if num_nodes > 1:
        raise UsageError(
            f"{num_nodes} nodes, but not MEGAMASK_LAUNCH_TOKEN: one word for this start of the job, the same on every "
            f"node. {_NOTHING}",
            hint="a job id and the number of its restart",
        )
    return f"single-{os.getpid()}"
