"""The same samples, masks and losses over 20 steps on every layout, through the command line."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.command import megamask, step_lines, tiny

pytestmark = pytest.mark.multiprocess

LAYOUTS = {
    "tensor2": ["layout.tensor_parallel_size=2"],
    "tensor2-sequence": ["layout.tensor_parallel_size=2", "layout.sequence_parallel=true"],
    "pipeline2": ["layout.pipeline_parallel_size=2"],
    "data2": ["layout.data_parallel_size=2"],
    "tensor2-data2": ["layout.tensor_parallel_size=2", "layout.data_parallel_size=2"],
}
# Layouts add the same float32 numbers in another order. One step differs by a few units in the last place (6e-8 each);
# AdamW passes such a difference on to the weights, and over 20 steps of this network it grows about tenfold. A wrong
# sample, mask or scale shows at 1e-3 and above in the very first step.
LOSS_TOLERANCE = 2e-6
GRAD_NORM_TOLERANCE = 2e-5
EXACT = ("masked_tokens", "batch_digest", "content_digest", "consumed_samples", "consumed_tokens", "processed_tokens")


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory, small_corpus: Path) -> dict[int, dict[str, object]]:
    runs = tmp_path_factory.mktemp("layouts")
    assert megamask("train", *tiny(small_corpus, runs, "one")).code == 0
    return step_lines(runs / "one")


@pytest.mark.promise("every layout trains on the same samples and masks to the same losses")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_trains_as_one_process_does(
    layout: str, one_process: dict[int, dict[str, object]], small_corpus: Path, tmp_path: Path
) -> None:
    done = megamask("train", *tiny(small_corpus, tmp_path, layout, *LAYOUTS[layout]))
    assert done.code == 0, done.stderr
    steps = step_lines(tmp_path / layout)
    assert sorted(steps) == sorted(one_process) == list(range(1, 21))
    for step, expected in one_process.items():
        line = steps[step]
        assert {key: line[key] for key in EXACT} == {key: expected[key] for key in EXACT}, step
        assert line["loss"] == pytest.approx(expected["loss"], rel=LOSS_TOLERANCE), step
        assert line["grad_norm"] == pytest.approx(expected["grad_norm"], rel=GRAD_NORM_TOLERANCE), step


@pytest.mark.promise("`precision.compute` and `objective.z_loss_weight` reach the engine from the command line")
def test_bf16_run_with_a_z_loss_is_near_the_float32_run(
    one_process: dict[int, dict[str, object]], small_corpus: Path, tmp_path: Path
) -> None:
    """The settings reach the engine; how near is measured in tests/engine/test_precision.py."""
    settings = ("precision.compute=bf16", "objective.z_loss_weight=1e-4", "layout.tensor_parallel_size=2")
    assert megamask("train", *tiny(small_corpus, tmp_path, "half", *settings)).code == 0
    for step, line in step_lines(tmp_path / "half").items():
        expected, terms = one_process[step], line["loss_terms"]
        assert {key: line[key] for key in EXACT} == {key: expected[key] for key in EXACT}, step
        assert terms["nelbo"] == line["nelbo_nats_per_token"] == pytest.approx(expected["loss"], rel=1e-2), step
        assert terms["nelbo"] != expected["loss"]
        assert line["loss"] == terms["nelbo"] + terms["z_loss"] > terms["nelbo"]


@pytest.mark.promise("a run may change its layout at every restart")
def test_run_continues_on_another_layout(
    one_process: dict[int, dict[str, object]], small_corpus: Path, tmp_path: Path
) -> None:
    arguments = tiny(small_corpus, tmp_path, "moving")
    assert megamask("train", *arguments, *LAYOUTS["tensor2-sequence"], "training.stop_after_step=8").code == 0
    assert megamask("train", *arguments, *LAYOUTS["pipeline2"], "training.stop_after_step=14").code == 0
    assert megamask("train", *arguments, *LAYOUTS["data2"]).code == 0
    for step, line in step_lines(tmp_path / "moving").items():
        expected = one_process[step]
        assert {key: line[key] for key in EXACT} == {key: expected[key] for key in EXACT}, step
        assert line["loss"] == pytest.approx(expected["loss"], rel=LOSS_TOLERANCE), step
