"""Jobs of tests/gpu in a process of their own: process group, deterministic kernels and Transformer Engine are global.

    python -m support.gpu_worker JOB FOLDER own|emulated

The last line of output is the answer as JSON. "emulated" computes Transformer Engine's kernels on the CPU.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from megamask.models.experts import ExpertSpec
from support import engine_cases as cases

HAS_TE = importlib.util.find_spec("transformer_engine") is not None
NO_TE = "Transformer Engine is not installed; its layers were NOT tested"
# multiples of 128 and 16 as the FP8 kernels take them; two samples are 128 positions
SPEC = dataclasses.replace(
    cases.OPTIONS, hidden_size=128, ffn_hidden_size=128, head_dim=32, num_attention_heads=4, padded_vocab_size=128
)
RUNS: dict[str, dict[str, Any]] = {
    "fp32": {"layers": "local"},
    "bf16": {"layers": "local", "compute": "bf16"},
    "filled": {"layers": "local", "compute": "bf16", "is_filled": True},
}
WITH_TE: dict[str, dict[str, Any]] = {
    "te_fp32": {"layers": "te"},
    "te_bf16": {"layers": "te", "compute": "bf16"},
    "te_graphs": {"layers": "te", "compute": "bf16", "device": {"cuda_graphs": True}},
    "te_attention": {"layers": "te", "compute": "bf16", "attention": "te"},
    "tensorwise": {"layers": "te", "compute": "bf16", "fp8": {"fp8": "tensorwise"}},
    "delayed": {"layers": "te", "compute": "bf16", "fp8": {"fp8": "delayed", "fp8_amax_history": 4}},
    "blockwise": {"layers": "te", "compute": "bf16", "fp8": {"fp8": "blockwise"}},
}


def train(folder: Path, *, is_filled: bool = False, **settings: Any) -> dict[str, Any]:
    """Three steps; from the state after two again; the same three once more, with an evaluation between."""
    from megamask.engine import engine as engine_module

    if is_filled:
        select = engine_module.select_backend

        def selecting(*arguments: Any, **options: Any) -> Any:
            made = select(*arguments, **options)
            torch.utils.deterministic.fill_uninitialized_memory = True
            return made

        engine_module.select_backend = selecting
    settings = {"z_loss_weight": 0.1, "micro_batch_size": 2, **settings}
    engine = cases.make_engine(SPEC, **settings)
    reports = [step(engine, number) for number in (1, 2)]
    cases.save_state(engine, folder, copy=True)
    share = engine.state_share(copy=True)  # as an asynchronous save: training goes on before it is written
    before = engine.parameter_digest()
    reports.append(step(engine, 3))
    later = folder / "later"
    later.mkdir()
    cases.write_share(engine, share, later)
    scores = cases.masked_scores(engine, *cases.probe_rows(3, SPEC)).tolist()
    network = engine._rank_model.network
    found: dict[str, Any] = {
        "reports": reports,
        "digest": engine.parameter_digest(),
        "backend": [engine.backend.name, engine.backend.adam],
        "arithmetic": engine.arithmetic,
        "formats": sorted({str(parameter.dtype) for parameter in network.parameters()}),
        "scores": scores,
        "num_graphs": sum(len(getattr(layer, "cuda_graphs", [])) for layer in network.decoder.layers),
    }
    engine.close()
    for name, place in (("resumed", folder), ("resumed_late", later)):
        again = cases.make_engine(SPEC, **settings)
        again.load_state(place)
        found[f"{name}_from"] = again.parameter_digest() == before
        found[name] = step(again, 3)
        again.close()
    repeated = cases.make_engine(SPEC, **settings)
    found["repeated"] = []
    for number in (1, 2, 3):
        cases.masked_scores(repeated, *cases.probe_rows(5, SPEC))
        found["repeated"].append(step(repeated, number))
    found["repeated_digest"] = repeated.parameter_digest()
    repeated.close()
    if is_filled:
        engine_module.select_backend = select
    return found


def step(engine: Any, number: int) -> dict[str, Any]:
    return cases.report_fields(cases.take_step(engine, number, 3e-3))


def runs(folder: Path, *, with_te: bool) -> dict[str, Any]:
    """Every run by name; one that fails reports it and stops no other."""
    found: dict[str, Any] = {}
    for name, settings in (RUNS | (WITH_TE if with_te else {})).items():
        (folder / name).mkdir()
        try:
            found[name] = train(folder / name, **settings)
        except Exception as error:  # noqa: BLE001 - the next run is independent
            found[name] = {"error": f"{type(error).__name__}: {error}"}
    return found


def linear(folder: Path) -> dict[str, Any]:
    """A linear layer of Transformer Engine, its emulation and bf16 on the same numbers, by recipe."""
    import transformer_engine.pytorch as te
    from transformer_engine.common import recipe

    from megamask.engine.layers.fp8_linear import Blockwise, Delayed, Tensorwise, _Product
    from megamask.engine.layers.fp8_state import DelayedScales

    device = _device()
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(512, 512, generator=generator)
    x[:, 7] *= 60  # a channel of outliers
    weight, gradient = (torch.randn(512, 512, generator=generator) for _ in range(2))
    x, weight, gradient = (tensor.to(device, torch.bfloat16) for tensor in (x, weight / 23, gradient))
    group = torch.distributed.group.WORLD
    assert group is not None
    scales = DelayedScales(history=4, margin=0, group=group, device=device)
    kinds = {
        "tensorwise": (recipe.Float8CurrentScaling(), Tensorwise()),
        "delayed": (recipe.DelayedScaling(amax_history_len=4, amax_compute_algo="max"), Delayed(scales)),
        "blockwise": (recipe.Float8BlockScaling(), Blockwise()),
    }

    def passes(product: Callable[[torch.Tensor], torch.Tensor], parameter: Any, times: int) -> list[torch.Tensor]:
        for _ in range(times):  # delayed: a pass has the scales of those before it
            parameter.grad, x_now = None, x.clone().requires_grad_()
            y = product(x_now)
            y.backward(gradient)
        assert x_now.grad is not None
        return [y.detach().float(), x_now.grad.float(), parameter.grad.float()]

    own = torch.nn.Parameter(weight.clone())
    exact = passes(lambda x_now: x_now @ own.t(), own, 1)
    found = {}
    for name, (of_te, of_ours) in kinds.items():
        module = te.Linear(512, 512, bias=False, params_dtype=torch.bfloat16, device=device)
        module.weight.data.copy_(weight)

        def fused(x_now: torch.Tensor, module: Any = module, made: Any = of_te) -> torch.Tensor:
            with te.fp8_autocast(enabled=True, fp8_recipe=made):
                return module(x_now)  # type: ignore[no-any-return]

        def emulated(x_now: torch.Tensor, made: Any = of_ours) -> torch.Tensor:
            made.begin_step()
            return _Product.apply(x_now, own, made, None, False, False, True)  # type: ignore[no-any-return,no-untyped-call]

        theirs, ours = passes(fused, module.weight, 3), passes(emulated, own, 3)
        found[name] = {
            "te": [_distance(a, b) for a, b in zip(theirs, exact, strict=True)],
            "emulated": [_distance(a, b) for a, b in zip(ours, exact, strict=True)],
            "mutual": [_distance(a, b) for a, b in zip(theirs, ours, strict=True)],
        }
    return found


def quantised(folder: Path) -> dict[str, Any]:
    """Share of a tensor's elements that Transformer Engine and the emulation quantise at most one step apart."""
    from transformer_engine.pytorch import Float8CurrentScalingQuantizer
    from transformer_engine_torch import DType

    from megamask.engine.layers.fp8_recipes import E4M3, amax_of, largest, per_tensor

    x = torch.randn(512, 512, generator=torch.Generator().manual_seed(2)).to(_device(), torch.bfloat16)
    quantizer = Float8CurrentScalingQuantizer(DType.kFloat8E4M3, device=_device())
    theirs, ours = quantizer(x).dequantize().float(), per_tensor(x, E4M3)
    unit = amax_of(x) / largest(E4M3)
    exponent = torch.floor(torch.log2((ours.abs() / unit).clamp(min=2.0**-6)))
    one_step = torch.exp2(exponent - 3) * unit
    difference = (theirs - ours).abs()
    # outputs are bf16: its own rounding of a dequantised number is below 2^-8 of it
    return {
        "within_a_step": float((difference <= one_step * 1.001 + ours.abs() / 256).float().mean()),
        "equal": float((difference <= ours.abs() / 256 + 1e-12).float().mean()),
    }


