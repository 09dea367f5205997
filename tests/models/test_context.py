"""Attention patterns against their definitions, written out position by position."""

import torch

from megamask.models.context import (
    Bidirectional,
    BlockPattern,
    Causal,
    Context,
    Places,
    is_visible,
    places_of,
    visible_mask,
)

CPU = torch.device("cpu")


def _mask(context: Context, length: int) -> torch.Tensor:
    mask = visible_mask(context, length, CPU)
    assert mask is not None
    return mask


def _block_oracle(length: int, block: int, clean: str) -> torch.Tensor:
    """[x_t ; x_0] of one sample, four rules, cell by cell."""
    mask = torch.zeros(2 * length, 2 * length, dtype=torch.bool)
    for q in range(2 * length):
        for k in range(2 * length):
            i, j = q % length, k % length
            if q < length and k < length:
                mask[q, k] = i // block == j // block
            elif q < length:
                mask[q, k] = j // block < i // block
            elif k >= length:
                mask[q, k] = j // block <= i // block if clean == "block_causal" else j <= i
    return mask


def test_bidirectional_needs_no_mask_and_documents_make_one():
    assert visible_mask(Context(), 6, CPU) is None
    documents = torch.tensor([[0, 0, 0, 1, 1, 2]])
    mask = _mask(Context(pattern=Bidirectional(), documents=documents), 6)
    assert torch.equal(mask[0], documents[0][:, None] == documents[0][None, :])


def test_causal_sees_no_later_position_and_no_other_document():
    assert torch.equal(_mask(Context(pattern=Causal()), 5)[0], torch.ones(5, 5).tril().bool())
    documents = torch.tensor([[0, 0, 1, 1, 1]])
    mask = _mask(Context(pattern=Causal(), documents=documents), 5)[0]
    assert mask[4].tolist() == [False, False, True, True, True]
    assert mask[1].tolist() == [True, True, False, False, False]


def test_block_pattern_follows_the_four_rules():
    positions = torch.arange(8).repeat(2)[None]
    for clean in ("block_causal", "token_causal"):
        for block in (1, 2, 4, 8):
            pattern = BlockPattern(block_size=block, clean_half=clean)
            assert torch.equal(
                _mask(Context(pattern=pattern, positions=positions), 16)[0], _block_oracle(8, block, clean)
            )


def test_block_grid_restarts_at_each_document():
    positions = torch.tensor([[0, 1, 2, 0, 1, 2]]).repeat(1, 2)
    documents = torch.tensor([[0, 0, 0, 1, 1, 1]]).repeat(1, 2)
    mask = _mask(Context(pattern=BlockPattern(block_size=2), positions=positions, documents=documents), 12)[0]
    assert mask[4].nonzero().flatten().tolist() == [3, 4]  # second document, first block: its own two noised positions
    assert mask[5].nonzero().flatten().tolist() == [5, 9, 10]  # its second block sees the clean first block
    assert mask[2].nonzero().flatten().tolist() == [2, 6, 7]


def test_a_part_of_the_queries_gets_its_rows_of_the_mask():
    context = Context(pattern=Causal(), documents=torch.tensor([[0, 0, 1, 1, 1, 2]]))
    places = places_of(context, 6, CPU)
    chosen = torch.tensor([5, 0, 3])
    part = Places(
        index=places.index[:, chosen], position=places.position[:, chosen], document=context.documents[:, chosen]
    )
    assert torch.equal(is_visible(Causal(), part, places, num_positions=6), _mask(context, 6)[:, chosen])


def test_rows_of_a_context_keep_their_pattern():
    context = Context(pattern=Causal(), positions=torch.arange(8).reshape(2, 4), documents=torch.zeros(2, 4).long())
    part = context.rows(slice(1, 2))
    assert part.pattern == Causal()
    assert part.positions is not None and part.positions.tolist() == [[4, 5, 6, 7]]
