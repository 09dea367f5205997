"""Every layout carries out positions, documents and attention patterns; later stages see no token ids."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from support import context_worker as worker
from support import engine_cases as cases
from support.gloo import run_gloo

pytestmark = [pytest.mark.multiprocess, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def hidden(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, torch.Tensor]]:
    root = tmp_path_factory.mktemp("contexts")
    run_gloo(2, worker.__file__, "run_layouts", root=str(root))
    return [torch.load(Path(root) / f"{number}.pt") for number in range(len(worker.LAYOUTS))]


@pytest.mark.promise("the engine carries out positions, documents and attention patterns as the reference network does")
@pytest.mark.parametrize("name", worker.CONTEXTS)
@pytest.mark.parametrize("number", range(len(worker.LAYOUTS)), ids=["tensor2", "sequence2", "pipeline2"])
def test_hidden_states_are_the_reference_networks_on_every_layout(number: int, name: str, hidden: list) -> None:
    with torch.no_grad():
        expected = cases.reference(cases.OPTIONS)(worker.inputs(), worker.CONTEXTS[name])
    torch.testing.assert_close(hidden[number][name], expected, rtol=1e-5, atol=1e-5)
