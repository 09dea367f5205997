"""FP8 from the command line: emulated runs train and resume; what a machine cannot run is refused before a claim."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.command import ROOT, journal, megamask

TINY = ROOT / "configs" / "run" / "tiny.yaml"
DELAYED = ("precision.fp8=delayed", "precision.fp8_kernels=emulate", "precision.fp8_amax_history=4")


def train(folder: Path, corpus: Path, name: str, *overrides: str):
    return megamask(
        *("train", TINY, f"run.output_dir={folder}", f"run.name={name}", f"data.corpora.main={corpus}"),
        *("training.steps=4", "training.sequence_length=64", "training.global_batch_size=2"),
        *("checkpoint.every_steps=2", "tracking.mlflow.enabled=false", "optimizer.warmup_steps=1", *overrides),
    )


@pytest.mark.promise("FP8 training resumes bit for bit, the state of delayed scaling included")
def test_a_stopped_delayed_run_resumes_to_the_same_losses(tmp_path: Path, small_corpus: Path) -> None:
    assert train(tmp_path, small_corpus, "whole", *DELAYED).code == 0
    for overrides in (("training.stop_after_step=2",), ()):
        assert train(tmp_path, small_corpus, "parts", *DELAYED, *overrides).code == 0
    losses = {
        name: [record["loss"] for record in journal(tmp_path / name) if record["kind"] == "step"]
        for name in ("whole", "parts")
    }
    assert losses["parts"] == losses["whole"] and len(losses["whole"]) == 4
    started = [record for record in journal(tmp_path / "parts") if record["kind"] == "attempt_started"]
    assert [(record["layers"], record["fp8"]) for record in started] == [("emulated", "delayed, emulated")] * 2


@pytest.mark.promise("a refused FP8 recipe names the reason, the allowed recipes and the key")
def test_fp8_kernels_are_refused_here_before_the_run_is_claimed(tmp_path: Path, small_corpus: Path) -> None:
    done = train(tmp_path, small_corpus, "none", "precision.fp8=tensorwise", "precision.compute=bf16")
    assert done.code == 2
    assert "precision.fp8 is 'tensorwise', but Transformer Engine is not installed; allowed: none" in done.stderr
    assert "precision.fp8_kernels=emulate" in done.stderr
    assert "Nothing was started" in done.stderr
    assert not (tmp_path / "none").exists()
