"""Work of each process of a layout test; answers travel as JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from megamask.models.experts import ExpertSpec
from support import engine_cases as cases

STEPS = {
    "plain": range(1, 21),
    "options": range(1, 7),
    "deep": range(1, 7),
    "odd": range(1, 7),
    "experts": range(1, 7),
    "bf16": range(1, 7),
}
SAVED_STEP = 3
RESUMED_STEPS = (4, 5, 6)
NUM_PROBE_ROWS = 3
SPECS = {
    "plain": cases.PLAIN,
    "options": cases.OPTIONS,
    "deep": dataclasses.replace(cases.OPTIONS, num_layers=4),  # four stages: two of them make no noise
    "odd": dataclasses.replace(cases.OPTIONS, num_layers=3),
    # a dense layer, then experts with every option of the router
    "experts": dataclasses.replace(
        cases.OPTIONS,
        rotary_fraction=0.5,
        experts=ExpertSpec(
            num_experts=8,
            topk=2,
            ffn_hidden_size=24,
            num_shared=1,
            num_dense_layers=1,
            score="sigmoid",
            scale=2.5,
            num_groups=4,
            topk_groups=2,
            has_bias=True,
            bias_rate=0.01,
            balance_weight=0.01,
        ),
    ),
    "bf16": cases.OPTIONS,
}


def settings(spec: str) -> dict[str, Any]:
    """Of the engine; the z-loss and several chunks of the head are tested with the other options."""
    return {
        "micro_batch_size": 2,
        "z_loss_weight": 0.0 if spec == "plain" else 0.1,
        "compute": "bf16" if spec == "bf16" else "fp32",
        "head_chunk_rows": 1024 if spec == "plain" else 12,
    }


def take(engine: Any, spec: str, step: int) -> dict[str, Any]:
    """One step. Adam's first updates are the rate times a sign: in bf16 a large rate would amplify each rounding."""
    return cases.report_fields(cases.take_step(engine, step, learning_rate=1e-3 if spec == "bf16" else 1e-2))


def folder_of(root: str, spec: str, layout: dict[str, Any]) -> Path:
    sizes = "".join(f"-{name}{value}" for name, value in sorted(layout.items()))
    return Path(root) / f"{spec}{sizes}"


def run_layouts(root: str, runs: list[list[Any]]) -> list[dict[str, Any]]:
    """Each run: name of a spec and a layout."""
    return [run_layout(root, spec, layout) for spec, layout in runs]


def run_layout(root: str, spec: str, layout: dict[str, Any]) -> dict[str, Any]:
    """Trains, saves, restores, and breaks one layout; what it returns is compared by the test."""
    folder = folder_of(root, spec, layout)
    engine = cases.make_engine(SPECS[spec], layout, **settings(spec))
    answer: dict[str, Any] = {"files": {}, "coordinate": engine.mesh.data_parallel_rank}
    reports = []
    for step in STEPS[spec]:
        reports.append(take(engine, spec, step))
        if step == SAVED_STEP:
            answer["scores"] = cases.masked_scores(engine, *cases.probe_rows(NUM_PROBE_ROWS, SPECS[spec])).tolist()
            if engine.is_main:
                folder.mkdir()
            engine.barrier()
            share = engine.state_share(copy=True)
        if step == SAVED_STEP + 1:  # the copy is written although training went on
            answer["files"] = cases.write_share(engine, share, folder)
        if step == RESUMED_STEPS[-1]:
            answer["digest"] = engine.parameter_digest()
    answer["reports"] = reports
    engine.close()

    again = cases.make_engine(SPECS[spec], layout, **settings(spec))
    again.load_state(folder)
    answer["resumed"] = [take(again, spec, step) for step in RESUMED_STEPS]
    answer["resumed_digest"] = again.parameter_digest()

    again.load_state(folder_of(root, spec, {}))  # what one process saved
    answer["resharded"] = take(again, spec, SAVED_STEP + 1)
    answer["poisoned"] = _poison(again, SAVED_STEP + 2)
    again.close()
    return answer


def _poison(engine: Any, step: int) -> dict[str, Any]:
    """One nan in one weight of the last rank alone."""
    if engine.rank == engine.world_size - 1:
        with torch.no_grad():
            next(iter(engine._rank_model.network.decoder.layers[0].parameters())).view(-1)[0] = float("nan")
    before, updates = engine.parameter_digest(), engine._optimizer.num_updates
    report = cases.take_step(engine, step)
    return {
        "is_finite": report.is_finite,
        "is_unchanged": before == engine.parameter_digest() and updates == engine._optimizer.num_updates,
    }


def resume_all(root: str, runs: list[list[Any]]) -> list[dict[str, Any]]:
    """The step after the saved one, in this layout of one process, from each layout's state."""
    reports = []
    for spec, layout in runs:
        engine = cases.make_engine(SPECS[spec], {}, **settings(spec))
        engine.load_state(folder_of(root, spec, layout))
        reports.append(take(engine, spec, SAVED_STEP + 1))
        engine.close()
    return reports


def fail_alike(root: str, layout: dict[str, Any]) -> dict[str, str]:
    """Return what each rank raises when rank 1 cannot read the state."""
    engine = cases.make_engine(cases.PLAIN, layout)
    folder = Path(root) / "nowhere" if engine.rank == 1 else folder_of(root, "plain", {})
    answer = {"load": _raised(lambda: engine.load_state(folder))}
    engine.barrier()
    engine.close()
    return answer


def _raised(action: Callable[[], Any]) -> str:
    try:
        action()
    except Exception as error:  # noqa: BLE001 - the test looks at it
        return f"{type(error).__name__}: {error}"
    return "nothing"
