"""Training steps of arms that take turns: each visit builds an engine, warms it up, times some steps and frees it.

An engine of a billion parameters fills a good part of a GPU, so arms cannot live side by side. Visits go forwards and
backwards through the arms, block by block, so that a drift of the clocks meets all alike.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from bench_support import ratio
from gpu_arms import Arm, Machine, Shape

from megamask.config.rules.layout import AxisSizes
from megamask.config.schema.device import DeviceConfig
from megamask.config.schema.layout import LayoutConfig
from megamask.config.schema.optimizer import OptimizerConfig
from megamask.config.schema.precision import PrecisionConfig
from megamask.config.schema.training import TrainingConfig
from megamask.models.spec import ModelSpec
from megamask.models.vocabulary import Vocabulary
from megamask.objectives.masked import MaskedObjective
from megamask.objectives.shapes import shape_of
from megamask.planning.assumptions import Assumptions
from megamask.planning.gpus import GPUS
from megamask.planning.plan import rank_plan
from megamask.planning.subject import Subject
from megamask.planning.work import work_per_token

SEED = 1
HOPPER = GPUS["h100"]
OBJECTIVE = {"name": "masked", "complementary": True}
COLUMNS = (
    *("arm", "layers", "FP8", "step, ms", "p10, p90", "time to baseline"),
    *("scored tokens/s", "processed tokens/s", "MFU at 989", "MFU at 1979", "peak GB", "planned GB", "what differs"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Timing:
    """Steps of a visit: how many warm it up, how many are timed; visits of each arm; when to stop beginning any."""

    warmup: int
    steps: int
    blocks: int
    deadline: float


def subject_of(shape: Shape, spec: ModelSpec, arm: Arm, world_size: int) -> Subject:
    """The planner's description of an arm."""
    of_objective = shape_of(OBJECTIVE, shape.sequence_length)
    chunk = arm.training.get("head_chunk_rows", shape.head_chunk_rows)
    return Subject(
        spec=spec,
        shape=of_objective,
        axes=AxisSizes(data_parallel_size=world_size),
        global_batch_size=shape.global_batch_size * world_size,
        micro_batch_size=shape.micro_batch_size,
        compute=arm.precision["compute"],
        head_rows=of_objective.scored_positions,
        head_chunk_rows=min(chunk, of_objective.scored_positions * shape.micro_batch_size),
        has_fp8=arm.precision.get("fp8", "none") != "none",
        recompute=arm.training.get("recompute", "none"),
    )


def fitting_spec(shape: Shape, arms: Sequence[Arm], machine: Machine) -> ModelSpec:
    """The network, cut to the layers that the device's memory holds in every arm."""
    spec = shape.spec()
    if not shape.fits_layers or not torch.cuda.is_available():
        return spec if not shape.fits_layers else dataclasses.replace(spec, num_layers=2)
    allowed = 0.9 * torch.cuda.get_device_properties(0).total_memory
    for num_layers in range(spec.num_layers, 0, -1):
        found = dataclasses.replace(spec, num_layers=num_layers)
        subjects = [subject_of(shape, found, arm, machine.world_size) for arm in arms]
        if all(rank_plan(subject, Assumptions(), 0).total <= allowed for subject in subjects):
            return found
    raise SystemExit(f"{shape.model}: not even one layer fits into {allowed / 1e9:.0f} GB")


class Trainer:
    """The engine of an arm; takes one step each time it is called."""

    def __init__(self, shape: Shape, spec: ModelSpec, arm: Arm, world_size: int) -> None:
        from megamask.engine.engine import Engine

        self._shape, self._spec, self._step = shape, spec, 0
        self.batch_size = shape.global_batch_size * world_size
        size = spec.vocab_size
        special = {"mask_token_id": size - 1, "pad_token_id": size - 2, "eod_token_id": size - 3}
        vocabulary = Vocabulary(vocab_size=size, padded_vocab_size=spec.padded_vocab_size, **special)
        training = {"head_chunk_rows": shape.head_chunk_rows, **arm.training}
        self.engine = Engine(
            spec,
            MaskedObjective(vocabulary=vocabulary, noise_schedule="linear", complementary=True, mask_logit="excluded"),
            OptimizerConfig(learning_rate=1e-4),
            LayoutConfig(data_parallel_size=world_size),
            TrainingConfig(
                steps=10**6,
                global_batch_size=self.batch_size,
                micro_batch_size=shape.micro_batch_size,
                sequence_length=shape.sequence_length,
                **training,
            ),
            SEED,
            precision=PrecisionConfig(**arm.precision),
            device=DeviceConfig(**arm.device),
        )

    def __call__(self) -> Any:
        """One step on random tokens; returns its report. Zeros would let a GPU's clock rise."""
        self._step += 1
        members = self.engine.members(self.batch_size)
        generator = torch.Generator().manual_seed(self._step)
        shape = (self.batch_size, self._shape.sequence_length)
        tokens = torch.randint(0, self._spec.vocab_size - 3, shape, generator=generator)[members]
        batch = SimpleNamespace(
            tokens=tokens,
            is_eligible=torch.ones_like(tokens, dtype=torch.bool),
            sample_index=torch.tensor(members) + self._step * self.batch_size,
            batch_position=torch.tensor(members),
            content_sum=0,
        )
        return self.engine.step(batch, step=self._step, learning_rate=1e-4)


