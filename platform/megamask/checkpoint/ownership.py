"""Ownership of a checkpoint: a folder of another run among a run's own is refused, never resumed from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from megamask.checkpoint.commit import Commit
from megamask.errors import CheckpointIntegrityError, UsageError
from megamask.runs.record import RunRecord


@dataclass(frozen=True, kw_only=True)
class Owner:
    """Fields that all checkpoints of one run have in common.

    Args:
        run_id: as in run.json.
        seed: run.seed.
        corpora: corpus name -> corpus id.
        run_sha256: of the bytes of run.json, which never change; None to leave it out.
    """

    run_id: str
    seed: int
    corpora: Mapping[str, str]
    run_sha256: str | None = None

    def refuse_foreign(self, commit: Commit) -> None:
        """Refuse the commit of another run, or one that another seed or other corpora led to.

        Raises:
            UsageError: names the folder and what differs.
            CheckpointIntegrityError: it is this run's, whose run.json was changed afterwards.
        """
        if commit.run_id != self.run_id:
            raise _foreign(commit, f"belongs to run {commit.run_id}, this is run {self.run_id}")
        seed = commit.state.get("seed")
        if seed is not None and seed != str(self.seed):  # a missing one is damage, which its reader reports
            raise _foreign(commit, f"was made with run.seed {seed}, this run has {self.seed}")
        if not _agree(commit.corpora, self.corpora):
            raise _foreign(commit, f"was made on corpora {dict(commit.corpora)}, this run has {dict(self.corpora)}")
        if self.run_sha256 is not None and commit.run_sha256 not in (None, self.run_sha256):
            raise CheckpointIntegrityError(
                f"run.json has sha256 {self.run_sha256}, but {commit.folder} was written when it had "
                f"{commit.run_sha256}: it was changed since. Nothing was started.",
                hint="restore run.json from a copy; `megamask verify run` compares all records",
            )


def _agree(one: Mapping[str, str], other: Mapping[str, str]) -> bool:
    """Return whether two records name the same corpora, apart from more that one of them has (a run may grow).

    A run has its first corpora from its first step on, so a record without any agrees with no other.
    """
    shared = set(one) & set(other)
    if not shared:
        return not one and not other
    return shared in (set(one), set(other)) and all(one[name] == other[name] for name in shared)


def owner_of(record: RunRecord) -> Owner:
    """Return what every checkpoint of a run must name."""
    content = record.content
    return Owner(
        run_id=record.run_id,
        seed=int(content["identity"]["run.seed"]),
        corpora=content["corpora"],
        run_sha256=record.sha256,
    )


def _foreign(commit: Commit, what: str) -> UsageError:
    return UsageError(
        f"{commit.folder} {what}. Nothing was loaded.",
        hint=f"move the folder out of {commit.folder.parent}, then start the run again",
    )
