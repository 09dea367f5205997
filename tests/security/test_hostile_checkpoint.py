"""Hostile checkpoints whose COMMIT.json is true: each ends with 65, and nothing of it ran.

A person who can write a folder can also hash it, so a digest proves nothing about what a file does to its reader.
"""

from __future__ import annotations

import io
import json
import math
import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megamask.checkpoint.contents import check_size
from megamask.checkpoint.standalone import load_checkpoint
from megamask.engine.state.safetensors import StateReader
from megamask.engine.state.slices import StoredSlice
from megamask.models.counts import parameter_count
from megamask.storage.hashing import canonical_json, hash_of, sha256_file
from megamask_pipelines.cli import main as cli
from support.tiny_run import write_corpus, write_run


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hostile")
    _, commit = write_run(folder, write_corpus(folder / "data"))
    return commit.folder


@pytest.fixture
def checkpoint(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return Path(shutil.copytree(made, tmp_path / made.name))


@pytest.fixture(autouse=True)
def canary(tmp_path: Path) -> Iterator[Path]:
    """A file that every payload would make; it must never be there."""
    path = tmp_path / "canary"
    yield path
    assert not path.exists()
    assert not (tmp_path / "work" / "canary").exists()


def commit_again(folder: Path, **changes: Any) -> None:
    """Writes a COMMIT.json that is true of the folder as it is now, with fields changed."""
    document = json.loads((folder / "COMMIT.json").read_bytes())
    files = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "COMMIT.json"
    }
    document = {**document, "files": files, **changes}
    del document["self_sha256"]
    (folder / "COMMIT.json").write_bytes(canonical_json({**document, "self_sha256": hash_of(document)}))


def refused(folder: Path, *words: str, capsys: pytest.CaptureFixture[str], code: int = 65) -> str:
    """`megamask sample` must end with the code and one error that holds the words."""
    assert cli.main(["sample", str(folder), "--length", "2", "--json"]) == code
    error = capsys.readouterr().err
    assert error.startswith("error: "), error
    assert "Traceback" not in error
    for word in words:
        assert word in error, error
    return error


# A state that is a program, or lies. Every kind of lie has its case in tests/engine/state/test_safetensors.py.


class Calls:
    """Pickles as a call of a function."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


def saved(value: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    return buffer.getvalue()


@pytest.mark.promise("a state file that is a program runs nothing")
@pytest.mark.parametrize(
    "make",
    [
        lambda canary: pickle.dumps(Calls(os.system, f"touch {canary}")),
        lambda canary: saved(Calls(os.system, f"touch {canary}")),
        lambda canary: saved(Calls(os.system, f"touch {canary}"), _use_new_zipfile_serialization=False),
        lambda canary: b"",
        lambda canary: bytes(100),
        lambda canary: b"\xff" * 100,
    ],
    ids=["pickle", "torch", "old torch", "empty", "zeros", "ones"],
)
def test_state_file_of_another_kind_is_refused_and_runs_nothing(
    make: Any, checkpoint: Path, canary: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hostile = make(canary).ljust(1 << 20, b"\0")  # as many bytes as the weights need
    (checkpoint / "state-00000.safetensors").write_bytes(hostile)
    commit_again(checkpoint)
    refused(checkpoint, "the state in", "state-00000.safetensors: its header would have", capsys=capsys)


@pytest.mark.promise("a checkpoint of version 0.1.0 is refused by name, and its pickle is never opened")
def test_state_of_version_0_1_0_is_refused_unread(
    checkpoint: Path, canary: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (checkpoint / "state-00000.safetensors").rename(checkpoint / "__0_0.distcp")
    (checkpoint / ".metadata").write_bytes(pickle.dumps(Calls(os.system, f"touch {canary}")))
    commit_again(checkpoint, version=1)
    words = ("was written by megamask 0.1.0", "Nothing was loaded", "continue, evaluate or sample this run with")
    refused(checkpoint, *words, capsys=capsys, code=2)
    assert cli.main(["verify", "checkpoint", str(checkpoint)]) == 2
    assert words[0] in capsys.readouterr().err


def edit_header(checkpoint: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    """Change the header of the only state file and commit again."""
    path = checkpoint / "state-00000.safetensors"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    edit(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    commit_again(checkpoint)


@pytest.mark.promise("a state file whose header lies is refused before memory is reserved")
@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda header: header["__metadata__"].update(version="9"), "its format is not megamask-state version 1"),
        (lambda header: header["model.norm.weight#0"].update(shape=[1 << 40]), "model.norm.weight#0 has bytes"),
        (
            lambda header: header["__metadata__"].update({"model.norm.weight#0": '{"offsets":[0],"shape":[1099511]}'}),
            "has 32 of 1099511 elements",
        ),
        (
            lambda header: header["__metadata__"].update({"model.norm.weight#0": '{"offsets":[1],"shape":[32]}'}),
            "outside of (32,)",
        ),
    ],
    ids=["version", "shape", "missing elements", "outside"],
)
@pytest.mark.parametrize("verb", ["sample", "verify"])
def test_state_header_that_lies_is_refused_by_every_verb(
    verb: str, edit: Any, words: str, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The digests are true: `verify checkpoint` reads the header with the reader of a resume."""
    edit_header(checkpoint, edit)
    if verb == "sample":
        refused(checkpoint, words, capsys=capsys)
        return
    assert cli.main(["verify", "checkpoint", str(checkpoint)]) == 65
    assert words in capsys.readouterr().err


