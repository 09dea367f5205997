"""The process group of a job: ranks meet at a store of rank 0 and build their collectives.

Every wait for another rank is in Python, a moment at a time, so that a signal is answered. The building of
the collectives is a library's own wait; it begins when all ranks have met.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import socket
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore, Store, TCPStore
from torch.distributed.distributed_c10d import _get_default_store

from megamask.engine.backend import STORE_DESCRIPTOR, Backend, has_gpu_of_its_own
from megamask.errors import ExitCode, MegamaskError, UsageError, error_with_code

DEFAULT_TIMEOUT_S = 1800.0
# After this long without an answer of rank 0, a line on stderr names what this rank waits for.
_PATIENCE_S = 10.0
_POLL_S = 0.1
# Rank 0 refuses: it serves its refusal for so long, so that every rank ends with the same words and code.
_REFUSAL_S = 30.0
_JOINED, _OPENING, _READ = "megamask/joined", "megamask/opening", "megamask/read"
_joined: list[float] = []
_log = logging.getLogger(__name__)


def _never() -> None:
    """The check of a caller that is never asked to stop."""


def init_process_group(
    backend: Backend,
    environment: Mapping[str, str] = os.environ,
    *,
    timeout_s: float = DEFAULT_TIMEOUT_S,
    check: Callable[[], None] = _never,
) -> None:
    """Join the job that a launcher's environment describes, or makes a job of one process, without any port.

    Environment: RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT as torchrun sets them. If MEGAMASK_STORE_FD is set, rank
    0 listens on that inherited socket instead of opening the port itself.

    Args:
        timeout_s: how long a rank waits for the others, here and in every collective call.
        check: called several times a second while this rank waits; raises when the rank is to stop.

    Raises:
        UsageError: MASTER_ADDR does not resolve, or MASTER_PORT is taken.
        MegamaskError: the other ranks did not come in time (71), or rank 0 refused: its error.
    """
    timeout = timedelta(seconds=timeout_s)
    _joined[:] = [timeout_s]
    if "RANK" not in environment or "WORLD_SIZE" not in environment:
        dist.init_process_group(backend.collectives, store=HashStore(), rank=0, world_size=1, timeout=timeout)
        return
    if environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        dist.init_process_group(backend.collectives, init_method="env://", timeout=timeout)
    else:
        rank, world_size = int(environment["RANK"]), int(environment["WORLD_SIZE"])
        store = _meet(environment, rank, world_size, timeout_s, check)
        dist.init_process_group(backend.collectives, store=store, rank=rank, world_size=world_size, timeout=timeout)
    if STORE_DESCRIPTOR not in environment and backend.name == "cuda" and has_gpu_of_its_own(environment):
        _claim_gpu(_get_default_store(), str(torch.cuda.get_device_properties(backend.device).uuid))


def collective_timeout_s() -> float:
    """Return the seconds that a collective call of this process's job waits for the other ranks."""
    return _joined[0] if _joined else DEFAULT_TIMEOUT_S


def is_joined() -> bool:
    """Return whether this process has joined a job."""
    return dist.is_initialized()


def destroy_process_group() -> None:
    """Leave the job; harmless if none was joined."""
    if dist.is_initialized():
        dist.destroy_process_group()


def refuse_others(error: MegamaskError, environment: Mapping[str, str] = os.environ) -> None:
    """Passes rank 0's refusal on to the ranks that wait for it; they raise the same error.

    Called by rank 0 before it ends, where no launcher of this project carries the error. Never raises.
    """
    refusal = {"message": error.message, "hint": error.hint, "exit_code": int(error.exit_code)}
    if STORE_DESCRIPTOR in environment or environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return
    try:
        world_size = int(environment.get("WORLD_SIZE", "1"))
        if world_size == 1:
            return
        store = _serve(environment, world_size, 10.0)
        store.set(_OPENING, json.dumps(refusal))
        deadline = time.monotonic() + _REFUSAL_S
        while store.add(_READ, 0) < world_size - 1 and time.monotonic() < deadline:
            time.sleep(_POLL_S)
    except (RuntimeError, OSError, MegamaskError) as problem:
        _log.warning("the other ranks could not be given rank 0's refusal: %s", problem)


def _meet(
    environment: Mapping[str, str], rank: int, world_size: int, timeout_s: float, check: Callable[[], None]
) -> Store:
    """The job's store, once every rank has joined it."""
    deadline = time.monotonic() + timeout_s
    if rank == 0:
        store = _serve(environment, world_size, timeout_s)
        store.add(_JOINED, 1)
        _wait(lambda: store.add(_JOINED, 0) >= world_size, "the other ranks", deadline, check)
        store.set(_OPENING, "")
        return store
    store = _connect(environment, world_size, timeout_s, check)
    store.add(_JOINED, 1)
    _wait(lambda: store.check([_OPENING]), "rank 0 and the other ranks", deadline, check)
    if refusal := store.get(_OPENING):
        fields: dict[str, Any] = json.loads(refusal)
        store.add(_READ, 1)
        raise error_with_code(fields["exit_code"], f"rank 0: {fields['message']}", hint=fields["hint"])
    return store