def adam(folder: Path) -> dict[str, Any]:
    """Twenty steps of the library's fused Adam and of megamask's from the same numbers: largest relative distance."""
    from transformer_engine.pytorch.optimizers import FusedAdam

    from megamask.engine.adam import Adam

    generator = torch.Generator().manual_seed(3)
    start = torch.randn(1000, generator=generator)
    parameters = [torch.nn.Parameter(start.clone().to(_device())) for _ in range(2)]
    options = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    optimizers = [FusedAdam([parameters[0]], **options), Adam([parameters[1]], **options)]
    for _ in range(20):
        gradient = torch.randn(1000, generator=generator).to(_device())
        for parameter, optimizer in zip(parameters, optimizers, strict=True):
            parameter.grad = gradient.clone()
            optimizer.step()
    return {"distance": _distance(parameters[0].detach(), parameters[1].detach())}


def capability(folder: Path) -> dict[str, Any]:
    """Recipes of the table that the library's own checks answer otherwise on this card; and the refusal of mxfp8."""
    from transformer_engine.pytorch import quantization

    from megamask.config.schema.device import DeviceConfig
    from megamask.config.schema.precision import PrecisionConfig
    from megamask.engine.probes import capability as found_here
    from megamask.planning.capability import problems, refusal

    questions = {
        "tensorwise": quantization.check_fp8_support,
        "delayed": quantization.check_fp8_support,
        "blockwise": quantization.check_fp8_block_scaling_support,
        "mxfp8": quantization.check_mxfp8_support,
    }
    here = found_here()
    different = [name for name, ask in questions.items() if ask()[0] != (refusal(name, here) is None)]
    asked = PrecisionConfig(compute="bf16", fp8="mxfp8")
    refused = [problem.because for problem in problems(asked, DeviceConfig(), here)]
    return {"different": different, "mxfp8": refused, "architecture": here.architecture}


