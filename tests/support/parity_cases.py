"""Layouts and kinds of networks for parity: what each rank of a case does, and whether the rules let it start."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megamask.config.identity import value_of
from megamask.config.load import load_train_config
from megamask.config.schema.device import DeviceConfig
from megamask.config.schema.layout import LayoutConfig
from megamask.config.schema.model import ModelConfig
from megamask.config.schema.roots import TrainConfig
from megamask.config.validate import all_problems
from megamask.data.content import content_digest
from megamask.models.context import Context
from megamask.models.experts import ExpertSpec
from megamask.models.spec import ModelSpec
from megamask.objectives.autoregressive import AutoregressiveObjective
from megamask.objectives.base import Samples
from megamask.objectives.block import BlockObjective
from megamask.objectives.masked import MaskedObjective
from support import engine_cases as cases
from support.command import ROOT

NUM_STEPS = 20
SAVED_STEP = 10
# Adam's first updates are the rate times a sign; a large rate would amplify each rounding of a gradient near zero.
LEARNING_RATE = 1e-3

# four layers: as many as the stages of two pipeline ranks with two virtual stages, or of four pipeline ranks
DENSE = dataclasses.replace(cases.PLAIN, num_layers=4, num_query_groups=4)
TIED = dataclasses.replace(DENSE, tie_embeddings=True, qkv_bias=True, qk_norm=True, padded_vocab_size=128)
EXPERTS = dataclasses.replace(
    DENSE,
    rotary_fraction=0.5,
    experts=ExpertSpec(
        num_experts=8,
        topk=2,
        ffn_hidden_size=24,
        num_shared=1,
        num_dense_layers=2,  # the first of two stages is dense
        score="sigmoid",
        scale=2.5,
        num_groups=4,
        topk_groups=2,
        has_bias=True,
        bias_rate=0.01,
        balance_weight=0.01,
    ),
)
VOCABULARY = cases.vocabulary(DENSE)


class PackedObjective(MaskedObjective):
    """Masked diffusion on rows of two documents that do not see each other; where they meet depends on the row."""

    def context(self, samples: Samples, step: int, key: tuple[int, int]) -> Context:
        """Documents and the positions that restart with them, for both views."""
        places = torch.arange(samples.tokens.size(1), device=samples.tokens.device).expand_as(samples.tokens)
        border = 5 + samples.sample_index[:, None] % 20
        is_second = places >= border
        return Context(
            positions=(places - border * is_second).repeat_interleave(2, dim=0),
            documents=is_second.long().repeat_interleave(2, dim=0),
        )


def _objective(kind: str) -> Any:
    if kind == "packed":
        plain = cases.objective(spec=DENSE)
        return PackedObjective(**{field.name: getattr(plain, field.name) for field in dataclasses.fields(plain)})
    return {
        "block": BlockObjective(vocabulary=VOCABULARY, block_size=8, clean_half="block_causal", mask_logit="excluded"),
        "autoregressive": AutoregressiveObjective(vocabulary=VOCABULARY, mask_logit="excluded"),
    }.get(kind)


# moe-recompute is a kind of the tests only
KINDS = ("dense", "moe", "packed", "recompute", "overlap", "bf16", "tied", "block", "autoregressive")
SPECS = {"tied": TIED, "moe": EXPERTS, "moe-recompute": EXPERTS}
# These change memory and speed only: their cells are compared with the dense network that has none of them.
BASE = {"recompute": "dense", "overlap": "dense", "moe-recompute": "moe"}
# Largest relative difference of loss and gradient norm that a cell may have: float32 cells differ by the order of sums,
# bf16 ones by roundings of activations.
FLOAT32_TOLERANCE, BF16_TOLERANCE = (1e-6, 1e-5), (1e-3, 2e-2)
# What must be equal, number for number.
EXACT = (
    "num_eligible",
    "scored_tokens",
    "masked_tokens",
    "masked_tokens_by_noise_level",
    "batch_digest",
    "content_digest",
)


def _layouts() -> Iterator[dict[str, Any]]:
    tensor, sequence = {"tensor_parallel_size": 2}, {"tensor_parallel_size": 2, "sequence_parallel": True}
    pipeline, data, context = ({f"{axis}_parallel_size": 2} for axis in ("pipeline", "data", "context"))
    virtual = pipeline | {"virtual_pipeline_parallel_size": 2}
    expert = {"expert_parallel_size": 2}
    yield from (tensor, sequence, {"tensor_parallel_size": 4}, {"tensor_parallel_size": 4, "sequence_parallel": True})
    yield from (pipeline, {"pipeline_parallel_size": 3}, {"pipeline_parallel_size": 4}, virtual)
    yield {"pipeline_parallel_size": 3, "pipeline_split": "balanced"}
    yield from (data, {"data_parallel_size": 4}, {"data_parallel_size": 8})
    yield from (context, {"context_parallel_size": 4}, {"context_parallel_size": 8})
    yield from (tensor | data, sequence | data, sequence | pipeline, pipeline | data, context | data)
    yield from (sequence | context, pipeline | context, virtual | context, sequence | virtual)
    yield from (sequence | pipeline | data, sequence | context | data, pipeline | context | data)
    yield sequence | virtual | context
    yield from (
        data | expert,
        {"data_parallel_size": 4, "expert_parallel_size": 4},
        sequence | expert,
        context | expert,
    )
    yield from (virtual | data | expert, sequence | data | expert | {"expert_tensor_parallel_size": 2})
    yield sequence | context | data | {"expert_parallel_size": 4}


LAYOUTS = tuple(_layouts())
_SHORT = {
    "tensor_parallel_size": "tp",
    "pipeline_parallel_size": "pp",
    "virtual_pipeline_parallel_size": "vpp",
    "context_parallel_size": "cp",
    "data_parallel_size": "dp",
    "expert_parallel_size": "ep",
    "expert_tensor_parallel_size": "etp",
}


def name_of(layout: dict[str, Any]) -> str:
    """A short name, as tp2-sp-dp2."""
    parts = [f"{_SHORT[key]}{value}" for key, value in layout.items() if key in _SHORT]
    parts += ["sp"] * bool(layout.get("sequence_parallel")) + ["balanced"] * ("pipeline_split" in layout)
    return "-".join(parts) or "one"


def num_processes(layout: dict[str, Any]) -> int:
    """Processes of a layout."""
    return LayoutConfig(**layout).num_processes


def micro_batch_size(layout: dict[str, Any]) -> int:
    """Samples of a forward pass: a rank has two micro-batches where the batch allows it, four under a pipeline."""
    config = LayoutConfig(**layout)
    is_plain_pipeline = config.pipeline_parallel_size > 1 and config.virtual_pipeline_parallel_size == 1
    return max(1, cases.GLOBAL_BATCH_SIZE // config.data_parallel_size // (4 if is_plain_pipeline else 2))


def settings(kind: str) -> dict[str, Any]:
    """Settings that a kind asks of the engine beside its network and objective."""
    return {
        "bf16": {"compute": "bf16"},
        "recompute": {"recompute": "full"},
        "moe-recompute": {"recompute": "full"},
        "overlap": {"overlap": True},
    }.get(kind, {})


def refusal(kind: str, layout: dict[str, Any]) -> str | None:
    """Return the rules' refusal of a case, or None; the rules are those of `megamask plan` and `megamask train`."""
    config = _config(kind, layout)
    problem = next(all_problems(config), None)
    return None if problem is None else problem.description(value_of(config, problem.key))


