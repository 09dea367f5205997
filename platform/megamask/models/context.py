"""Properties of a row that a network needs beside its token ids: positions, documents, and which position sees which.

An attention pattern is data, not a dense mask: each attention kernel chooses how to carry it out, and `is_visible` is
the definition that all of them are held against. Every pipeline stage can make a context, because it needs no ids.

Shapes: r rows, i input positions of a row (a sample's length, or twice it for a doubled input), q query and k key
positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


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


AttentionPattern = Bidirectional | Causal | BlockPattern


@dataclass(frozen=True, kw_only=True)
class Context:
    """Positions, documents and attention of some rows.

    Args:
        pattern: which position sees which, inside a document.
        positions: int64 [r, i] rotary positions; None means 0 to i - 1. They restart at documents, and a doubled input
            counts its sample twice.
        documents: int64 [r, i] number of each position's document; None means that a row is one document. No position
            sees another document.
    """

    pattern: AttentionPattern = Bidirectional()
    positions: Tensor | None = None
    documents: Tensor | None = None

    def rows(self, rows: slice | Tensor) -> Context:
        """The context of some of the rows, by their place."""
        return Context(
            pattern=self.pattern,
            positions=None if self.positions is None else self.positions[rows],
            documents=None if self.documents is None else self.documents[rows],
        )

    def to(self, device: torch.device) -> Context:
        """The context on a device."""
        return Context(
            pattern=self.pattern,
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
    query_block, key_block = query_position // pattern.block_size, key_position // pattern.block_size
    is_noised_query, is_noised_key = query_index < half, key_index < half
    own_noise = is_noised_query & is_noised_key & (query_block == key_block)
    clean_past = is_noised_query & ~is_noised_key & (key_block < query_block)
    is_past = key_block <= query_block if pattern.clean_half == "block_causal" else key_position <= query_position
    return own_noise | clean_past | (~is_noised_query & ~is_noised_key & is_past)
