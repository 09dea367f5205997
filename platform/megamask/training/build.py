"""Compose a training run: engine, restored state, and the hooks around the loop."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megamask.checkpoint.agreement import on_main
from megamask.checkpoint.commit import Commit
from megamask.checkpoint.contents import ModelDocument
from megamask.checkpoint.loader import Loaded, load
from megamask.checkpoint.ownership import Owner
from megamask.checkpoint.retention import sweep
from megamask.config.schema.roots import TrainConfig
from megamask.conversion.source import AdaptedWeights
from megamask.models.counts import flops_per_token
from megamask.objectives.base import Objective
from megamask.objectives.shapes import ObjectiveShape
from megamask.resilience.heartbeat import Heartbeat
from megamask.resilience.numerics import NumericsGuard
from megamask.resilience.process_facts import node_name
from megamask.resilience.signals import StopRequest
from megamask.resilience.stop_deadline import StoppedBeforeTraining
from megamask.runs.skips import Rewind
from megamask.storage.fault_points import reached
from megamask.tracking.journal.seek import has_record
from megamask.training.attempt_scope import AttemptScope
from megamask.training.checkpointing import CheckpointCommitter
from megamask.training.evaluating import validation_measure
from megamask.training.guarding import StepGuard, steps_before
from megamask.training.hooks import PeriodicCheckpoint, PeriodicEvaluation, StatusFile, StepJournal
from megamask.training.loop import Hook, TrainingRun
from megamask.training.mixing import refuse_moved_past
from megamask.training.previewing import PeriodicPreview, preview_on_engine
from megamask.training.progress import Progress
from megamask.training.rewinding import effective_rewinds, refuse_lost_document, rewinder, skipped_by, withdraw
from megamask.training.run_data import RunData
from megamask.training.starting import verify_source
from megamask.training.startup import StartupClock
from megamask.training.stopping import StopFlag
from megamask.training.stragglers import StragglerWatch

if TYPE_CHECKING:
    import torch

    from megamask.engine.backend import Backend
    from megamask.engine.engine import Engine


def build_run(
    config: TrainConfig,
    data: RunData,
    scope: AttemptScope,
    signals: StopRequest,
    startup: StartupClock,
    heartbeat: Heartbeat,
) -> TrainingRun:
    """Build the engine, restore the newest checkpoint that verifies, and put the loop's parts together; collective.

    Args:
        data: open corpora, checked before the run was claimed.
        scope: of this attempt; rank 0 has claimed the run in it.

    Raises:
        MegamaskError: a checkpoint, the layout or the journal refuses.
    """
    # megatron-core takes seconds to import: a refusal before this line need not wait for it
    backend = _join(config, signals, startup, heartbeat)
    reached("rendezvous.joined")
    scope.engine = engine = _engine(config, data, startup)
    data.train.pins_memory = backend.pins_batches
    attempt = scope.share(engine)
    heartbeat.enter("restore")
    model = ModelDocument(
        spec=data.spec, vocabulary=data.vocabulary, objective=data.objective, tokenizer_digest=data.tokenizer_digest
    )
    with startup.phase("restore"):
        resumed = _resume(config, data, scope, engine, model)
    loaded = resumed.loaded
    if scope.leader is not None:
        machine = {"device": backend.name, "num_threads": _num_threads(), **engine.arithmetic}
        scope.leader.started(data, loaded, world_size=engine.world_size, machine=machine, startup_s=startup.seconds())
        scope.leader.running(scope.progress.step)
    stop = StopFlag(
        engine,
        signals=signals,
        is_superseded=attempt.is_superseded,
        num_steps=config.training.steps,
        stop_after_step=config.training.stop_after_step,
    )
    hooks = _hooks(config, data, engine, scope, model, resumed, stop)
    return TrainingRun(
        config=config,
        engine=engine,
        loader=data.train,
        progress=scope.progress,
        stop=stop,
        hooks=hooks,
        guard=_guard(config, data, engine, scope, resumed.rewinds, heartbeat),
        shape_at=lambda step: data.objective.at(step).shape(config.training.sequence_length),
        peak_seconds_per_token=lambda shape: _peak_seconds_per_token(
            config, data, shape, backend.device, engine.world_size
        ),
        heartbeat=heartbeat,
    )


@dataclass(frozen=True, kw_only=True)
class _Resumed:
    """Position that an attempt begins at: what was loaded, after which rewinds, and what those withdrew."""

    loaded: Loaded
    rewinds: list[Rewind]
    withdrawn: list[str]

    @property
    def commit(self) -> Commit | None:
        """The checkpoint that was loaded; None on a fresh start."""
        return self.loaded.commit


def _resume(config: TrainConfig, data: RunData, scope: AttemptScope, engine: Engine, model: ModelDocument) -> _Resumed:
    """Remove what rewinds withdrew, restore the newest checkpoint that verifies, and leave out samples; collective."""
    attempt, withdrawn = scope.attempt, list[str]()
    rewinds = effective_rewinds(engine, scope.run_dir, attempt.number)
    if scope.leader is not None:
        sweep(scope.run_dir, attempt.number)
        withdrawn = withdraw(scope.run_dir, rewinds)
    owner = Owner(run_id=attempt.run_id, seed=config.run.seed, corpora=data.train.corpus_ids)
    loaded = load(engine, scope.run_dir, model=model, owner=owner)
    if loaded.commit is None and data.start is not None and data.start.weights is not None:
        _load_source(engine, data.start.weights)
    _restore(scope.progress, loaded, data.objective, config.training.sequence_length)
    if loaded.commit is not None and loaded.state is not None:
        refuse_lost_document(scope.run_dir, loaded.commit, loaded.state.schedule, rewinds)
    data.train.leave_out(skipped_by(rewinds))
    refuse_moved_past(config, scope.run_dir, attempt.number, scope.progress, data.train)
    return _Resumed(loaded=loaded, rewinds=rewinds, withdrawn=withdrawn)


def _num_threads() -> int:
    import torch

    return torch.get_num_threads()


def _join(config: TrainConfig, signals: StopRequest, startup: StartupClock, heartbeat: Heartbeat) -> Backend:
    """Join the job's process group, unless an attempt before a rewind has. A signal ends the wait for other ranks."""

    def check() -> None:
        if (asked := signals.strongest) is not None:
            raise StoppedBeforeTraining(asked, heartbeat.mark.section)

    with startup.phase("imports"):
        from megamask.engine.backend import select_backend
        from megamask.engine.process_group import init_process_group, is_joined

    with startup.phase("engine"):
        backend = select_backend(deterministic=config.device.deterministic)
        heartbeat.enter("rendezvous")
        if not is_joined():
            check()
            init_process_group(backend, timeout_s=config.launch.collective_timeout_s, check=check)
    return backend


