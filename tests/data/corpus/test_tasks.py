"""A preparation in tasks: the same bytes as in one process, however many tasks there are, killed or not."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest

from megamask.config.schema.corpus import CorpusConfig, TokenizerConfig
from megamask.data.corpus import tasks as tasks_module
from megamask.data.corpus import units
from megamask.data.corpus.prepare import build, merge, run_task
from megamask.data.corpus.tasks import task_of
from megamask.errors import DataIntegrityError, UsageError
from support.shards import flip_bit
from support.texts import corpus_config, tree_of, write_inputs


@pytest.fixture(autouse=True)
def _small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(units, "UNIT_BYTES", 600)


@pytest.fixture
def inputs(tmp_path: Path) -> list[str]:
    return write_inputs(tmp_path / "inputs")


def content_of(folder: Path) -> dict[str, bytes]:
    tree = tree_of(folder)
    del tree["provenance.json"]  # holds the time
    return tree


@pytest.fixture
def plain(inputs: list[str], tmp_path: Path) -> Path:
    build(corpus_config(inputs, tmp_path / "plain"))
    return tmp_path / "plain"


@pytest.mark.promise("a corpus prepared in tasks has the bytes of one prepared at once")
@pytest.mark.parametrize("num_tasks", [1, 3])
def test_tasks_make_the_bytes_of_a_plain_preparation(
    inputs: list[str], plain: Path, tmp_path: Path, num_tasks: int
) -> None:
    config = corpus_config(inputs, tmp_path / "corpus")
    reports = [run_task(config, task, num_tasks) for task in reversed(range(num_tasks))]
    assert sum(report.units for report in reports) == reports[0].units_of_all > 5
    assert run_task(config, 0, 1).reused == reports[0].units_of_all  # another number of tasks finds it all done
    merge(config)
    assert content_of(tmp_path / "corpus") == content_of(plain)
    assert not (tmp_path / ".corpus.tasks").exists()
    assert merge_again(config).reused


def merge_again(config: CorpusConfig) -> object:
    for task in range(2):
        run_task(config, task, 2)
    return merge(config)


def _run(config: CorpusConfig, task: int) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    run_task(config, task, 8)


@pytest.mark.multiprocess
@pytest.mark.promise("tasks that are killed and run again until done give the corpus of one process")
def test_eight_tasks_killed_at_random_give_the_corpus_of_one_process(
    inputs: list[str], plain: Path, tmp_path: Path
) -> None:
    config = corpus_config(inputs, tmp_path / "corpus", tokenizer=tokenizer_of(plain))
    build(replace(config, output_dir=str(tmp_path / "once")))
    chance, context = random.Random(5), multiprocessing.get_context("fork")
    missing, killed, patience = set(range(8)), 0, 0.01
    while missing:
        running = {task: context.Process(target=_run, args=(config, task)) for task in sorted(missing)}
        for process in running.values():
            process.start()
        for process in running.values():
            time.sleep(chance.uniform(0, patience))
            if process.is_alive() and (patience < 0.02 or chance.random() < 0.7):
                os.kill(process.pid, signal.SIGKILL)
                killed += 1
        for task, process in running.items():
            process.join()
            if process.exitcode == 0:
                missing.discard(task)
        patience *= 1.5
    assert killed > 0
    merge(config)
    assert content_of(tmp_path / "corpus") == content_of(tmp_path / "once")


def tokenizer_of(corpus: Path) -> TokenizerConfig:
    return TokenizerConfig(path=str(corpus / "tokenizer" / "tokenizer.json"))


def test_plain_prepare_goes_on_with_what_tasks_have_done(
    inputs: list[str], plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = corpus_config(inputs, tmp_path / "corpus")
    run_task(config, 1, 2)
    encoded: list[int] = []
    real = tasks_module.Tasks._encode
    monkeypatch.setattr(
        tasks_module.Tasks,
        "_encode",
        lambda self, unit, encoder: encoded.append(unit.number) or real(self, unit, encoder),
    )
    build(replace(config, processes=1))
    assert encoded
    assert all(number % 2 == 0 for number in encoded)
    assert content_of(tmp_path / "corpus") == content_of(plain)


def test_merge_names_the_first_unit_that_is_missing(inputs: list[str], tmp_path: Path) -> None:
    config = corpus_config(inputs, tmp_path / "corpus")
    run_task(config, 0, 2)
    with pytest.raises(UsageError, match=r"units are not done, the first is unit 1 \("):
        merge(config)
    assert not (tmp_path / "corpus").exists()


def test_tasks_of_another_config_are_refused(inputs: list[str], tmp_path: Path) -> None:
    config = corpus_config(inputs, tmp_path / "corpus")
    run_task(config, 0, 9)
    with pytest.raises(UsageError, match="tasks of another preparation; these differ: options"):
        run_task(replace(config, sequence_length=32), 1, 9)


def test_input_that_changed_between_tasks_is_an_integrity_error(inputs: list[str], plain: Path, tmp_path: Path) -> None:
    config = corpus_config(inputs, tmp_path / "corpus")
    run_task(config, 0, 2)
    for path in (tmp_path / "inputs").rglob("*.md"):
        data = bytearray(path.read_bytes())
        data[0] ^= 1
        path.write_bytes(data)
    with pytest.raises(DataIntegrityError, match="changed while the corpus was being prepared"):
        for task in range(2):
            run_task(config, task, 2)


def test_damaged_work_of_a_task_is_named(inputs: list[str], tmp_path: Path) -> None:
    config = corpus_config(inputs, tmp_path / "corpus")
    run_task(config, 0, 1)
    flip_bit(tmp_path / ".corpus.tasks" / "tokens-000001.npz", 200)
    with pytest.raises(DataIntegrityError, match=r"tokens-000001\.npz is not what its marker names"):
        merge(config)


@pytest.mark.parametrize("text", ["1", "2/2", "-1/2", "a/b", "1/0", ""])
def test_task_that_does_not_exist_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="allowed: k/n"):
        task_of(text)


def test_units_depend_on_sizes_alone_and_hold_every_input(inputs: list[str]) -> None:
    del inputs
    files = [units.InputFile(name=f"{n}", path=Path(f"{n}")) for n in range(7)]
    found = units.units_of(files, [100, 500, 1, 5000, 10, 0, 590])
    assert [[file.name for file in unit.files] for unit in found] == [["0", "1"], ["2"], ["3"], ["4", "5", "6"]]
    assert [unit.first_input for unit in found] == [0, 2, 3, 4]


def giant(folder: Path, line_ends: str = "\n") -> str:
    """A file of lines that are shorter and longer than a unit, blank ones among them, without a last newline."""
    folder.mkdir(parents=True, exist_ok=True)
    sizes = [10, 700, 40, 3, 2000, 0, 550, 60]
    lines = [json.dumps({"text": f"line {number} " + "x" * size}) for number, size in enumerate(sizes * 2)]
    path = folder / "giant.jsonl"
    path.write_bytes((line_ends.join([*lines[:5], "", " ", *lines[5:]])).encode())
    return str(path)


@pytest.mark.promise("one giant file of lines is divided among tasks, and its corpus is that of one process")
@pytest.mark.parametrize("line_ends", ["\n", "\r\n"])
def test_giant_file_is_divided_and_its_corpus_stays_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line_ends: str
) -> None:
    inputs = [giant(tmp_path / "inputs", line_ends), *write_inputs(tmp_path / "others")]
    config = corpus_config(inputs, tmp_path / "corpus")
    reports = [run_task(config, task, 3) for task in range(3)]
    size = Path(inputs[0]).stat().st_size
    assert reports[0].units_of_all > -(-size // 600)
    merge(config)
    monkeypatch.setattr(units, "UNIT_BYTES", 1 << 30)
    build(replace(config, output_dir=str(tmp_path / "plain")))
    assert content_of(tmp_path / "corpus") == content_of(tmp_path / "plain")


def test_giant_file_that_changed_between_its_parts_is_refused(tmp_path: Path) -> None:
    path = giant(tmp_path / "inputs")
    vocabulary = tmp_path / "vocabulary"
    build(replace(corpus_config([path], vocabulary), validation_fraction=0.0))
    config = corpus_config([path], tmp_path / "corpus", tokenizer=tokenizer_of(vocabulary))
    count = run_task(config, 0, 100).units_of_all
    data = Path(path).read_bytes()
    Path(path).write_bytes(data[:-4] + b"z" + data[-3:])  # the first part is done, and has the digests of all
    for task in range(1, count):
        run_task(config, task, 100)
    with pytest.raises(DataIntegrityError, match=r"giant\.jsonl changed while the corpus was being prepared"):
        merge(config)


# --- selection


def write_lines(folder: Path, texts: list[str]) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


VOCABULARY = ["alpha", "beta", "gamma", "delta", "eps", "zeta", "eta", "theta"]
WORDS = [" ".join(random.Random(seed).choices(VOCABULARY, k=60)) for seed in range(6)]


@pytest.mark.parametrize("num_tasks", [0, 2])
def test_filters_and_duplicates_are_dropped_and_counted(tmp_path: Path, num_tasks: int) -> None:
    from megamask.config.schema.corpus import FilterConfig

    texts = [WORDS[0], "tiny", WORDS[1], WORDS[0], "1 2 3 4 5 6 7 8 9 0 1 2 3", "same line\n" * 9, WORDS[2]]
    config = corpus_config(
        [write_lines(tmp_path / "in", texts)],
        tmp_path / "corpus",
        deduplicate="exact",
        filters=FilterConfig(min_characters=10, min_letters=0.5, max_repeated_lines=0.5),
        validation_fraction=0.0,
    )
    if num_tasks:
        for task in range(num_tasks):
            run_task(config, task, num_tasks)
    report = merge(config) if num_tasks else build(config)
    manifest = json.loads((tmp_path / "corpus" / "manifest.json").read_bytes())
    assert report.documents == 3
    assert [(step["name"], step["documents"]) for step in manifest["steps"]] == [
        ("min_characters", 1),
        ("min_letters", 1),
        ("max_repeated_lines", 1),
        ("equal_documents", 1),
    ]
    assert manifest["steps"][3]["text_bytes"] == len(WORDS[0])
    assert manifest["inputs"][0]["documents"] == 3
    assert manifest["options"]["filters"] == {"min_characters": "10", "min_letters": "0.5", "max_repeated_lines": "0.5"}
    from megamask.data.verify import verify_corpus

    assert verify_corpus(tmp_path / "corpus")["documents"] == 3


def test_near_duplicates_are_dropped_and_others_stay(tmp_path: Path) -> None:
    pytest.importorskip("datasketch")
    texts = [*WORDS[:3], WORDS[0] + " omega", "unrelated " + WORDS[3]]
    config = corpus_config(
        [write_lines(tmp_path / "in", texts)], tmp_path / "corpus", deduplicate="near", validation_fraction=0.0
    )
    assert build(config).documents == 4
    steps = json.loads((tmp_path / "corpus" / "manifest.json").read_bytes())["steps"]
    assert [(step["name"], step["documents"]) for step in steps] == [("equal_documents", 0), ("similar_documents", 1)]


def test_steps_that_leave_nothing_are_refused(tmp_path: Path) -> None:
    from megamask.config.schema.corpus import FilterConfig

    config = corpus_config(
        [write_lines(tmp_path / "in", WORDS)], tmp_path / "corpus", filters=FilterConfig(min_characters=10_000)
    )
    with pytest.raises(UsageError, match="hold no text at all that the steps min_characters leave"):
        build(config)


@pytest.mark.parametrize("num_tasks", [0, 2])
def test_broken_unicode_is_left_out_and_counted_where_that_is_asked_for(tmp_path: Path, num_tasks: int) -> None:
    from megamask.config.schema.corpus import FilterConfig

    folder = tmp_path / "in"
    pattern = write_lines(folder, [WORDS[0], WORDS[1], "half a pair: \ud800"])
    with next(folder.glob("*.jsonl")).open("ab") as file:
        file.write(b'{"text": "not UTF-8: \xff\xfe"}\n' + json.dumps({"text": WORDS[2]}).encode() + b"\n")
    (folder / "broken.txt").write_bytes(b"caf\xe9 and more text of another encoding")
    config = corpus_config([pattern, f"{folder}/*.txt"], tmp_path / "corpus", validation_fraction=0.0)
    with pytest.raises(DataIntegrityError, match=r"half a surrogate pair|is not UTF-8"):
        build(config)
    config = replace(config, filters=FilterConfig(broken_unicode=True))
    for task in range(num_tasks):
        run_task(config, task, num_tasks)
    report = merge(config) if num_tasks else build(config)
    manifest = json.loads((tmp_path / "corpus" / "manifest.json").read_bytes())
    assert report.documents == 3
    assert [(step["name"], step["documents"]) for step in manifest["steps"]] == [("broken_unicode", 3)]
    assert manifest["options"]["filters"] == {"broken_unicode": "1"}
