"""Run Transformer Engine's own Python on CPU tensors: only its CUDA kernels and its questions about a device change.

Modules, autograd functions, recipes, quantizers, FP8 state and FusedAdam are the library's. `install` comes before the
first import of megatron-core, and only once in a process.
"""

from __future__ import annotations

import os
import sys
import types
from typing import Any

import graphs
import torch

CALLS: dict[str, int] = {}
"""Calls of each substituted kernel so far."""

_CACHED_QUESTIONS = (
    "get_device_compute_capability",
    "_get_device_compute_capability",
    "is_non_tn_fp8_gemm_supported",
    "check_fp8_support",
    "check_fp8_block_scaling_support",
    "check_mxfp8_support",
)
_CACHED_ANSWERS = ("_FP8_SUPPORT", "_MXFP8_SUPPORT", "_NVFP4_SUPPORT", "_FP8_BLOCK_SCALING_SUPPORT")


def pretend_device(capability: tuple[int, int]) -> None:
    """Make torch and Transformer Engine see a GPU of this compute capability, and forget earlier answers."""
    properties = types.SimpleNamespace(
        major=capability[0],
        minor=capability[1],
        multi_processor_count=132,
        total_memory=80 << 30,
        name="pretended GPU",
        uuid="GPU-0",
        L2_cache_size=50 << 20,
    )
    torch.cuda.is_available = lambda: True
    torch.cuda.device_count = lambda: 1
    torch.cuda.get_device_capability = lambda *a, **k: capability
    torch.cuda.get_device_properties = lambda *a, **k: properties
    torch.cuda.get_device_name = lambda *a, **k: properties.name
    torch.cuda.is_bf16_supported = lambda *a, **k: True
    for name, module in list(sys.modules.items()):
        if name.startswith("transformer_engine"):
            for question in _CACHED_QUESTIONS:
                getattr(getattr(module, question, None), "cache_clear", lambda: None)()
            for answer in _CACHED_ANSWERS:
                if hasattr(module, answer):
                    setattr(module, answer, None)


def install() -> None:
    """Substitute the kernels, pretend a Hopper GPU, and make the engine choose the library's layers on the CPU."""
    os.environ.setdefault("NVTE_FRAMEWORK", "pytorch")
    from megamask.engine import cpu_backend

    cpu_backend.install()
    import transformer_engine.pytorch  # noqa: F401  while no device is pretended: nothing is compiled
    import transformer_engine_torch

    pretend_device((9, 0))
    _substitute_kernels(transformer_engine_torch)
    graphs.install()
    torch.Tensor.is_cuda = property(lambda self: True)  # the library refuses other inputs
    _keep_engine_on_cpu()


def is_installed() -> bool:
    """Return True if `install` was called in this process."""
    return "kernels" in sys.modules and bool(sys.modules["kernels"].ORIGINAL)


def _substitute_kernels(library: Any) -> None:
    import kernels

    for name in dir(kernels):
        if name.startswith("k_"):
            kernel = name[2:]
            if not hasattr(library, kernel):
                raise SystemExit(f"this version of Transformer Engine has no kernel {kernel}")
            original = kernels.ORIGINAL[kernel] = getattr(library, kernel)
            substitute = _counted(getattr(kernels, name), kernel)
            for module_name, module in list(sys.modules.items()):  # modules import kernels by name
                if module_name.startswith("transformer_engine") and getattr(module, kernel, None) is original:
                    setattr(module, kernel, substitute)


def _counted(function: Any, kernel: str) -> Any:
    def call(*args: Any, **options: Any) -> Any:
        CALLS[kernel] = CALLS.get(kernel, 0) + 1
        return function(*args, **options)

    return call


def _keep_engine_on_cpu() -> None:
    """Tensors on the CPU and gloo, with the Adam that a machine with a GPU would choose."""
    from megamask.engine import probes

    # before the engine's first import, which takes the function from there
    probes.missing_compiler = lambda: "the GPU is pretended"
    from megamask.engine import backend, engine
    from megamask.engine.specs import families

    made = backend.Backend(
        name="cpu", device=torch.device("cpu"), collectives="gloo", adam=backend._choose_kernels(has_cuda=True)
    )
    backend.select_backend = engine.select_backend = lambda *a, **k: made
    families.check_transformer_engine = lambda *arguments, **options: None
