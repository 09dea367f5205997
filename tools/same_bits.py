#!/usr/bin/env python3
"""Train the tiny run at two commits on this machine and compare their results bit for bit.

    tools/same_bits.py OLD NEW            two commits, or two folders with a checkout each
    tools/same_bits.py OLD NEW --only pair tensor_2

Five cases of configs/run/tiny.yaml are trained by both: a single view, a complementary pair, and the pair on two
tensor-parallel, pipeline and data-parallel ranks. Every field of every step line is compared except times, hashes of
the record and rates, then every tensor of the last checkpoint, byte by byte. The exit code is 0 only if all are equal.
Float results differ between CPU types, so no values are stored: both commits run here and now.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
# What may differ between two runs of one config (docs/formats.md, "Journal").
VOLATILE = frozenset({"time", "prev", "seq", "seconds", "tokens_per_second", "mfu", "peak_memory_bytes"})
SINGLE = ("objective.complementary=false",)
PAIR = ("objective.complementary=true",)
# The settings of each case. Alternatives are spellings of one meaning: the first that a commit accepts is used.
CASES: Mapping[str, Sequence[Sequence[str]]] = {
    "single_view": [SINGLE, ("objective.views=single",)],
    "pair": [PAIR, ("objective.views=pair",)],
    "tensor_2": [(*PAIR, "layout.tensor_parallel_size=2"), ("objective.views=pair", "layout.tensor_parallel_size=2")],
    "pipeline_2": [
        (*PAIR, "layout.pipeline_parallel_size=2"),
        ("objective.views=pair", "layout.pipeline_parallel_size=2"),
    ],
    "data_2": [(*PAIR, "layout.data_parallel_size=2"), ("objective.views=pair", "layout.data_parallel_size=2")],
}
REFUSED = 2  # the exit code of a setting that a commit does not know

Tensors = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> int:
    """Return 0 if both commits agree in every case, 1 if they differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", help="a commit, or a folder with a checkout")
    parser.add_argument("new", help="a commit, or a folder with a checkout")
    parser.add_argument("--only", nargs="+", choices=sorted(CASES), help="train these cases only")
    parser.add_argument("--steps", type=int, default=20, help="steps of each run (default 20)")
    options = parser.parse_args(arguments)
    differences = 0
    with tempfile.TemporaryDirectory(prefix="same-bits-") as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        sides = {
            side: stack.enter_context(_checkout(given, folder / f"checkout-{side}"))
            for side, given in (("old", options.old), ("new", options.new))
        }
        for side, root in sides.items():
            print(f"{side}: {_describe(root)}", flush=True)
            _prepare(root, folder / side)
        for case in options.only or CASES:
            runs = {side: _train(root, folder / side, case, options.steps) for side, root in sides.items()}
            found = compare_steps(_step_lines(runs["old"]), _step_lines(runs["new"]))
            states = {side: read_state(_last_checkpoint(run)) for side, run in runs.items()}
            found += compare_states(states["old"], states["new"])
            print(_report(case, found, _step_lines(runs["old"]), states["old"]), flush=True)
            differences += len(found)
    print("equal bits in every case" if not differences else f"{differences} differences")
    return 0 if not differences else 1


def compare_steps(old: Mapping[int, Mapping[str, Any]], new: Mapping[int, Mapping[str, Any]]) -> list[str]:
    """Return the differences of the step lines, one sentence each; a field that only `new` has is not a difference."""
    found = []
    if sorted(old) != sorted(new):
        found.append(f"steps {sorted(old)} became {sorted(new)}")
    for step in sorted(set(old) & set(new)):
        for field in sorted(set(old[step]) - VOLATILE):
            before, after = old[step][field], new[step].get(field, "absent")
            if before != after:
                found.append(f"step {step}: {field} was {before}, is {after}")
    return found


def compare_states(old: Tensors, new: Tensors) -> list[str]:
    """Return the differences of two states, one sentence for each tensor that is not equal byte by byte."""
    found = [f"{name} is only in the {side} state" for side, names in _only(old, new).items() for name in names]
    for name in sorted(set(old) & set(new)):
        before, after = old[name], new[name]
        if before.shape != after.shape or before.dtype != after.dtype:
            found.append(f"{name} was {before.dtype} {before.shape}, is {after.dtype} {after.shape}")
        elif before.tobytes() != after.tobytes():
            found.append(f"{name} differs in {int((before != after).sum())} of {before.size} elements")
    return found


def _only(old: Tensors, new: Tensors) -> dict[str, list[str]]:
    return {"old": sorted(set(old) - set(new)), "new": sorted(set(new) - set(old))}


def read_state(folder: Path) -> Tensors:
    """Return every tensor of a checkpoint folder as a NumPy array, from any state format that a release has had."""
    return _read_torch_dist(folder) if (folder / ".metadata").exists() else _read_safetensors(folder)


