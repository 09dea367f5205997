"""Units of a preparation: consecutive inputs, read and encoded by one process; they do not depend on the processes.

Results are kept in `.<name>.tasks/` beside the future corpus:

    plan.json                 what is prepared of which inputs; the units follow from it
    scan-UUUUUU.npz           documents of a unit: places, sizes, digests; no text
    tokenizer/                the tokenizer, once it was trained
    tokens-UUUUUU.npz         lengths and ids of all documents of a unit, one after another
    <file>.json               completion marker of an .npz: its sha256 and the facts of the unit

A file appears by a rename, its marker after it. Locks only keep two processes from doing the same unit: without them
they write the same bytes twice.
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import os
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megamask.data.corpus.documents import DocumentList
from megamask.data.corpus.inputs import InputFile
from megamask.data.corpus.scan import ScannedInput, TextNotes, changed
from megamask.errors import DataIntegrityError, UsageError
from megamask.storage.documents import DocumentKind, OwnDigest, encode_document, read_document
from megamask.storage.durable import create_exclusive, fsync_directory, make_folders, write_atomic
from megamask.storage.hashing import sha256_bytes, sha256_file

UNIT_BYTES = 64 << 20

_HINT = "remove the folder of the tasks and run them again"
PLAN = DocumentKind(
    format="megamask-prepare-plan",
    version=1,
    own_digest=OwnDigest.REQUIRED,
    damage=DataIntegrityError,
    damage_hint=_HINT,
    max_bytes=1 << 31,
)
MARKER = DocumentKind(
    format="megamask-prepare-unit",
    version=1,
    own_digest=OwnDigest.REQUIRED,
    damage=DataIntegrityError,
    damage_hint=_HINT,
    max_bytes=1 << 31,
)


@dataclass(frozen=True, kw_only=True)
class Unit:
    """Consecutive inputs, up to UNIT_BYTES together; a single larger one; or a part of one whose lines are documents.

    Args:
        number: of the unit.
        files: its inputs.
        first_input: place of the first of them among all inputs.
        part: bytes of its one input in which its lines begin; None where it has complete inputs.
    """

    number: int
    files: Sequence[InputFile]
    first_input: int
    part: range | None = None


def units_of(files: Sequence[InputFile], sizes: Sequence[int]) -> list[Unit]:
    """Divide inputs, in document order, into units; depends on nothing else.

    Args:
        files: all inputs.
        sizes: bytes of each.
    """
    units: list[Unit] = []
    first = held = 0

    def close(end: int) -> None:
        if first < end:
            units.append(Unit(number=len(units), files=files[first:end], first_input=first))

    for number, (file, size) in enumerate(zip(files, sizes, strict=True)):
        parts = parts_of(file, size)
        if parts or (number > first and held + size > UNIT_BYTES):
            close(number)
            first, held = number, 0
        for part in parts:
            units.append(Unit(number=len(units), files=[file], first_input=number, part=part))
        if parts:
            first = number + 1
        else:
            held += size
    close(len(files))
    return units


def parts_of(file: InputFile, size: int) -> list[range]:
    """Return the parts of an input of so many bytes, which do not depend on anything else; none where it is one."""
    if size <= UNIT_BYTES or file.compression is not None or file.format not in ("jsonl", "messages"):
        return []
    return [range(begin, min(begin + UNIT_BYTES, size)) for begin in range(0, size, UNIT_BYTES)]


class UnitStore:
    """Store of the results of a preparation's tasks.

    Args:
        target: the corpus to be.
        plan: what is prepared of which inputs, as JSON without fractions.

    Raises:
        UsageError: the folder holds the tasks of another preparation.
        DataIntegrityError: the plan in it is damaged.
        StorageError: the storage refused.
    """

    def __init__(self, target: Path, plan: Mapping[str, Any]) -> None:
        self.folder = folder_of(target)
        make_folders(self.folder)
        path = self.folder / "plan.json"
        with contextlib.suppress(FileExistsError):
            create_exclusive(path, encode_document(PLAN, plan))
        found = read_document(PLAN, path)
        different = sorted(key for key in {*plan, *found} - {"format", "version"} if plan.get(key) != found.get(key))
        if different:
            raise UsageError(
                f"{self.folder} holds tasks of another preparation; these differ: {', '.join(different)}. It was not "
                "touched.",
                hint="give the config of those tasks, or remove the folder",
            )

    @contextlib.contextmanager
    def locked(self, name: str) -> Iterator[None]:
        """Hold the right to do something, for as long as the process lives; waits for another holder."""
        descriptor = os.open(self.folder / f"{name}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def has(self, name: str) -> bool:
        """Return whether a file is complete."""
        return (self.folder / f"{name}.json").exists()

    def put(self, name: str, arrays: Mapping[str, npt.NDArray[Any]], facts: Mapping[str, Any]) -> None:
        """Store arrays and facts, durably, the marker last."""
        buffer = io.BytesIO()
        np.savez(buffer, **arrays)  # type: ignore[arg-type]
        data = buffer.getvalue()
        write_atomic(self.folder / f"{name}.npz", data)
        marker = {"name": name, "sha256": sha256_bytes(data), "facts": dict(facts)}
        write_atomic(self.folder / f"{name}.json", encode_document(MARKER, marker))

    def get(self, name: str) -> tuple[dict[str, npt.NDArray[Any]], dict[str, Any]]:
        """Return stored arrays and facts.

        Raises:
            DataIntegrityError: they are damaged.
        """
        path = self.folder / f"{name}.npz"
        marker = read_document(MARKER, path.with_suffix(".json"))
        if not path.is_file() or sha256_file(path) != marker["sha256"]:
            raise DataIntegrityError(
                f"{path} is not what its marker names. Nothing was published.",
                hint=f"remove {path.with_suffix('.json').name} and run the tasks again",
            )
        with np.load(path, allow_pickle=False) as stored:
            return dict(stored), dict(marker["facts"])

    def put_folder(self, name: str, files: Mapping[str, bytes]) -> None:
        """Store a folder of small files at once."""
        building = self.folder / f".{name}.{os.getpid()}.{secrets.token_hex(4)}.tmp"
        building.mkdir()
        for file, data in files.items():
            write_atomic(building / file, data)
        fsync_directory(building)
        building.rename(self.folder / name)
        fsync_directory(self.folder)


def folder_of(target: Path) -> Path:
    """Return the folder in which the tasks of a corpus keep their results."""
    return target.with_name(f".{target.name}.tasks")


def scan_name(unit: Unit) -> str:
    """File of a unit's documents."""
    return f"scan-{unit.number:06d}"


