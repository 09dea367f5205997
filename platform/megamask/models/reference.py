"""The network in plain PyTorch: the oracle of tests, used by stand-alone evaluation and decoding.

Never used for training. The block is Llama's, with the attention pattern as an input; q/k norms as in Qwen3 and q/k/v
biases as in Qwen2 are options. Shapes: b rows, s positions, d hidden channels, n heads, g key/value heads, c channels
of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from megamask.models.context import Context, visible_mask
from megamask.models.experts import ExpertSpec
from megamask.models.initial_weights import initial_tensor
from megamask.models.routing import experts_choose, router_scores, tokens_choose
from megamask.models.spec import ModelSpec


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, with the statistics in float32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self._eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Same shape and type as x, [..., size]."""
        wide = x.float()
        scale = torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + self._eps)
        return self.weight * (wide * scale).to(x.dtype)


class Linear(nn.Module):
    """x @ weight.T (+ bias). Starts at zero: building a network draws nothing from a global generator."""

    def __init__(self, inputs: int, outputs: int, *, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(outputs, inputs))
        self.bias = nn.Parameter(torch.zeros(outputs)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """[..., inputs] -> [..., outputs]."""
        return functional.linear(x, self.weight, self.bias)


class Attention(nn.Module):
    """Grouped-query attention."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self._head_dim = spec.head_dim
        self._heads_per_group = spec.num_attention_heads // spec.num_query_groups
        queries, keys = spec.num_attention_heads * spec.head_dim, spec.num_query_groups * spec.head_dim
        self.q_proj = Linear(spec.hidden_size, queries, bias=spec.qkv_bias)
        self.k_proj = Linear(spec.hidden_size, keys, bias=spec.qkv_bias)
        self.v_proj = Linear(spec.hidden_size, keys, bias=spec.qkv_bias)
        self.o_proj = Linear(queries, spec.hidden_size)
        if spec.qk_norm:
            self.q_norm = RMSNorm(spec.head_dim, spec.norm_eps)
            self.k_norm = RMSNorm(spec.head_dim, spec.norm_eps)
        self._has_norms = spec.qk_norm

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor], mask: Tensor | None) -> Tensor:
        """[b, s, d] -> [b, s, d]; rotation of `rotary_positions`; mask bool [b or 1, 1, s, s], True is visible."""
        query, key, value = (self._heads(projection(x)) for projection in (self.q_proj, self.k_proj, self.v_proj))
        if self._has_norms:
            query, key = self.q_norm(query), self.k_norm(key)
        query, key = rotate(query, rotation), rotate(key, rotation)
        key, value = (part.repeat_interleave(self._heads_per_group, dim=1) for part in (key, value))
        mixed = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)  # [b, n, s, c]
        output: Tensor = self.o_proj(mixed.transpose(1, 2).flatten(2))
        return output

    def _heads(self, x: Tensor) -> Tensor:
        rows, positions, _ = x.shape
        return x.view(rows, positions, -1, self._head_dim).transpose(1, 2)


class FeedForward(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, hidden_size: int, width: int) -> None:
        super().__init__()
        self.gate_proj = Linear(hidden_size, width)
        self.up_proj = Linear(hidden_size, width)
        self.down_proj = Linear(width, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """[b, s, d] -> [b, s, d]."""
        output: Tensor = self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))
        return output


class ExpertFeedForward(nn.Module):
    """The weighted sum of the experts that a router chooses for each token, and of those that every token visits."""

    def __init__(self, hidden_size: int, experts: ExpertSpec) -> None:
        super().__init__()
        self._spec = experts
        self.gate = Linear(hidden_size, experts.num_experts)
        self.gate.register_buffer("expert_bias", torch.zeros(experts.num_experts) if experts.has_bias else None)
        self.experts = nn.ModuleList(
            FeedForward(hidden_size, experts.ffn_hidden_size) for _ in range(experts.num_experts)
        )
        if experts.num_shared:
            self.shared_experts = FeedForward(hidden_size, experts.shared_hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """[b, s, d] -> [b, s, d]."""
        weights, _, is_chosen = self.route(x)
        output = self.shared_experts(x) if self._spec.num_shared else torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            chosen = is_chosen[..., number]
            share = weights[..., number][chosen].unsqueeze(-1) * expert(x[chosen])
            output = output.index_put((chosen,), share.to(x.dtype), accumulate=True)
        return output

    def route(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Weights and scores (float32) and choice (bool), [b, s, e] each."""
        scores = router_scores(functional.linear(x.float(), self.gate.weight.float()), self._spec)
        if self._spec.choice == "experts":
            is_chosen = experts_choose(scores, self._spec)
            return scores * is_chosen * self._spec.scale, scores, is_chosen
        bias = dict(self.gate.named_buffers()).get("expert_bias")
        weights, is_chosen = tokens_choose(scores.flatten(0, 1), self._spec, bias)
        return weights.view_as(scores), scores, is_chosen.view_as(scores)


class Layer(nn.Module):
    """Attention and feed-forward, each behind a norm and added to the residual stream."""

    def __init__(self, spec: ModelSpec, number: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(spec.hidden_size, spec.norm_eps)
        self.self_attn = Attention(spec)
        self.post_attention_layernorm = RMSNorm(spec.hidden_size, spec.norm_eps)
        self.mlp = (
            ExpertFeedForward(spec.hidden_size, spec.experts)
            if spec.experts is not None and spec.has_experts(number)
            else FeedForward(spec.hidden_size, spec.ffn_hidden_size)
        )

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor], mask: Tensor | None) -> Tensor:
        """[b, s, d] -> [b, s, d]."""
        attended: Tensor = x + self.self_attn(self.input_layernorm(x), rotation, mask)
        output: Tensor = attended + self.mlp(self.post_attention_layernorm(attended))
        return output


