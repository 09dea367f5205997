"""Rendezvous of all nodes: node 0 holds a port and announces it; the others wait for it and for the name of node 0."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from megamask.errors import ExitCode, MegamaskError, StorageError, UsageError, error_with_code
from megamask.launch.placement import NodePlace
from megamask.launch.verdict import read_meeting, read_verdict, wait_until
from megamask.resilience.signals import StopRequest

MEETING_S = 300.0  # nodes of one job may start minutes apart: images are pulled, file systems mounted
NAME_S = 120.0  # a pod's name is published some time after the pod has started
NAME_POLL_S = 0.5
_log = logging.getLogger(__name__)


@contextlib.contextmanager
def listening(place: NodePlace) -> Iterator[socket.socket]:
    """The socket that rank 0 inherits: on MASTER_PORT, or on a free port when that one is taken."""
    wanted = os.environ.get("MASTER_PORT", "0")
    ports = [int(wanted), 0] if wanted.isdecimal() and 0 < int(wanted) < 65536 else [0]
    for port in ports:
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                listener.bind(("" if place.num_nodes > 1 else "127.0.0.1", port))
            except OSError as error:
                if error.errno != errno.EADDRINUSE or port == 0:
                    raise UsageError(
                        f"node 0 cannot listen on port {port}: {error.strerror}. Nothing was started.",
                        hint="unset MASTER_PORT to take a free port",
                    ) from error
                _log.warning("port %d is taken; the ranks meet at a free one", port)
                continue
            listener.listen(1024)
            yield listener
            return


def meeting(folder: Path, signals: StopRequest) -> tuple[str, int]:
    """Return address and port of rank 0, as soon as node 0 has announced them."""

    def is_over() -> bool:
        return bool(signals.requested) or read_meeting(folder) is not None or read_verdict(folder) is not None

    wait_until(is_over, MEETING_S)
    if (verdict := read_verdict(folder)) is not None:
        raise error_with_code(verdict.code, "another node of this job has ended before this one started its ranks")
    if (meeting := read_meeting(folder)) is not None:
        return meeting
    if signals.requested:
        raise _stopped(signals, "node 0")
    raise StorageError(
        f"node 0 did not announce itself in {folder} within {MEETING_S:.0f} s. Nothing was started.",
        hint="run.output_dir must be on storage that all nodes share",
    )


def wait_for_name(address: str, signals: StopRequest) -> None:
    """Wait until this node can resolve the name of node 0."""
    refusal: list[OSError] = []

    def is_over() -> bool:
        try:
            socket.getaddrinfo(address, None)
        except OSError as error:
            refusal[:] = [error]
            time.sleep(NAME_POLL_S)
            return bool(signals.requested)
        refusal.clear()
        return True

    if not wait_until(is_over, NAME_S):
        raise UsageError(
            f"MASTER_ADDR is {address!r}, which this node could not resolve within {NAME_S:.0f} s: "
            f"{refusal[0].strerror}. Nothing was started.",
            hint="it must be the name or address of node 0; in a JobSet, network.subdomain publishes it",
        )
    if refusal:
        raise _stopped(signals, "the name of node 0")


def _stopped(signals: StopRequest, awaited: str) -> MegamaskError:
    error = MegamaskError(f"asked for an end while this node waited for {awaited}; nothing was lost")
    error.exit_code = ExitCode(signals.requested)
    return error
