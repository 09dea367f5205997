"""Autoregressive next-token prediction: each token is predicted from the tokens before it in its row.

The loss is the negative log-likelihood itself, -sum over i > 0 of log p(x_i | x_<i): exact, so that it is the baseline
which a diffusion bound is compared with. Attention is causal; the logits at a position choose the token after it. All
eligible tokens of a row are scored but its first, which nothing predicts, and N counts exactly those.

Shapes: b samples, one row each, s tokens of a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megamask.errors import UsageError
from megamask.models.context import Causal, Context
from megamask.models.vocabulary import NO_ID, Vocabulary
from megamask.objectives.base import (
    BoundRows,
    Key,
    OnePhase,
    Reading,
    Rows,
    Samples,
    scored_rows,
    softmax_without,
)
from megamask.objectives.documents import document_numbers, isolated, places_in_documents
from megamask.objectives.given_first import with_a_past
from megamask.objectives.shapes import ObjectiveShape, shape_of
from megamask.objectives.terms import PerScoredToken, Term, cross_entropy_and_z_loss


@dataclass(frozen=True, kw_only=True)
class AutoregressiveObjective(OnePhase):
    """The negative log-likelihood of each token given the ones before it.

    Args:
        mask_logit: "excluded" or "included": whether the mask token's logit enters the softmax. A comparison with
            diffusion takes the same for both.
        isolate_documents: no position sees another document of its row, and no document's first token is scored.
        z_loss_weight: of the z-loss; it shapes training alone, so it is not part of the record.

    Raises:
        UsageError: for a choice that does not exist.
    """

    vocabulary: Vocabulary
    mask_logit: str
    isolate_documents: bool = False
    z_loss_weight: float = 0.0

    def __post_init__(self) -> None:
        softmax_without(self.vocabulary, self.mask_logit)

    @property
    def name(self) -> str:
        """As in `objective.name`."""
        return "autoregressive"

    @property
    def num_parts(self) -> int:
        """The loss has one part."""
        return 1

    @property
    def terms(self) -> tuple[Term, ...]:
        """The negative log-likelihood per scored token, and the z-loss if it has a weight."""
        return cross_entropy_and_z_loss("nll", PerScoredToken(), self.z_loss_weight)

    @property
    def needs_mask_token(self) -> bool:
        """No token is masked; the decoder reads none that is not written yet."""
        return False

    @property
    def excluded_ids(self) -> frozenset[int]:
        """The mask token, unless its logit is included."""
        return softmax_without(self.vocabulary, self.mask_logit)

    @property
    def bound(self) -> ExactLikelihood:
        """The negative log-likelihood itself, under teacher forcing."""
        return ExactLikelihood(isolated_by=self.vocabulary if self.isolate_documents else None)

    @property
    def decoder(self) -> LeftToRight:
        """One token after another."""
        eod = self.vocabulary.eod_token_id
        return LeftToRight(mask_token_id=self.vocabulary.mask_token_id, opening=() if eod == NO_ID else (eod,))

    def shape(self, sequence_length: int) -> ObjectiveShape:
        """One row of the sample's length, scored everywhere but at one position."""
        return shape_of(self.record(), sequence_length)

    def seen(self, samples: Samples, key: Key) -> Samples:
        """With documents where they are isolated."""
        return isolated(samples, self.vocabulary) if self.isolate_documents else samples

    def context(self, samples: Samples, step: int, key: Key) -> Context:
        """Causal attention, inside a document where the samples name documents."""
        return causal(samples.documents)

    def rows(self, samples: Samples, step: int, key: Key) -> Rows:
        """The samples themselves, each position scored against the token after it."""
        is_scored = with_a_past(samples.is_eligible, samples.documents)
        return next_token_rows(samples.tokens, is_scored, self.context(samples, step, key))

    def details(self, samples: Samples, step: int, key: Key) -> list[dict[str, Any]]:
        """Of each sample: the positions of the tokens that are scored."""
        is_scored = with_a_past(samples.is_eligible, samples.documents)
        return [{"scored": row.nonzero().flatten().tolist()} for row in is_scored]

    def record(self) -> dict[str, Any]:
        """Name and the mask token's logit; isolated documents where they are."""
        isolation = {"isolate_documents": True} if self.isolate_documents else {}
        return {"name": self.name, "mask_logit": self.mask_logit} | isolation


@dataclass(frozen=True, kw_only=True)
class ExactLikelihood:
    """The negative log-likelihood under teacher forcing: one draw, no noise.

    Args:
        isolated_by: the vocabulary whose end-of-document id separates documents; None where attention spans the row.
    """

    isolated_by: Vocabulary | None = None
    is_exact: bool = True

    def scored(self, tokens: Tensor, is_eligible: Tensor) -> Tensor:
        """Every eligible token but the first of its row, and of each document where they are isolated."""
        return with_a_past(is_eligible, self._documents(tokens))

    def draw(
        self, tokens: Tensor, is_scored: Tensor, row_index: Tensor, *, replicate: int, member: int, draws: int, key: Key
    ) -> BoundRows:
        """The rows of training; no draw differs from another."""
        return BoundRows(rows=next_token_rows(tokens, is_scored, causal(self._documents(tokens))))

    def _documents(self, tokens: Tensor) -> Tensor | None:
        return None if self.isolated_by is None else document_numbers(tokens, self.isolated_by)


@dataclass(frozen=True, kw_only=True)
class LeftToRight:
    """Writes one token after another, each read at the position before it.

    Args:
        opening: what an empty prompt is replaced by: the end of a document, because another one begins after it.
    """

    mask_token_id: int
    opening: tuple[int, ...]

    def blocks(self, tokens: Tensor, wanted: Tensor, block_length: int | None) -> list[Tensor]:
        """Each wanted position by itself; they are the end of the row's text."""
        if block_length not in (None, 1):
            raise UsageError(
                f"--block-length is {block_length}, but an autoregressive model writes one token after another; "
                "allowed: 1, or nothing. Nothing was decoded."
            )
        is_after = torch.ones_like(tokens, dtype=torch.bool)
        is_after[: int(wanted[0])] = False
        is_after[wanted] = False
        if int(wanted[0]) == 0 or bool((tokens[is_after] != self.mask_token_id).any()):
            raise UsageError(
                "an autoregressive model continues a text: it does not see what follows a gap, and needs one token "
                "before it. Nothing was decoded.",
                hint="give --prompt in place of --infill",
            )
        return list(torch.split(wanted, 1))

    def reading(self, tokens: Tensor, is_open: Tensor) -> Reading:
        """An open position is read one position earlier."""
        return Reading(
            # open positions of a model without a mask token hold NO_ID; no position that is read sees them
            inputs=tokens.clamp(min=0),
            context=Context(pattern=Causal()),
            is_read=is_open.roll(-1, dims=1),
            num_positions=tokens.size(1),
            shift=1,
        )


def causal(documents: Tensor | None) -> Context:
    """Causal attention inside a document, or inside a row without documents. Shapes: int64 [b, s]."""
    if documents is None:
        return Context(pattern=Causal())
    return Context(pattern=Causal(), documents=documents, positions=places_in_documents(documents))


def next_token_rows(tokens: Tensor, is_scored: Tensor, context: Context) -> Rows:
    """Rows of weight 1 in which each position is scored against the token after it.

    Args:
        is_scored: bool [b, s], of the tokens; none at position 0.
    """
    # target and score of position i are those of token i + 1; the last position gets token 0's, which is not scored
    return scored_rows(tokens, tokens.roll(-1, dims=1), is_scored.roll(-1, dims=1), context)
