"""A run of two attempts, repeated steps and commits: the real training code on an engine without a network."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from megamask.checkpoint.commit import Commit, load_commit
from megamask.checkpoint.contents import ModelDocument, read_state
from megamask.checkpoint.loader import Loaded
from megamask.checkpoint.reader import candidates
from megamask.config.load import load_train_config
from megamask.config.schema.roots import TrainConfig
from megamask.data.loader import Batch
from megamask.engine.step import StepReport
from megamask.provenance.record import code_version
from megamask.resilience.numerics import NumericsGuard
from megamask.runs.claims import claim
from megamask.runs.configs import store_attempt_config
from megamask.runs.record import RunRecord, open_run
from megamask.tracking.journal.writer import Journal
from megamask.tracking.records import AttemptStarted, CheckpointCommitted, Evaluation, JournalRecord
from megamask.training.attempt import Attempt
from megamask.training.checkpointing import CheckpointCommitter
from megamask.training.guarding import StepGuard
from megamask.training.hooks import StepJournal
from megamask.training.loop import TrainingRun, train
from megamask.training.progress import Progress
from megamask.training.run_data import RunData
from megamask.training.stopping import StopReason
from support.thread_world import ThreadWorld
from support.tiny_run import CONFIG, SEED, InitialWeights

RAMP = "{batch_size_ramp_start: 2, batch_size_ramp_increment: 1, batch_size_ramp_samples: 4}"
STEPS = 6


class FakeEngine(InitialWeights):
    """An engine whose network is always the initial one: the loss of a step is a function of its number."""

    def __init__(self, data: RunData) -> None:
        super().__init__(ThreadWorld(1), 0)
        self.spec = data.spec

    def members(self, global_batch_size: int) -> list[int]:
        return list(range(global_batch_size))

    def step(self, batch: Batch, *, step: int, learning_rate: float, accepts: Any = None) -> StepReport:
        loss, num_eligible = 5.0 - step / 10, int(batch.is_eligible.sum())
        return StepReport(
            loss=loss,
            loss_terms={"nelbo": loss},
            nelbo_nats_per_token=loss,
            grad_norm=1.0,
            is_finite=True,
            num_eligible=num_eligible,
            scored_tokens=num_eligible,
            masked_tokens=num_eligible // 3,
            masked_tokens_by_noise_level=[num_eligible - 9, *[1] * 9],
            loss_by_noise_level=[loss] * 10,
            content_sum=batch.content_sum,
            forward_backward_s=0.0,
            optimizer_s=0.0,
        )


class AfterStep:
    """A stop flag that lets one step pass."""

    def __init__(self, step: int) -> None:
        self._step = step

    def agreed(self, step: int) -> StopReason:
        return StopReason.NONE if step < self._step else StopReason.STOP_AFTER_STEP


class OneAttempt(Attempt):
    """Rank 0's attempt, which may leave out or falsify the lines of commits.

    Attributes:
        announces: False for a process that dies between COMMIT.json and the line of the commit.
        changes: fields that those lines get in place of the true ones.
    """

    announces = True
    changes: Mapping[str, Any] = {}

    def write(self, record: JournalRecord) -> None:
        if isinstance(record, AttemptStarted):
            record = replace(record, datasets=None)  # the config alone names the corpus, so that tests can move it
        if not isinstance(record, CheckpointCommitted):
            super().write(record)
        elif self.announces:
            super().write(replace(record, **self.changes))


class JournalledRun:
    """Training, step by step, on a fake engine; the caller decides when an attempt starts, commits and ends."""

    def __init__(self, folder: Path, corpus: Path, *, rotate_bytes: int = 2**20) -> None:
        self._stack = contextlib.ExitStack()
        text = CONFIG.format(folder=folder, corpus=corpus, seed=SEED, step=STEPS, length=32)
        text = text.replace("training: {", "training: {" + RAMP[1:-1] + ", ")
        (folder / "config.yaml").write_text(f"{text}checkpoint: {{asynchronous: false, keep_last: 2}}\n")
        self.config: TrainConfig = load_train_config(folder / "config.yaml").config
        self.data = RunData(self.config, self._stack)
        self.run_dir = folder / "run"
        self.record: RunRecord = open_run(
            self.run_dir,
            self.config,
            corpora=self.data.train.corpus_ids,
            tokenizer_digest=self.data.tokenizer_digest,
            code_version=code_version(),
        )
        self._rotate_bytes = rotate_bytes
        self._number = 0
        self.engine = FakeEngine(self.data)
        self.shape = self.data.objective.at(1).shape(self.config.training.sequence_length)
        self.attempt: OneAttempt
        self.progress: Progress
        self.committer: CheckpointCommitter

    @property
    def journal(self) -> Journal:
        return self.attempt.journal

    def start(self, resumed: Commit | None, **changes: Any) -> None:
        """A new attempt, from a commit or from nothing; `changes` falsify the line of a commit that it announces."""
        self._number = claim(self.run_dir, known_attempt=self._number)
        tracking = replace(self.config.tracking, mlflow=replace(self.config.tracking.mlflow, enabled=False))
        untracked = replace(self.config, tracking=tracking)
        self.attempt = OneAttempt(
            self.run_dir, self.record, self._number, untracked, recorded_steps=STEPS, bytes_per_token=None
        )
        self.journal._rotate_bytes = self._rotate_bytes
        store_attempt_config(self.run_dir, self._number, self.config)
        self.progress = Progress(num_views=self.shape.num_views)
        state = None if resumed is None else read_state(resumed.folder)
        if state is not None:
            self.progress.step, self.progress.consumed_samples = state.step, state.consumed_samples
            self.progress.consumed_tokens = state.consumed_tokens
        self.committer = CheckpointCommitter(
            self.engine,  # type: ignore[arg-type]
            self.attempt,
            self.config.checkpoint,
            model=ModelDocument(
                spec=self.data.spec,
                vocabulary=self.data.vocabulary,
                objective=self.data.objective,
                tokenizer_digest=self.data.tokenizer_digest,
            ),
            tokenizer_folder=self.data.tokenizer_folder,
            corpora=self.data.train.corpus_ids,
            seed=SEED,
            num_steps=STEPS,
            parent=None if resumed is None else resumed.digest,
        )
        loaded = Loaded(commit=resumed, state=state, incidents=[])
        self.attempt.changes = changes
        self.attempt.started(
            self.data,
            loaded,
            world_size=1,
            machine={"device": "cpu", "layers": "local", "fp8": "none"},
            startup_s={"restore": 0.0},
        )
        self.attempt.changes = {}

    def step(self) -> None:
        """The next step, by the training loop."""
        train(
            TrainingRun(
                config=self.config,
                engine=self.engine,  # type: ignore[arg-type]
                loader=self.data.train,
                progress=self.progress,
                stop=AfterStep(self.progress.step + 1),  # type: ignore[arg-type]
                hooks=[StepJournal(self.attempt)],
                guard=StepGuard(
                    rules=NumericsGuard(self.config.resilience), recorder=self.attempt, rewind=lambda step, rule: "No. "
                ),
                shape_at=lambda step: self.shape,
                peak_seconds_per_token=lambda shape: None,
            )
        )

    def commit(self, *, is_announced: bool = True, evaluation: dict[str, float] | None = None) -> Commit:
        """A checkpoint of the present step, with its two lines; without the second if the process dies first."""
        self.attempt.announces = is_announced
        self.committer.commit(self.progress, evaluation)
        self.attempt.announces = True
        return load_commit(candidates(self.run_dir)[0])

    def complete(self) -> None:
        """All steps are done."""
        self.attempt.close(StopReason.FINISHED, self.progress)
        self.close()

    def die(self) -> None:
        """The process ends without a last line."""
        self.journal.close()

    def close(self) -> None:
        """Close the corpora."""
        self._stack.close()


def write_journalled_run(folder: Path, corpus: Path, *, rotate_bytes: int = 2**20) -> Path:
    """Write a complete run and return its directory.

    Attempt 1 takes steps 1 to 5, commits 2 and 4, then dies. Attempt 2 resumes from 4, repeats step 5, takes and
    evaluates step 6, commits it, which prunes 2, and completes the run.
    """
    run = JournalledRun(folder, corpus, rotate_bytes=rotate_bytes)
    run.start(None)
    run.step()
    run.step()
    run.commit()
    run.journal.incident("mlflow_outage", "MLflow takes nothing")
    run.step()
    run.step()
    second = run.commit()
    run.step()
    run.die()
    run.start(second)
    run.step()
    run.step()
    bound = {"nelbo_nats_per_token": 4.4, "standard_error": 0.1}
    run.attempt.write(Evaluation(step=6, **bound))
    run.commit(evaluation=bound)
    run.complete()
    return run.run_dir
