"""A substitute for Transformer Engine's module tree, in plain torch, for machines without a GPU.

megatron-core imports it as if the library were installed. Only the wiring is tested with it: names of parameters, marks
of shards, and what the engine does where the library is present and no device is. FP8 contexts are recorded, never
computed. Every kernel of the optimizers raises, as the real ones do without a device.
"""

from __future__ import annotations

import contextlib
import sys
import types
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

__version__ = "2.20.2"
RECIPES_USED: list[tuple[str, str | None]] = []
"""(class of the module, recipe of the context) of every linear forward pass."""

MASKS_USED: list[str] = []
"""Mask of every pass through attention, with "ring" where ranks share the rows."""

GROUPS_USED: list[int] = []
"""Number of the matrices of every pass through a grouped linear layer."""

_state: dict[str, Any] = {"recipe": None}


class Linear(torch.nn.Module):
    """A linear layer, sharded by `parallel_mode` over the tensor-parallel ranks."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        sequence_parallel: bool = False,
        fuse_wgrad_accumulation: bool = False,
        tp_group: Any = None,
        tp_size: int = 1,
        get_rng_state_tracker: Any = None,
        rng_tracker_name: str | None = None,
        init_method: Any = None,
        bias: bool = True,
        return_bias: bool = False,
        params_dtype: torch.dtype | None = None,
        parallel_mode: str | None = None,
        device: Any = "cuda",
        name: str | None = None,
    ) -> None:
        super().__init__()
        rows = out_features // (tp_size if parallel_mode == "column" else 1)
        columns = in_features // (tp_size if parallel_mode == "row" else 1)
        self.sequence_parallel, self.parallel_mode = sequence_parallel and tp_size > 1, parallel_mode
        self.tp_size, self.tp_group, self.use_bias, self.return_bias = tp_size, tp_group, bias, return_bias
        self.weight = torch.nn.Parameter(torch.empty(rows, columns, dtype=params_dtype, device=device))
        self.fuse_wgrad_accumulation = fuse_wgrad_accumulation
        self.fp8_meta: dict[str, Any] = {}
        self.save_original_input = False  # megatron-core sets it where a recipe allows
        self.bias = torch.nn.Parameter(torch.zeros(rows, dtype=params_dtype, device=device)) if bias else None
        for parameter in (self.weight, self.bias):  # the library marks its shards itself
            if parameter is not None and parallel_mode is not None:
                parameter.tensor_model_parallel = True
                parameter.partition_dim, parameter.partition_stride = (0 if parallel_mode == "column" else 1), 1

    def forward(self, x: torch.Tensor, is_first_microbatch: bool | None = None) -> torch.Tensor:
        """[..., columns] -> [..., rows], gathered or reduced as the layer's place among the ranks asks."""
        from megatron.core.tensor_parallel import mappings
        from megatron.core.tensor_parallel.layers import linear_with_grad_accumulation_and_async_allreduce

        RECIPES_USED.append((type(self).__name__, _state["recipe"]))
        is_column = self.parallel_mode == "column"
        y = linear_with_grad_accumulation_and_async_allreduce(
            x,
            _AddedWithin.apply(self.weight) if self.fuse_wgrad_accumulation else self.weight,
            self.bias,
            False,
            is_column and self.tp_size > 1 and not self.sequence_parallel,
            is_column and self.sequence_parallel,
            tp_group=self.tp_group,
        )
        if self.parallel_mode != "row" or self.tp_size == 1:
            return y
        if self.sequence_parallel:
            return mappings.reduce_scatter_to_sequence_parallel_region(y, group=self.tp_group)
        return mappings.reduce_from_tensor_model_parallel_region(y, group=self.tp_group)

    def init_fp8_metadata(self, num_gemms: int = 1) -> None:
        """The state of delayed scaling, which exists inside a context only; nothing here ever moves it."""
        if _state["recipe"] != "DelayedScaling":
            raise RuntimeError("no context of delayed scaling is entered")
        for side, num_operands in (("scaling_fwd", 3 * num_gemms), ("scaling_bwd", 2 * num_gemms)):
            history = torch.zeros(_state["length"], num_operands)
            self.fp8_meta[side] = types.SimpleNamespace(amax_history=history, scale=torch.ones(num_operands))

    def get_extra_state(self) -> torch.Tensor:
        """Present on every module of the library; megamask never reads it."""
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state: Any) -> None:
        """Takes anything."""


