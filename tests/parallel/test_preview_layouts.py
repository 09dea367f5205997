"""Every layout decodes the tokens of the reference network, and no preview changes a step.

A layout changes the order of float32 sums, so that probabilities agree to about 1e-6; the tokens are equal because no
two choices of this network lie that close.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megamask.generation.predictor import ReferencePredictor
from support import engine_cases as cases
from support import preview_worker as worker
from support.gloo import run_gloo

pytestmark = [pytest.mark.multiprocess, pytest.mark.timeout(600)]

TENSOR = {"tensor_parallel_size": 2}
SEQUENCE = TENSOR | {"sequence_parallel": True}
PIPELINE = {"pipeline_parallel_size": 2}
DATA = {"data_parallel_size": 2}
TWO = [("plain", TENSOR), ("options", SEQUENCE), ("plain", PIPELINE), ("plain", DATA)]
FOUR = [("options", SEQUENCE | PIPELINE)]
ONE = [(spec, {}) for spec in worker.SPECS]


def name(run: Any) -> str:
    spec, layout = run
    return "-".join([spec, *(f"{key.split('_')[0]}{int(value)}" for key, value in layout.items())])


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("previews")


@pytest.fixture(scope="module")
def layouts(root: Path) -> Callable[[Any], list[dict[str, Any]]]:
    """All ranks' answers for each run; those of one process leave the weights that all others go on from."""
    found: dict[str, list[dict[str, Any]]] = {}

    def answers(run: Any) -> list[dict[str, Any]]:
        for num_processes, runs in ((1, ONE), (2, TWO), (4, FOUR)):
            if run in runs and name(run) not in found:
                by_rank = run_gloo(
                    num_processes, worker.__file__, "run_layouts", root=str(root), runs=[list(r) for r in runs]
                )
                found.update({name(one): [rank[number] for rank in by_rank] for number, one in enumerate(runs)})
        return found[name(run)]

    answers(ONE[0])
    return answers


@pytest.fixture(scope="module")
def expected(root: Path, layouts: Any) -> dict[str, list[dict[str, Any]]]:
    """Text that the reference network writes with the weights that one process trained, read without any engine."""
    from megamask.engine.state.restore import read_canonical_weights

    answers: dict[str, list[dict[str, Any]]] = {}
    for label, spec in worker.SPECS.items():
        model = cases.reference(spec)
        model.load_state_dict(read_canonical_weights(root / label, spec))
        predict = ReferencePredictor(network=model, vocabulary=cases.vocabulary(spec))
        answers[label] = [worker.decoded(predict, spec, temperature) for temperature in worker.TEMPERATURES]
    return answers


every_layout = pytest.mark.parametrize(
    "run", [*ONE, *TWO, *(pytest.param(run, marks=pytest.mark.slow) for run in FOUR)], ids=name
)


@pytest.mark.promise("every layout's preview equals the reference network's text, greedy and with temperature")
@every_layout
def test_tokens_are_those_of_the_reference_network_on_every_rank(run: Any, expected: Any, layouts: Any) -> None:
    """Greedy and with temperature; with noise they are not the greedy ones."""
    for rank in layouts(run):
        assert rank["found"] == expected[run[0]]
    greedy, noisy = expected[run[0]]
    assert greedy["tokens"] != noisy["tokens"]


@pytest.mark.promise("replicas share the prompts; each decodes only its own")
@every_layout
def test_row_is_the_same_alone_and_when_other_replicas_make_no_preview(run: Any, expected: Any, layouts: Any) -> None:
    alone = [rank["alone"] for rank in layouts(run) if "alone" in rank]
    noisy = expected[run[0]][1]
    assert alone == [{key: values[1:2] for key, values in noisy.items()}] * len(alone)
    assert alone


@pytest.mark.promise("previews change no step, bit for bit, on any layout")
@every_layout
def test_steps_are_bit_identical_with_previews_between_them(run: Any, layouts: Any) -> None:
    assert all(rank["is_untouched"] for rank in layouts(run))
