"""Cross entropy of `states @ weight.T` without the logits ever existing as a whole.

One pass over chunks of rows computes a chunk's logits, its losses and, while they are at hand, both gradients. Backward
has only to scale them. That is three matrix products, the fewest possible, and one chunk of memory.
"""

from __future__ import annotations

import functools
import importlib
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Larger chunks make the weight gradient, [V, D], be read and written less often; smaller ones save memory. On two AMD
# EPYC cores, at V = 49152 and D = 384, the three products of 341 rows reach 0.82 of torch.matmul's peak, those of 512
# rows 0.92, and of 832 rows 0.93: 128 MiB of float32 logits are enough. The accelerators' share is not tuned: 512 MiB
# of 80 GiB, more than on a CPU since they have wider matrix units, and less on one with less memory.
_CPU_CHUNK_BYTES = 128 * 2**20
_ACCELERATOR_SHARE = 1 / 160
_MIN_CHUNK_ROWS = 256
# Of a block of logits between the products: 1 MiB in float32, which a core's cache holds.
_BLOCK_ELEMENTS = 2**18
# Products of 341 and of 819 rows are a tenth slower on a CPU than those of whole tiles; matrix units want these anyway.
_TILE_ROWS = 64


class LinearCrossEntropyOutput(NamedTuple):
    """The loss and what it is made of.

    Attributes:
        loss: Scalar, the sum of `row_weights * row_losses`; the only part with a gradient.
        row_losses: [N], the unweighted cross entropies, detached.
        correct: [N], bool: the target is its row's first largest logit, the token that greedy decoding takes.
    """

    loss: Tensor
    row_losses: Tensor
    correct: Tensor


def linear_cross_entropy(
    states: Tensor,
    weight: Tensor,
    targets: Tensor,
    row_weights: Tensor,
    *,
    chunk_size: int | None = None,
) -> LinearCrossEntropyOutput:
    """Weighted sum of the cross entropies of `states @ weight.T` against `targets`.

    The products run in the inputs' type (or autocast's); log-sum-exp, losses and the sum of the weight gradient over
    chunks are float32, or float64 if the inputs are. float16 runs in float32: gradients computed ahead of the loss
    scale would underflow in it. Gradients go to `states` and `weight` only; second derivatives are not supported.

    Args:
        states: [N, D]; N may be 0, and then loss and gradients are zero.
        weight: [V, D].
        targets: [N], int64, each in [0, V).
        row_weights: [N], constants.
        chunk_size: Rows of logits that exist at a time; None chooses from a budget of bytes.
    """
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, or None to choose it; got {chunk_size}.")
    dtype = matmul_dtype(states, weight)
    # Casts outside of the Function are autograd's to undo, after it has applied the upstream scale.
    states = states.float() if states.dtype == torch.float16 else states
    weight = weight.float() if weight.dtype == torch.float16 else weight
    rows = min(chunk_size or equal_chunks(states.shape[0], weight.shape[0], states.device.type), max(len(states), 1))
    # Asked here, because inside of a Function gradients always look disabled.
    wants_grad = torch.is_grad_enabled()
    outputs = _LinearCrossEntropy.apply(states, weight, targets, row_weights, rows, dtype, wants_grad)
    return LinearCrossEntropyOutput(*outputs)


def matmul_dtype(*tensors: Tensor) -> torch.dtype:
    """The type in which products of these run: theirs or autocast's, and float32 for float16."""
    device_type = tensors[0].device.type
    dtype = functools.reduce(torch.promote_types, (tensor.dtype for tensor in tensors))
    if dtype != torch.float64 and torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
    return torch.float32 if dtype == torch.float16 else dtype


@functools.cache
def chunk_bytes(device_type: str) -> int:
    """The logits that may exist at a time, by the memory of the device."""
    if device_type == "cpu":
        return _CPU_CHUNK_BYTES
    _, memory = torch.accelerator.get_memory_info()
    return max(int(_ACCELERATOR_SHARE * memory), _CPU_CHUNK_BYTES)


