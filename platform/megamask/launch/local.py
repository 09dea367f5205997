"""Ranks of a layout on this machine: `megamask train` where no launcher placed it."""

from __future__ import annotations

import contextlib
import errno
import socket
from collections.abc import Iterator, Sequence

from megamask.config.schema.watchdog import WatchdogConfig
from megamask.errors import UsageError
from megamask.launch.failures import RankExit
from megamask.launch.ranks import Gang, run_ranks
from megamask.launch.watch import Observer, StopGrace
from megamask.resilience.signals import StopRequest

_LOOPBACK = "127.0.0.1"


def run_local_ranks(
    arguments: Sequence[str],
    world_size: int,
    *,
    module: str = "megamask_pipelines.cli.main",
    signals: StopRequest | None = None,
    grace: StopGrace | None = None,
    watchdog: WatchdogConfig | None = None,
    observer: Observer | None = None,
) -> list[RankExit]:
    """Run `megamask ARGUMENTS` once per rank on this machine; arguments and result as of `run_ranks`."""
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
            grace=grace,
            watchdog=watchdog,
            observer=observer,
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
