"""One file a rank: what any ranks write is read in any other cut, bit for bit; a header that lies is refused."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from megamask.engine.state.coverage import Rectangle, overlap
from megamask.engine.state.index import StoredTensor, read_index
from megamask.engine.state.safetensors import StateReader, write_slices
from megamask.engine.state.slices import StoredSlice
from megamask.errors import CheckpointIntegrityError


def cut(draw: Any, first: int, stop: int) -> list[tuple[int, int]]:
    """A draw of neighbouring intervals that are [first, stop) together."""
    inner = draw(st.lists(st.integers(first + 1, stop - 1), max_size=3, unique=True)) if stop - first > 1 else []
    ends = [first, *sorted(inner), stop]
    return list(pairwise(ends))


@st.composite
def cuts(draw: Any, shape: tuple[int, ...]) -> list[Rectangle]:
    """Rectangles that are every element of a tensor once: bands of rows, each cut into columns of its own."""
    found = []
    for first, stop in cut(draw, 0, shape[0]):
        if len(shape) == 1:
            found.append(Rectangle(offsets=(first,), sizes=(stop - first,)))
            continue
        for left, right in cut(draw, 0, shape[1]):
            found.append(Rectangle(offsets=(first, left), sizes=(stop - first, right - left)))
    return draw(st.permutations(found))


def index_of(rectangle: Rectangle) -> tuple[slice, ...]:
    return tuple(slice(at, at + n) for at, n in zip(rectangle.offsets, rectangle.sizes, strict=True))


shapes = st.tuples(st.integers(1, 9)) | st.tuples(st.integers(1, 9), st.integers(1, 7))


@pytest.mark.promise("a state that any ranks wrote is read by any other ranks, bit for bit")
@given(data=st.data(), shape=shapes, num_ranks=st.integers(1, 3))
def test_state_is_read_in_any_other_cut(
    data: st.DataObject, shape: tuple[int, ...], num_ranks: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("state")
    bits = torch.arange(math.prod(shape), dtype=torch.int32) * 123456789 - 987654321  # any bits, NaN among them
    bits[:: max(1, len(bits) - 1)] = 0x7FC00123
    tensor = bits.view(torch.float32).view(shape)
    written: list[list[StoredSlice]] = [[] for _ in range(num_ranks)]
    for name in ("w", "optimizer.exp_avg.w"):
        for rectangle in data.draw(cuts(shape)):
            piece = StoredSlice(name=name, shape=shape, offsets=rectangle.offsets, data=tensor[index_of(rectangle)])
            written[data.draw(st.integers(0, num_ranks - 1))].append(piece)
    for rank, slices in enumerate(written):
        write_slices(folder, slices, rank=rank)
    targets = [
        StoredSlice(name="w", shape=shape, offsets=rectangle.offsets, data=torch.zeros(rectangle.sizes))
        for rectangle in data.draw(cuts(shape))
    ]
    StateReader(folder).read(targets)
    for target in targets:
        assert torch.equal(target.data.view(torch.int32), tensor[index_of(target.rectangle)].view(torch.int32))


def test_large_parts_are_read_in_pieces_of_full_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megamask.engine.state.safetensors._READ_BYTES", 100)
    tensor = torch.randn(23, 7, generator=torch.Generator().manual_seed(1))
    write_slices(tmp_path, [StoredSlice(name="w", shape=(23, 7), offsets=(0, 0), data=tensor)], rank=0)
    part = torch.zeros(17, 3)
    StateReader(tmp_path).read([StoredSlice(name="w", shape=(23, 7), offsets=(4, 2), data=part)])
    assert torch.equal(part, tensor[4:21, 2:5])


def test_headers_alone_name_every_part(tmp_path: Path) -> None:
    for rank, rows in enumerate(((0, 2), (2, 3))):
        data = torch.zeros(rows[1] - rows[0], 5)
        write_slices(tmp_path, [StoredSlice(name="w", shape=(3, 5), offsets=(rows[0], 0), data=data)], rank=rank)
    found = read_index(tmp_path)
    assert list(found) == ["w"]
    assert found["w"].shape == (3, 5)
    assert [(part.file, part.rectangle.offsets) for part in found["w"].parts] == [
        ("state-00000.safetensors", (0, 0)),
        ("state-00001.safetensors", (2, 0)),
    ]


def brute_force(rectangles: list[Rectangle]) -> bool:
    cells = [
        (row, column)
        for rectangle in rectangles
        for row in range(*rectangle.rows)
        for column in range(*rectangle.columns)
    ]
    return len(cells) != len(set(cells))


rectangle = st.builds(
    lambda row, column, height, width: Rectangle(offsets=(row, column), sizes=(height, width)),
    st.integers(0, 6),
    st.integers(0, 6),
    st.integers(1, 4),
    st.integers(1, 4),
)


@given(st.lists(rectangle, max_size=8) | cuts((9, 8)))
def test_overlap_is_found_exactly_where_two_rectangles_share_an_element(rectangles: list[Rectangle]) -> None:
    found = overlap(rectangles)
    assert (found is not None) == brute_force(rectangles)
    if found is not None:
        assert brute_force(list(found))


def test_overlap_of_a_hundred_thousand_parts_of_one_row_is_looked_for_quickly() -> None:
    """A comparison of every pair would take hours."""
    assert overlap([Rectangle(offsets=(0, at), sizes=(5, 1)) for at in range(100_000)]) is None


# Headers that lie. Each is accepted in its true form, so that the change alone makes it refused.


def entry(begin: int, stop: int, shape: list[Any], dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, stop]}


def place(offsets: list[Any], shape: list[Any]) -> str:
    return json.dumps({"offsets": offsets, "shape": shape})


TRUE = {
    "__metadata__": {
        "format": "megamask-state",
        "version": "1",
        "w#0": place([0, 0], [4, 3]),
        "w#1": place([2, 0], [4, 3]),
    },
    "w#0": entry(0, 24, [2, 3]),
    "w#1": entry(24, 48, [2, 3]),
}


def store(folder: Path, header: Any, *, data: bytes = bytes(48), length: int | None = None) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    stated = len(text) if length is None else length
    (folder / "state-00000.safetensors").write_bytes(stated.to_bytes(8, "little") + text + data)


def changed(**changes: Any) -> dict[str, Any]:
    """The true header with other entries; `places` changes metadata. A value None removes the entry."""
    places = TRUE["__metadata__"] | changes.pop("places", {})
    header = TRUE | {"__metadata__": places} | {name.replace("_", "#"): value for name, value in changes.items()}
    header["__metadata__"] = {name: value for name, value in places.items() if value is not None}
    return {name: value for name, value in header.items() if value is not None}


def test_true_header_is_read(tmp_path: Path) -> None:
    store(tmp_path, TRUE)
    assert isinstance(read_index(tmp_path)["w"], StoredTensor)
    with safe_open(tmp_path / "state-00000.safetensors", framework="pt") as file:
        assert set(file.keys()) == {"w#0", "w#1"}


HUGE = 1 << 40
DUPLICATE = json.dumps(TRUE)[:-1].encode() + b', "w#0": ' + json.dumps(entry(0, 24, [2, 3])).encode() + b"}"


@pytest.mark.promise("a state file whose header lies is refused before memory is reserved")
@pytest.mark.parametrize(
    ("header", "options", "words"),
    [
        (TRUE, {"length": 1 << 62}, "its header would have"),
        (TRUE, {"length": 0}, "its header would have 0 bytes"),
        (TRUE, {"data": b""}, "its header describes"),
        (TRUE, {"data": bytes(49)}, "its header describes"),
        (b"[" * 100_000, {}, "nested too deeply"),
        (b"\xff\xfe{}", {}, "utf-8"),
        (b"[]", {}, "not a JSON object"),
        (DUPLICATE, {}, "the name 'w#0' occurs twice"),
        ({name: value for name, value in TRUE.items() if name != "__metadata__"}, {}, "its format is not"),
        (changed(places={"version": "2"}), {}, "its format is not megamask-state version 1"),
        (changed(places={"version": 1}), {}, "its format is not"),
        (changed(places={"x#0": place([0], [1])}), {}, "its entries are not those of its metadata"),
        (changed(places={"w#1": None}), {}, "its entries are not those of its metadata"),
        (changed(places={"w#1": 7}), {}, "has no place"),
        (changed(places={"w#1": "{"}), {}, "Expecting property name"),
        (changed(places={"w#1": '{"offsets":[2,0],"offsets":[2,0],"shape":[4,3]}'}), {}, "occurs twice"),
        (changed(places={"w#1": place([2, 0], [4, 3])[:-1] + ',"x":1}'}), {}, "has no place"),
        (changed(places={"w#1": place([3, 0], [4, 3])}), {}, "outside of"),
        (changed(places={"w#1": place([-2, 0], [4, 3])}), {}, "has the numbers"),
        (changed(places={"w#1": place([2], [4])}), {}, "outside of"),
        (changed(places={"w#1": place([2.0, 0], [4, 3])}), {}, "has the numbers"),
        (changed(places={"w#1": place([True, 0], [4, 3])}), {}, "has the numbers"),
        (changed(places={"w#1": place([1, 0], [4, 3])}), {}, "two parts of w overlap"),
        (changed(places={"w#1": place([2, 0], [5, 3])}), {}, "w has shape"),
        (changed(places={"w#0": place([0, 0], [5, 3]), "w#1": place([2, 0], [5, 3])}), {}, "w has 12 of 15 elements"),
        (changed(places={"w#0": place([0, 0], [HUGE, 3]), "w#1": place([2, 0], [HUGE, 3])}), {}, "w has 12 of"),
        (changed(w_1=entry(24, 48, [2, 3], "BF16")), {}, "is not a float32 tensor"),
        (changed(w_1=entry(24, 48, [2, 3]) | {"x": 1}), {}, "is not a float32 tensor"),
        (changed(w_1=entry(20, 44, [2, 3])), {}, "has bytes 20 to 44"),
        (changed(w_1=entry(28, 52, [2, 3])), {}, "has bytes 28 to 52"),
        (changed(w_1=entry(24, 44, [2, 3])), {}, "has bytes 24 to 44"),
        (changed(w_1=entry(24, 48, [HUGE, HUGE])), {}, "has bytes 24 to 48"),
        (changed(w_1=entry(24, 48, [1 << 62, 3])), {}, "has the numbers"),
        (changed(w_1=entry(24, 24, [0, 3])), {}, "has the numbers"),
        (changed(w_1=entry(24, 48, [6])), {}, "outside of"),
        (changed(w_1=entry(24, 28, [])), {"data": bytes(28)}, "outside of"),
        (changed(w_1={"dtype": "F32", "shape": [2, 3], "data_offsets": [24]}), {}, "has 1 data offsets"),
        (changed(w_1="x"), {}, "is not a float32 tensor"),
    ],
)
def test_header_that_lies_is_refused(header: Any, options: dict[str, Any], words: str, tmp_path: Path) -> None:
    store(tmp_path, header, **options)
    with pytest.raises(CheckpointIntegrityError) as caught:
        read_index(tmp_path)
    assert words in str(caught.value)
    assert "state-00000.safetensors" in str(caught.value) or "w has" in words or "overlap" in words


@given(data=st.data())
def test_changed_header_is_refused_or_still_describes_the_file(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("changed")
    text = bytearray(json.dumps(TRUE).encode())
    text[data.draw(st.integers(0, len(text) - 1))] = data.draw(st.integers(0, 255))
    store(folder, bytes(text))
    try:
        found = read_index(folder)
    except CheckpointIntegrityError:
        return
    for tensor in found.values():
        assert sum(part.rectangle.num_elements for part in tensor.parts) == math.prod(tensor.shape)


def test_two_files_that_disagree_about_a_shape_are_refused(tmp_path: Path) -> None:
    for rank, shape in enumerate(((4, 3), (5, 3))):
        write_slices(
            tmp_path, [StoredSlice(name="w", shape=shape, offsets=(2 * rank, 0), data=torch.zeros(2, 3))], rank=rank
        )
    with pytest.raises(CheckpointIntegrityError, match="in another file"):
        read_index(tmp_path)


def test_missing_rank_is_found(tmp_path: Path) -> None:
    for rank in (0, 1):
        write_slices(
            tmp_path, [StoredSlice(name="w", shape=(4, 3), offsets=(2 * rank, 0), data=torch.zeros(2, 3))], rank=rank
        )
    (tmp_path / "state-00001.safetensors").unlink()
    with pytest.raises(CheckpointIntegrityError, match="w has 6 of 12 elements"):
        read_index(tmp_path)


def test_no_file_and_a_link_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointIntegrityError, match=r"it has no file state-00000\.safetensors"):
        read_index(tmp_path)
    store(tmp_path, TRUE)
    (tmp_path / "state-00000.safetensors").rename(tmp_path / "elsewhere")
    (tmp_path / "state-00000.safetensors").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointIntegrityError, match="is a link"):
        read_index(tmp_path)
