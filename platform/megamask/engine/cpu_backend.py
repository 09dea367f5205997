"""Lets megatron-core 0.16 run on CPU tensors and gloo by answering its `torch.cuda` calls.

megatron-core names the CUDA device in literals. `install` runs before its first import and patches torch, never
megatron-core's files. Nothing here computes: each patch only declares "that device is the CPU", "that stream is idle"
or "that generator is the default one". Where a CUDA device exists this module is not used at all.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.abc
import importlib.util
import logging
import sys
from collections.abc import Callable, Iterator
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch
from torch.utils._device import _device_constructors

CPU = torch.device("cpu")

# Constructors that megatron-core calls with device="cuda".
_CONSTRUCTORS = ("tensor", "zeros", "ones", "empty", "full", "arange", "zeros_like", "ones_like", "empty_like")

_STATE = {"installed": False}


class _IdleStream:
    """Stand-in for a stream and for an event: everything has already happened."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __enter__(self) -> _IdleStream:
        return self

    def __exit__(self, *exception: object) -> None:
        return None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _IdleStream)

    def __hash__(self) -> int:
        return 0

    def query(self) -> bool:
        """Return whether the work is done: always."""
        return True

    def _nothing(self, *args: Any, **kwargs: Any) -> _IdleStream:
        return self

    wait_stream = wait_event = record_event = record = wait = synchronize = _nothing


class _DefaultGenerators:
    """Stand-in for torch.cuda.default_generators: device i's generator is the CPU's."""

    def __getitem__(self, index: int) -> torch.Generator:
        return torch.default_generator

    def __len__(self) -> int:
        return 1


def install() -> None:
    """Patch torch once per process; must run before the first `import megatron.core`."""
    if _STATE["installed"]:
        return
    if any(name.startswith("megatron.core") for name in sys.modules):
        raise RuntimeError("megatron.core was imported before the CPU backend was installed")
    _STATE["installed"] = True
    _device_constructors()  # fills its cache with the originals, or `with torch.device("meta")` would build on the CPU
    _patch_device_queries()
    _patch_generators()
    _patch_constructors()
    _patch_tensors()
    sys.meta_path.insert(0, _WithoutCompiler())


def _constant(value: Any) -> Callable[..., Any]:
    def answer(*args: Any, **kwargs: Any) -> Any:
        return value

    return answer


def _patch_device_queries() -> None:
    stream = _IdleStream()
    answers = {
        "current_device": CPU,
        "set_device": None,
        "synchronize": None,
        "empty_cache": None,
        "current_stream": stream,
        "default_stream": stream,
        "set_stream": None,
        "_lazy_init": None,
        "is_current_stream_capturing": False,
        "device_count": 1,
    }
    for name, value in answers.items():
        setattr(torch.cuda, name, _constant(value))
    setattr(torch.cuda, "Stream", _IdleStream)  # noqa: B010 - mypy refuses the assignment to a class name
    setattr(torch.cuda, "Event", _IdleStream)  # noqa: B010
    setattr(torch.cuda, "stream", _null_context)  # noqa: B010
    setattr(torch.cuda, "device", _null_context)  # noqa: B010
    for name in ("range_push", "range_pop", "mark"):
        setattr(torch.cuda.nvtx, name, _constant(0))
    setattr(torch.cuda.nvtx, "range", _null_context)  # noqa: B010


@contextlib.contextmanager
def _null_context(*args: Any, **kwargs: Any) -> Iterator[None]:
    yield


def _patch_generators() -> None:
    """The "cuda" generator is the default CPU generator."""

    def get_rng_state(device: Any = "cuda") -> torch.Tensor:
        return torch.get_rng_state()

    def set_rng_state(state: torch.Tensor, device: Any = "cuda") -> None:
        torch.set_rng_state(state.cpu())

    def manual_seed(seed: int) -> None:
        torch.default_generator.manual_seed(int(seed))

    def lazy_call(function: Callable[[], Any], **kwargs: Any) -> Any:
        return function()

    for module in (torch.cuda, torch.cuda.random):
        setattr(module, "get_rng_state", get_rng_state)  # noqa: B010
        setattr(module, "set_rng_state", set_rng_state)  # noqa: B010
        setattr(module, "manual_seed", manual_seed)  # noqa: B010
        setattr(module, "manual_seed_all", _constant(None))  # noqa: B010 - torch.manual_seed() calls it
    setattr(torch.cuda, "default_generators", _DefaultGenerators())  # noqa: B010
    setattr(torch.cuda, "_lazy_call", lazy_call)  # noqa: B010
    # Leaving a fork warns that the CPU state moved inside it: here that is the point.
    logging.getLogger("megatron.core.tensor_parallel.random").addFilter(
        lambda record: "CPU RNG state changed" not in record.getMessage()
    )


def _is_cuda(device: Any) -> bool:
    return (isinstance(device, str) and device.startswith("cuda")) or (
        isinstance(device, torch.device) and device.type == "cuda"
    )


def _patch_constructors() -> None:
    def on_cpu(constructor: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        @functools.wraps(constructor)
        def construct(*args: Any, **kwargs: Any) -> torch.Tensor:
            if _is_cuda(kwargs.get("device")):
                kwargs["device"] = CPU
            return constructor(*args, **kwargs)

        return construct

    for name in _CONSTRUCTORS:
        setattr(torch, name, on_cpu(getattr(torch, name)))


def _patch_tensors() -> None:
    def same(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self

    setattr(torch.Tensor, "cuda", same)  # noqa: B010
    setattr(torch.nn.Module, "cuda", same)  # noqa: B010
    plain_type = torch.Tensor.type

    def type_as_on_cuda(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        # megatron.core.optimizer sorts parameters by the literal 'torch.cuda.FloatTensor'; no other caller may see it
        name = plain_type(self, *args, **kwargs)
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if args or kwargs or not caller.startswith("megatron.core.optimizer"):
            return name
        return "torch.cuda." + str(name).rsplit(".", 1)[1]

    setattr(torch.Tensor, "type", type_as_on_cuda)  # noqa: B010


class _WithoutCompiler(importlib.abc.MetaPathFinder):
    """Import hook of megatron-core, with torch.compile as a decorator that changes nothing.

    megatron-core decorates its fused functions when it is imported, which loads the compiler: more than a second
    of every start. The layers built here call none of them, and on a CPU each would ask for a C++ compiler.
    """

    def find_spec(self, name: str, path: object, target: object = None) -> ModuleSpec | None:
        """The spec that the other finders have for megatron.core; its module is then executed without the compiler."""
        if name != "megatron.core":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module
            setattr(spec.loader, "exec_module", functools.partial(_uncompiled, execute))  # noqa: B010
        return spec


def _uncompiled(execute: Callable[[ModuleType], None], module: ModuleType) -> None:
    def leave(function: Any = None, **options: Any) -> Any:
        return (lambda decorated: decorated) if function is None else function

    compiled = torch.compile
    setattr(torch, "compile", leave)  # noqa: B010
    try:
        execute(module)
    finally:
        setattr(torch, "compile", compiled)  # noqa: B010
