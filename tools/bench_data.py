"""Reading a corpus: ours beside a raw memory map and the loaders of other projects, in one run.

Every reader reads the same rows, a shuffled epoch of them in batches, and its checksum (the sum of all ids) is compared
with that of the corpus. Seconds are of the process' CPU clock, its threads included. Libraries that are not installed
are left out; none of them is a dependency of megamask.
"""

from __future__ import annotations

import importlib.util
import logging
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from bench_support import Report, alternate, benchmark_parser, ratio, spread
from simulated_corpus import (
    BLOCKS_PER_SHARD,
    EOD,
    LENGTH,
    PAD,
    ROWS_PER_BLOCK,
    TRILLION_ROWS,
    VOCAB,
    manifest_content,
    write_trillion,
)

from megamask.config.schema.data import DataConfig
from megamask.data.corpus.pack import RowPacker
from megamask.data.corpus.shard import ShardWriter
from megamask.data.loader import Loader
from megamask.data.manifest import Manifest
from megamask.data.order import SourceOrder
from megamask.data.reader import SplitReader
from megamask.storage.hashing import canonical_json

BATCH = 64
OURS = "megamask, every row checked"
Batches = Callable[[], Iterator[np.ndarray]]


def documents(num_tokens: int) -> Iterator[np.ndarray]:
    """Documents of about 1,000 tokens, the end-of-document id last."""
    generator, left = np.random.default_rng(0), num_tokens
    while left > 0:
        size = min(left, int(generator.exponential(1000)) + 2)
        yield np.append(generator.integers(0, EOD, size - 1, dtype=np.uint16), np.uint16(EOD))
        left -= size


class Corpora:
    """The same rows in every layout."""

    def __init__(self, folder: Path, num_rows: int) -> None:
        self.ours, self.raw, self.megatron = folder / "ours", folder / "rows.bin", folder / "megatron"
        self.litdata = folder / "litdata"
        self.num_rows = num_rows
        (self.ours / "shards").mkdir(parents=True)
        packer = RowPacker(
            sequence_length=LENGTH, rows_per_block=ROWS_PER_BLOCK, dtype=np.dtype("<u2"), pad_token_id=PAD
        )
        writer = ShardWriter(self.ours, "train", blocks_per_shard=BLOCKS_PER_SHARD, sequence_length=LENGTH, itemsize=2)
        self.checksum = 0
        with self.raw.open("wb") as raw:
            for number, tokens in enumerate(documents(num_rows * LENGTH)):
                for block in packer.add(number, tokens):
                    writer.add(block)
                    raw.write(block.tokens.tobytes())
                    self.checksum += int(block.tokens.sum(dtype=np.uint64))
        for block in packer.finish():
            writer.add(block)
            raw_rows = block.tokens
            with self.raw.open("ab") as raw:
                raw.write(raw_rows.tobytes())
            self.checksum += int(raw_rows.sum(dtype=np.uint64))
        writer.finish()
        shards = [dict(vars(shard)) for shard in writer.shards]
        blocks = sum(shard.blocks for shard in writer.shards)
        content = manifest_content(shards, num_rows, blocks)
        (self.ours / "manifest.json").write_bytes(canonical_json(content))

    def write_megatron(self) -> None:
        from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

        builder = IndexedDatasetBuilder(f"{self.megatron}.bin", dtype=np.uint16)
        for tokens in documents(self.num_rows * LENGTH):
            builder.add_item(torch.from_numpy(tokens.astype(np.int32)))
            builder.end_document()
        builder.finalize(f"{self.megatron}.idx")

    def write_litdata(self) -> None:
        """In a process of its own: the library starts workers that run the calling script again."""
        code = (
            "import numpy as np, torch, litdata, sys\n"
            "rows = np.memmap(sys.argv[1], dtype='<u2').reshape(-1, 4096)\n"
            "def rows_of(part):\n"
            "    for row in rows[part * 64:(part + 1) * 64]: yield torch.from_numpy(row.astype('<u2'))\n"
            "if __name__ == '__main__':\n"
            "    litdata.optimize(rows_of, list(range(-(-len(rows) // 64))), sys.argv[2], chunk_bytes='64MB',\n"
            "        item_loader=litdata.TokensLoader(block_size=4096), num_workers=1)\n"
        )
        script = self.litdata.with_name("write_rows.py")
        script.write_text(code)
        subprocess.run(
            [sys.executable, str(script), str(self.raw), str(self.litdata)], check=True, stdout=subprocess.DEVNULL
        )


def batches_of_memmap(corpora: Corpora) -> Batches:
    def read() -> Iterator[np.ndarray]:
        rows = np.memmap(corpora.raw, dtype="<u2", mode="r").reshape(-1, LENGTH)
        order = np.random.default_rng(1).permutation(len(rows))
        for first in range(0, len(rows), BATCH):
            yield rows[order[first : first + BATCH]]

    return read


