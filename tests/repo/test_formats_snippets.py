"""The scripts of docs/formats.md, run as a stranger would run them, give what the program gives."""

from __future__ import annotations

import importlib
import json
import math
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from megamask.engine.state.safetensors import write_slices
from megamask.engine.state.slices import StoredSlice
from support.command import megamask, step_lines, tiny
from support.shards import random_documents, write_token_corpus

PAGE = (Path(__file__).parents[2] / "docs" / "formats.md").read_text(encoding="utf-8")
SNIPPETS = dict(re.findall(r"<!-- snippet: (\w+) -->\n```python\n(.*?)^```", PAGE, flags=re.M | re.S))
STEPS = 3


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The three snippets as one file, in the order of the page."""
    path = tmp_path_factory.mktemp("snippets") / "formats_page.py"
    body = SNIPPETS["step"].partition('if __name__ == "__main__":')
    path.write_text(body[0] + SNIPPETS["weights"] + SNIPPETS["likelihood"] + "\n\n" + body[1] + body[2])
    return path


@pytest.fixture(scope="module")
def page(script: Path) -> Iterator[ModuleType]:
    """The snippets as a module."""
    sys.path.insert(0, str(script.parent))
    yield importlib.import_module(script.stem)
    sys.path.remove(str(script.parent))


def test_page_has_its_snippets() -> None:
    assert list(SNIPPETS) == ["state", "step", "weights", "likelihood"]


def test_snippets_import_nothing_of_the_program() -> None:
    imported = re.findall(r"^(?:import|from) (\w+)", "\n".join(SNIPPETS.values()), flags=re.M)
    assert set(imported) - sys.stdlib_module_names == {"numpy"}


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0,) * 4, (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_page_holds_the_published_philox_vectors(
    page: ModuleType, counter: tuple[int, ...], key: tuple[int, int], words: str
) -> None:
    assert " ".join(f"{int(word):08x}" for word in page.philox(counter, key)) == words


@pytest.mark.promise("the formats page reproduces the program's initial weights and likelihood masks")
def test_page_makes_the_program_s_initial_weights(page: ModuleType) -> None:
    from megamask.models.initial_weights import initial_tensor
    from megamask.models.shapes import canonical_shapes
    from support.specs import PLAIN

    sizes = {"hidden_size": 16, "ffn_hidden_size": 24, "num_attention_heads": 2, "num_query_groups": 1}
    spec = replace(PLAIN, **sizes, init_std=0.02, vocab_size=37)
    matrices = {name: shape for name, shape in canonical_shapes(spec).items() if len(shape) == 2}
    assert len(matrices) == 2 + 7 * 2
    for name, shape in matrices.items():
        is_output = name.endswith(("o_proj.weight", "down_proj.weight"))
        std = 0.02 / math.sqrt(4) if is_output else 0.02
        ours = initial_tensor(2**40 + 7, name, spec)
        assert np.array_equal(page.initial_values(2**40 + 7, name, shape, std), ours.numpy()), name


def test_page_reads_rows_in_the_program_s_order(page: ModuleType, tmp_path: Path) -> None:
    from megamask.data.content import content_hash, documents_checksum, tokens_checksum
    from megamask.data.order import SourceOrder, order_key
    from megamask.data.reader import SplitReader

    manifest = write_token_corpus(tmp_path / "corpus", random_documents(30), validation=random_documents(4, seed=1))
    for name in ("train", "validation"):
        split = page.Split(tmp_path / "corpus", name)
        reader = SplitReader(tmp_path / "corpus", manifest, name)
        assert split.digest == manifest.source_digest(name)
        order = SourceOrder(reader.block_rows, key=order_key(2**40, split.digest, name), window_blocks=2)
        for epoch in range(3):
            expected = order.rows(epoch * reader.num_rows, reader.num_rows).tolist()
            assert split.epoch(epoch, 2**40, 2, name) == expected
        for row in range(reader.num_rows):
            tokens, documents = split.read(row)
            read = reader.read(row)
            assert np.array_equal(tokens, read.tokens)
            assert np.array_equal(documents, read.documents)
            crcs = page.crc32c(tokens.tobytes()), page.crc32c(documents.tobytes())
            assert crcs == (tokens_checksum(read.tokens), documents_checksum(read.documents))
            assert page.first8(page.H(7, split.digest, row, *crcs)) == content_hash(7, split.digest, row, *crcs)
    assert len(page.Split(tmp_path / "corpus").manifest["splits"]["train"]["shards"]) > 1


@pytest.mark.promise("the formats page reproduces the program's initial weights and likelihood masks")
def test_page_makes_the_program_s_likelihood_masks(page: ModuleType) -> None:
    from megamask.diffusion.exact_counts import exact_count_masks, exact_counts
    from megamask.diffusion.philox import run_key

    eligible = np.ones(32, dtype=bool)
    eligible[27:] = False
    rows, draws, seed = torch.tensor([0, 5, 2**33]), 6, 3 * 2**32 + 1
    is_eligible = torch.from_numpy(np.stack([eligible] * 3))
    for replicate in range(2):
        counts = exact_counts(rows, is_eligible.sum(1), draws=draws, replicate=replicate, key=run_key(seed))
        expected = [
            exact_count_masks(rows, is_eligible, count, draw=replicate * draws + draw, key=run_key(seed))
            for draw, count in enumerate(counts)
        ]
        for place, row in enumerate(rows.tolist()):
            masks = list(page.likelihood_masks(row, eligible, seed, draws, replicate))
            assert [mask.tolist() for mask in masks] == [each[place].nonzero().flatten().tolist() for each in expected]


def documented(heading: str) -> str:
    """The text below a heading of the page."""
    found = re.search(rf"^(#+) {re.escape(heading)}$", PAGE, flags=re.M)
    assert found, heading
    rest = PAGE[found.end() :]
    end = re.search(rf"^#{{1,{len(found[1])}}} ", rest, flags=re.M)
    return rest[: end.start()] if end else rest


def table_keys(heading: str) -> set[str]:
    """The names in the first column of the first table below a heading."""
    block = re.search(r"^\|(?:.*\n\|)*.*", documented(heading), flags=re.M)
    assert block
    rows = [re.split(r"(?<!\\)\|", line)[1] for line in block[0].splitlines()[2:]]
    return {name for cell in rows for name in re.findall(r"`(\w+)`", cell)}


@pytest.mark.promise("the formats page names every key of every file")
def test_page_names_every_key_of_a_corpus(small_corpus: Path) -> None:
    manifest = json.loads((small_corpus / "manifest.json").read_bytes())
    assert table_keys("manifest.json") == set(manifest)
    nested = [manifest["tokenizer"], manifest["options"], manifest["options"]["tokenizer"], manifest["packer"]]
    nested += [manifest["inputs"][0], manifest["documents"], manifest["documents"]["tables"][0]]
    nested += [manifest["splits"]["train"], manifest["splits"]["train"]["shards"][0], manifest["totals"]]
    missing = {key for each in nested for key in each if f"`{key}`" not in documented("manifest.json")}
    assert not missing
    provenance = json.loads((small_corpus / "provenance.json").read_bytes())
    assert not {key for key in provenance if f"`{key}`" not in documented("provenance.json")}
    special = json.loads((small_corpus / "tokenizer" / "special_tokens.json").read_bytes())
    assert not {key for key in special if f"`{key}`" not in documented("Tokenizer")}


@pytest.fixture(scope="module")
def trained(small_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three steps of a batch-size ramp with a likelihood bound and MLflow, its corpus read more than once."""
    output_dir = tmp_path_factory.mktemp("runs")
    overrides = (
        f"training.steps={STEPS}",
        "training.global_batch_size=36",
        "training.batch_size_ramp_start=12",
        "training.batch_size_ramp_increment=12",
        "training.batch_size_ramp_samples=24",
        "run.seed=9007199254740993",
        "data.shuffle_window_blocks=3",
        "objective.noise_schedule=cosine_md4",
        "evaluation.every_steps=2",
        "evaluation.rows=2",
        "tracking.mlflow.enabled=true",
    )
    done = megamask("train", *tiny(small_corpus, output_dir, "page", *overrides))
    assert done.code == 0, done.stderr
    return output_dir / "page"


