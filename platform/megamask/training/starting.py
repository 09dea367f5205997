"""The start of a run from `initialise.source`: what is checked before the claim, what is recorded, what is loaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from megamask.checkpoint.reader import candidates
from megamask.config.schema.initialise import InitialiseConfig
from megamask.conversion.source import (
    AdaptedWeights,
    check_network,
    check_tokenizer,
    choose_mask_row,
    open_source,
)
from megamask.data.tokenizer import CorpusTokenizer
from megamask.errors import UsageError
from megamask.models.spec import ModelSpec
from megamask.models.vocabulary import Vocabulary
from megamask.objectives.base import Objective
from megamask.objectives.registry import build_phases
from megamask.objectives.schedule import Phases
from megamask.objectives.shapes import name_of
from megamask.objectives.warm_start import eased
from megamask.runs.layout import record_path
from megamask.runs.record import read_run


@dataclass(frozen=True, kw_only=True)
class Start:
    """Origin of a run's first weights.

    Args:
        record: of run.json and the journal: source, digest, family, target_shift (of the source) and mask_row (kept,
            mean, or the id that is copied).
        weights: None where the run has a checkpoint already, so that the source is not needed any more.
    """

    record: Mapping[str, Any]
    weights: AdaptedWeights | None

    @property
    def source_shifts(self) -> bool:
        """True if the source's logits predict the next token."""
        return bool(self.record["target_shift"])


def open_start(
    source_name: str,
    initialise: InitialiseConfig,
    *,
    spec: ModelSpec,
    vocabulary: Vocabulary,
    tokenizer: CorpusTokenizer,
    run_dir: Path,
) -> Start:
    """Open the source of a run that has not begun; a begun one has it on record.

    Args:
        source_name: initialise.source.

    Raises:
        UsageError: the source does not fit the network or the corpus, is not the recorded one, or cannot be used.
        DataIntegrityError, CheckpointIntegrityError: the source is damaged.
    """
    recorded = read_run(run_dir).content.get("parent_checkpoint") if record_path(run_dir).exists() else None
    if recorded and candidates(run_dir):
        return Start(record=recorded, weights=None)
    source = open_source(source_name)
    check_network(source, spec)
    check_tokenizer(source, tokenizer, allows_other=initialise.allow_other_tokenizer)
    if initialise.shift_until_step is not None and not source.has_shift:
        raise UsageError(
            f"initialise.shift is {initialise.shift}, but the logits of {source.name} do not predict the next token; "
            "allowed: keep, drop. Nothing was started."
        )
    mask_row = choose_mask_row(initialise.mask_row, source, vocabulary.mask_token_id, tokenizer)
    record = {
        "source": source.name,
        "digest": source.digest,
        "family": source.family,
        "target_shift": source.has_shift,
        "mask_row": mask_row.to_text(),
    }
    if recorded and recorded["digest"] != source.digest:
        raise UsageError(
            f"initialise.source {source.name} has digest {source.digest}, but this run was begun with "
            f"{recorded['digest']}. Nothing was started.",
            hint="restore the source, or choose another run.name",
        )
    weights = AdaptedWeights(source=source, mask_token_id=vocabulary.mask_token_id, mask_row=mask_row)
    return Start(record=record, weights=weights)


def verify_source(weights: AdaptedWeights) -> None:
    """Read every byte of a checkpoint that a run starts from; on one rank.

    Raises:
        CheckpointIntegrityError: it is damaged.
    """
    weights.source.verify()


def run_objective(
    phases: Phases,
    initialise: InitialiseConfig,
    *,
    source_shifts: bool,
    vocabulary: Vocabulary,
    information: Callable[[], Tensor] | None = None,
) -> Objective:
    """The objective of a run, with what eases its first steps.

    Args:
        phases: of the config.
        source_shifts: whether the logits of `initialise.source` predict the next token.
        information: as in `build_phases`.
    """
    easing = initialise.easing()
    if warmup := easing.pop("mask_ratio_warmup_steps", 0):
        phases = [(first, settings | {"mask_ratio_warmup_steps": warmup}) for first, settings in phases]
    until = initialise.shift_until_step
    is_next_token = any(name_of(settings) == "autoregressive" for _, settings in phases)
    keeps = source_shifts and initialise.shift != "drop" and not is_next_token
    shift: bool | int = False if not keeps else True if until is None else until
    return eased(build_phases(phases, vocabulary, information=information), shift=shift, **easing)
