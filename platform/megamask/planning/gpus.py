"""Memory, peak rates and links of GPUs, from the vendor's data sheets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from megamask.errors import UsageError

_GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One GPU and its links.

    Args:
        memory_bytes: that a process can allocate, what the driver reports.
        fp32_flops, bf16_flops, fp8_flops: dense peak of matrix products, per second; fp32 without TF32; fp8_flops is
            None where there is no such unit.
        memory_bandwidth: bytes per second of its own memory.
        node_bandwidth: bytes per second to a GPU of the same node, one direction.
        network_bandwidth: bytes per second to another node, one direction, one adapter a GPU.
        architecture: compute capability.
        per_node: GPUs of a node.
    """

    memory_bytes: int
    fp32_flops: float
    bf16_flops: float
    fp8_flops: float | None
    memory_bandwidth: float
    node_bandwidth: float
    network_bandwidth: float
    architecture: tuple[int, int]
    per_node: int = 8


# NVIDIA's data sheets, dense rates (half of those "with sparsity"); memory as torch reports it, adapters of the
# vendor's reference systems (HDR for A100, NDR for the others).
GPUS: Mapping[str, Gpu] = MappingProxyType(
    {
        "a100": Gpu(
            memory_bytes=int(79.1 * _GIB),
            fp32_flops=19.5e12,
            bf16_flops=312e12,
            fp8_flops=None,
            memory_bandwidth=2.04e12,
            node_bandwidth=300e9,
            network_bandwidth=25e9,
            architecture=(8, 0),
        ),
        "h100": Gpu(
            memory_bytes=int(79.1 * _GIB),
            fp32_flops=67e12,
            bf16_flops=989e12,
            fp8_flops=1979e12,
            memory_bandwidth=3.35e12,
            node_bandwidth=450e9,
            network_bandwidth=50e9,
            architecture=(9, 0),
        ),
        "h200": Gpu(
            memory_bytes=int(139.8 * _GIB),
            fp32_flops=67e12,
            bf16_flops=989e12,
            fp8_flops=1979e12,
            memory_bandwidth=4.8e12,
            node_bandwidth=450e9,
            network_bandwidth=50e9,
            architecture=(9, 0),
        ),
        "b200": Gpu(
            memory_bytes=int(178.3 * _GIB),
            fp32_flops=75e12,
            bf16_flops=2250e12,
            fp8_flops=4500e12,
            memory_bandwidth=7.7e12,
            node_bandwidth=900e9,
            network_bandwidth=50e9,
            architecture=(10, 0),
        ),
    }
)


def gpu_named(name: str) -> Gpu:
    """The GPU of that name.

    Raises:
        UsageError: no such GPU in the table.
    """
    try:
        return GPUS[name.lower()]
    except KeyError:
        raise UsageError(
            f"--gpu {name}: not in the table of GPUs; allowed: {', '.join(GPUS)}. Nothing was planned.",
            hint="the nearest one, with --assume for what differs",
        ) from None
