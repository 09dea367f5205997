"""Bytes of activations on one rank: what its layers keep for the backward pass, and how many micro-batches at once.

A layer keeps, per position, the inputs of both norms and of all four matrices, queries, keys and values as attention
reads them, attention's output and SwiGLU's input. Under context parallelism the keys and values are those of complete
rows, unless they go round in a ring. The test of this file counts what torch's hooks see being saved; a ring it cannot.
"""

from __future__ import annotations

from dataclasses import dataclass

from megamask.planning.subject import Subject

_FLOAT32 = 4
_TOKEN_ID = 8


@dataclass(frozen=True, kw_only=True)
class ActivationBytes:
    """A rank's activations at the fullest moment of a step.

    Args:
        layers: kept by the layers for the backward pass, all micro-batches in flight together.
        in_flight: micro-batches whose activations the rank's first chunk keeps at once.
        ends: embedding, final norm and the head's rows.
        workspace: gradients and recomputed activations of the layer that is being differentiated.
        logits: of the head's chunk, with their softmax and gradient.
    """

    layers: int
    in_flight: int
    ends: int
    workspace: int
    logits: int

    @property
    def total(self) -> int:
        """All but the logits."""
        return self.layers + self.ends + self.workspace


def activation_bytes(subject: Subject, *, pipeline_rank: int) -> ActivationBytes:
    """Count a rank's activations; ranks of the same pipeline stage are alike."""
    stages = subject.stages_of(pipeline_rank)
    last = len(stages) - 1
    passes = chunk_passes_in_flight(subject, pipeline_rank)
    held = sum(stored_by_layer(subject, layer) for stage in stages for layer in stage)
    # passes of the chunks alternate in groups, so that each chunk has its share of them
    layers = held * passes // len(stages)
    in_flight = -(-passes // len(stages))
    ends = in_flight * _embedding(subject) if subject.is_first(pipeline_rank, 0) else 0
    logits = 0
    if subject.is_last(pipeline_rank, last):
        ends += _final_norm(subject) + _head(subject)
        logits = _logits(subject)
    return ActivationBytes(layers=layers, in_flight=in_flight, ends=ends, workspace=_workspace(subject), logits=logits)


def chunk_passes_in_flight(subject: Subject, pipeline_rank: int) -> int:
    """Forward passes of chunks that wait for their backward pass, at most (megatron-core's two schedules)."""
    ranks, chunks = subject.axes.pipeline_parallel_size, subject.axes.virtual_pipeline_parallel_size
    passes = subject.num_micro_batches * chunks
    after = ranks - pipeline_rank - 1
    if chunks == 1:
        return min(passes, after + 1)
    return min(passes, 2 * after + (chunks - 1) * ranks + 1)


def stored_by_layer(subject: Subject, layer: int, *, is_complete: bool = False) -> int:
    """Bytes that a layer keeps of one micro-batch.

    Args:
        layer: its global number.
        is_complete: what it would keep without recomputation.
    """
    if subject.recompute == "full" and not is_complete:
        return subject.stored_positions * subject.spec.hidden_size * subject.format_bytes
    keeps_inner = is_complete or subject.recompute == "none"
    # inputs of both norms and of the first projection, and the norms' scales
    between = subject.stored_positions * (3 * subject.spec.hidden_size * subject.format_bytes + 2 * _FLOAT32)
    inside = _experts(subject) if subject.spec.has_experts(layer) else _feed_forward(subject, keeps_inner=keeps_inner)
    return between + _attention(subject, keeps_core=keeps_inner) + inside


def _attention(subject: Subject, *, keeps_core: bool) -> int:
    """Bytes between the first projection and the output projection, whose input is the last of them."""
    spec, ranks, size = subject.spec, subject.axes.tensor_parallel_size, subject.format_bytes
    queries = spec.num_attention_heads * spec.head_dim // ranks
    keys = spec.num_query_groups * spec.head_dim // ranks
    # gathering the queries of several groups copies them
    copied = queries if _is_grouped(subject) and spec.num_query_groups > ranks else 0
    each = queries * size
    if spec.qk_norm:  # a norm keeps its input and its scales
        each += copied * size + (spec.num_attention_heads + spec.num_query_groups) // ranks * _FLOAT32
    # values are a view of the stacked projections, which stay alive then, unless they are gathered or copied
    has_view = not _is_grouped(subject) and subject.axes.context_parallel_size == 1
    if spec.qk_norm or has_view or not keeps_core:
        each += (queries + 2 * keys) * size
    if keeps_core:
        return subject.positions * each + _attention_core(subject)
    each += (queries + keys if spec.qk_norm else copied) * size  # what the recomputed part begins with
    return subject.positions * each


def _attention_core(subject: Subject) -> int:
    """Bytes that the kernel keeps: turned queries, turned keys, values, its output, the sums of its softmax."""
    spec, ranks, context = subject.spec, subject.axes.tensor_parallel_size, subject.axes.context_parallel_size
    queries = spec.num_attention_heads * spec.head_dim // ranks * subject.format_bytes
    if (
        subject.has_ring and context > 1
    ):  # the library reads grouped keys and values as they are, and keeps a rank's own
        keys = spec.num_query_groups * spec.head_dim // ranks * subject.format_bytes
        return subject.positions * (2 * queries + 2 * keys + spec.num_attention_heads // ranks * _FLOAT32)
    # turned keys, and the gathered keys and values, of which the values are a view
    gathered = queries if context == 1 else 3 * queries
    if _is_grouped(subject):  # keys and values are copied for every query head
        gathered = 2 * queries
    return subject.positions * (2 * queries + context * gathered + spec.num_attention_heads // ranks * _FLOAT32)


def _is_grouped(subject: Subject) -> bool:
    return subject.spec.num_query_groups != subject.spec.num_attention_heads


def _feed_forward(subject: Subject, *, keeps_inner: bool = True) -> int:
    """Inputs of the first matrix, of SwiGLU and of the second matrix."""
    spec, size = subject.spec, subject.format_bytes
    inner = 3 * spec.ffn_hidden_size // subject.axes.tensor_parallel_size if keeps_inner else 0
    return subject.stored_positions * spec.hidden_size * size + subject.positions * inner * size


def _experts(subject: Subject) -> int:
    """Bytes of a layer with experts whose tokens are spread evenly; the most loaded rank keeps more.

    A token's row is copied for each of its experts, whose SwiGLU keeps five widths beside the input of the second
    matrix; the router computes in float32.
    """
    spec, axes, size = subject.spec, subject.axes, subject.format_bytes
    experts = spec.experts
    assert experts is not None  # of a layer that has them
    width = experts.ffn_hidden_size // axes.expert_tensor_parallel_size
    visits = subject.stored_positions * experts.topk * axes.expert_tensor_parallel_size
    of_router = spec.hidden_size * _FLOAT32 + experts.num_experts * (3 * _FLOAT32 + 2)
    stored = visits * ((spec.hidden_size + 6 * width) * size + _TOKEN_ID + _FLOAT32)
    stored += subject.stored_positions * of_router
    if shared := experts.shared_hidden_size // axes.tensor_parallel_size:
        # in float32 the router's input is that of the shared part
        stored += subject.stored_positions * spec.hidden_size * (0 if size == _FLOAT32 else size)
        stored += subject.positions * 5 * shared * size
    return stored


def _embedding(subject: Subject) -> int:
    return subject.positions * (_TOKEN_ID + (1 if subject.compute != "fp32" else 0))


def _final_norm(subject: Subject) -> int:
    return subject.stored_positions * (subject.spec.hidden_size * subject.format_bytes + _FLOAT32)


def _head(subject: Subject) -> int:
    """The head's input, the gradients of its rows and the float32 gradient of its matrix."""
    spec = subject.spec
    of_matrix = spec.padded_vocab_size // subject.axes.tensor_parallel_size * spec.hidden_size * _FLOAT32
    rows = subject.positions + _head_rows(subject)
    return rows * spec.hidden_size * subject.format_bytes + of_matrix


def _head_rows(subject: Subject) -> int:
    return subject.head_rows * subject.micro_batch_size // subject.axes.context_parallel_size


def _logits(subject: Subject) -> int:
    chunk = min(subject.head_chunk_rows, _head_rows(subject))
    columns = subject.spec.padded_vocab_size // subject.axes.tensor_parallel_size
    is_wide = subject.compute == "fp32"
    each = _FLOAT32 if is_wide else subject.format_bytes + _FLOAT32 + subject.format_bytes  # logits, softmax, gradient
    return chunk * columns * each


def _workspace(subject: Subject) -> int:
    spec, axes, size = subject.spec, subject.axes, subject.format_bytes
    width = spec.ffn_hidden_size // axes.tensor_parallel_size
    if spec.experts is not None:
        visited = spec.experts.topk * spec.experts.ffn_hidden_size + spec.experts.shared_hidden_size
        width = max(width, visited // axes.tensor_parallel_size)
    gradients = subject.positions * (2 * spec.hidden_size + 3 * width) * size
    return gradients + _recomputed(subject)


def _recomputed(subject: Subject) -> int:
    """Bytes of the part that is being computed again: a layer, or its attention or dense feed-forward part."""
    spec = subject.spec
    if subject.recompute == "full":
        return max(stored_by_layer(subject, layer, is_complete=True) for layer in (0, spec.num_layers - 1))
    if subject.recompute == "selective":
        is_dense = not spec.has_experts(0)
        return max(_attention_core(subject), _feed_forward(subject) if is_dense else 0)
    return 0
