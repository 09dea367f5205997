"""The job of `megamask plan`: memory, time and fitness of a run on GPUs, before any is booked."""

from __future__ import annotations

import itertools
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megamask.config.identity import value_of
from megamask.config.load import DEFAULT_ORIGIN, Loaded
from megamask.config.schema.roots import TrainConfig
from megamask.config.validate import all_problems
from megamask.config.variants import variant_problems
from megamask.data.manifest import Manifest
from megamask.errors import DataIntegrityError, MegamaskError, UsageError
from megamask.models.spec import ModelSpec
from megamask.planning.answer import Request, infeasible_answer, planned_answer, searched_answer
from megamask.planning.assumptions import Assumptions
from megamask.planning.capability import planned
from megamask.planning.capability import problems as capability_problems
from megamask.planning.gpus import gpu_named
from megamask_pipelines.subject import subject_of

ASSUMED_VOCABULARY = 131_072


def plan_run(loaded: Loaded[TrainConfig], request: Request) -> dict[str, Any]:
    """Plan a composed config; nothing is written and no device is touched.

    Returns: the contract's object (docs/guides/planning.md), with exit_code 2 when the run does not fit.
    Raises:
        UsageError: an argument that is not a GPU, assumption or rank.
    """
    config, gpu = loaded.config, gpu_named(request.gpu_name)
    assumed = Assumptions.with_overrides(request.assume)
    problems = itertools.chain(
        variant_problems(config, loaded.origins, default_origin=DEFAULT_ORIGIN),
        all_problems(config),
        capability_problems(
            config.precision, config.device, planned(gpu.architecture), num_experts=config.model.num_experts
        ),
    )
    reasons = [problem.description(value_of(config, problem.key)) for problem in problems]
    vocab_size, vocab_origin = _vocabulary(config, request.vocab_size)
    assumptions = {
        "gpu": {"value": request.gpu_name, **asdict(gpu)},
        "vocab_size": {"value": vocab_size, "meaning": vocab_origin},
        **assumed.to_json(),
    }
    try:
        spec = ModelSpec.from_config(config.model, vocab_size, config.training.sequence_length)
    except UsageError as error:
        return infeasible_answer(config, reasons or [error.message], assumptions)
    if request.is_search:
        return searched_answer(config, subject_of(config, spec), gpu, assumed, request) | {"assumptions": assumptions}
    if reasons:
        return infeasible_answer(config, reasons, assumptions, spec)
    return planned_answer(config, subject_of(config, spec), gpu, assumed, request) | {"assumptions": assumptions}


def _vocabulary(config: TrainConfig, given: int | None) -> tuple[int, str]:
    """Entries of the vocabulary, and where the number is from."""
    if given is not None:
        return given, "--vocab-size"
    for name, folder in config.data.corpora.items():
        try:
            return Manifest.load(Path(folder)).vocab_size, f"data.corpora.{name} = {folder}"
        except (MegamaskError, DataIntegrityError, OSError):
            continue
    return ASSUMED_VOCABULARY, "assumed, because no corpus of data.corpora can be read here; --vocab-size replaces it"
