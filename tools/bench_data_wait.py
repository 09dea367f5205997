"""Waiting for data: readers that take batches at the pace of a step, as the ranks of a node do.

Each reader is a process with the loader of a run: it asks for its share of a global batch, reads ahead on a thread and
sleeps for the step that a device would compute. Measured is how long the share is waited for, by the wall.
"""

from __future__ import annotations

import resource
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from bench_data import Corpora
from bench_support import Report, benchmark_parser, spread
from simulated_corpus import LENGTH

from megamask.config.schema.data import DataConfig
from megamask.data.loader import Loader

ROWS_OF_A_READER = 16


def read(corpus: str, reader: int, num_readers: int, steps: int, step_s: float, ahead: int) -> dict[str, float]:
    """Take the shares of one rank; return its shares of waiting and of CPU time, and its peak memory."""
    torch.set_num_threads(1)
    data = DataConfig(corpora={"main": corpus})
    size = ROWS_OF_A_READER * num_readers
    members = range(reader, size, num_readers)
    waited: list[float] = []
    with Loader(data.corpora, data, LENGTH) as loader:
        cpu = 0.0
        for step in range(-3, steps):  # three to open shards and fill what is read ahead
            if step == 0:
                cpu = time.process_time()
            first = (step + 3) * size
            started = time.perf_counter()
            loader.batch(first, size, members)
            waited.append(time.perf_counter() - started)
            for later in range(1, ahead + 1):
                loader.prefetch(first + later * size, size, members)
            time.sleep(step_s)
        cpu = time.process_time() - cpu
    waits = np.array(waited[3:])
    return {
        "wait": float(waits.sum() / (waits.sum() + steps * step_s)),
        "worst_ms": float(waits.max() * 1e3),
        "cpu_us_a_row": cpu / (steps * ROWS_OF_A_READER) * 1e6,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def measure(corpus: Path, num_readers: int, steps: int, step_s: float, ahead: int) -> list[dict[str, float]]:
    """Run all readers at once."""
    with ProcessPoolExecutor(num_readers, mp_context=get_context("fork")) as pool:
        waiting = [
            pool.submit(read, str(corpus), reader, num_readers, steps, step_s, ahead) for reader in range(num_readers)
        ]
        return [each.result() for each in waiting]


def column(found: Sequence[dict[str, float]], name: str, scale: float = 1.0) -> object:
    """Median and quartiles of one value over the readers."""
    return spread([each[name] for each in found], scale=scale)


def main() -> int:
    """Measure with and without reading ahead."""
    parser = benchmark_parser(__doc__, blocks=1)
    parser.add_argument("--readers", type=int, default=8)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--step-s", type=float, default=0.25, help="seconds that a step sleeps (default 0.25)")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.readers, arguments.steps, arguments.step_s = 2, 3, 0.05
    report = Report("bench_data_wait", "Waiting for data", arguments)
    columns = ("read ahead", "% of a step waited", "longest wait, ms", "CPU us a row", "peak MiB of a reader")
    table = report.table(
        f"{arguments.readers} readers",
        columns,
        f"{ROWS_OF_A_READER} rows of {LENGTH} tokens a step for each reader, {arguments.steps} steps of "
        f"{arguments.step_s} s; median and quartiles over the readers; page cache warm. CPU time with the content "
        "digest.",
    )
    with tempfile.TemporaryDirectory(prefix="bench_data_wait_") as folder:
        corpora = Corpora(Path(folder), 1024 if arguments.quick else 4096)
        for ahead in (0, 2):
            found = measure(corpora.ours, arguments.readers, arguments.steps, arguments.step_s, ahead)
            cells = [column(found, name) for name in ("worst_ms", "cpu_us_a_row", "peak_mib")]
            table.add(f"{ahead} batches", column(found, "wait", 100.0), *cells)
            report.keep(f"ahead_{ahead}", found)
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
