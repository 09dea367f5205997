"""From the command to the first step, by phase: fresh and resumed, with one process and with two.

Times are taken from outside: from just before the process is started to the time in the first step's line of the
journal. `python -c "import torch"` and `import megatron.core` in the same blocks show what of it the libraries take.
The phases come from a process that goes through the stages of `megamask train` one by one and looks at the clock.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from bench_support import Report, alternate, benchmark_parser, ratio, spread

from megamask.tracking.journal.lines import read_journal
from megamask_pipelines.cli.main import VERBS

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
COMMAND = [sys.executable, "-m", "megamask_pipelines.cli.main"]

# Prints the seconds of each stage; argv: when it was started, the config, its overrides.
STAGES = """
import contextlib, json, sys, time
taken, last = {}, float(sys.argv[1])
def mark(name, now=None):
    global last
    now = now or time.time()
    taken[name] = now - last
    last = now
mark("python")
from megamask.config.load import load_train_config
from megamask.config.validate import validate_train
loaded = load_train_config(sys.argv[2], sys.argv[3:])
validate_train(loaded.config, loaded.origins)
mark("config")
from megamask.resilience.signals import StopRequest
from megamask.training import attempt_scope, build, loop, run_data, startup
mark("import torch and our modules")
from megamask.engine import backend, engine
mark("import megatron-core and the engine")
class Timed:
    def __init__(self, module, name):
        self.plain, self.seconds = getattr(module, name), 0.0
        setattr(module, name, self)
    def __call__(self, *arguments, **options):
        started = time.time()
        answer = self.plain(*arguments, **options)
        self.seconds += time.time() - started
        return answer
class FirstStep:
    at = None
    def after_step(self, progress, record):
        self.at = self.at or time.time()
    def on_stop(self, progress, reason):
        pass
with StopRequest() as signals, contextlib.ExitStack() as stack:
    data = run_data.RunData(loaded.config, stack)
    mark("open the corpus")
    scope = stack.enter_context(attempt_scope.attempt_scope(loaded.config, data, 0))
    scope.claim(loaded.config, data)
    mark("claim the run, open the journal")
    group, load = Timed(backend, "init_process_group"), Timed(build, "load")
    run = build.build_run(loaded.config, data, scope, signals, startup.StartupClock())
    mark("build the engine")
    taken["build the engine"] -= group.seconds + load.seconds
    taken |= {"form the process group": group.seconds, "find and restore the checkpoint": load.seconds}
    first = FirstStep()
    run.hooks = [first, *run.hooks]
    scope.reason = loop.train(run)
    mark("first step", first.at)
    mark("commit and leave the loop")
print(json.dumps(taken))
"""


def run(command: list[str]) -> str:
    """Runs a command to its end and returns its stdout."""
    done = subprocess.run(command, env=ENVIRONMENT, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        sys.exit(f"{' '.join(command[:6])} ... ended with {done.returncode}:\n{done.stderr}")
    return done.stdout


def timed(command: list[str]) -> Callable[[], None]:
    """A case: the complete command."""

    def case() -> None:
        run(command)

    return case


def options_name(options: Mapping[str, Any]) -> str:
    """A kind of run in words."""
    processes = options.get("processes", 1)
    start = "resumed" if options["is_resumed"] else "fresh"
    tracked = ", MLflow on" if options.get("mlflow") else ""
    return f"{start}, {processes} process{'es' if processes > 1 else ''}{tracked}"


class Runs:
    """Runs in a folder of their own on a small corpus, each new or a copy of one with a checkpoint."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._number = 0
        self.reported: dict[
            str, dict[str, list[float]]
        ] = {}  # seconds by kind of run and phase, as the journal has them
        options = [
            f"corpus.inputs=['{ROOT}/platform/megamask/config/*.py']",
            f"corpus.output_dir={folder}/corpus",
            "corpus.tokenizer.vocab_size=512",
            "corpus.validation_fraction=0",
        ]
        run([*COMMAND, "prepare", str(ROOT / "configs" / "corpus" / "python_stdlib.yaml"), *options])
        run([*COMMAND, "train", *self.arguments("base", until=1)])

    def arguments(self, name: str, *, until: int, processes: int = 1, mlflow: bool = False) -> list[str]:
        """Measure what follows `megamask train`."""
        return [
            str(ROOT / "configs" / "run" / "tiny.yaml"),
            f"data.corpora.main={self._folder}/corpus",
            f"run.output_dir={self._folder}",
            f"run.name={name}",
            f"training.stop_after_step={until}",
            f"layout.data_parallel_size={processes}",
            f"tracking.mlflow.enabled={str(mlflow).lower()}",
        ]

    def next(self, *, is_resumed: bool, **options: Any) -> tuple[Path, list[str]]:
        """The folder and the arguments of one more run, which ends after one step."""
        self._number += 1
        name = f"run-{self._number}"
        if is_resumed:
            shutil.copytree(self._folder / "base", self._folder / name)
        return self._folder / name, self.arguments(name, until=2 if is_resumed else 1, **options)

    def first_step(self, whole: list[float], **options: Any) -> float:
        """Seconds from the command to the first step; `whole` gets those to its end."""
        run_dir, arguments = self.next(**options)
        started, mark = time.time(), time.perf_counter()
        run([*COMMAND, "train", *arguments])
        whole.append(time.perf_counter() - mark)
        lines = {line["kind"]: line for line in read_journal(run_dir)}  # the last of each kind: this attempt's
        for phase, seconds in (lines["attempt_started"].get("startup_s") or {}).items():
            self.reported.setdefault(options_name(options), {}).setdefault(phase, []).append(seconds)
        return datetime.fromisoformat(lines["step"]["time"]).timestamp() - started

    def stages(self, seconds: dict[str, list[float]], *, is_resumed: bool) -> None:
        """Goes through the stages once and adds to the seconds of each."""
        _, arguments = self.next(is_resumed=is_resumed)
        taken = run([sys.executable, "-c", STAGES, str(time.time()), *arguments]).splitlines()[-1]
        for name, value in json.loads(taken).items():
            seconds.setdefault(name, []).append(value)


