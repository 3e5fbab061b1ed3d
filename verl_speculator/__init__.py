"""verl_speculator: train the draft heads of speculative decoding inside verl, and measure them."""

__version__ = "0.1.0"
