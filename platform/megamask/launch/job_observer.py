"""A node's part in what happens to the ranks of its job: it learns from the launch folder how the other nodes are."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from megamask.errors import MegamaskError
from megamask.launch.hang import Standing, read_standings, write_standings
from megamask.launch.metrics_file import MetricsFile
from megamask.launch.placement import NodePlace
from megamask.launch.preflight import read_unfit
from megamask.launch.run_observer import RunObserver
from megamask.launch.verdict import read_verdict, wait_until
from megamask.resilience.heartbeat import Mark
from megamask.storage.durable import make_folders

# The launch folder lies on shared storage: it is not asked more often than this.
_ASK_S = 0.5
# The other nodes notice a hang within this time, and ask their ranks for stacks.
_OTHERS_S = 12.0


class JobObserver(RunObserver):
    """Observer of the ranks of one node of a job.

    Args:
        folder: of this start of the job.
        metrics: the node's metrics file, or None.
    """

    def __init__(
        self, folder: Path, place: NodePlace, run_dir: Path, before: int, metrics: MetricsFile | None = None
    ) -> None:
        super().__init__(run_dir, before)
        self._metrics = metrics
        self._folder = folder
        self._place = place
        others = [node for node in range(place.num_nodes) if node != place.node]
        self._has_verdict = _Seldom(lambda: read_verdict(folder) is not None)
        self._has_unfit = _Seldom(lambda: read_unfit(folder) is not None)
        self._has_hang = _Seldom(lambda: any(self._standings(node).exists() for node in others))

    def owns(self, claim: dict[str, object]) -> bool:
        """Return whether this start of the job made the claim: a newer one may belong to another job."""
        return claim.get("token") == self._place.token

    def looked(self, marks: Mapping[int, Mark | None]) -> None:
        """Hand the progress marks of the running ranks to the metrics file."""
        if self._metrics is not None:
            self._metrics.take(marks.values())

    def has_ended_elsewhere(self) -> bool:
        """Return whether node 0 has closed the job."""
        return self._has_verdict()

    def is_unfit_elsewhere(self) -> bool:
        """Return whether another node was found not fit, so that its ranks never come."""
        return self._has_unfit()

    def is_hung_elsewhere(self) -> bool:
        """Return whether another node has written where its ranks are in a hang."""
        return self._has_hang()

    def hung(self, standings: Sequence[Standing], stacks: dict[int, str]) -> MegamaskError:
        """Write stacks and standings of this node, wait for those of the others, and find who holds up whom."""
        self.keep_stacks(stacks)
        with contextlib.suppress(MegamaskError, OSError):
            make_folders(self._folder)
            write_standings(self._standings(self._place.node), standings)
        nodes = [node for node in range(self._place.num_nodes) if node != self._place.node]
        wait_until(lambda: all(self._standings(node).exists() for node in nodes), _OTHERS_S)
        found = {node: read_standings(self._standings(node)) for node in nodes}
        known = [*standings, *(standing for on_node in found.values() for standing in on_node or ())]
        return self.record_hang(known, silent_nodes=[node for node, on_node in found.items() if on_node is None])

    def _standings(self, node: int) -> Path:
        return self._folder / f"hang-{node}"


class _Seldom:
    """A question that is asked at most every half second, until the answer is yes."""

    def __init__(self, ask: Callable[[], bool]) -> None:
        self._ask = ask
        self._asked_at = float("-inf")
        self._answer = False

    def __call__(self) -> bool:
        now = time.monotonic()
        if not self._answer and now - self._asked_at >= _ASK_S:
            self._asked_at = now
            self._answer = self._ask()
        return self._answer
