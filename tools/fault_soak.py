"""Interrupt a tiny training run hundreds of times and compare every continuation with the uninterrupted run.

Runs of one and of two ranks are trained one after the other. Each attempt meets one fault, drawn from a seed: SIGKILL
of everything, of a rank or at a named point, SIGTERM, SIGSTOP, a full disk, a clock that jumps, a cut link between two
network namespaces. After each fault the journal's lines (but times) must be those of the uninterrupted run, the newest
checkpoint must verify, load, hold its very bytes and be no older than before, and `megamask verify run` must find
nothing. A run that is complete must lack no line.

Ends with 1 if anything differed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import platform
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from bench_support import environment
from soak_faults import CODES, Fault, draw, read_census
from soak_process import import_everything
from soak_run import Attempt, Links, compare, compared_lines, newest_step, records, state_digest

from megamask.audit.run import verify_run
from megamask.checkpoint.reader import candidates
from megamask.provenance.record import code_version, library_versions, num_processors

ROOT = Path(__file__).parents[1]
_DISK_MIB = 48
_TEXT = "the quick brown fox jumps over the lazy dog and counts {} sheep in field {} before it rests. "


@dataclass(kw_only=True)
class Layout:
    """Results of an undisturbed run of so many ranks: lines, states by step, how often it reaches each point."""

    num_ranks: int
    lines: dict[tuple[str, int], Any] = field(default_factory=dict)
    states: dict[int, str] = field(default_factory=dict)
    census: dict[int, Counter[str]] = field(default_factory=dict)


@dataclass(kw_only=True)
class Meeting:
    """A fault that met a run, and what came of it."""

    number: int
    run: str
    num_ranks: int
    fault: Fault
    codes: tuple[int, ...]
    reached_step: int
    lost_steps: int | None = None
    recovery_s: float | None = None
    problems: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Return the fields."""
        return {**vars(self), "fault": self.fault.to_json()}


