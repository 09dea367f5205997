"""The end of an attempt, as its journal records it."""

from __future__ import annotations

from pathlib import Path

import pytest

from megamask.audit.run import verify_run
from megamask.errors import StorageError
from support.command import journal
from support.journalled_run import JournalledRun
from support.tiny_run import write_corpus


@pytest.mark.promise("the end of an attempt names the last step that the journal has, also when the disk was full")
def test_end_after_a_full_disk_names_the_last_step_that_was_journalled(tmp_path: Path) -> None:
    run = JournalledRun(tmp_path, write_corpus(tmp_path / "texts"))
    run.start(None)
    run.step()
    run.progress.advance(global_batch_size=2, num_eligible=9, loss=1.0)  # the disk refused this step's line
    run.attempt.fail(StorageError("the disk is full"), 74, run.progress)
    run.close()
    assert journal(run.run_dir)[-1]["kind"] == "attempt_ended"
    assert journal(run.run_dir)[-1]["step"] == 1
    assert verify_run(run.run_dir)["findings"] == []
