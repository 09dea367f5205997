"""skips.json: the rewinds of a run, each with the sample indices that it leaves out; a run without any has no file.

The document grows by one entry with each rewind and is replaced atomically. An entry holds for every attempt after the
one that wrote it: the mapping from positions to sample indices that an attempt trains under is that of the entries of
earlier attempts.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from megamask.errors import CheckpointIntegrityError
from megamask.runs.laws import SKIPPING_LAWS
from megamask.runs.layout import skips_path
from megamask.storage.documents import DocumentKind, OwnDigest, encode_document, read_document
from megamask.storage.durable import write_atomic

SKIPS = DocumentKind(
    format="megamask-skips",
    version=1,
    is_canonical=False,
    own_digest=OwnDigest.REQUIRED,
    damage=CheckpointIntegrityError,
    damage_hint="restore the file from a copy: without it no program knows which samples the run has left out",
)


@dataclass(frozen=True, kw_only=True)
class Rewind:
    """A return to an earlier step, from which the run goes on without some samples.

    Args:
        attempt: that found the step at fault; later attempts leave the samples out.
        step: at fault; it was not taken.
        back_to_step: the last step whose samples stay as they were.
        first_sample, end_sample: the sample indices first, ..., end - 1 are left out.
        rule: why, in one word: not_finite, loss or grad_norm.
    """

    attempt: int
    step: int
    back_to_step: int
    first_sample: int
    end_sample: int
    rule: str

    @property
    def samples(self) -> range:
        """The sample indices that are left out."""
        return range(self.first_sample, self.end_sample)

    def withdraws(self, *, step: int, attempt: int) -> bool:
        """Return whether a checkpoint or a step of an attempt belongs to the past that this rewind replaced."""
        return attempt <= self.attempt and step > self.back_to_step


def read_rewinds(run_dir: Path) -> list[Rewind]:
    """Return the rewinds of a run in their order; empty where there is no document.

    Raises:
        CheckpointIntegrityError: the document is damaged. UsageError: a newer megamask wrote it.
        StorageError: the storage refused.
    """
    path = skips_path(run_dir)
    if not path.is_symlink() and not path.exists():
        return []
    content = read_document(SKIPS, path)
    try:
        rewinds = [_parse(entry) for entry in content["rewinds"]]
        if content["laws"] != SKIPPING_LAWS or not rewinds:
            raise ValueError("laws or rewinds")
        for before, after in itertools.pairwise(rewinds):
            if after.attempt <= before.attempt:
                raise ValueError(f"attempt {after.attempt} after attempt {before.attempt}")
    except (KeyError, TypeError, ValueError) as error:
        raise SKIPS.damaged(path, f"lacks or misstates a field ({error})") from error
    return rewinds


def write_rewinds(run_dir: Path, run_id: str, rewinds: Sequence[Rewind]) -> None:
    """Replace the document; when this returns, the rewind holds.

    Raises:
        StorageError: the storage refused; the document before is intact.
    """
    content = {"run_id": run_id, "laws": SKIPPING_LAWS, "rewinds": [asdict(rewind) for rewind in rewinds]}
    write_atomic(skips_path(run_dir), encode_document(SKIPS, content))


def rewinds_before(rewinds: Sequence[Rewind], attempt: int) -> list[Rewind]:
    """Return the rewinds that an attempt trains under."""
    return [rewind for rewind in rewinds if rewind.attempt < attempt]


def _parse(entry: object) -> Rewind:
    if not isinstance(entry, dict) or entry.keys() != {field.name for field in fields(Rewind)}:
        raise ValueError("a rewind without exactly its fields")
    numbers = [value for name, value in entry.items() if name != "rule"]
    is_count = [type(number) is int and 0 <= number < 1 << 62 for number in numbers]
    if not isinstance(entry["rule"], str) or not all(is_count):
        raise ValueError("a rewind that is not made of numbers")
    rewind = Rewind(**entry)
    if not (rewind.attempt >= 1 and rewind.back_to_step < rewind.step and rewind.first_sample < rewind.end_sample):
        raise ValueError(f"attempt {rewind.attempt}, step {rewind.step}")
    return rewind