def equal_chunks(num_rows: int, vocab_size: int, device_type: str) -> int:
    """Rows in each of the fewest chunks that the budget of bytes allows; at least 1."""
    largest = max(chunk_bytes(device_type) // (4 * vocab_size) // _TILE_ROWS * _TILE_ROWS, _MIN_CHUNK_ROWS)
    # Equal chunks: a short last one would waste most of a pass over the weight gradient.
    num_chunks = max(-(-num_rows // largest), 1)
    rows = max(-(-num_rows // num_chunks), 1)
    return rows if num_chunks == 1 else -(-rows // _TILE_ROWS) * _TILE_ROWS


@functools.cache
def _fused_rows(device_type: str) -> Any:
    """The module with the kernel for rows of logits; None where torch's own operations are to be used."""
    if device_type != "cuda" or find_spec("triton") is None:
        return None
    return importlib.import_module("verl_speculator.losses.triton_cross_entropy")


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,
        weight: Tensor,
        targets: Tensor,
        row_weights: Tensor,
        rows: int,
        dtype: torch.dtype,
        wants_grad: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        with torch.autocast(states.device.type, enabled=False):
            needs_grad_states, needs_grad_weight = (wants_grad and needed for needed in ctx.needs_input_grad[:2])
            work = _Pass(states.to(dtype), weight.to(dtype), rows, needs_grad_states, needs_grad_weight)
            row_weights = row_weights.to(work.sum_dtype)
            for start in range(0, states.shape[0], rows):
                chunk = slice(start, start + rows)
                work.run_chunk(chunk, targets[chunk], row_weights[chunk])
        # Not `save_for_backward`: these are nobody's inputs or outputs, and backward may give them away.
        ctx.gradients = [
            work.grad_states.to(states.dtype) if work.grad_states is not None else None,
            work.grad_weight.to(weight.dtype) if work.grad_weight is not None else None,
        ]
        ctx.mark_non_differentiable(work.row_losses, work.correct)
        return torch.dot(row_weights, work.row_losses), work.row_losses, work.correct

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        return (*scaled_gradients(ctx, grad_loss), None, None, None, None, None)


def scaled_gradients(ctx: Any, scale: Tensor) -> list[Tensor | None]:
    """The gradients that forward left in `ctx.gradients`, times `scale`, for a backward pass to return.

    Without a look at the scale, which would make the host wait for the device. In place where the graph is used this
    once: a new [V, D] costs in fresh pages about a fiftieth of the whole pass.
    """
    gradients = ctx.gradients
    if gradients is None:
        raise RuntimeError("Backward ran through this loss before: the first time needs retain_graph=True.")
    if _graph_is_kept():
        gradients = [None if grad is None else grad.clone() for grad in gradients]
    else:
        ctx.gradients = None
    return [None if grad is None else grad.mul_(scale.to(grad.dtype)) for grad in gradients]


def _graph_is_kept() -> bool:
    """Whether the running backward pass has `retain_graph`; True where torch (2.13 was checked) does not tell."""
    ask = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return True if ask is None else ask()


class _Pass:
    """The buffers and results of one pass over the rows.

    Logits are kept as [V, R], in which two of the three products are a tenth to a fifth faster on a CPU than in [R, V]:
    the vocabulary, not the rows, is then what a product's result has most of. The kernel for rows wants [R, V].
    """

    def __init__(self, states: Tensor, weight: Tensor, rows: int, needs_grad_states: bool, needs_grad_weight: bool):
        self.states_ND = states
        self.weight_VD = weight
        self.sum_dtype = torch.promote_types(states.dtype, torch.float32)
        num_rows, vocab_size = states.shape[0], weight.shape[0]

        self.fused = _fused_rows(states.device.type) if states.dtype != torch.float64 else None
        self.buffer = states.new_empty(rows * vocab_size)
        self.row_losses = states.new_zeros(num_rows, dtype=self.sum_dtype)
        self.correct = states.new_zeros(num_rows, dtype=torch.bool)
        self.grad_states = torch.empty_like(states) if needs_grad_states else None
        self.grad_weight: Tensor | None = None
        if needs_grad_weight:
            # The first chunk overwrites it, if there is one.
            new = torch.empty_like if num_rows else torch.zeros_like
            self.grad_weight = new(weight, dtype=self.sum_dtype)

    def run_chunk(self, chunk: slice, targets_R: Tensor, row_weights_R: Tensor) -> None:
        rows, vocab_size = targets_R.shape[0], self.weight_VD.shape[0]
        needs_grad = self.grad_states is not None or self.grad_weight is not None
        results = (self.row_losses[chunk], self.correct[chunk])
        states_RD, buffer = self.states_ND[chunk], self.buffer[: rows * vocab_size]
        if self.fused is not None:
            logits_RV = torch.mm(states_RD, self.weight_VD.t(), out=buffer.view(rows, vocab_size))
            self.fused.cross_entropy_rows(logits_RV, targets_R, *results, with_gradient=needs_grad)
            logits_VR = logits_RV.t()
        else:
            logits_VR = torch.mm(self.weight_VD, states_RD.t(), out=buffer.view(vocab_size, rows))
            _cross_entropy_columns(logits_VR, targets_R, *results, with_gradient=needs_grad)

        # The gradient of the unweighted losses is there now. The row weights scale [R, D], not [V, R].
        row_weights_R1 = row_weights_R.unsqueeze(1)
        if self.grad_states is not None:
            torch.mm(logits_VR.t(), self.weight_VD, out=self.grad_states[chunk]).mul_(row_weights_R1)
        if self.grad_weight is not None:
            weighted_RD = (states_RD * row_weights_R1).to(logits_VR.dtype)
            is_first = chunk.start == 0
            if self.grad_weight.dtype == logits_VR.dtype:
                self.grad_weight.addmm_(logits_VR, weighted_RD, beta=0 if is_first else 1)
            elif is_first:
                self.grad_weight.copy_(logits_VR @ weighted_RD)
            else:
                self.grad_weight.add_(logits_VR @ weighted_RD)


def _cross_entropy_columns(
    logits_VR: Tensor, targets_R: Tensor, losses_R: Tensor, correct_R: Tensor, *, with_gradient: bool
) -> None:
    """As `cross_entropy_rows` of the kernel, with torch's operations and logits [V, R].

    They run block by block of the vocabulary, so that all but the first find a block in the processor's cache.
    """
    vocab_size, rows = logits_VR.shape
    block_size = min(max(_BLOCK_ELEMENTS // rows, 1), vocab_size)
    sum_dtype = losses_R.dtype
    columns_R = torch.arange(rows, device=targets_R.device)
    target_logit_R = logits_VR[targets_R, columns_R].to(sum_dtype)
    # Right is the first of equal largest logits, which is what decoding takes: in bfloat16 a few rows in a hundred have
    # two. Blocks tell which of them has it first; in the target's own, no logit before the target may be the same.
    target_block_R = targets_R // block_size
    tokens_BR = target_block_R * block_size + torch.arange(block_size, device=targets_R.device).unsqueeze(1)
    near_BR = logits_VR[tokens_BR.clamp(max=vocab_size - 1), columns_R]
    has_equal_R = ((near_BR.to(sum_dtype) == target_logit_R) & (tokens_BR < targets_R)).any(0)

    blocks = logits_VR.split(block_size)
    largest, logsumexp = [], []
    for block_BR in blocks:
        # In place where that loses nothing: then the exponentials are there for the gradient.
        exp_BR = block_BR.to(sum_dtype)
        largest.append(exp_BR.amax(0))
        exp_BR.sub_(largest[-1]).exp_()
        logsumexp.append(exp_BR.sum(0).log_().add_(largest[-1]))
    logsumexp_R = torch.stack(logsumexp).logsumexp(0)
    max_logit_R, first_block_R = torch.stack(largest).max(0)
    torch.sub(logsumexp_R, target_logit_R, out=losses_R)
    correct_R.copy_((target_logit_R == max_logit_R) & (target_block_R == first_block_R) & ~has_equal_R)

    if not with_gradient:
        return
    for block_BR, largest_R in zip(blocks, largest, strict=True):
        if block_BR.dtype == sum_dtype:
            block_BR.mul_(torch.exp(largest_R - logsumexp_R))
        else:
            block_BR.copy_(torch.exp(block_BR - logsumexp_R))
    logits_VR[targets_R, columns_R] -= 1
