"""verl_speculator: train, measure and serve the draft heads of speculative decoding."""

__version__ = "0.1.0"
