"""Differences between a GPU and a laptop in one object: device, collectives, and which Adam updates the weights.

Nothing else in the house asks which device it runs on, but for one kernel of operators.py.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import re
import sys
import warnings
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from megamask.engine import cpu_backend
from megamask.engine.probes import apex
from megamask.errors import UsageError

# A listening socket that rank 0 inherits from a local launcher: the store's port cannot be taken by another job.
STORE_DESCRIPTOR = "MEGAMASK_STORE_FD"
_log = logging.getLogger(__name__)
_TORCHRUN_JOB = "TORCHELASTIC_RUN_ID"  # set by torchrun, which shows each process all GPUs of the node

# Warnings of torch under megatron-core 0.16 about choices that are made here or are harmless: message, category.
_KNOWN_WARNINGS: tuple[tuple[str, type[Warning]], ...] = (
    ("Transformer Engine and Apex are not installed", UserWarning),
    ("Apex is not installed", UserWarning),
    ("full scope is deprecated. Use empty cuda_graph_scope", UserWarning),  # from its own default
    # in float32 the optimizer's shards are views of the parameters; it sets their .grad itself
    ("The .grad attribute of a Tensor that is not a leaf Tensor is being accessed", UserWarning),
    # training.recompute=selective asks for it; Transformer Engine's attention is not the one that is recomputed
    ("If you are using transformer_engine as the transformer implementation, the core_attn", UserWarning),
    # experts that no tensor-parallel ranks share, in a layout whose other matrices are shared
    ("`sequence_parallel` is set to `True`, but tensor model parallel size is 1", UserWarning),
    ("`torch.distributed.reduce_scatter_tensor` is deprecated", FutureWarning),
    ("`torch.distributed.all_gather_into_tensor` is deprecated", FutureWarning),
    ("`torch.distributed._reduce_scatter_base` is deprecated", FutureWarning),
    ("`torch.distributed._all_gather_base` is deprecated", FutureWarning),
)


def prepare_torch() -> None:
    """Readies torch for the first import of megatron-core; called by the package itself."""
    for message, category in _KNOWN_WARNINGS:
        warnings.filterwarnings("ignore", message=re.escape(message), category=category)
    # tensor parallelism overlaps a matrix product with a collective only if the device runs them in the order asked for
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    if apex() == "unrelated":
        sys.modules["apex"] = None  # type: ignore[assignment]  # megatron-core takes any package of that name for NVIDIA's
    if not torch.cuda.is_available():
        logging.getLogger("torch.utils.cpp_extension").addFilter(_is_news)
        cpu_backend.install()


def _is_news(record: logging.LogRecord) -> bool:
    """False for what a torch that was built for CUDA logs on a machine without a GPU, where it finds a compiler."""
    return not record.getMessage().startswith("No CUDA runtime is found")


@dataclass(frozen=True, kw_only=True)
class Backend:
    """The machine under the engine.

    Args:
        name: "cuda" or "cpu".
        device: where tensors live.
        collectives: "nccl" or "gloo".
        adam: which implementation of Adam updates the weights.
    """

    name: str
    device: torch.device
    collectives: str
    adam: str

    def synchronize(self) -> None:
        """Wait until the device has done what it was asked, so that a clock can be read."""
        torch.cuda.synchronize()  # on the CPU answered by cpu_backend: nothing is pending

    def prepare_experts(self) -> None:
        """Readies megatron-core's dispatch of tokens to experts, before the first network with experts is built."""
        if self.device.type == "cpu":
            # gloo takes the sizes of an exchange as numbers; megatron-core makes them such only on their way from a GPU
            _replace("megatron.core.transformer.moe.token_dispatcher", maybe_move_tensor_to_cpu=_sizes_on_host)

    @property
    def pins_batches(self) -> bool:
        """True where batches are read into pinned memory: a device that computes on host memory gains nothing by it."""
        return self.device.type == "cuda"

    def pin(self, memory: torch.Tensor) -> None:
        """Lock host memory so that the device copies to it at full speed; torch's own way takes a power of two of it.

        Where the system refuses, copying is only slower.
        """
        if self.device.type == "cpu":
            return
        runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        if (code := int(runtime.cudaHostRegister(memory.data_ptr(), memory.nbytes, 0))) != 0:
            with contextlib.suppress(RuntimeError):  # CUDA keeps the code, and the next kernel would be blamed for it
                torch.ones(1, device=self.device)
            _log.warning("%d bytes of host memory cannot be pinned (CUDA error %d)", memory.nbytes, code)
            return
        weakref.finalize(memory, runtime.cudaHostUnregister, memory.data_ptr())


