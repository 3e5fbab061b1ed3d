"""Cross entropy of rows of logits and its gradient in one Triton kernel: the logits are read twice and written once.

On an accelerator what torch does between the matrix products of `linear_cross_entropy` is bound by memory: about ten
passes over a chunk of logits, most of them in float32. Log-sum-exp is accumulated block by block (Milakov and
Gimelshein 2018, arXiv:1805.02867).
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 4096


@triton.jit
def _cross_entropy_rows(  # type: ignore[no-untyped-def]
    logits, row_stride, targets, losses, correct, vocab_size, WITH_GRADIENT: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0)
    # Rows times vocabulary may be more than 32 bits hold.
    logits += row.to(tl.int64) * row_stride
    target = tl.load(targets + row)

    largest = -float("inf")
    first_largest = 0
    total = 0.0
    for start in range(0, vocab_size, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        block = tl.load(logits + columns, mask=columns < vocab_size, other=-float("inf")).to(tl.float32)
        largest_here = tl.max(block, axis=0)
        first_here = tl.argmax(block, axis=0, tie_break_left=True)
        # Only a larger one takes over, so that of equal logits the first stays.
        first_largest = tl.where(largest_here > largest, start + first_here, first_largest)
        larger = tl.maximum(largest, largest_here)
        total = total * tl.exp(largest - larger) + tl.sum(tl.exp(block - larger), axis=0)
        largest = larger
    logsumexp = largest + tl.log(total)
    tl.store(losses + row, logsumexp - tl.load(logits + target).to(tl.float32))
    tl.store(correct + row, first_largest == target)

    if WITH_GRADIENT:
        for start in range(0, vocab_size, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            block = tl.load(logits + columns, mask=columns < vocab_size, other=-float("inf")).to(tl.float32)
            gradient = tl.exp(block - logsumexp) - tl.where(columns == target, 1.0, 0.0)
            tl.store(logits + columns, gradient.to(logits.dtype.element_ty), mask=columns < vocab_size)


def cross_entropy_rows(
    logits: Tensor, targets: Tensor, losses: Tensor, correct: Tensor, *, with_gradient: bool
) -> None:
    """Fill in each row's loss and whether its target is the first largest logit; logits become their own gradient.

    Args:
        logits: [R, V], float32 or bfloat16; overwritten by `softmax - onehot` if `with_gradient`.
        targets: [R], int64.
        losses: [R], float32, overwritten.
        correct: [R], bool, overwritten.
    """
    rows, vocab_size = logits.shape
    block = min(_BLOCK, triton.next_power_of_2(vocab_size))
    _cross_entropy_rows[(rows,)](
        logits, logits.stride(0), targets, losses, correct, vocab_size, WITH_GRADIENT=with_gradient, BLOCK=block
    )
