"""Soft-target objectives against the formulas on whole logits, differentiated by autograd."""

import pytest
import torch
from torch import Tensor

from verl_speculator.errors import ConfigError
from verl_speculator.losses import soft_targets
from verl_speculator.losses.soft_targets import HeadRows, Objective, TargetHead, soft_target_loss

VOCAB, HIDDEN, WIDTH, POSITIONS = 13, 6, 5, 11
OBJECTIVES = [
    *({name: 1.0} for name in ("ce", "kl", "rkl", "tv", "nla", "lk")),
    {"kl": 0.9, "lk": 0.1},
    {"ce": 0.3, "rkl": 0.2, "tv": 1.5},
]


def formula(name: str, logits: Tensor, target_logits: Tensor, labels: Tensor) -> Tensor:
    q, p = logits.softmax(-1), target_logits.softmax(-1)
    overlap = torch.minimum(p, q).sum(-1)
    kl = (p * (p.log() - q.log())).sum(-1)
    return {
        "ce": -logits.log_softmax(-1).gather(-1, labels[:, None]).squeeze(-1),
        "kl": kl,
        "rkl": (q * (q.log() - p.log())).sum(-1),
        "tv": (p - q).abs().sum(-1) / 2,
        "nla": -overlap.log(),
        "lk": (-3 * overlap.detach()).exp() * kl + (1 - (-3 * overlap.detach()).exp()) * (1 - overlap),
    }[name]


def world(dtype=torch.float64, tied=True, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    rows = [torch.arange(POSITIONS), torch.tensor([1, 2, 5, 9]), torch.tensor([], dtype=torch.int64)]
    shared = draw(VOCAB, WIDTH).requires_grad_()
    heads = [
        HeadRows(
            draw(len(own), WIDTH).requires_grad_(),
            shared if tied else draw(VOCAB, WIDTH).requires_grad_(),
            torch.randint(VOCAB, (len(own),), generator=generator),
            torch.rand(len(own), generator=generator),
            own,
        )
        for own in rows
    ]
    return heads, draw(POSITIONS, HIDDEN), draw(VOCAB, HIDDEN)


def expected(heads, target_states, target_head: TargetHead, objective: Objective):
    total, rows = torch.zeros((), dtype=torch.float64), []
    for head in heads:
        logits = head.states.double() @ head.weight.double().t() / objective.temperature
        target = target_head.logits(target_states)[head.target_rows].double() / objective.temperature
        losses = sum(
            (w * formula(name, logits, target, head.labels) for name, w in objective.weights.items()),
            torch.zeros(len(logits)),
        )
        rows.append(losses)
        total = total + (losses * head.row_weights).sum()
    return total, rows


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("chunk_size", "block_elements"), [(1, 2**18), (4, 2**18), (None, 2**18), (None, 30)])
@pytest.mark.parametrize("weights", OBJECTIVES, ids=lambda weights: "+".join(weights))
def test_losses_and_gradients_are_those_of_the_formulas(weights, chunk_size, block_elements, tied, monkeypatch):
    monkeypatch.setattr(soft_targets, "_BLOCK_ELEMENTS", block_elements)
    heads, target_states, target_weight = world(tied=tied)
    objective = Objective(weights, temperature=0.7)
    target_head = TargetHead(target_weight)
    total, rows = expected(heads, target_states, target_head, objective)
    inputs = list({id(t): t for head in heads for t in (head.states, head.weight)}.values())
    wanted = torch.autograd.grad(2.5 * total, inputs, allow_unused=True)

    output = soft_target_loss(heads, target_states, target_head, objective, chunk_size=chunk_size)
    got = torch.autograd.grad(2.5 * output.loss, inputs)

    torch.testing.assert_close(output.loss, total, rtol=1e-12, atol=1e-12)
    for mine, theirs in zip(output.row_losses, rows, strict=True):
        torch.testing.assert_close(mine, theirs.detach(), rtol=1e-12, atol=1e-12)
    for mine, theirs, tensor in zip(got, wanted, inputs, strict=True):
        torch.testing.assert_close(mine, torch.zeros_like(tensor) if theirs is None else theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    "target", [{"bias": True}, {"scale": 0.25}, {"softcap": 1.5}, {"bias": True, "scale": 2.0, "softcap": 3.0}]
)
def test_what_a_target_does_to_its_logits(target):
    heads, target_states, weight = world()
    bias = torch.linspace(-1, 1, VOCAB, dtype=torch.float64) if target.pop("bias", False) else None
    head = TargetHead(weight, bias=bias, **target)
    logits = target_states @ weight.t() + (0 if bias is None else bias)
    logits = logits * head.scale
    logits = logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)
    torch.testing.assert_close(head.logits(target_states), logits)

    total, _ = expected(heads, target_states, head, Objective({"kl": 1.0}))
    torch.testing.assert_close(soft_target_loss(heads, target_states, head, Objective({"kl": 1.0})).loss, total)


