from __future__ import annotations

import dataclasses
import errno
import io
import json
import os
import pickle
import shutil
import subprocess
import threading

import pytest
import torch

from megamask.engine.state import read_canonical_weights
from megamask.engine.torch_dist import Piece, StateReader
from megamask.errors import CheckpointIntegrityError, StorageError
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
        == [".metadata", "__0_0.distcp", "optimizer.json"]
        == sorted(path.name for path in tmp_path.iterdir())
    )
    return tmp_path, engine


def test_training_goes_on_bit_for_bit_after_save_and_load(saved, build):
    """Whichever Adam the backend chose: its moments and its step count come back."""
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
            StateReader(path).read([Piece(name=name, shape=shape, offsets=(0,) * len(shape), data=tensor)])
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
    memory = engine._host_memory._buffer
    assert memory.numel() == 3 * sum(weights.numel() for weights in engine._rank_model.network.parameters())
    before = memory.clone()
    cases.take_step(engine, 1)
    assert torch.equal(memory, before)
    engine.state_share(copy=True)
    assert engine._host_memory._buffer is memory
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
    assert not (folder / ".metadata").exists()


def test_state_before_the_first_step_is_whole(build, tmp_path):
    cases.save_state(build(PLAIN), tmp_path)
    for name, weight in read_canonical_weights(tmp_path, PLAIN).items():
        assert torch.equal(weight, initial_tensor(cases.SEED, name, PLAIN)), name
    engine = build(PLAIN)
    engine.load_state(tmp_path)
    assert engine._optimizer.num_updates == 0


def test_stored_tensors_are_the_canonical_ones_and_adams_moments(saved):
    folder, _ = saved
    stored = StateReader(folder)._metadata.state_dict_metadata
    shapes = canonical_shapes(OPTIONS)
    expected = {prefix + name for name in shapes for prefix in ("", "optimizer.exp_avg.", "optimizer.exp_avg_sq.")}
    assert set(stored) == expected
    for name, shape in shapes.items():
        assert tuple(stored[name].size) == shape
    moment = torch.empty(shapes["model.norm.weight"])
    StateReader(folder).read(
        [Piece(name="optimizer.exp_avg_sq.model.norm.weight", shape=(32,), offsets=(0,), data=moment)]
    )
    assert (moment > 0).all()


def test_a_rectangle_of_a_stored_tensor_can_be_read_alone(saved):
    folder, _ = saved
    name = "model.layers.1.self_attn.q_proj.weight"
    whole = read_canonical_weights(folder, OPTIONS)[name]
    part = torch.empty(11, 5)
    StateReader(folder).read([Piece(name=name, shape=tuple(whole.shape), offsets=(13, 7), data=part)])
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
    before = (folder / "__0_0.distcp").read_bytes()
    cases.take_step(engine, 3)
    with pytest.raises(RuntimeError, match="already exists"):
        cases.save_state(engine, folder)
    assert (folder / "__0_0.distcp").read_bytes() == before


class Evil:
    def __reduce__(self):
        return os.system, ("touch was-executed",)


@pytest.mark.promise("a checkpoint's pickle cannot call any function")
@pytest.mark.parametrize("path", ["load_state", "read_canonical_weights"])
def test_a_pickle_that_calls_functions_is_refused_and_not_run(saved, path, monkeypatch):
    folder, engine = saved
    monkeypatch.chdir(folder)
    (folder / ".metadata").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(CheckpointIntegrityError, match=r"names posix\.system"):
        engine.load_state(folder) if path == "load_state" else read_canonical_weights(folder, OPTIONS)
    assert not (folder / "was-executed").exists()


def test_an_index_that_points_outside_the_folder_is_refused(saved):
    folder, _ = saved
    data = (folder / ".metadata").read_bytes()
    name = b"__0_0.distcp"
    (folder / ".metadata").write_bytes(data.replace(name, b"../../../abc"))
    with pytest.raises(CheckpointIntegrityError, match=r"'\.\./\.\./\.\./abc'"):
        StateReader(folder)


def cut(path, length):
    path.write_bytes(path.read_bytes()[:length])


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / ".metadata").unlink(),
        lambda folder: cut(folder / ".metadata", 100),
        lambda folder: (folder / ".metadata").write_bytes(pickle.dumps([1, 2])),
        lambda folder: (folder / "__0_0.distcp").unlink(),
        lambda folder: cut(folder / "__0_0.distcp", 3000),
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
@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "optimizer.json"])
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


def test_torchs_own_loader_reads_the_state(saved):
    """What docs/formats.md promises to a stranger."""
    folder, _ = saved
    name = "model.layers.0.mlp.down_proj.weight"
    found = {name: torch.empty(canonical_shapes(OPTIONS)[name])}
    torch.distributed.checkpoint.load(found, checkpoint_id=folder, no_dist=True)
    assert torch.equal(found[name], read_canonical_weights(folder, OPTIONS)[name])
