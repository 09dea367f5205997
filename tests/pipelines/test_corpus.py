from __future__ import annotations

import argparse
import io
import json
import random
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import webdataset
import yaml

from megamask.data.corpus.progress_lines import ProgressLines
from megamask.data.manifest import Manifest
from megamask_pipelines.cli import prepare
from megamask_pipelines.corpus import prepare_corpus, progress_display
from support.command import environment
from support.texts import corpus_config, write_inputs

CONTRACT = {"corpus_id", "documents", "tokens", "sequences", "shards", "bytes"}


def arguments(*given: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    prepare.add_arguments(parser)
    return parser.parse_args(given)


def test_job_reports_the_corpus_it_made(tmp_path: Path) -> None:
    report = prepare_corpus(corpus_config(write_inputs(tmp_path / "inputs"), tmp_path / "corpus"))
    manifest = Manifest.load(tmp_path / "corpus")
    assert set(report) >= CONTRACT
    assert report["corpus_id"] == manifest.corpus_id
    assert report["sequences"] == sum(split.num_rows for split in manifest.splits.values())
    assert report["reused"] is False
    assert json.loads(json.dumps(report)) == report


def test_shards_of_a_prepared_corpus_are_plain_webdatasets(tmp_path: Path) -> None:
    prepare_corpus(corpus_config(write_inputs(tmp_path / "inputs"), tmp_path / "corpus"))
    manifest = Manifest.load(tmp_path / "corpus")
    urls = [str(tmp_path / "corpus" / shard.name) for shard in manifest.split("train").shards]
    keys = [sample["__key__"] for sample in webdataset.WebDataset(urls, shardshuffle=False, empty_check=False)]
    assert keys == [f"{number:06d}" for number in range(manifest.split("train").num_blocks)]


def test_short_preparation_prints_no_progress_when_stderr_is_no_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare_corpus(corpus_config(write_inputs(tmp_path / "inputs"), tmp_path / "corpus"))
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "")


@pytest.mark.promise("prepare without a terminal prints a line every 10 s: documents, bytes, time left")
def test_progress_without_a_terminal_is_a_line_every_10_seconds() -> None:
    lines: list[str] = []
    now = 100.0
    progress = ProgressLines(lines.append, clock=lambda: now)
    for second in range(41):
        now = 100.0 + second
        progress("encoding", 2 * second, second * 1_000_000, 80_000_000)
    assert len(lines) == 4
    assert lines[1] == "encoding: 40 documents, 20.0 of 80.0 MB (25 %), about 60 s left"
    progress("training the tokenizer", 0, 0, None)
    now += 12
    progress("training the tokenizer", 0, 0, None)
    assert lines[4:] == ["training the tokenizer: 12 s so far"]