class Soak:
    """All runs of a soak.

    Args:
        folder: for corpus, references and logs. disk: for the runs under faults; a small file system of its own.
    """

    def __init__(self, folder: Path, disk: Path, arguments: argparse.Namespace, absent: set[str], links: Links) -> None:
        self.folder, self.disk, self.absent, self.links = folder, disk, absent, links
        self.generator = random.Random(arguments.seed)
        self.num_steps: int = arguments.steps
        self.meetings: list[Meeting] = []
        self.num_missed = self.num_runs = 0
        self.corpus = self._corpus()
        # every third run has two ranks
        self.layouts = [self._layout(ranks) for ranks in ((1, 2) if arguments.ranks is None else [arguments.ranks])]

    def _corpus(self) -> Path:
        texts = self.folder / "texts"
        texts.mkdir(parents=True)
        for number in range(40):
            words = "".join(_TEXT.format(number * k, k) for k in range(12))
            (texts / f"{number:03d}.txt").write_text(words, encoding="utf-8")
        arguments = [str(ROOT / "configs/corpus/python_stdlib.yaml"), f"corpus.inputs=['{texts}/*.txt']"]
        arguments += [f"corpus.output_dir={self.folder}/corpus", "corpus.tokenizer.vocab_size=300"]
        arguments += ["corpus.sequence_length=64", "corpus.validation_fraction=0.1", "corpus.rows_per_block=16"]
        main = [sys.executable, "-m", "megamask_pipelines.cli.main", "prepare"]
        subprocess.run([*main, *arguments], check=True, capture_output=True)
        return self.folder / "corpus"

    def _layout(self, num_ranks: int) -> Layout:
        """Train the uninterrupted run, with a checkpoint of every step, and a second one to count the points."""
        layout, name = Layout(num_ranks=num_ranks), f"whole-{num_ranks}"
        for suffix, settings in (("", ["checkpoint.every_steps=1", "checkpoint.keep_last=1000"]), ("-census", [])):
            run_dir = self.folder / (name + suffix)
            census = run_dir.with_suffix(".points") if suffix else None
            if census is not None:
                census.mkdir()
            attempt = self._attempt(run_dir, num_ranks, settings, census=census)
            if attempt.run() != (0,):
                raise RuntimeError(f"the uninterrupted run failed:\n{attempt.log.read_text()[-4000:]}")
            if census is None:
                layout.lines = compared_lines(run_dir)
                layout.states = {int(path.name[5:13]): state_digest(path) for path in candidates(run_dir)}
            else:
                layout.census = read_census(census)
                problems = compare(run_dir, layout.lines, layout.states, is_complete=True)
                if problems:
                    raise RuntimeError(f"two uninterrupted runs differ: {problems}")
            shutil.rmtree(run_dir)
        return layout

    def _attempt(self, run_dir: Path, num_ranks: int, settings: Sequence[str] = (), **options: Any) -> Attempt:
        arguments = ["train", str(ROOT / "configs/run/tiny.yaml"), f"data.corpora.main={self.corpus}"]
        arguments += [
            f"run.output_dir={run_dir.parent}",
            f"run.name={run_dir.name}",
            f"training.steps={self.num_steps}",
        ]
        arguments += ["training.sequence_length=64", "tracking.mlflow.enabled=false", "checkpoint.every_steps=7"]
        arguments += ["model.num_layers=1", "model.hidden_size=32", "model.ffn_hidden_size=64"]
        arguments += ["evaluation.every_steps=20", "evaluation.rows=2", "evaluation.draws=2", "evaluation.replicates=2"]
        arguments += ["preview.every_steps=30", "preview.prompts=['the quick']", "preview.num_tokens=4"]
        arguments += [f"layout.data_parallel_size={num_ranks}", "launch.save_budget_s=5"]
        arguments += [*settings]
        log = self.folder / f"{run_dir.name}.log"
        return Attempt(arguments=arguments, run_dir=run_dir, log=log, num_ranks=num_ranks, **options)

    def go(self, num_faults: int, tell: Any) -> None:
        """Meet so many faults."""
        while len(self.meetings) < num_faults:
            layout = self.layouts[-1 if self.num_runs % 3 == 2 else 0]
            self.num_runs += 1
            self._train_under_faults(layout, f"run-{self.num_runs:04d}", num_faults, tell)

    def _train_under_faults(self, layout: Layout, name: str, num_faults: int, tell: Any) -> None:
        run_dir, before = self.disk / name, None
        while len(self.meetings) < num_faults:
            met = {meeting.fault.kind for meeting in self.meetings}
            fault = draw(self.generator, layout.num_ranks, layout.census, self.absent, met)
            settings = ["launch.collective_timeout_s=4"] if fault.kind == "link cut" else []
            # on a busy machine a rank needs seconds for its answer to a signal; one that is stopped never answers
            settings.append(f"launch.stop_grace_s={2 if fault.kind.startswith('SIGSTOP of') else 60}")
            attempt = self._attempt(run_dir, layout.num_ranks, settings, fault=fault, disk=self.disk, links=self.links)
            saved, codes = newest_step(run_dir), attempt.run()
            self._note_recovery(before, run_dir, attempt.started_at)
            is_complete = set(codes) == {0}
            problems = compare(run_dir, layout.lines, layout.states, is_complete=is_complete)
            if newest_step(run_dir) < saved:
                problems.append(f"unloadable: the checkpoint of step {saved} is gone, and no later one is there")
            if (run_dir / "run.json").exists():
                problems += [str(finding) for finding in verify_run(run_dir)["findings"]]
            meeting = Meeting(
                number=len(self.meetings) + 1,
                run=name,
                num_ranks=layout.num_ranks,
                fault=fault,
                codes=codes,
                reached_step=_reached(run_dir),
                problems=problems + self._wrong_end(fault, codes, attempt),
            )
            if is_complete and not meeting.problems:
                self.num_missed += 1
                break
            self.meetings.append(meeting)
            tell(meeting)
            if meeting.problems:
                shutil.copytree(run_dir, self.folder / f"kept-{meeting.number}", dirs_exist_ok=True)
                break
            before = meeting
        shutil.rmtree(run_dir, ignore_errors=True)

    def _wrong_end(self, fault: Fault, codes: tuple[int, ...], attempt: Attempt) -> list[str]:
        """Return what is wrong with how an attempt ended."""
        log = attempt.log.read_text(errors="replace") if attempt.log.exists() else ""
        attempt.log.unlink(missing_ok=True)
        allowed = CODES[fault.kind] | {0}  # complete before the fault came
        if fault.kind.startswith("SIGTERM"):
            allowed |= {-15}  # before its handlers are there
        if fault.kind.endswith("then SIGTERM") and "asked for an end before training began" in log:
            allowed |= {75}  # a stopped rank holds up nothing that could be lost
        problems = [f"wrong end: {code} after {fault.kind}" for code in codes if code not in allowed]
        if "this is a bug in megamask" in log or "Traceback" in log:
            problems.append("wrong end: it calls itself a bug")
        return [f"{problem}\n{log[-3000:]}" for problem in problems]

    def _note_recovery(self, before: Meeting | None, run_dir: Path, started_at: float) -> None:
        """Fill in what the fault before cost, from the lines of the attempt after it."""
        if before is None:
            return
        lines = records(run_dir)
        newest = max((line["attempt_of_file"] for line in lines), default=0)
        own = [line for line in lines if line["attempt_of_file"] == newest]
        begun = next((line for line in own if line["kind"] == "attempt_started"), None)
        if begun is None:
            return  # the next fault came before it had restored
        resumed = (begun["resumed_from"] or {"step": 0})["step"]
        before.lost_steps = max(0, before.reached_step - resumed)
        again = next((line for line in own if line["kind"] == "step" and line["step"] > before.reached_step), None)
        if again is not None:
            moment = datetime.fromisoformat(again["time"]).timestamp()
            if 0 < moment - started_at < 3600:  # another clock may have jumped
                before.recovery_s = round(moment - started_at, 3)


