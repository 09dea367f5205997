from __future__ import annotations

import pytest
import torch

from megamask.engine.selection import check_capacity
from megamask.errors import UsageError
from support import engine_cases as cases
from support.engine_cases import OPTIONS


def test_masked_rows_score_bit_for_bit_as_in_the_whole_sequence(build):
    """Choosing positions changes what is computed, not how: each row of a matrix product stands for itself."""
    engine = build(OPTIONS)
    head, network = engine._rank_model.head, engine._rank_model.network
    x_t, x_0, is_masked = cases.probe_rows(4, OPTIONS)
    everything = torch.arange(x_0.numel())
    chosen = is_masked.flatten().nonzero().squeeze(1)
    with torch.no_grad():
        hidden = network.encode(x_t)
        whole = head.score(network, hidden, x_0, everything)[0]
        part = head.score(network, hidden, x_0, chosen)[0]
    torch.testing.assert_close(part, whole[chosen], rtol=1e-6, atol=1e-6)
    assert part.isfinite().all()


def test_excluded_columns_get_no_gradient(build):
    """The mask token's row of the output layer, and the padding rows, stay out of the softmax."""
    engine = build(cases.PLAIN, clip_grad_norm=0.0)
    cases.take_step(engine, 1, learning_rate=0.0)
    gradient = dict(engine._rank_model.network.named_parameters())["output_layer.weight"].main_grad
    assert not gradient[60:].any()  # the mask id is 60, padding from 61 on
    assert gradient[:60].any(dim=1).all()


def test_capacity_is_refused_with_one_that_would_do():
    check_capacity(64, 64, micro_batch_size=2)
    with pytest.raises(UsageError, match=r"training\.head_capacity is 32 rows.*2 samples has 65.*at least 33") as error:
        check_capacity(65, 64, micro_batch_size=2)
    assert "null" in error.value.hint