def _wait(is_done: Callable[[], bool], what: str, deadline: float, check: Callable[[], None]) -> None:
    warn_at: float | None = time.monotonic() + _PATIENCE_S
    while not is_done():
        check()
        now = time.monotonic()
        if now > deadline:
            raise error_with_code(
                ExitCode.HANG,
                f"{what} did not join the job in time (launch.collective_timeout_s). Nothing was trained.",
                hint="look whether every rank was started, and whether MASTER_ADDR is the node of rank 0",
            )
        if warn_at is not None and now > warn_at:
            _log.warning("still waiting for %s to join the job", what)
            warn_at = None
        time.sleep(_POLL_S)


def _serve(environment: Mapping[str, str], world_size: int, timeout_s: float) -> TCPStore:
    """The store of rank 0."""
    address, port = environment.get("MASTER_ADDR", "127.0.0.1"), int(environment["MASTER_PORT"])
    descriptor = _listening_descriptor(environment) if STORE_DESCRIPTOR in environment else None
    if descriptor is None:
        _refuse_taken(port)
        _resolve(address)
    try:
        return TCPStore(
            address,
            port,
            world_size,
            is_master=True,
            timeout=timedelta(seconds=timeout_s),
            wait_for_workers=False,
            master_listen_fd=descriptor,
        )
    except dist.DistNetworkError as error:
        raise _network_error(address, port, str(error).splitlines()[0]) from error


def _connect(environment: Mapping[str, str], world_size: int, timeout_s: float, check: Callable[[], None]) -> TCPStore:
    """The store of rank 0, seen from another rank, as soon as it can be reached."""
    address, port = environment.get("MASTER_ADDR", "127.0.0.1"), int(environment["MASTER_PORT"])
    _resolve(address)
    deadline = time.monotonic() + timeout_s
    _wait(lambda: _is_reachable(address, port), f"rank 0 at {address}, port {port},", deadline, check)
    try:
        return TCPStore(
            address, port, world_size, is_master=False, timeout=timedelta(seconds=timeout_s), wait_for_workers=False
        )
    except dist.DistNetworkError as error:
        raise _network_error(address, port, str(error).splitlines()[0]) from error


def _is_reachable(address: str, port: int) -> bool:
    try:
        with socket.create_connection((address, port), timeout=1.0):
            return True
    except OSError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE):  # this process's own fault: waiting would not end
            raise
        return False


def _resolve(address: str) -> None:
    """Refuse a name that does not resolve, before anything waits for it."""
    try:
        socket.getaddrinfo(address, None)
    except OSError as error:
        raise UsageError(
            f"MASTER_ADDR is {address!r}, which this node cannot resolve ({error.strerror or error}). "
            "Nothing was trained.",
            hint="give the name or address of the node of rank 0, as this node knows it",
        ) from error


def _refuse_taken(port: int) -> None:
    family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            raise UsageError(
                f"MASTER_PORT is {port}, and this node cannot serve on it: {error.strerror}. Nothing was trained.",
                hint="choose another port; `megamask train` and `megamask launch node` find a free one by themselves",
            ) from error


def _network_error(address: str, port: int, problem: str) -> MegamaskError:
    return UsageError(
        f"the ranks cannot meet at MASTER_ADDR {address!r}, port {port}: {problem}. Nothing was trained.",
        hint="MASTER_ADDR must be the node of rank 0, and MASTER_PORT a port that is free there and open between nodes",
    )


def _claim_gpu(store: Store, uuid: str) -> None:
    """Take a GPU for this process in the job's store.

    Raises:
        UsageError: another process of the job has it.
    """
    if store.add(f"megamask/gpu/{uuid}", 1) > 1:
        raise UsageError(
            f"another process of this job already uses the GPU {uuid}, the only one that this process is shown. "
            "Nothing was trained.",
            hint="show each task a GPU of its own (Slurm: --gpus-per-task=1), or all of the node's and set LOCAL_RANK",
        )


def _listening_descriptor(environment: Mapping[str, str]) -> int:
    """The inherited socket, checked: a wrong number would let the store listen on some other file."""
    descriptor = int(environment[STORE_DESCRIPTOR])
    try:
        with socket.socket(fileno=os.dup(descriptor)) as inherited:
            port = inherited.getsockname()[1]
    except OSError as error:
        raise UsageError(
            f"{STORE_DESCRIPTOR} is {descriptor}, not a listening socket of this process. Nothing was started.",
            hint=f"unset {STORE_DESCRIPTOR}, or start the processes with `megamask train`",
        ) from error
    if port != int(environment["MASTER_PORT"]):
        raise UsageError(
            f"{STORE_DESCRIPTOR} listens on port {port}, but MASTER_PORT is {environment['MASTER_PORT']}. "
            "Nothing was started.",
            hint=f"unset {STORE_DESCRIPTOR}, or start the processes with `megamask train`",
        )
    return descriptor
