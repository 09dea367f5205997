#!/usr/bin/env python3
"""Hold the engine's Transformer Engine path against its emulation, with the library's own Python on a CPU.

    tools/te_on_cpu/setup.sh FOLDER                     once: Python 3.12, torch and Transformer Engine, 5 GB
    FOLDER/venv/bin/python tools/te_on_cpu/check.py     every case; --only NAME... for some; --json FILE

Run it from the root of a checkout, before a run on a GPU and after a change of Transformer Engine or megatron-core. It
proves wiring, state and arithmetic; kernels' bits, memory and speed need a GPU. On a machine with one,
--kernels library runs the same cases on the library's own kernels.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent), *(str(HERE.parents[1] / name) for name in ("platform", "tests"))]

import graphs  # noqa: E402
import substitute  # noqa: E402
import torch  # noqa: E402
from bench_support import Report  # noqa: E402

from megamask.diffusion.sampling import Draw  # noqa: E402
from support import engine_cases as cases  # noqa: E402
from support.gpu_worker import SPEC  # noqa: E402

FP8_SCALE = "fp8.scale"  # of megamask/engine/fp8.py, whose import may not precede the substitution
GIVEN_SCALES = torch.tensor([64.0, 1024.0, 2.0**18])
BATCHES = 4
RECIPES = ("tensorwise", "delayed", "blockwise")


def build(
    recipe: str = "none",
    *,
    layers: str = "te",
    emulate: bool = False,
    compute: str = "bf16",
    has_graphs: bool = False,
    **more: Any,
) -> Any:
    """An engine of one process. Shapes are small, and the kernels' rule of 128 is the config's, not the engine's."""
    fp8 = {"fp8": recipe} | ({"fp8_kernels": "emulate"} if emulate else {}) | more
    if recipe == "delayed":
        fp8["fp8_amax_history"] = 4
    layers = "auto" if emulate else layers
    device = {"cuda_graphs": has_graphs}
    return cases.make_engine(SPEC, layers=layers, compute=compute, micro_batch_size=2, fp8=fp8, device=device)


def steps(engine: Any, first: int, last: int) -> list[dict[str, Any]]:
    """Reports of some steps."""
    return [cases.report_fields(cases.take_step(engine, step, 3e-3)) for step in range(first, last + 1)]


