"""Hostile checkpoints whose COMMIT.json is true: each ends with 65, and nothing of it ran.

Whoever can write a folder can also hash it, so a digest proves nothing about what a file does to its reader.
"""

from __future__ import annotations

import io
import json
import math
import os
import pickle
import shutil
import struct
import subprocess
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from megamask.checkpoint.contents import check_size
from megamask.engine.index_pickle import IndexProblem, read_index
from megamask.engine.torch_dist import Piece, StateReader, write_index, write_pieces
from megamask.errors import CheckpointIntegrityError
from megamask.models.counts import parameter_count
from megamask.storage.hashing import canonical_json, hash_of, sha256_file
from megamask_pipelines.checkpoint_loading import load_checkpoint
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


# A .metadata that is a program.


class Calls:
    """Pickles as a call of a function."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


def with_state(state: Any) -> TensorProperties:
    properties = TensorProperties(dtype=torch.float32)
    properties.dtype = state
    return properties


def name_of(module: str, name: str) -> bytes:
    return b"\x8c" + bytes([len(module)]) + module.encode() + b"\x8c" + bytes([len(name)]) + name.encode() + b"\x93"


METADATA = "torch.distributed.checkpoint.metadata"


def programs(canary: Path) -> dict[str, bytes]:
    touch, text = f"touch {canary}", f"open({str(canary)!r}, 'w')"
    write_it = (b"\x8c" + bytes([len(touch)]) + touch.encode() + b"\x85R.") if len(touch) < 256 else b""
    return {
        "system": pickle.dumps(Calls(os.system, touch)),
        "popen": pickle.dumps(Calls(subprocess.check_output, ["touch", str(canary)])),
        "eval": pickle.dumps(Calls(eval, text)),
        "exec": pickle.dumps(Calls(exec, text)),
        "open": pickle.dumps(Calls(open, str(canary), "w")),
        "getattr": pickle.dumps(Calls(getattr, os.path.join, "__globals__")),
        "protocol 0": pickle.dumps(Calls(os.system, touch), protocol=0),
        "protocol 2": pickle.dumps(Calls(os.system, touch), protocol=2),
        "codecs": pickle.dumps(b"\xff" * 3, protocol=2),
        "nested": pickle.dumps(Metadata({"a": Calls(os.system, touch)}, None, {})),  # type: ignore[dict-item]
        "as planner data": pickle.dumps(Metadata({}, Calls(os.system, touch), {})),
        "as a key": pickle.dumps(Metadata({}, None, {Calls(os.system, touch): 1})),
        "hostile state": pickle.dumps(
            Metadata({"a": TensorStorageMetadata(with_state(Calls(os.system, touch)), torch.Size([1]), [])}, None, {})
        ),
        "torch.load": pickle.dumps(Calls(torch.load, str(canary))),
        "a class of the index called": b"\x80\x04" + name_of(METADATA, "Metadata") + write_it,
        "another name of an allowed module": b"\x80\x04" + name_of(METADATA, "os.system") + write_it,
        "state for a class": b"\x80\x04" + name_of(METADATA, "Metadata") + b"}\x8c\x01xK\x01sb.",
        "state for a function": b"\x80\x04" + name_of("torch.serialization", "_get_layout") + b"}\x8c\x05cacheNsb.",
        "state twice": b"\x80\x04" + name_of(METADATA, "Metadata") + b")\x81}b}b.",
        "a slot state": b"\x80\x04" + name_of(METADATA, "Metadata") + b")\x81N}\x8c\x09__class__Ns\x86b.",
        "persistent id": b"\x80\x04\x8c\x01aQ.",
        "extension": b"\x80\x04\x82\x01.",
        "inst": b"(S'touch'\nios\nsystem\n.",
        "memo of a billion": b"\x80\x04Nr\xff\xff\xff\x7f.",
        "bytes of an exabyte": b"\x80\x04\x8e" + struct.pack("<Q", 1 << 60) + b".",
        "text of an exabyte": b"\x80\x04\x8d" + struct.pack("<Q", 1 << 60) + b".",
        "bytearray of an exabyte": b"\x80\x05\x96" + struct.pack("<Q", 1 << 60) + b".",
        "number of two gigabytes": b"\x80\x04\x8b" + struct.pack("<i", 2**31 - 1) + b".",
        "deep": b"\x80\x04" + b"]" * 1_000_000 + b"a" * 999_999 + b".",
        "laughs": b"\x80\x04)" + b"2\x86" * 60 + b".",
        "two values": b"\x80\x04NN.",
        "empty": b"",
        "nothing": b"\x80\x04.",
        "more behind": pickle.dumps(Metadata({}, None, {})) + b"N.",
    }


@pytest.mark.promise("a state index that is a program runs nothing and changes nothing")
@pytest.mark.parametrize("name", programs(Path("x")))
def test_index_that_is_a_program_is_refused_and_runs_nothing(
    name: str, checkpoint: Path, canary: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {name: dict(vars(kind)) for name, kind in (("m", Metadata), ("t", TensorStorageMetadata))}
    layouts = dict(vars(torch.serialization._get_layout))
    (checkpoint / ".metadata").write_bytes(programs(canary)[name])
    commit_again(checkpoint)
    refused(checkpoint, ".metadata is no index of a state", capsys=capsys)
    assert {"m": dict(vars(Metadata)), "t": dict(vars(TensorStorageMetadata))} == before
    assert dict(vars(torch.serialization._get_layout)) == layouts


@given(st.binary(max_size=200))
def test_no_bytes_make_the_reader_of_an_index_do_anything_but_refuse(data: bytes) -> None:
    with pytest.raises(IndexProblem):
        read_index(b"\x80\x04" + data)


@pytest.mark.promise("a state index that is a program runs nothing and changes nothing")
@given(st.data())
def test_changed_index_is_read_whole_or_refused(data: st.DataObject) -> None:
    """Whatever byte of a true index changes: a refusal, or an index whose parts still lie inside their tensors."""
    changed = bytearray(pickle.dumps(index_of([((0, 0), (2, 3), 0), ((2, 0), (2, 3), 1000)])))
    changed[data.draw(st.integers(0, len(changed) - 1))] = data.draw(st.integers(0, 255))
    try:
        read = read_index(bytes(changed))
    except IndexProblem:
        return
    for index, info in read.storage_data.items():
        tensor = read.state_dict_metadata[index.fqn]
        assert isinstance(tensor, TensorStorageMetadata)
        assert info.offset >= 0
        for chunk in tensor.chunks:
            ends = [offset + size for offset, size in zip(chunk.offsets, chunk.sizes, strict=True)]
            assert all(end <= total for end, total in zip(ends, tensor.size, strict=True))


def index_of(
    parts: list[tuple[tuple[int, ...], tuple[int, ...], int]],
    *,
    size: tuple[int, ...] = (4, 3),
    file: str = "__0_0.distcp",
    extra: int = 500,
    transform: Any = None,
) -> Metadata:
    """An index of one tensor "w" whose parts are (offsets, sizes, byte)."""
    chunks = [ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)) for offsets, sizes, _ in parts]
    storage = {
        MetadataIndex("w", torch.Size(offsets)): _StorageInfo(file, at, 4 * math.prod(sizes) + extra, transform)
        for offsets, sizes, at in parts
    }
    tensor = TensorStorageMetadata(TensorProperties(dtype=torch.float32), torch.Size(size), chunks)
    return Metadata({"w": tensor}, None, storage)


WHOLE = [((0, 0), (4, 3), 0)]


def test_index_that_torch_writes_is_read_as_torch_reads_it(tmp_path: Path) -> None:
    pieces = [
        Piece(name="w", shape=(4, 6), offsets=(0, 0), data=torch.arange(12.0).view(2, 6)),
        Piece(name="w", shape=(4, 6), offsets=(2, 0), data=torch.ones(2, 6)),
        Piece(name="b" * 300, shape=(70_000,), offsets=(0,), data=torch.zeros(70_000)),
    ]
    _, part = write_pieces(tmp_path, pieces, rank=0)
    write_index(tmp_path, [part])
    data = (tmp_path / ".metadata").read_bytes()
    ours, theirs = read_index(data), pickle.loads(data)
    assert (ours.state_dict_metadata, ours.storage_data) == (theirs.state_dict_metadata, theirs.storage_data)


@pytest.mark.promise("an index with false offsets is refused before memory is reserved")
@pytest.mark.parametrize(
    ("index", "words"),
    [
        (index_of(WHOLE, file="../__0_0.distcp"), "names the file '../__0_0.distcp'"),
        (index_of(WHOLE, file="/etc/passwd"), "names the file '/etc/passwd'"),
        (index_of(WHOLE, file="x/__0_0.distcp"), "names the file"),
        (index_of(WHOLE, file="COMMIT.json"), "names the file"),
        (index_of(WHOLE, file="__0_0.distcp\n"), "names the file"),
        (index_of(WHOLE, transform=["zstd"]), "names the file"),
        (index_of([((0, 0), (4, 3), -5)]), "it counts -5 bytes"),
        (index_of([((0, 0), (4, 3), 1 << 62)]), "it counts 4611686018427387904"),
        (index_of([((0, 0), (4, 3), 1 << 50)]), "a part ends at byte"),
        (index_of(WHOLE, extra=-1), "has 48 bytes and is stored in 47"),
        (index_of(WHOLE, extra=1 << 40), "has 48 bytes and is stored in"),
        (index_of([((0, 0), (2, 3), 0), ((2, 0), (2, 3), 100)]), "two parts overlap in __0_0.distcp at byte 100"),
        (index_of([((0, 0), (5, 3), 0)]), "outside of (4, 3)"),
        (index_of([((3, 0), (4, 3), 0)]), "outside of (4, 3)"),
        (index_of([((0,), (4,), 0)]), "outside of (4, 3)"),
        (index_of([((0, 0), (1 << 40, 1 << 40), 0)], size=(1 << 40, 1 << 40)), "tensor of shape"),
        (index_of([((0, 0), (1 << 20, 1 << 20), 0)], size=(1 << 20, 1 << 20), extra=0), "a part ends at byte"),
        (index_of([], size=(4, 3)), "has no parts"),
        (Metadata({}, {"x": 1}, {}), "more than where tensors lie"),
        ([1, 2], "something else where a Metadata belongs"),
    ],
)
def test_index_that_lies_about_places_is_refused_before_anything_is_reserved(
    index: Any, words: str, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (checkpoint / ".metadata").write_bytes(pickle.dumps(index))
    commit_again(checkpoint)
    refused(checkpoint, ".metadata is no index of a state", words, capsys=capsys)


def test_index_of_a_tensor_of_another_type_is_refused() -> None:
    index = index_of(WHOLE)
    index.state_dict_metadata["w"].properties.requires_grad = True  # type: ignore[union-attr]
    with pytest.raises(IndexProblem, match="no plain float32 tensor"):
        read_index(pickle.dumps(index))


# Parts of tensors that are programs, or larger than they look.


def replace_first_part(checkpoint: Path, name: str, make: Callable[[bytes], bytes]) -> None:
    """Puts other bytes where the only part of a tensor is stored, at the end of the file, and says so in the index."""
    data = (checkpoint / ".metadata").read_bytes()
    index = pickle.loads(data)
    key = next(key for key in index.storage_data if key.fqn == name)
    info = index.storage_data[key]
    file = checkpoint / info.relative_path
    stored = file.read_bytes()
    part = make(stored[info.offset : info.offset + info.length])
    index.storage_data[key] = _StorageInfo(info.relative_path, len(stored), len(part))
    file.write_bytes(stored + part)
    (checkpoint / ".metadata").write_bytes(pickle.dumps(index))
    commit_again(checkpoint)


def saved(value: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    return buffer.getvalue()


def padded(data: bytes, like: bytes) -> bytes:
    return data + bytes(max(0, len(like) - len(data)))


def compressed(part: bytes) -> bytes:
    """The same archive with the same tensor, compressed: torch would take it, and could be made to unpack anything."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(part)) as old, zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as new:
        for member in old.infolist():
            new.writestr(member.filename, old.read(member))
    assert torch.equal(torch.load(io.BytesIO(buffer.getvalue()), weights_only=True), torch.ones(32))
    return buffer.getvalue()


