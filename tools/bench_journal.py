"""Cost of the journal: a line for each step while training, and finding one step in a million afterwards.

Appending is measured beside a bare write of the same bytes, finding beside reading the journal from its beginning. The
long journal is written in pieces, with the writer's line format and its chain of hashes, which is verified in part.
"""

from __future__ import annotations

import functools
import io
import itertools
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench_support import Report, alternate, benchmark_parser, ratio, spread

from megamask.config.load import load_train_config
from megamask.storage.hashing import sha256_bytes
from megamask.tracking.console import Console
from megamask.tracking.journal.chain import CHAIN_START, chain_problem
from megamask.tracking.journal.lines import journal_files, read_journal, read_lines
from megamask.tracking.journal.seek import find_step, last_step
from megamask.tracking.journal.writer import ROTATE_BYTES, Journal

ROOT = Path(__file__).parents[1]
TIME = "2026-01-01T00:00:00.000000Z"


def step_fields(step: int) -> dict[str, Any]:
    """The fields of a step line, with values of the usual length."""
    noise = random.Random(step)
    return {
        "step": step,
        "loss": 3.0 + noise.random(),
        "loss_terms": {"nelbo": 3.0 + noise.random(), "z_loss": noise.random() / 1e4},
        "nelbo_nats_per_token": 3.0 + noise.random(),
        "grad_norm": noise.random(),
        "learning_rate": 3e-4 * noise.random(),
        "global_batch_size": 512,
        "consumed_samples": 512 * step,
        "consumed_tokens": 2096128 * step,
        "processed_tokens": 4192256 * step,
        "masked_tokens": 1000000 + noise.randrange(90000),
        "loss_by_noise_level": [noise.random() for _ in range(10)],
        "masked_tokens_by_noise_level": [noise.randrange(10**6) for _ in range(10)],
        "batch_digest": f"{noise.getrandbits(64):016x}",
        "content_digest": f"{noise.getrandbits(64):016x}",
        "seconds": {name: round(noise.random(), 6) for name in ("data", "forward_backward", "optimizer", "other")},
        "tokens_per_second": 1e6 * noise.random(),
        "mfu": None,
    }


def lines(num_steps: int) -> Iterator[bytes]:
    """A journal's lines as the writer forms them: one attempt, an evaluation each 1,000 steps."""
    bodies = [json.dumps(step_fields(step), separators=(",", ":"))[1:].encode() for step in range(1, 65)]
    bodies = [body[body.index(b",") :] for body in bodies]  # behind the step, which is put in below
    previous, seq = CHAIN_START, 0
    for step in range(1, num_steps + 1):
        kinds = [("step", bodies[step % 64])]
        if step % 1000 == 0:
            kinds.append(("evaluation", b',"nelbo_nats_per_token":3.5,"standard_error":0.01}'))
        for kind, rest in kinds:
            seq += 1
            head = (
                f'{{"seq":{seq},"time":"2026-01-01T00:00:00.000000Z","kind":"{kind}","prev":"{previous}","step":{step}'
            )
            line = head.encode() + rest
            previous = sha256_bytes(line)
            yield line + b"\n"


def write_long_journal(run_dir: Path, num_steps: int) -> int:
    """Writes the lines into files that rotate as the writer's do; returns the bytes."""
    (run_dir / "journal").mkdir(parents=True)
    total, rotation, filled = 0, 0, io.BytesIO()

    def finish() -> None:
        (run_dir / "journal" / f"attempt-0001-{rotation:03d}.jsonl").write_bytes(filled.getbuffer())

    for line in lines(num_steps):
        if filled.tell() + len(line) > ROTATE_BYTES:
            finish()
            rotation, filled = rotation + 1, io.BytesIO()
        filled.write(line)
        total += len(line)
    finish()
    for file in journal_files(run_dir):
        print(f"{file.path.name}: {file.path.stat().st_size:,} bytes", file=sys.stderr)
    check_chain(run_dir)
    return total


def check_chain(run_dir: Path) -> None:
    """The first lines are the reader's to accept: the benchmark measures a journal, not something like one."""
    previous = None
    for line in itertools.islice(read_lines(run_dir), 2000):
        problem = chain_problem(line.record(), previous)
        if problem is not None:
            raise SystemExit(f"the benchmark's journal is not one: {problem}")
        previous = line.data


