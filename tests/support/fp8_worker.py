"""Emulated FP8 on a layout: what each process trains, saves and resumes; answers travel as JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from support import engine_cases as cases

SAVED_STEP, LAST_STEP = 2, 4


def precision(recipe: str) -> dict[str, Any]:
    history = {"fp8_amax_history": 8} if recipe == "delayed" else {}
    return {"fp8": recipe, "fp8_kernels": "emulate"} | history


def run_layouts(root: str, runs: list[list[Any]]) -> list[dict[str, Any]]:
    """Each run: a recipe, a layout and a micro-batch size."""
    return [run_layout(Path(root), number, *run) for number, run in enumerate(runs)]


def run_layout(root: Path, number: int, recipe: str, layout: dict[str, Any], micro_batch_size: int) -> dict[str, Any]:
    """Train, save on the way, and resume from there."""

    def build() -> Any:
        return cases.make_engine(cases.OPTIONS, layout, micro_batch_size=micro_batch_size, fp8=precision(recipe))

    def take(engine: Any, first: int, last: int) -> list[dict[str, Any]]:
        return [cases.report_fields(cases.take_step(engine, step, 3e-3)) for step in range(first, last + 1)]

    engine = build()
    folder = root / f"{engine.world_size}-{number}"
    reports = take(engine, 1, SAVED_STEP)
    if engine.is_main:
        folder.mkdir()
    engine.barrier()
    cases.save_state(engine, folder)
    reports += take(engine, SAVED_STEP + 1, LAST_STEP)
    answer = {"reports": reports, "digest": engine.parameter_digest()}
    again = build()
    again.load_state(folder)
    answer |= {"resumed": take(again, SAVED_STEP + 1, LAST_STEP), "resumed_digest": again.parameter_digest()}
    engine.close()
    return answer


def overlap(layout: dict[str, Any]) -> list[dict[str, Any]]:
    """Steps in bf16 with tied weights, one after the other and overlapped: reports, digests and scores of each.

    The digest comes last: scores are read while weights may still be gathered.
    """
    answers = []
    for is_overlapped, gathers_late in ((False, False), (True, False), (True, True)):
        engine = cases.make_engine(
            cases.OPTIONS,
            layout,
            micro_batch_size=2,
            compute="bf16",
            overlap=is_overlapped,
            device={"overlap_parameter_gather": gathers_late},
            clip_grad_norm=0.0,
        )
        reports = [cases.report_fields(cases.take_step(engine, step, 3e-3)) for step in (1, 2, 3)]
        ids = torch.arange(4 * cases.SEQUENCE_LENGTH).view(4, -1) % 50
        scores = cases.masked_scores(engine, ids.masked_fill(ids % 3 == 0, 57), ids, ids % 3 == 0).tolist()
        answers.append({"reports": reports, "scores": scores, "digest": engine.parameter_digest()})
        engine.close()
    return answers