@pytest.mark.multiprocess
@pytest.mark.promise("Ctrl-C ends prepare, also while the tokenizer is being trained (130)")
def test_interrupt_ends_a_preparation_that_trains_its_tokenizer(tmp_path: Path) -> None:
    letters = random.Random(1).choices("abcdefghijklmnop", k=1_500_000)  # merges of it take minutes
    (tmp_path / "a.txt").write_text("".join(letters))
    section = {"inputs": [str(tmp_path / "a.txt")], "output_dir": str(tmp_path / "corpus"), "sequence_length": 16}
    section |= {"validation_fraction": 0.0, "tokenizer": {"vocab_size": 100_000}}
    (tmp_path / "corpus.yaml").write_text(yaml.safe_dump({"corpus": section}))
    program = (
        "import sys\n"
        "from megamask_pipelines import corpus\n"
        "from megamask_pipelines.cli.main import main\n"
        "corpus.ProgressLines.__init__.__kwdefaults__['every_s'] = 0\n"
        f"sys.argv = ['megamask', 'prepare', {str(tmp_path / 'corpus.yaml')!r}]\n"
        "sys.exit(main())\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE, text=True, env=environment())
    assert process.stderr is not None
    while "training the tokenizer" not in (line := process.stderr.readline()):
        assert line, "it ended before it trained"
    process.send_signal(signal.SIGINT)
    try:
        _, stderr = process.communicate(timeout=20)
    finally:
        process.kill()
    assert process.returncode == 130, stderr
    assert "Traceback" not in stderr
    assert not (tmp_path / "corpus").exists()


def test_progress_names_each_phase_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    with progress_display() as progress:
        progress("reading the inputs", 0, 0, 10)
        progress("training the tokenizer", 0, 0, None)
        progress("encoding", 3, 10, 10)
    assert "reading the inputs" in terminal.getvalue()
    assert "encoding" in terminal.getvalue()


def test_verb_prepares_what_the_config_and_overrides_say(tmp_path: Path) -> None:
    inputs = write_inputs(tmp_path / "inputs")
    config = tmp_path / "corpus.yaml"
    section = {"inputs": inputs, "output_dir": "x", "sequence_length": 16, "tokenizer": {"vocab_size": 280}}
    config.write_text(yaml.safe_dump({"corpus": section}))
    given = arguments(str(config), f"corpus.output_dir={tmp_path}/corpus", "corpus.sequence_length=32")
    result = prepare.run(given)
    assert set(result) >= CONTRACT
    assert Manifest.load(tmp_path / "corpus").sequence_length == 32
    again = prepare.run(given)
    assert again == result | {"reused": True}


def test_verb_tells_a_person_in_two_lines_whether_anything_was_made() -> None:
    result = SimpleNamespace(
        **dict.fromkeys(["documents", "bytes", "tokens", "vocab_size", "sequences", "shards"], 3),
        corpus_id="c0ffee",
        output_dir="corpora/x",
        warnings=[],
    )
    made = prepare.render(vars(result) | {"reused": False})
    found = prepare.render(vars(result) | {"reused": True})
    assert made.splitlines()[0] == "corpus c0ffee prepared in corpora/x"
    assert found.splitlines()[0] == "corpus c0ffee is already in corpora/x"
    assert len(made.splitlines()) == 2
    many = prepare.render(vars(result) | {"reused": False, "warnings": [f"w{n}" for n in range(25)]}).splitlines()
    assert (many[0], many[20], len(many)) == ("warning: w0", "warning: 5 more; --json lists all", 23)


@pytest.mark.promise("inputs are given as mappings: name, path, format, text_key, licence, origin, version")
def test_inputs_are_given_as_mappings_and_recorded_with_their_licences(tmp_path: Path) -> None:
    inputs = write_inputs(tmp_path / "inputs")
    (tmp_path / "web.data").write_text('{"body": "from the web"}\n{"body": ""}\n')
    entry = {"name": "web", "path": f"{tmp_path}/web.data", "format": "jsonl", "text_key": "body", "licence": "CC0-1.0"}
    config = tmp_path / "corpus.yaml"
    section = {"inputs": [*inputs, entry], "exclude": ["nasty.*"], "output_dir": f"{tmp_path}/corpus"}
    section |= {"sequence_length": 16, "tokenizer": {"vocab_size": 280}}
    config.write_text(yaml.safe_dump({"corpus": section}))
    result = prepare.run(arguments(str(config)))
    content = Manifest.load(tmp_path / "corpus").content
    (named,) = (each for each in content["inputs"] if each["name"] == "web/web.data")
    assert (named["source"], named["format"], named["text_key"], named["documents"]) == ("web", "jsonl", "body", 2)
    assert all(set(each) == {"name", "sha256", "bytes", "documents"} for each in content["inputs"] if each != named)
    assert not any("nasty" in each["name"] for each in content["inputs"])
    record = json.loads((tmp_path / "corpus" / "provenance.json").read_bytes())
    assert record["inputs"] == [*inputs, entry]
    assert [each.get("licence") for each in record["files"] if each.get("source") == "web"] == ["CC0-1.0"]
    assert [text for text in result["warnings"] if "web.data: 1 document(s) empty" in text]


def test_shipped_corpus_config_prepares_the_standard_library_twice_alike(tmp_path: Path) -> None:
    config = str(Path(__file__).parents[2] / "configs" / "corpus" / "python_stdlib.yaml")
    first = prepare.run(arguments(config, f"corpus.output_dir={tmp_path}/one"))
    second = prepare.run(arguments(config, f"corpus.output_dir={tmp_path}/two"))
    assert first["corpus_id"] == second["corpus_id"]
    assert (first["documents"] > 100, Manifest.load(tmp_path / "one").vocab_size) == (True, 512)
