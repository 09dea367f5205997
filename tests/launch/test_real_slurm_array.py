"""A corpus prepared by an array of tasks on a real Slurm has the bytes of one that a single process prepared."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import pytest

from support.command import ROOT, megamask
from support.slurm_cluster import slurm_cluster, wait_for, why_not

_VERB = ROOT / "pipelines" / "megamask_pipelines" / "cli" / "prepare.py"
REASON = why_not() or (None if '"--task"' in _VERB.read_text() else "`megamask prepare` has no --task here")


def _digests(folder: Path) -> dict[str, str]:
    """Content of a corpus; provenance names the machine and the time."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "provenance.json"]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.timeout(900)
@pytest.mark.skipif(REASON is not None, reason=f"no promise about an array on Slurm is tested: {REASON}")
@pytest.mark.promise("Slurm: an array of tasks prepares the corpus that one process prepares, byte for byte")
def test_array_prepares_the_corpus_of_one_process(tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    for number in range(40):
        (tmp_path / "texts" / f"{number:03d}.txt").write_text(
            f"Text {number}: " + f"word{number % 7} and {number * 37 % 101} " * (number + 5)
        )
    settings = [
        str(ROOT / "configs" / "corpus" / "python_stdlib.yaml"),
        f"corpus.inputs=['{tmp_path}/texts/*.txt']",
        "corpus.tokenizer.vocab_size=300",
        "corpus.sequence_length=64",
        "corpus.validation_fraction=0.1",
        "corpus.rows_per_block=16",
    ]
    alone = megamask("prepare", *settings, f"corpus.output_dir={tmp_path}/alone")
    assert alone.code == 0, alone.stderr
    words = [str(ROOT / "slurm" / "prepare_array.sbatch"), *settings, f"corpus.output_dir={tmp_path}/array"]
    with slurm_cluster(tmp_path / "slurm") as slurm:
        program = f"--export=ALL,MEGAMASK={sys.executable} -P -m megamask_pipelines.cli.main"
        options = ["--parsable", "--cpus-per-task=1", f"--chdir={tmp_path}", program]
        tasks = slurm.call("sbatch", *options, "--array=0-2", *words).stdout.strip()
        after = [f"--dependency=afterok:{tasks}", "--kill-on-invalid-dep=yes"]
        merge = slurm.call("sbatch", *options, *after, *words).stdout.strip()
        ended = ("COMPLETED", "FAILED", "CANCELLED", "NODE_FAIL")
        wait_for("the merge", lambda: slurm.job(merge)["JobState"] in ended, 600)
        logs = "".join(path.read_text() for path in sorted(tmp_path.glob("prepare-*.log")))
        assert slurm.job(merge)["JobState"] == "COMPLETED", logs
    assert _digests(tmp_path / "array") == _digests(tmp_path / "alone")
