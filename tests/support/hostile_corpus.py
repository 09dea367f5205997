"""Hostile corpora whose digests are true, made from a small prepared one."""

from __future__ import annotations

import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megamask.data.index import ShardIndex
from megamask.storage.hashing import canonical_json, sha256_file


def content_of(corpus: Path) -> dict[str, Any]:
    return dict(json.loads((corpus / "manifest.json").read_bytes()))


def forge(corpus: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """A manifest in its canonical form with something changed; provenance would only repeat the old id."""
    content = content_of(corpus)
    change(content)
    (corpus / "manifest.json").write_bytes(canonical_json(content))
    (corpus / "provenance.json").unlink(missing_ok=True)


SHARD = "shards/train-000000.tar"


def adopt_shard(
    corpus: Path, tar: bytes | None = None, index: bytes | None = None, offsets: bytes | None = None
) -> None:
    """Puts other bytes in the place of the first shard's files and makes the manifest true of them."""
    path = corpus / SHARD
    for name, data in ((path, tar), (path.with_suffix(".idx"), index), (path.with_suffix(".tar.idx"), offsets)):
        if data is not None:
            name.write_bytes(data)
    if tar is not None and index is None:
        old = ShardIndex.unpack(path.with_suffix(".idx").read_bytes(), name="index")
        path.with_suffix(".idx").write_bytes(ShardIndex(**{**vars(old), "shard_bytes": len(tar)}).pack())
    forge(
        corpus,
        lambda content: content["splits"]["train"]["shards"][0].update(
            sha256=sha256_file(path),
            bytes=path.stat().st_size,
            index_sha256=sha256_file(path.with_suffix(".idx")),
            tar_index_sha256=sha256_file(path.with_suffix(".tar.idx")),
        ),
    )


def members(corpus: Path) -> list[tuple[tarfile.TarInfo, bytes]]:
    with tarfile.open(corpus / SHARD) as tar:
        return [(info, tar.extractfile(info).read()) for info in tar.getmembers()]  # type: ignore[union-attr]


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch evil",)
