from __future__ import annotations

import pytest
import torch

from support import engine_cases as cases
from support.engine_cases import OPTIONS, PLAIN


@pytest.mark.parametrize("spec", [PLAIN, OPTIONS], ids=["plain", "options"])
@pytest.mark.parametrize("goal", [cases.objective(), cases.objective(complementary=False, mask_logit="included")])
def test_row_sums_equal_the_reference_networks(build, spec, goal):
    """Five rows in passes of two or four: the last pass is filled up."""
    engine = build(spec, goal=goal, micro_batch_size=2, head_chunk_rows=24)
    x_t, x_0, is_masked = cases.probe_rows(5, spec)
    sums = cases.masked_scores(engine, x_t, x_0, is_masked)
    with torch.no_grad():
        expected = cases.reference_cross_entropy(cases.reference(spec), x_t, x_0, is_masked, goal)
    assert sums.dtype == torch.float64
    assert sums[0] == 0.0
    torch.testing.assert_close(sums, expected.double(), rtol=1e-5, atol=1e-6)


def test_no_rows_have_no_sums(build):
    empty = torch.zeros(0, cases.SEQUENCE_LENGTH, dtype=torch.int64)
    assert cases.masked_scores(build(), empty, empty, empty.bool()).shape == (0,)


def test_scoring_between_steps_leaves_training_bit_identical(build):
    def run(is_scoring):
        engine = build(micro_batch_size=2)
        fields = []
        for step in (1, 2, 3):
            if is_scoring:
                cases.masked_scores(engine, *cases.probe_rows(3, PLAIN))
            fields.append(cases.report_fields(cases.take_step(engine, step)))
        return fields, engine.parameter_digest()

    assert run(is_scoring=True) == run(is_scoring=False)


def test_every_position_sees_every_other(build):
    """Leak probe: the gradient of any position's hidden state reaches the embedding of every position."""
    engine = build()
    network = engine._rank_model.network
    tokens = torch.arange(cases.SEQUENCE_LENGTH)[None] % 50 + 5
    for place in (0, cases.SEQUENCE_LENGTH - 1):
        with torch.no_grad():
            base = network.encode(tokens)[place, 0].clone()
            changed = tokens.clone()
            changed[0, cases.SEQUENCE_LENGTH - 1 - place] = 3  # the far end of the row
            moved = network.encode(changed)[place, 0]
        assert float((moved - base).abs().max()) > 1e-6
