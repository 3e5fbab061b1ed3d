"""The kernel, by Triton's interpreter where there is no GPU, and the loss that uses it."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch

from verl_speculator.losses import linear_cross_entropy

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")


@pytest.mark.skipif(INTERPRETED or torch.cuda.is_available(), reason="the tests below run as they are")
def test_by_the_interpreter() -> None:
    # Triton is interpreted if that was asked for before its first import.
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    run = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "5 passed, 1 skipped" in run.stdout


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch):
    if not INTERPRETED and not torch.cuda.is_available():
        pytest.skip("runs by the interpreter")
    from verl_speculator.losses import triton_cross_entropy

    # Blocks that do not divide the vocabulary, and more than one of them.
    monkeypatch.setattr(triton_cross_entropy, "_BLOCK", 16)
    return triton_cross_entropy


@pytest.fixture
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def test_losses_gradients_and_first_largest_logits(kernel, device: str) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(6, 43, generator=generator) * 3).to(device)
    logits[0, 5] = logits[0, 40] = 20.0  # a tie: the first of them is what decoding takes
    logits[1, 7] = -float("inf")
    logits[2] += 300.0
    targets = torch.tensor([5, 3, 42, 0, 17, int(logits[5].argmax())], device=device)
    exact = logits.double().requires_grad_()
    expected = torch.nn.functional.cross_entropy(exact, targets, reduction="none")
    expected.sum().backward()

    untouched, work = logits.clone(), logits.clone()
    losses, correct = logits.new_empty(6), torch.empty(6, dtype=torch.bool, device=device)
    kernel.cross_entropy_rows(untouched, targets, losses, correct, with_gradient=False)
    assert torch.equal(untouched, logits)
    kernel.cross_entropy_rows(work, targets, losses, correct, with_gradient=True)
    torch.testing.assert_close(losses.double(), expected.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(work.double(), exact.grad, rtol=1e-5, atol=1e-6)
    assert correct.tolist() == (logits.argmax(-1) == targets).tolist()

    targets[0] = 40
    kernel.cross_entropy_rows(logits.clone(), targets, losses, correct, with_gradient=False)
    assert not correct[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk_size", [4, None])
def test_the_loss_is_that_of_the_unfused_operations(kernel, device: str, dtype, chunk_size, monkeypatch) -> None:
    def run(fused):
        # The package gives the function under the module's name.
        monkeypatch.setattr(sys.modules[linear_cross_entropy.__module__], "_fused_rows", lambda device_type: fused)
        generator = torch.Generator().manual_seed(1)
        states = torch.randn(9, 8, generator=generator).to(device, dtype).requires_grad_()
        weight = torch.randn(37, 8, generator=generator).to(device, dtype).requires_grad_()
        targets = torch.randint(37, (9,), generator=generator).to(device)
        output = linear_cross_entropy(
            states, weight, targets, torch.rand(9, generator=generator).to(device), chunk_size=chunk_size
        )
        output.loss.backward()
        return [output.loss, output.row_losses, states.grad, weight.grad], output.correct

    values, correct = run(kernel)
    expected, expected_correct = run(None)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for value, other in zip(values, expected, strict=True):
        torch.testing.assert_close(value, other, rtol=tolerance, atol=tolerance)
    assert torch.equal(correct, expected_correct)
