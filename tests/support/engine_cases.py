"""Tiny networks and synthetic batches for tests of the engine, with the oracle's answers beside them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megamask.config.schema.device import DeviceConfig
from megamask.config.schema.layout import LayoutConfig
from megamask.config.schema.optimizer import OptimizerConfig
from megamask.config.schema.precision import PrecisionConfig
from megamask.config.schema.training import TrainingConfig
from megamask.diffusion.corruption import CorruptedBatch, corrupt
from megamask.diffusion.philox import run_key
from megamask.diffusion.schedule import noise_schedule, stratified_times
from megamask.models.reference import ReferenceModel
from megamask.models.spec import ModelSpec
from megamask.models.vocabulary import Vocabulary
from megamask.objectives.base import Objective, Reading, scored_rows
from megamask.objectives.masked import MaskedObjective
from megamask.objectives.phased import PhasedObjective
from megamask.objectives.wrapped import Wrapped
from support.specs import OPTIONS, PLAIN  # noqa: F401 - tests of the engine import both from here

SEED = 11
GLOBAL_BATCH_SIZE = 8
SEQUENCE_LENGTH = 32
LEARNING_RATE = 1e-2


@dataclass
class SyntheticBatch:
    tokens: torch.Tensor
    is_eligible: torch.Tensor
    sample_index: torch.Tensor
    batch_position: torch.Tensor
    content_sum: int


def vocabulary(spec: ModelSpec) -> Vocabulary:
    return Vocabulary(
        vocab_size=spec.vocab_size,
        padded_vocab_size=spec.padded_vocab_size,
        mask_token_id=spec.vocab_size - 1,
        eod_token_id=spec.vocab_size - 3,
        pad_token_id=spec.vocab_size - 2,
    )


def objective(
    *,
    complementary: bool = True,
    mask_logit: str = "excluded",
    z_loss_weight: float = 0.0,
    spec: ModelSpec = PLAIN,
) -> MaskedObjective:
    return MaskedObjective(
        vocabulary=vocabulary(spec),
        noise_schedule="linear",
        complementary=complementary,
        mask_logit=mask_logit,
        z_loss_weight=z_loss_weight,
    )


def masked_scores(engine: Any, x_t: torch.Tensor, x_0: torch.Tensor, is_masked: torch.Tensor) -> torch.Tensor:
    """Row sums of the cross entropy of masked positions, by the engine."""
    scores: torch.Tensor = engine.score(scored_rows(x_t, x_0, is_masked))
    return scores


def reading(x_t: torch.Tensor, is_open: torch.Tensor) -> Reading:
    """The forward pass of the masked decoder."""
    return objective().decoder.reading(x_t, is_open)


def excluded(goal: MaskedObjective, spec: ModelSpec) -> frozenset[int]:
    return dataclasses.replace(goal, vocabulary=vocabulary(spec)).excluded_ids


def num_views(goal: Objective) -> int:
    return goal.shape(SEQUENCE_LENGTH).num_views


def save_state(engine: Any, folder: Path, *, copy: bool = False) -> list[str]:
    """Writes an engine's state as a checkpoint does; collective. Returns the names of this rank's files."""
    return write_share(engine, engine.state_share(copy=copy), folder)


def write_share(engine: Any, share: Any, folder: Path) -> list[str]:
    """Writes shares that were taken before; collective."""
    names: list[str] = share.write(folder)
    engine.barrier()
    if engine.is_main:
        share.check(folder)
    return names


def make_engine(
    spec: ModelSpec = PLAIN,
    layout: dict[str, Any] | None = None,
    *,
    micro_batch_size: int = 1,
    head_chunk_rows: int = 1024,
    goal: Any = None,
    compute: str = "fp32",
    layers: str = "auto",
    attention: str = "auto",
    fp8: dict[str, Any] | None = None,
    recompute: str = "none",
    overlap: bool = False,
    balance_over: str = "row",
    device: dict[str, Any] | None = None,
    z_loss_weight: float = 0.0,
    **optimizer: Any,
) -> Any:
    from megamask.engine.engine import Engine

    return Engine(
        spec,
        _goal(goal or objective(), spec, z_loss_weight),
        OptimizerConfig(**({"learning_rate": LEARNING_RATE} | optimizer)),
        LayoutConfig(**(layout or {})),
        TrainingConfig(
            steps=100,
            global_batch_size=GLOBAL_BATCH_SIZE,
            micro_batch_size=micro_batch_size,
            sequence_length=SEQUENCE_LENGTH,
            head_chunk_rows=head_chunk_rows,
            recompute=recompute,
            router_balance_over=balance_over,
        ),
        SEED,
        precision=PrecisionConfig(compute=compute, **(fp8 or {})),
        device=DeviceConfig(layers=layers, attention=attention, overlap_gradient_reduce=overlap, **(device or {})),
    )


def _goal(goal: Any, spec: ModelSpec, z_loss_weight: float) -> Any:
    if isinstance(goal, PhasedObjective | Wrapped):
        return goal
    return dataclasses.replace(goal, vocabulary=vocabulary(spec), z_loss_weight=z_loss_weight)


def batch(members: list[int], step: int) -> SyntheticBatch:
    """Places of the global batch of a step: learnable rows of different lengths, a large content hash for each."""
    indices = [(step - 1) * GLOBAL_BATCH_SIZE + place for place in members]
    rows, eligible = [], []
    for index in indices:
        generator = torch.Generator().manual_seed(index)
        row = torch.randint(0, 58, (SEQUENCE_LENGTH,), generator=generator)
        row[1::2] = (row[0::2] * 7 + 3) % 58
        rows.append(row)
        eligible.append(torch.arange(SEQUENCE_LENGTH) < SEQUENCE_LENGTH - index % 5)
    return SyntheticBatch(
        tokens=torch.stack(rows),
        is_eligible=torch.stack(eligible),
        sample_index=torch.tensor(indices),
        batch_position=torch.tensor(members),
        content_sum=sum((index + 1) * 0x9E3779B97F4A7C15 % 2**64 for index in indices) % 2**64,
    )


def take_step(engine: Any, step: int, learning_rate: float = LEARNING_RATE) -> Any:
    return engine.step(batch(engine.members(GLOBAL_BATCH_SIZE), step), step=step, learning_rate=learning_rate)


def noised(share: SyntheticBatch, step: int, spec: ModelSpec, goal: MaskedObjective) -> CorruptedBatch:
    """The noise of a complete global batch, made without the engine."""
    key = run_key(SEED)
    return corrupt(
        share.tokens,
        share.is_eligible,
        share.sample_index,
        stratified_times(step, GLOBAL_BATCH_SIZE, key),
        schedule=noise_schedule(goal.noise_schedule),
        complementary=goal.complementary,
        mask_token_id=vocabulary(spec).mask_token_id,
        key=key,
    )


def reference(spec: ModelSpec) -> ReferenceModel:
    model = ReferenceModel(spec)
    model.initialize(SEED)
    return model


def reference_cross_entropy(
    model: ReferenceModel, x_t: torch.Tensor, x_0: torch.Tensor, is_masked: torch.Tensor, goal: MaskedObjective
) -> torch.Tensor:
    """Row sums from full logits: no row is left out, no position chosen."""
    logits = model.logits(model(x_t), excluded_ids=excluded(goal, model.spec))
    cross_entropy = torch.nn.functional.cross_entropy(logits.flatten(0, 1), x_0.flatten(), reduction="none")
    return (cross_entropy.view_as(x_0) * is_masked).sum(dim=1)


def reference_loss(model: ReferenceModel, step: int, goal: MaskedObjective) -> torch.Tensor:
    share = batch(list(range(GLOBAL_BATCH_SIZE)), step)
    rows = noised(share, step, model.spec, goal)
    sums = reference_cross_entropy(model, rows.x_t, rows.x_0, rows.is_masked, goal)
    return (sums * rows.weight).sum() / (int(share.is_eligible.sum()) * num_views(goal))


def reference_z_loss(model: ReferenceModel, step: int, goal: MaskedObjective) -> torch.Tensor:
    """Mean of (log Z)^2 over eligible tokens and views, from full logits."""
    share = batch(list(range(GLOBAL_BATCH_SIZE)), step)
    rows = noised(share, step, model.spec, goal)
    logits = model.logits(model(rows.x_t), excluded_ids=excluded(goal, model.spec))
    squares = logits.logsumexp(dim=-1).square()
    return (squares * rows.is_masked).sum() / (int(share.is_eligible.sum()) * num_views(goal))


def reference_noise_levels(
    model: ReferenceModel, step: int, goal: MaskedObjective
) -> tuple[list[float | None], list[int]]:
    """Mean cross entropy and number of the masked positions, by tenths of the mask probability as a float."""
    rows = noised(batch(list(range(GLOBAL_BATCH_SIZE)), step), step, model.spec, goal)
    with torch.no_grad():
        sums = reference_cross_entropy(model, rows.x_t, rows.x_0, rows.is_masked, goal).tolist()
    schedule, totals, counts = noise_schedule(goal.noise_schedule), [0.0] * 10, [0] * 10
    for place, t in enumerate(stratified_times(step, GLOBAL_BATCH_SIZE, run_key(SEED))):
        p = schedule.mask_probability(t)
        for view, probability in enumerate((p, 1 - p)[: num_views(goal)]):
            row = place * num_views(goal) + view
            totals[int(10 * probability)] += sums[row]
            counts[int(10 * probability)] += int(rows.is_masked[row].sum())
    return [total / count if count else None for total, count in zip(totals, counts, strict=True)], counts


def canonical_gradients(engine: Any) -> dict[str, torch.Tensor]:
    """Gradients in the buffers of a one-process engine, by canonical name."""
    return _canonical(engine, lambda parameter: getattr(parameter, "main_grad", parameter))


def canonical_weights(engine: Any) -> dict[str, torch.Tensor]:
    """Weights of a one-process engine, by canonical name."""
    return _canonical(engine, lambda parameter: parameter.detach())


def _canonical(engine: Any, of: Callable[[Any], torch.Tensor]) -> dict[str, torch.Tensor]:
    from megamask.models.shapes import canonical_shapes

    tensors = {name: torch.full(shape, float("nan")) for name, shape in canonical_shapes(engine._spec).items()}
    network = engine._rank_model.network
    for name, parameter in (*network.named_parameters(), *network.named_buffers()):
        for block in engine.parameters[name].canonical:
            rows = slice(block.first_row, block.first_row + block.sizes[0])
            tensors[block.name][block.index] = of(parameter)[rows]
    return tensors


def probe_rows(count: int, spec: ModelSpec) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x_t, x_0, is_masked of some rows with different numbers of masks, one of them with none."""
    x_0 = batch(list(range(count)), 77).tokens
    draws = torch.rand(x_0.shape, generator=torch.Generator().manual_seed(3))
    is_masked = draws < torch.arange(count)[:, None] / count
    return x_0.masked_fill(is_masked, vocabulary(spec).mask_token_id), x_0, is_masked


def report_fields(report: Any) -> dict[str, Any]:
    """Results that two runs must agree on."""
    fields = dataclasses.asdict(report)
    return {name: value for name, value in fields.items() if not name.endswith("_s")}


def as_json(value: Any) -> Any:
    return json.loads(json.dumps(value))
