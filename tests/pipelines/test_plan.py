"""`megamask plan` as a command: the contract's object, refusals, no torch."""

from __future__ import annotations

import subprocess
import sys

import pytest

from megamask.config.load import load_train_config
from megamask.models.spec import ModelSpec
from megamask.planning.answer import Request
from megamask_pipelines.plan import plan_run
from megamask_pipelines.subject import subject_of
from support.command import ROOT, TINY, megamask

CONFIG = ROOT / "configs" / "run" / "8b.yaml"
FIELDS = {
    "feasible",
    "reasons",
    "world_size",
    "layout",
    "per_rank",
    "model_parameters",
    "active_parameters",
    "flops_per_token",
    "step_time_s",
    "mfu",
    "tokens_per_second_per_gpu",
    "assumptions",
}


@pytest.mark.promise("`megamask plan` shows what fills the fullest rank and how long a step takes, without a device.")
def test_a_plan_has_every_field_of_the_contract() -> None:
    done = megamask("plan", CONFIG, "--gpu", "h200", "--vocab-size", 126464, "--json")
    answer = done.json
    assert done.code == 0, done.stderr
    assert set(answer) >= FIELDS
    assert answer["feasible"] and answer["world_size"] == 128
    assert answer["model_parameters"] == 8_015_581_184
    assert answer["assumptions"]["vocab_size"] == {"value": 126464, "meaning": "--vocab-size"}


def test_a_plan_for_people_names_the_parts() -> None:
    done = megamask("plan", CONFIG, "precision.compute=bf16")
    assert done.code == 0, done.stderr
    for part in ("fits", "optimizer", "MFU", "ETTR", "an estimate, not a measurement"):
        assert part in done.stdout


@pytest.mark.promise("a plan is made for the largest phase of the objective")
@pytest.mark.parametrize(
    ("overrides", "positions", "views"),
    [
        (["objective.name=block", "objective.block_schedule=[0:1,9:L]"], 256, 1),
        (["objective.name=block", "objective.block_schedule=[0:L]"], 128, 1),
        (["objective.complementary_until_tokens=100000"], 128, 2),
    ],
)
def test_largest_phase_is_planned(overrides: list[str], positions: int, views: int) -> None:
    config = load_train_config(TINY, overrides).config
    shape = subject_of(config, ModelSpec.from_config(config.model, 300, config.training.sequence_length)).shape
    assert (shape.input_length, shape.num_views) == (positions, views)


def test_another_rank_can_be_planned() -> None:
    answer = megamask("plan", CONFIG, "--rank", 127, "--json").json
    assert answer["per_rank"]["rank"] == 127 and answer["per_rank"]["logits_bytes"] > 0
    refused = megamask("plan", CONFIG, "--rank", 128)
    assert refused.code == 2 and "allowed: 0 to 127" in refused.stderr


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["layout.tensor_parallel_size=3"], "layout.tensor_parallel_size is 3"),
        (["layout.pipeline_parallel_size=5"], "layout.pipeline_parallel_size is 5"),
        (["layout.data_parallel_size=3"], "layout.data_parallel_size is 3"),
        (["training.sequence_length=4090"], "training.sequence_length is 4090"),
    ],
)
@pytest.mark.promise("A layout that `megamask train` refuses is refused by `megamask plan` with the same reason.")
def test_what_training_refuses_the_plan_refuses_alike(overrides: list[str], key: str) -> None:
    planned = megamask("plan", CONFIG, *overrides, "--json")
    trained = megamask("train", CONFIG, *overrides)
    assert planned.code == trained.code == 2
    assert key in planned.json["reasons"][0]
    assert planned.json["reasons"][0] in trained.stderr


def test_another_number_of_gpus_names_the_nearest_layout() -> None:
    done = megamask("plan", CONFIG, "--gpus", 100, "--json")
    assert done.code == 2
    assert "layout.data_parallel_size=4 uses 64" in done.json["reasons"][-1]


def test_a_search_answers_with_settings_that_can_be_pasted() -> None:
    answer = megamask("plan", CONFIG, "precision.compute=bf16", "--search", "--gpus", 64, "--json").json
    best = answer["layouts"][0]
    pasted = [f"{key}={str(value).lower()}" for key, value in best["settings"].items()]
    again = megamask("plan", CONFIG, "precision.compute=bf16", *pasted, "--json").json
    assert again["feasible"] and again["step_time_s"] == pytest.approx(best["step_time_s"])


def test_a_plan_loads_no_torch() -> None:
    code = f"""
import sys
from megamask_pipelines.cli.main import main
assert main(["plan", {str(CONFIG)!r}]) == 0
assert "torch" not in sys.modules and "megatron" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_format_that_the_gpu_does_not_have_is_a_reason() -> None:
    overrides = ["precision.compute=bf16", "precision.fp8=blockwise"]
    refused = megamask("plan", CONFIG, "--gpu", "a100", *overrides, "--json")
    assert refused.code == 2 and "precision.fp8 is 'blockwise'" in refused.json["reasons"][0]
    fp8 = megamask("plan", CONFIG, *overrides, "--json").json
    bf16 = megamask("plan", CONFIG, "precision.compute=bf16", "--json").json
    assert fp8["feasible"] and fp8["step_time"]["compute"] < bf16["step_time"]["compute"]


LARGE = ("dense_100b", "moe_100b", "dense_100b_32k", "moe_100b_128k")


@pytest.mark.promise("The configs of 100 billion parameters fit 512 and 1,024 H200 by the plan.")
@pytest.mark.parametrize("num_gpus", [512, 1024])
@pytest.mark.parametrize("name", LARGE)
def test_configs_of_100_billion_parameters_fit(name: str, num_gpus: int) -> None:
    loaded = load_train_config(CONFIG.with_name(f"{name}.yaml"))
    replicas = loaded.config.layout.data_parallel_size * num_gpus // 512
    loaded = load_train_config(CONFIG.with_name(f"{name}.yaml"), [f"layout.data_parallel_size={replicas}"])
    answer = plan_run(loaded, Request(gpu_name="h200", num_gpus=num_gpus, vocab_size=157_184))
    assert answer["feasible"], answer["reasons"]
    assert answer["world_size"] == num_gpus
    assert answer["model_parameters"] > 100e9
    if name.endswith("k"):
        assert answer["layout"]["context_parallel_size"] > 1
