#!/usr/bin/env python3
"""Speed of the engine on a GPU: parts of a step, number formats, and the price of each thing that makes it fast.

Sections (`--only`, several with commas):

    products, attention, head, host   parts of a step by themselves (gpu_ops.py)
    formats   steps in bf16 and in each FP8 recipe
    ablate    steps with everything on, and with one thing different in each row (the list is in gpu_arms.py)
    trace     one profiled step of bf16 and of tensorwise FP8, for Perfetto, in files beside the JSON

Arms take turns in one process. The JSON and Markdown files are written after every visit of an arm, so that a run that
is cut off loses nothing. `--shape tiny` runs everything on a CPU as a rehearsal; its figures are meaningless. Under
torchrun on several GPUs, data parallelism divides the batch.

tok/s are of all GPUs. Scored tokens are those that the loss counts, processed ones the positions that the network
computes. MFU is of one GPU, against 989 TFLOP/s (bf16) and 1,979 TFLOP/s (FP8) of a Hopper SXM; recomputation does not
count.
"""

from __future__ import annotations

import argparse
import dataclasses
import gzip
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from bench_support import Report, benchmark_parser
from gpu_arms import ABLATIONS, BASELINE, SHAPES, Arm, Machine, Shape, recipe_arms
from gpu_ops import SECTIONS as PARTS
from gpu_steps import COLUMNS, Timing, alternate_visits, fitting_spec, row_of, write_trace

ALL = (*PARTS, "formats", "ablate", "trace")


def compare_steps(
    report: Report, shape: Shape, arms: list[Arm], machine: Machine, timing: Timing, *, name: str, title: str
) -> None:
    """Visit arms in turns; show and keep what is known after every visit."""
    spec = fitting_spec(shape, [arm for arm in arms if arm.lacks(machine) is None], machine)
    report.keep(f"{name}_network", dataclasses.asdict(spec))
    table = report.table(
        f"{title}: {spec.num_layers} layers of {spec.hidden_size}, {shape.sequence_length:,} positions, "
        f"{shape.micro_batch_size * 2} rows a micro-batch",
        COLUMNS,
    )

    def keep(found: dict[str, Any]) -> None:
        table.rows[:] = [row_of(shape, spec, arm, found, arms[0].name, machine.world_size) for arm in arms]
        report.keep(name, found)
        report.save()

    alternate_visits(shape, spec, arms, machine, timing, keep=keep)


def trace_steps(report: Report, shape: Shape, machine: Machine, folder: Path) -> None:
    """Profile bf16 and tensorwise FP8; traces are compressed, as they are large."""
    shape = dataclasses.replace(shape, global_batch_size=2 * shape.micro_batch_size)  # two micro-batches show it
    table = report.table("Where a traced step's time goes", ["arm", "kernel", "calls", "ms"])
    spec, found = fitting_spec(shape, recipe_arms(machine), machine), {}
    for arm in recipe_arms(machine)[:2]:
        path = folder / f"trace_{shape.model}_{arm.name}.json"
        found[arm.name] = write_trace(shape, spec, arm, machine.world_size, path)
        with path.open("rb") as plain, gzip.open(f"{path}.gz", "wb") as packed:
            shutil.copyfileobj(plain, packed)
        path.unlink()
        for kernel, calls, milliseconds in found[arm.name]["kernels"][:10]:
            table.add(arm.name, f"`{kernel[:90].replace('|', '/')}`", calls, milliseconds)
        report.keep("traces", found)
        report.save()


def run(report: Report, arguments: argparse.Namespace) -> None:
    """Run the chosen sections; a process group exists."""
    import torch.distributed as dist

    from megamask.engine.backend import select_device
    from megamask.engine.probes import capability

    machine = Machine(capability=capability(), world_size=dist.get_world_size())
    shape, timing = SHAPES[arguments.shape], timing_of(arguments)
    report.keep("machine", dataclasses.asdict(machine))
    report.keep("shape", dataclasses.asdict(shape))
    chosen = arguments.only.split(",")
    for name, part in PARTS.items():
        if name in chosen:
            spec, device = shape.spec(), select_device()
            part(report, shape, spec, machine, device, blocks=arguments.blocks, repeats=arguments.repeats)
            report.save()
    steps = {
        "formats": (recipe_arms(machine), "Number formats"),
        "ablate": ([BASELINE, *(arm.on_top_of(BASELINE) for arm in ABLATIONS)], "One thing different"),
    }
    for name, (arms, title) in steps.items():
        if name in chosen:
            kept = [arm for arm in arms if not arguments.arms or arm.name in (*arguments.arms.split(","), arms[0].name)]
            compare_steps(report, shape, kept, machine, timing, name=name, title=title)
    if "trace" in chosen:
        folder = (arguments.json or Path("trace.json")).parent
        trace_steps(report, shape, machine, folder)


def timing_of(arguments: argparse.Namespace) -> Timing:
    """Warm-up, timed steps, blocks and the moment after which no visit begins."""
    warmup, steps = (1, 2) if arguments.quick else (arguments.warmup, arguments.steps)
    deadline = time.monotonic() + arguments.limit_s
    return Timing(warmup=warmup, steps=steps, blocks=arguments.blocks, deadline=deadline)


def main() -> int:
    """Run the chosen sections and write the report."""
    parser = benchmark_parser(__doc__, blocks=3)
    parser.add_argument("--only", default=",".join(ALL), help=f"sections, with commas: {', '.join(ALL)}")
    parser.add_argument("--shape", choices=sorted(SHAPES), default="1.7b", help="what is trained (default 1.7b)")
    parser.add_argument("--arms", default="", help="names of arms, with commas: only these and the first one")
    parser.add_argument("--warmup", type=int, default=3, help="steps before the timed ones of a visit (default 3)")
    parser.add_argument("--steps", type=int, default=6, help="timed steps of a visit (default 6)")
    parser.add_argument("--repeats", type=int, default=10, help="runs of a part in one measurement (default 10)")
    parser.add_argument("--limit-s", type=float, default=1e9, help="begin no visit that may end later than this")
    arguments = parser.parse_args()
    if unknown := set(arguments.only.split(",")) - set(ALL):
        parser.error(f"--only names {', '.join(sorted(unknown))}; allowed: {', '.join(ALL)}")
    if arguments.quick:
        arguments.shape, arguments.blocks, arguments.repeats = "tiny", 1, 1

    from megamask.engine.backend import select_backend
    from megamask.engine.process_group import destroy_process_group, init_process_group

    init_process_group(select_backend())
    is_main = torch.distributed.get_rank() == 0
    if not is_main:
        arguments.json = arguments.markdown = None
    report = Report(
        "bench_gpu", "The engine on a GPU" if torch.cuda.is_available() else "A rehearsal on a CPU", arguments
    )
    run(report, arguments)
    destroy_process_group()
    return report.finish() if is_main else 0


if __name__ == "__main__":
    raise SystemExit(main())
