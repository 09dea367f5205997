from __future__ import annotations

import importlib
import socket
import subprocess
import sys

import pytest
import torch

from megamask.engine import backend
from megamask.errors import UsageError
from support.gloo import run_gloo

SILENT_JOB = """
import torch
from megamask.engine.backend import select_backend, init_process_group, destroy_process_group
chosen = select_backend()
init_process_group(chosen)
import megamask.engine.engine
tensor = torch.ones(3)
torch.distributed.all_reduce(tensor)
assert tensor.tolist() == [1, 1, 1] and torch.distributed.get_world_size() == 1
with torch.device("meta"):
    assert torch.empty(2).device.type == "meta"
assert chosen.name == "cpu" and chosen.collectives == "gloo"
destroy_process_group()
destroy_process_group()
"""


def meet() -> list[int]:
    """Called in each process of the job below."""
    ranks: list[int] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(ranks, torch.distributed.get_rank())
    return ranks


@pytest.mark.multiprocess
def test_one_process_needs_no_launcher_and_says_nothing():
    environment = {"PATH": "", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "TMPDIR": "/nowhere"}
    done = subprocess.run([sys.executable, "-c", SILENT_JOB], capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.multiprocess
def test_processes_meet_at_an_inherited_socket():
    assert run_gloo(2, __file__, "meet") == [[0, 1], [0, 1]]


@pytest.mark.parametrize("is_socket", [True, False])
def test_a_wrong_store_descriptor_is_refused(tmp_path, is_socket):
    chosen = backend.Backend(name="cpu", device=torch.device("cpu"), collectives="gloo", adam="")
    with socket.socket() as listening, (tmp_path / "file").open("w") as file:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        descriptor = listening.fileno() if is_socket else file.fileno()
        environment = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_PORT": "1", "MEGAMASK_STORE_FD": str(descriptor)}
        with pytest.raises(UsageError, match="MEGAMASK_STORE_FD"):
            backend.init_process_group(chosen, environment)
        assert listening.getsockname()[1] > 0  # still open: it is not ours to close


def test_our_adam_stands_in_for_fused_adam_where_that_is_missing():
    assert backend.select_backend().adam == "megamask.engine.adam.Adam"
    distributed = importlib.import_module("megatron.core.optimizer.distrib_optimizer")
    assert distributed.Adam.__module__ == "megamask.engine.adam"
    assert distributed.HAVE_APEX_OR_TE and not distributed.USING_TE_OPTIMIZER


@pytest.mark.parametrize(("has_cuda", "expected"), [(True, "fused.FusedAdam"), (False, "megamask.engine.adam.Adam")])
def test_fused_adam_is_chosen_where_it_is_installed_and_a_device_is_there(monkeypatch, has_cuda, expected):
    for name in ("megatron.core.optimizer", "megatron.core.optimizer.distrib_optimizer"):
        module = importlib.import_module(name)
        for attribute in ("Adam", "USING_PYTORCH_OPTIMIZER", "HAVE_APEX_OR_TE", "USING_APEX_OPTIMIZER"):
            if hasattr(module, attribute):
                monkeypatch.setattr(module, attribute, getattr(module, attribute))
    optimizer = importlib.import_module("megatron.core.optimizer")
    monkeypatch.setattr(optimizer, "Adam", type("FusedAdam", (), {"__module__": "fused"}))
    monkeypatch.setattr(optimizer, "USING_PYTORCH_OPTIMIZER", False)
    assert backend._choose_adam(has_cuda=has_cuda) == expected


@pytest.mark.parametrize("environment", [{"LOCAL_RANK": "2"}, {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "3"}])
def test_a_node_with_fewer_gpus_than_processes_is_refused_on_every_rank(monkeypatch, environment):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UsageError, match="3 processes on this node need a GPU each, but it shows 2"):
        backend.select_device(environment)


@pytest.mark.promise("a GPU assigned to one task is used; two processes on one GPU are refused")
@pytest.mark.parametrize("environment", [{"LOCAL_RANK": "3"}, {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "4"}, {}])
def test_the_single_gpu_that_a_scheduler_shows_its_task_is_taken(monkeypatch, environment):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert backend.select_device(environment) == torch.device("cuda", 0)


@pytest.mark.promise("a GPU assigned to one task is used; two processes on one GPU are refused")
@pytest.mark.parametrize("launcher", ["MEGAMASK_STORE_FD", "TORCHELASTIC_RUN_ID"])
def test_a_single_gpu_is_refused_to_several_processes_of_a_nodes_launcher(monkeypatch, launcher):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UsageError, match="2 processes on this node need a GPU each, but it shows 1"):
        backend.select_device({"LOCAL_RANK": "1", launcher: "3"})


@pytest.mark.promise("a GPU assigned to one task is used; two processes on one GPU are refused")
def test_one_gpu_is_refused_to_the_second_process_that_claims_it():
    store = torch.distributed.HashStore()
    backend._claim_gpu(store, "GPU-1")
    backend._claim_gpu(store, "GPU-2")
    with pytest.raises(UsageError, match=r"another process of this job already uses the GPU GPU-1") as error:
        backend._claim_gpu(store, "GPU-1")
    assert "--gpus-per-task=1" in error.value.hint


def test_each_local_rank_takes_its_own_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    environment = {"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    assert backend.select_device(environment) == torch.device("cuda", 1)
