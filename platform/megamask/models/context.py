"""Properties of a row that a network needs beside its token ids: positions, documents, and which position sees which.

An attention pattern is data, not a dense mask: each attention kernel chooses how to carry it out, and `is_visible` is
the definition that all of them are held against. Every pipeline stage can make a context, because it needs no ids.

Shapes: r rows, i input positions of a row (a sample's length, or twice it for a doubled input), q query and k key
positions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from megamask.diffusion.philox import Purpose, philox4x32


@dataclass(frozen=True, kw_only=True)
class Bidirectional:
    """Each position sees every position of its row."""


@dataclass(frozen=True, kw_only=True)
class Causal:
    """Each position sees itself and the positions before it."""


@dataclass(frozen=True, kw_only=True)
class BlockPattern:
    """Block diffusion on the doubled input [x_t ; x_0], noised half first, in one pass.

    A noised position sees its own block of x_t and the strictly earlier blocks of x_0. A clean position sees x_0 only:
    its own and earlier blocks ("block_causal"), or itself and earlier positions ("token_causal", which makes the clean
    half an autoregressive model). Blocks are cut from the positions, so their grid restarts wherever positions do.

    Sources: BD3-LM, arXiv:2503.09573, section 3.2; the token-causal clean half is that of Nemotron's joint loss.

    Args:
        block_size: positions of a block.
        clean_half: what a clean position sees.
    """

    block_size: int
    clean_half: Literal["block_causal", "token_causal"] = "block_causal"


@dataclass(frozen=True, kw_only=True)
class Opening:
    """Causal attention on its way to bidirectional: each later position is visible where its word is below a limit.

    The word of query q and key k is a function of (key, step, q, k), the same for all rows of a step.

    Args:
        limit: of the word, out of 2^32.
        step: 1-based number of the step. key: of the run.
    """

    limit: int
    step: int
    key: tuple[int, int]

    def is_open(self, query: Tensor, key_index: Tensor) -> Tensor:
        """True where a key position is drawn as visible; query and key_index broadcast together."""
        low, high = self.step & 0xFFFFFFFF, self.step >> 32
        cell = query * (1 << 24) + key_index  # a row has fewer than 2^24 positions
        counter = (cell & 0xFFFFFFFF, (cell >> 32) + (high << 16), low, int(Purpose.ATTENTION_OPENING))
        return philox4x32(counter, self.key)[0] < self.limit


AttentionPattern = Bidirectional | Causal | BlockPattern | Opening


@dataclass(frozen=True, kw_only=True)
class EmbeddingNoise:
    """Gaussian noise on the embeddings of one token of the rows.

    Args:
        row_index: int64 [r], the sample that each row is a view of.
        std: standard deviation.
        token_id: the token whose positions get noise.
        key: of the run.
    """

    row_index: Tensor
    std: float
    token_id: int
    key: tuple[int, int]

    def values(self, is_noised: Tensor, num_channels: int, places: Tensor | None = None) -> Tensor:
        """Noise of the chosen positions, float32 [n, num_channels], in row-major order.

        The standardised sum of twelve 16-bit halves of philox words: as for initial weights, no function whose
        rounding differs between devices.

        Args:
            is_noised: bool [r, i].
            places: int64 [i], where the positions are in the row; None for all of them in order.
        """
        rows, positions = is_noised.nonzero(as_tuple=True)
        positions = positions if places is None else places[positions]
        sample = self.row_index[rows]
        channel = torch.arange(num_channels, device=is_noised.device)
        place = positions[:, None] * (1 << 20) + channel[None]  # a network has fewer than 2^20 channels
        words: list[Tensor] = []
        for half in range(2):
            counter = (
                (sample & 0xFFFFFFFF)[:, None],
                place & 0xFFFFFFFF,
                ((place >> 32) * 2 + half) + ((sample >> 32) << 20)[:, None],
                int(Purpose.EMBEDDING_NOISE),
            )
            words += philox4x32(counter, self.key)[: 4 if half == 0 else 2]
        total = torch.zeros_like(place)
        for word in words:
            total += (word & 0xFFFF) + (word >> 16)
        divisor = torch.tensor(math.sqrt(65536**2 - 1), dtype=torch.float64, device=place.device)
        return ((total - 393210).to(torch.float64) / divisor * self.std).to(torch.float32)


@dataclass(frozen=True, kw_only=True)
class Context:
    """Positions, documents and attention of some rows.

    Args:
        pattern: which position sees which, inside a document.
        positions: int64 [r, i] rotary positions; None means 0 to i - 1. They restart at documents, and a doubled input
            counts its sample twice.
        documents: int64 [r, i] number of each position's document; None means that a row is one document. No position
            sees another document.
        embedding_noise: added to the embeddings, or None.
    """

    pattern: AttentionPattern = Bidirectional()
    positions: Tensor | None = None
    documents: Tensor | None = None
    embedding_noise: EmbeddingNoise | None = None

    def rows(self, rows: slice | Tensor) -> Context:
        """The context of some of the rows, by their place."""
        noise = self.embedding_noise
        return Context(
            pattern=self.pattern,
            embedding_noise=None if noise is None else replace(noise, row_index=noise.row_index[rows]),
            positions=None if self.positions is None else self.positions[rows],
            documents=None if self.documents is None else self.documents[rows],
        )

    def to(self, device: torch.device) -> Context:
        """The context on a device."""
        noise = self.embedding_noise
        return Context(
            pattern=self.pattern,
            embedding_noise=None if noise is None else replace(noise, row_index=noise.row_index.to(device)),
            positions=None if self.positions is None else self.positions.to(device),
            documents=None if self.documents is None else self.documents.to(device),
        )

    @property
    def is_dense(self) -> bool:
        """True if every position sees every position, so that a kernel needs no mask."""
        return isinstance(self.pattern, Bidirectional) and self.documents is None


@dataclass(frozen=True, kw_only=True)
class Places:
    """Locations of some positions of a row, for `is_visible`.

    Args:
        index: int64 [r or 1, q] place in the input row, 0 to i - 1.
        position: int64 [r or 1, q] rotary position.
        document: int64 [r or 1, q], or None where a row is one document.
    """

    index: Tensor
    position: Tensor
    document: Tensor | None


def places_of(context: Context, num_positions: int, device: torch.device) -> Places:
    """The places of all i positions of the rows. A rank that owns a part of each row takes its columns of them."""
    index = torch.arange(num_positions, device=device)[None]
    return Places(
        index=index,
        position=index if context.positions is None else context.positions,
        document=context.documents,
    )


def is_visible(pattern: AttentionPattern, query: Places, key: Places, *, num_positions: int) -> Tensor:
    """Visibility of each key position from each query position: bool [r or 1, q, k].

    Args:
        num_positions: i, the length of an input row; it divides a doubled input.
    """
    visible = _inside_a_document(pattern, _spread(query, dim=2), _spread(key, dim=1), half=num_positions // 2)
    if query.document is not None and key.document is not None:
        visible = visible & (query.document[:, :, None] == key.document[:, None, :])
    return visible


def visible_mask(context: Context, num_positions: int, device: torch.device) -> Tensor | None:
    """The pattern of full rows as a dense mask, bool [r or 1, i, i]; None where every position sees every position."""
    if context.is_dense:
        return None
    places = places_of(context, num_positions, device)
    return is_visible(context.pattern, places, places, num_positions=num_positions)


def _spread(places: Places, *, dim: int) -> tuple[Tensor, Tensor]:
    return places.index.unsqueeze(dim), places.position.unsqueeze(dim)


def _inside_a_document(
    pattern: AttentionPattern, query: tuple[Tensor, Tensor], key: tuple[Tensor, Tensor], *, half: int
) -> Tensor:
    (query_index, query_position), (key_index, key_position) = query, key
    if isinstance(pattern, Bidirectional):
        return (query_index >= 0) & (key_index >= 0)
    if isinstance(pattern, Causal):
        return key_index <= query_index
    if isinstance(pattern, Opening):
        return (key_index <= query_index) | pattern.is_open(query_index, key_index)
    query_block, key_block = query_position // pattern.block_size, key_position // pattern.block_size
    is_noised_query, is_noised_key = query_index < half, key_index < half
    own_noise = is_noised_query & is_noised_key & (query_block == key_block)
    clean_past = is_noised_query & ~is_noised_key & (key_block < query_block)
    is_past = key_block <= query_block if pattern.clean_half == "block_causal" else key_position <= query_position
    return own_noise | clean_past | (~is_noised_query & ~is_noised_key & is_past)


def first_tokens(documents: Tensor) -> Tensor:
    """Bool [b, s]: the first token of each document in its row."""
    is_start = torch.ones_like(documents, dtype=torch.bool)
    is_start[:, 1:] = documents[:, 1:] != documents[:, :-1]
    return is_start