def batches_of_ours(corpora: Corpora, *, documents: bool) -> Batches:
    """Rows in the order law's order, each checked, with or without their document starts; no content digest."""

    def read() -> Iterator[np.ndarray]:
        manifest = Manifest.load(corpora.ours)
        reader = SplitReader(corpora.ours, manifest, "train", window_blocks=512)
        order = SourceOrder(reader.block_rows, key=(1, 2), window_blocks=512)
        for first in range(0, reader.num_rows, BATCH):
            count = min(BATCH, reader.num_rows - first)
            read = reader.read_rows(order.rows(first, count))
            if documents and len(read.documents) != count:
                raise SystemExit("a row has no documents")
            yield read.tokens
        reader.close()

    return read


def batches_of_training(corpora: Corpora) -> Batches:
    """Yield the batches of a run: the same, with eligible tokens, the content digest and a thread that reads ahead."""

    def read() -> Iterator[np.ndarray]:
        data = DataConfig(corpora={"main": str(corpora.ours)}, shuffle_window_blocks=512)
        with Loader(data.corpora, data, LENGTH) as loader:
            for first in range(0, loader.num_rows, BATCH):
                count = min(BATCH, loader.num_rows - first)
                batch = loader.batch(first, count, range(count))
                if first + BATCH < loader.num_rows:
                    ahead = min(BATCH, loader.num_rows - first - BATCH)
                    loader.prefetch(first + BATCH, ahead, range(ahead))
                yield batch.tokens.numpy()

    return read


def batches_of_webdataset(corpora: Corpora) -> Batches:
    """The library's pipeline over our shards: shard blocks shuffled, rows of a block not."""

    def read() -> Iterator[np.ndarray]:
        from megamask.data.webdataset import pipeline

        for sample in pipeline(corpora.ours, "train", shuffle=100):
            yield sample["tokens.npy"]

    return read


def batches_of_megatron(corpora: Corpora) -> Batches:
    def read() -> Iterator[np.ndarray]:
        from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
        from megatron.core.datasets.indexed_dataset import IndexedDataset
        from megatron.core.datasets.utils import Split

        class Tokenizer:
            eod, pad, vocab_size, unique_identifiers = EOD, PAD, VOCAB, {"class": "ids"}

        config = GPTDatasetConfig(
            random_seed=1,
            sequence_length=LENGTH,
            split="1",
            tokenizer=Tokenizer(),
            reset_position_ids=False,
            reset_attention_mask=False,
            eod_mask_loss=False,
            create_attention_mask=False,
            add_extra_token_to_sequence=False,
        )
        indexed = IndexedDataset(str(corpora.megatron))
        indices = np.arange(len(indexed), dtype=np.int32)
        dataset = GPTDataset(indexed, str(corpora.megatron), indices, corpora.num_rows, Split.train, config)
        for first in range(0, corpora.num_rows, BATCH):
            last = min(first + BATCH, corpora.num_rows)
            yield np.stack([dataset[sample]["tokens"].numpy() for sample in range(first, last)])

    return read


def batches_of_litdata(corpora: Corpora) -> Batches:
    def read() -> Iterator[np.ndarray]:
        import litdata

        dataset = litdata.StreamingDataset(
            str(corpora.litdata), item_loader=litdata.TokensLoader(block_size=LENGTH), shuffle=True, seed=1
        )
        waiting = []
        for row in dataset:
            waiting.append(row.numpy())
            if len(waiting) == BATCH:
                yield np.stack(waiting)
                waiting = []
        if waiting:
            yield np.stack(waiting)

    return read


def cpu_seconds(batches: Batches, checksum: int) -> float:
    """CPU seconds of reading everything; the ids' sum must be the corpus'."""
    started, total = time.process_time(), 0
    for batch in batches():
        total += int(batch.sum(dtype=np.uint64))
    taken = time.process_time() - started
    if total != checksum:
        raise SystemExit(f"the checksum is {total}, that of the corpus {checksum}: not the same rows were read")
    return taken


def readers(corpora: Corpora) -> dict[str, Batches]:
    """Every reader that this machine has."""
    found = {
        "raw memory map, nothing checked": batches_of_memmap(corpora),
        OURS: batches_of_ours(corpora, documents=False),
        "megamask, every row checked, with document starts": batches_of_ours(corpora, documents=True),
        "megamask's loader, with content digest and read-ahead": batches_of_training(corpora),
        "webdataset over our shards": batches_of_webdataset(corpora),
    }
    corpora.write_megatron()
    found["Megatron GPTDataset"] = batches_of_megatron(corpora)
    if importlib.util.find_spec("litdata"):
        corpora.write_litdata()
        found["litdata TokensLoader"] = batches_of_litdata(corpora)
    return found


