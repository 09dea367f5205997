"""Rules between the numbers of a mixture of experts, and between them and a layout."""

from __future__ import annotations

from collections.abc import Iterator

from megamask.config.rules.layout import AxisSizes
from megamask.config.rules.problem import Problem, divisors, listed

ROUTER_SCORES = ("softmax", "sigmoid")
ROUTER_CHOICES = ("tokens", "experts")


def expert_problems(
    *,
    num_experts: int,
    topk: int,
    num_groups: int,
    topk_groups: int,
    choice: str,
    has_bias: bool,
    balance_weight: float,
) -> Iterator[Problem]:
    """Numbers of a router that contradict one another."""
    if topk > num_experts:
        yield Problem(
            key="model.router_topk",
            because=f"but model.num_experts is {num_experts}",
            allowed=f"1 to {num_experts} (nearest: {num_experts})",
        )
    if num_experts % num_groups != 0:
        yield Problem(
            key="model.router_groups",
            because=f"but model.num_experts is {num_experts}",
            allowed=listed(divisors(num_experts), num_groups),
        )
    elif topk_groups > num_groups:
        yield Problem(
            key="model.router_topk_groups",
            because=f"but model.router_groups is {num_groups}",
            allowed=f"1 to {num_groups} (nearest: {num_groups})",
        )
    elif topk % topk_groups != 0 or topk > topk_groups * (num_experts // num_groups):
        fits = [size for size in divisors(topk) if size <= num_groups and topk <= size * (num_experts // num_groups)]
        yield Problem(
            key="model.router_topk_groups",
            because=f"but model.router_topk is {topk} and a group has {num_experts // num_groups} experts",
            allowed=listed(fits, topk_groups) if fits else "none; change model.router_groups",
        )
    if choice == "experts":
        for key, is_set in (
            ("model.router_groups", num_groups > 1),
            ("model.router_expert_bias", has_bias),
            ("model.router_balance_weight", balance_weight > 0),
        ):
            if is_set:
                yield Problem(
                    key=key,
                    because="but with model.router_choice=experts each expert takes the same number of tokens",
                    allowed="the default, or model.router_choice=tokens",
                )


def expert_layout_problems(
    sizes: AxisSizes, *, num_experts: int, ffn_hidden_size: int, layers: str, num_layers: int, num_dense_layers: int
) -> Iterator[Problem]:
    """Layouts on which the experts cannot be shared out.

    Args:
        num_experts: of a layer; 0 for a dense network.
        layers: device.layers.
    """
    expert, tensor = sizes.expert_parallel_size, sizes.expert_tensor_parallel_size
    if num_experts == 0:
        for key, size in (
            ("layout.expert_parallel_size", expert),
            ("layout.expert_tensor_parallel_size", tensor),
        ):
            if size > 1:
                yield Problem(key=key, because="but model.num_experts is 0, a dense network", allowed="1")
        return
    ranks = sizes.tensor_parallel_size * sizes.context_parallel_size * sizes.data_parallel_size
    names = "layout.tensor_parallel_size * context_parallel_size * data_parallel_size"
    if num_dense_layers >= num_layers:
        yield Problem(
            key="model.num_dense_layers",
            because=f"but model.num_layers is {num_layers}, so no layer would have experts",
            allowed=f"0 to {num_layers - 1} (nearest: {num_layers - 1})",
        )
    if ranks % (expert * tensor) != 0:
        key = "layout.expert_parallel_size" if ranks % tensor == 0 else "layout.expert_tensor_parallel_size"
        given, other = (expert, tensor) if ranks % tensor == 0 else (tensor, 1)
        yield Problem(
            key=key,
            because=f"but {names} is {ranks}"
            + (f" and layout.expert_tensor_parallel_size {tensor}" if other > 1 else ""),
            allowed=listed(divisors(ranks // other), given),
        )
    if num_experts % expert != 0:
        yield Problem(
            key="layout.expert_parallel_size",
            because=f"but model.num_experts is {num_experts}",
            allowed=listed([size for size in divisors(num_experts) if ranks % size == 0], expert),
        )
    if ffn_hidden_size % tensor != 0:
        yield Problem(
            key="layout.expert_tensor_parallel_size",
            because=f"but model.expert_ffn_hidden_size is {ffn_hidden_size}",
            allowed=listed([size for size in divisors(ffn_hidden_size) if ranks % size == 0], tensor),
        )
    if sizes.tensor_parallel_size > 1 and not sizes.sequence_parallel:
        yield Problem(
            key="layout.sequence_parallel",
            because=f"but layout.tensor_parallel_size is {sizes.tensor_parallel_size}, and without it each of these "
            "ranks would send the same tokens to the experts",
            allowed="true, or layout.tensor_parallel_size=1",
        )
    if layers == "te":
        yield Problem(
            key="device.layers",
            because="but model.num_experts is above 0, and experts of Transformer Engine's layers are not built",
            allowed="local",
        )