def tokens_name(unit: Unit) -> str:
    """File of a unit's tokens."""
    return f"tokens-{unit.number:06d}"


def put_scan(store: UnitStore, unit: Unit, inputs: Sequence[ScannedInput], found: DocumentList) -> None:
    """Store what was found in a unit's inputs."""
    facts = [
        {"sha256": each.sha256, "bytes": each.bytes, "documents": each.documents, "notes": each.notes.counts()}
        | ({"parts": list(each.parts)} if each.parts else {})
        for each in inputs
    ]
    store.put(scan_name(unit), found.to_arrays(), {"inputs": facts})


def get_scan(store: UnitStore, unit: Unit, found: DocumentList) -> list[ScannedInput]:
    """The inputs of a unit that was scanned; its documents are appended to `found`."""
    arrays, facts = store.get(scan_name(unit))
    found.extend(arrays, first_input=unit.first_input)
    return [
        ScannedInput(
            file=file,
            sha256=each["sha256"],
            bytes=each["bytes"],
            documents=each["documents"],
            notes=TextNotes(**each["notes"]),
            part=unit.part,
            parts=tuple(each.get("parts", ())),
        )
        for file, each in zip(unit.files, facts["inputs"], strict=True)
    ]


def joined(inputs: Sequence[ScannedInput]) -> list[ScannedInput]:
    """Scanned inputs with the parts of each put together again.

    Raises:
        DataIntegrityError: an input changed between the scans of its parts.
    """
    result: list[ScannedInput] = []
    for each in inputs:
        if each.part is None:
            result.append(each)
        elif each.part.start == 0:
            whole, seen = each, 1
            if each.sha256 != each.parts[0]:
                raise changed(each.file)
            result.append(replace(whole, part=None, sha256=whole.parts[-1], bytes=each.part.stop))
        else:
            if each.sha256 != whole.parts[seen]:
                raise changed(each.file)
            seen += 1
            before = result[-1]
            result[-1] = replace(
                before,
                bytes=each.part.stop,
                documents=before.documents + each.documents,
                notes=before.notes.plus(each.notes),
            )
    return result
