"""Documents inside a row, and rows that are cut short: limits of attention and of the eligible tokens.

Both change which tokens are eligible and which positions see each other, never a tensor's shape (the shape law).
Shapes: b samples, s tokens of a sample.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from megamask.diffusion.philox import Purpose, philox4x32
from megamask.models.context import first_tokens
from megamask.models.vocabulary import Vocabulary
from megamask.objectives.base import Key, Samples

_RESOLUTION = 1 << 32


def document_numbers(tokens: Tensor, vocabulary: Vocabulary) -> Tensor:
    """Number of each token's document in its row, from 0: int64 [b, s].

    A corpus ends each document with the end-of-document id, which occurs nowhere else (docs/formats.md). Padding behind
    the last document is a document of its own.
    """
    is_end = tokens == vocabulary.eod_token_id
    before = is_end.to(torch.int64).cumsum(dim=1) - is_end.to(torch.int64)
    return torch.where(tokens == vocabulary.pad_token_id, tokens.size(1), before)


def places_in_documents(documents: Tensor) -> Tensor:
    """Place of each token in its document, counted from the document's first token in the row: int64 [b, s]."""
    is_start = first_tokens(documents)
    place = torch.arange(documents.size(1), device=documents.device).expand_as(documents)
    return place - torch.where(is_start, place, 0).cummax(dim=1).values


def isolated(samples: Samples, vocabulary: Vocabulary) -> Samples:
    """The samples with their documents named, so that no position sees another document."""
    return replace(samples, documents=document_numbers(samples.tokens, vocabulary))


def shortened(samples: Samples, fraction: float, key: Key) -> Samples:
    """The samples, a fraction of them cut to a random length: the rest is not eligible, and no token kept sees it.

    w = philox((i mod 2^32, i div 2^32, 0, 4), run key), i the sample index: a sample is cut where w0 < floor(fraction *
    2^32), to 1 + (w1 * s div 2^32) tokens, uniform on 1..s. LLaDA (arXiv:2502.09992) cuts 1 % of its batches.
    """
    if fraction == 0:
        return samples
    index, length = samples.sample_index, samples.tokens.size(1)
    words = philox4x32((index & 0xFFFFFFFF, index >> 32, 0, int(Purpose.LENGTH)), key)
    is_cut = words[0] < int(fraction * _RESOLUTION)
    kept = torch.where(is_cut, 1 + (words[1] * length >> 32), length)[:, None]
    is_behind = torch.arange(length, device=index.device)[None] >= kept
    documents = torch.zeros_like(samples.tokens) if samples.documents is None else samples.documents
    return replace(
        samples,
        is_eligible=samples.is_eligible & ~is_behind,
        documents=torch.where(is_behind, documents + length + 1, documents),
    )
