"""Every verb with bad input beside a trained run: one clear error, the right exit code, and the run stays as it was."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from support.command import megamask, tiny
from support.refusals import READERS, Refuse, train, truncate
from support.tiny_run import write_corpus

pytestmark = pytest.mark.multiprocess


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, small_corpus: Path) -> Path:
    """A tiny run of two steps; read-only for tests."""
    runs = tmp_path_factory.mktemp("bad_input_runs")
    done = megamask("train", *tiny(small_corpus, runs, "run", "training.steps=2"), "--json")
    assert done.code == 0, done.stderr
    return runs / "run"


@pytest.fixture(scope="module")
def other_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus of another tokenizer with rows of the same length."""
    return write_corpus(tmp_path_factory.mktemp("other_corpus"), sequence_length=64)


@pytest.fixture
def run_dir(trained: Path, place: Path) -> Path:
    """A copy of the trained run, watched like everything in the working folder."""
    return Path(shutil.copytree(trained, place / "runs" / "run"))


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("run.seed=2", ("run.seed", "1", "2", "run.json")),
        ("training.global_batch_size=4", ("training.global_batch_size", "8", "4")),
        ("data.seed=9", ("data.seed", "9")),
        ("model.num_layers=1", ("model.num_layers", "2", "1")),
    ],
)
@pytest.mark.parametrize("steps", [2, 3])
def test_resuming_under_another_identity_is_refused(
    refuse: Refuse, run_dir: Path, small_corpus: Path, override: str, words: tuple[str, ...], steps: int
) -> None:
    refuse(*train(small_corpus, "run.name=run", f"training.steps={steps}", override), says=words)


def test_resuming_on_another_corpus_is_refused(refuse: Refuse, run_dir: Path, other_corpus: Path) -> None:
    refuse(*train(other_corpus, "run.name=run"), says=("data.corpora.main is corpus", "run.json"))


def test_corpus_that_is_gone_is_named_by_its_key(refuse: Refuse, run_dir: Path) -> None:
    refuse(*train("nope", "run.name=run"), says=("data.corpora.main is nope",))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--step", "0"], ("--step is 0", "1 to 2")),
        (["--step", "3"], ("--step is 3", "1 to 2")),
        (["--step", "x"], ("--step", "invalid int value: 'x'")),
        (["--step", "1", "--corpus", "folder"], ("--corpus is 'folder'", "NAME=FOLDER")),
        (["--step", "1", "--corpus", "x=folder"], ("--corpus names x", "allowed: main")),
        (["--step", "1", "--corpus", "main=nope"], ("nope", "--corpus main=FOLDER")),
        (["--step", "9", "--corpus", "main=nope"], ("--step is 9", "1 to 2")),
    ],
)
def test_inspecting_what_the_run_does_not_have_is_refused(
    refuse: Refuse, run_dir: Path, arguments: list[str], words: tuple[str, ...]
) -> None:
    refuse("inspect", run_dir, *arguments, says=words)


def test_inspecting_with_another_corpus_ends_with_64(refuse: Refuse, run_dir: Path, other_corpus: Path) -> None:
    corpus = f"main={other_corpus}"
    refuse("inspect", run_dir, "--step", "1", "--corpus", corpus, code=64, says=("data.corpora.main",))


@pytest.mark.parametrize("verb", ["inspect", "status"])
def test_checkpoint_folder_is_no_run(refuse: Refuse, run_dir: Path, verb: str) -> None:
    [folder] = run_dir.glob("checkpoints/step-*")
    refuse(*READERS[verb], folder, says=("is not a run directory", "no run.json", "<run.output_dir>/<run.name>"))


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--text", "nope.txt"], 2, ("--text nope.txt cannot be read",)),
        (["--text", "folder"], 2, ("--text folder cannot be read",)),
        (["--text", "empty.txt"], 2, ("--text empty.txt is empty",)),
        (["--text", "latin.txt"], 64, ("--text latin.txt is not UTF-8 at byte 3",)),
        (["--text", "text.txt", "--corpus", "folder"], 2, ("--corpus", "--text", "one of them")),
        (["--text", "text.txt", "--split", "train"], 2, ("--split: not allowed with argument --text",)),
        (["--corpus", "nope"], 2, ("--corpus is nope, which is not a folder",)),
        (["--corpus", "folder"], 2, ("--corpus is folder", "no manifest.json")),
        (["--split", "test"], 2, ("'test'", "'train', 'validation'")),
        (["--rows", "0"], 2, ("--rows is 0", ">= 1")),
        (["--draws", "0"], 2, ("draws is 0", ">= 1")),
        (["--replicates", "1"], 2, ("replicates is 1", ">= 2")),
        (["--seed", "-1"], 2, ("--seed is -1", "0 to 2^64 - 1")),
    ],
)
def test_evaluation_that_cannot_be_done_is_refused(
    refuse: Refuse, run_dir: Path, arguments: list[str], code: int, words: tuple[str, ...]
) -> None:
    refuse("evaluate", run_dir, *arguments, code=code, says=words)


def test_evaluating_on_a_corpus_of_another_tokenizer_is_refused(
    refuse: Refuse, run_dir: Path, other_corpus: Path
) -> None:
    words = ("tokenizer mismatch", str(other_corpus), "corpus.tokenizer.path")
    refuse("evaluate", run_dir, "--corpus", other_corpus, says=words)


