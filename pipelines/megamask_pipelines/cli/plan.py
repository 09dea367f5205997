"""`megamask plan CONFIG`: memory, time and fitness of a run, without a device."""

from __future__ import annotations

import argparse
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's arguments."""
    parser.add_argument("config", help="a run config, as configs/run/8b.yaml")
    parser.add_argument("overrides", nargs="*", default=[], help="key.path=value, later ones win")
    parser.add_argument("--gpu", default="h100", metavar="NAME", help="a100, h100, h200 or b200 (default h100)")
    parser.add_argument("--gpus", type=int, metavar="N", help="GPUs of the job; by default as many as the layout needs")
    parser.add_argument("--rank", type=int, metavar="R", help="show this rank instead of the fullest one")
    parser.add_argument("--search", action="store_true", help="rank every layout of the GPUs that fits, fastest first")
    parser.add_argument("--vocab-size", type=int, metavar="V", help="entries of the tokenizer, if no corpus is here")
    replaces = "replace an assumption of the estimate (docs/guides/planning.md lists them); may be repeated"
    parser.add_argument("--assume", action="append", default=[], metavar="NAME=NUMBER", help=replaces)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Plan; the answer is the contract's object."""
    from megamask.config.load import load_train_config
    from megamask.planning.answer import Request
    from megamask_pipelines.plan import plan_run

    return plan_run(
        load_train_config(arguments.config, arguments.overrides),
        Request(
            gpu_name=arguments.gpu,
            num_gpus=arguments.gpus,
            rank=arguments.rank,
            is_search=arguments.search,
            vocab_size=arguments.vocab_size,
            assume=arguments.assume,
        ),
    )


def render(result: dict[str, Any]) -> str:
    """The plan for people: fitness first, then the fullest rank, the step, and what surrounds it."""
    lines = ["fits" if result["feasible"] else "does not fit: " + "; ".join(result["reasons"])]
    if "per_rank" in result:
        lines += [*_memory(result["per_rank"]), *_speed(result), *_surroundings(result["operation"])]
    if result.get("layouts"):
        lines += _layouts(result)
    return "\n".join([*lines, _assumed(result["assumptions"])])


def _memory(rank: dict[str, Any]) -> list[str]:
    parts = ("parameters", "gradients", "optimizer", "activations", "logits", "other", "total")
    flights = rank["activations"]["micro_batches_in_flight"]
    return [
        f"rank {rank['rank']}: {rank['parameters']:,} parameters, activations of {flights} micro-batches at once",
        *(f"  {part:<12}{rank[f'{part}_bytes'] / 1e9:10.2f} GB" for part in parts),
        f"  (of other, buffers of communication: {rank['communication_bytes'] / 1e9:.2f} GB)",
    ]


def _speed(result: dict[str, Any]) -> list[str]:
    time = result["step_time"]
    parts = ", ".join(f"{name} {seconds:.3g} s" for name, seconds in time.items() if seconds > 0)
    return [
        f"step: {result['step_time_s']:.3g} s ({parts})",
        f"  MFU {result['mfu']:.1%}, {result['tokens_per_second_per_gpu']:,.0f} tokens per second and GPU, "
        f"{result['flops_per_token']:.3g} FLOPs per token, {result['world_size']:,} GPUs",
    ]


def _surroundings(operation: dict[str, Any]) -> list[str]:
    lines = [
        f"checkpoint: {operation['checkpoint_bytes'] / 1e9:,.1f} GB, stalls training "
        f"{operation['checkpoint_stall_s']:.2g} s, written in {operation['checkpoint_write_s']:.3g} s; data: "
        f"{operation['data_bandwidth'] / 1e6:,.2f} MB/s"
    ]
    if operation["ettr"] is not None:
        lines.append(
            f"  {operation['failures_per_day']:.2g} failures a day; {operation['ettr']:.1%} of the time trains (ETTR)"
        )
    return lines


def _layouts(result: dict[str, Any]) -> list[str]:
    lines = [f"{result['num_feasible']} of {result['num_tried']} layouts fit; the fastest:"]
    for row in result["layouts"]:
        settings = " ".join(f"{key}={str(value).lower()}" for key, value in row["settings"].items())
        lines.append(
            f"  {row['tokens_per_second_per_gpu']:8,.0f} tokens/s/GPU  MFU {row['mfu']:.1%}  "
            f"{row['total_bytes'] / 1e9:6.1f} GB  {settings}"
        )
    return lines


def _assumed(assumptions: dict[str, Any]) -> str:
    vocabulary = assumptions["vocab_size"]
    return (
        f"on {assumptions['gpu']['value']}, {vocabulary['value']:,} entries ({vocabulary['meaning']}); an estimate, "
        "not a measurement: --json lists every assumption, --assume replaces one"
    )
