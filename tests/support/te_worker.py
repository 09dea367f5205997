"""Layers of Transformer Engine beside the local ones, with the library's substitute; answers travel as JSON."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

if __name__ == "worker":  # in a process of its own: tests must not find the substitute
    sys.path.insert(0, str(Path(__file__).parent / "te_stand_in"))

import torch

from megamask.engine.specs import families
from megamask.engine.state.restore import read_canonical_weights
from megamask.models.experts import ExpertSpec
from megamask.objectives.autoregressive import AutoregressiveObjective
from megamask.objectives.wrapped import Wrapped
from support import engine_cases as cases

SPECS = {"plain": cases.PLAIN, "options": cases.OPTIONS}


def run_layouts(root: str, runs: list[list[Any]]) -> list[dict[str, Any]]:
    """Each run: name of a spec and a layout."""
    families.check_transformer_engine = lambda *arguments, **options: None  # the substitute needs no device
    return [run_layout(Path(root), number, spec, layout) for number, (spec, layout) in enumerate(runs)]


def run_layout(root: Path, number: int, name: str, layout: dict[str, Any]) -> dict[str, Any]:
    """Trains with both kinds of layers, then carries the state of one over to the other."""
    reports: dict[str, Any] = {}
    engines = {}
    for layers in ("local", "te"):
        engine = cases.make_engine(SPECS[name], layout, micro_batch_size=2, layers=layers, weight_decay=0.5)
        reports[layers] = [cases.report_fields(cases.take_step(engine, step, 3e-3)) for step in (1, 2, 3)]
        engines[layers] = engine
    folders = [root / f"{engines['te'].world_size}-{number}-{kind}" for kind in ("te", "local")]
    if engines["te"].is_main:
        for folder in folders:
            folder.mkdir()
    engines["te"].barrier()
    cases.save_state(engines["te"], folders[0])
    engines["local"].load_state(folders[0])
    cases.save_state(engines["local"], folders[1])
    first, second = (read_canonical_weights(folder, SPECS[name]) for folder in folders)
    names = [info.name for info in engines["te"].parameters]
    engines["te"].close()
    return {
        "reports": reports,
        "is_state_equal": all(torch.equal(first[key], second[key]) for key in first),
        "has_fused_norms": any(key.endswith("layer_norm_weight") for key in names),
    }


def run_attention(root: str) -> dict[str, Any]:
    """First loss and gradient norm with both kinds of attention, by layout; the masks that the library's was given."""
    import transformer_engine

    families.check_transformer_engine = lambda *arguments, **options: None
    answers: dict[str, Any] = {}
    size = torch.distributed.get_world_size()
    layouts = {"tensor": {"tensor_parallel_size": size}, "context": {"context_parallel_size": size}}
    goals = {"masked": cases.objective(), "autoregressive": autoregressive()}
    packed = {f"packed {name}": isolated(goal) for name, goal in goals.items()}
    for axis, layout in layouts.items():
        for name, goal in (goals if axis == "context" else goals | packed).items():
            for attention in ("sdpa", "te"):
                transformer_engine.MASKS_USED.clear()
                engine = cases.make_engine(
                    cases.OPTIONS, layout, layers="te", attention=attention, goal=goal, micro_batch_size=2
                )
                report = cases.take_step(engine, 1)
                answers[f"{axis} {name} {attention}"] = {
                    "loss": report.loss,
                    "grad_norm": report.grad_norm,
                    "masks": sorted(set(transformer_engine.MASKS_USED)),
                }
                engine.close()
    return answers


EXPERTS = dataclasses.replace(
    cases.PLAIN, experts=ExpertSpec(num_experts=4, topk=2, ffn_hidden_size=24, num_shared=1, balance_weight=0.01)
)