def _config(kind: str, layout: dict[str, Any]) -> TrainConfig:
    base = _tiny()
    training = dataclasses.replace(
        base.training,
        global_batch_size=cases.GLOBAL_BATCH_SIZE,
        micro_batch_size=micro_batch_size(layout),
        sequence_length=cases.SEQUENCE_LENGTH,
        recompute=settings(kind).get("recompute", "none"),
    )
    return dataclasses.replace(
        base,
        model=_model(SPECS.get(kind, DENSE)),
        layout=LayoutConfig(**layout),
        training=training,
        device=DeviceConfig(overlap_gradient_reduce=kind == "overlap"),
    )


@functools.cache
def _tiny() -> TrainConfig:
    return load_train_config(ROOT / "configs/run/tiny.yaml").config


def _model(spec: ModelSpec) -> ModelConfig:
    experts = spec.experts
    of_experts = (
        {}
        if experts is None
        else {
            "num_experts": experts.num_experts,
            "router_topk": experts.topk,
            "expert_ffn_hidden_size": experts.ffn_hidden_size,
            "num_dense_layers": experts.num_dense_layers,
        }
    )
    return ModelConfig(
        num_layers=spec.num_layers,
        hidden_size=spec.hidden_size,
        ffn_hidden_size=spec.ffn_hidden_size,
        num_attention_heads=spec.num_attention_heads,
        num_query_groups=spec.num_query_groups,
        head_dim=spec.head_dim,
        vocab_padding_multiple=spec.padded_vocab_size,
        **of_experts,
    )


def make(kind: str, layout: dict[str, Any]) -> Any:
    """An engine of a case."""
    return cases.make_engine(
        SPECS.get(kind, DENSE),
        layout,
        micro_batch_size=micro_batch_size(layout),
        goal=_objective(kind),
        **settings(kind),
    )


