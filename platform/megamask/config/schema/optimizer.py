"""AdamW and its learning-rate schedule."""

from __future__ import annotations

from dataclasses import dataclass

from megamask.config.schema.field import identity


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW and the schedule of its learning rate, which training/schedules.py defines."""

    learning_rate: float = identity("peak learning rate", above=0)
    lr_schedule: str = identity(
        "course of the learning rate after warm-up: constant; wsd (constant, then linear decay); cosine (down to "
        "training.steps); inverse_sqrt (peak * sqrt(warm-up / position), then linear decay)",
        default="wsd",
        choices=("constant", "cosine", "wsd", "inverse_sqrt"),
    )
    schedule_unit: str = identity(
        "what the learning-rate schedule counts: steps, or tokens (samples * training.sequence_length)",
        default="steps",
        choices=("steps", "tokens"),
    )
    min_learning_rate: float = identity("learning rate that a falling schedule ends at", default=0.0, minimum=0)
    warmup_steps: int = identity(
        "steps of linear warm-up; clipped to training.steps", default=0, minimum=0, unit="steps"
    )
    warmup_tokens: int = identity(
        "tokens of linear warm-up, with schedule_unit tokens; clipped to those of training.steps",
        default=0,
        minimum=0,
        unit="tokens",
    )
    decay_steps: int = identity(
        "last steps of training.steps over which the rate falls linearly; clipped to what warm-up leaves",
        default=0,
        minimum=0,
        unit="steps",
    )
    decay_tokens: int = identity(
        "last tokens of the run over which the rate falls linearly, with schedule_unit tokens; clipped likewise",
        default=0,
        minimum=0,
        unit="tokens",
    )
    weight_decay: float = identity(
        "decoupled weight decay; the next keys say of which tensors beside matrices", default=0.1, minimum=0
    )
    weight_decay_on_norms: bool = identity("whether weight decay applies to the weights of norms", default=False)
    weight_decay_on_biases: bool = identity("whether weight decay applies to biases", default=False)
    weight_decay_on_embeddings: bool = identity(
        "whether weight decay applies to the token embedding, which tied embeddings share with the output layer",
        default=True,
    )
    beta1: float = identity("decay of the first moment", default=0.9, minimum=0, below=1)
    beta2: float = identity("decay of the second moment", default=0.95, minimum=0, below=1)
    eps: float = identity("term added to the denominator", default=1e-8, above=0)
    clip_grad_norm: float = identity("largest global gradient norm; 0 switches clipping off", default=1.0, minimum=0)
