"""Ranks need a folder for temporary files; a pod with a read-only root may have none."""

from __future__ import annotations

import tempfile

import pytest

from megamask.errors import ExitCode, MegamaskError
from megamask.launch.ranks import Gang, run_ranks


@pytest.mark.promise("A missing folder for temporary files is named (74), and nothing is started")
def test_missing_temporary_folder_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: ["/proc/no-folder"])
    with pytest.raises(MegamaskError, match="no folder for temporary files can be written") as refusal:
        run_ranks(["train"], Gang(num_ranks=1, world_size=1, address="127.0.0.1", port=1))
    assert refusal.value.exit_code == ExitCode.STORAGE
    assert "Nothing was started" in refusal.value.message
    assert "emptyDir" in str(refusal.value.hint)