def _reached(run_dir: Path) -> int:
    return max((record["step"] for record in records(run_dir) if record["kind"] == "step"), default=0)


def table(soak: Soak, header: Sequence[str]) -> str:
    """Return the Markdown page."""
    lines = [*header, "", "| fault | count | lost steps, median (most) | recovery s, median (most) | exit codes |"]
    lines.append("|---|---|---|---|---|")
    kinds = [*CODES, "all"]
    for kind in kinds:
        found = [meeting for meeting in soak.meetings if kind in ("all", meeting.fault.kind)]
        if not found:
            continue
        lost = [meeting.lost_steps for meeting in found if meeting.lost_steps is not None]
        recovery = [meeting.recovery_s for meeting in found if meeting.recovery_s is not None]
        codes = Counter(code for meeting in found for code in meeting.codes)
        shown = ", ".join(f"{code} ({count})" for code, count in sorted(codes.items()))
        lines.append(f"| {kind} | {len(found)} | {_spread(lost)} | {_spread(recovery)} | {shown} |")
    points = Counter(meeting.fault.point for meeting in soak.meetings if meeting.fault.point)
    lines += ["", f"{len(points)} named points were hit: " + ", ".join(f"{p} ({n})" for p, n in sorted(points.items()))]
    return "\n".join(lines) + "\n"


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.3g} ({max(values):.3g})" if values else "not measured"