def measure_first_step(report: Report, runs: Runs, blocks: int) -> None:
    """All of it, beside the imports of the libraries."""
    whole: dict[str, list[float]] = {}
    cases: dict[str, Any] = {
        "python -c pass": timed([sys.executable, "-c", "pass"]),
        'python -c "import torch"': timed([sys.executable, "-c", "import torch"]),
        'python -c "import megatron.core"': timed([sys.executable, "-c", "import megatron.core"]),
    }
    libraries = list(cases)
    kinds: list[dict[str, Any]] = [
        {"is_resumed": False},
        {"is_resumed": True},
        {"is_resumed": False, "mlflow": True},
        {"is_resumed": False, "processes": 2},
        {"is_resumed": True, "processes": 2},
    ]
    for options in kinds:
        name = options_name(options)
        cases[name] = functools.partial(runs.first_step, whole.setdefault(name, []), **options)
    seconds = alternate(cases, blocks=blocks)
    table = report.table(
        "From the command to the first step",
        ["what", "seconds to the first step", "of import torch", "of import megatron.core", "seconds to the end"],
        note="The end: one step, its checkpoint committed, the process gone. Without megamask, megatron-core's import "
        "loads torch's compiler too; megamask leaves that out on a CPU.",
    )
    for name, values in seconds.items():
        table.add(
            name,
            spread(values),
            ratio(values, seconds[libraries[1]]),
            ratio(values, seconds[libraries[2]]),
            spread(whole[name][-blocks:]) if name in whole else "",
        )
    report.keep("first_step_seconds", seconds)
    report.keep("whole_command_seconds", whole)
    if runs.reported:
        table = report.table("As each run records it (attempt_started, startup_s)", ["run", "phase", "milliseconds"])
        for name, phases in runs.reported.items():
            for phase, values in phases.items():
                reported = [value for value in values[-blocks:] if value is not None]
                if reported:  # nothing is restored by a fresh run
                    table.add(name, phase, spread(reported, scale=1e3))
        report.keep("reported_seconds", runs.reported)


def measure_stages(report: Report, runs: Runs, blocks: int) -> None:
    """Profile of one process."""
    fresh: dict[str, list[float]] = {}
    resumed: dict[str, list[float]] = {}
    alternate(
        {
            "fresh": functools.partial(runs.stages, fresh, is_resumed=False),
            "resumed": functools.partial(runs.stages, resumed, is_resumed=True),
        },
        blocks=blocks,
        warmup=0,
    )
    table = report.table("By phase, one process", ["phase", "fresh, milliseconds", "resumed, milliseconds"])
    for name, values in fresh.items():
        table.add(name, spread(values, scale=1e3), spread(resumed[name], scale=1e3))
    sums = [[sum(row) for row in zip(*seconds.values(), strict=True)] for seconds in (fresh, resumed)]
    table.add("sum", *(spread(values, scale=1e3) for values in sums))
    report.keep("stage_seconds", {"fresh": fresh, "resumed": resumed})


def measure_help(report: Report, blocks: int) -> None:
    """`--help` of the command and of each verb."""
    python = "python -c pass"
    cases: dict[str, Any] = {python: timed([sys.executable, "-c", "pass"])}
    for words in ([], *([verb] for verb in VERBS)):
        command = [*COMMAND, *words, "--help"]
        cases[" ".join(["megamask", *words, "--help"])] = timed(command)
    seconds = alternate(cases, blocks=blocks)
    table = report.table("Help", ["command", "milliseconds", "of python -c pass"], note="Meant to stay below 300.")
    for name, values in seconds.items():
        table.add(name, spread(values, scale=1e3), ratio(values, seconds[python]))
    report.keep("help_seconds", seconds)


def main() -> int:
    """Runs the three parts."""
    arguments = benchmark_parser(__doc__, blocks=5).parse_args()
    blocks = 2 if arguments.quick else arguments.blocks
    if blocks < 2:
        sys.exit("--blocks is at least 2")
    report = Report("bench_startup", "Start-up", arguments)
    with tempfile.TemporaryDirectory(prefix="bench-startup-") as folder:
        runs = Runs(Path(folder))
        measure_first_step(report, runs, blocks)
        measure_stages(report, runs, blocks)
    measure_help(report, blocks)
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
