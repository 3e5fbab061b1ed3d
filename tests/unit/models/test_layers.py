"""Norms in the number types that models are served in."""

from __future__ import annotations

import pytest
import torch

from verl_speculator.models.layers import EPS, RMSNorm, scale_hidden_states


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_squares_beyond_float16_are_summed(dtype) -> None:
    """300² is more than float16 can hold; the formula in float64 is what the norm should give."""
    x = (300 * torch.randn(5, 64, generator=torch.Generator().manual_seed(0))).to(dtype)
    norm = RMSNorm(64)
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    norm = norm.to(dtype)
    wide = x.double()
    normalised = wide / (wide.pow(2).mean(-1, keepdim=True) + EPS).sqrt()
    tolerance = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}[dtype]
    expected = normalised * norm.weight.double() + norm.bias.double()
    torch.testing.assert_close(norm(x).double(), expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(scale_hidden_states(x).double(), normalised / 2**0.5, rtol=tolerance, atol=tolerance)
    assert norm(x).dtype == dtype
