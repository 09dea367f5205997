from __future__ import annotations

import importlib
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megamask.engine import backend, process_group
from megamask.errors import UsageError
from support import engine_cases as cases
from support.gloo import run_gloo

SILENT_JOB = """
import torch
from megamask.engine.backend import select_backend
from megamask.engine.process_group import init_process_group, destroy_process_group
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
            process_group.init_process_group(chosen, environment)
        assert listening.getsockname()[1] > 0  # still open: it is not ours to close


@pytest.mark.parametrize(("name", "pins"), [("cpu", False), ("cuda", True)])
def test_batches_are_pinned_for_a_cuda_device_alone(name, pins):
    assert backend.Backend(name=name, device=torch.device(name), collectives="", adam="").pins_batches is pins


def test_our_adam_stands_in_for_fused_adam_where_that_is_missing():
    assert backend.select_backend().adam == "megamask.engine.adam.Adam"
    distributed = importlib.import_module("megatron.core.optimizer.distrib_optimizer")
    assert distributed.Adam.__module__ == "megamask.engine.adam"
    assert distributed.HAVE_APEX_OR_TE and not distributed.USING_TE_OPTIMIZER


@pytest.mark.parametrize(("has_cuda", "expected"), [(True, "fused.FusedAdam"), (False, "megamask.engine.adam.Adam")])
def test_fused_adam_is_chosen_where_it_is_installed_and_a_device_is_there(monkeypatch, has_cuda, expected):
    for name in ("megatron.core.optimizer", "megatron.core.optimizer.distrib_optimizer"):
        module = importlib.import_module(name)
        for attribute in (
            "Adam",
            "USING_PYTORCH_OPTIMIZER",
            "HAVE_APEX_OR_TE",
            "USING_APEX_OPTIMIZER",
            "USING_TE_OPTIMIZER",
        ):
            if hasattr(module, attribute):
                monkeypatch.setattr(module, attribute, getattr(module, attribute))
    optimizer = importlib.import_module("megatron.core.optimizer")
    monkeypatch.setattr(optimizer, "Adam", type("FusedAdam", (), {"__module__": "fused"}))
    monkeypatch.setattr(optimizer, "USING_PYTORCH_OPTIMIZER", False)
    assert backend._choose_kernels(has_cuda=has_cuda) == expected


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
    process_group._claim_gpu(store, "GPU-1")
    process_group._claim_gpu(store, "GPU-2")
    with pytest.raises(UsageError, match=r"another process of this job already uses the GPU GPU-1") as error:
        process_group._claim_gpu(store, "GPU-1")
    assert "--gpus-per-task=1" in error.value.hint


def test_each_local_rank_takes_its_own_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    environment = {"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    assert backend.select_device(environment) == torch.device("cuda", 1)


LIBRARY_WITHOUT_A_DEVICE = """
import sys
sys.path[:0] = [{stand_in!r}, {tests!r}]
from megamask.engine.backend import select_backend
from megamask.engine.process_group import init_process_group
chosen = select_backend()
init_process_group(chosen)
import transformer_engine
from megatron.core.optimizer import distrib_optimizer
assert transformer_engine.__version__ == "2.20.2" and distrib_optimizer.USING_TE_OPTIMIZER is False
from support import engine_cases as cases
engine = cases.make_engine(clip_grad_norm=0.01)
reports = [cases.report_fields(cases.take_step(engine, step)) for step in (1, 2)]
print(chosen.adam, reports[0]["loss"], reports[1]["loss"], reports[1]["grad_norm"])
"""


@pytest.mark.multiprocess
@pytest.mark.promise(
    "where Transformer Engine is installed and no GPU is visible, training runs on the CPU, bits unchanged"
)
def test_transformer_engine_without_a_device_is_not_used(build):
    tests = Path(__file__).parents[1]
    source = LIBRARY_WITHOUT_A_DEVICE.format(stand_in=str(tests / "support" / "te_stand_in"), tests=str(tests))
    environment = {"PATH": "", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    engine = build(clip_grad_norm=0.01)
    reports = [cases.report_fields(cases.take_step(engine, step)) for step in (1, 2)]
    assert done.stdout.split() == [
        "megamask.engine.adam.Adam",
        *map(str, (reports[0]["loss"], reports[1]["loss"], reports[1]["grad_norm"])),
    ]


@pytest.mark.promise(
    "a variable that chooses another attention for Transformer Engine is refused before anything starts"
)
@pytest.mark.parametrize("name", ["NVTE_FLASH_ATTN", "NVTE_FUSED_ATTN", "NVTE_UNFUSED_ATTN"])
def test_variable_for_another_attention_is_refused(name):
    with pytest.raises(UsageError, match=f"{name} is '0'") as error:
        backend.select_backend({name: "0"})
    assert error.value.hint == f"unset {name}"
    assert backend.select_backend({name: "1"}).name == "cpu"  # as megatron-core leaves it behind


@pytest.mark.parametrize("deterministic", [True, False])
def test_deterministic_kernels_are_asked_for_on_a_gpu_without_filling_memory(monkeypatch, deterministic):
    asked = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "use_deterministic_algorithms", asked.append)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    monkeypatch.setattr(backend, "_choose_kernels", lambda *, has_cuda: "adam")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    monkeypatch.setenv("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "1")
    monkeypatch.delenv("NCCL_ALGO", raising=False)
    assert backend.select_backend({}, deterministic=deterministic).name == "cuda"
    # megatron-core refuses to build Transformer Engine's attention otherwise
    assert os.environ["NVTE_ALLOW_NONDETERMINISTIC_ALGO"] == ("0" if deterministic else "1")
    assert os.environ.get("NCCL_ALGO") == ("Ring" if deterministic else None)
    assert asked == ([True] if deterministic else [])
    assert torch.utils.deterministic.fill_uninitialized_memory is not deterministic
    monkeypatch.undo()
    os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)
    os.environ.pop("NCCL_ALGO", None)
