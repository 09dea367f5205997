"""The network of a pipeline stage: megatron-core's GPT, with positions and attention pattern as inputs.

Shapes: b rows, s sequence, h hidden channels.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.transformer_config import TransformerConfig

from megamask.config.schema.device import DeviceConfig
from megamask.config.schema.precision import PrecisionConfig
from megamask.engine.embedding import WideSumEmbedding
from megamask.engine.embedding_noise import with_noise
from megamask.engine.gradients import announce_gradients
from megamask.engine.graphs import OPTIONS as GRAPH_OPTIONS
from megamask.engine.layers.attention import RowContext
from megamask.engine.layers.router import Routing
from megamask.engine.mesh import Mesh
from megamask.engine.sequence import SequencePart
from megamask.engine.specs.families import LayerFamily
from megamask.models.context import Context
from megamask.models.spec import ModelSpec

_FORMATS = {"fp32": torch.float32, "bf16": torch.bfloat16}


class DiffusionNetwork(GPTModel):  # type: ignore[misc]
    """One pipeline stage. The last stage returns hidden states, not logits: the head scores masked rows only.

    Attributes:
        complete: waits until a weight is gathered, where updated weights are gathered during the forward pass; modules
            do so by themselves when they are called.
    """

    complete: Callable[[torch.nn.Parameter], None] | None = None

    def encode(
        self,
        inputs: torch.Tensor | None,
        context: Context = Context(),  # noqa: B008 - frozen
        part: SequencePart | None = None,
    ) -> torch.Tensor:
        """Run this stage on the rows of one micro-batch.

        Args:
            inputs: int64 [b, s] ids on the first stage; later stages get their input from the pipeline.
            context: positions and attention pattern of the complete rows, on every stage.
            part: this rank's positions of the rows, which `inputs` holds; None for all.

        Returns: [s, b, h] on the last stage (all positions), the next stage's input elsewhere.
        """
        if self.pre_process:
            places = None if part is None else part.places
            self.embedding.word_embeddings.noise = (context.embedding_noise, places)
        hidden: torch.Tensor = self.forward(
            input_ids=inputs, position_ids=None, attention_mask=None, packed_seq_params=RowContext(context, part)
        )
        return hidden

    def output_weight(self) -> torch.Tensor:
        """Weight of the output layer, on the last stage; a tied embedding is its own. Shape: [vocabulary/tp, h]."""
        is_shared = self.share_embeddings_and_output_weights
        weight = self.shared_embedding_or_output_weight() if is_shared else self.output_layer.weight
        if self.complete is not None:
            self.complete(weight)
        return weight  # type: ignore[no-any-return]

    def _postprocess(self, hidden_states: torch.Tensor, **unused: Any) -> torch.Tensor:
        if self.post_process and self.config.sequence_parallel:
            return gather_from_sequence_parallel_region(  # type: ignore[no-any-return]
                hidden_states, tensor_parallel_output_grad=False, group=self.pg_collection.tp
            )
        return hidden_states


def build_network(
    spec: ModelSpec,
    mesh: Mesh,
    precision: PrecisionConfig,
    *,
    mask_token_id: int,
    family: LayerFamily,
    chunk: int = 0,
    routing: Routing | None = None,
    recompute: str = "none",
    attention: str = "sdpa",
    has_graphs: bool = False,
    are_experts_grouped: bool = False,
) -> DiffusionNetwork:
    """Build one of this rank's stages; its weights are undefined until the optimizer's shards are published.

    Args:
        chunk: which of the rank's stages, from 0.
        precision: number format of weights and activations, and of the layers' products under Transformer Engine.
        mask_token_id: the most frequent input id, whose gradient is summed by itself (embedding.py).
        family: of the layers' modules.
        routing: what the routers of this rank share; None for a dense network.
        recompute: training.recompute.
        attention: "sdpa" or "te".
        has_graphs: device.cuda_graphs.
        are_experts_grouped: a layer's experts on this rank are one grouped matrix product.
    """
    compute = _FORMATS[precision.compute]
    options = _recompute_options(recompute) | _fp8_options(precision) | (GRAPH_OPTIONS if has_graphs else {})
    config = _transformer_config(spec, mesh, compute, options)
    layers = mesh.layers(spec.num_layers, chunk)
    block = family.block_spec(
        config,
        len(layers),
        rope_theta=spec.rope_theta,
        rotary_channels=spec.rotary_channels,
        attention=attention,
    )
    if routing is not None:
        block = _experts().with_experts(block, layers, spec, routing, are_grouped=are_experts_grouped)
    network = DiffusionNetwork(
        config=config,
        transformer_layer_spec=block,
        vocab_size=spec.padded_vocab_size,
        max_sequence_length=spec.max_sequence_length,
        position_embedding_type="none",  # the attention module turns queries and keys itself
        share_embeddings_and_output_weights=spec.tie_embeddings,
        pre_process=mesh.stage(chunk) == 0,
        post_process=mesh.stage(chunk) == mesh.num_stages - 1,
        vp_stage=chunk if mesh.virtual_pipeline_size > 1 else None,
    )
    if network.pre_process and compute != torch.float32:
        # float32 runs keep torch's lookup: it sums in their own format already
        network.embedding.word_embeddings = WideSumEmbedding(network.embedding.word_embeddings, mask_token_id)
    if network.pre_process:
        network.embedding.word_embeddings = with_noise(network.embedding.word_embeddings, mesh)
    return network


def wrap_data_parallel(network: DiffusionNetwork, device: DeviceConfig, *, chunk: int = 0) -> DistributedDataParallel:
    """Add float32 gradient buffers and their sums over the data-parallel ranks, sharded for the optimizer.

    Args:
        device: with overlap_gradient_reduce sums are made while the backward pass of the last micro-batch goes on, with
            overlap_parameter_gather updated weights are gathered during the next forward pass.
        chunk: which of the rank's stages, from 0; only the first one's buffers are cut into buckets.
    """
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=True,
        average_in_collective=False,
        overlap_grad_reduce=device.overlap_gradient_reduce,
        overlap_param_gather=device.overlap_parameter_gather,
    )
    model = DistributedDataParallel(
        config=network.config, ddp_config=ddp_config, module=network, disable_bucketing=chunk > 0
    )
    if device.overlap_gradient_reduce:
        announce_gradients(network)
        network.config.no_sync_func = model.no_sync  # the sums begin with the last micro-batch
    if device.overlap_parameter_gather:
        network.complete = lambda weight: model.param_to_bucket_group[weight].finish_param_sync()
    return model


def _experts() -> ModuleType:
    """The module of layers with experts, whose import a dense network need not wait for."""
    return importlib.import_module("megamask.engine.specs.experts")


def _stages(spec: ModelSpec, mesh: Mesh) -> list[list[str]]:
    """megatron-core's description of the stages, in the network's order."""
    stages = [["decoder"] * len(layers) for layers in mesh.stage_layers(spec.num_layers)]
    stages[0].insert(0, "embedding")
    stages[-1].append("loss")
    return stages


def _transformer_config(
    spec: ModelSpec, mesh: Mesh, compute: torch.dtype, options: dict[str, Any]
) -> TransformerConfig:
    is_interleaved = mesh.virtual_pipeline_size > 1
    return TransformerConfig(
        num_layers=spec.num_layers,
        hidden_size=spec.hidden_size,
        num_attention_heads=spec.num_attention_heads,
        num_query_groups=spec.num_query_groups,
        kv_channels=spec.head_dim,
        ffn_hidden_size=spec.ffn_hidden_size,
        normalization="RMSNorm",
        layernorm_epsilon=spec.norm_eps,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        add_qkv_bias=spec.qkv_bias,
        qk_layernorm=spec.qk_norm,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=mesh.tensor_parallel_size,
        pipeline_model_parallel_size=mesh.pipeline_parallel_size,
        virtual_pipeline_model_parallel_size=mesh.virtual_pipeline_size if is_interleaved else None,
        pipeline_model_parallel_layout=_stages(spec, mesh) if mesh.num_stages > 1 else None,
        context_parallel_size=mesh.context_parallel_size,
        # With two pipeline ranks one batch of sends and receives could pair them in the wrong order, without an error.
        overlap_p2p_comm=is_interleaved,
        batch_p2p_comm=not is_interleaved,
        sequence_parallel=mesh.sequence_parallel,
        bf16=compute == torch.bfloat16,
        params_dtype=compute,
        pipeline_dtype=compute,
        # Where torch must be deterministic (backend.py) the embedding's gradient is too: megatron-core then indexes the
        # table, because the backward pass of torch's lookup may add rows in any order on CUDA.
        deterministic_mode=torch.are_deterministic_algorithms_enabled(),
        perform_initialization=False,  # the noise law sets every weight
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        bias_dropout_fusion=False,
        apply_rope_fusion=False,
        calculate_per_token_loss=True,  # gradients are summed, never averaged (law 3)
        finalize_model_grads_func=_finalize_gradients,
        **({} if spec.experts is None else _experts().expert_settings(spec, mesh)),
        **options,
    )


def _recompute_options(recompute: str) -> dict[str, Any]:
    if recompute == "none":
        return {}
    if recompute == "selective":
        return {"recompute_granularity": "selective", "recompute_modules": ["core_attn", "mlp"]}
    return {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}


def _fp8_options(precision: PrecisionConfig) -> dict[str, Any]:
    """Settings for Transformer Engine's kernels, whose contexts megatron-core enters itself."""
    if precision.fp8 == "none" or precision.fp8_kernels != "te":
        return {}
    options: dict[str, Any] = {
        "fp8": "hybrid" if precision.fp8 in ("tensorwise", "delayed") else "e4m3",
        "fp8_recipe": precision.fp8,
    }
    if precision.fp8 == "delayed":
        return options | {
            "fp8_amax_history_len": precision.fp8_amax_history,
            "fp8_amax_compute_algo": "max",
            "fp8_margin": precision.fp8_margin,
        }
    first, last = precision.fp8_first_layers_bf16, precision.fp8_last_layers_bf16
    if first or last:
        options |= {
            "first_last_layers_bf16": True,
            "num_layers_at_start_in_bf16": first,
            "num_layers_at_end_in_bf16": last,
        }
    return options


def _finalize_gradients(model: list[Any], num_tokens: torch.Tensor | None, **options: Any) -> None:
    """megamask's own division came before the backward pass; megatron-core's would go over the buffers once more."""
    finalize_model_grads(model, None, **options)
