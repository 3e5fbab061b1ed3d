"""Reference decoding on a Hugging Face model, plain and speculative, and the arithmetic of acceptance."""

from verl_speculator.decoding.acceptance import AcceptanceRule, Verification
from verl_speculator.decoding.draft_model import DraftModel
from verl_speculator.decoding.drafters import Draft, DraftContext, Drafter, SpeculatorDrafter, StatefulDrafter
from verl_speculator.decoding.intervals import (
    Interval,
    acceptance_length_interval,
    ratio_interval,
    tokens_per_round_interval,
)
from verl_speculator.decoding.metrics import AcceptanceCounts, TargetForwards, predicted_speedup, sum_counts
from verl_speculator.decoding.ngram import NgramDrafter
from verl_speculator.decoding.results import DecodingResult
from verl_speculator.decoding.rules import parse_rule
from verl_speculator.decoding.sampling import SamplingParams
from verl_speculator.decoding.speculative import generate, speculative_generate
from verl_speculator.decoding.times import DecodingTimes

__all__ = [
    "AcceptanceCounts",
    "AcceptanceRule",
    "DecodingResult",
    "DecodingTimes",
    "Draft",
    "DraftContext",
    "DraftModel",
    "Drafter",
    "Interval",
    "NgramDrafter",
    "SamplingParams",
    "SpeculatorDrafter",
    "StatefulDrafter",
    "TargetForwards",
    "Verification",
    "acceptance_length_interval",
    "generate",
    "parse_rule",
    "predicted_speedup",
    "ratio_interval",
    "speculative_generate",
    "sum_counts",
    "tokens_per_round_interval",
]
