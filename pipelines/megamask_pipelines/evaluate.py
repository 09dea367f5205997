"""The job of `megamask evaluate`: the likelihood bound of a checkpoint on text files or on a corpus split."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megamask.audit.corpora import corpus_to_score, score_of
from megamask.checkpoint.standalone import LoadedCheckpoint, load_checkpoint
from megamask.diffusion.philox import run_key
from megamask.errors import UsageError
from megamask.evaluation.likelihood import evaluate_rows
from megamask.evaluation.objective import refuse_leaks, scored_objective
from megamask.evaluation.reference_network import ReferenceScore
from megamask.evaluation.request import EvaluationRequest
from megamask.evaluation.rows import split_rows, text_rows, token_id_rows
from megamask.objectives.base import never_written
from megamask.objectives.given_first import given_first

_BATCH_TOKENS = 8192
_NOTHING = "Nothing was scored."


def evaluate(path: Path, request: EvaluationRequest) -> dict[str, Any]:
    """Score a run's newest checkpoint, or the checkpoint folder that is named.

    Returns: nelbo_nats_per_token, exact (whether that is the likelihood itself), objective, standard_error,
        bits_per_byte, num_tokens, num_bytes, num_samples; checkpoint, digest, step, draws, replicates, seed.
    Raises:
        UsageError: path, files, corpus or numbers are not usable. DataIntegrityError: a text or corpus is damaged.
        CheckpointIntegrityError: the checkpoint does not verify.
    """
    if request.rows is not None and request.rows < 1:
        raise UsageError(f"--rows is {request.rows}; allowed: >= 1. {_NOTHING}")
    checkpoint = load_checkpoint(path)
    seed = checkpoint.state.seed if request.seed is None else request.seed
    if not 0 <= seed < 1 << 64:
        raise UsageError(f"--seed is {seed}; allowed: 0 to 2^64 - 1. {_NOTHING}")
    tokens, is_eligible = _rows(checkpoint, request)
    objective = scored_objective(checkpoint.objective, request.objective, checkpoint.model.vocabulary)
    refuse_leaks(checkpoint.model.spec, objective)
    checkpoint.require_mask(objective)
    bound = given_first(objective.bound, objective) if request.given_first else objective.bound
    scored, is_text = tokens[bound.scored(tokens, is_eligible)], request.token_ids is None
    network, device = checkpoint.network()
    num_bytes = int(torch.tensor(checkpoint.tokenizer.token_bytes)[scored].sum()) if is_text else None
    not_noise = never_written(objective.vocabulary)
    report = evaluate_rows(
        ReferenceScore(network=network, excluded_ids=objective.excluded_ids, not_noise=not_noise),
        bound,
        tokens.to(device),
        is_eligible.to(device),
        torch.arange(len(tokens), device=device),
        draws=request.draws,
        replicates=request.replicates,
        key=run_key(seed),
        batch_rows=max(1, _BATCH_TOKENS // tokens.shape[1]),
        num_bytes=num_bytes,
    )
    return {
        "nelbo_nats_per_token": report.nelbo_nats_per_token,
        "exact": bound.is_exact,
        "standard_error": report.standard_error,
        "bits_per_byte": report.bits_per_byte,
        "num_tokens": report.num_tokens,
        "num_bytes": report.num_bytes,
        "num_samples": report.num_samples,
        "checkpoint": str(checkpoint.commit.folder),
        "digest": checkpoint.commit.digest,
        "step": checkpoint.commit.step,
        "objective": objective.name,
        "draws": report.num_draws,
        "replicates": report.num_replicates,
        "seed": seed,
    }


def _rows(checkpoint: LoadedCheckpoint, request: EvaluationRequest) -> tuple[Tensor, Tensor]:
    """Return (tokens int64 [n, s], is_eligible bool [n, s]) of the rows to score."""
    vocabulary, length = checkpoint.model.vocabulary, checkpoint.model.spec.max_sequence_length
    if request.token_ids is not None:
        tokens = token_id_rows(request.token_ids, vocabulary.vocab_size)[: request.rows]
    elif request.texts:
        tokens = text_rows(request.texts, checkpoint.tokenizer, length)[: request.rows]
    else:
        folder, manifest = corpus_to_score(checkpoint.commit, request.corpus)
        digest = checkpoint.model.tokenizer_digest
        return split_rows(
            folder,
            manifest,
            request.split,
            tokenizer_digest=digest,
            sequence_length=length,
            rows=request.rows,
            score=score_of(checkpoint.commit) if request.score is None else request.score,
        )
    return tokens, tokens != vocabulary.pad_token_id
