"""Capabilities of a machine as a table: golden rows, and the messages that a user reads."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megamask.config.schema.device import DeviceConfig
from megamask.config.schema.precision import PrecisionConfig
from megamask.planning.capability import RECIPES, Capability, allowed_recipes, chosen_layers, features, problems

NEW_CUDA = (13, 0)

# compute capability, CUDA -> recipes with kernels; of the checks of Transformer Engine 2.20.2
ROWS = [
    ((8, 0), NEW_CUDA, []),
    ((8, 9), NEW_CUDA, ["tensorwise", "delayed"]),
    ((9, 0), NEW_CUDA, ["tensorwise", "delayed", "blockwise"]),
    ((9, 0), (12, 8), ["tensorwise", "delayed"]),
    ((10, 0), NEW_CUDA, ["tensorwise", "delayed", "blockwise", "mxfp8"]),
    ((12, 0), NEW_CUDA, ["tensorwise", "delayed", "blockwise"]),
]


def machine(architecture=(9, 0), cuda=NEW_CUDA, te="2.20.2"):
    return Capability(architecture=architecture, cuda=cuda, transformer_engine=te)


def messages(capability, device=DeviceConfig(), num_experts=0, **precision):  # noqa: B008 - frozen
    settings = PrecisionConfig(**precision)
    found = problems(settings, device, capability, num_experts=num_experts)
    return [problem.description(getattr(settings, problem.key.split(".")[1], device)) for problem in found]


@pytest.mark.promise("FP8 recipes are allowed on exactly the architectures that have kernels for them")
@pytest.mark.parametrize(("architecture", "cuda", "recipes"), ROWS)
def test_recipes_of_an_architecture(architecture, cuda, recipes):
    capability = machine(architecture, cuda)
    assert allowed_recipes(capability) == recipes
    for recipe in RECIPES:
        assert bool(messages(capability, fp8=recipe, compute="bf16")) == (recipe not in recipes)


@pytest.mark.promise("a refused FP8 recipe names the reason, the allowed recipes and the key")
@pytest.mark.parametrize(
    ("capability", "recipe", "words"),
    [
        (machine(te=None), "delayed", ["Transformer Engine is not installed", "allowed: none; or tensorwise, delayed"]),
        (machine(None, None), "delayed", ["there is no GPU", "precision.fp8_kernels=emulate"]),
        (machine((8, 0)), "tensorwise", ["compute capability 8.9 or higher", "the GPU's is 8.0"]),
        (machine(cuda=(12, 4)), "blockwise", ["need CUDA 12.9 or higher", "built for CUDA 12.4"]),
        (machine(), "mxfp8", ["compute capability 10.0", "allowed: none, tensorwise, delayed, blockwise;"]),
        (machine((12, 0)), "mxfp8", ["no kernels for it from compute capability 12.0 on"]),
    ],
)
def test_a_refusal_names_reason_allowed_recipes_and_key(capability, recipe, words):
    [message] = messages(capability, fp8=recipe, compute="bf16")
    assert message.startswith(f"precision.fp8 is '{recipe}', but ")
    assert all(word in message for word in words), message


def test_emulation_needs_no_machine():
    for recipe in ("tensorwise", "delayed", "blockwise"):
        assert messages(Capability(), fp8=recipe, fp8_kernels="emulate") == []


@pytest.mark.parametrize(
    ("layers", "capability", "chosen"),
    [
        ("auto", Capability(), "local"),
        ("auto", machine(te=None), "local"),
        ("auto", machine(None), "local"),
        ("auto", machine(), "te"),
        ("local", machine(), "local"),
        ("te", machine(), "te"),
    ],
)
def test_layers_are_chosen_by_what_can_run(layers, capability, chosen):
    assert chosen_layers(PrecisionConfig(), DeviceConfig(layers=layers), capability) == chosen
    emulated = PrecisionConfig(fp8="delayed", fp8_kernels="emulate")
    assert chosen_layers(emulated, DeviceConfig(layers="auto"), capability) == "emulated"


@pytest.mark.promise("device.layers=auto takes the local layers for a mixture of experts")
def test_layers_of_a_mixture_of_experts_are_local():
    assert chosen_layers(PrecisionConfig(), DeviceConfig(), machine(), num_experts=8) == "local"
    assert messages(machine(), num_experts=8) == []
    [message] = messages(machine(), DeviceConfig(attention="te"), num_experts=8)
    assert "model.num_experts is 8" in message and message.endswith("allowed: auto, sdpa")


@pytest.mark.parametrize(
    ("capability", "off"),
    [
        (Capability(), ["GPU", "Transformer Engine", "fused Adam", *RECIPES, "apex"]),
        (machine(te=None), ["Transformer Engine", "fused Adam", *RECIPES, "apex"]),
        (machine(), ["mxfp8", "apex"]),
    ],
)
def test_features_of_a_machine_are_those_that_its_runs_may_use(capability, off):
    for feature in features(capability):
        assert (feature.reason is not None) == any(word in feature.name for word in off), feature
    assert {f"FP8 {recipe} (precision.fp8={recipe})" for recipe in RECIPES} < {
        each.name for each in features(capability)
    }


@pytest.mark.parametrize("capability", [Capability(), machine(None)])
def test_layers_that_cannot_run_are_refused(capability):
    [message] = messages(capability, DeviceConfig(experts="grouped"))
    assert "device.experts is" in message and "allowed: auto, sequential" in message
    [message] = messages(capability, DeviceConfig(layers="te"))
    assert "allowed: auto, local" in message


@pytest.mark.parametrize(
    ("device", "capability", "reason"),
    [
        ({"kernels": "compiled"}, Capability(missing_compiler="Triton is not installed"), "Triton is not installed"),
        ({"weight_gradients": "fused"}, Capability(), "the only ones that have a choice"),
        ({"cuda_graphs": True}, Capability(), "the only ones that have graphs"),
    ],
)
def test_kernels_that_cannot_run_are_refused(device, capability, reason):
    [message] = messages(capability, DeviceConfig(**device))
    assert reason in message
    assert messages(machine(), DeviceConfig(layers="te", **device)) == []


@pytest.mark.promise("an unrelated package named apex is not taken for NVIDIA's")
def test_an_unrelated_package_named_apex_is_recognised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from megamask.engine.probes import apex

    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    assert apex() == "absent"
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").touch()
    sys.path_importer_cache.clear()
    assert apex() == "unrelated"
    for extension in ("amp_C", "fused_weight_gradient_mlp_cuda"):
        (tmp_path / f"{extension}.py").touch()
    sys.path_importer_cache.clear()
    assert apex() == "present"


def test_megatron_core_does_not_find_an_unrelated_package_named_apex(tmp_path: Path):
    """In a process of its own: the package is hidden at the first import of the engine."""
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").touch()
    code = "import megamask.engine\ntry:\n import apex\nexcept ImportError:\n print('hidden')"
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["hidden"]


def test_no_requirements_name_apex():
    """The package index has an unrelated package of that name."""
    root = Path(__file__).parents[2]
    for name in ("pyproject.toml", "constraints.txt"):
        assert not re.search(r"^\W*apex\W*[=<>~;]", (root / name).read_text(encoding="utf-8"), re.MULTILINE)
