from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import megamask.engine  # noqa: F401 - readies torch
from megamask.engine import cpu_backend


def test_cuda_literals_make_cpu_tensors():
    made = [
        torch.zeros(2, device="cuda"),
        torch.tensor([1.0], device=torch.device("cuda", 0)),
        torch.empty(1, device=torch.cuda.current_device()),
        torch.ones(2).cuda(),
    ]
    assert all(tensor.device.type == "cpu" for tensor in made)
    assert made[1].tolist() == [1.0]


def test_other_devices_are_left_alone():
    assert torch.zeros(2, device="meta").device.type == "meta"
    with torch.device("meta"):
        assert torch.ones(2).device.type == "meta"


def test_the_cuda_generator_is_the_default_one():
    torch.manual_seed(5)
    state = torch.cuda.get_rng_state()
    first = torch.rand(3)
    torch.cuda.set_rng_state(state)
    assert torch.equal(torch.rand(3), first)
    torch.cuda.manual_seed(7)
    one = torch.rand(3)
    torch.manual_seed(7)
    assert torch.equal(torch.rand(3), one)


def test_tensor_types_are_named_as_ever_outside_megatron():
    assert torch.zeros(1).type() == "torch.FloatTensor"
    assert torch.zeros(1).type(torch.float64).dtype == torch.float64
    scope = {"__name__": "megatron.core.optimizer.clip_grads"}
    exec("def ask(tensor): return tensor.type()", scope)
    assert scope["ask"](torch.zeros(1)) == "torch.cuda.FloatTensor"


def test_cuda_is_still_reported_missing():
    """Only megatron-core's literals are answered; no reader may come to believe in a device."""
    assert not torch.cuda.is_available()


def test_installing_twice_changes_nothing():
    before = torch.zeros
    cpu_backend.install()
    assert torch.zeros is before


@pytest.mark.promise("on a CPU megatron-core is imported without torch's compiler")
def test_fused_functions_are_left_uncompiled_and_torch_keeps_its_compiler():
    from megatron.core.fusions import fused_bias_swiglu

    assert not hasattr(fused_bias_swiglu.swiglu, "_torchdynamo_orig_callable")
    assert torch.compile.__module__ == "torch"


@pytest.mark.promise("a command that can refuse does not wait for megatron-core's import")
@pytest.mark.multiprocess
def test_commands_do_not_wait_for_megatron_core_before_they_need_it():
    """The import takes seconds; what can be refused before is refused at once, and some verbs never need it."""
    script = """
import sys
import megamask.engine.state.restore
import megamask_pipelines.evaluate, megamask_pipelines.pretrain, megamask_pipelines.sample
sys.exit("megatron.core" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
