"""provenance.json of a corpus: what the manifest must not hold, because it may change while the content does not."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

from megamask.config.schema.corpus import CorpusConfig
from megamask.data.corpus.inputs import InputFile
from megamask.data.corpus.scan import ScannedInput
from megamask.data.manifest import PROVENANCE
from megamask.provenance.redaction import redact_values
from megamask.storage.documents import encode_document

_LIBRARIES = ("numpy", "tokenizers", "tiktoken", "pyarrow", "crc32c")


def package_version(name: str) -> str:
    """The installed version of a package, or "unknown" when it runs from a bare source tree."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "unknown"


def _printable(path: Path) -> str:
    """A folder's name need not be UTF-8; this record is."""
    return os.fsencode(path).decode(errors="replace")


def _stated(file: InputFile) -> dict[str, str]:
    """Licence, origin and version of an input's own entry, those that were given."""
    entry = file.entry
    stated = {"source": entry.name, "licence": entry.licence, "origin": entry.origin, "version": entry.version}
    return {key: value for key, value in stated.items() if value is not None}


def _noted(scanned: ScannedInput) -> dict[str, dict[str, int]]:
    """Counts of unusual documents, where there are any."""
    counts = scanned.notes.counts()
    return {"notes": counts} if counts else {}


def provenance(config: CorpusConfig, inputs: Sequence[ScannedInput], corpus_id: str) -> bytes:
    """The bytes of provenance.json: origin, licence, paths, code and library versions, time, and the corpus id.

    Credentials in what was asked are redacted.

    Args:
        config: what was asked.
        inputs: in order, with the counts of what is unusual in them.
        corpus_id: the corpus that the record is about.
    """
    record = {
        "corpus_id": corpus_id,
        "origin": config.origin,
        "licence": config.licence,
        "inputs": list(config.inputs),
        "exclude": list(config.exclude),
        "files": [
            {"name": each.file.name, "path": _printable(each.file.path)} | _stated(each.file) | _noted(each)
            for each in inputs
        ],
        "tokenizer_path": config.tokenizer.path,
        "code": {"megamask": package_version("megamask"), "python": platform.python_version()},
        "libraries": {name: package_version(name) for name in _LIBRARIES},
        "prepared_at": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }
    return encode_document(PROVENANCE, redact_values(record))
