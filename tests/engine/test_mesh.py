from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megamask.config.schema.layout import LayoutConfig
from megamask.engine.mesh import Mesh
from megamask.errors import UsageError


def mesh(tp: int, dp: int, pp: int) -> list[Mesh]:
    layout = LayoutConfig(tensor_parallel_size=tp, data_parallel_size=dp, pipeline_parallel_size=pp)
    return [Mesh.from_layout(layout, rank=rank, world_size=tp * dp * pp) for rank in range(tp * dp * pp)]


def test_ranks_are_numbered_tensor_parallel_fastest_then_data_then_pipeline():
    coordinates = [
        (rank.pipeline_parallel_rank, rank.data_parallel_rank, rank.tensor_parallel_rank) for rank in mesh(2, 3, 4)
    ]
    assert coordinates == list(itertools.product(range(4), range(3), range(2)))


sizes = st.integers(1, 4)


@given(tp=sizes, dp=sizes, pp=sizes, micro_batch_size=sizes, num_micro_batches=sizes)
def test_each_place_of_a_batch_is_computed_by_one_data_parallel_coordinate(
    tp, dp, pp, micro_batch_size, num_micro_batches
):
    batch = dp * micro_batch_size * num_micro_batches
    shares = {}
    for rank in mesh(tp, dp, pp):
        share = rank.members(batch, micro_batch_size)
        assert shares.setdefault(rank.data_parallel_rank, share) == share
        assert len(share) == micro_batch_size * num_micro_batches
    assert sorted(itertools.chain(*shares.values())) == list(range(batch))
    # micro-batch m of coordinate d begins at (m*dp + d) * micro_batch_size
    for coordinate, share in shares.items():
        firsts = share[::micro_batch_size]
        assert firsts == [(m * dp + coordinate) * micro_batch_size for m in range(num_micro_batches)]


@given(tp=sizes, dp=sizes, pp=sizes)
def test_one_rank_speaks_for_each_data_parallel_coordinate(tp, dp, pp):
    speakers = [rank.data_parallel_rank for rank in mesh(tp, dp, pp) if rank.is_metrics_rank]
    assert sorted(speakers) == list(range(dp))


def test_stages_share_the_layers_in_order():
    assert [list(rank.layers(8)) for rank in mesh(1, 1, 4)] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert [(rank.is_first_stage, rank.is_last_stage) for rank in mesh(1, 1, 3)] == [
        (True, False),
        (False, False),
        (False, True),
    ]


def test_virtual_stages_take_turns_on_the_pipeline_ranks():
    ranks = [Mesh(rank=rank, pipeline_parallel_size=2, virtual_pipeline_size=2) for rank in range(2)]
    assert [[list(rank.layers(8, chunk)) for chunk in range(2)] for rank in ranks] == [
        [[0, 1], [4, 5]],
        [[2, 3], [6, 7]],
    ]


@pytest.mark.parametrize(
    ("num_layers", "num_stages", "expected"),
    [(2, 2, [1, 1]), (3, 2, [2, 1]), (5, 2, [3, 2]), (6, 4, [1, 2, 2, 1]), (7, 4, [2, 2, 2, 1]), (61, 16, None)],
)
def test_balanced_stages_count_embedding_and_head_as_a_layer_each(num_layers, num_stages, expected):
    mesh = Mesh(rank=0, pipeline_parallel_size=num_stages, pipeline_split="balanced")
    sizes = [len(layers) for layers in mesh.stage_layers(num_layers)]
    assert sum(sizes) == num_layers and min(sizes) > 0
    loads = [size + (stage == 0) + (stage == num_stages - 1) for stage, size in enumerate(sizes)]
    assert max(loads) - min(loads) <= 1
    assert expected is None or sizes == expected


def test_stages_that_cannot_be_cut_are_refused():
    with pytest.raises(ValueError, match="5 layers cannot be cut into 2 stages"):
        Mesh(rank=0, pipeline_parallel_size=2).stage_layers(5)


def test_ranks_of_a_context_share_their_samples():
    layout = LayoutConfig(context_parallel_size=2, data_parallel_size=2, tensor_parallel_size=2)
    ranks = [Mesh.from_layout(layout, rank=rank, world_size=8) for rank in range(8)]
    assert [rank.context_parallel_rank for rank in ranks] == [0, 0, 1, 1, 0, 0, 1, 1]
    assert [rank.data_parallel_rank for rank in ranks] == [0, 0, 0, 0, 1, 1, 1, 1]
    assert [rank.rank for rank in ranks if rank.is_metrics_rank] == [0, 2, 4, 6]
    assert [rank.rank for rank in ranks if rank.is_counting_rank] == [0, 4]


def test_layout_is_refused_when_it_does_not_fit_the_processes():
    layout = LayoutConfig(tensor_parallel_size=2, data_parallel_size=3)
    with pytest.raises(UsageError, match=r"2 tensor-parallel x 1 context-parallel x 3 data.*= 6.*4 were") as e:
        Mesh.from_layout(layout, rank=0, world_size=4)
    assert "layout.data_parallel_size" in str(e.value)


def test_sequence_parallel_is_off_when_there_is_nothing_to_shard():
    layout = LayoutConfig(sequence_parallel=True)
    assert not Mesh.from_layout(layout, rank=0, world_size=1).sequence_parallel
