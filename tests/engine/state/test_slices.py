from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from megamask.engine.canonical import TensorSlice
from megamask.engine.state.slices import range_parts


@given(data=st.data(), rows=st.lists(st.integers(1, 4), min_size=1, max_size=3), columns=st.integers(1, 5))
def test_rectangles_hold_every_element_of_a_range_in_its_canonical_place(data, rows, columns):
    """Blocks of a parameter, some rows of padding behind them, and any flat range of it."""
    padding = data.draw(st.integers(0, 2))
    blocks, tensors, parts = [], {}, []
    for number, count in enumerate(rows):
        offsets = (data.draw(st.integers(0, 3)), data.draw(st.integers(0, 3)))
        tensor = torch.arange((count + 3) * (columns + 3)).reshape(count + 3, columns + 3) + 1000 * (number + 1)
        blocks.append(
            TensorSlice(name=f"t{number}", first_row=sum(rows[:number]), offsets=offsets, sizes=(count, columns))
        )
        tensors[f"t{number}"] = tensor
        parts.append(tensor[blocks[-1].index])
    parameter = torch.cat([*parts, torch.full((padding, columns), -1)])
    start = data.draw(st.integers(0, parameter.numel()))
    stop = data.draw(st.integers(start, parameter.numel()))
    flat = parameter.flatten()[start:stop]

    rebuilt = torch.full_like(flat, -1)
    seen = 0
    for part in range_parts(blocks, columns=columns, start=start, stop=stop):
        index = tuple(slice(offset, offset + size) for offset, size in zip(part.offsets, part.sizes, strict=True))
        rebuilt[part.first : part.first + part.num_elements] = tensors[part.name][index].flatten()
        seen += part.num_elements
    assert torch.equal(rebuilt, flat)
    assert seen == int((flat != -1).sum())


def test_a_range_is_at_most_three_rectangles_of_a_block():
    block = TensorSlice(name="t", first_row=0, offsets=(10, 20), sizes=(100, 7))
    found = list(range_parts([block], columns=7, start=5, stop=7 * 90 + 2))
    assert [(part.offsets, part.sizes, part.first) for part in found] == [
        ((10, 25), (1, 2), 0),
        ((11, 20), (89, 7), 2),
        ((100, 20), (1, 2), 625),
    ]


def test_vectors_are_cut_too():
    block = TensorSlice(name="t", first_row=0, offsets=(4,), sizes=(6,))
    found = list(range_parts([block], columns=1, start=2, stop=5))
    assert [(part.offsets, part.sizes, part.first) for part in found] == [((6,), (3,), 0)]
