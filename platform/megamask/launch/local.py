"""All ranks of a layout on this machine: what `megamask train` does when no launcher placed it."""

from __future__ import annotations

import contextlib
import errno
import socket
from collections.abc import Callable, Iterator, Sequence

from megamask.errors import UsageError
from megamask.launch.ranks import SAVE_BUDGET_S, STOP_GRACE_S, Gang, RankExit, run_ranks
from megamask.resilience.signals import StopRequest

_LOOPBACK = "127.0.0.1"


def run_local_ranks(
    arguments: Sequence[str],
    world_size: int,
    *,
    module: str = "megamask_pipelines.cli.main",
    signals: StopRequest | None = None,
    stop_grace_s: float = STOP_GRACE_S,
    save_budget_s: float = SAVE_BUDGET_S,
    on_killed: Callable[[int, int, int], None] | None = None,
) -> list[RankExit]:
    """Runs `megamask ARGUMENTS` once per rank on this machine; arguments and result as of `run_ranks`."""
    with _listening_socket() as listener:
        gang = Gang(
            num_ranks=world_size,
            world_size=world_size,
            address=_LOOPBACK,
            port=listener.getsockname()[1],
            listener=listener,
            interface="lo",  # the host's own name need not resolve
        )
        return run_ranks(
            arguments,
            gang,
            module=module,
            signals=signals,
            stop_grace_s=stop_grace_s,
            save_budget_s=save_budget_s,
            on_killed=on_killed,
        )


@contextlib.contextmanager
def _listening_socket() -> Iterator[socket.socket]:
    """A socket on a port of the system's choice; rank 0 inherits it, so no other process can take the port."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as listener:
        try:
            listener.bind((_LOOPBACK, 0))
            listener.listen(1024)
            with socket.create_connection(listener.getsockname(), timeout=5):
                pass
            listener.accept()[0].close()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                raise
            raise UsageError(
                f"this machine's processes cannot meet at {_LOOPBACK}: {error.strerror or error}. Nothing was started.",
                hint="bring the loopback interface up: `ip link set lo up`",
            ) from error
        yield listener
