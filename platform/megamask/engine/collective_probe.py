"""`python -m megamask.engine.collective_probe RANKS`: sum a tensor over processes, check it, print the rate."""

from __future__ import annotations

import json
import os
import socket
import statistics
import sys
import time

import torch
import torch.distributed as dist
from torch import multiprocessing

_BYTES, _CPU_BYTES = 256 << 20, 4 << 20
_REPEATS = 5


def main(ranks: int) -> None:
    """Start the ranks; their first error becomes the process's."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    multiprocessing.spawn(_rank, args=(ranks,), nprocs=ranks)  # type: ignore[attr-defined, no-untyped-call]


def _rank(rank: int, ranks: int) -> None:
    has_gpus = torch.cuda.is_available()
    backend = "nccl" if has_gpus else "gloo"
    device = torch.device("cuda", rank) if has_gpus else torch.device("cpu")
    dist.init_process_group(backend, rank=rank, world_size=ranks, device_id=device if has_gpus else None)
    size = _BYTES if has_gpus else _CPU_BYTES
    seconds = []
    for repeat in range(_REPEATS + 1):
        # small integers: their sum is exact in float32 in any order
        values = torch.arange(size // 4, device=device).remainder_(1000).float() + rank
        dist.barrier()
        started = time.perf_counter()
        dist.all_reduce(values)
        if has_gpus:
            torch.cuda.synchronize(device)
        if repeat:
            seconds.append(time.perf_counter() - started)
        expected = torch.arange(size // 4, device=device).remainder_(1000).float() * ranks + ranks * (ranks - 1) / 2
        if not torch.equal(values, expected):
            raise SystemExit("the sum over the ranks is wrong")
    if rank == 0:
        moved = 2 * (ranks - 1) / ranks * size  # of a ring, per rank
        found = {"backend": backend, "ranks": ranks, "bytes": size, "bytes_per_s": moved / statistics.median(seconds)}
        sys.stdout.write(json.dumps(found) + "\n")
        sys.stdout.flush()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]))
