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


def provenance(config: CorpusConfig, files: Sequence[InputFile], corpus_id: str) -> bytes:
    """The bytes of provenance.json: origin, licence, paths, code and library versions, time, and the corpus id.

    Credentials in what was asked are redacted.

    Args:
        config: what was asked.
        files: the inputs in order.
        corpus_id: the corpus that the record is about.
    """
    record = {
        "corpus_id": corpus_id,
        "origin": config.origin,
        "licence": config.licence,
        "inputs": list(config.inputs),
        "exclude": list(config.exclude),
        "files": [{"name": file.name, "path": _printable(file.path)} | _stated(file) for file in files],
        "tokenizer_path": config.tokenizer.path,
        "code": {"megamask": package_version("megamask"), "python": platform.python_version()},
        "libraries": {name: package_version(name) for name in _LIBRARIES},
        "prepared_at": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }
    return encode_document(PROVENANCE, redact_values(record))
