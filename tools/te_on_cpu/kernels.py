"""The CUDA kernels of Transformer Engine 2.20 that a training step of the engine calls, in plain torch.

k_NAME takes the arguments of transformer_engine_torch.NAME. Numerics: quantise (clamp, cast), dequantise, multiply in
float32. Hopper's rule is kept: an FP8 product reads row-wise data of the operand whose rows are the inner dimension and
transposed data of the other one, so a missing usage is an error here too, and its dimensions are multiples of 16.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from transformer_engine.pytorch.constants import TE_DType_To_Torch
from transformer_engine.pytorch.tensor.float8_blockwise_tensor import Float8BlockQuantizer
from transformer_engine.pytorch.tensor.float8_tensor import (
    Float8CurrentScalingQuantizer,
    Float8Quantizer,
    Float8Tensor,
)
from transformer_engine.pytorch.tensor.storage.float8_blockwise_tensor_storage import Float8BlockwiseQTensorStorage
from transformer_engine.pytorch.tensor.storage.float8_tensor_storage import Float8TensorStorage

BLOCK = 128
FLOAT_MAX = torch.finfo(torch.float32).max
GEMM_LOG: list[tuple[str, str, str]] = []  # layout, kind of A, kind of B


def _torch_dtype(te: Any) -> torch.dtype:
    return TE_DType_To_Torch[te]


def _fp8(te: Any) -> torch.dtype:
    return _torch_dtype(te)


def _cast(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    limit = torch.finfo(dtype).max
    return x.clamp(-limit, limit).to(dtype)


def _scale(amax: torch.Tensor, dtype: torch.dtype, *, power_of_2: bool = False, epsilon: float = 0.0) -> torch.Tensor:
    amax = amax.clamp(min=epsilon) if epsilon else amax
    scale = torch.where(amax > 0, torch.finfo(dtype).max / amax, torch.ones_like(amax)).clamp(max=FLOAT_MAX)
    return torch.exp2(torch.floor(torch.log2(scale))) if power_of_2 else scale


def _make(quantizer: Any, x: torch.Tensor, scale: torch.Tensor, output: Any) -> Any:
    dtype = _fp8(quantizer.dtype)
    data = _cast(x.float() * scale, dtype).view(torch.uint8)
    turned = data.reshape(-1, data.shape[-1]).t().contiguous().view(x.shape[-1], *x.shape[:-1])
    scale_inv = (1 / scale).reshape(1).float()
    if output is not None:
        if output._data is not None:
            output._data.copy_(data)
        if output._transpose is not None:
            output._transpose.copy_(turned)
            output._transpose_invalid = False
        output._scale_inv.copy_(scale_inv)
        return output
    kwargs = {
        "data": data if quantizer.rowwise_usage else None,
        "data_transpose": turned if quantizer.columnwise_usage else None,
        "fp8_scale_inv": scale_inv,
        "fp8_dtype": quantizer.dtype,
        "quantizer": quantizer,
    }
    if quantizer.internal:
        return Float8TensorStorage(fake_dtype=x.dtype, **kwargs)
    return Float8Tensor(shape=x.shape, dtype=x.dtype, requires_grad=False, device=x.device, **kwargs)


def _fill_blocks(x: torch.Tensor, rows: int, dtype: torch.dtype, data: torch.Tensor, scale_inv: torch.Tensor) -> None:
    """x [m, k] in tiles of rows x 128. TE keeps 1 x 128 scales transposed, both kinds padded to a multiple of 4."""
    m, k = x.shape
    padded = torch.nn.functional.pad(x.float(), (0, -k % BLOCK, 0, -m % rows))
    tiles = padded.view(padded.shape[0] // rows, rows, padded.shape[1] // BLOCK, BLOCK)
    scale = _scale(tiles.abs().amax((1, 3), keepdim=True), dtype, power_of_2=True)
    data.copy_(_cast(tiles * scale, dtype).view(torch.uint8).view(padded.shape)[:m, :k].reshape(data.shape))
    inverse = (1 / scale)[:, 0, :, 0]
    inverse = inverse if rows > 1 else inverse.t()
    scale_inv.zero_()
    scale_inv[: inverse.shape[0], : inverse.shape[1]] = inverse


def _read_blocks(x: Any, usage: str) -> torch.Tensor:
    data, scale_inv = getattr(x, f"_{usage}_data"), getattr(x, f"_{usage}_scale_inv")
    assert data is not None, f"FP8 GEMM without {usage} data"
    flat = data.reshape(-1, data.shape[-1]) if usage == "rowwise" else data.reshape(data.shape[0], -1)
    m, k = flat.shape
    values = flat.view(_fp8(x._fp8_dtype)).float()
    scales = scale_inv if x._is_2D_scaled else scale_inv.t()
    scales = scales.repeat_interleave(BLOCK, 0)[:m] if x._is_2D_scaled else scales[:m]
    values = values * scales.repeat_interleave(BLOCK, 1)[:, :k]
    return values if usage == "rowwise" else values.t()


def k_quantize(tensor: torch.Tensor, quantizer: Any, output: Any = None, noop: Any = None) -> Any:
    x = tensor.detach()
    if isinstance(
        quantizer, Float8Quantizer
    ):  # delayed: the scale of earlier passes; this pass' magnitude goes into the first slot
        quantizer.amax.copy_(torch.maximum(quantizer.amax, x.float().abs().amax().reshape_as(quantizer.amax)))
        return _make(quantizer, x, quantizer.scale.reshape(()), output)
    if isinstance(quantizer, Float8CurrentScalingQuantizer):
        amax = x.float().abs().amax()
        if quantizer.with_amax_reduction:
            dist.all_reduce(amax, op=dist.ReduceOp.MAX, group=quantizer.amax_reduction_group)
        scale = _scale(
            amax, _fp8(quantizer.dtype), power_of_2=quantizer.force_pow_2_scales, epsilon=quantizer.amax_epsilon
        )
        return _make(quantizer, x, scale, output)
    if isinstance(quantizer, Float8BlockQuantizer):
        made = quantizer.make_empty(x.shape, dtype=x.dtype, device=x.device) if output is None else output
        flat, rows = x.reshape(-1, x.shape[-1]), BLOCK if quantizer.block_scaling_dim == 2 else 1
        for usage, values in (("rowwise", flat), ("columnwise", flat.t())):
            data, scale_inv = getattr(made, f"_{usage}_data"), getattr(made, f"_{usage}_scale_inv")
            if data is not None:
                _fill_blocks(values, rows, _fp8(quantizer.dtype), data, scale_inv)
        return made
    raise NotImplementedError(type(quantizer).__name__)


def _operand(x: Any, usage: str) -> torch.Tensor:
    if isinstance(x, Float8TensorStorage):
        dtype = _fp8(x._fp8_dtype)
        if usage == "rowwise":
            assert x._data is not None, "FP8 GEMM without row-wise data"
            return x._data.view(dtype).float().reshape(-1, x._data.shape[-1]) * x._scale_inv
        assert x._transpose is not None and not x._transpose_invalid, "FP8 GEMM without transposed data (Hopper)"
        return (x._transpose.view(dtype).float().reshape(x._transpose.shape[0], -1) * x._scale_inv).t()
    if isinstance(x, Float8BlockwiseQTensorStorage):
        return _read_blocks(x, usage)
    assert isinstance(x, torch.Tensor), type(x)
    return x.detach().reshape(-1, x.shape[-1]).float()


def k_generic_gemm(
    A,
    transA,
    B,
    transB,
    D,
    quantizer,
    output_dtype,
    bias,
    bias_type,
    gelu,
    gelu_in,
    grad,
    workspace,
    workspace_size,
    accumulate,
    use_split_accumulator,
    comm_overlap=None,
    comm_type=None,
    extra_output=None,
    bulk_overlap=False,
    alpha=1.0,
    beta=None,
):
    assert not gelu and comm_overlap is None
    GEMM_LOG.append((("T" if transA else "N") + ("T" if transB else "N"), type(A).__name__, type(B).__name__))
    a, b = _operand(A, "rowwise" if transA else "columnwise"), _operand(B, "columnwise" if transB else "rowwise")
    is_fp8 = isinstance(A, Float8TensorStorage | Float8BlockwiseQTensorStorage)
    if is_fp8:  # cuBLASLt's rule, on the inner dimension and the leading ones
        inner, out_n = (a.shape[1], a.shape[0]) if transA else a.shape
        assert inner % 16 == 0 and out_n % 16 == 0, f"FP8 GEMM with inner {inner}, rows of A {out_n}: not % 16"
    y = (b.t() if transB else b) @ (a.t() if transA else a)
    shape = (*B.shape[:-1], y.shape[-1]) if not transB and hasattr(B, "shape") and len(B.shape) > 2 else y.shape
    bias_grad = None
    if bias is not None and not grad:
        y = y + bias.detach().float()
    if bias is not None and grad:
        bias_grad = b.sum(dim=0).to(bias.dtype)
    dtype = _torch_dtype(output_dtype) if output_dtype is not None else (D.dtype if D is not None else torch.bfloat16)
    if D is not None:
        D.add_(y) if accumulate else D.copy_(y.view_as(D))
        out = D
    else:
        out = y.to(dtype).reshape(shape)
        if quantizer is not None:
            out = k_quantize(out, quantizer)
    return [out, bias_grad, None, extra_output]


def k_rmsnorm_fwd(x, weight, eps, ln_out, quantizer, otype, sm_margin, zero_centered_gamma):
    wide, gamma = x.detach().float(), weight.detach().float() + (1.0 if zero_centered_gamma else 0.0)
    rsigma = (wide.square().mean(-1) + eps).rsqrt()
    y = (wide * rsigma[:, None] * gamma).to(_torch_dtype(otype))
    return [y if quantizer is None else k_quantize(y, quantizer), None, rsigma]


def k_rmsnorm_bwd(dz, x, rsigma, gamma, sm_margin, zero_centered_gamma):
    g, wide, w = dz.float(), x.detach().float(), gamma.detach().float() + (1.0 if zero_centered_gamma else 0.0)
    normed = wide * rsigma[:, None]
    gw = g * w
    dx = rsigma[:, None] * (gw - normed * (gw * normed).mean(-1, keepdim=True))
    return [dx.to(x.dtype), (g * normed).sum(0).to(gamma.dtype)]


def k_bgrad_quantize(dy, quantizer):
    return [dy.reshape(-1, dy.shape[-1]).float().sum(0).to(dy.dtype), k_quantize(dy, quantizer)]


def k_fp8_transpose(data, dtype, out=None):
    turned = data.reshape(-1, data.shape[-1]).t().contiguous().view(data.shape[-1], *data.shape[:-1])
    return turned if out is None else out.copy_(turned)


def k_dequantize(x, otype):
    return _operand(x, "rowwise").view(x.shape if hasattr(x, "shape") else x._data.shape).to(_torch_dtype(otype))


def k_fused_amax_and_scale_update_after_reduction(buffer, histories, scales, algo, dtype, margin):
    start, limit = 0, torch.finfo(_fp8(dtype)).max
    for history, scale in zip(histories, scales, strict=True):
        latest = buffer[start : start + history.shape[1]]
        start += history.shape[1]
        amax = (
            latest
            if algo == "most_recent"
            else torch.maximum(history[1:].amax(0), latest)
            if history.shape[0] > 1
            else latest
        )
        new = torch.where((amax > 0) & amax.isfinite(), limit / amax / 2**margin, scale).clamp(max=FLOAT_MAX)
        history.copy_(torch.roll(history, -1, 0))
        history[-1] = latest
        history[0] = 0
        scale.copy_(new)


def k_multi_tensor_adam(chunk, noop, lists, lr, beta1, beta2, eps, step, mode, bias_correction, weight_decay):
    grads, params, first, second = lists[:4]
    c1, c2 = (1 - beta1**step, 1 - beta2**step) if bias_correction else (1.0, 1.0)
    for g, p, m, v in zip(grads, params, first, second, strict=True):
        g = g.float() if mode else g.float() + weight_decay * p  # noqa: PLW2901
        m.mul_(beta1).add_(g, alpha=1 - beta1)
        v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        update = (m / c1) / ((v / c2).sqrt() + eps)
        p.sub_(lr * (update + weight_decay * p if mode else update))


def k_multi_tensor_l2norm(chunk, noop, lists, per_tensor=False):
    norms = [t.float().norm() for t in lists[0]]
    total = torch.stack(norms).norm() if norms else torch.zeros(())
    return total.reshape(1), torch.stack(norms) if per_tensor else torch.zeros(1)


def k_multi_tensor_scale(chunk, noop, lists, scale):
    for source, target in zip(lists[0], lists[1], strict=True):
        target.copy_(source * scale)


def k_multi_tensor_scale_tensor(chunk, noop, lists, scale):
    for source, target in zip(lists[0], lists[1], strict=True):
        target.copy_(source * scale)


def k_create_empty_quantized_tensor(quantizer, shape, dtype, device, pin_memory=False):
    if isinstance(quantizer, Float8BlockQuantizer):
        return ORIGINAL["create_empty_quantized_tensor"](quantizer, shape, dtype, torch.device("cpu"), False)
    x = torch.zeros(shape, dtype=dtype)
    return _make(quantizer, x, torch.ones(()), None)


def k_swap_first_dims(x, out=None):
    swapped = x.transpose(0, 1).contiguous()
    return swapped if out is None else out.copy_(swapped.view_as(out))


ORIGINAL: dict[str, Any] = {}


def k_get_fused_attn_backend(parameters):
    import transformer_engine_torch as tex

    return tex.NVTE_Fused_Attn_Backend.NVTE_No_Backend, "no GPU: kernels are emulated"


def k_scaled_softmax_forward(x, scale):
    return torch.softmax(x.float() * float(scale), dim=-1).to(x.dtype)


def k_scaled_softmax_backward(dy, y, scale):
    g, p = dy.float(), y.float()
    return (float(scale) * p * (g - (g * p).sum(-1, keepdim=True))).to(dy.dtype)