def run_choices(layout: dict[str, Any], choices: dict[str, dict[str, Any]], *, has_experts: bool) -> dict[str, Any]:
    """Loss and gradient norm of a first step in bf16, by choice of settings; in the processes of support/gloo.py."""
    experts = ExpertSpec(num_experts=8, topk=2, ffn_hidden_size=128) if has_experts else None
    found = {}
    for name, settings in choices.items():
        engine = cases.make_engine(
            dataclasses.replace(SPEC, experts=experts), layout, compute="bf16", micro_batch_size=2, **settings
        )
        report = cases.take_step(engine, 1, 3e-3)
        found[name] = [report.loss, report.grad_norm]
        engine.close()
    return found


def _device() -> torch.device:
    from megamask.engine.backend import select_backend

    return select_backend().device


def _distance(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one.float() - other.float()).norm() / other.float().norm())


JOBS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "runs": lambda folder: runs(folder, with_te=False),
    "runs_of_te": lambda folder: runs(folder, with_te=True),
    **{job.__name__: job for job in (linear, quantised, adam, capability)},
}


def main() -> None:
    """Do one job."""
    job, folder, kernels = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
    if kernels == "emulated":
        import substitute

        substitute.install()
    from megamask.engine.backend import select_backend
    from megamask.engine.process_group import destroy_process_group, init_process_group

    init_process_group(select_backend())
    answer = JOBS[job](folder)
    destroy_process_group()
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
