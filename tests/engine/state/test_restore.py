from __future__ import annotations

import dataclasses
import errno
import io
import json
import os
import shutil
import subprocess
import threading

import pytest
import torch
from safetensors import safe_open

from megamask.engine.state.restore import read_canonical_weights
from megamask.engine.state.safetensors import StateReader
from megamask.engine.state.slices import StoredSlice, stored_shapes
from megamask.errors import CheckpointIntegrityError, StorageError, UsageError
from megamask.models.initial_weights import initial_tensor
from megamask.models.shapes import canonical_shapes
from support import engine_cases as cases
from support.engine_cases import OPTIONS, PLAIN


@pytest.fixture
def saved(build, tmp_path):
    """A folder with the state after two steps, and the engine that wrote it."""
    engine = build(OPTIONS)
    for step in (1, 2):
        cases.take_step(engine, step)
    names = cases.save_state(engine, tmp_path)
    assert (
        sorted(names)
        == ["optimizer.json", "state-00000.safetensors"]
        == sorted(path.name for path in tmp_path.iterdir())
    )
    return tmp_path, engine


def test_training_goes_on_bit_for_bit_after_save_and_load(saved, build):
    """For any Adam that the backend chose: its moments and its step count come back."""
    folder, engine = saved
    wanted = [cases.report_fields(cases.take_step(engine, step)) for step in (3, 4, 5)]
    digest, adam = engine.parameter_digest(), engine.backend.adam
    other = build(OPTIONS)
    cases.take_step(other, 9)  # something else is in there before
    other.load_state(folder)
    assert other._optimizer.num_updates == 2
    assert [cases.report_fields(cases.take_step(other, step)) for step in (3, 4, 5)] == wanted
    assert other.parameter_digest() == digest
    assert other.backend.adam == adam == "megamask.engine.adam.Adam"


@pytest.mark.promise("a checkpoint does not depend on which tensors decay")
def test_state_does_not_depend_on_which_tensors_decay(saved, build, tmp_path):
    folder, _ = saved
    other = build(OPTIONS, weight_decay_on_norms=True, weight_decay_on_embeddings=False)
    other.load_state(folder)
    again = tmp_path / "again"
    again.mkdir()
    cases.save_state(other, again)
    shapes = canonical_shapes(OPTIONS)
    for name in [prefix + name for name in shapes for prefix in ("", "optimizer.exp_avg.", "optimizer.exp_avg_sq.")]:
        shape = shapes[name.removeprefix("optimizer.exp_avg.").removeprefix("optimizer.exp_avg_sq.")]
        stored = [torch.full(shape, float("nan")) for _ in (folder, again)]
        for path, tensor in zip((folder, again), stored, strict=True):
            StateReader(path).read([StoredSlice(name=name, shape=shape, offsets=(0,) * len(shape), data=tensor)])
        assert torch.equal(*stored), name
    assert (again / "optimizer.json").read_bytes() == (folder / "optimizer.json").read_bytes()


def test_saving_changes_nothing(saved, build):
    _, engine = saved
    wanted = cases.report_fields(cases.take_step(engine, 3))
    other = build(OPTIONS)
    for step in (1, 2):
        cases.take_step(other, step)
    assert cases.report_fields(cases.take_step(other, 3)) == wanted


@pytest.mark.promise("a checkpoint written during training holds, bit for bit, the state of the step it names")
def test_copied_state_is_that_of_its_step_although_training_goes_on(saved, build, tmp_path_factory):
    folder, _ = saved
    engine = build(OPTIONS)
    for step in (1, 2):
        cases.take_step(engine, step)
    share = engine.state_share(copy=True)
    cases.take_step(engine, 3)
    later = tmp_path_factory.mktemp("later")
    cases.write_share(engine, share, later)
    for path in folder.iterdir():
        assert path.read_bytes() == (later / path.name).read_bytes(), path.name


@pytest.mark.promise("a rank copies only its own share, into memory that is reused")
def test_second_copy_takes_no_new_memory_and_no_more_than_this_rank_s_share(build):
    engine = build(PLAIN)
    engine.state_share(copy=True)
    memory = engine._host_copy._buffer
    assert memory.numel() == 3 * sum(weights.numel() for weights in engine._rank_model.network.parameters())
    before = memory.clone()
    cases.take_step(engine, 1)
    assert torch.equal(memory, before)
    engine.state_share(copy=True)
    assert engine._host_copy._buffer is memory
    assert not torch.equal(memory, before)


def test_writing_stops_between_two_tensors_when_it_is_called_off(saved, tmp_path_factory):
    _, engine = saved
    asked = []

    def gate():
        asked.append(1)
        if len(asked) == 3:
            raise InterruptedError("enough")

    folder = tmp_path_factory.mktemp("stopped")
    with pytest.raises(InterruptedError, match="enough"):
        engine.state_share(copy=False).write(folder, gate)
    with pytest.raises(CheckpointIntegrityError):
        StateReader(folder)


def test_state_before_the_first_step_is_whole(build, tmp_path):
    cases.save_state(build(PLAIN), tmp_path)
    for name, weight in read_canonical_weights(tmp_path, PLAIN).items():
        assert torch.equal(weight, initial_tensor(cases.SEED, name, PLAIN)), name
    engine = build(PLAIN)
    engine.load_state(tmp_path)
    assert engine._optimizer.num_updates == 0