class _AddedWithin(torch.autograd.Function):
    """The weight; its gradient goes into main_grad, and what autograd gets in its place holds no values."""

    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor) -> torch.Tensor:
        ctx.weight = weight
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        weight = ctx.weight
        weight.main_grad.add_(gradient)
        weight.grad_added_to_main_grad = True
        return torch.full_like(weight, torch.nan)  # the library: torch.empty


class LayerNormLinear(Linear):
    """A norm fused into the linear layer behind it; its weight is called layer_norm_weight."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        eps: float = 1e-5,
        normalization: str = "LayerNorm",
        return_layernorm_output: bool = False,
        zero_centered_gamma: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(in_features, out_features, **options)
        assert normalization == "RMSNorm"
        self.eps = eps
        self.layer_norm_weight = torch.nn.Parameter(
            torch.ones(in_features, dtype=options.get("params_dtype"), device=options.get("device", "cuda"))
        )
        self.layer_norm_weight.sequence_parallel = options.get("sequence_parallel", False)

    def forward(self, x: torch.Tensor, is_first_microbatch: bool | None = None) -> torch.Tensor:
        """Norm, then the linear layer."""
        return super().forward(F.rms_norm(x, (x.size(-1),), self.layer_norm_weight, self.eps))


class RMSNorm(torch.nn.Module):
    """A norm of its own."""

    def __init__(
        self,
        normalized_shape: int | None = None,
        eps: float = 1e-5,
        sequence_parallel: bool | None = None,
        params_dtype: torch.dtype | None = None,
        zero_centered_gamma: bool = False,
        hidden_size: int | None = None,
        device: Any = "cuda",
    ) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(normalized_shape or hidden_size, dtype=params_dtype, device=device))
        self.weight.sequence_parallel = sequence_parallel

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Same shape as x."""
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class DotProductAttention(torch.nn.Module):
    """Attention without a mask or causal: of rows, of documents laid end to end, and of rows that ranks share."""

    def __init__(
        self,
        num_attention_heads: int,
        kv_channels: int,
        num_gqa_groups: int | None = None,
        attention_dropout: float = 0.0,
        attn_mask_type: str = "causal",
        sequence_parallel: bool = False,
        tp_size: int = 1,
        get_rng_state_tracker: Any = None,
        tp_group: Any = None,
        layer_number: int | None = None,
        attention_type: str = "self",
        softmax_scale: float | None = None,
        cp_group: Any = None,
        cp_global_ranks: Any = None,
        cp_stream: Any = None,
        cp_comm_type: str = "p2p",
    ) -> None:
        super().__init__()
        assert cp_comm_type == "p2p"
        self.heads, self.channels = num_attention_heads // tp_size, kv_channels
        self.scale, self.attn_mask_type, self.cp_group = softmax_scale, attn_mask_type, cp_group

    def forward(
        self,
        query_layer: torch.Tensor,
        key_layer: torch.Tensor,
        value_layer: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        attn_mask_type: str | None = None,
        qkv_format: str = "sbhd",
        cu_seqlens_q: torch.Tensor | None = None,
        cu_seqlens_kv: torch.Tensor | None = None,
        max_seqlen_q: int | None = None,
        max_seqlen_kv: int | None = None,
        **options: Any,
    ) -> torch.Tensor:
        """[s, b, h, d], [s, b, g, d] twice -> [s, b, h*d]; contiguous, as the library's kernels take them.

        With qkv_format "thd" [t, h, d], [t, g, d] twice -> [t, h*d].
        """
        assert attention_mask is None and all(x.is_contiguous() for x in (query_layer, key_layer, value_layer))
        assert query_layer.shape[-2:] == (self.heads, self.channels)
        mask_type = attn_mask_type or self.attn_mask_type
        MASKS_USED.append(mask_type if self.cp_group is None else f"{mask_type} ring")
        if qkv_format == "thd":
            assert cu_seqlens_q is cu_seqlens_kv and cu_seqlens_q is not None and self.cp_group is None
            assert cu_seqlens_q.dtype == torch.int32 and mask_type in ("padding", "padding_causal")
            bounds = cu_seqlens_q.tolist()
            assert bounds[0] == 0 and bounds[-1] == len(query_layer)
            assert max_seqlen_q is not None and cu_seqlens_q.diff().max() <= max_seqlen_q
            document = torch.bucketize(torch.arange(len(query_layer)), cu_seqlens_q[1:], right=True)
            visible = document[:, None] == document[None]
            if mask_type == "padding_causal":
                visible = visible & torch.ones_like(visible).tril()
            rows = (x[:, None] for x in (query_layer, key_layer, value_layer))
            return self._attend(*rows, visible)[:, 0]
        visible = None
        if self.cp_group is not None:
            from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region

            size, rank, length = self.cp_group.size(), self.cp_group.rank(), query_layer.size(0)
            piece = torch.arange(size * length).view(2 * size, -1)
            order = torch.cat([torch.cat((piece[r], piece[2 * size - 1 - r])) for r in range(size)])
            key_layer, value_layer = (
                gather_from_sequence_parallel_region(x, group=self.cp_group)[order.argsort()]
                for x in (key_layer, value_layer)
            )
            if mask_type == "causal":
                visible = order[rank * length : (rank + 1) * length, None] >= torch.arange(size * length)
        elif mask_type == "causal":
            visible = torch.ones(len(query_layer), len(query_layer), dtype=torch.bool).tril()
        return self._attend(query_layer, key_layer, value_layer, visible)

    def _attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, visible: Any) -> torch.Tensor:
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        k, v = (x.repeat_interleave(q.size(1) // x.size(1), dim=1) for x in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, scale=self.scale)
        return y.permute(2, 0, 1, 3).reshape(*query.shape[:2], -1)


class GroupedLinear(torch.nn.Module):
    """Linear layers of the same sizes, one for each of the parts that the rows are split into."""

    def __init__(
        self,
        num_gemms: int,
        in_features: int,
        out_features: int,
        *,
        sequence_parallel: bool = False,
        fuse_wgrad_accumulation: bool = False,
        tp_group: Any = None,
        tp_size: int = 1,
        get_rng_state_tracker: Any = None,
        rng_tracker_name: str | None = None,
        init_method: Any = None,
        bias: bool = True,
        return_bias: bool = False,
        params_dtype: torch.dtype | None = None,
        parallel_mode: str | None = None,
        device: Any = "cuda",
        ub_name: str | None = None,
    ) -> None:
        super().__init__()
        assert tp_size == 1 and not bias  # the ranks of an expert are the dispatcher's business
        self.num_gemms, self.fuse_wgrad_accumulation = num_gemms, fuse_wgrad_accumulation
        for number in range(num_gemms):
            weight = torch.nn.Parameter(torch.empty(out_features, in_features, dtype=params_dtype, device=device))
            self.register_parameter(f"weight{number}", weight)

    def forward(self, x: torch.Tensor, m_splits: list[int], is_first_microbatch: bool | None = None) -> torch.Tensor:
        """[t, in] -> [t, out]; the first m_splits[0] rows by weight0, the next by weight1, and so on."""
        assert isinstance(m_splits, list) and len(m_splits) == self.num_gemms and sum(m_splits) == len(x)
        GROUPS_USED.append(len(m_splits))
        weights = [getattr(self, f"weight{number}") for number in range(self.num_gemms)]
        if self.fuse_wgrad_accumulation:
            weights = [_AddedWithin.apply(weight) for weight in weights]
        parts = x.split(m_splits)
        return torch.cat([F.linear(part, weight) for part, weight in zip(parts, weights, strict=True)])


@contextlib.contextmanager
def fp8_autocast(enabled: bool = True, fp8_recipe: Any = None, **options: Any) -> Iterator[None]:
    """Records the recipe for the linear layers inside."""
    before = _state["recipe"]
    _state["length"] = getattr(fp8_recipe, "amax_history_len", None)
    _state["recipe"] = type(fp8_recipe).__name__.removeprefix("TE") if enabled else None
    try:
        yield
    finally:
        _state["recipe"] = before


class FP8GlobalStateManager:
    """Return True if an FP8 context is entered."""

    @classmethod
    def is_fp8_enabled(cls) -> bool:
        """True inside `fp8_autocast(enabled=True)`."""
        return _state["recipe"] is not None


class FusedAdam(torch.optim.Optimizer):
    """Cannot be built without a device."""

    def __init__(self, *args: Any, **options: Any) -> None:
        raise RuntimeError("CUDA driver version is insufficient for CUDA runtime version")


def _needs_a_device(*args: Any, **options: Any) -> Any:
    raise RuntimeError("CUDA driver version is insufficient for CUDA runtime version")


def _module(name: str, **members: Any) -> None:
    module = types.ModuleType(f"{__name__}.{name}")
    module.__dict__.update(members)
    sys.modules[module.__name__] = module
    parent, _, last = name.rpartition(".")
    setattr(sys.modules[f"{__name__}.{parent}"] if parent else sys.modules[__name__], last, module)


class _Recipe:
    def __init__(self, **fields: Any) -> None:
        self.__dict__.update(fields)

    def delayed(self) -> bool:
        return type(self).__name__.removeprefix("TE") == "DelayedScaling"


def _plain(name: str, *bases: type) -> type:
    return type(name, bases or (object,), {})


_RECIPES = ("DelayedScaling", "Float8CurrentScaling", "Float8BlockScaling", "MXFP8BlockScaling")
_Quantized = _plain("QuantizedTensor", torch.Tensor)
_module("common")
_module(
    "common.recipe",
    Format=types.SimpleNamespace(E4M3="E4M3", HYBRID="HYBRID"),
    **{name: _plain(name, _Recipe) for name in _RECIPES},
)
_module(
    "pytorch",
    Linear=Linear,
    LayerNormLinear=LayerNormLinear,
    RMSNorm=RMSNorm,
    LayerNorm=RMSNorm,
    GroupedLinear=GroupedLinear,
    DotProductAttention=DotProductAttention,
    fp8_autocast=fp8_autocast,
    fp8_model_init=fp8_autocast,
    Fp8Padding=_plain("Fp8Padding"),
    Fp8Unpadding=_plain("Fp8Unpadding"),
)
_module("pytorch.fp8", FP8GlobalStateManager=FP8GlobalStateManager, fp8_autocast=fp8_autocast)
_module(
    "pytorch.optimizers",
    FusedAdam=FusedAdam,
    FusedSGD=FusedAdam,
    multi_tensor_applier=_needs_a_device,
    multi_tensor_l2norm=_needs_a_device,
    multi_tensor_scale=_needs_a_device,
)
_module("pytorch.distributed", CudaRNGStatesTracker=_plain("CudaRNGStatesTracker"), activation_recompute_forward=None)
_module("pytorch.tensor", QuantizedTensor=_Quantized)
_module("pytorch.tensor.utils", replace_raw_data=None, cast_master_weights_to_fp8=None)
_module("pytorch.float8_tensor", Float8Tensor=_Quantized)
_module("pytorch.ops", Sequential=torch.nn.Sequential, FusibleOperation=torch.nn.Module)
_module("pytorch.attention")
_module("pytorch.cpu_offload")
_module(
    "pytorch.router",
    fused_compute_score_for_moe_aux_loss=None,
    fused_moe_aux_loss=None,
    fused_topk_with_score_function=None,
)
