"""The text members of a WebDataset tar.

Members are read with the standard library, strictly, because a tar reader that meets a damaged header ends as if the
archive did; the grouping of members into samples is WebDataset's own.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Any

_PIECE = 1 << 20


class TarError(Exception):
    """The archive is damaged, or a sample of it has no text."""


@dataclass(frozen=True, kw_only=True)
class TarDocument:
    """The text member of one sample: its key, content, and where the content begins in the archive."""

    key: str
    data: bytes
    offset: int


def tar_documents(file: IO[bytes], suffix: str) -> Iterator[TarDocument]:
    """The member `<key>.<suffix>` of each sample, in the order of the archive.

    Args:
        file: the archive, seekable.
        suffix: what follows the first dot of the member's name, e.g. "txt".

    Raises:
        TarError: the archive is damaged or cut off, or a sample has no such member.
    """
    from webdataset.tariterators import group_by_keys

    try:
        for sample in group_by_keys(_members(file)):
            key = sample["__key__"]
            if suffix.lower() not in sample:
                present = sorted(name for name in sample if not name.startswith("__"))
                raise TarError(f"sample {key} has no member .{suffix} (text_key); it has: {', '.join(present)}")
            data, offset = sample[suffix.lower()]
            yield TarDocument(key=key, data=data, offset=offset)
    except ValueError as error:
        raise TarError(str(error)) from error


def _members(file: IO[bytes]) -> Iterator[dict[str, Any]]:
    try:
        with tarfile.open(fileobj=file, mode="r:", errorlevel=2) as tar:
            for member in tar:
                if not member.isreg():
                    continue
                content = tar.extractfile(member)
                data = b"" if content is None else content.read()
                if len(data) != member.size:
                    raise TarError(f"member {member.name} is cut off")
                if "." not in member.name.rpartition("/")[2].strip("."):
                    raise TarError(f"member {member.name} has no suffix, so it belongs to no sample")
                yield {"fname": member.name, "data": (data, member.offset_data), "__url__": ""}
            end = int(tar.offset)
    except tarfile.TarError as error:
        raise TarError(f"the archive is damaged ({error})") from error
    file.seek(end)
    while data := file.read(_PIECE):
        if data.strip(b"\0"):
            raise TarError(f"there is something other than zeros after byte {end}, where the archive seems to end")
