"""The exact samples of one training step, recomputed from the run directory and the corpus alone.

Nothing here asks how training went: the order law names the rows, the noise law names the masks, and run.json holds
every number that both need.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from megamask.config.load import load_stored_config
from megamask.config.schema.data import DataConfig
from megamask.config.schema.initialise import InitialiseConfig
from megamask.config.schema.objective import ObjectiveConfig
from megamask.config.schema.roots import TrainConfig
from megamask.config.schema.training import TrainingConfig
from megamask.data.content import add_content, batch_digest, content_digest
from megamask.data.loader import Loader
from megamask.data.order import ORDER_LAW_VERSION
from megamask.data.row_batch import Row
from megamask.data.skipped import SkippedSamples
from megamask.diffusion.philox import NOISE_LAW_VERSION, run_key
from megamask.errors import CheckpointIntegrityError, DataIntegrityError, UsageError
from megamask.models.vocabulary import Vocabulary
from megamask.objectives.base import Objective, Samples
from megamask.objectives.schedule import phases_of
from megamask.runs.configs import attempt_configs
from megamask.runs.layout import configs_folder
from megamask.runs.record import read_run
from megamask.runs.skips import Rewind, read_rewinds, rewinds_before
from megamask.tracking.journal.seek import find_step, find_step_and_attempt
from megamask.training.batch_size import batch_size_at, consumed_before, first_step
from megamask.training.rewinding import skipped_by
from megamask.training.starting import run_objective

_COMPARED = ("batch_digest", "content_digest", "masked_tokens", "scored_tokens")


@dataclass(frozen=True, kw_only=True)
class RecordedRun:
    """Data and noise of a run, from its directory."""

    folder: Path
    identity: Mapping[str, Any]  # flat dotted keys
    corpus_ids: Mapping[str, str | None]  # None for a corpus that was added later
    steps: int  # training.steps of the newest attempt
    corpora: Mapping[str, str]  # name -> folder, of the newest attempt
    mixture: Sequence[dict[str, Any]] = ()  # of the newest attempt
    quarantine: Sequence[str] = ()  # of the newest attempt
    rewinds: Sequence[Rewind] = ()

    def skipped_at(self, attempt: int) -> SkippedSamples:
        """The sample indices that an attempt leaves out."""
        return skipped_by(rewinds_before(self.rewinds, attempt))

    @property
    def skipped(self) -> SkippedSamples:
        """The sample indices that the next attempt leaves out."""
        return skipped_by(list(self.rewinds))

    def value(self, key: str) -> Any:
        """One identity field.

        Raises:
            UsageError: run.json does not hold it.
        """
        if key not in self.identity:
            raise UsageError(f"{self.folder / 'run.json'} has no identity field {key}. Nothing was recomputed.")
        return self.identity[key]


def recorded_run(folder: Path, corpora: Mapping[str, str] | None = None) -> RecordedRun:
    """Read run.json and the newest resolved config of a run directory.

    Args:
        folder: the run directory.
        corpora: name -> folder, for corpora that have moved since.

    Raises:
        UsageError: no run directory, or one of a law that this version does not know.
        CheckpointIntegrityError: run.json or the newest resolved config is damaged.
    """
    content = read_run(folder).content
    for law, known in (("order", ORDER_LAW_VERSION), ("noise", NOISE_LAW_VERSION)):
        if content["laws"].get(law) != known:
            raise UsageError(
                f"{folder / 'run.json'} was written under version {content['laws'].get(law)} of the {law} law; "
                f"this megamask knows version {known}. Nothing was recomputed.",
                hint="use the version of megamask that made the run",
            )
    config = _newest_config(folder)
    corpus_ids = dict.fromkeys(config.data.corpora) | dict(content["corpora"])
    unknown = sorted(set(corpora or {}) - set(corpus_ids))
    if unknown:
        raise UsageError(
            f"--corpus names {unknown[0]}, which the run does not have; allowed: {', '.join(corpus_ids)}. "
            "Nothing was recomputed."
        )
    return RecordedRun(
        folder=folder,
        identity=content["identity"],
        corpus_ids=corpus_ids,
        steps=config.training.steps,
        corpora={name: (corpora or {}).get(name) or config.data.corpora.get(name, "") for name in corpus_ids},
        mixture=config.data.mixture,
        quarantine=config.data.quarantine,
        rewinds=read_rewinds(folder),
    )


def _newest_config(folder: Path) -> TrainConfig:
    configs = attempt_configs(folder)
    if not configs:
        raise UsageError(
            f"{configs_folder(folder)} holds no attempt-NNNN.yaml. Nothing was recomputed.",
            hint="restore the run directory; the newest resolved config names the corpora and the steps",
        )
    path = configs[max(configs)]
    try:
        return load_stored_config(path)
    except UsageError as error:
        raise CheckpointIntegrityError(
            f"{path}, which the run wrote, cannot be read: {error.message}",
            hint="restore the file from a copy; or remove it, so that the config of the attempt before is taken",
        ) from error


def open_loader(run: RecordedRun) -> Loader:
    """Open the training split of a run's corpus, which must be the one that was recorded.

    Raises:
        UsageError: the corpus is missing at the path of the newest config or of --corpus.
        DataIntegrityError: it is another corpus, or damaged.
    """
    data = DataConfig(
        corpora=dict(run.corpora),
        seed=run.value("data.seed"),
        shuffle_window_blocks=run.value("data.shuffle_window_blocks"),
        score=run.identity.get("data.score", "all"),
        mixture=list(run.mixture),
        quarantine=list(run.quarantine),
    )
    try:
        loader = Loader(data.corpora, data, run.value("training.sequence_length"))
    except UsageError as error:
        names = " ".join(f"--corpus {name}=FOLDER" for name in run.corpora)
        raise UsageError(error.message, hint=f"name the present folder of the run's corpus: {names}") from error
    for name, corpus_id in loader.corpus_ids.items():
        if run.corpus_ids[name] not in (None, corpus_id):
            loader.close()
            raise DataIntegrityError(
                f"data.corpora.{name} ({run.corpora[name]}) is corpus {corpus_id}, but the run was made with "
                f"{run.corpus_ids[name]}. Nothing was recomputed.",
                hint=f"give the recorded corpus: --corpus {name}=FOLDER",
            )
    loader.leave_out(run.skipped)
    return loader


def check_step(run: RecordedRun, step: int) -> None:
    """Refuse a step that the run does not have, before its corpus is opened.

    Raises:
        UsageError: names the steps that there are.
    """
    if not 1 <= step <= run.steps:
        raise UsageError(
            f"--step is {step}; allowed: 1 to {run.steps} (training.steps of {run.folder}). Nothing was recomputed."
        )


def inspect_step(run: RecordedRun, loader: Loader, step: int) -> dict[str, Any]:
    """Samples, documents, noise levels and masks of one step, in batch order.

    Args:
        run: of `recorded_run`.
        loader: of `open_loader`.
        step: 1-based.

    Returns:
        The object that `megamask inspect --json` prints.

    Raises:
        UsageError: the run has no such step.
        DataIntegrityError: a row is damaged, or the journal of the run holds other digests for this step.
    """
    check_step(run, step)
    seed, training = int(run.value("run.seed")), batches(run)
    if (taken := find_step_and_attempt(run.folder, step)) is not None:  # maybe before a rewind
        loader.leave_out(run.skipped_at(taken[0]))
    position = consumed_before(step, training)
    batch_size = batch_size_at(position, training)
    indices = [index for each in loader.skipped.segments(position, batch_size) for index in each]
    objective = _objective(run, loader)
    samples: list[dict[str, Any]] = []
    hashes: list[int] = []
    for place, (index, (source, row)) in enumerate(zip(indices, loader.rows(position, batch_size), strict=True)):
        content = loader.read(source, row)
        drawn = _sample(loader, content, index, place=place, global_batch_size=batch_size)
        num_padding = int((drawn.tokens == loader.manifest.pad_token_id).sum())
        [details] = objective.details(objective.seen(drawn, run_key(seed)), step, run_key(seed))
        samples.append(
            {"sample_index": index, "source": source, "row": row} | _described(content, drawn, num_padding) | details
        )
        hashes.append(loader.content_hash(index, source, row, content))
    objective = objective.at(step)
    report = {
        "step": step,
        "seed": seed,
        "samples": samples,
        "batch_digest": batch_digest(position, batch_size, loader.skipped),
        "content_digest": content_digest(add_content(*hashes)),
        "masked_tokens": sum(len(sample.get("masked", ())) for sample in samples),
    }
    if objective.shape(len(samples[0]["tokens"])).corrupts == "none":
        report["scored_tokens"] = sum(len(sample["scored"]) for sample in samples)
    return report | {"matches_journal": _compare_with_journal(run.folder, report)}


def content_digest_of(run: RecordedRun, loader: Loader, step: int) -> str:
    """Return the content digest of a step, from the corpus alone and what the loader leaves out.

    Raises:
        DataIntegrityError: a row is damaged.
    """
    training = batches(run)
    position = consumed_before(step, training)
    size = batch_size_at(position, training)
    indices = [index for each in loader.skipped.segments(position, size) for index in each]
    hashes = []
    for index, (source, row) in zip(indices, loader.rows(position, size), strict=True):
        content = loader.read(source, row)
        hashes.append(loader.content_hash(index, source, row, content))
    return content_digest(add_content(*hashes))


def batches(run: RecordedRun) -> TrainingConfig:
    """The settings that the size of a batch depends on; runs of older versions know no ramp."""
    return TrainingConfig(
        steps=run.steps,
        sequence_length=int(run.value("training.sequence_length")),
        global_batch_size=int(run.value("training.global_batch_size")),
        batch_size_ramp_start=run.identity.get("training.batch_size_ramp_start"),
        batch_size_ramp_increment=run.identity.get("training.batch_size_ramp_increment"),
        batch_size_ramp_samples=run.identity.get("training.batch_size_ramp_samples"),
    )


def _objective(run: RecordedRun, loader: Loader) -> Objective:
    """The objective that the run was started with; a key that an older version did not record has its default."""
    manifest = loader.manifest
    recorded = _recorded_section(run, "objective.", ObjectiveConfig)
    vocabulary = Vocabulary(
        vocab_size=manifest.vocab_size,
        padded_vocab_size=manifest.vocab_size,
        mask_token_id=manifest.mask_token_id,
        eod_token_id=manifest.eod_token_id,
        pad_token_id=manifest.pad_token_id,
    )
    settings = ObjectiveConfig(**recorded).settings(
        isolate_documents=bool(run.identity.get("data.isolate_documents", False))
    )
    training = batches(run)
    phases = phases_of(settings, training.sequence_length, lambda amount, unit: first_step(amount, unit, training))
    parent = read_run(run.folder).content.get("parent_checkpoint") or {}
    return run_objective(
        phases,
        InitialiseConfig(**_recorded_section(run, "initialise.", InitialiseConfig)),
        source_shifts=bool(parent.get("target_shift")),
        vocabulary=vocabulary,
        information=loader.token_information,
    )


def _recorded_section(run: RecordedRun, prefix: str, section: type) -> dict[str, Any]:
    """The recorded keys of a section, without those that this version does not know."""
    known = {field.name for field in fields(section)}
    found = {name.removeprefix(prefix): value for name, value in run.identity.items() if name.startswith(prefix)}
    return {name: value for name, value in found.items() if name in known}


def _sample(loader: Loader, content: Row, index: int, *, place: int, global_batch_size: int) -> Samples:
    tokens = torch.from_numpy(content.tokens.astype("int64"))[None]
    return Samples(
        tokens=tokens,
        is_eligible=loader.eligible([content]),
        sample_index=torch.tensor([index]),
        batch_position=[place],
        global_batch_size=global_batch_size,
    )


def _document(start: int, number: int) -> dict[str, Any]:
    """One document of a row, or one segment of a conversation."""
    if number >= 0:
        return {"start": start, "number": number}
    return {"start": start, "number": -number - 1, "answer": True}


def _described(content: Row, drawn: Samples, num_padding: int) -> dict[str, Any]:
    return {
        "tokens": drawn.tokens[0].tolist(),
        "num_padding": num_padding,
        "documents": [_document(start, number) for start, number in content.documents.tolist()],
    }


def _compare_with_journal(folder: Path, report: Mapping[str, Any]) -> bool | None:
    """True where the journal's line of the step holds the same digests and count, None where it has no such line.

    Raises:
        DataIntegrityError: it holds others.
    """
    recorded = find_step(folder, report["step"])
    if recorded is None:
        return None
    for name in _COMPARED:
        if name in recorded and recorded[name] != report.get(name):
            raise DataIntegrityError(
                f"step {report['step']}: recomputed {name} is {report[name]}, the journal of {folder} has "
                f"{recorded[name]}. The samples or masks are not those that the run was trained on.",
                hint="one of corpus, run.json and journal was changed; `megamask verify corpus` checks the first",
            )
    return True