class Backbone(nn.Module):
    """Embedding, layers and final norm; the module that canonical names call `model`."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(
            spec.vocab_size, spec.hidden_size, _weight=torch.zeros(spec.vocab_size, spec.hidden_size)
        )
        self.layers = nn.ModuleList(Layer(spec, number) for number in range(spec.num_layers))
        self.norm = RMSNorm(spec.hidden_size, spec.norm_eps)


class ReferenceModel(nn.Module):
    """The complete network on one device; its state dict has exactly the canonical names.

    Weights are zero until `initialize` or `load_state_dict` sets them.
    """

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.spec = spec
        self.model = Backbone(spec)
        if not spec.tie_embeddings:
            self.lm_head = Linear(spec.hidden_size, spec.vocab_size)

    def forward(self, inputs: Tensor, context: Context = Context()) -> Tensor:  # noqa: B008 - frozen
        """Final hidden states.

        Shapes: inputs int64 [b, s] below vocab_size -> [b, s, d].

        Args:
            context: positions and attention pattern of the rows; by default every position sees every position.
        """
        hidden: Tensor = self.model.embed_tokens(inputs)
        num_positions = inputs.shape[1]
        positions = context.positions
        if positions is None:
            positions = torch.arange(num_positions, device=inputs.device)[None]
        rotation = rotary_positions(self.spec, positions)
        mask = visible_mask(context, num_positions, inputs.device)
        mask = None if mask is None else mask.unsqueeze(1)  # the same for all heads
        for layer in self.model.layers:
            hidden = layer(hidden, rotation, mask)
        output: Tensor = self.model.norm(hidden)
        return output

    def logits(self, hidden: Tensor, *, excluded_ids: frozenset[int] = frozenset()) -> Tensor:
        """Scores over the real vocabulary.

        Args:
            hidden: [..., d] final hidden states, of any selection of positions.
            excluded_ids: ids whose logits are -inf.

        Returns:
            [..., vocab_size].
        """
        head = self.model.embed_tokens if self.spec.tie_embeddings else self.lm_head
        logits = functional.linear(hidden, head.weight)
        if not excluded_ids:
            return logits
        outside = torch.zeros(logits.shape[-1], dtype=torch.bool, device=logits.device)
        outside[sorted(excluded_ids)] = True
        return logits.masked_fill(outside, float("-inf"))

    @torch.no_grad()
    def initialize(self, seed: int) -> None:
        """Set every weight to its initial value under run.seed."""
        for name, parameter in self.named_parameters():
            parameter.copy_(initial_tensor(seed, name, self.spec, device=parameter.device))


def rotary_positions(spec: ModelSpec, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine of each position's angles; both halves of a head turn by the same angles.

    Shapes: positions int64 [b or 1, s] -> float32 [b or 1, 1, s, r], r of the c channels of a head.

    Source: RoFormer, arXiv:2104.09864, with the channels paired half by half as in Llama's Hugging Face layout.
    """
    channels = spec.rotary_channels
    exponent = torch.arange(0, channels, 2, dtype=torch.float32, device=positions.device) / channels
    frequency = 1.0 / spec.rope_theta**exponent
    angle = positions.float()[:, None, :, None] * frequency
    both = torch.cat((angle, angle), dim=-1)
    return both.cos(), both.sin()


def rotate(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Turn each channel pair (i, i + r/2) of [b, n, s, c] by its position's angle; of c channels the first r turn."""
    cosine, sine = rotation
    x, rest = x[..., : cosine.shape[-1]], x[..., cosine.shape[-1] :]
    first, second = x.chunk(2, dim=-1)
    turned = x * cosine.to(x.dtype) + torch.cat((-second, first), dim=-1) * sine.to(x.dtype)
    return torch.cat((turned, rest), dim=-1) if rest.shape[-1] else turned
