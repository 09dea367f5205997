"""Transformer Engine's FP8 kernels against the emulation, its Adam and its own checks against megamask's."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from support.gpu_worker import HAS_TE, NO_TE

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not HAS_TE, reason=NO_TE)]

# relative error of output, input's gradient and weight's gradient against bf16: E4M3 has 3 bits, E5M2 has 2
LIMITS = (0.04, 0.07, 0.07)


@pytest.mark.promise("the emulation of FP8 computes what Transformer Engine's kernels do (GPU)")
@pytest.mark.parametrize("recipe", ["tensorwise", "delayed", "blockwise"])
def test_products_of_the_emulation_are_those_of_the_kernels(work: Any, recipe: str) -> None:
    found = work("linear")[recipe]
    for kind in ("te", "emulated"):
        assert all(0 < error < limit for error, limit in zip(found[kind], LIMITS, strict=True)), found
    # much nearer to each other than to bf16: the same numbers were rounded the same way
    assert all(mutual < 0.2 * error for mutual, error in zip(found["mutual"], found["te"], strict=True)), found


def test_quantised_elements_are_at_most_one_step_apart(work: Any) -> None:
    found = work("quantised")
    assert found["within_a_step"] >= 0.999 and found["equal"] >= 0.99, found


def test_fused_adam_takes_the_steps_of_megamasks(work: Any) -> None:
    assert work("adam")["distance"] < 1e-6


@pytest.mark.promise("FP8 recipes are allowed on exactly the architectures that have kernels for them")
def test_the_table_of_recipes_answers_as_the_library_does_on_this_card(work: Any, cuda: torch.device) -> None:
    found = work("capability")
    assert found["different"] == []
    if tuple(found["architecture"]) < (10, 0):
        assert len(found["mxfp8"]) == 1
