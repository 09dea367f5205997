"""The table of reference curves is the journal's numbers, weighted by tokens."""

from __future__ import annotations

import importlib.util
from pathlib import Path

SPEC = importlib.util.spec_from_file_location("loss_table", Path(__file__).parents[2] / "tools" / "loss_table.py")
assert SPEC is not None and SPEC.loader is not None
loss_table = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(loss_table)


def _step(number: int, loss: float, entropies: dict[int, tuple[float, int]]) -> dict:
    levels = [entropies.get(level, (None, 0)) for level in range(10)]
    return {
        "kind": "step",
        "step": number,
        "loss": loss,
        "loss_by_noise_level": [entropy for entropy, _ in levels],
        "masked_tokens_by_noise_level": [count for _, count in levels],
    }


def test_cells_are_means_over_tokens_and_the_last_bound_of_a_span() -> None:
    lines = [
        {"kind": "attempt_started", "attempt": 0},
        _step(1, 4.0, {1: (1.0, 1), 2: (2.0, 3)}),
        {"kind": "evaluation", "step": 1, "nelbo_nats_per_token": 9.0},
        _step(2, 6.0, {1: (5.0, 4), 9: (8.0, 2)}),
        {"kind": "evaluation", "step": 2, "nelbo_nats_per_token": 7.0},
        _step(3, 1.0, {}),
    ]
    rows = loss_table.table(lines, [(1, 2), (3, 3)]).splitlines()
    assert rows[0].startswith("| steps | loss | bound | 0.0 to 0.1 | 0.1 to 0.3 |")
    mean = (1.0 + 2.0 * 3 + 5.0 * 4) / 8
    assert rows[2] == f"| 1 to 2 | 5.00 | 7.00 | - | {mean:.2f} | - | - | - | 8.00 |"
    assert rows[3] == "| 3 to 3 | 1.00 | - | - | - | - | - | - | - |"
