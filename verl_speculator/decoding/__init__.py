"""Reference speculative decoding on a Hugging Face model, and the arithmetic of acceptance."""

from verl_speculator.decoding.metrics import AcceptanceCounts, sum_counts
from verl_speculator.decoding.speculative import DecodingResult, Drafter, greedy_generate, speculative_generate

__all__ = [
    "AcceptanceCounts",
    "DecodingResult",
    "Drafter",
    "greedy_generate",
    "speculative_generate",
    "sum_counts",
]
