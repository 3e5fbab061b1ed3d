"""Two bugs of vLLM's rejection sampler on CPU, both for drafts of any method (vLLM's own ngram too).

- `expand_batch_to_tokens` spreads each request's temperature, top-k and top-p over its tokens. Its kernel writes float
  values to a copy that is thrown away, so what is sampled at a temperature above 0 is garbage (seen in vLLM 0.28.0).
- `apply_sampling_constraints` takes the maximum of an empty tensor and stops the engine when requests use top-k in a
  step in which none of them has a draft, such as their first (seen in vLLM 0.32.0).

Whether an installed vLLM has them is tried out, not guessed from its version.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from vllm.logger import init_logger

logger = init_logger("vllm.verl_speculator")

Function = Callable[..., Tensor]


def apply_where_needed() -> list[str]:
    """Replace the functions that have their bug where this process runs on CPU; returns their names."""
    from vllm.platforms import current_platform
    from vllm.v1.sample import rejection_sampler

    if not current_platform.is_cpu():
        return []
    mended = []
    if not expands_correctly(rejection_sampler.expand_batch_to_tokens):
        rejection_sampler.expand_batch_to_tokens = expand_batch_to_tokens
        mended.append("expand_batch_to_tokens")
    if not accepts_no_drafts(rejection_sampler.apply_sampling_constraints):
        rejection_sampler.apply_sampling_constraints = skip_without_drafts(rejection_sampler.apply_sampling_constraints)
        mended.append("apply_sampling_constraints")
    for name in mended:
        logger.info("The %s of this vLLM is wrong for drafts on CPU; it is replaced by a correct one.", name)
    return mended


def expands_correctly(expand: Function) -> bool:
    """Whether `expand` does what it should on two small tensors; leftover memory cannot pass for both results."""
    for values, ends in (([0.375, 0.0, 2.5], [2, 3, 6]), ([0.8125, 1.75], [1, 4])):
        got = expand(torch.tensor(values), torch.tensor(ends, dtype=torch.int32), ends[-1], 0, 1)
        counts = [end - start for start, end in zip([0, *ends], ends, strict=False)]
        expected = [value or 1.0 for value, count in zip(values, counts, strict=True) for _ in range(count)]
        if got.tolist() != expected:
            return False
    return True


def expand_batch_to_tokens(
    x: Tensor, cu_num_tokens: Tensor, num_tokens: int, replace_from: int = 0, replace_to: int = 0
) -> Tensor:
    """[num_tokens] from `x` [B]: value i as often as request i has tokens, with `replace_from` replaced.

    `cu_num_tokens` [B] is the running total of tokens; arguments are those of vLLM's function.
    """
    counts = torch.diff(cu_num_tokens.long(), prepend=cu_num_tokens.new_zeros(1).long())
    replaced = x.masked_fill(x == replace_from, replace_to)
    return replaced.repeat_interleave(counts, output_size=num_tokens)


def accepts_no_drafts(apply_sampling_constraints: Function) -> bool:
    """Whether the function gets along with a request that uses top-k and has no drafts."""
    metadata = _TopKRequest(all_greedy=False, temperature=torch.ones(1), top_k=torch.ones(1, dtype=torch.int32))
    try:
        apply_sampling_constraints(torch.empty(0, 8), torch.zeros(1, dtype=torch.int32), metadata)
    except RuntimeError:
        return False
    return True


def skip_without_drafts(apply_sampling_constraints: Function) -> Function:
    @functools.wraps(apply_sampling_constraints)
    def apply(logits: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return apply_sampling_constraints(logits, *args, **kwargs) if len(logits) else logits

    return apply


class _TopKRequest:
    """As much of vLLM's `SamplingMetadata` as the function reads; what a version adds is absent, so None."""

    def __init__(self, **fields: Any) -> None:
        vars(self).update(fields)

    def __getattr__(self, name: str) -> None:
        return None
