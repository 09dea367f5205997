"""A run directory that tells a whole story by the real writers: two attempts, repeated steps, commits; no training."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

from megamask.checkpoint.commit import Commit
from megamask.checkpoint.contents import ModelDocument, TrainerState
from megamask.checkpoint.retention import remove_committed
from megamask.checkpoint.saver import save
from megamask.config.load import load_train_config
from megamask.config.schema.roots import TrainConfig
from megamask.data.content import batch_digest
from megamask.data.manifest import Manifest
from megamask.models.spec import ModelSpec
from megamask.models.vocabulary import Vocabulary
from megamask.runs.claims import claim
from megamask.runs.configs import store_attempt_config
from megamask.runs.record import RunRecord, open_run
from megamask.runs.status import Status, write_status
from megamask.tracking.journal.writer import Journal
from megamask.training.batch_size import batch_size_at, consumed_before
from megamask.training.checkpointing import commit_record
from megamask.training.schedules import learning_rate
from support.objectives import masked_objective
from support.thread_world import ThreadWorld
from support.tiny_run import CONFIG, SEED, InitialWeights

RAMP = "{batch_size_ramp_start: 2, batch_size_ramp_increment: 1, batch_size_ramp_samples: 4}"


class JournalledRun:
    """Writes what training writes, line by line, without a network.

    Attempt 1 takes steps 1 to 5 and commits 2 and 4, then dies. Attempt 2 goes on from 4, repeats step 5, takes step 6,
    commits it, prunes 2 and completes the run.
    """

    def __init__(self, folder: Path, corpus: Path, *, rotate_bytes: int = 2**20) -> None:
        self.corpus = corpus
        self.manifest = Manifest.load(corpus)
        length = self.manifest.sequence_length
        text = CONFIG.format(folder=folder, corpus=corpus, seed=SEED, step=6, length=length)
        text = text.replace("training: {", "training: {" + RAMP[1:-1] + ", ")
        (folder / "config.yaml").write_text(text)
        self.config: TrainConfig = load_train_config(folder / "config.yaml").config
        self.run_dir = folder / "run"
        self.record: RunRecord = open_run(
            self.run_dir,
            self.config,
            corpora={"main": self.manifest.corpus_id},
            tokenizer_digest=self.manifest.tokenizer_digest,
            code_version="test",
        )
        self._rotate_bytes = rotate_bytes
        self.journal: Journal
        self.number = 0
        self.parent: Commit | None = None

    def start(self, resumed: Commit | None) -> None:
        """A new attempt."""
        self.number = claim(self.run_dir, known_attempt=self.number)
        store_attempt_config(self.run_dir, self.number, self.config)
        self.journal = Journal.open(self.run_dir, self.number, rotate_bytes=self._rotate_bytes)
        self.parent = resumed
        if self.journal.head[0] == 0:
            self.journal.append(
                "run_started",
                run_id=self.record.run_id,
                corpora=dict(self.record.content["corpora"]),
                run_sha256=self.record.sha256,
            )
        told = None
        if resumed is not None:
            told = {"step": resumed.step, "checkpoint": resumed.folder.name, "digest": resumed.digest}
        self.journal.append(
            "attempt_started",
            attempt=self.number,
            run_id=self.record.run_id,
            host="here",
            world_size=1,
            code_version="test",
            run_sha256=self.record.sha256,
            device="cpu",
            resumed_from=told,
            extended=None,
        )

    def step(self, step: int, **changes: Any) -> None:
        """One step line by the laws."""
        begin = consumed_before(step, self.config.training)
        size = batch_size_at(begin, self.config.training)
        tokens = (begin + size) * self.manifest.sequence_length
        eligible = size * self.manifest.sequence_length
        fields = {
            "step": step,
            "loss": 5.0 - step / 10,
            "loss_terms": {"nelbo": 5.0 - step / 10},
            "nelbo_nats_per_token": 5.0 - step / 10,
            "learning_rate": learning_rate(step, self.config.optimizer, self.config.training),
            "global_batch_size": size,
            "consumed_samples": begin + size,
            "consumed_tokens": tokens,
            "processed_tokens": 2 * tokens,
            "masked_tokens": eligible // 3,
            "masked_tokens_by_noise_level": [eligible - 9, *[1] * 9],
            "batch_digest": batch_digest(begin, size),
            "content_digest": hashlib.sha256(f"{step}".encode()).hexdigest()[:16],
        }
        self.journal.append("step", **{**fields, **changes})

    def commit(self, step: int, *, is_told: bool = True, evaluation: dict[str, str] | None = None) -> Commit:
        """A checkpoint with its two lines; without the second one if the process dies first."""
        self.journal.append("checkpoint_started", step=step)
        spec = ModelSpec.from_config(self.config.model, self.manifest.vocab_size, self.manifest.sequence_length)
        engine = InitialWeights(ThreadWorld(1), 0)
        engine.spec = spec
        manifest, samples = self.manifest, consumed_before(step + 1, self.config.training)
        vocabulary = Vocabulary(
            vocab_size=manifest.vocab_size,
            padded_vocab_size=spec.padded_vocab_size,
            mask_token_id=manifest.mask_token_id,
            eod_token_id=manifest.eod_token_id,
            pad_token_id=manifest.pad_token_id,
        )
        commit = save(
            engine,
            self.run_dir,
            attempt=self.number,
            state=TrainerState(
                step=step,
                consumed_samples=samples,
                consumed_tokens=samples * manifest.sequence_length,
                seed=SEED,
                schedule={"training_steps": 6},
            ),
            model=ModelDocument(
                spec=spec,
                vocabulary=vocabulary,
                objective=masked_objective(vocabulary),
                tokenizer_digest=manifest.tokenizer_digest,
            ),
            tokenizer_folder=self.corpus / "tokenizer",
            corpora={"main": manifest.corpus_id},
            journal_head=self.journal.head,
            run_id=self.record.run_id,
            parent=self.parent.digest if self.parent else None,
            check_claim=lambda: None,
            evaluation=evaluation,
            run_sha256=self.record.sha256,
        )
        if is_told:
            self.tell(commit)
        self.parent = commit
        return commit

    def tell(self, commit: Commit, **changes: Any) -> None:
        """The line of a commit."""
        record = replace(commit_record(commit, stall_s=0.1, save_s=0.2), **changes)
        self.journal.append(record.kind, **record.to_json())

    def prune(self, commit: Commit, at: int) -> None:
        """Removes a checkpoint and says so."""
        remove_committed(commit.folder)
        self.journal.append("checkpoint_pruned", step=at, checkpoint=commit.folder.name)

    def end(self, step: int, *, phase: str = "done", exit_code: int = 0) -> None:
        """The last words of the attempt."""
        self.journal.append(
            "attempt_ended", attempt=self.number, phase=phase, exit_code=exit_code, step=step, reason="so it ended"
        )
        status = Status(attempt=self.number, phase=phase, exit_code=exit_code, step=step, reason="so it ended")  # type: ignore[arg-type]
        write_status(self.run_dir, status)

    def complete(self, step: int) -> None:
        """All steps are done."""
        self.end(step)
        tokens = consumed_before(step + 1, self.config.training) * self.manifest.sequence_length
        self.journal.append("run_completed", step=step, consumed_tokens=tokens)


def write_journalled_run(folder: Path, corpus: Path, *, rotate_bytes: int = 2**20) -> Path:
    """The whole story of `JournalledRun`; returns the run directory."""
    run = JournalledRun(folder, corpus, rotate_bytes=rotate_bytes)
    run.start(None)
    run.step(1)
    run.step(2)
    first = run.commit(2)
    run.journal.incident("mlflow_outage", "MLflow takes nothing")
    run.step(3)
    run.step(4)
    second = run.commit(4)
    run.step(5)
    run.journal.close()
    run.start(second)
    run.step(5)
    run.step(6)
    run.journal.append("evaluation", step=6, nelbo_nats_per_token=4.4, standard_error=0.1)
    run.commit(6, evaluation={"nelbo_nats_per_token": "4.4", "standard_error": "0.1"})
    run.prune(first, 6)
    run.complete(6)
    run.journal.close()
    return run.run_dir