def _read_safetensors(folder: Path) -> Tensors:
    import numpy as np
    from safetensors import safe_open

    tensors: Tensors = {}
    filled: dict[str, int] = {}
    for path in sorted(folder.glob("state-*.safetensors")):
        with safe_open(path, framework="numpy") as file:
            for key in file.keys():  # noqa: SIM118  a file of safetensors is not iterable
                name, piece, place = key.rpartition("#")[0], file.get_tensor(key), json.loads(file.metadata()[key])
                target = tensors.setdefault(name, np.zeros(place["shape"], np.float32))
                index = tuple(slice(at, at + n) for at, n in zip(place["offsets"], piece.shape, strict=True))
                target[index] = piece
                filled[name] = filled.get(name, 0) + piece.size
    for name, tensor in tensors.items():
        if filled[name] != tensor.size:
            sys.exit(f"{folder}: {name} has {filled[name]} of {tensor.size} elements")
    return tensors


def _read_torch_dist(folder: Path) -> Tensors:
    """Read the format of version 0.1.0 with torch's own reader; the file was written a moment ago by this program."""
    import torch
    import torch.distributed.checkpoint as dcp

    stored = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    state = {name: torch.empty(entry.size) for name, entry in stored.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that no process group exists is meant
        dcp.load(state, checkpoint_id=folder, no_dist=True)
    return {name: tensor.numpy() for name, tensor in state.items()}


@contextlib.contextmanager
def _checkout(given: str, folder: Path) -> Iterator[Path]:
    """A folder with the source of a commit; a folder that is given is used as it is."""
    if Path(given, "platform", "megamask").is_dir():
        yield Path(given).resolve()
        return
    _run(["git", "worktree", "add", "--quiet", "--detach", str(folder), given], cwd=ROOT)
    try:
        yield folder
    finally:
        _run(["git", "worktree", "remove", "--force", str(folder)], cwd=ROOT)


def _describe(root: Path) -> str:
    if not (root / ".git").exists():
        return "a folder without a commit"
    return _run(["git", "describe", "--always", "--dirty", "--abbrev=12"], cwd=root).strip()


def _prepare(root: Path, folder: Path) -> None:
    """Make the corpus with the commit's own code; its inputs are this checkout's files for both."""
    _megamask(
        root,
        *("prepare", "configs/corpus/python_stdlib.yaml", f"corpus.output_dir={folder / 'corpus'}"),
        f"corpus.inputs=[{ROOT}/tools/*.py, {ROOT}/platform/megamask/*/*.py]",
    )


def _train(root: Path, folder: Path, case: str, steps: int) -> Path:
    common = [
        *("train", "configs/run/tiny.yaml", f"data.corpora.main={folder / 'corpus'}", f"run.output_dir={folder}"),
        *(f"run.name={case}", f"training.steps={steps}", "tracking.mlflow.enabled=false"),
    ]
    refused = ""
    for settings in CASES[case]:
        done = _start(root, *common, *settings)
        if done.returncode == 0:
            return folder / case
        if done.returncode != REFUSED:
            sys.exit(f"{case} at {root} ended with {done.returncode}:\n{done.stderr}")
        refused += done.stderr
    sys.exit(f"{case} at {root}: no spelling of its settings is accepted:\n{refused}")


def _megamask(root: Path, *arguments: str) -> None:
    done = _start(root, *arguments)
    if done.returncode != 0:
        sys.exit(f"megamask {arguments[0]} at {root} ended with {done.returncode}:\n{done.stderr}")


def _start(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the code of a checkout, no matter which megamask is installed; with one thread, sums have one order."""
    variables = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    variables |= {"PYTHONPATH": f"{root}/platform:{root}/pipelines", "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"}
    command = [sys.executable, "-m", "megamask_pipelines.cli.main", *arguments]
    return subprocess.run(command, cwd=root, env=variables, capture_output=True, text=True, check=False)


def _run(command: Sequence[str], *, cwd: Path) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        sys.exit(f"{' '.join(command)} ended with {done.returncode}: {done.stderr.strip()}")
    return done.stdout


def _step_lines(run: Path) -> dict[int, dict[str, Any]]:
    lines = [line for file in sorted((run / "journal").glob("*.jsonl")) for line in file.read_text().splitlines()]
    return {record["step"]: record for line in lines if (record := json.loads(line))["kind"] == "step"}


def _last_checkpoint(run: Path) -> Path:
    return max(path.parent for path in (run / "checkpoints").glob("step-*/COMMIT.json"))


def _report(case: str, found: Sequence[str], lines: Mapping[int, Mapping[str, Any]], state: Tensors) -> str:
    if found:
        shown = found if len(found) <= 10 else [*found[:7], f"... {len(found) - 9} more ...", *found[-2:]]
        return "\n".join([f"{case}: {len(found)} differences", *(f"  {text}" for text in shown)])
    fields = len(set(next(iter(lines.values()))) - VOLATILE)
    elements = sum(tensor.size for tensor in state.values())
    return f"{case}: equal ({len(lines)} steps of {fields} fields, {len(state)} tensors of {elements} elements)"


if __name__ == "__main__":
    sys.exit(main())
