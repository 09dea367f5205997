"""Cost of a tracked training: step time with tracking off, with an MLflow server that answers, and one that hangs.

Every case is a complete `megamask train` on the same corpus and model, in turns. A step's time is the distance between
the times of two step lines of the journal. The server that hangs is a real one, stopped with SIGSTOP: it takes
connections and never answers.
"""

from __future__ import annotations

import functools
import itertools
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from bench_support import Report, alternate, benchmark_parser, ratio, spread

from megamask.tracking.journal.lines import read_journal

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
COMMAND = [sys.executable, "-m", "megamask_pipelines.cli.main"]
# The first steps allocate; and while they run, a tracked training imports MLflow.
WARM_STEPS = 10
OFF, UP, STOPPED = "tracking off", "server up", "server stopped"


class Server:
    """An MLflow server on SQLite in a process group of its own."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.uri = f"http://127.0.0.1:{port}"
        command = [
            sys.executable,
            "-m",
            "mlflow",
            "server",
            "--host",
            "127.0.0.1",
            "--port",
            str(port),
            "--workers",
            "1",
        ]
        command += ["--workers", "1", "--backend-store-uri", f"sqlite:///{folder}/server.db"]
        command += ["--artifacts-destination", str(folder / "artifacts")]
        quiet = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
        with (folder / "server.log").open("wb") as log:
            self._process = subprocess.Popen(
                command, stdout=log, stderr=log, env={**ENVIRONMENT, **quiet}, start_new_session=True, cwd=folder
            )
        self._wait()

    def _wait(self) -> None:
        deadline = time.monotonic() + 180
        while True:
            try:
                urllib.request.urlopen(f"{self.uri}/health", timeout=5).close()
                return
            except (urllib.error.URLError, OSError):
                if self._process.poll() is not None or time.monotonic() > deadline:
                    sys.exit("no MLflow server came up")
                time.sleep(0.2)

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """The server hangs inside this block."""
        os.killpg(self._process.pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.killpg(self._process.pid, signal.SIGCONT)

    def close(self) -> None:
        """Ends it."""
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


class Runs:
    """Trainings of the tiny model on a small corpus, each in a folder of its own."""

    def __init__(self, folder: Path, server: Server, num_steps: int) -> None:
        self._folder, self._server, self._num_steps = folder, server, num_steps
        self._number = 0
        self.whole: dict[str, list[float]] = {OFF: [], UP: [], STOPPED: []}  # all steps of a run, seconds
        self.ends: dict[str, list[float]] = {OFF: [], UP: [], STOPPED: []}  # last step to the end of the process
        self.steps: dict[str, list[list[float]]] = {OFF: [], UP: [], STOPPED: []}
        self._run(
            "prepare",
            str(ROOT / "configs" / "corpus" / "python_stdlib.yaml"),
            f"corpus.inputs=['{ROOT}/platform/megamask/*/*.py']",
            f"corpus.output_dir={folder}/corpus",
            "corpus.tokenizer.vocab_size=512",
            "corpus.validation_fraction=0",
        )

    def train(self, case: str) -> float:
        """Trains once; the median of a step's seconds after the first ones."""
        self._number += 1
        name = f"run-{self._number}"
        arguments = [
            str(ROOT / "configs" / "run" / "tiny.yaml"),
            f"data.corpora.main={self._folder}/corpus",
            f"run.output_dir={self._folder}",
            f"run.name={name}",
            f"training.steps={self._num_steps}",
            f"checkpoint.every_steps={self._num_steps}",
            "tracking.mlflow.drain_timeout_s=5",
            f"tracking.mlflow.uri={self._server.uri}",
            f"tracking.mlflow.enabled={str(case != OFF).lower()}",
        ]
        if case == STOPPED:
            with self._server.stopped():
                self._run("train", *arguments)
        else:
            self._run("train", *arguments)
        times = [
            datetime.fromisoformat(line["time"]).timestamp()
            for line in read_journal(self._folder / name)
            if line["kind"] == "step"
        ]
        steps = [later - earlier for earlier, later in itertools.pairwise(times)]
        self.steps[case].append([round(seconds, 6) for seconds in steps])
        self.whole[case].append(times[-1] - times[0])
        self.ends[case].append(time.time() - times[-1])
        return statistics.median(steps[WARM_STEPS:])

    def _run(self, *arguments: str) -> None:
        done = subprocess.run([*COMMAND, *arguments], env=ENVIRONMENT, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            sys.exit(f"megamask {' '.join(arguments[:2])} ended with {done.returncode}:\n{done.stderr}")


def main() -> int:
    """Measures and reports."""
    parser = benchmark_parser(__doc__, blocks=5)
    parser.add_argument("--steps", type=int, default=300, help="steps of each training (default 300)")
    arguments = parser.parse_args()
    blocks, num_steps = (2, 40) if arguments.quick else (arguments.blocks, arguments.steps)
    report = Report("bench_tracking", "Tracking", arguments)
    with tempfile.TemporaryDirectory() as folder:
        server = Server(Path(folder))
        try:
            runs = Runs(Path(folder), server, num_steps)
            cases = {case: functools.partial(runs.train, case) for case in (OFF, UP, STOPPED)}
            seconds = alternate(cases, blocks=blocks, warmup=0 if arguments.quick else 1)
        finally:
            server.close()
    table = report.table(
        "A step of training",
        ["case", "median step, milliseconds", "of tracking off", "all steps, seconds", "of tracking off"],
        note=f"Steps {WARM_STEPS + 2} to {num_steps} of each training give its median step; all steps include the "
        "seconds in which a tracked training imports MLflow beside the first ones.",
    )
    ends = report.table(
        "The end of training",
        ["case", "seconds from the last step to the end of the process"],
        note="The last commit, what MLflow has not got yet (at most 5 seconds here), the interpreter's end.",
    )
    for case, values in seconds.items():
        whole, end = runs.whole[case][-blocks:], runs.ends[case][-blocks:]
        table.add(
            case,
            spread(values, scale=1e3),
            ratio(values, seconds[OFF]),
            spread(whole),
            ratio(whole, runs.whole[OFF][-blocks:]),
        )
        ends.add(case, spread(end))
    report.keep("median_step_s", seconds)
    report.keep("all_steps_s", runs.whole)
    report.keep("end_s", runs.ends)
    report.keep("step_s", runs.steps)
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
