"""One rank of a bound's measurement: `python -m megamask_pipelines.remeasure_rank REQUEST.json`, under a launcher."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from megamask.audit.bound import Remeasurement
from megamask.config.load import load_stored_config
from megamask.config.schema.roots import TrainConfig
from megamask.errors import MegamaskError
from megamask.launch.rank_folder import leave_report
from megamask.resilience.parent_death import die_with_launcher
from megamask.runs.layout import checkpoints_folder


def measure(request: Remeasurement) -> dict[str, Any]:
    """Restore the checkpoint and evaluate it as training did; collective.

    Returns: nelbo_nats_per_token, and device: the backend's name.
    Raises:
        MegamaskError: a corpus or the layout refuses.
    """
    import torch

    from megamask.engine.backend import select_backend
    from megamask.engine.process_group import destroy_process_group, init_process_group
    from megamask.training.build import build_engine
    from megamask.training.evaluating import validation_measure
    from megamask.training.run_data import RunData

    config = _config(request)
    if request.num_threads is not None:
        torch.set_num_threads(request.num_threads)
    with contextlib.ExitStack() as stack:
        data = RunData(config, stack)
        backend = select_backend(deterministic=config.device.deterministic)
        init_process_group(backend, timeout_s=config.launch.collective_timeout_s)
        engine = build_engine(config, data, draws_weights=False)
        engine.load_state(checkpoints_folder(Path(request.run_dir)) / request.checkpoint)
        if data.validation is None:
            raise RuntimeError("a config with a bound has evaluation.every_steps")
        measured = validation_measure(config, engine, data.objective, data.validation, step=lambda: request.step)()
        destroy_process_group()
    if measured is None:
        raise RuntimeError("nothing cuts a measurement short here")
    return {"nelbo_nats_per_token": measured["nelbo_nats_per_token"], "device": backend.name}


def _config(request: Remeasurement) -> TrainConfig:
    """The attempt's config, whose folders do not depend on the working folder, and the bound alone of its measures."""
    config, run_dir = load_stored_config(Path(request.config)), Path(request.run_dir)
    every = config.evaluation.every_steps
    return replace(
        config,
        run=replace(config.run, output_dir=str(run_dir.parent), name=run_dir.name),
        data=replace(config.data, corpora=request.corpora),
        preview=replace(config.preview, every_steps=None),
        evaluation=replace(config.evaluation, every_steps=every or 1, pair_variance_draws=None, clip_search_draws=None),
    )


def main(path: str) -> int:
    """Measure; rank 0 writes the answer. Return the exit code."""
    die_with_launcher()
    request = Remeasurement.read(Path(path))
    try:
        answer = measure(request)
    except MegamaskError as error:
        if not leave_report(error):
            sys.stderr.write(f"error: {error.message}\n")
        return int(error.exit_code)
    if os.environ.get("RANK", "0") == "0":
        Path(request.answer).write_text(json.dumps(answer), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
