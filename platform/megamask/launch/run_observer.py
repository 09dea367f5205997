"""Records of a run that its launcher writes: killed ranks, hangs and the stacks of ranks that hang."""

from __future__ import annotations

import contextlib
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path

from megamask.errors import ExitCode, MegamaskError
from megamask.launch.failures import killed_by
from megamask.launch.hang import Standing, behind, hang_error
from megamask.launch.watch import Observer
from megamask.runs.claims import claimed_attempts, read_claim
from megamask.runs.layout import attempt_folder, stacks_path
from megamask.runs.rank_files import write_rank_failure
from megamask.storage.durable import make_folders, write_atomic


class RunObserver(Observer):
    """Observer of the ranks of an attempt.

    Storage that refuses is ignored: the launcher reports the failure in any case.

    Args:
        run_dir: run directory.
        before: the newest attempt when the ranks were started; theirs is later.
    """

    def __init__(self, run_dir: Path, before: int) -> None:
        self.run_dir = run_dir
        self.before = before

    @abstractmethod
    def owns(self, claim: dict[str, object]) -> bool:
        """Return whether a claim is that of the observed ranks."""

    @property
    def attempt(self) -> int | None:
        """The attempt that the observed ranks have claimed; None before they have."""
        for attempt in reversed(claimed_attempts(self.run_dir, after=self.before)):
            claim = read_claim(self.run_dir, attempt)
            if claim is not None and self.owns(claim):
                return attempt
        return None

    def killed(self, rank: int, number: int) -> None:
        """Write the failure record of a killed rank, while the other ranks look for it."""
        with contextlib.suppress(MegamaskError, OSError):
            if (attempt := self.attempt) is not None:
                write_rank_failure(
                    self.run_dir, attempt, rank=rank, exit_code=int(ExitCode.BUG), reason=killed_by(number)
                )

    def hung(self, standings: Sequence[Standing], stacks: dict[int, str]) -> MegamaskError:
        """Write the stacks, and a failure record for each rank that holds up the others."""
        self.keep_stacks(stacks)
        return self.record_hang(standings)

    def record_hang(self, standings: Sequence[Standing], *, silent_nodes: Sequence[int] = ()) -> MegamaskError:
        """Write the failure records of a hang and return the error to show."""
        attempt: int | None = None
        with contextlib.suppress(MegamaskError, OSError):
            attempt = self.attempt
        folder = None if attempt is None else attempt_folder(self.run_dir, attempt)
        error = hang_error(standings, folder, silent_nodes=silent_nodes)
        if attempt is not None:
            for standing in behind(standings):
                write_rank_failure(
                    self.run_dir,
                    attempt,
                    rank=standing.rank,
                    exit_code=int(ExitCode.HANG),
                    reason=error.message,
                    node=standing.node,
                )
        return error

    def keep_stacks(self, stacks: dict[int, str]) -> None:
        """Write stacks beside the failure records of the attempt; before the claim they are not kept."""
        with contextlib.suppress(MegamaskError, OSError):
            if (attempt := self.attempt) is None:
                return
            for rank, text in stacks.items():
                path = stacks_path(self.run_dir, attempt, rank)
                make_folders(path.parent)
                write_atomic(path, (text or "no answer: the process runs in a library that holds it\n").encode())
