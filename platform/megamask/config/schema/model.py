"""The shape of the network."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megamask.config.rules.model import effective_query_groups, model_problems
from megamask.config.rules.problem import Problem
from megamask.config.schema.field import identity
from megamask.config.schema.section import Section

if TYPE_CHECKING:
    from megamask.config.schema.roots import TrainConfig


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Section):
    """A bidirectional transformer: RMSNorm, SwiGLU, rotary positions, grouped-query attention."""

    num_layers: int = identity("transformer layers", minimum=1, unit="layers")
    hidden_size: int = identity("width of the residual stream", minimum=1, unit="channels")
    num_attention_heads: int = identity("query heads of each layer", minimum=1, unit="heads")
    num_query_groups: int | None = identity(
        "key and value heads of each layer; null means num_attention_heads", default=None, minimum=1, unit="heads"
    )
    ffn_hidden_size: int = identity("width of the gated feed-forward layer", minimum=1, unit="channels")
    head_dim: int | None = identity(
        "channels of a head; null means hidden_size / num_attention_heads", default=None, minimum=2, unit="channels"
    )
    qk_norm: bool = identity("RMSNorm on each query and key head", default=False)
    qkv_bias: bool = identity("bias on the query, key and value projections", default=False)
    tie_embeddings: bool = identity("the output layer shares the embedding's weights", default=False)
    rope_theta: float = identity("base of the rotary position frequencies", default=10000.0, above=0)
    norm_eps: float = identity("epsilon of every RMSNorm", default=1e-5, above=0)
    init_std: float = identity("standard deviation of initial weights", default=0.02, above=0)
    vocab_padding_multiple: int = identity(
        "the vocabulary is padded to a multiple of this; padding never enters the loss",
        default=128,
        minimum=1,
        unit="entries",
    )

    @property
    def effective_query_groups(self) -> int:
        """Key and value heads of each layer, the default resolved."""
        return effective_query_groups(self.num_attention_heads, self.num_query_groups)

    def problems(self, config: TrainConfig) -> Iterator[Problem]:
        """Heads, groups and widths that contradict one another."""
        del config
        yield from model_problems(
            hidden_size=self.hidden_size,
            num_attention_heads=self.num_attention_heads,
            num_query_groups=self.num_query_groups,
            head_dim=self.head_dim,
        )
