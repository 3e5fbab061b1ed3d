import importlib

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from verl_speculator.losses import linear_cross_entropy
from verl_speculator.losses.linear_cross_entropy import chunk_bytes, equal_chunks

# The package has the function under the module's name.
module = importlib.import_module("verl_speculator.losses.linear_cross_entropy")
CHUNK_SIZES = [1, 3, 7, 100, None]


def _inputs(num_rows=7, width=5, vocab_size=11, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(num_rows, width, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(vocab_size, width, generator=generator).to(dtype).requires_grad_()
    targets = torch.randint(vocab_size, (num_rows,), generator=generator)
    row_weights = torch.rand(num_rows, generator=generator)
    return states, weight, targets, row_weights


def _reference(states, weight, targets, row_weights):
    logits = (states @ weight.t()).to(torch.promote_types(states.dtype, torch.float32))
    losses = F.cross_entropy(logits, targets, reduction="none")
    return (losses * row_weights.to(losses.dtype)).sum(), losses, logits


@pytest.mark.parametrize("chunk_size", CHUNK_SIZES)
def test_gradcheck(chunk_size):
    states, weight, targets, row_weights = _inputs()

    def scaled_loss(s, w):
        return linear_cross_entropy(s, w, targets, row_weights, chunk_size=chunk_size).loss * -2.5

    assert torch.autograd.gradcheck(scaled_loss, (states, weight))


@pytest.mark.parametrize(("chunk_size", "block_elements"), [(2, 2**18), (16, 2**18), (None, 2**18), (16, 16 * 7)])
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)],
)
def test_equals_cross_entropy_of_the_whole_logits(dtype, tolerance, chunk_size, block_elements, monkeypatch):
    monkeypatch.setattr(module, "_BLOCK_ELEMENTS", block_elements)
    states, weight, targets, row_weights = _inputs(33, 16, 50, dtype)
    exact = [tensor.detach().double().requires_grad_() for tensor in (states, weight)]
    expected, losses, logits = _reference(*exact, targets, row_weights)
    (3 * expected).backward()

    output = linear_cross_entropy(states, weight, targets, row_weights, chunk_size=chunk_size)
    (3 * output.loss).backward()

    sum_dtype = torch.promote_types(dtype, torch.float32)
    assert output.loss.dtype == output.row_losses.dtype == sum_dtype
    assert not output.row_losses.requires_grad
    torch.testing.assert_close(output.loss.double(), expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(output.row_losses.double(), losses, rtol=tolerance, atol=tolerance)
    for tensor, want in zip((states, weight), exact, strict=True):
        assert tensor.grad.dtype == dtype
        error = (tensor.grad.double() - want.grad).norm() / want.grad.norm()
        assert error < tolerance
    if dtype.itemsize >= 4:
        assert torch.equal(output.correct, logits.argmax(1) == targets)


def test_bfloat16_weight_gradient_does_not_lose_small_chunks():
    states, weight, targets, row_weights = _inputs(512, 16, 20, torch.bfloat16)
    linear_cross_entropy(states, weight, targets, row_weights, chunk_size=2).loss.backward()
    exact = [tensor.detach().double().requires_grad_() for tensor in (states, weight)]
    _reference(*exact, targets, row_weights)[0].backward()
    error = (weight.grad.double() - exact[1].grad).norm() / exact[1].grad.norm()
    assert error < 1e-2


@pytest.mark.parametrize("chunk_size", [1, None])
def test_no_rows_give_zero_gradients_and_stay_in_the_graph(chunk_size):
    states, weight, targets, row_weights = _inputs(0)
    output = linear_cross_entropy(states, weight, targets, row_weights, chunk_size=chunk_size)
    assert output.loss.item() == 0
    output.loss.backward()
    assert states.grad.shape == (0, 5)
    assert torch.equal(weight.grad, torch.zeros_like(weight))


@pytest.mark.parametrize("block_elements", [1, 200 * 7, 2**18])
@pytest.mark.parametrize("chunk_size", [1, 4, None])
def test_a_tie_is_right_only_where_decoding_would_take_the_target(chunk_size, block_elements, monkeypatch):
    """Logits of a trained-looking row in bfloat16 are few different numbers, and the two largest are often the same."""
    monkeypatch.setattr(module, "_BLOCK_ELEMENTS", block_elements)
    generator = torch.Generator().manual_seed(0)
    states, weight = torch.randn(200, 8, generator=generator), torch.randn(64, 8, generator=generator)
    weight[32:] = weight[:32]  # every logit has a twin further on
    states, weight = states.bfloat16(), weight.bfloat16()
    first = (states @ weight.t()).argmax(dim=1)  # what decoding takes
    assert (first < 32).all()
    for targets, expected in ((first, True), (first + 32, False)):
        output = linear_cross_entropy(states, weight, targets, torch.ones(200), chunk_size=chunk_size)
        assert output.correct.tolist() == [expected] * 200


def test_extreme_logits_stay_finite():
    states = torch.tensor([[300.0, -300.0], [-300.0, 300.0]], requires_grad=True)
    weight = torch.eye(2, requires_grad=True)
    output = linear_cross_entropy(states, weight, torch.tensor([0, 0]), torch.ones(2))
    output.loss.backward()
    assert output.row_losses.tolist() == [0.0, 600.0]
    assert output.correct.tolist() == [True, False]
    assert states.grad.tolist() == [[0.0, 0.0], [-1.0, 1.0]]


def test_one_graph_can_be_used_twice():
    states, weight, targets, row_weights = _inputs()
    loss = linear_cross_entropy(states, weight, targets, row_weights).loss
    (first,) = torch.autograd.grad(loss * 2, weight, retain_graph=True)
    (second,) = torch.autograd.grad(loss * 3, weight, retain_graph=True)
    (both,) = torch.autograd.grad(loss + loss * 4, weight)
    torch.testing.assert_close(first / 2, second / 3)
    torch.testing.assert_close(both, first * 2.5)

    # The last pass gave its gradients away: one after it must say so rather than scale them twice.
    with pytest.raises(RuntimeError, match="retain_graph"):
        torch.autograd.grad(loss, weight)


@pytest.mark.parametrize("frozen", [0, 1])
def test_a_frozen_input_gets_no_gradient(frozen):
    inputs = _inputs()
    inputs[frozen].requires_grad_(False)
    expected = torch.autograd.grad(_reference(*inputs)[0], inputs[1 - frozen])
    actual = torch.autograd.grad(linear_cross_entropy(*inputs, chunk_size=3).loss, inputs[1 - frozen])
    torch.testing.assert_close(actual, expected)


def test_autocast_multiplies_in_its_type_and_returns_gradients_in_the_inputs():
    states, weight, targets, row_weights = _inputs(9, 16, 20, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = linear_cross_entropy(states, weight, targets, row_weights, chunk_size=4)
    output.loss.backward()
    plain = [tensor.detach().clone().requires_grad_() for tensor in (states, weight)]
    rounded = [tensor.bfloat16() for tensor in plain]
    expected = linear_cross_entropy(*rounded, targets, row_weights, chunk_size=4).loss
    expected.backward()
    assert output.loss.dtype == weight.grad.dtype == states.grad.dtype == torch.float32
    torch.testing.assert_close(output.loss, expected)
    torch.testing.assert_close(weight.grad, plain[1].grad, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("chunk_size", [0, -4])
def test_chunk_size_must_be_positive(chunk_size):
    with pytest.raises(ValueError, match="chunk_size"):
        linear_cross_entropy(*_inputs(), chunk_size=chunk_size)


class _Recorder(TorchDispatchMode):
    """The size of every result, and the name, of every operation."""

    def __init__(self):
        super().__init__()
        self.sizes: list[int] = []
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.names.append(func.name())
        results = result if isinstance(result, tuple | list) else [result]
        self.sizes += [out.numel() for out in results if isinstance(out, torch.Tensor)]
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_rows", [16, 64, 130])
def test_only_one_chunk_of_logits_ever_exists(num_rows, dtype):
    chunk_size, vocab_size, width = 4, 100, 2
    inputs = _inputs(num_rows, width, vocab_size, dtype)
    with _Recorder() as recorder:
        linear_cross_entropy(*inputs, chunk_size=chunk_size).loss.backward()
    assert max(recorder.sizes) == chunk_size * vocab_size


def test_without_gradients_only_the_logits_are_multiplied():
    inputs = _inputs(8)
    with torch.no_grad(), _Recorder() as recorder:
        linear_cross_entropy(*inputs, chunk_size=4)
    assert sum("mm" in name for name in recorder.names) == 2  # One for each of two chunks.
    with _Recorder() as recorder:
        linear_cross_entropy(*inputs, chunk_size=4).loss.backward()
    assert sum("mm" in name for name in recorder.names) == 6


@pytest.mark.parametrize(("gib", "mib"), [(80, 512), (160, 1024), (24, 153), (2, 128)])
def test_the_budget_of_a_chunk_follows_the_memory_of_the_device(gib, mib, monkeypatch) -> None:
    monkeypatch.setattr(torch.accelerator, "get_memory_info", lambda: (0, gib * 2**30))
    assert chunk_bytes.__wrapped__("cuda") // 2**20 == mib
    assert chunk_bytes.__wrapped__("cpu") == 128 * 2**20


def test_chunks_are_equal_whole_tiles_within_the_budget() -> None:
    vocab_size = 49152
    most = chunk_bytes("cpu") // (4 * vocab_size)
    for num_rows in (1, most, most + 1, 1638, 100 * most + 7):
        rows = equal_chunks(num_rows, vocab_size, "cpu")
        assert rows <= most
        assert rows == num_rows or rows % 64 == 0
        # No chunk more than the budget asks for, if the budget were whole tiles.
        assert -(-num_rows // rows) == -(-num_rows // (most // 64 * 64)) or num_rows <= most
