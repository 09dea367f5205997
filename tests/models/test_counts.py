"""Parameter and FLOP counts equal those of the built network; the presets have the sizes that their files state."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from megamask.config.schema.model import ModelConfig
from megamask.models.counts import active_parameter_count, flops_per_token, parameter_count
from megamask.models.reference import ReferenceModel
from megamask.models.spec import ModelSpec
from support.specs import small_spec

PRESETS = Path(__file__).parents[2] / "configs" / "model"
EXPERTS = {"num_experts": 4, "num_dense_layers": 1, "num_shared_experts": 2, "router_expert_bias": True}
# entries; billions (of tiny_moe millions) in all and of one token
WITH_EXPERTS = {
    "llada2_mini": (157184, 16.3e9, 1.4e9),
    "llada2_flash": (157184, 103e9, 6.1e9),
    "llada_moe": (157184, 7.4e9, 1.7e9),
    "qwen3_30b_a3b": (151936, 30.5e9, 3.4e9),
    "tiny_moe": (0, 0.41e6, 0.19e6),
}
GPT2_VOCABULARY, LLADA_VOCABULARY = 50257, 126464


def preset(name: str, vocab_size: int) -> ModelSpec:
    document = yaml.safe_load((PRESETS / f"{name}.yaml").read_text())
    assert list(document) == ["model"]
    return ModelSpec.from_config(ModelConfig(**document["model"]), vocab_size, 4096)


@pytest.mark.promise("parameter and FLOP counts are those of the built network")
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_embeddings": True},
        {"qk_norm": True},
        {"qkv_bias": True},
        {"head_dim": 20, "num_query_groups": 1},
        EXPERTS,
    ],
)
def test_parameter_count_is_that_of_the_built_network(changes: dict[str, int]) -> None:
    spec = small_spec(**changes)
    assert parameter_count(spec) == sum(parameter.numel() for parameter in ReferenceModel(spec).parameters())


@pytest.mark.promise("parameter and FLOP counts are those of the built network")
@pytest.mark.parametrize("changes", [{}, {"head_dim": 20, "num_query_groups": 4}])
@pytest.mark.parametrize("scored", [8, 32])
def test_flops_are_those_that_the_network_spends(changes: dict[str, int], scored: int) -> None:
    spec = small_spec(sequence_length=32, **changes)
    network = ReferenceModel(spec)
    network.initialize(1)
    x_t = torch.arange(64).reshape(2, 32)

    def run() -> torch.Tensor:
        hidden = network(x_t)[:, :scored]
        return network.logits(hidden).sum()

    counted = flops_per_token(spec, scored_fraction=scored / 32)
    with sdpa_kernel(SDPBackend.MATH):  # matrix products that the counter sees one by one
        with FlopCounterMode(display=False) as forward, torch.no_grad():
            run()
        with FlopCounterMode(display=False) as training:
            run().backward()
    assert forward.get_total_flops() == counted.forward * x_t.numel()
    assert training.get_total_flops() == counted.training * x_t.numel()


def test_flops_count_half_of_the_positions_as_scored_by_default() -> None:
    spec = small_spec()
    assert flops_per_token(spec) == flops_per_token(spec, scored_fraction=0.5)
    assert flops_per_token(spec).forward < flops_per_token(spec, scored_fraction=1.0).forward


@pytest.mark.parametrize(
    ("name", "vocab_size", "millions"),
    [
        ("tiny", 512, 0.14),
        ("quickstart", 512, 0.98),
        ("170m", GPT2_VOCABULARY, 169.2),
        ("170m", LLADA_VOCABULARY, 286.3),
        ("1b", GPT2_VOCABULARY, 1179),
        ("1b", LLADA_VOCABULARY, 1491),
        ("8b", GPT2_VOCABULARY, 7391),
        ("8b", LLADA_VOCABULARY, 8016),
        ("1.7b", 151_936, 1721),
        ("100b", 128_256, 100_438),
    ],
)
def test_presets_have_the_sizes_that_their_files_state(name: str, vocab_size: int, millions: float) -> None:
    assert parameter_count(preset(name, vocab_size)) / 1e6 == pytest.approx(millions, rel=0.005)


def test_8b_is_the_published_shape_of_llada() -> None:
    spec = preset("8b", LLADA_VOCABULARY)
    published = {
        "num_layers": 32,
        "hidden_size": 4096,
        "ffn_hidden_size": 12288,
        "num_attention_heads": 32,
        "num_query_groups": 32,
        "head_dim": 128,
        "rope_theta": 5e5,
        "norm_eps": 1e-5,
        "tie_embeddings": False,
        "qkv_bias": False,
        "qk_norm": False,
    }
    assert {name: getattr(spec, name) for name in published} == published


def test_every_preset_is_tested_and_can_be_split_in_two() -> None:
    assert {path.stem for path in PRESETS.glob("*.yaml")} == {
        *("tiny", "quickstart", "170m", "1b", "1.7b", "8b", "100b"),
        *WITH_EXPERTS,
    }
    for path in PRESETS.glob("*.yaml"):
        spec = preset(path.stem, 512)
        for size in (spec.num_layers, spec.num_attention_heads, spec.num_query_groups, spec.ffn_hidden_size):
            assert size % 2 == 0


@pytest.mark.parametrize("name", WITH_EXPERTS)
def test_presets_with_experts_have_the_sizes_that_their_files_state(name) -> None:
    vocab_size, total, active = WITH_EXPERTS[name]
    spec = preset(name, max(vocab_size, 1))
    outside = 2 * spec.hidden_size if vocab_size == 0 else 0
    assert parameter_count(spec) - outside == pytest.approx(total, rel=0.02)
    assert active_parameter_count(spec) - outside == pytest.approx(active, rel=0.03)
