"""A hang of a job's ranks: where each of them is, which one the others wait for, and in words.

A rank that is stopped, or that is in no call that waits for others, holds up the rest. Where all of them wait, the one
with the smallest (step, section) is behind. Ranks that cannot be distinguished are all named.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from megamask.errors import ExitCode, MegamaskError, error_with_code
from megamask.launch.rank_folder import RankFolder
from megamask.resilience.heartbeat import SECTIONS
from megamask.resilience.process_facts import node_name
from megamask.resilience.stacks import (
    ask_for_stacks,
    innermost_frames,
    kernel_wait,
    process_state,
    wait_for_stacks,
    waits_for_others,
)
from megamask.resilience.watchdog import Stillness
from megamask.storage.durable import write_atomic

_ANSWER_S = 5.0
_NAMED = 8


@dataclass(frozen=True, kw_only=True)
class Standing:
    """Place of a rank while its job hangs.

    Args:
        still_s, limit_s: how long it has been in its section, and may be.
        state: of its process, as proc(5) names it.
        place: innermost function of its main thread, or the kernel's; "-" where neither is known.
        waits: it is in a call that waits for other ranks.
    """

    rank: int
    node: str
    step: int
    section: str
    still_s: float
    limit_s: float
    state: str
    place: str = "-"
    waits: bool = False

    @property
    def is_stopped(self) -> bool:
        """True for a process that a signal or a debugger has stopped."""
        return self.state[:1] in ("T", "t")

    @property
    def order(self) -> tuple[int, int, int]:
        """The standings in the order of suspicion: the smallest holds up the others."""
        kind = 0 if self.is_stopped else 1 + self.waits
        return kind, self.step, SECTIONS.index(self.section)

    def __str__(self) -> str:
        where = self.state if self.is_stopped else f"in {self.place}"
        return (
            f"rank {self.rank} on {self.node}: section {self.section!r} of step {self.step} for {self.still_s:.0f} s "
            f"(limit {self.limit_s:.0f} s), {where}"
        )


def examine(
    pids: dict[int, int], stillness: dict[int, Stillness], folder: RankFolder
) -> tuple[list[Standing], dict[int, str]]:
    """Ask ranks of this node for their stacks; one that is stopped is not asked.

    Args:
        pids: process ids by rank.

    Returns: a standing for each rank, and the stacks by rank.
    """
    states = {rank: process_state(pid) for rank, pid in pids.items()}
    running = [rank for rank, state in states.items() if state[:1] not in ("T", "t")]
    for rank in running:
        ask_for_stacks(pids[rank])
    stacks = {rank: wait_for_stacks(folder.stacks(rank), _ANSWER_S) for rank in running}
    standings = []
    for rank, still in stillness.items():
        frames = innermost_frames(stacks.get(rank, ""))
        standings.append(
            Standing(
                rank=rank,
                node=node_name(),
                step=still.mark.step,
                section=still.mark.section,
                still_s=round(still.still_s, 1),
                limit_s=round(still.limit_s, 1),
                state=states[rank],
                place=str(frames[0]) if frames else kernel_wait(pids[rank]),
                waits=waits_for_others(frames),
            )
        )
    return standings, stacks


def behind(standings: Sequence[Standing]) -> list[Standing]:
    """Return the ranks that hold up the others; several where they cannot be distinguished."""
    first = min(standing.order for standing in standings)
    return [standing for standing in standings if standing.order == first]


def hang_error(
    standings: Sequence[Standing], stacks: Path | None, *, silent_nodes: Sequence[int] = ()
) -> MegamaskError:
    """Return the error of a hang (71).

    Args:
        standings: of all ranks that are known.
        stacks: folder of the stacks, or None where they are not kept.
        silent_nodes: nodes whose launcher does not answer.
    """
    suspects = behind(standings)
    named = "; ".join(map(str, suspects[:_NAMED])) + (
        f"; and {len(suspects) - _NAMED} more" if len(suspects) > _NAMED else ""
    )
    if silent_nodes:
        lost = ", ".join(map(str, silent_nodes))
        finding = f"node {lost} of the job does not answer; of the others this holds up the rest: {named}"
    elif len(suspects) == len(standings):
        finding = f"no rank is behind the others: {named}"
    else:
        finding = f"the others wait for {named}"
    return error_with_code(
        ExitCode.HANG,
        f"the job hangs and was ended: {finding}."
        + (f" The stacks of the ranks are in {stacks}." if stacks is not None else "")
        + " Checkpoints committed before are intact.",
        hint="start the run again, it resumes from its newest checkpoint; launch.watchdog sets the limits",
    )


def write_standings(path: Path, standings: Sequence[Standing]) -> None:
    """Write the standings of a node's ranks for the other nodes.

    Raises:
        StorageError: the storage refuses.
    """
    write_atomic(path, json.dumps([asdict(standing) for standing in standings]).encode())


def read_standings(path: Path) -> list[Standing] | None:
    """Return the standings of a node's ranks, or None where the node has not written them."""
    try:
        return [Standing(**entry) for entry in json.loads(path.read_bytes())]
    except (OSError, ValueError, TypeError):
        return None