def select_device(environment: Mapping[str, str] = os.environ) -> torch.device:
    """The device of this process; with several on a node, LOCAL_RANK of the launcher's environment picks one.

    A scheduler may show each of its tasks only a GPU of the task's own; then that one is used, regardless of
    LOCAL_RANK. `init_process_group` refuses two processes that were shown the same one.

    Raises:
        UsageError: the node has fewer GPUs than processes.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    local_rank = int(environment.get("LOCAL_RANK", "0"))
    if has_gpu_of_its_own(environment):
        return torch.device("cuda", 0)
    needed = max(local_rank + 1, int(environment.get("LOCAL_WORLD_SIZE", "1")))
    if needed > torch.cuda.device_count():
        raise UsageError(
            f"{needed} processes on this node need a GPU each, but it shows {torch.cuda.device_count()}. "
            "Nothing was started.",
            hint="start fewer processes on the node, or hide its GPUs (CUDA_VISIBLE_DEVICES=) to train on the CPU",
        )
    return torch.device("cuda", local_rank)


def has_gpu_of_its_own(environment: Mapping[str, str]) -> bool:
    """Return whether a scheduler may have given this process its GPU: node launchers show every process all GPUs."""
    is_launched = STORE_DESCRIPTOR in environment or _TORCHRUN_JOB in environment
    return torch.cuda.device_count() == 1 and not is_launched


def select_backend(environment: Mapping[str, str] = os.environ, *, deterministic: bool = True) -> Backend:
    """Choose the backend of this process and prepare megatron-core for it.

    Args:
        deterministic: device.deterministic.

    Raises:
        UsageError: the environment asks for another attention than the engine's.
    """
    _check_attention_variables(environment)
    device = select_device(environment)
    if device.type == "cpu":
        return Backend(name="cpu", device=device, collectives="gloo", adam=_choose_kernels(has_cuda=False))
    torch.cuda.set_device(device)
    if deterministic:
        # the same layout must give the same bits again: after a restart, and when a run is recomputed
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        os.environ.setdefault("NCCL_ALGO", "Ring")  # of NCCL's algorithms the one whose order of sums is fixed
        os.environ["NVTE_ALLOW_NONDETERMINISTIC_ALGO"] = "0"  # megatron-core builds the library's attention only then
        torch.use_deterministic_algorithms(True)
        # By default torch then fills every new tensor with NaN, which changes no bit of a program that writes before it
        # reads, and costs a pass over memory for each. tests/gpu keeps it on to find reads of unwritten memory.
        setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)  # noqa: B010 - typed as a property
    return Backend(name="cuda", device=device, collectives="nccl", adam=_choose_kernels(has_cuda=True))


# Set to "1" by megatron-core itself, which stops with an assertion where a user has set them otherwise.
_ATTENTION_VARIABLES = ("NVTE_FLASH_ATTN", "NVTE_FUSED_ATTN", "NVTE_UNFUSED_ATTN")


def _check_attention_variables(environment: Mapping[str, str]) -> None:
    for name in _ATTENTION_VARIABLES:
        if environment.get(name, "1") != "1":
            raise UsageError(
                f"{name} is {environment[name]!r} in the environment; allowed: unset. The engine computes attention "
                "with its own module, so the variable would have no effect. Nothing was started.",
                hint=f"unset {name}",
            )


def _choose_kernels(*, has_cuda: bool) -> str:
    """Return the name of the Adam in use: FusedAdam where it is installed and can run, otherwise megamask's.

    Where Transformer Engine is installed and no device is visible, its kernels for norms and scales cannot run either:
    megatron-core's own take their place.
    """
    optimizer = importlib.import_module("megatron.core.optimizer")
    adam = importlib.import_module("megamask.engine.adam").Adam
    if optimizer.Adam is not adam and has_cuda and not optimizer.USING_PYTORCH_OPTIMIZER:
        return f"{optimizer.Adam.__module__}.{optimizer.Adam.__name__}"
    _replace(
        "megatron.core.optimizer",
        Adam=adam,
        USING_PYTORCH_OPTIMIZER=False,
    )
    # under these names megatron-core keeps "step" per group, as FusedAdam does
    _replace(
        "megatron.core.optimizer.distrib_optimizer",
        Adam=adam,
        HAVE_APEX_OR_TE=True,
        USING_APEX_OPTIMIZER=True,
        USING_TE_OPTIMIZER=False,
    )
    if not has_cuda:
        local = importlib.import_module("megatron.core.utils")
        kernels = {
            "multi_tensor_applier": local.local_multi_tensor_applier,
            "multi_tensor_scale_impl": local.local_multi_tensor_scale,
        }
        _replace("megatron.core.optimizer.optimizer", **kernels)
        _replace("megatron.core.optimizer.clip_grads", l2_norm_impl=local.local_multi_tensor_l2_norm, **kernels)
    return f"{adam.__module__}.{adam.__name__}"


def _sizes_on_host(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    return tensor.numpy() if as_numpy and isinstance(tensor, torch.Tensor) else tensor


def _replace(module: str, **values: Any) -> None:
    found = importlib.import_module(module)
    for name, value in values.items():
        setattr(found, name, value)