def run_experts(root: str, layouts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Steps with experts one after another and grouped; the state of the grouped ones, read by the others."""
    import transformer_engine

    families.check_transformer_engine = lambda *arguments, **options: None
    return [_experts_of(Path(root), number, layout, transformer_engine) for number, layout in enumerate(layouts)]


def _experts_of(root: Path, number: int, layout: dict[str, Any], library: Any) -> dict[str, Any]:
    reports, engines = {}, {}
    for choice in ("sequential", "grouped"):
        library.GROUPS_USED.clear()
        engine = cases.make_engine(EXPERTS, layout, micro_batch_size=2, layers="local", device={"experts": choice})
        reports[choice] = [cases.report_fields(cases.take_step(engine, step, 3e-3)) for step in (1, 2, 3)]
        engines[choice] = engine
    groups = sorted(set(library.GROUPS_USED))
    folders = [root / f"{engine.world_size}-{number}-{choice}" for choice in engines]
    for folder in folders if engine.is_main else ():
        folder.mkdir()
    engine.barrier()
    cases.save_state(engines["grouped"], folders[0])
    engines["sequential"].load_state(folders[0])
    cases.save_state(engines["sequential"], folders[1])
    first, second = (read_canonical_weights(folder, EXPERTS) for folder in folders)
    engine.close()
    return {
        "reports": reports,
        "groups": groups,
        "is_state_equal": all(torch.equal(first[name], second[name]) for name in first),
    }


def isolated(goal: Any) -> Wrapped:
    """The objective on isolated documents, which end with an id that the rows of the tests have."""
    vocabulary = dataclasses.replace(cases.vocabulary(cases.OPTIONS), eod_token_id=7)
    return Wrapped(inner=dataclasses.replace(goal, vocabulary=vocabulary, isolate_documents=True))


def autoregressive() -> AutoregressiveObjective:
    return AutoregressiveObjective(vocabulary=cases.vocabulary(cases.OPTIONS), mask_logit="excluded")


def run_weight_gradients() -> dict[str, Any]:
    """Steps with weight gradients added within the products and by hooks, on two data-parallel ranks."""
    families.check_transformer_engine = lambda *arguments, **options: None
    answers: dict[str, Any] = {}
    for choice in ("fused", "separate"):
        for overlap in (False, True):
            engine = cases.make_engine(
                cases.OPTIONS,
                {"data_parallel_size": 2},
                micro_batch_size=1,
                layers="te",
                overlap=overlap,
                device={"weight_gradients": choice},
            )
            reports = [cases.report_fields(cases.take_step(engine, step, 3e-3)) for step in (1, 2)]
            added = [bool(weight.grad_added_to_main_grad) for weight in _matrices(engine)]
            answers[f"{choice} {overlap}"] = {"reports": reports, "digest": engine.parameter_digest(), "added": added}
            engine.close()
    return answers


def _matrices(engine: Any) -> list[Any]:
    modules = engine._rank_model.network.modules()
    return [module.weight for module in modules if hasattr(module, "fuse_wgrad_accumulation")]


DEEP = dataclasses.replace(cases.OPTIONS, num_layers=3)


def run_recipes(root: str) -> dict[str, Any]:
    """The recipe of every linear forward pass of one step, by the precision settings; and a state that comes back."""
    import transformer_engine

    families.check_transformer_engine = lambda *arguments, **options: None
    answers: dict[str, Any] = {}
    for name, fp8 in RECIPES.items():
        engine = cases.make_engine(DEEP, layers="te", compute="bf16", micro_batch_size=8, fp8=fp8)
        transformer_engine.RECIPES_USED.clear()
        cases.take_step(engine, 1)
        answers[name] = list(transformer_engine.RECIPES_USED)
        if name == "delayed":
            answers["state"] = _carries_state(engine, Path(root) / "delayed", fp8)
        engine.close()
    return answers


def _carries_state(engine: Any, folder: Path, fp8: dict[str, Any]) -> bool:
    """Write random scales into the library's modules, save, load into another engine, and compare."""
    for place in engine._fp8._places:
        place.scales.write(*(torch.rand_like(tensor) for tensor in place.scales.read()))
    folder.mkdir()
    cases.save_state(engine, folder)
    again = cases.make_engine(DEEP, layers="te", compute="bf16", micro_batch_size=8, fp8=fp8)
    again.load_state(folder)
    pairs = zip(engine._fp8._places, again._fp8._places, strict=True)
    return not again._fp8.needs_calibration and all(
        torch.equal(one, other)
        for ours, theirs in pairs
        for one, other in zip(ours.scales.read(), theirs.scales.read(), strict=True)
    )


RECIPES: dict[str, dict[str, Any]] = {
    "none": {},
    "tensorwise": {"fp8": "tensorwise"},
    "middle": {"fp8": "tensorwise", "fp8_first_layers_bf16": 1, "fp8_last_layers_bf16": 1},
    "delayed": {"fp8": "delayed", "fp8_amax_history": 4},
    "blockwise": {"fp8": "blockwise"},
}
