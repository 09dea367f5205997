"""Plans: fullest ranks, reasons, times that move the right way, the search."""

from __future__ import annotations

import dataclasses

import pytest

from megamask.config.rules.layout import AxisSizes, Shared
from megamask.errors import UsageError
from megamask.planning.assumptions import Assumptions
from megamask.planning.gpus import GPUS, gpu_named
from megamask.planning.plan import make_plan, rank_plan
from megamask.planning.search import search
from support.planned import dense, subject_of

SPEC = dense(layers=32, hidden=4096, forward=12288, heads=32, groups=8, vocabulary=126_464)
SHARED = Shared(
    num_layers=32,
    num_attention_heads=32,
    num_query_groups=8,
    ffn_hidden_size=12288,
    vocab_padding_multiple=128,
    sequence_length=4096,
)
H100, ASSUMED = GPUS["h100"], Assumptions()
LAYOUT = AxisSizes(tensor_parallel_size=4, pipeline_parallel_size=2, data_parallel_size=8, sequence_parallel=True)


def plan(axes: AxisSizes = LAYOUT, assumed: Assumptions = ASSUMED, **settings):
    return make_plan(subject_of(SPEC, axes, **settings), H100, assumed)


def test_the_fullest_rank_is_fuller_than_every_other() -> None:
    subject = subject_of(SPEC, dataclasses.replace(LAYOUT, data_parallel_size=3), global_batch_size=96)
    fullest = make_plan(subject, H100, ASSUMED).rank
    assert fullest.total == max(rank_plan(subject, ASSUMED, rank).total for rank in range(subject.world_size))
    assert rank_plan(subject, ASSUMED, fullest.rank) == fullest


def test_a_run_that_does_not_fit_names_the_largest_part_and_its_keys() -> None:
    found = plan(AxisSizes(data_parallel_size=64))
    assert not found.to_json()["feasible"]
    assert "rank 0 needs" in found.reasons[0] and "layout." in found.reasons[0]
    assert plan().to_json()["reasons"] == []


def test_the_parts_of_a_rank_add_up() -> None:
    rank = plan().to_json()["per_rank"]
    parts = ("parameters", "gradients", "optimizer", "activations", "logits", "other")
    assert rank["total_bytes"] == sum(rank[f"{part}_bytes"] for part in parts)
    kinds = rank["activations"]
    assert rank["activations_bytes"] == kinds["layers_bytes"] + kinds["ends_bytes"] + kinds["workspace_bytes"]


def test_buffers_of_communication_are_those_of_the_axes() -> None:
    assert plan(AxisSizes()).rank.communication == 0
    found = plan(assumed=Assumptions(communicator_bytes=1.0)).rank.communication
    row, positions = SPEC.hidden_size * 2, 2 * 4096  # both views
    # groups of all, tensor, data and pipeline; a gathered sequence; input and gradient of a neighbour
    assert found == 4 + positions * row + 2 * positions // 4 * row
    rank = plan().to_json()["per_rank"]
    assert 0 < rank["communication_bytes"] < rank["other_bytes"]


def test_a_ring_keeps_a_ranks_own_keys_and_values_only() -> None:
    axes = AxisSizes(tensor_parallel_size=8, context_parallel_size=8, sequence_parallel=True)
    gathered, ring = (plan(axes, has_ring=has_ring).rank.activations.layers for has_ring in (False, True))
    positions = 2 * 4096 // 8
    kept = SPEC.num_layers * positions * 2 * SPEC.head_dim  # elements of one head's keys and values, own positions
    # one group a rank, whose four query heads read copies: keys and values of complete rows, four times
    assert gathered - ring == 2 * kept * (8 * 4 - 1)


def test_time_moves_with_what_it_is_made_of() -> None:
    base = plan().time
    assert plan(assumed=Assumptions(matrix_efficiency=0.35)).time.compute > base.compute
    assert plan(assumed=Assumptions(link_efficiency=0.3)).time.communication > base.communication
    assert plan(is_overlapped=True).time.data < base.data
    interleaved = plan(dataclasses.replace(LAYOUT, virtual_pipeline_parallel_size=4))
    assert interleaved.time.bubble < base.bubble
    assert interleaved.rank.activations.layers > plan().rank.activations.layers
    assert plan(recompute="full").time.compute > base.compute
    assert plan(recompute="full").rank.total < plan().rank.total


def test_the_bubble_is_the_idle_part_of_the_schedule() -> None:
    """(p - 1) / m of the time of the micro-batches on a pipeline of p ranks and m micro-batches (GPipe, 1F1B)."""
    found = plan(global_batch_size=128)
    time, micro_batches = found.time, 128 // 8
    busy = time.tensor + time.pipeline + time.compute
    assert time.bubble == pytest.approx(busy / micro_batches, rel=0.01)  # the update is not part of a micro-batch


def test_mfu_is_the_models_operations_over_the_peak() -> None:
    found = plan(recompute="full")
    tokens = 1024 * 4096
    expected = tokens * found.work.total / (found.time.total * found.subject.world_size * H100.bf16_flops)
    assert found.mfu == pytest.approx(expected)
    assert found.work.total == plan().work.total


def test_more_failures_and_longer_intervals_cost_time_that_trains() -> None:
    base = plan(checkpoint_every_steps=100).operation
    assert base.ettr is not None and 0 < base.ettr < 1
    worse = plan(checkpoint_every_steps=100, assumed=Assumptions(failures_per_node_day=1.0)).operation
    longer = plan(checkpoint_every_steps=10_000).operation
    assert worse.ettr is not None and worse.ettr < base.ettr
    assert longer.ettr is not None and longer.ettr < base.ettr
    assert plan().operation.ettr is None


def test_a_search_ranks_the_layouts_that_fit_by_speed() -> None:
    found = search(subject_of(SPEC, LAYOUT, global_batch_size=256), SHARED, H100, ASSUMED, 64)
    speeds = [plan.tokens_per_second for plan in found.fitting]
    assert speeds == sorted(speeds, reverse=True) and len(speeds) > 10
    assert all(plan.subject.world_size == 64 and not plan.reasons for plan in found.fitting)
    layouts = [(plan.subject.axes, plan.subject.micro_batch_size) for plan in found.fitting]
    assert len(set(layouts)) == len(layouts)
    assert speeds[0] >= make_plan(subject_of(SPEC, LAYOUT, global_batch_size=256), H100, ASSUMED).tokens_per_second


def test_a_search_without_an_answer_shows_the_nearest_layout() -> None:
    found = search(subject_of(SPEC, LAYOUT, global_batch_size=256), SHARED, H100, ASSUMED, 1)
    assert found.fitting == [] and found.tightest is not None and "needs" in found.tightest.reasons[0]


@pytest.mark.parametrize(
    ("override", "part"),
    [("nonsense=1", "allowed: matrix_efficiency"), ("reserve=x", "not a number"), ("reserve=-1", "above 0")],
)
def test_an_assumption_that_is_none_is_refused(override: str, part: str) -> None:
    with pytest.raises(UsageError, match=part):
        Assumptions.with_overrides([override])


def test_an_unknown_gpu_is_refused_with_the_table() -> None:
    with pytest.raises(UsageError, match="a100, h100, h200, b200"):
        gpu_named("v100")