class Steps:
    """Steps of an engine, as JSON, with the digests that the journal writes; collective.

    Which samples a step took is asked of the ranks: each records the places that it computes, once for each set of
    complete rows.
    """

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        own = engine.members(cases.GLOBAL_BATCH_SIZE) if engine.mesh.is_counting_rank else []
        self._places = sorted(itertools.chain.from_iterable(engine.gather_objects(own)))

    def take(self, step: int) -> dict[str, Any]:
        """The report of a step."""
        report = cases.take_step(self._engine, step, LEARNING_RATE)
        indices = [(step - 1) * cases.GLOBAL_BATCH_SIZE + place for place in self._places]
        taken = hashlib.sha256(np.array(indices, dtype="<i8").tobytes()).hexdigest()[:16]
        digests = {"batch_digest": taken, "content_digest": content_digest(report.content_sum)}
        return cases.report_fields(report) | digests


def run_case(kind: str, layout: dict[str, Any], num_steps: int = NUM_STEPS) -> list[dict[str, Any]]:
    """The reports of a case's steps."""
    engine = make(kind, layout)
    steps = Steps(engine)
    reports = [steps.take(step) for step in range(1, num_steps + 1)]
    engine.close()
    return reports


def run_restart(root: str, kind: str, layout: dict[str, Any]) -> dict[str, Any]:
    """Stop at a step and continue; write the state, and write again what was read from one process' state of it."""
    folder = Path(root) / f"{kind}-{name_of(layout)}"
    engine = make(kind, layout)
    steps = Steps(engine)
    for step in range(1, SAVED_STEP + 1):
        steps.take(step)
    _write(engine, folder)
    expected = [steps.take(step) for step in (SAVED_STEP + 1, SAVED_STEP + 2)]
    digest = engine.parameter_digest()
    engine.close()
    again = make(kind, layout)
    again.load_state(folder)
    steps = Steps(again)
    found = [steps.take(step) for step in (SAVED_STEP + 1, SAVED_STEP + 2)]
    answer = {"is_equal": found == expected and again.parameter_digest() == digest}
    again.close()
    return answer


def reshard(root: str, kind: str, source: str, target: str, layout: dict[str, Any]) -> dict[str, Any]:
    """Read the state in one folder under a layout and write it to another one; the next step's report."""
    engine = make(kind, layout)
    engine.load_state(Path(root) / source)
    _write(engine, Path(root) / target)
    report = Steps(engine).take(SAVED_STEP + 1)
    own = sum(3 * shard.weight.numel() for shard in engine._optimizer.shards() if shard.info.is_stored)
    engine.close()
    return {"report": report, "stored": own}


def _write(engine: Any, folder: Path) -> None:
    if engine.is_main:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    engine.barrier()
    cases.save_state(engine, folder)


def differences(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> dict[str, Any]:
    """Largest relative difference of loss and gradient norm, whether all integers are equal, and router flips."""
    pairs = list(zip(found, expected, strict=True))
    return {
        "loss": max(abs(one["loss"] - two["loss"]) / abs(two["loss"]) for one, two in pairs),
        "grad_norm": max(abs(one["grad_norm"] - two["grad_norm"]) / two["grad_norm"] for one, two in pairs),
        "is_exact": all(one[name] == two[name] for one, two in pairs for name in EXACT),
        "flips": sum(_flips(one["expert_counts"], two["expert_counts"]) for one, two in pairs),
    }


def tolerance(kind: str) -> tuple[float, float]:
    """Largest relative difference of loss and gradient norm that a cell of a kind may have."""
    return BF16_TOLERANCE if kind == "bf16" else FLOAT32_TOLERANCE


def is_within(kind: str, difference: dict[str, Any]) -> bool:
    """Return True if a cell keeps its tolerance and has equal integers; with router flips there is no tolerance."""
    loss, grad_norm = tolerance(kind)
    is_near = difference["loss"] < loss and difference["grad_norm"] < grad_norm
    return difference["is_exact"] and (is_near or difference["flips"] > 0)


def _flips(found: list[list[int]] | None, expected: list[list[int]] | None) -> int:
    """Tokens that at least went to other experts: half the sum of the differences of the counts."""
    if found is None or expected is None:
        return 0
    layers = zip(found, expected, strict=True)
    return sum(abs(one - two) for pair in layers for one, two in zip(*pair, strict=True)) // 2


def run_cases(runs: list[list[Any]], num_steps: int = NUM_STEPS) -> list[list[dict[str, Any]]]:
    """The reports of several cases, one after another: kind and layout of each."""
    return [run_case(kind, layout, num_steps) for kind, layout in runs]


def run_restarts(root: str, runs: list[list[Any]]) -> list[dict[str, Any]]:
    """`run_restart` of several cases."""
    return [run_restart(root, kind, layout) for kind, layout in runs]


def run_reshards(root: str, kind: str, runs: list[list[Any]]) -> list[dict[str, Any]]:
    """`reshard` of one kind: folder read, folder written and layout of each."""
    return [reshard(root, kind, source, target, layout) for source, target, layout in runs]
