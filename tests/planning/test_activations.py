"""Activations of a rank: the arithmetic against what torch saves, and the micro-batches in flight."""

from __future__ import annotations

import dataclasses

import pytest

from megamask.config.rules.layout import AxisSizes
from megamask.models.experts import ExpertSpec
from megamask.planning.activations import activation_bytes, chunk_passes_in_flight, stored_by_layer
from support import engine_cases, saved_activations
from support.gloo import run_gloo
from support.planned import shape, subject_of

LENGTH = 256
GROUPED = dataclasses.replace(
    engine_cases.PLAIN, num_layers=3, hidden_size=64, ffn_hidden_size=160, head_dim=16, max_sequence_length=LENGTH
)
EACH_ITS_OWN = dataclasses.replace(GROUPED, num_query_groups=4)
NORMED = dataclasses.replace(GROUPED, qk_norm=True, qkv_bias=True)
EXPERTS = ExpertSpec(num_experts=8, topk=2, ffn_hidden_size=96, num_dense_layers=1)
MIXTURE = dataclasses.replace(GROUPED, experts=EXPERTS)
SHARED = dataclasses.replace(GROUPED, experts=dataclasses.replace(EXPERTS, num_shared=1))
DENSE = {"grouped": GROUPED, "each-its-own": EACH_ITS_OWN, "normed": NORMED}
SPECS = DENSE | {"experts": MIXTURE, "shared-experts": SHARED}
SEQUENCE = {"tensor_parallel_size": 2, "sequence_parallel": True}
LAYOUTS = {"tensor": {"tensor_parallel_size": 2}, "sequence": SEQUENCE, "context": {"context_parallel_size": 2}}
OF_EXPERTS = {
    "sequence-experts": SEQUENCE | {"expert_parallel_size": 2},
    "context-experts": {"context_parallel_size": 2, "expert_parallel_size": 2},
    "sequence-expert-tensor": SEQUENCE | {"expert_tensor_parallel_size": 2},
}
RECOMPUTE = ("none", "selective", "full")


def planned(spec, compute: str, recompute: str = "none", **axes) -> int:
    """Bytes that the layers, the embedding and the final norm of two rows keep; no head."""
    subject = subject_of(
        spec,
        AxisSizes(**axes),
        compute=compute,
        recompute=recompute,
        shape=shape(spec),
        head_rows=0,
        head_chunk_rows=0,
        global_batch_size=1,
    )
    found = activation_bytes(subject, pipeline_rank=0)
    of_head = subject.positions * spec.hidden_size * subject.format_bytes
    of_matrix = spec.padded_vocab_size // subject.axes.tensor_parallel_size * spec.hidden_size * 4
    return found.layers + found.ends - of_head - of_matrix


@pytest.mark.promise("Activation bytes of a plan are within 5 % of what the engine saves for its backward pass.")
@pytest.mark.parametrize("recompute", RECOMPUTE)
@pytest.mark.parametrize("compute", ["fp32", "bf16"])
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_a_stage_saves_what_the_plan_counts(job, spec, compute: str, recompute: str) -> None:
    engine = engine_cases.make_engine(spec, compute=compute, recompute=recompute)
    saved = saved_activations.saved_bytes(engine, num_rows=2, length=LENGTH)
    assert planned(spec, compute, recompute) == pytest.approx(saved, rel=0.05)


@pytest.mark.multiprocess
@pytest.mark.promise("Activation bytes of a plan are within 5 % of what the engine saves for its backward pass.")
def test_ranks_save_what_the_plan_counts() -> None:
    """The mean of both ranks: a router gives one of them more tokens than the other."""
    runs = [
        (name, layout, axes, compute, recompute)
        for specs, layouts in ((DENSE, LAYOUTS), ({"shared-experts": SHARED}, OF_EXPERTS))
        for name in specs
        for layout, axes in layouts.items()
        for compute, recompute in (("fp32", "none"), ("bf16", "none"), ("fp32", "selective"))
    ]
    answers = run_gloo(
        2,
        saved_activations.__file__,
        "run_ranks",
        runs=[[SPECS[name].to_json(), axes, compute, again, LENGTH] for name, _, axes, compute, again in runs],
    )
    for (name, layout, axes, compute, recompute), *saved in zip(runs, *answers, strict=True):
        found = planned(SPECS[name], compute, recompute, **axes)
        assert found == pytest.approx(sum(saved) / 2, rel=0.05), (name, layout, compute, recompute)


def test_a_layer_that_is_recomputed_keeps_its_input_only() -> None:
    subject = subject_of(GROUPED, AxisSizes(), recompute="full")
    assert stored_by_layer(subject, 0) == subject.positions * GROUPED.hidden_size * 2
    whole = subject_of(GROUPED, AxisSizes())
    part = subject_of(GROUPED, AxisSizes(), recompute="selective")
    assert stored_by_layer(subject, 0) < stored_by_layer(part, 0) < stored_by_layer(whole, 0)


@pytest.mark.parametrize("virtual", [1, 2, 3])
@pytest.mark.parametrize("micro_batches", [4, 8, 64])
def test_micro_batches_in_flight_are_those_of_the_schedule(virtual: int, micro_batches: int) -> None:
    """Against a simulation: warm-up forwards by the schedules' formulas, then one forward and one backward in turn."""
    ranks = 4
    spec = dataclasses.replace(GROUPED, num_layers=12)
    axes = AxisSizes(pipeline_parallel_size=ranks, virtual_pipeline_parallel_size=virtual)
    subject = subject_of(spec, axes, global_batch_size=micro_batches)
    for rank in range(ranks):
        passes = micro_batches * virtual
        warm_up = (ranks - rank - 1) if virtual == 1 else 2 * (ranks - rank - 1) + (virtual - 1) * ranks
        forwards, waiting, most = 0, 0, 0
        while forwards < passes:
            forwards, waiting = forwards + 1, waiting + 1
            most = max(most, waiting)
            if forwards > warm_up:
                waiting -= 1
        assert chunk_passes_in_flight(subject, rank) == most


def test_the_fullest_stage_is_the_first_and_the_head_is_on_the_last() -> None:
    spec = dataclasses.replace(GROUPED, num_layers=8)
    subject = subject_of(spec, AxisSizes(pipeline_parallel_size=4), global_batch_size=16)
    found = [activation_bytes(subject, pipeline_rank=rank) for rank in range(4)]
    assert [stage.in_flight for stage in found] == [4, 3, 2, 1]
    assert [stage.logits > 0 for stage in found] == [False, False, False, True]
