"""The job of `megamask evaluate`: the likelihood bound of a checkpoint on text files or on a corpus split."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megamask.data.corpus.pack import RowPacker, token_dtype
from megamask.data.manifest import Manifest, open_corpus
from megamask.data.reader import SplitReader
from megamask.data.tokenizer import CorpusTokenizer
from megamask.diffusion.philox import run_key
from megamask.errors import DataIntegrityError, UsageError
from megamask.evaluation.likelihood import evaluate_rows
from megamask.evaluation.reference_network import ReferenceScore
from megamask.objectives.base import GivenFirst, Objective
from megamask.objectives.registry import build_objective
from megamask_pipelines.checkpoint_loading import LoadedCheckpoint, load_checkpoint

SPLIT_ROWS = 64
_BATCH_TOKENS = 8192
_NOTHING = "Nothing was scored."


@dataclass(frozen=True, kw_only=True)
class EvaluationRequest:
    """Evaluation request.

    Args:
        texts: files, each one document; empty means a split.
        split: which split of the corpus. corpus: its folder; None means the run's own.
        rows: rows to score, from the first on; None means all of a text and the first 64 of a split.
        draws: masks per row in one replicate. replicates: independent replicates.
        seed: of the masks; None means run.seed.
        token_ids: a .npy file, int64 [n, L], in place of texts and splits: for checkpoints without a tokenizer.
        objective: score as this objective; None means the one that the model was trained for.
        given_first: leave out the first token of each row, as an autoregressive model must.
    """

    texts: Sequence[Path] = ()
    split: str = "validation"
    corpus: Path | None = None
    rows: int | None = None
    draws: int = 4
    replicates: int = 4
    seed: int | None = None
    token_ids: Path | None = None
    objective: str | None = None
    given_first: bool = False


def evaluate(path: Path, request: EvaluationRequest) -> dict[str, Any]:
    """Scores a run's newest checkpoint, or the checkpoint folder that is named.

    Returns: nelbo_nats_per_token, exact (whether that is the likelihood itself), objective, standard_error,
        bits_per_byte, num_tokens, num_bytes, num_samples, and what was scored with what: checkpoint, digest, step,
        draws, replicates, seed.
    Raises:
        UsageError: path, files, corpus or numbers are not usable. DataIntegrityError: a text is not UTF-8, a corpus is
        damaged. CheckpointIntegrityError: the checkpoint does not verify.
    """
    if request.rows is not None and request.rows < 1:
        raise UsageError(f"--rows is {request.rows}; allowed: >= 1. {_NOTHING}")
    checkpoint = load_checkpoint(path)
    seed = checkpoint.state.seed if request.seed is None else request.seed
    if not 0 <= seed < 1 << 64:
        raise UsageError(f"--seed is {seed}; allowed: 0 to 2^64 - 1. {_NOTHING}")
    tokens, is_eligible = _rows(checkpoint, request)
    objective = _objective(checkpoint, request)
    bound = GivenFirst(bound=objective.bound) if request.given_first else objective.bound
    scored = tokens[bound.scored(is_eligible)]
    network, device = checkpoint.network()
    report = evaluate_rows(
        ReferenceScore(network=network, excluded_ids=objective.excluded_ids),
        bound,
        tokens.to(device),
        is_eligible.to(device),
        torch.arange(len(tokens), device=device),
        draws=request.draws,
        replicates=request.replicates,
        key=run_key(seed),
        batch_rows=max(1, _BATCH_TOKENS // tokens.shape[1]),
        num_bytes=None
        if request.token_ids is not None
        else int(torch.tensor(checkpoint.tokenizer.token_bytes)[scored].sum()),
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
    """(tokens int64 [n, s], is_eligible bool [n, s]) of what is to be scored."""
    pad = checkpoint.model.vocabulary.pad_token_id
    if request.token_ids is not None:
        tokens = token_id_rows(request.token_ids, checkpoint.model.vocabulary.vocab_size)[: request.rows]
        return tokens, tokens != pad
    tokens = text_rows(checkpoint, request) if request.texts else split_rows(checkpoint, request)
    return tokens, tokens != pad


def _objective(checkpoint: LoadedCheckpoint, request: EvaluationRequest) -> Objective:
    trained = checkpoint.model.objective
    if request.objective is None or request.objective == trained.name:
        return trained
    settings = {"name": request.objective, "mask_logit": trained.record()["mask_logit"]}
    try:
        return build_objective(settings, checkpoint.model.vocabulary)
    except TypeError as error:
        raise UsageError(
            f"--objective is {request.objective}, but the model was trained as {trained.name} and does not record the "
            f"settings of {request.objective}; allowed: {trained.name}, autoregressive. {_NOTHING}"
        ) from error


def token_id_rows(path: Path, vocab_size: int) -> Tensor:
    """Rows of token ids [n, L] int64 from a .npy file.

    Raises:
        UsageError: it cannot be read, has another shape or type, or an id outside the vocabulary.
    """
    try:
        ids = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UsageError(f"--token-ids {path} cannot be read as a .npy file: {error}. {_NOTHING}") from error
    if not isinstance(ids, np.ndarray) or ids.ndim != 2 or ids.dtype != np.int64 or ids.size == 0:
        found = f"{ids.dtype} {list(ids.shape)}" if isinstance(ids, np.ndarray) else "an archive"
        raise UsageError(f"--token-ids {path} holds {found}; allowed: int64 [n, L], n and L at least 1. {_NOTHING}")
    if ids.min() < 0 or ids.max() >= vocab_size:
        raise UsageError(
            f"--token-ids {path} holds ids from {ids.min()} to {ids.max()}; allowed: 0 to {vocab_size - 1}. {_NOTHING}"
        )
    return torch.from_numpy(ids)


def text_rows(checkpoint: LoadedCheckpoint, request: EvaluationRequest) -> Tensor:
    """Files as rows [n, s] int64, packed as prepare packs: one after another, each with its end-of-document token."""
    tokenizer, length = checkpoint.tokenizer, checkpoint.model.spec.max_sequence_length
    documents = [_document(tokenizer, file) for file in request.texts]
    rows = -(-sum(map(len, documents)) // length)
    packer = RowPacker(
        sequence_length=length,
        rows_per_block=rows,
        dtype=token_dtype(tokenizer.vocab_size),
        pad_token_id=tokenizer.pad_token_id,
    )
    blocks = [block for number, document in enumerate(documents) for block in packer.add(number, document)]
    tokens = np.concatenate([block.tokens for block in (*blocks, *packer.finish())])
    return torch.from_numpy(tokens[: request.rows].astype(np.int64))


def _document(tokenizer: CorpusTokenizer, path: Path) -> np.ndarray[Any, np.dtype[np.int64]]:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UsageError(f"--text {path} cannot be read: {error.strerror}. {_NOTHING}") from error
    if not data:
        raise UsageError(f"--text {path} is empty. {_NOTHING}")
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise DataIntegrityError(f"--text {path} is not UTF-8 at byte {error.start}. {_NOTHING}") from error
    return np.append(tokenizer.encode_array(text), tokenizer.eod_token_id)


def split_rows(checkpoint: LoadedCheckpoint, request: EvaluationRequest) -> Tensor:
    """The first rows of a split [n, s] int64, in the corpus' own order."""
    folder, manifest = _corpus(checkpoint, request)
    if manifest.tokenizer_digest != checkpoint.model.tokenizer_digest:
        raise UsageError(
            f"tokenizer mismatch: the corpus {folder} was made with tokenizer {manifest.tokenizer_digest}, the model "
            f"with {checkpoint.model.tokenizer_digest}. {_NOTHING}",
            hint="prepare the corpus with corpus.tokenizer.path set to the model's tokenizer.json, or use --text",
        )
    length = checkpoint.model.spec.max_sequence_length
    if manifest.sequence_length != length:
        raise UsageError(
            f"the rows of {folder} have {manifest.sequence_length} tokens, the model's {length}. {_NOTHING}",
            hint="prepare the corpus again with that corpus.sequence_length, or use --text",
        )
    reader = SplitReader(folder, manifest, request.split)
    try:
        count = min(SPLIT_ROWS if request.rows is None else request.rows, reader.num_rows)
        if count == 0:
            raise UsageError(f"the split {request.split} of {folder} has no rows. {_NOTHING}")
        return torch.from_numpy(np.stack([reader.read(row).tokens for row in range(count)]).astype(np.int64))
    finally:
        reader.close()