def test_same_header_written_again_is_read(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The tests above fail because of what they change: moments are missing for `verify`, weights are all there."""
    edit_header(checkpoint, lambda header: None)
    found = torch.zeros(32)
    StateReader(checkpoint).read([StoredSlice(name="model.norm.weight", shape=(32,), offsets=(0,), data=found)])
    assert torch.equal(found, torch.ones(32))


# Names, links and documents.


@pytest.mark.promise("names and links that lead out of a checkpoint are refused")
@pytest.mark.parametrize(
    "name", ["../x", "/etc/passwd", "a/../../x", "x\\..\\y", "./x", "tokenizer//x", "COMMIT.json", ""]
)
def test_commit_that_names_a_file_outside_is_refused(
    name: str, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {"state.json": {"bytes": 1, "sha256": "0" * 64}, name: {"bytes": 1, "sha256": "0" * 64}}
    commit_again(checkpoint, files=files)
    refused(checkpoint, "COMMIT.json", "is not allowed", capsys=capsys)


@pytest.mark.promise("names and links that lead out of a checkpoint are refused")
@pytest.mark.parametrize("name", ["state.json", "state-00000.safetensors", "tokenizer/tokenizer.json", "COMMIT.json"])
def test_link_in_a_checkpoint_is_refused(
    name: str, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (checkpoint / name).rename(tmp_path / "elsewhere")
    (checkpoint / name).symlink_to(tmp_path / "elsewhere")
    refused(checkpoint, capsys=capsys)


def test_folder_that_is_a_link_is_refused(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (checkpoint / "tokenizer").rename(tmp_path / "elsewhere")
    (checkpoint / "tokenizer").symlink_to(tmp_path / "elsewhere")
    refused(checkpoint, "tokenizer is a link", capsys=capsys)


def test_pipe_in_a_checkpoint_is_refused_and_not_waited_for(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (checkpoint / "state.json").unlink()
    os.mkfifo(checkpoint / "state.json")
    refused(checkpoint, "state.json is not a plain file", capsys=capsys)


@pytest.mark.parametrize(
    "text",
    [
        '{"format": "megamask-checkpoint", "version": 1, "version": 1}\n',
        '{"step": NaN}\n',
        "[" * 100_000,
        '{"a": ' * 100_000,
        '{"step": ' + "9" * 5000 + "}\n",
        '"x"',
    ],
)
def test_commit_that_is_no_canonical_document_is_refused(
    text: str, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (checkpoint / "COMMIT.json").write_text(text)
    refused(checkpoint, "COMMIT.json is not ", capsys=capsys)


def change_json(path: Path, key: str, value: Any) -> None:
    document = json.loads(path.read_bytes())
    section, _, name = key.rpartition(".")
    (document[section] if section else document)[name] = value
    is_canonical = path.name == "state.json" and type(value) is not float
    path.write_bytes(canonical_json(document) if is_canonical else json.dumps(document).encode())


@pytest.mark.promise("a model.json of a billion layers is refused before a network is built")
@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("model.num_layers", 10**9, "weights need"),
        ("model.num_layers", 10**30, "weights need"),
        ("model.num_layers", -1, "model.num_layers is -1"),
        ("model.num_layers", 2.0, "model field num_layers is 2.0"),
        ("model.num_layers", True, "model field num_layers is True"),
        ("model.ffn_hidden_size", 10**12, "weights need"),
        ("model.hidden_size", 10**12, "weights need"),
        ("model.max_sequence_length", 10**12, "rows of 1000000000000 tokens"),
        ("model.rope_theta", math.nan, "NaN is not a number of JSON"),
        ("model.norm_eps", math.inf, "Infinity is not a number of JSON"),
        ("model.vocab_size", 10, "vocabulary is not the document's"),
        ("vocabulary_size", 10**12, "vocabulary"),
        ("vocabulary_size", "270", "vocabulary"),
        ("mask_token_id", -1, "mask_token_id"),
        ("mask_token_id", 10**12, "mask_token_id"),
        (
            "objective",
            {"noise_schedule": "os.system", "complementary": True, "mask_logit": "excluded"},
            "noise_schedule",
        ),
        ("objective", {"x": 1}, "unexpected keyword"),
        ("objective", [], "model.json lacks or misstates"),
        ("model", [], "model.json lacks or misstates"),
        ("tokenizer_digest", "0" * 64, "model.json names"),
        ("tokenizer_digest", None, "model.json names no tokenizer"),
        ("tokenizer_digest", 0, "model.json lacks or misstates"),
    ],
)
def test_model_document_that_cannot_be_is_refused_before_a_network_is_built(
    key: str, value: Any, words: str, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change_json(checkpoint / "model.json", key, value)
    commit_again(checkpoint)
    refused(checkpoint, words, capsys=capsys)


def test_weights_are_counted_without_their_names(checkpoint: Path) -> None:
    """A spec of a trillion layers is counted at once; for every spec the count is the sum over its tensors."""
    loaded = load_checkpoint(checkpoint)
    check_size(loaded.commit, loaded.model)
    spec = loaded.model.spec
    one, three, many = (
        parameter_count(type(spec)(**{**vars(spec), "num_layers": layers})) for layers in (1, 3, 10**12)
    )
    assert (three - one) * (10**12 - 1) == (many - one) * 2


@pytest.mark.parametrize("name", ["state.json", "model.json"])
@pytest.mark.parametrize("text", ["[" * 100_000, '{"format": NaN}', "", "null", '{"x": ' + "9" * 5000 + "}", "\xff"])
def test_document_that_is_none_is_refused(
    name: str, text: str, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (checkpoint / name).write_text(text, encoding="latin-1")
    commit_again(checkpoint)
    refused(checkpoint, f"{name} is not ", capsys=capsys)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("step", -1),
        ("step", "20"),
        ("consumed_samples", 1.5),
        ("consumed_tokens", 1 << 70),
        ("seed", "x"),
        ("seed", None),
    ],
)
def test_state_that_cannot_be_is_refused(
    key: str, value: Any, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change_json(checkpoint / "state.json", key, value)
    commit_again(checkpoint)
    words = "is not canonical" if type(value) is float else "lacks or misstates a field"
    refused(checkpoint, f"state.json {words}", capsys=capsys)


def test_document_larger_than_any_is_refused_unread(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with (checkpoint / "state.json").open("r+b") as file:
        file.truncate(1 << 25)
    commit_again(checkpoint)
    refused(checkpoint, "33554432 bytes", capsys=capsys)


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data["added_tokens"][0].update(id=1 << 40),
        lambda data: data["added_tokens"][0].update(id=-1),
        lambda data: data["added_tokens"][0].update(id=0),
        lambda data: data["model"]["vocab"].update({"aa": 1 << 62}),
        lambda data: data["model"]["vocab"].update({"aa": 1.5}),
        lambda data: data["model"].update(vocab={}),
        lambda data: data.update(pre_tokenizer={"type": "Split", "pattern": {"Regex": "("}}),
        lambda data: data.update(added_tokens="x"),
    ],
)
def test_tokenizer_with_absurd_ids_is_refused(
    change: Any, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = checkpoint / "tokenizer" / "tokenizer.json"
    data = json.loads(path.read_bytes())
    change(data)
    path.write_text(json.dumps(data))
    commit_again(checkpoint)
    refused(checkpoint, "the tokenizer is damaged", capsys=capsys)


@pytest.mark.parametrize("name", ["tokenizer.json", "special_tokens.json"])
@pytest.mark.parametrize("text", ["[" * 100_000, "{}", "null", ""])
def test_tokenizer_file_that_is_none_is_refused(
    name: str, text: str, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (checkpoint / "tokenizer" / name).write_text(text)
    commit_again(checkpoint)
    refused(checkpoint, "the tokenizer is damaged" if name == "tokenizer.json" else name, capsys=capsys)