@pytest.mark.promise("the formats page recomputes every step of a run")
@pytest.mark.multiprocess
def test_page_recomputes_every_step_of_a_run(trained: Path, small_corpus: Path, script: Path) -> None:
    journal = step_lines(trained)
    for step in range(1, STEPS + 1):
        command = [sys.executable, str(script), str(trained), str(small_corpus), str(step)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        page = json.loads(done.stdout)
        assert {name: journal[step][name] for name in ("batch_digest", "content_digest")} == {
            name: page[name] for name in ("batch_digest", "content_digest")
        }
        assert journal[step]["masked_tokens"] == sum(len(sample["masked"]) for sample in page["samples"])
        inspected = megamask("inspect", trained, "--step", step, "--json").json
        for sample in page["samples"]:
            num_scored = len(sample["masked"]) + len(sample.pop("masked_second_view"))
            assert num_scored == len(sample["tokens"]) - sample["num_padding"]
        assert page == {name: inspected[name] for name in page}


@pytest.mark.promise("the formats page names every key of every file")
@pytest.mark.multiprocess
def test_page_names_every_key_of_a_run(trained: Path) -> None:
    [checkpoint] = (trained / "checkpoints").glob("step-*")
    tables: dict[str, Callable[[], dict[str, Any]]] = {
        "run.json": lambda: json.loads((trained / "run.json").read_bytes()),
        "COMMIT.json": lambda: json.loads((checkpoint / "COMMIT.json").read_bytes()),
        "model.json": lambda: json.loads((checkpoint / "model.json").read_bytes()),
    }
    optional = {"COMMIT.json": {"evaluation"}}  # of a step that was measured; this run measured none
    for heading, read in tables.items():
        assert table_keys(heading) - optional.get(heading, set()) == set(read()), heading
    lines = {
        "attempts/NNNN/claim.json": trained / "attempts" / "0001" / "claim.json",
        "status.json": trained / "status.json",
        "state.json": checkpoint / "state.json",
        "tracking/mlflow.json": trained / "tracking" / "mlflow.json",
    }
    for heading, path in lines.items():
        missing = {key for key in json.loads(path.read_bytes()) if f"`{key}`" not in documented(heading)}
        assert not missing, heading
    model = json.loads((checkpoint / "model.json").read_bytes())
    assert not {key for key in {**model["model"], **model["objective"]} if f"`{key}`" not in documented("model.json")}


@pytest.mark.promise("the formats page names every key of every file")
@pytest.mark.multiprocess
def test_page_names_every_field_of_the_journal(trained: Path) -> None:
    text = documented("Journal")
    fields = {
        kind: set(re.findall(r"`(\w+)`", cell))
        for kind, cell in re.findall(r"^\| `(\w+)` \| (`\w.*) \|$", text, flags=re.M)
    }
    of_step = text.partition("A `step` record:")[2].strip().partition("\n\n")[0]
    step_fields = set(re.findall(r"^\| `(\w+)` \|", of_step, flags=re.M))
    kinds = set()
    for line in (trained / "journal" / "attempt-0001-000.jsonl").read_text().splitlines():
        record = json.loads(line)
        kind = record["kind"]
        kinds.add(kind)
        found = set(record) - {"seq", "time", "kind", "prev"}
        if kind == "step":
            assert found == step_fields - {"is_skipped"}  # present where the numerics guard left out an update
        elif kind != "incident":
            assert found <= fields[kind], f"{kind}: {found - fields[kind]}"
    assert kinds >= {"run_started", "attempt_started", "step", "evaluation", "checkpoint_committed", "attempt_ended"}


@pytest.mark.multiprocess
def test_run_directory_holds_what_the_page_lists_and_nothing_else(trained: Path) -> None:
    shape = {
        re.sub(r"\d{3,}", "N", path.relative_to(trained).as_posix())
        for path in trained.rglob("*")
        if path.is_file() and "checkpoints/" not in path.as_posix()
    }
    assert shape == {
        "run.json",
        "status.json",
        "config/attempt-N.yaml",
        "attempts/N/claim.json",
        "journal/attempt-N-N.jsonl",
        "tracking/mlflow.json",
        "tracking/mlflow.lock",
    }
    [checkpoint] = (trained / "checkpoints").glob("step-*")
    names = {re.sub(r"-\d{5}\.", "-RRRRR.", path.name) for path in checkpoint.iterdir()}
    assert names == set(re.findall(r"^(\S+?)/?  ", documented("Checkpoint"), flags=re.M))


@pytest.mark.promise("the formats page reads the state of a checkpoint, bit for bit")
def test_page_reads_the_state_of_a_checkpoint(tmp_path: Path) -> None:
    tensor = torch.randn(5, 4, generator=torch.Generator().manual_seed(1))
    parts = [((0, 0), tensor[:2]), ((2, 0), tensor[2:3, :3]), ((2, 3), tensor[2:3, 3:]), ((3, 0), tensor[3:])]
    slices = [StoredSlice(name="w", shape=(5, 4), offsets=offsets, data=data) for offsets, data in parts]
    slices.append(StoredSlice(name="b", shape=(3,), offsets=(0,), data=torch.ones(3)))
    for rank in (0, 1):
        write_slices(tmp_path, slices[rank::2], rank=rank)
    namespace: dict[str, Any] = {}
    exec(SNIPPETS["state"], namespace)
    found = namespace["read_state"](tmp_path)
    assert sorted(found) == ["b", "w"]
    assert found["w"].tobytes() == tensor.numpy().tobytes()
    assert found["b"].tolist() == [1, 1, 1]
    lines = SNIPPETS["state"].partition("def ")[2].splitlines()
    assert len(lines) <= 14
