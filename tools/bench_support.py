"""Parts that the benchmarks share: cases measured in turns, medians and ratios, the machine's record, tables, raw JSON.

A figure of one machine means little; a ratio of two cases measured in turns in one run means much. A benchmark gives
cases to `alternate`, takes `ratio` of what comes back, puts rows into a `Report` and ends with `Report.finish`:

    parser = benchmark_parser(__doc__)
    arguments = parser.parse_args()
    report = Report("bench_example", "What is compared", arguments)
    seconds = alternate({"ours": ours, "plain": plain}, blocks=arguments.blocks)
    table = report.table("Step time", ["case", "seconds", "ratio to plain"])
    table.add("ours", spread(seconds["ours"]), ratio(seconds["ours"], seconds["plain"]))
    report.keep("seconds", seconds)
    return report.finish()
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import json
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from megamask.provenance.record import code_version, library_versions, num_processors

Case = Callable[[], float | None]


def benchmark_parser(description: str | None, *, blocks: int = 9) -> argparse.ArgumentParser:
    """A parser with the arguments that every benchmark has."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--blocks", type=int, default=blocks, help=f"repetitions of every case (default {blocks})")
    parser.add_argument("--quick", action="store_true", help="small sizes, two blocks: does it run at all")
    parser.add_argument("--json", type=Path, help="write every measured number to this file")
    parser.add_argument("--markdown", type=Path, help="write the tables to this file")
    return parser


CLOCKS: Mapping[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}
"""CPU time leaves out what other programs take; on one thread without waiting it is the time that the work needs."""


def add_clock(parser: argparse.ArgumentParser, *, default: str) -> None:
    """Add the choice between the clocks."""
    parser.add_argument(
        "--clock", choices=sorted(CLOCKS), default=default, help=f"time by the wall or of the CPU (default {default})"
    )


def timed(case: Callable[[], object], clock: str) -> Callable[[], float]:
    """The case, returning how long it took by the chosen clock."""
    now = CLOCKS[clock]

    def run() -> float:
        started = now()
        case()
        return now() - started

    return run


def step_arguments(description: str | None, shapes: Mapping[str, Any], *, blocks: int, shape: str) -> Any:
    """A parser for a benchmark of training steps, and a function that reads its arguments.

    Args:
        shapes: sizes by name; `--quick` takes "tiny".
        shape: the default one.
    """
    parser = benchmark_parser(description, blocks=blocks)
    parser.add_argument("--shape", choices=sorted(shapes), default=shape, help=f"sizes (default {shape})")
    add_clock(parser, default="cpu")

    def parse() -> argparse.Namespace:
        arguments = parser.parse_args()
        if arguments.quick:
            arguments.shape, arguments.blocks = "tiny", 2
        return arguments

    return parser, parse


@contextlib.contextmanager
def one_process() -> Iterator[None]:
    """The process group of one process, which an engine needs."""
    from megamask.engine.backend import select_backend
    from megamask.engine.process_group import destroy_process_group, init_process_group

    init_process_group(select_backend())
    yield
    destroy_process_group()


def alternate(cases: Mapping[str, Case], *, blocks: int, warmup: int = 1) -> dict[str, list[float]]:
    """Measures every case once in each block, forwards and backwards in turn, so that a drift meets all alike.

    Args:
        cases: by name; one that returns a number measured itself, for one that returns None the wall time counts.
        blocks: measurements of each case.
        warmup: blocks before them that are thrown away.

    Returns: numbers by case, in the order of the blocks: the i-th numbers of two cases belong together.
    """
    found: dict[str, list[float]] = {name: [] for name in cases}
    for block in range(-warmup, blocks):
        order = list(cases) if block % 2 == 0 else list(reversed(cases))
        for name in order:
            started = time.perf_counter()
            own = cases[name]()
            taken = time.perf_counter() - started if own is None else own
            if block >= 0:
                found[name].append(taken)
    return found


@dataclass(frozen=True)
class Spread:
    """A median and the quartiles around it."""

    median: float
    low: float
    high: float
    count: int

    def __str__(self) -> str:
        if self.low == self.high:
            return _short(self.median)
        return f"{_short(self.median)} ({_short(self.low)} to {_short(self.high)})"


def spread(values: Sequence[float], *, scale: float = 1.0) -> Spread:
    """Median and quartiles of some numbers, each times `scale` (1e3 shows seconds as milliseconds)."""
    scaled = sorted(value * scale for value in values)
    if len(scaled) == 1:
        return Spread(scaled[0], scaled[0], scaled[0], 1)
    low, median, high = statistics.quantiles(scaled, n=4, method="inclusive")
    return Spread(median, low, high, len(scaled))


def ratio(values: Sequence[float], reference: Sequence[float]) -> Spread:
    """Spread of values[i] / reference[i]: pairs of one block, so that what slows a block down cancels."""
    if len(values) != len(reference):
        raise ValueError(f"{len(values)} numbers beside {len(reference)} of the reference")
    return spread([value / other for value, other in zip(values, reference, strict=True)])