def test_stored_tensors_are_the_canonical_ones_and_adams_moments(saved):
    folder, _ = saved
    stored = StateReader(folder).index
    shapes = canonical_shapes(OPTIONS)
    expected = {prefix + name for name in shapes for prefix in ("", "optimizer.exp_avg.", "optimizer.exp_avg_sq.")}
    assert set(stored) == expected
    assert {name: tensor.shape for name, tensor in stored.items()} == stored_shapes(OPTIONS)
    for name, shape in shapes.items():
        assert stored[name].shape == shape
    moment = torch.empty(shapes["model.norm.weight"])
    StateReader(folder).read(
        [StoredSlice(name="optimizer.exp_avg_sq.model.norm.weight", shape=(32,), offsets=(0,), data=moment)]
    )
    assert (moment > 0).all()


def test_a_rectangle_of_a_stored_tensor_can_be_read_alone(saved):
    folder, _ = saved
    name = "model.layers.1.self_attn.q_proj.weight"
    whole = read_canonical_weights(folder, OPTIONS)[name]
    part = torch.empty(11, 5)
    StateReader(folder).read([StoredSlice(name=name, shape=tuple(whole.shape), offsets=(13, 7), data=part)])
    assert torch.equal(part, whole[13:24, 7:12])


def test_saving_starts_no_process_and_no_thread(build, tmp_path, monkeypatch):
    engine = build(PLAIN)

    def forbidden(*args, **kwargs):
        raise AssertionError("the state is written in this thread of this process")

    monkeypatch.setattr(os, "fork", forbidden)
    monkeypatch.setattr(subprocess.Popen, "__init__", forbidden)
    monkeypatch.setattr(threading.Thread, "start", forbidden)
    cases.save_state(engine, tmp_path)


def test_files_do_not_name_the_folder_and_repeat_byte_for_byte(saved, tmp_path_factory):
    folder, engine = saved
    again = tmp_path_factory.mktemp("again")
    cases.save_state(engine, again)
    for path in folder.iterdir():
        assert path.read_bytes() == (again / path.name).read_bytes(), path.name
        assert str(folder).encode() not in path.read_bytes()


def test_an_older_state_in_the_folder_is_not_overwritten(saved):
    folder, engine = saved
    before = (folder / "state-00000.safetensors").read_bytes()
    cases.take_step(engine, 3)
    with pytest.raises(FileExistsError):
        cases.save_state(engine, folder)
    assert (folder / "state-00000.safetensors").read_bytes() == before


def cut(path, length):
    path.write_bytes(path.read_bytes()[:length])


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "state-00000.safetensors").unlink(),
        lambda folder: cut(folder / "state-00000.safetensors", 3000),
        lambda folder: (folder / "optimizer.json").unlink(),
        lambda folder: (folder / "optimizer.json").write_bytes(b"{"),
        lambda folder: (folder / "optimizer.json").write_text(
            json.dumps({"format": "megamask-optimizer", "version": 2, "num_updates": 2})
        ),
    ],
)
def test_a_damaged_state_is_refused(saved, damage):
    folder, engine = saved
    damage(folder)
    with pytest.raises(CheckpointIntegrityError):
        engine.load_state(folder)


@pytest.mark.promise("an unreadable storage ends with 74; no older checkpoint is used, none is pruned")
@pytest.mark.parametrize("name", ["state-00000.safetensors", "optimizer.json"])
def test_state_that_the_storage_does_not_let_be_read_is_not_called_damaged(saved, monkeypatch, name):
    folder, engine = saved

    def refusing(real):
        def opened(path, *arguments, **options):
            if str(path) == str(folder / name):
                raise OSError(errno.ESTALE, "Stale file handle")
            return real(path, *arguments, **options)

        return opened

    monkeypatch.setattr(io, "open", refusing(io.open))
    monkeypatch.setattr(os, "open", refusing(os.open))
    with pytest.raises(StorageError, match="stale"):
        engine.load_state(folder)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"num_layers": 3}, "has no tensor model.layers.2"),
        ({"ffn_hidden_size": 64}, r"\(48, 32\) there.*\(64, 32\) here"),
    ],
)
def test_the_state_of_another_network_is_refused(saved, change, reason):
    folder, _ = saved
    with pytest.raises(CheckpointIntegrityError, match=reason):
        read_canonical_weights(folder, dataclasses.replace(OPTIONS, **change))


def test_a_copied_folder_is_complete(saved, tmp_path_factory):
    folder, engine = saved
    copy = tmp_path_factory.mktemp("far") / "away"
    shutil.copytree(folder, copy)
    shutil.rmtree(folder)
    engine.load_state(copy)


def test_safetensors_own_reader_opens_the_file_and_finds_the_same_bits(saved):
    """An independent reader: the library accepts every header that is written here."""
    folder, _ = saved
    weights = read_canonical_weights(folder, OPTIONS)
    with safe_open(folder / "state-00000.safetensors", framework="pt") as file:
        keys = list(file.keys())
        for key in keys:
            place, piece = json.loads(file.metadata()[key]), file.get_tensor(key)
            if (name := key.rpartition("#")[0]) in weights:
                index = tuple(slice(at, at + size) for at, size in zip(place["offsets"], piece.shape, strict=True))
                assert torch.equal(weights[name][index], piece)
    assert len(keys) >= 3 * len(weights)


def test_state_of_version_0_1_0_is_refused_and_not_called_damaged(saved):
    folder, engine = saved
    (folder / "state-00000.safetensors").unlink()
    (folder / ".metadata").write_bytes(b"anything")
    for load in (lambda: engine.load_state(folder), lambda: read_canonical_weights(folder, OPTIONS)):
        with pytest.raises(UsageError, match=r"written by megamask 0\.1\.0"):
            load()
