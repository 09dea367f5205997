"""The job of `megamask sample`: text that continues a prompt, or fills the gaps of a text."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megamask.checkpoint.standalone import LoadedCheckpoint, load_checkpoint
from megamask.errors import UsageError
from megamask.generation.confidence import DecodingOptions, decode
from megamask.generation.predictor import ReferencePredictor
from megamask.generation.prompt import MaskedSequence, continuation, infill, until_end


@dataclass(frozen=True, kw_only=True)
class SampleRequest:
    """Sampling request; at most one of prompt and text_with_spans, neither for text without a prompt.

    Args:
        length: tokens to add after the prompt; None means 64, or what still fits.
        options: of the decoder.
    """

    prompt: str | None = None
    text_with_spans: str | None = None
    length: int | None = None
    options: DecodingOptions = DecodingOptions()


def sample(path: Path, request: SampleRequest) -> dict[str, Any]:
    """Decode one sequence with a run's newest checkpoint, or with the checkpoint folder that is named.

    Returns: text (up to the first end of document that the model wrote), tokens, num_denoising_steps, nfe, infilled
        (the text of each masked span), prompt_tokens, checkpoint, step.
    Raises:
        UsageError: lengths, steps or path are not usable. CheckpointIntegrityError: the checkpoint does not verify.
    """
    if not 0 <= request.options.seed < 1 << 64:
        raise UsageError(f"--seed is {request.options.seed}; allowed: 0 to 2^64 - 1. Nothing was decoded.")
    checkpoint = load_checkpoint(path)
    checkpoint.require_mask()
    sequence = _sequence(checkpoint, request)
    network, device = checkpoint.network()
    row = torch.tensor([sequence.tokens], device=device)
    [decoded] = decode(
        ReferencePredictor(network=network, vocabulary=checkpoint.model.vocabulary),
        checkpoint.objective.decoder,
        row,
        is_wanted=row == checkpoint.model.vocabulary.mask_token_id,
        options=request.options,
    )
    tokens = decoded.tokens.tolist()
    return {
        **_texts(checkpoint, sequence, tokens, is_continuation=request.text_with_spans is None),
        "tokens": tokens,
        "num_denoising_steps": decoded.num_denoising_steps,
        "nfe": decoded.nfe,
        "checkpoint": str(checkpoint.commit.folder),
        "step": checkpoint.commit.step,
    }


def _sequence(checkpoint: LoadedCheckpoint, request: SampleRequest) -> MaskedSequence:
    tokenizer, mask = checkpoint.tokenizer, checkpoint.model.vocabulary.mask_token_id
    longest = checkpoint.model.spec.max_sequence_length
    if request.text_with_spans is None:
        prompt = request.prompt or ""
        opening = checkpoint.objective.decoder.opening
        return continuation(
            tokenizer, prompt, length=request.length, mask_token_id=mask, max_length=longest, opening=opening
        )
    if request.prompt is not None or request.length is not None:
        raise UsageError(
            "--infill was given with --prompt or --length; allowed: --infill alone. Nothing was decoded.",
            hint="put the prompt into the text of --infill, and lengths into its <|mask:N|> spans",
        )
    return infill(tokenizer, request.text_with_spans, mask_token_id=mask, max_length=longest)


def _texts(
    checkpoint: LoadedCheckpoint, sequence: MaskedSequence, tokens: list[int], *, is_continuation: bool
) -> dict[str, Any]:
    """Decode the tokens; an end of document ends a continuation and is left out of an infilled text."""
    tokenizer, eod = checkpoint.tokenizer, checkpoint.model.vocabulary.eod_token_id
    spans = [tokens[start:stop] for start, stop in sequence.spans]
    if is_continuation:
        [response] = spans
        prompt = [token for token in tokens[: sequence.spans[0][0]] if token != eod]  # without an opening
        return {
            "text": tokenizer.decode(prompt + until_end(response, eod)),
            "infilled": [tokenizer.decode(until_end(response, eod))],
        }
    return {
        "text": tokenizer.decode(token for token in tokens if token != eod),
        "infilled": [tokenizer.decode(token for token in span if token != eod) for span in spans],
    }