def _engine(config: TrainConfig, data: RunData, startup: StartupClock) -> Engine:
    with startup.phase("imports"):
        importlib.import_module("megamask.engine.engine")

    with startup.phase("engine"):
        return build_engine(config, data, draws_weights=data.start is None)


def build_engine(config: TrainConfig, data: RunData, *, draws_weights: bool) -> Engine:
    """Build the engine of a run in a process group that all ranks have joined; collective.

    Args:
        draws_weights: set the first weights from the seed; otherwise they are zero until they are loaded.
    """
    from megamask.engine.engine import Engine

    return Engine(
        spec=data.spec,
        objective=data.objective,
        optimizer=config.optimizer,
        layout=config.layout,
        training=config.training,
        seed=config.run.seed,
        precision=config.precision,
        device=config.device,
        draws_weights=draws_weights,
    )


def _load_source(engine: Engine, weights: AdaptedWeights) -> None:
    """Verify a published model's files on one rank, and set the network's weights from them."""
    on_main(engine, lambda: verify_source(weights))
    engine.set_weights(weights.read)


def _restore(progress: Progress, loaded: Loaded, objective: Objective, sequence_length: int) -> None:
    if loaded.state is not None:
        progress.num_views = objective.at(max(1, loaded.state.step)).shape(sequence_length).num_views
        progress.step = loaded.state.step
        progress.consumed_samples = loaded.state.consumed_samples
        progress.consumed_tokens = loaded.state.consumed_tokens
        processed = loaded.state.schedule.get("processed_tokens", progress.processed_tokens)
        progress.other_views = int(processed) - progress.processed_tokens


