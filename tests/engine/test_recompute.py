"""Experts that are computed again change no bit of a step, and a router counts each token once."""

from __future__ import annotations

import dataclasses

import pytest

from megamask.models.experts import ExpertSpec
from support import engine_cases as cases
from support.layout_worker import SPECS

CHOOSING = dataclasses.replace(
    cases.PLAIN, experts=ExpertSpec(num_experts=8, topk=2, ffn_hidden_size=24, choice="experts")
)
NETWORKS = {"experts": SPECS["experts"], "experts that choose": CHOOSING}


@pytest.mark.promise("recomputed activations change no bit")
@pytest.mark.parametrize("compute", ["fp32", "bf16"])
@pytest.mark.parametrize("spec", NETWORKS.values(), ids=NETWORKS)
def test_recomputed_experts_change_no_bit_and_are_counted_once(build, spec, compute):
    found = {}
    for recompute in ("none", "selective", "full"):
        engine = build(spec, micro_batch_size=2, compute=compute, recompute=recompute)
        reports = [cases.report_fields(cases.take_step(engine, step)) for step in (1, 2)]
        found[recompute] = (reports, engine.parameter_digest())
    assert found["selective"] == found["none"]
    assert found["full"] == found["none"]
