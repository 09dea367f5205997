"""Tokenising: megamask's encoding beside Hugging Face tokenizers, with the same byte-level BPE, in one run.

Every case encodes the same texts; the ids are compared before anything is measured. Seconds are of the CPU clock of the
process and of its finished children, threads included. megamask's case includes what `prepare` does for each document:
special tokens are looked for, and the ids must cover the text.
"""

from __future__ import annotations

import argparse
import functools
import glob
import os
import resource
import sys
import sysconfig
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import tokenizers
from bench_support import Report, alternate, benchmark_parser, ratio, spread

from megamask.data.tokenizer import CorpusTokenizer
from megamask.data.tokenizer.special_tokens import SpecialTokens

SPECIAL = SpecialTokens(eod="<|endoftext|>", pad="<|pad|>", mask="<|mask|>")
PROCESSES = 2


def texts_of(pattern: str, num_bytes: int) -> list[str]:
    """The texts of files, up to so many bytes; files that are not UTF-8 are left out."""
    texts, left = [], num_bytes
    for name in sorted(glob.glob(pattern, recursive=True)):  # noqa: PTH207
        try:
            text = Path(name).read_text(encoding="utf-8")
        except (UnicodeDecodeError, IsADirectoryError):
            continue
        if left <= 0:
            break
        texts.append(text)
        left -= len(text.encode())
    return texts


def encode_checked(tokenizer: CorpusTokenizer, texts: Sequence[str]) -> int:
    """Encode as `prepare` does; return the number of ids."""
    special = (tokenizer.eod_token_id, tokenizer.pad_token_id, tokenizer.mask_token_id)
    count = 0
    for text in texts:
        ids = tokenizer.encode_array(text)
        if np.isin(ids, special).any() or not tokenizer.is_complete(ids, text):
            raise SystemExit("a text was not encoded")
        count += len(ids)
    return count


@functools.cache
def loaded(folder: str) -> CorpusTokenizer:
    """The tokenizer of a process."""
    return CorpusTokenizer.load(folder)


def encode_part(folder: str, texts: Sequence[str]) -> int:
    """Encode in a process of a pool."""
    return encode_checked(loaded(folder), texts)


def cpu_seconds(work: Callable[[], object]) -> float:
    """CPU seconds of a call, its threads and the processes that it started and ended."""

    def now() -> float:
        usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return sum(each.ru_utime + each.ru_stime for each in usage)

    before = now()
    work()
    return now() - before


def in_processes(folder: str, texts: Sequence[str], encode: Callable[[str, Sequence[str]], int]) -> int:
    """Encode in new processes, which are counted from their start to their end."""
    with ProcessPoolExecutor(PROCESSES, mp_context=get_context("fork")) as pool:
        parts = [texts[number::PROCESSES] for number in range(PROCESSES)]
        return sum(pool.map(encode, [folder] * PROCESSES, parts))


def encode_part_by_library(folder: str, texts: Sequence[str]) -> int:
    """Encode with Hugging Face tokenizers in a process of a pool."""
    library = tokenizers.Tokenizer.from_file(f"{folder}/tokenizer.json")
    return sum(len(each.ids) for each in library.encode_batch(list(texts), add_special_tokens=False))


def compare(report: Report, name: str, texts: list[str], folder: Path, arguments: argparse.Namespace) -> None:
    """The table of one kind of text."""
    blocks, vocab_size = arguments.blocks, arguments.vocab_size
    tokenizer = CorpusTokenizer.train(texts, vocab_size=vocab_size, special=SPECIAL)
    tokenizer.save(folder)
    library = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    num_ids = encode_checked(tokenizer, texts)
    library.encode_special_tokens = True
    for text in texts:
        if library.encode(text, add_special_tokens=False).ids != tokenizer.encode(text):
            raise SystemExit("the two give different ids")
    library.encode_special_tokens = False
    place = str(folder)
    work: dict[str, Callable[[], object]] = {
        "Hugging Face encode_batch": lambda: library.encode_batch(texts, add_special_tokens=False),
        "Hugging Face encode_batch_fast": lambda: library.encode_batch_fast(texts, add_special_tokens=False),
        f"Hugging Face encode_batch, {PROCESSES} processes": lambda: in_processes(place, texts, encode_part_by_library),
        "megamask, as prepare encodes": lambda: encode_checked(tokenizer, texts),
        f"megamask, {PROCESSES} processes": lambda: in_processes(place, texts, encode_part),
    }
    cases = {label: (lambda each=each: cpu_seconds(each)) for label, each in work.items()}
    seconds = alternate(cases, blocks=blocks)
    reference = seconds["Hugging Face encode_batch"]
    num_bytes = sum(len(text.encode()) for text in texts)
    table = report.table(
        f"Tokens per CPU second: {name}",
        ["encoder", "million tokens per CPU second", "beside Hugging Face encode_batch"],
        f"{len(texts)} texts, {num_bytes:,} bytes, {num_ids:,} tokens; vocabulary of {tokenizer.vocab_size} trained on "
        f"them ({num_bytes / num_ids:.2f} bytes per token). A pool of processes is counted from start to end.",
    )
    for label, values in seconds.items():
        table.add(label, spread([num_ids / 1e6 / value for value in values]), ratio(reference, values))
    report.keep(name, {"cpu_seconds": seconds, "tokens": num_ids, "bytes": num_bytes})


def main() -> int:
    """Run everything."""
    import tempfile

    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a thread each: CPU seconds are compared, not wall time
    parser = benchmark_parser(__doc__, blocks=3)
    parser.add_argument(
        "--texts", action="append", metavar="NAME=GLOB", help="texts to encode (default: Python's own library)"
    )
    parser.add_argument("--bytes", type=int, default=12_000_000, help="of text of each kind")
    parser.add_argument("--vocab-size", type=int, default=32_768)
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.bytes, arguments.blocks, arguments.vocab_size = 300_000, 2, 512
    report = Report("bench_tokenising", "Tokenising", arguments)
    for given in arguments.texts or [f"code={glob.escape(sysconfig.get_paths()['stdlib'])}/*.py"]:
        name, _, pattern = given.partition("=")
        with tempfile.TemporaryDirectory(prefix="bench_tokenising_") as folder:
            compare(report, name, texts_of(pattern, arguments.bytes), Path(folder), arguments)
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