_OPEN = """
import json, resource, sys, time
from megamask.config.schema.data import DataConfig
from megamask.data.loader import Loader
import torch
def opened(first):
    wall, cpu = time.perf_counter(), time.process_time()
    data = DataConfig(corpora={"main": sys.argv[1]}, shuffle_window_blocks=512)
    loader = Loader(data.corpora, data, 4096)
    open_s = time.perf_counter() - wall
    loader.batch(first, 64, range(64))
    return [open_s, time.perf_counter() - wall, time.process_time() - cpu], loader
first, kept = opened(int(sys.argv[2]))
again, kept_too = opened(int(sys.argv[2]) + 640)
wall = time.perf_counter()
kept.batch(int(sys.argv[2]) + 100_000_000, 1, [0])
sample_s = time.perf_counter() - wall
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
print(json.dumps(dict(zip(sys.argv[3].split(","), [*first, again[1], again[2], sample_s, peak]))))
"""
_OPENED = ("open_s", "first_batch_s", "cpu_s", "again_s", "again_cpu_s", "sample_s", "peak_mib")


def opening(folder: Path, first: int) -> dict[str, float]:
    """Open a corpus in a fresh process and read the batch that begins at a sample; imports are not counted."""
    import json

    done = subprocess.run(
        [sys.executable, "-c", _OPEN, str(folder), str(first), ",".join(_OPENED)],
        check=True,
        capture_output=True,
        text=True,
    )
    return dict(json.loads(done.stdout.splitlines()[-1]))


def compare(report: Report, corpora: Corpora, blocks: int) -> None:
    """The table of readers."""
    cases = {
        name: (lambda batches=batches: cpu_seconds(batches, corpora.checksum))
        for name, batches in readers(corpora).items()
    }
    seconds = alternate(cases, blocks=blocks)
    reference = seconds["raw memory map, nothing checked"]
    ours = seconds[OURS]
    millions = corpora.num_rows * LENGTH / 1e6
    table = report.table(
        "A shuffled epoch",
        ["reader", "CPU ms per million tokens", "speed beside the memory map", "CPU time beside ours"],
        f"{corpora.num_rows:,} rows of {LENGTH} tokens, uint16, in batches of {BATCH}; page cache warm; the sum of all "
        "ids was equal. Of webdataset the shard blocks are shuffled and no row is checked.",
    )
    for name, values in seconds.items():
        table.add(name, spread(values, scale=1e3 / millions), ratio(reference, values), ratio(values, ours))
    report.keep("cpu_seconds", seconds)
    report.keep("tokens", corpora.num_rows * LENGTH)


def open_large(report: Report, folder: Path, blocks: int) -> None:
    """The table of opening a simulated corpus of a trillion tokens."""
    write_trillion(folder)
    time.sleep(3)  # a file that changed a moment ago is never taken as known
    columns = ("open s", "open and first batch s", "of it CPU s", "again s", "of it CPU s", "any sample s", "peak MiB")
    table = report.table(
        "Opening a simulated corpus of 10^12 tokens",
        ["first sample", *columns],
        f"{TRILLION_ROWS:,} rows in 14,902 shards, which are sparse files; one process, imports not counted, peak "
        "memory of the process with torch. Again: opened a second time in the process, with a batch. Any sample: its "
        "source, row, documents and tokens, 10^8 samples further on.",
    )
    for first in (0, 10_000_000, 123_000_000):
        runs = [opening(folder, first) for _ in range(blocks)]
        table.add(first, *(spread([run[key] for run in runs]) for key in _OPENED))
        report.keep(f"open_{first}", runs)


def main() -> int:
    """Run everything."""
    parser = benchmark_parser(__doc__, blocks=3)
    parser.add_argument("--rows", type=int, default=16_384, help="rows of the corpus")
    parser.add_argument("--folder", type=Path, help="where to put the corpora (default: a temporary folder)")
    parser.add_argument("--no-trillion", action="store_true", help="leave the simulated corpus out (writes 1.3 GB)")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.rows, arguments.blocks, arguments.no_trillion = 512, 2, True
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    folder = Path(tempfile.mkdtemp(prefix="bench_data_", dir=arguments.folder))
    report = Report("bench_data", "Reading a corpus", arguments)
    try:
        compare(report, Corpora(folder, arguments.rows), arguments.blocks)
        if not arguments.no_trillion:
            open_large(report, folder / "trillion", arguments.blocks)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        report.keep("peak_mib_of_the_benchmark", peak)
    finally:
        shutil.rmtree(folder)
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
