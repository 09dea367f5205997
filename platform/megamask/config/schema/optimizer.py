"""AdamW and its learning-rate schedule."""

from __future__ import annotations

from dataclasses import dataclass

from megamask.config.schema.field import identity


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW with warm-up, a constant stage and a linear decay (WSD; decay_steps 0 leaves it constant)."""

    learning_rate: float = identity("peak learning rate", above=0)
    min_learning_rate: float = identity("learning rate at the end of the decay", default=0.0, minimum=0)
    warmup_steps: int = identity(
        "steps of linear warm-up; clipped to training.steps", default=0, minimum=0, unit="steps"
    )
    decay_steps: int = identity(
        "last steps of training.steps over which the rate falls linearly; clipped to what warm-up leaves",
        default=0,
        minimum=0,
        unit="steps",
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