def measure_seek(report: Report, folder: Path, num_steps: int, blocks: int) -> None:
    """Finding a step beside reading up to it."""
    num_bytes = write_long_journal(folder, num_steps)
    generator = random.Random(1)
    wanted = [generator.randint(1, num_steps) for _ in range(20)]

    def seek() -> float:
        taken = []
        for step in wanted:
            started = time.perf_counter()
            found = find_step(folder, step)
            taken.append(time.perf_counter() - started)
            if found is None or found["step"] != step:
                raise SystemExit(f"step {step} was not found")
        return max(taken)

    def linear() -> None:
        if sum(record["kind"] == "step" for record in read_journal(folder)) != num_steps:
            raise SystemExit("the linear reader did not see every step")

    def last() -> None:
        last_step(folder)

    seconds = alternate({"seek": seek, "last": last, "linear": linear}, blocks=blocks, warmup=0)
    table = report.table(
        f"Finding a step among {num_steps:,} ({num_bytes / 2**20:,.0f} MiB in {len(journal_files(folder))} files)",
        ["what", "milliseconds", "of the linear reader's time"],
        note="The slowest of 20 random steps counts. The linear reader parses every line, as it must to find the last "
        "record of a step.",
    )
    table.add("find_step", spread(seconds["seek"], scale=1e3), ratio(seconds["seek"], seconds["linear"]))
    table.add("last_step", spread(seconds["last"], scale=1e3), ratio(seconds["last"], seconds["linear"]))
    table.add("reading all of it", spread(seconds["linear"], scale=1e3), 1.0)
    report.keep("seek_seconds", seconds)
    report.keep("journal_bytes", num_bytes)


class Silent(io.TextIOBase):
    """A terminal without a reader."""

    def write(self, text: str) -> int:
        """Takes everything."""
        return len(text)


def measure_append(report: Report, folder: Path, num_lines: int, blocks: int) -> None:
    """One step line: a bare write of its bytes, the journal, and the journal with its readers."""
    config = load_train_config(ROOT / "configs" / "run" / "tiny.yaml", [f"training.steps={10**9}"]).config
    fields = [step_fields(step) for step in range(1, 65)]
    line = next(lines(1))
    numbers = itertools.count()

    def bare() -> float:
        descriptor = os.open(folder / "bare", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        started = time.perf_counter()
        for _ in range(num_lines):
            os.write(descriptor, line)
        taken = time.perf_counter() - started
        os.close(descriptor)
        return taken / num_lines

    def journalled(*, subscribe: str | None, sync_every: int | None = None) -> float:
        with Journal.open(folder / f"run-{next(numbers)}", 1) as journal:
            if subscribe is not None:
                terminal = subscribe == "terminal"
                journal.subscribe(Console(config, bytes_per_token=4.0, stream=Silent(), is_terminal=terminal).on_record)
            started = time.perf_counter()
            for place in range(num_lines):
                journal.append("step", **fields[place % 64])
                if sync_every is not None and place % sync_every == 0:
                    journal.sync()
            return (time.perf_counter() - started) / num_lines

    cases = {
        "bare write of the bytes": bare,
        "journal": functools.partial(journalled, subscribe=None),
        "journal and console, lines": functools.partial(journalled, subscribe="lines"),
        "journal and console, terminal": functools.partial(journalled, subscribe="terminal"),
        "journal, flushed to the device every 100 lines": functools.partial(journalled, subscribe=None, sync_every=100),
    }
    seconds = alternate(cases, blocks=blocks)
    table = report.table(
        f"One step line of {len(line)} bytes",
        ["what", "microseconds", "of a bare write", "share of a step of 100 ms, percent"],
        note="A step line is not flushed to the device by itself: that happens when a file is full, before each commit "
        "of a checkpoint and at the end of an attempt.",
    )
    for name, values in seconds.items():
        table.add(
            name,
            spread(values, scale=1e6),
            ratio(values, seconds["bare write of the bytes"]),
            spread(values, scale=100 / 0.1).median,
        )
    report.keep("append_seconds_per_line", seconds)


def main() -> int:
    """Runs both parts."""
    parser = benchmark_parser(__doc__, blocks=5)
    parser.add_argument("--steps", type=int, default=1_000_000, help="steps of the long journal")
    parser.add_argument("--lines", type=int, default=5_000, help="lines of one measurement of appending")
    arguments = parser.parse_args()
    blocks = 2 if arguments.quick else arguments.blocks
    steps, num_lines = (20_000, 200) if arguments.quick else (arguments.steps, arguments.lines)
    if min(steps, num_lines, blocks) < 1:
        parser.error("--steps, --lines and --blocks are at least 1")
    report = Report("bench_journal", "The journal's cost", arguments)
    with tempfile.TemporaryDirectory(prefix="bench-journal-") as folder:
        measure_append(report, Path(folder), num_lines, blocks)
        measure_seek(report, Path(folder) / "long", steps, blocks)
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
