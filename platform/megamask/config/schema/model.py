"""The shape of the network."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from megamask.config.rules.experts import ROUTER_CHOICES, ROUTER_SCORES, expert_problems
from megamask.config.rules.model import effective_query_groups, model_problems
from megamask.config.rules.problem import Problem
from megamask.config.schema.field import identity
from megamask.config.schema.objective import WITHOUT_FUTURE
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
    rotary_fraction: float = identity(
        "part of each head's channels, the first ones, that rotary positions turn", default=1.0, above=0, maximum=1
    )
    rope_theta: float = identity("base of the rotary position frequencies", default=10000.0, above=0)
    norm_eps: float = identity("epsilon of every RMSNorm", default=1e-5, above=0)
    init_std: float = identity("standard deviation of initial weights", default=0.02, above=0)
    vocab_padding_multiple: int = identity(
        "the vocabulary is padded to a multiple of this; padding never enters the loss",
        default=128,
        minimum=1,
        unit="entries",
    )

    num_experts: int = identity(
        "experts of each layer that has them; 0 for a dense network", default=0, minimum=0, unit="experts"
    )
    router_topk: int = identity(
        "experts that a token visits; where experts choose, on average", default=2, minimum=1, unit="experts"
    )
    expert_ffn_hidden_size: int | None = identity(
        "width of an expert; null means ffn_hidden_size", default=None, minimum=1, unit="channels"
    )
    num_shared_experts: int = identity(
        "widths of an expert that every token visits beside those chosen", default=0, minimum=0, unit="experts"
    )
    num_dense_layers: int = identity(
        "first layers that have a dense feed-forward part instead of experts", default=0, minimum=0, unit="layers"
    )
    router_score: str = identity(
        "a token's affinity to an expert: softmax over the experts, or sigmoid of each",
        default="softmax",
        choices=ROUTER_SCORES,
    )
    router_choice: str = identity(
        "tokens choose router_topk experts, or experts choose tokens, the same number from each row",
        default="tokens",
        choices=ROUTER_CHOICES,
    )
    router_normalize: bool = identity("the weights of a token's experts sum to router_scale", default=True)
    router_scale: float = identity("factor on the weights of a token's experts", default=1.0, above=0)
    router_groups: int = identity(
        "groups of experts; a token chooses among those of its router_topk_groups best", default=1, minimum=1
    )
    router_topk_groups: int = identity("groups that a token chooses among", default=1, minimum=1, unit="groups")
    router_expert_bias: bool = identity(
        "a bias for each expert, used in the choice alone; each step moves it towards experts with few tokens",
        default=False,
    )
    router_bias_rate: float = identity("how far a step moves an expert's bias", default=0.001, minimum=0)
    router_balance_weight: float = identity(
        "weight of the loss that spreads the tokens of each row over the experts", default=0.0, minimum=0
    )

    @property
    def experts(self) -> dict[str, Any] | None:
        """The numbers of the experts by the names of models/experts.py, defaults resolved; None for a dense network."""
        if self.num_experts == 0:
            return None
        return {
            "num_experts": self.num_experts,
            "topk": self.router_topk,
            "ffn_hidden_size": self.expert_ffn_hidden_size or self.ffn_hidden_size,
            "num_shared": self.num_shared_experts,
            "num_dense_layers": self.num_dense_layers,
            "score": self.router_score,
            "normalizes": self.router_normalize,
            "scale": float(self.router_scale),
            "num_groups": self.router_groups,
            "topk_groups": self.router_topk_groups,
            "choice": self.router_choice,
            "has_bias": self.router_expert_bias,
            "bias_rate": float(self.router_bias_rate) if self.router_expert_bias else 0.0,
            "balance_weight": float(self.router_balance_weight),
        }

    @property
    def effective_query_groups(self) -> int:
        """Key and value heads of each layer, the default resolved."""
        return effective_query_groups(self.num_attention_heads, self.num_query_groups)

    def problems(self, config: TrainConfig) -> Iterator[Problem]:
        """Heads, groups and widths that contradict one another, and a router that would see the future."""
        yield from model_problems(
            hidden_size=self.hidden_size,
            num_attention_heads=self.num_attention_heads,
            num_query_groups=self.num_query_groups,
            head_dim=self.head_dim,
            rotary_fraction=self.rotary_fraction,
        )
        objective = config.objective.name
        if self.num_experts > 0 and self.router_choice == "experts" and objective in WITHOUT_FUTURE:
            yield Problem(
                key="model.router_choice",
                because=f"but objective.name is {objective}: experts that choose among all tokens of a row show each "
                "token those behind it, which it may not see",
                allowed="tokens; or objective.name masked, uniform or mixed",
            )
        if self.num_experts > 0:
            yield from expert_problems(
                num_experts=self.num_experts,
                topk=self.router_topk,
                num_groups=self.router_groups,
                topk_groups=self.router_topk_groups,
                choice=self.router_choice,
                has_bias=self.router_expert_bias,
                balance_weight=self.router_balance_weight,
            )