def gradient_errors(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> list[float]:
    """Relative error of each tensor, ascending; the key's bias has no gradient but rounding."""
    return sorted(
        float((ours[name] - theirs[name]).norm() / theirs[name].norm().clamp(min=1e-9))
        for name in theirs
        if "k_proj.bias" not in name
    )


def first_step(step: int = 1, **settings: Any) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Report and gradients of the first step, on the batch of the given one.

    Delayed scaling begins with scales that are given: calibrated ones differ in the last digit, and numbers that lie
    between two of E5M2 would then be rounded to different ones.
    """
    engine = build(**settings)
    if engine._fp8.needs_calibration:
        engine._fp8.loaded(
            [
                dataclasses.replace(each, data=torch.zeros_like(each.data) if each.data.dim() > 1 else GIVEN_SCALES)
                for each in engine._fp8.targets([FP8_SCALE])
            ]
        )
    report = steps(engine, step, step)[0]
    gradients = {name: tensor.clone() for name, tensor in cases.canonical_gradients(engine).items()}
    engine.close()
    return report, gradients


def check_layers() -> dict[str, Any]:
    """Float32 layers of Transformer Engine against the local ones."""
    (fused, of_fused), (local, of_local) = first_step(compute="fp32"), first_step(compute="fp32", layers="local")
    found = {"loss": abs(fused["loss"] / local["loss"] - 1), "gradients": gradient_errors(of_fused, of_local)[-1]}
    return found | {"passed": found["loss"] < 1e-6 and found["gradients"] < 1e-5}


def check_emulation(recipe: str) -> dict[str, Any]:
    """Gradients of a first step in float32: Transformer Engine's FP8 Python against the emulation, and against no FP8.

    The last bit of a norm may turn a number that lies between two of FP8 the other way, and every gradient after it is
    another one. Which batches have such a number depends on the processor. So one of a few must be equal to rounding,
    which no other arithmetic is, and on none may the difference be near that of FP8 itself.
    """
    batches = []
    for step in range(1, BATCHES + 1):
        fused, of_fused = first_step(step, recipe=recipe, compute="fp32")
        emulated, of_emulated = first_step(step, recipe=recipe, emulate=True, compute="fp32")
        errors = gradient_errors(of_fused, of_emulated)
        batches.append((statistics.median(errors), errors[-1], abs(fused["loss"] / emulated["loss"] - 1)))
    _, exact = first_step(step, compute="fp32", layers="local")
    without, furthest = gradient_errors(of_fused, exact)[-1], max(largest for _, largest, _ in batches)
    median, largest, loss = min(batches)
    found = {
        "loss": loss,
        "gradients, median": median,
        "gradients, largest": largest,
        "gradients, largest of every batch": furthest,
        "gradients without FP8, largest": without,
    }
    if substitute.is_installed():
        return found | {"passed": median < 1e-6 and largest < 1e-3 and furthest < 0.2 * without}
    # products of Hopper's FP8 units are summed in fewer bits
    return found | {"passed": furthest < 0.5 * without}


def check_calibration() -> dict[str, Any]:
    """Scales after the calibrating pass of step 1: the library's modules against the emulation."""
    found = []
    for emulate in (False, True):
        engine = build("delayed", emulate=emulate, compute="fp32")
        calibrating, scales = engine._fp8.calibrating, []

        @contextlib.contextmanager
        def observed(
            calibrating: Any = calibrating, engine: Any = engine, scales: list[Any] = scales
        ) -> Iterator[None]:
            with calibrating():
                yield
            scales += [each.data.flatten() for each in engine._fp8.targets([FP8_SCALE])]

        engine._fp8.calibrating = observed
        steps(engine, 1, 1)
        engine.close()
        found.append(torch.cat(scales))
    difference = float(((found[0] - found[1]).abs() / found[1].abs().clamp(min=1e-30)).max())
    return {"difference": difference, "values": len(found[0]), "passed": difference < 1e-5}


def check_resume(recipe: str) -> dict[str, Any]:
    """Save at step 3, resume, and compare steps 4 to 6 bit for bit."""
    engine = build(recipe)
    steps(engine, 1, 3)
    with tempfile.TemporaryDirectory() as folder:
        cases.save_state(engine, Path(folder))
        # one network after the other: the library moves the histories of all modules of a process on together
        wanted, digest = steps(engine, 4, 6), engine.parameter_digest()
        again = build(recipe)
        again.load_state(Path(folder))
    return {"passed": steps(again, 4, 6) == wanted and again.parameter_digest() == digest}


def check_evaluation(recipe: str) -> dict[str, Any]:
    """An evaluation and a preview between steps change no bit of training."""
    plain = build(recipe)
    wanted, digest = steps(plain, 1, 3), plain.parameter_digest()
    looked, found = build(recipe), list[dict[str, Any]]()
    for step in (1, 2, 3):
        x_t, x_0, is_masked = cases.probe_rows(5, SPEC)
        cases.masked_scores(looked, x_t, x_0, is_masked)
        looked.predict(cases.reading(x_t, is_masked), Draw(step=step, sequences=tuple(range(5))))
        found += steps(looked, step, step)
    return {"passed": found == wanted and looked.parameter_digest() == digest}


def check_first_layers() -> dict[str, Any]:
    """One of two layers in bf16: half of the quantisations."""
    if not substitute.is_installed():
        return {"passed": True, "left out": "only emulated kernels are counted"}
    counts = []
    for first in (0, 1):
        substitute.CALLS.clear()
        steps(build("tensorwise", fp8_first_layers_bf16=first), 1, 1)
        counts.append(substitute.CALLS.get("quantize", 0))
    return {"quantisations": counts, "passed": 0 < 2 * counts[1] == counts[0]}


def check_crossing() -> dict[str, Any]:
    """A checkpoint of FP8 layers loads into local ones bit for bit."""
    engine, local = build("tensorwise"), build(layers="local")
    steps(engine, 1, 2)
    with tempfile.TemporaryDirectory() as folder:
        cases.save_state(engine, Path(folder))
        local.load_state(Path(folder))
    ours, theirs = cases.canonical_weights(engine), cases.canonical_weights(local)
    return {"passed": all(torch.equal(ours[name], theirs[name]) for name in ours)}


def check_graphs(recipe: str) -> dict[str, Any]:
    """Steps with graphs are those without, bit for bit; evaluations between them compute without graphs."""
    answers = []
    for has_graphs in (False, True):
        engine, before = build(recipe, has_graphs=has_graphs), graphs.REPLAYS[0]
        found = steps(engine, 1, 2)
        replays = graphs.REPLAYS[0] - before
        scores = cases.masked_scores(engine, *cases.probe_rows(5, SPEC)).tolist()
        answers.append((found + steps(engine, 3, 3), scores, engine.parameter_digest()))
    # four micro-batches a step, and a graph each way of each layer
    counted = not substitute.is_installed() or replays == 2 * 4 * 2 * SPEC.num_layers
    return {"replays": replays, "passed": answers[0] == answers[1] and counted}


def check_capability() -> dict[str, Any]:
    """The table of planning/capability.py against the library's own checks, on five architectures or the GPU's own."""
    from transformer_engine.pytorch import quantization

    from megamask.engine.probes import _LIBRARY_CHECKS, capability
    from megamask.planning.capability import refusal

    questions = {recipe: getattr(quantization, name) for recipe, name in _LIBRARY_CHECKS.items()}
    differences, answers = [], {}
    architectures = (
        [(8, 0), (8, 9), (9, 0), (10, 0), (12, 0)]
        if substitute.is_installed()
        else [torch.cuda.get_device_capability()]
    )
    for architecture in architectures:
        if substitute.is_installed():
            substitute.pretend_device(architecture)
        for recipe, question in questions.items():
            is_supported, reason = question()
            name = f"{recipe} on {architecture[0]}.{architecture[1]}"
            answers[name] = is_supported or reason
            if is_supported != (refusal(recipe, capability()) is None):
                differences.append(name)
    if substitute.is_installed():
        substitute.pretend_device((9, 0))
    return {"answers": answers, "differences": differences, "passed": not differences}


CASES: dict[str, Callable[[], dict[str, Any]]] = {
    "layers": check_layers,
    **{f"emulation_{recipe}": lambda recipe=recipe: check_emulation(recipe) for recipe in RECIPES},
    "calibration": check_calibration,
    **{f"resume_{recipe}": lambda recipe=recipe: check_resume(recipe) for recipe in ("none", *RECIPES)},
    **{f"evaluation_{recipe}": lambda recipe=recipe: check_evaluation(recipe) for recipe in RECIPES},
    **{f"graphs_{recipe}": lambda recipe=recipe: check_graphs(recipe) for recipe in ("none", "tensorwise")},
    "first_layers": check_first_layers,
    "crossing": check_crossing,
    "capability": check_capability,
}

NOTE = """Errors are relative, of single tensors of a first step in float32: layers beside megamask's own, emulation
beside the library's FP8, on that of four batches which is nearest, and on all four. `resume`, `evaluation` and `graphs`
compare bits of steps and of all weights. `none` and the recipes are values of precision.fp8. Emulated kernels are
those of tools/te_on_cpu/kernels.py, graphs are recorded operations; everything else is the library's."""


def main() -> int:
    """Return 0 if every chosen case passed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=sorted(CASES), default=list(CASES), help="these cases only")
    parser.add_argument("--json", type=Path, help="write the answers to this file")
    parser.add_argument("--markdown", type=Path, help="write a table of them to this file")
    parser.add_argument("--kernels", choices=("emulated", "library"), default="emulated", help="default: emulated")
    options = parser.parse_args()
    if options.kernels == "emulated":
        substitute.install()

    from megamask.engine.backend import select_backend
    from megamask.engine.process_group import destroy_process_group, init_process_group

    report = Report("te_on_cpu/check", "Transformer Engine's Python under the engine", options)
    columns = ["case", "passed", "seconds", "measured"]
    table = report.table(f"Cases, {options.kernels} kernels", columns, NOTE)
    answers: dict[str, dict[str, Any]] = {}
    report.keep("cases", answers)
    init_process_group(select_backend())
    for name in options.only:
        began = time.perf_counter()
        try:
            answers[name] = CASES[name]()
        except Exception as error:  # noqa: BLE001 - the next case is independent
            answers[name] = {"passed": False, "error": f"{type(error).__name__}: {error}"}
        answer = answers[name]
        print(f"{'passed' if answer['passed'] else 'FAILED'}  {name}  {json.dumps(answer)}", flush=True)
        measured = ", ".join(
            f"{key}: {shown(value)}" for key, value in answer.items() if key not in ("passed", "answers")
        )
        table.add(name, "yes" if answer["passed"] else "NO", time.perf_counter() - began, measured)
        report.save()
    destroy_process_group()
    report.finish()
    return 0 if all(answer["passed"] for answer in answers.values()) else 1


def shown(value: Any) -> str:
    """A figure with two digits; anything else as it is."""
    return f"{value:.1e}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    raise SystemExit(main())