@pytest.mark.promise("a stored part that is a program or unpacks to more than its size is refused")
@pytest.mark.parametrize(
    "make",
    [
        lambda canary: lambda part: padded(saved(Calls(os.system, f"touch {canary}")), part),
        lambda canary: lambda part: padded(pickle.dumps(Calls(os.system, f"touch {canary}")), part),
        lambda canary: (
            lambda part: padded(saved(Calls(os.system, f"touch {canary}"), _use_new_zipfile_serialization=False), part)
        ),
        lambda canary: lambda part: saved(torch.ones(3, 5)),
        lambda canary: lambda part: saved({"a": torch.ones(270, 32)}),
        lambda canary: lambda part: b"x" + part,
        lambda canary: compressed,
        lambda canary: lambda part: bytes(len(part)),
        lambda canary: lambda part: part[: len(part) // 2] + bytes(len(part) - len(part) // 2),
    ],
    ids=["call", "bare", "old format", "shape", "dict", "prefix", "bomb", "zeros", "half"],
)
def test_part_that_is_no_plain_tensor_is_refused_and_runs_nothing(
    make: Any, checkpoint: Path, canary: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    replace_first_part(checkpoint, "model.norm.weight", make(canary))
    refused(checkpoint, capsys=capsys)


def test_same_part_at_another_place_is_read(checkpoint: Path) -> None:
    """What the tests above change is what makes them fail."""
    replace_first_part(checkpoint, "model.norm.weight", lambda part: part)
    found = torch.zeros(32)
    StateReader(checkpoint).read([Piece(name="model.norm.weight", shape=(32,), offsets=(0,), data=found)])
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
@pytest.mark.parametrize("name", ["state.json", ".metadata", "__0_0.distcp", "tokenizer/tokenizer.json", "COMMIT.json"])
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


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp"])
def test_state_reader_follows_no_link_even_alone(name: str, checkpoint: Path, tmp_path: Path) -> None:
    (checkpoint / name).rename(tmp_path / "elsewhere")
    (checkpoint / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointIntegrityError, match="is a link"):
        StateReader(checkpoint)


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
    refused(checkpoint, "COMMIT.json is not canonical JSON", capsys=capsys)


def change_json(path: Path, key: str, value: Any) -> None:
    document = json.loads(path.read_bytes())
    section, _, name = key.rpartition(".")
    (document[section] if section else document)[name] = value
    path.write_text(json.dumps(document))


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
        ("model.rope_theta", math.nan, "model.rope_theta is nan"),
        ("model.norm_eps", math.inf, "model.norm_eps is inf"),
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
        ("model", [], "model.json lacks or misstates"),
        ("tokenizer_digest", "0" * 64, "model.json says"),
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
    refused(checkpoint, f"{name} lacks or misstates a field", capsys=capsys)


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
    refused(checkpoint, "state.json lacks or misstates a field", capsys=capsys)


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
    refused(checkpoint, "the tokenizer is damaged", capsys=capsys)
