"""All ranks succeed or all raise: how a failure on one rank becomes the same failure everywhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, TypeVar

from megamask.errors import ExitCode, MegamaskError, error_with_code

Result = TypeVar("Result")


class RankInfo(Protocol):
    """This rank among all."""

    @property
    def rank(self) -> int:
        """Global rank of this process."""

    @property
    def world_size(self) -> int:
        """Processes of the job."""


class StateShare(Protocol):
    """One rank's share of the state to write; its methods make no collective call, so that any thread may call them."""

    def write(self, folder: Path, gate: Callable[[], None]) -> list[str]:
        """Write this rank's share; `gate` is called between tensors and raises to stop.

        Returns: names of the files, relative to the folder.
        """

    def check(self, folder: Path) -> None:
        """Read the headers of all ranks' files as a resume does; on rank 0, after all have written.

        Raises:
            CheckpointIntegrityError: the files are not the complete state.
        """


class CheckpointEngine(Protocol):
    """The engine as saving and loading use it.

    Every method but `is_main` and `state_share` is called by all ranks together.
    """

    @property
    def is_main(self) -> bool:
        """True if this is global rank 0."""

    @property
    def mesh(self) -> RankInfo:
        """Rank and number of processes."""

    def state_share(self, *, copy: bool) -> StateShare:
        """This rank's share of the state: a copy as it is now, or the state itself, which must not change meanwhile."""

    def load_state(self, folder: Path) -> None:
        """Read the sharded state under this engine's own layout."""

    def gather_objects(self, value: Any) -> list[Any]:
        """The values of all ranks in rank order, at least on rank 0."""

    def broadcast_object(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""

    def max_over_ranks(self, value: int) -> int:
        """The largest value of any rank, on every rank."""


@contextmanager
def captured(failures: list[BaseException]) -> Iterator[None]:
    """Keep this rank's failure in a list, so that the rank still comes to the next collective call."""
    try:
        yield
    except Exception as error:  # noqa: BLE001 - re-raised on every rank by agree()
        failures.append(error)


def agree(engine: CheckpointEngine, failures: list[BaseException]) -> None:
    """Collective: returns if no rank failed, raises on every rank if one did.

    A rank that failed raises its own error; the others raise the first rank's, with the same exit code.
    """
    own = None if not failures else _describe(failures[0])
    gathered = engine.gather_objects(own)
    first = None
    if engine.is_main:
        first = next(((rank, *entry) for rank, entry in enumerate(gathered) if entry is not None), None)
    first = engine.broadcast_object(first)
    if failures:
        raise failures[0]
    if first is not None:
        rank, code, message, hint = first
        raise error_with_code(code, f"rank {rank}: {message}", hint=hint)


def _describe(error: BaseException) -> tuple[int, str, str | None]:
    if isinstance(error, MegamaskError):
        return int(error.exit_code), error.message, error.hint
    return int(ExitCode.BUG), f"{type(error).__name__}: {error}", None


def on_main(engine: CheckpointEngine, action: Callable[[], Result]) -> Result:
    """Collective: rank 0 does something, every rank gets the result or raises the same error."""
    failures: list[BaseException] = []
    result = None
    if engine.is_main:
        with captured(failures):
            result = action()
    agree(engine, failures)
    value: Result = engine.broadcast_object(result)
    return value