def test_a_drafter_equal_to_its_target_has_nothing_to_learn():
    weight = torch.randn(VOCAB, HIDDEN, dtype=torch.float64)
    states = torch.randn(POSITIONS, HIDDEN, dtype=torch.float64)
    head = HeadRows(
        states.clone().requires_grad_(),
        weight.clone().requires_grad_(),
        torch.zeros(POSITIONS, dtype=torch.int64),
        torch.ones(POSITIONS),
        torch.arange(POSITIONS),
    )
    for name in ("kl", "rkl", "tv", "nla", "lk"):
        output = soft_target_loss([head], states, TargetHead(weight), Objective({name: 1.0}))
        gradient = torch.autograd.grad(output.loss, head.weight)[0]
        assert abs(output.loss.item()) < 1e-12, name
        assert gradient.abs().max() < 1e-12, name
        torch.testing.assert_close(output.overlaps[0], torch.ones(POSITIONS, dtype=torch.float64))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2), (torch.float16, 5e-3)])
@pytest.mark.parametrize("name", ["kl", "tv", "lk"])
def test_lower_precision(dtype, tolerance, name):
    heads, target_states, weight = world(dtype)
    objective = Objective({name: 1.0})
    exact = [head._replace(states=head.states.detach().double().requires_grad_()) for head in heads]
    total, _ = expected(exact, target_states.double(), TargetHead(weight.double()), objective)
    total.backward()

    output = soft_target_loss(heads, target_states, TargetHead(weight), objective)
    output.loss.backward()

    torch.testing.assert_close(output.loss.double(), total, rtol=tolerance, atol=tolerance)
    for head, reference in zip(heads[:2], exact, strict=False):
        assert head.states.grad.dtype == dtype
        error = (head.states.grad.double() - reference.states.grad).norm() / reference.states.grad.norm()
        assert error < tolerance * 2


def test_no_overlap_is_a_finite_loss():
    states = torch.tensor([[600.0, 0.0]]).requires_grad_()
    head = HeadRows(states, torch.eye(2), torch.tensor([1]), torch.ones(1), torch.tensor([0]))
    for name in ("kl", "rkl", "tv", "nla", "lk"):
        output = soft_target_loss(
            [head], torch.tensor([[0.0, 600.0]]), TargetHead(torch.eye(2)), Objective({name: 1.0})
        )
        (gradient,) = torch.autograd.grad(output.loss, states)
        assert torch.isfinite(output.loss), name
        assert torch.isfinite(gradient).all(), name


@pytest.mark.parametrize(
    ("weights", "temperature", "message"),
    [
        ({"kll": 1.0}, 1.0, "'kll' is none of ce, kl, .*; did you mean kl"),
        ({"kl": -1.0}, 1.0, "weight of kl must be 0 or a positive number, got -1.0"),
        ({"kl": 0.0}, 1.0, "at least one term"),
        ({}, 1.0, "at least one term"),
        ({"kl": 1.0}, 0.0, "temperature must be a positive number, got 0.0"),
    ],
)
def test_objectives_that_cannot_work(weights, temperature, message):
    with pytest.raises(ConfigError, match=message):
        Objective(weights, temperature)
