"""Failures that a rank reports after it lost its peers."""

from __future__ import annotations

from pathlib import Path

import pytest

from megamask.errors import StorageError, SupersededError
from megamask.runs.rank_files import write_rank_failure
from megamask.training.failure import LOST_PEER, has_lost_peer, peer_failure

KILLED = "killed by SIGKILL (9)"


@pytest.mark.parametrize(
    ("error", "is_lost"),
    [
        (RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:4312"), True),
        (RuntimeError("Read error [127.0.0.1]:4312: Connection reset by peer"), True),
        (RuntimeError("failed to recv, got 0 bytes. Connection was likely closed."), True),
        (RuntimeError("NCCL error: ncclRemoteError: A call failed possibly due to a network error"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("Connection closed by peer"), False),
        (StorageError("Broken pipe"), False),
    ],
)
def test_lost_peer_is_known_by_what_the_backends_say(error: Exception, is_lost: bool) -> None:
    assert has_lost_peer(error) == is_lost


@pytest.mark.promise("a killed peer explains a lost connection and no other error")
def test_killed_peer_explains_a_lost_connection_and_no_other_error(tmp_path: Path) -> None:
    write_rank_failure(tmp_path, 1, rank=1, exit_code=1, reason=KILLED)
    failure = peer_failure(tmp_path, 1, 0, is_lost=True)
    assert failure is not None
    assert (failure.message, int(failure.exit_code), failure.hint) == (f"rank 1: {KILLED}", 1, None)
    assert peer_failure(tmp_path, 1, 0, is_lost=False) is None
    assert peer_failure(tmp_path, 1, 1, is_lost=True) is None


def test_rank_that_lost_its_peer_too_explains_nothing(tmp_path: Path) -> None:
    write_rank_failure(tmp_path, 1, rank=1, exit_code=1, reason=LOST_PEER)
    assert peer_failure(tmp_path, 1, 0, is_lost=True) is None
    write_rank_failure(tmp_path, 1, rank=2, exit_code=1, reason=KILLED)
    failure = peer_failure(tmp_path, 1, 0, is_lost=True)
    assert failure is not None
    assert failure.message == f"rank 2: {KILLED}"


def test_peer_that_was_superseded_makes_the_job_end_with_93(tmp_path: Path) -> None:
    write_rank_failure(tmp_path, 1, rank=0, exit_code=93, reason="superseded by attempt 2")
    assert isinstance(peer_failure(tmp_path, 1, 1, is_lost=False), SupersededError)
