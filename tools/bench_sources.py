"""Bytes per token of each source under one byte-level BPE: a corpus is prepared from them all, as `prepare` does it.

Every source is NAME=GLOB, or NAME=GLOB#KEY for JSON lines (also compressed) whose text is under KEY. The tokenizer is
trained on the documents of all sources together.
"""

from __future__ import annotations

import glob
import resource
import shutil
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

from bench_support import Report, benchmark_parser

from megamask.config.schema.corpus import CorpusConfig, TokenizerConfig
from megamask.data.corpus.prepare import build
from megamask.data.stats import corpus_stats
from megamask.data.verify import verify_corpus


def gather(given: str, folder: Path, num_bytes: int) -> dict[str, str]:
    """Copy the first files of a source, up to so many bytes, and return its entry of `corpus.inputs`."""
    name, _, pattern = given.partition("=")
    pattern, _, key = pattern.partition("#")
    (folder / name).mkdir()
    left = num_bytes
    for number, found in enumerate(sorted(glob.glob(pattern, recursive=True))):  # noqa: PTH207
        path = Path(found)
        if left > 0 and path.is_file():
            shutil.copyfile(path, folder / name / f"{number:06d}-{path.name}")
            left -= path.stat().st_size
    if left == num_bytes:
        raise SystemExit(f"{given}: no file matches {pattern}")
    return {"name": name, "path": f"{folder / name}/*"} | ({"text_key": key} if key else {})


def cpu_seconds() -> float:
    """CPU seconds of the process, its threads and the children that ended."""
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in usage)


def prepare(inputs: list[Any], folder: Path, vocab_size: int) -> tuple[dict[str, Any], float]:
    """Prepare and verify a corpus; return its statistics and the CPU seconds that preparing took."""
    tokenizer = TokenizerConfig(vocab_size=vocab_size)
    config = CorpusConfig(
        inputs=inputs, output_dir=str(folder), sequence_length=2048, validation_fraction=0, tokenizer=tokenizer
    )
    before = cpu_seconds()
    build(config)
    taken = cpu_seconds() - before
    verify_corpus(folder)
    return corpus_stats(folder), taken


def main() -> int:
    """Prepare, and show what `megamask data stats` knows of each source."""
    parser = benchmark_parser(__doc__, blocks=1)
    parser.add_argument(
        "--source", action="append", metavar="NAME=GLOB[#KEY]", help="texts (default: Python's own library)"
    )
    parser.add_argument("--bytes", type=int, default=1 << 40, help="of each source, rounded up to whole files")
    parser.add_argument("--vocab-size", type=int, default=32_768)
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.bytes, arguments.vocab_size = 100_000, 512
    given = arguments.source or [f"code={glob.escape(sysconfig.get_paths()['stdlib'])}/*.py"]
    report = Report("bench_sources", "Bytes per token of each source", arguments)
    with tempfile.TemporaryDirectory(prefix="bench_sources_") as place:
        folder = Path(place)
        inputs = [gather(each, folder, arguments.bytes) for each in given]
        stats, seconds = prepare(inputs, folder / "corpus", arguments.vocab_size)
    total = {name: sum(each[name] for each in stats["sources"].values()) for name in ("text_bytes", "tokens")}
    table = report.table(
        "Sources",
        ["source", "documents", "bytes of text", "tokens", "bytes per token"],
        f"Vocabulary of {stats['vocab_size']:,}, trained on all of it; {total['text_bytes'] / total['tokens']:.2f} "
        f"bytes per token in all. {seconds:.1f} CPU seconds from the files to a corpus that verifies, with training.",
    )
    for name, source in stats["sources"].items():
        columns = ("documents", "text_bytes", "tokens", "bytes_per_token")
        table.add(name, *(source[column] for column in columns))
    report.keep("stats", {name: stats[name] for name in ("sources", "splits", "lengths", "duplicates")})
    report.keep("cpu_seconds", seconds)
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