def _corpus(checkpoint: LoadedCheckpoint, request: EvaluationRequest) -> tuple[Path, Manifest]:
    """The corpus that --corpus names, or the one the run was trained on, found through its newest config."""
    if request.corpus is not None:
        return request.corpus, open_corpus(request.corpus, "--corpus")
    run_dir = checkpoint.commit.folder.resolve().parents[1]
    if not (run_dir / "run.json").is_file():
        raise UsageError(
            f"{checkpoint.commit.folder} is not in a run directory, so its corpus is not known here. {_NOTHING}",
            hint="give --text FILE..., or --corpus FOLDER",
        )
    from megamask.audit.recompute import recorded_run

    [(name, folder)] = recorded_run(run_dir).corpora.items()
    try:
        manifest = open_corpus(Path(folder), f"data.corpora.{name}")
    except UsageError as error:
        raise UsageError(error.message, hint="give --corpus FOLDER, or --text FILE...") from error
    if manifest.corpus_id != checkpoint.commit.corpora.get(name):
        raise UsageError(
            f"data.corpora.{name} ({folder}) is corpus {manifest.corpus_id}, but the checkpoint was trained on "
            f"{checkpoint.commit.corpora.get(name)}. {_NOTHING}",
            hint="give --corpus FOLDER to score another corpus with the same tokenizer",
        )
    return Path(folder), manifest