def _hooks(
    config: TrainConfig,
    data: RunData,
    engine: Engine,
    scope: AttemptScope,
    model: ModelDocument,
    resumed: _Resumed,
    stop: StopFlag,
) -> list[Hook]:
    """The journal first, checkpoints after everything whose result a checkpoint records, status last."""
    attempt, objective = scope.attempt, data.objective
    measure, preview = None, None
    if data.validation is not None:
        measure = validation_measure(
            config, engine, objective, data.validation, stop.check, lambda: scope.progress.step
        )
    if data.previews is not None:
        preview = preview_on_engine(config, engine, objective, data.previews, stop.check, lambda: scope.progress.step)

    def has_line(kind: str) -> Callable[[int], bool]:
        return lambda step: bool(engine.broadcast_object(scope.rank == 0 and has_record(scope.run_dir, kind, step)))

    scope.committer = committer = CheckpointCommitter(
        engine,
        attempt,
        config.checkpoint,
        model=model,
        tokenizer_folder=data.tokenizer_folder,
        corpora=data.train.corpus_ids,
        seed=config.run.seed,
        num_steps=config.training.steps,
        num_rewinds=len(resumed.rewinds),
        parent=resumed.commit.digest if resumed.commit is not None else None,
    )
    committer.journal_withdrawn(scope.progress.step, resumed.withdrawn)
    if resumed.commit is not None:
        committer.prune_before_training(resumed.commit)
    evaluation = PeriodicEvaluation(attempt, config.evaluation, measure, has_line("evaluation"))
    hooks: list[Hook] = [
        StepJournal(attempt),
        *([StragglerWatch(engine, attempt, node=node_name())] if engine.world_size > 1 else []),
        evaluation,
        PeriodicPreview(attempt, config.preview.every_steps, preview, has_line("sample_preview")),
        PeriodicCheckpoint(
            config.checkpoint, committer, bound_at=evaluation.bound_at, committed_step=scope.progress.step
        ),
    ]
    if scope.leader is not None:
        hooks.append(StatusFile(scope.leader.running))
    return hooks


def _guard(
    config: TrainConfig, data: RunData, engine: Engine, scope: AttemptScope, rewinds: list[Rewind], heartbeat: Heartbeat
) -> StepGuard:
    """The numerics guard; collective: rank 0 reads the journal's last steps for all ranks."""
    settings, committer = config.resilience, scope.committer

    def finish_saving() -> None:
        heartbeat.enter("save")
        if committer is not None:
            committer.finish()

    before = on_main(engine, lambda: steps_before(scope.run_dir, scope.progress.step, settings))
    return StepGuard(
        rules=NumericsGuard(settings, before),
        recorder=scope.attempt,
        rewind=rewinder(
            config,
            engine,
            scope.attempt,
            rewinds,
            can_start_anew=data.start is None or data.start.weights is not None,
            finish_saving=finish_saving,
        ),
    )


def _peak_seconds_per_token(
    config: TrainConfig, data: RunData, shape: ObjectiveShape, device: torch.device, world_size: int
) -> float | None:
    """Seconds of one processed position if every device ran at its named peak; None where that is not known."""
    from megamask.engine.probes import device_name, peak_flops_per_second

    peak = peak_flops_per_second(device_name(device), config.precision.compute)
    if peak is None:
        return None
    flops = flops_per_token(data.spec, scored_fraction=shape.scored_fraction, attended_fraction=shape.attended_fraction)
    return flops.training / (peak * world_size)