def test_evaluating_where_the_corpus_has_gone_tells_what_to_give(
    refuse: Refuse, run_dir: Path, small_corpus: Path
) -> None:
    config = run_dir / "config" / "attempt-0001.yaml"
    config.write_text(config.read_text().replace(str(small_corpus), "gone"))
    refuse("evaluate", run_dir, says=("data.corpora.main is gone", "--corpus FOLDER, or --text FILE"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--prompt", "word " * 100], ("--prompt has", "hold 64", "at most 63", "shorten --prompt")),
        (["--length", "0"], ("--length is 0", "1 to 64")),
        (["--length", "65"], ("--length is 65", "1 to 64")),
        (["--steps", "0"], ("--steps is 0", ">= 1")),
        (["--steps", "65"], ("65 denoising steps", "1 to 64", "--steps")),
        (["--block-length", "0"], ("--block-length is 0", ">= 1")),
        (["--temperature", "-1"], ("--temperature is -1.0", ">= 0")),
        (["--temperature", "nan"], ("--temperature is nan", ">= 0")),
        (["--seed", "-1"], ("--seed is -1", "0 to 2^64 - 1")),
        (["--infill", "a<|mask:0|>b"], ("--infill has <|mask:0|>", "1 token or more")),
        (["--infill", "nothing to fill"], ("--infill has no <|mask:N|> span",)),
        (["--infill", "a<|mask:65|>"], ("--infill makes at least", "hold 64")),
        (["--infill", "a<|mask|>", "--length", "3"], ("--infill alone",)),
        (["--infill", "a<|mask|>", "--prompt", "b"], ("--prompt: not allowed with argument --infill",)),
    ],
)
def test_sampling_that_cannot_be_done_is_refused(
    refuse: Refuse, run_dir: Path, arguments: list[str], words: tuple[str, ...]
) -> None:
    refuse("sample", run_dir, *arguments, says=words)


@pytest.mark.promise("a damaged run, checkpoint or corpus is refused by each verb that reads it")
@pytest.mark.parametrize("content", ["", '{"run_id":', "[]", '{"format": "x", "run_id": "y", "version": 1}'])
@pytest.mark.parametrize("verb", ["status", "inspect", "train"])
def test_damaged_run_json_is_refused(
    refuse: Refuse, run_dir: Path, small_corpus: Path, verb: str, content: str
) -> None:
    (run_dir / "run.json").write_text(content)
    arguments = train(small_corpus, "run.name=run") if verb == "train" else [*READERS[verb], run_dir]
    refuse(*arguments, code=65, says=("run.json", "Nothing was loaded from it", "backup"))


@pytest.mark.promise("a damaged run, checkpoint or corpus is refused by each verb that reads it")
@pytest.mark.parametrize("verb", ["evaluate", "sample", "verify checkpoint"])
@pytest.mark.parametrize(
    "name", ["COMMIT.json", "model.json", "state.json", "tokenizer/tokenizer.json", "*.safetensors"]
)
@pytest.mark.parametrize("by_folder", [False, True])
def test_damaged_checkpoint_ends_with_65(refuse: Refuse, run_dir: Path, verb: str, name: str, by_folder: bool) -> None:
    [folder] = run_dir.glob("checkpoints/step-*")
    path = max(folder.glob(name), key=lambda path: path.stat().st_size)
    truncate(path)
    given = folder if by_folder else run_dir
    refuse(*READERS[verb], given, code=65, says=(path.name, folder.name, "Nothing was loaded", "restore"))


@pytest.mark.parametrize("verb", ["evaluate", "sample", "verify checkpoint"])
def test_run_without_a_commit_is_refused(refuse: Refuse, run_dir: Path, verb: str) -> None:
    [commit] = run_dir.glob("checkpoints/step-*/COMMIT.json")
    commit.unlink()
    refuse(*READERS[verb], run_dir, says=("has no committed checkpoint yet",))


@pytest.mark.promise("a damaged run, checkpoint or corpus is refused by each verb that reads it")
@pytest.mark.parametrize("verb", ["evaluate", "inspect", "verify corpus", "train"])
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("manifest.json", ("manifest.json", "canonical JSON")),
        ("shards/*.idx", (".idx", "restore the file")),
        ("shards/*.tar", (".tar", "restore the file")),
        ("shards/*", ("is missing",)),
    ],
)
def test_damaged_corpus_ends_with_64(
    refuse: Refuse, run_dir: Path, damaged: Path, verb: str, name: str, words: tuple[str, ...]
) -> None:
    for path in sorted(damaged.glob(name)):
        if words == ("is missing",):
            path.unlink()
        else:
            truncate(path)
    arguments: dict[str, list[object]] = {
        "evaluate": ["evaluate", run_dir, "--corpus", damaged],
        "inspect": ["inspect", run_dir, "--step", "1", "--corpus", f"main={damaged}"],
        "verify corpus": ["verify", "corpus", damaged],
        "train": [*train(damaged)],
    }
    refuse(*arguments[verb], code=64, says=(str(damaged), *words))


@pytest.mark.parametrize("verb", ["evaluate", "inspect"])
def test_damaged_row_ends_with_64(refuse: Refuse, run_dir: Path, damaged: Path, verb: str) -> None:
    for shard in damaged.glob("shards/*.tar"):
        content = shard.read_bytes()
        shard.write_bytes(bytes(byte ^ 1 for byte in content))
    corpus = {"evaluate": damaged, "inspect": f"main={damaged}"}[verb]
    refuse(*READERS[verb], run_dir, "--corpus", corpus, code=64, says=(".tar", "row ", "crc32c", "restore"))
