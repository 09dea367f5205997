"""The pretraining job of one rank, from config to the reason it ended."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING

from megamask.checkpoint.contents import ModelDocument
from megamask.checkpoint.loader import Loaded, load
from megamask.checkpoint.ownership import Owner
from megamask.checkpoint.retention import sweep
from megamask.config.schema.roots import TrainConfig
from megamask.errors import ExitCode, MegamaskError
from megamask.launch.local import is_launched
from megamask.models.counts import flops_per_token
from megamask.provenance.record import code_version
from megamask.provenance.redaction import reason_of
from megamask.resilience.parent_death import die_with_parent
from megamask.resilience.signals import StopRequest
from megamask.runs.layout import run_path
from megamask.runs.rank_files import write_rank_failure
from megamask.runs.record import open_run
from megamask.training.attempt import Attempt, AttemptView, claim_run, tell_failure
from megamask.training.checkpointing import CheckpointCommitter, commit_record, is_announced
from megamask.training.datasets import described_datasets
from megamask.training.evaluating import validation_measure
from megamask.training.hooks import PeriodicCheckpoint, PeriodicEvaluation, StatusFile, StepJournal
from megamask.training.loop import Hook, TrainingRun, train
from megamask.training.previewing import PeriodicPreview, preview_on_engine
from megamask.training.progress import Progress
from megamask.training.resuming import recorded_schedule
from megamask.training.schedules import check_extension
from megamask.training.startup import StartupClock
from megamask.training.stopping import StopFlag, StopReason
from megamask_pipelines.corpora import Corpora
from megamask_pipelines.job_failure import LOST_PEER, LOST_PEER_HINT, end_saving, has_lost_peer, peer_failure, typed

if TYPE_CHECKING:
    import torch

    from megamask.engine.engine import Engine


def pretrain(config: TrainConfig, signals: StopRequest) -> tuple[StopReason, Progress]:
    """Trains on this rank until the attempt ends; every rank of the layout calls it.

    Args:
        config: composed and validated (config.validate.validate_train).
        signals: what this process was asked for; its handlers are in place.

    Returns: why the attempt ended and how far the run is, the same on every rank.
    Raises:
        MegamaskError: the attempt failed; its exit code says how. What must be written is written.
    """
    startup = StartupClock()
    if parent := os.environ.get("MEGAMASK_PARENT_PID"):
        die_with_parent(int(parent))
    with contextlib.ExitStack() as stack:
        corpora = Corpora(config, stack)
        job = Job(config, corpora, signals, startup)
        try:
            job.open()
            reason = train(job.prepare())
        except BaseException as error:
            told = job.failed(error)
            if told is error:
                raise
            raise told from error
        job.close(reason)
    return reason, job.progress


class Job:
    """The stages of a rank's attempt: open the run, prepare training, end."""

    def __init__(
        self, config: TrainConfig, corpora: Corpora, signals: StopRequest, startup: StartupClock | None = None
    ) -> None:
        self._startup = startup or StartupClock()
        self._config = config
        self._corpora = corpora
        self._signals = signals
        self._rank = int(os.environ["RANK"]) if is_launched() else 0
        self._run_dir = run_path(config.run.output_dir, config.run.name)
        self._shape = corpora.objective.shape(config.training.sequence_length)
        self.progress = Progress(num_views=self._shape.num_views)
        self._extended: dict[str, list[int]] | None = None
        self._attempt: Attempt | None = None
        self._view: AttemptView | None = None
        self._committer: CheckpointCommitter | None = None

    def open(self) -> None:
        """Rank 0 claims the run, before anything slow; whatever can be refused is refused before the claim."""
        from megamask.engine.backend import select_device

        select_device()
        if self._rank == 0:
            record = open_run(
                self._run_dir,
                self._config,
                corpora=self._corpora.train.corpus_ids,
                tokenizer_digest=self._corpora.tokenizer_digest,
                code_version=code_version(),
            )
            recorded, completed = recorded_schedule(record)
            steps = self._config.training.steps
            check_extension(self._config.optimizer, self._config.training, recorded_steps=recorded, completed=completed)
            self._extended = {"training.steps": [recorded, steps]} if steps != recorded else None
            number = claim_run(self._run_dir)
            self._view = AttemptView(self._run_dir, record.run_id, number)  # claimed: a failure from here on is told
            self._attempt = Attempt(
                self._run_dir, record, number, self._config, bytes_per_token=self._corpora.bytes_per_token
            )

    def prepare(self) -> TrainingRun:
        """Builds the engine, restores the newest checkpoint and puts the loop's parts together; collective."""
        # megatron-core takes seconds to import: a refusal in open() need not wait for it
        with self._startup.phase("imports"):
            from megamask.engine.backend import init_process_group, select_backend
            from megamask.engine.engine import Engine

        config, corpora = self._config, self._corpora
        with self._startup.phase("engine"):
            backend = select_backend()
            init_process_group(backend)
            engine = Engine(
                spec=corpora.spec,
                objective=corpora.objective,
                optimizer=config.optimizer,
                layout=config.layout,
                training=config.training,
                seed=config.run.seed,
                compute=config.precision.compute,
            )
        view = self._share(engine)
        model = ModelDocument(
            spec=corpora.spec,
            vocabulary=corpora.vocabulary,
            objective=corpora.objective,
            tokenizer_digest=corpora.tokenizer_digest,
        )
        loaded = self._restore(engine, view, model, device=backend.name)
        return TrainingRun(
            config=config,
            engine=engine,
            loader=corpora.train,
            progress=self.progress,
            stop=StopFlag(
                engine,
                signals=self._signals,
                is_superseded=view.is_superseded,
                num_steps=config.training.steps,
                stop_after_step=config.training.stop_after_step,
            ),
            hooks=self._hooks(engine, view, model, loaded),
            shape=self._shape,
            token_seconds_at_peak=self._token_seconds_at_peak(backend.device, engine.world_size),
        )

    def _token_seconds_at_peak(self, device: torch.device, world_size: int) -> float | None:
        from megamask.engine.probes import device_name, peak_flops_per_second

        peak = peak_flops_per_second(device_name(device), self._config.precision.compute)
        if peak is None:
            return None
        flops = flops_per_token(self._corpora.spec, scored_fraction=self._shape.scored_fraction)
        return flops.training / (peak * world_size)

    def _share(self, engine: Engine) -> AttemptView:
        shared = engine.broadcast_object(
            (self._attempt.run_id, self._attempt.number) if self._attempt is not None else None
        )
        self._view = self._attempt or AttemptView(self._run_dir, *shared)
        return self._view

    def _restore(self, engine: Engine, view: AttemptView, model: ModelDocument, *, device: str) -> Loaded:
        """Loads the newest checkpoint that verifies."""
        with self._startup.phase("restore"):
            if self._attempt is not None:
                sweep(self._run_dir, view.number)
            corpora = self._corpora.train.corpus_ids
            owner = Owner(run_id=view.run_id, seed=self._config.run.seed, corpora=corpora)
            loaded = load(engine, self._run_dir, model=model, owner=owner)
        if loaded.state is not None:
            self.progress.step = loaded.state.step
            self.progress.consumed_samples = loaded.state.consumed_samples
            self.progress.consumed_tokens = loaded.state.consumed_tokens
        if self._attempt is not None:
            commit = loaded.commit
            self._attempt.started(
                world_size=engine.world_size,
                device=device,
                datasets=described_datasets({"train": self._corpora.train, "validation": self._corpora.validation}),
                resumed=None
                if commit is None
                else {"step": commit.step, "checkpoint": commit.folder.name, "digest": commit.digest},
                extended=self._extended,
                startup_s=self._startup.seconds(),
            )
            if commit is not None and not is_announced(self._run_dir, commit):
                self._attempt.append("checkpoint_committed", **commit_record(commit, stall_s=None, save_s=None))
            for incident in loaded.incidents:
                self._attempt.append("incident", **incident)
            self._attempt.running(self.progress.step)
        return loaded

    def _hooks(self, engine: Engine, view: AttemptView, model: ModelDocument, loaded: Loaded) -> list[Hook]:
        config, corpora, attempt = self._config, self._corpora, self._attempt
        measure = (
            None
            if corpora.validation is None
            else validation_measure(config, engine, corpora.objective, corpora.validation)
        )
        preview = (
            None if corpora.previews is None else preview_on_engine(config, engine, corpora.objective, corpora.previews)
        )
        committer = CheckpointCommitter(
            engine,
            view,
            config.checkpoint,
            model=model,
            tokenizer_folder=corpora.tokenizer_folder,
            corpora=corpora.train.corpus_ids,
            seed=config.run.seed,
            num_steps=config.training.steps,
            parent=loaded.commit.digest if loaded.commit is not None else None,
        )
        self._committer = committer
        if loaded.commit is not None:
            committer.prune_before_training(loaded.commit)
        evaluation = PeriodicEvaluation(view, config.evaluation, measure)
        hooks: list[Hook] = [
            StepJournal(view),
            evaluation,
            PeriodicPreview(view, config.preview.every_steps, preview),
            PeriodicCheckpoint(
                config.checkpoint, committer, bound_at=evaluation.bound_at, committed_step=self.progress.step
            ),
        ]
        if attempt is not None:
            hooks.append(StatusFile(attempt.running))
        return hooks

    def close(self, reason: StopReason) -> None:
        """The attempt ended as all ranks agreed."""
        from megamask.engine.backend import destroy_process_group

        if self._attempt is not None:
            self._attempt.close(reason, self.progress)
        destroy_process_group()

    def failed(self, error: BaseException) -> BaseException:
        """Leaves the rank's last words and returns the error to raise: a peer's, when that one says more."""
        if isinstance(error, KeyboardInterrupt | SystemExit):
            return error
        if isinstance(error, OSError):
            error = typed(error)
        cause = error
        code = int(error.exit_code) if isinstance(error, MegamaskError) else int(ExitCode.BUG)
        known = self._view
        if known is None:
            return error
        number = known.number
        peer, is_lost = None, has_lost_peer(error)
        if code == ExitCode.BUG:
            peer = peer_failure(self._run_dir, number, self._rank, is_lost=is_lost)
        if peer is not None:
            error, code = peer, int(peer.exit_code)
        else:
            error = MegamaskError(LOST_PEER, hint=LOST_PEER_HINT) if is_lost else error
            write_rank_failure(self._run_dir, number, rank=self._rank, exit_code=code, reason=reason_of(error))
        if self._committer is not None:  # after the rank's last words: a launcher waits only so long for its end
            end_saving(self._committer, cause)
        if self._attempt is not None:
            self._attempt.fail(error, code, self.progress)
        elif self._rank == 0:
            tell_failure(known, error, code)
        return error