def _header(soak: Soak, arguments: argparse.Namespace, seconds: float) -> list[str]:
    problems = [problem for meeting in soak.meetings for problem in meeting.problems]
    count = Counter(problem.partition(":")[0] for problem in problems)
    others = sum(count.values()) - count["wrong bytes"] - count["unloadable"] - count["wrong end"]
    torch = library_versions()["torch"]
    shown = f"tools/fault_soak.py --faults {arguments.faults} --seed {arguments.seed} --steps {arguments.steps}"
    absent = ", ".join(sorted(soak.absent)) or "none"
    return [
        "# Faults",
        "",
        f"- command: `python {shown}`",
        f"- date: {datetime.now().date()}",
        f"- machine: {num_processors()} x {environment()['machine']}, shared with other work",
        f"- versions: megamask {code_version()}, python {platform.python_version()}, torch {torch}",
        "",
        f"{len(soak.meetings)} faults met {soak.num_runs} runs of {soak.num_steps} steps in {seconds:.0f} s; "
        f"{soak.num_missed} runs ended before a fault came. Wrong bytes: {count['wrong bytes']}. Newest checkpoints "
        "that did not load: "
        f"{count['unloadable']}. Wrong ends: {count['wrong end']}. Other findings: {others}. Kinds of faults that this "
        f"machine cannot do: {absent}.",
        "",
        "Lost steps lie between the last line before the fault and the checkpoint that the next attempt resumed from; "
        "there is one every 7 steps. Recovery is from the start of the next attempt to its first step beyond them, "
        "where no other fault came first. Processes are forked with their imports done: an interpreter's start is not "
        "in it.",
    ]


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[tuple[Path, bool]]:
    """A file system of 48 MiB in memory, and whether it is one: making it takes a privilege."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={_DISK_MIB}m", "tmpfs", str(folder)]
    is_mounted = subprocess.run(mount, capture_output=True, check=False).returncode == 0
    try:
        yield folder, is_mounted
    finally:
        if is_mounted:
            subprocess.run(["umount", "-l", str(folder)], check=False)


def main() -> int:
    """Run the soak, print and write its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=1000, help="faults to meet (default 1000)")
    parser.add_argument("--seed", type=int, default=1, help="of all choices (default 1)")
    parser.add_argument("--steps", type=int, default=80, help="steps of each run (default 80)")
    parser.add_argument("--ranks", type=int, choices=(1, 2), help="only runs of so many ranks")
    parser.add_argument("--json", type=Path, help="write every fault to this file")
    parser.add_argument("--markdown", type=Path, help="write the table to this file")
    parser.add_argument("--keep", type=Path, help="folder for the runs that differed; default: a temporary one")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # leaves no disk and no namespace behind
    import_everything()
    started, links = time.monotonic(), Links()
    with contextlib.ExitStack() as stack:
        folder = arguments.keep
        if folder is None:
            # not a TemporaryDirectory: each forked process would remove it when it exits
            folder = Path(tempfile.mkdtemp(prefix="megamask-soak-"))
            stack.callback(shutil.rmtree, folder, ignore_errors=True)
        disk, is_small = stack.enter_context(small_disk(folder / "disk"))
        absent = set() if stack.enter_context(links.made()) else {"link cut"}
        absent |= set() if is_small else {"full disk"}
        soak = Soak(folder, disk, arguments, absent, links)

        def tell(meeting: Meeting) -> None:
            codes, fault = "/".join(map(str, meeting.codes)), meeting.fault
            print(f"{meeting.number} {meeting.run} {fault.kind} {fault.point or ''} -> {codes}", file=sys.stderr)
            for problem in meeting.problems:
                print(f"  {problem}", file=sys.stderr, flush=True)
            _write(soak, arguments, time.monotonic() - started)

        soak.go(arguments.faults, tell)
        print(_write(soak, arguments, time.monotonic() - started))
    return int(any(meeting.problems for meeting in soak.meetings))


def _write(soak: Soak, arguments: argparse.Namespace, seconds: float) -> str:
    text = table(soak, _header(soak, arguments, seconds))
    if arguments.markdown is not None:
        arguments.markdown.write_text(text, encoding="utf-8")
    if arguments.json is not None:
        found = {"seed": arguments.seed, "faults": [meeting.to_json() for meeting in soak.meetings]}
        arguments.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return text


if __name__ == "__main__":
    sys.exit(main())