def peak_memory_mib(case: Callable[[], None]) -> float | None:
    """Resident memory that a call needs beyond what the process holds; None where the system does not provide it."""
    gc.collect()
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # else freed memory that the process still holds would hide the call's
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # forgets the peak so far
    except OSError:
        return None
    before = _status("VmRSS")
    case()
    return round((_status("VmHWM") - before) / 1024, 1)


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1])


def environment() -> dict[str, Any]:
    """Record of the code and the kind of machine; without the name of a host, without a path."""
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "machine": _machine(),
        "num_processors": num_processors(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": f"{platform.system()} {platform.release()}",
        "threads": os.environ.get("OMP_NUM_THREADS", "not set"),
        "code_version": code_version(),
        "libraries": library_versions(),
    }


def _machine() -> str:
    """The processor's name, and the GPU's where this process uses one."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    found = names[0] if names else platform.machine()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        found += f", {torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    return found


@dataclass
class Table:
    """Rows under a heading; cells are shown with str, numbers with three digits."""

    title: str
    columns: Sequence[str]
    note: str = ""
    rows: list[list[Any]] = field(default_factory=list)

    def add(self, *cells: Any) -> None:
        """One more row."""
        if len(cells) != len(self.columns):
            raise ValueError(f"{len(cells)} cells under {len(self.columns)} columns of {self.title!r}")
        self.rows.append(list(cells))

    def markdown(self) -> str:
        """The table as the documents hold it."""
        body = [[_cell(cell) for cell in row] for row in self.rows]
        widths = [max(len(row[i]) for row in [list(self.columns), *body]) for i in range(len(self.columns))]
        lines = [" | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in body]
        head = " | ".join(name.ljust(width) for name, width in zip(self.columns, widths, strict=True))
        rule = "|".join("-" * (width + 2) for width in widths)
        text = "\n".join([f"## {self.title}", "", f"| {head} |", f"|{rule}|", *(f"| {line} |" for line in lines)])
        return f"{text}\n\n{self.note}".rstrip() + "\n"


class Report:
    """The tables of one benchmark, with everything that is needed to read and repeat them."""

    def __init__(self, name: str, title: str, arguments: argparse.Namespace) -> None:
        self._title = title
        self._json, self._markdown = arguments.json, arguments.markdown
        self._tables: list[Table] = []
        self._content: dict[str, Any] = {
            "benchmark": name,
            "command": f"python tools/{name}.py {shlex.join(_shown_arguments(sys.argv[1:]))}".rstrip(),
            "started": datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z"),
            "load_at_start": _load(),
        }

    def table(self, title: str, columns: Sequence[str], note: str = "") -> Table:
        """A new, empty table."""
        self._tables.append(Table(title, columns, note))
        return self._tables[-1]

    def keep(self, name: str, value: Any) -> None:
        """Puts measured numbers into the raw record."""
        self._content[name] = value

    def save(self) -> str:
        """Write the files that were asked for with what is known so far; return the text."""
        self._content |= {"load_at_end": _load(), "environment": environment()}
        self._content["tables"] = [
            {"title": table.title, "columns": list(table.columns), "rows": table.rows, "note": table.note}
            for table in self._tables
        ]
        text = self.markdown()
        if self._markdown is not None:
            _write(self._markdown, text)
        if self._json is not None:
            _write(self._json, json.dumps(self._content, indent=1, default=_plain) + "\n")
        return text

    def finish(self) -> int:
        """Print the tables, write the files that were asked for and return the exit code, 0."""
        print(self.save())
        return 0

    def markdown(self) -> str:
        """Title, what ran where, and the tables."""
        facts = environment()
        libraries = ", ".join(f"{name} {version}" for name, version in facts["libraries"].items())
        head = [
            f"# {self._title}",
            "",
            f"- command: `{self._content['command']}`",
            f"- date: {facts['date']}",
            f"- machine: {facts['num_processors']} x {facts['machine']}, {facts['memory_gib']} GiB, {facts['system']}",
            f"- threads of a process (OMP_NUM_THREADS): {facts['threads']}",
            f"- load average before and after: {self._content['load_at_start']}, {_load()}",
            f"- versions: megamask {facts['code_version']}, {libraries}",
            "",
        ]
        return "\n".join([*head, *(table.markdown() for table in self._tables)])


def _write(path: Path, text: str) -> None:
    """Replace a file at once: a program that is killed leaves the one before."""
    part = path.with_name(f"{path.name}.part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def _shown_arguments(arguments: Sequence[str]) -> list[str]:
    """The command line with files outside the working folder named by their last part: no place of one machine."""
    return [Path(word).name if word.startswith("/") else word for word in arguments]


def _load() -> float:
    return round(os.getloadavg()[0], 2)


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return _short(value)
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _plain(value: Any) -> Any:
    """Convert a value that JSON does not know."""
    return (
        {"median": value.median, "low": value.low, "high": value.high, "count": value.count}
        if isinstance(value, Spread)
        else str(value)
    )