@contextlib.contextmanager
def trainer_of(shape: Shape, spec: ModelSpec, arm: Arm, world_size: int) -> Iterator[Trainer]:
    """The trainer of an arm with what is around it; its memory is free again afterwards."""
    _free_memory()  # of an engine that failed, too
    if torch.cuda.is_available():
        # the engine before this one may have asked for these; this one asks itself
        torch.use_deterministic_algorithms(False)
        os.environ.pop("NVTE_ALLOW_NONDETERMINISTIC_ALGO", None)
    with arm.around():
        made = Trainer(shape, spec, arm, world_size)
        try:
            yield made
        finally:
            made.engine.close()
            made.__dict__.clear()
    _free_memory()


def _free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def visit(shape: Shape, spec: ModelSpec, arm: Arm, world_size: int, timing: Timing) -> dict[str, Any]:
    """Seconds of each timed step, memory and counts of one visit."""
    has_gpu = torch.cuda.is_available()
    began = time.perf_counter()
    with trainer_of(shape, spec, arm, world_size) as take_step:
        built = time.perf_counter() - began
        for _ in range(timing.warmup):
            take_step()
        if has_gpu:
            torch.cuda.reset_peak_memory_stats()
        seconds, reports = [], []
        for _ in range(timing.steps):
            started = time.perf_counter()
            reports.append(take_step())  # waits for the device at its end
            seconds.append(time.perf_counter() - started)
        return {
            "seconds": seconds,
            "build_s": built,
            "peak_bytes": torch.cuda.max_memory_allocated() if has_gpu else None,
            "scored_tokens": statistics.mean(report.scored_tokens for report in reports),
            "losses": [report.loss for report in reports],
            "arithmetic": take_step.engine.arithmetic,
        }


def alternate_visits(
    shape: Shape,
    spec: ModelSpec,
    arms: Sequence[Arm],
    machine: Machine,
    timing: Timing,
    *,
    keep: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
    """Visit every arm once a block and hand all that was found to `keep` after each visit.

    Returns: by arm: about, visits, or the error or reason why there are none.
    """
    found: dict[str, Any] = {arm.name: {"about": arm.about, "visits": []} for arm in arms}
    longest = 0.0
    for block in range(timing.blocks):
        for arm in arms if block % 2 == 0 else list(reversed(arms)):
            entry = found[arm.name]
            if "error" in entry or "skipped" in entry:
                continue
            if (reason := arm.lacks(machine)) is not None:
                entry["skipped"] = reason
            elif _agreed(time.monotonic() + longest > timing.deadline, machine.world_size):
                entry.setdefault("left_out", []).append(f"block {block}: no time left")
            else:
                started = time.monotonic()
                try:
                    entry["visits"].append(visit(shape, spec, arm, machine.world_size, timing))
                except Exception as error:  # noqa: BLE001 - the next arm is independent
                    entry["error"] = f"{type(error).__name__}: {error}"[:2000]
                longest = max(longest, time.monotonic() - started)
            keep(found)
    return found


def _agreed(value: bool, world_size: int) -> bool:
    """Rank 0's answer, on every rank: clocks differ."""
    answer = [value]
    if world_size > 1:
        torch.distributed.broadcast_object_list(answer, src=0)
    return answer[0]


def row_of(shape: Shape, spec: ModelSpec, arm: Arm, found: dict[str, Any], baseline: str, world_size: int) -> list[Any]:
    """A row under COLUMNS."""
    entry = found[arm.name]
    if not entry["visits"]:
        reason = entry.get("skipped") or entry.get("error") or "no time left"
        return [arm.name, *["-"] * (len(COLUMNS) - 2), f"not measured: {reason.splitlines()[0]}"]
    last = entry["visits"][-1]
    seconds = sorted(value for each in entry["visits"] for value in each["seconds"])
    median = statistics.median(seconds)
    low, high = (seconds[int(part * (len(seconds) - 1))] for part in (0.1, 0.9))
    medians = [statistics.median(each["seconds"]) for each in entry["visits"]]
    others = [statistics.median(each["seconds"]) for each in found[baseline]["visits"]]
    paired = list(zip(medians, others, strict=False))
    against = ratio(*map(list, zip(*paired, strict=True))) if paired else "-"
    subject = subject_of(shape, spec, arm, world_size)
    clean = subject.global_batch_size * shape.sequence_length
    processed = clean * subject.shape.num_views * subject.shape.input_length / shape.sequence_length
    flops = clean / median * work_per_token(subject).total / world_size
    peak = last["peak_bytes"]
    return [
        *(arm.name, last["arithmetic"]["layers"], last["arithmetic"]["fp8"]),
        *(f"{median * 1e3:.4g}", f"{low * 1e3:.4g}, {high * 1e3:.4g}", against),
        *(last["scored_tokens"] / median, processed / median),
        *(f"{flops / HOPPER.bf16_flops:.1%}", f"{flops / (HOPPER.fp8_flops or 1):.1%}"),
        "-" if peak is None else f"{peak / 1e9:.1f}",
        f"{rank_plan(subject, Assumptions(), 0).total / 1e9:.1f}",
        arm.about,
    ]


def write_trace(shape: Shape, spec: ModelSpec, arm: Arm, world_size: int, path: Path) -> dict[str, Any]:
    """Profile one step after two others; the file opens in Perfetto and in chrome://tracing.

    Returns: kernels (on a CPU operators) by the time spent in them, the longest first.
    """
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with trainer_of(shape, spec, arm, world_size) as take_step:
        take_step()
        take_step()
        with torch.profiler.profile(activities=activities) as profiler:
            take_step()
    profiler.export_chrome_trace(str(path))
    events = profiler.key_averages()
    on_device = torch.cuda.is_available()

    def own(event: Any) -> float:
        return float(event.self_device_time_total if on_device else event.self_cpu_time_total)

    longest = sorted(events, key=own, reverse=True)[:40]
    return {"file": path.name, "kernels": [[event.key, event.count, own(event) / 1e3] for event in longest]}
