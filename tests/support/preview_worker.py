"""Work of each process of a preview test; answers travel as JSON."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch

from megamask.generation.confidence import DecodingOptions, decode
from megamask.generation.predictor import Predictor
from megamask.models.spec import ModelSpec
from support import engine_cases as cases

SPECS = {"plain": cases.PLAIN, "options": dataclasses.replace(cases.OPTIONS, num_layers=4)}
TEMPERATURES = (0.0, 1.0)
STEPS = 5
SEED = 2**35 + 3
SEQUENCES = (0, 1, 2**32)
TRAINED_STEPS = (1, 2, 3)


def rows(spec: ModelSpec) -> tuple[torch.Tensor, torch.Tensor]:
    """Three rows to continue after prompts of 0, 5 and 9 tokens, 11 tokens each; the rest of a row stays masked."""
    x_0 = cases.batch([0, 1, 2], 5).tokens
    place = torch.arange(cases.SEQUENCE_LENGTH)
    start = torch.tensor([0, 5, 9])[:, None]
    return x_0.masked_fill(place >= start, cases.vocabulary(spec).mask_token_id), (place >= start) & (
        place < start + 11
    )


def decoded(predict: Predictor, spec: ModelSpec, temperature: float, places: list[int] | None = None) -> dict[str, Any]:
    """Some of the rows, by default all."""
    tokens, is_wanted = rows(spec)
    places = [0, 1, 2] if places is None else places
    found = decode(
        predict,
        cases.objective().decoder,
        tokens[places],
        is_wanted=is_wanted[places],
        options=DecodingOptions(temperature=temperature, num_denoising_steps=STEPS, seed=SEED),
        sequences=[SEQUENCES[place] for place in places],
    )
    return {"tokens": [row.tokens.tolist() for row in found], "committed": [row.committed for row in found]}


def run_layouts(root: str, runs: list[list[Any]]) -> list[dict[str, Any]]:
    """Each run: name of a spec and a layout."""
    return [run_layout(root, spec, layout) for spec, layout in runs]


def run_layout(root: str, spec: str, layout: dict[str, Any]) -> dict[str, Any]:
    """Trains a little with and without previews in between; saves one process's weights, or goes on from them."""
    engine = cases.make_engine(SPECS[spec], layout, micro_batch_size=2)
    plain = [cases.report_fields(cases.take_step(engine, step)) for step in TRAINED_STEPS]
    plain.append(engine.parameter_digest())
    folder = Path(root) / spec
    if not layout:
        folder.mkdir()
        cases.save_state(engine, folder)
    engine.load_state(folder)
    answer: dict[str, Any] = {
        "found": [decoded(engine.predict, SPECS[spec], temperature) for temperature in TEMPERATURES]
    }
    if engine.mesh.data_parallel_rank == 0:  # replicas need not call alike
        answer["alone"] = decoded(engine.predict, SPECS[spec], TEMPERATURES[1], [1])
    engine.close()

    again = cases.make_engine(SPECS[spec], layout, micro_batch_size=2)
    watched = []
    for step in TRAINED_STEPS:
        decoded(again.predict, SPECS[spec], 1.0)
        watched.append(cases.report_fields(cases.take_step(again, step)))
    answer["is_untouched"] = [*watched, again.parameter_digest()] == plain
    again.close()
    return answer
