"""No rank holds more of the state than its share plus one tensor, neither to save nor to load it on another layout."""

from __future__ import annotations

from pathlib import Path

import pytest

from support import state_memory
from support.gloo import run_gloo

pytestmark = [pytest.mark.multiprocess, pytest.mark.timeout(600)]

LAYOUTS = [
    {"data_parallel_size": 2},
    {"tensor_parallel_size": 2, "sequence_parallel": True},
    {"pipeline_parallel_size": 2},
    {"context_parallel_size": 2},
]
# headers, lists and collectives; the largest tensor is 3 MB, a share 23 MB, the state 46 MB
SLACK_BYTES = 1 << 20


@pytest.mark.promise("no rank holds more than its share plus one tensor, neither to save the state nor to load it")
def test_no_rank_holds_more_than_its_share_and_one_tensor(tmp_path: Path) -> None:
    ranks = run_gloo(2, state_memory.__file__, "run", root=str(tmp_path), runs=LAYOUTS)
    for answers in zip(*ranks, strict=True):
        state = sum(answer["share"] for answer in answers)
        for answer in answers:
            # weights and moments of the rank are there before; loading and saving add one tensor at most
            assert answer.get("load", 0) <= answer["largest"] + SLACK_BYTES, answer
            assert answer["save"] <= answer["largest"] + SLACK_BYTES, answer
            assert answer["copy"] <= answer["share"] + SLACK_BYTES, answer
            assert answer["largest"] + SLACK_BYTES < answer["share"] / 2 < state / 2
