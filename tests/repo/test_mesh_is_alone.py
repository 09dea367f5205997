"""One file of the engine asks megatron-core about ranks and groups."""

from __future__ import annotations

from pathlib import Path

import pytest

ENGINE = Path(__file__).parents[2] / "platform" / "megamask" / "engine"


@pytest.mark.promise("engine/mesh.py is the only place that knows axes, sizes, ranks and process groups")
def test_parallel_state_is_used_in_the_mesh_alone() -> None:
    users = [path.name for path in ENGINE.rglob("*.py") if "parallel_state" in path.read_text(encoding="utf-8")]
    assert users == ["mesh.py"]
