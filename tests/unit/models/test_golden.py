"""Checkpoints of the reference implementations give the reference's logits, losses and gradients."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from verl_speculator.models import Speculator

GOLDEN = Path(__file__).parents[2] / "data" / "golden"
CASES = sorted(folder.parent for folder in GOLDEN.glob("*/io.safetensors"))


@pytest.fixture(params=CASES, ids=lambda folder: folder.name)
def case(request):
    return request.param


def test_there_are_cases():
    assert len(CASES) >= 4


def test_logits(case):
    tensors = load_file(case / "io.safetensors")
    with torch.no_grad():
        logits = Speculator.from_pretrained(case)(tensors["state"], tensors["inds"])
    assert (logits - tensors["logits"]).abs().max() <= 1e-5


def test_loss_and_gradients(case):
    speculator = Speculator.from_pretrained(case)
    tensors, grads = load_file(case / "loss.safetensors"), load_file(case / "grads.safetensors")
    hidden, ids, mask = tensors["hidden"], tensors["ids"], tensors["mask"].bool()
    length = ids.shape[1] - speculator.n_predict - 1
    logits = speculator(hidden[:, :length], ids[:, 1:])
    losses = []
    for i in range(speculator.n_predict):
        target, trained = ids[:, i + 2 : length + i + 2], mask[:, i + 2 : length + i + 2]
        losses.append(F.cross_entropy(logits[i][trained], target[trained]))
    torch.testing.assert_close(torch.stack(losses), tensors["loss_per_head"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.stack(losses).sum(), tensors["loss_sum"].squeeze(), rtol=1e-5, atol=1e-5)
    torch.stack(losses).sum().backward()
    # Under the names of files: here a parameter may hold what the reference has in several.
    ours = speculator.file_views({name: parameter.grad for name, parameter in speculator.named_parameters()})
    assert ours.keys() == grads.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(ours[name], grad, rtol=1e-4, atol=1e-5, msg=lambda text, n=name: n + text)


def test_a_checkpoint_of_speculators_drafts_the_same():
    """Written by Speculators 0.9 itself, whose model gave these tokens in each step of its training-time test."""
    folder = GOLDEN / "eagle3_speculators_0.9"
    io = load_file(folder / "outputs.safetensors")
    model = Speculator.from_pretrained(folder)
    ids = io["input_ids"]
    length, width = ids.shape[1], model.config.input_hidden_dim
    outputs, _, _ = model(
        hidden_states=io["hidden_states"],
        input_ids=ids,
        document_ids=torch.zeros_like(ids),
        loss_mask=torch.ones_like(ids),
        position_ids=torch.arange(length)[None],
        verifier_last_hidden_states=torch.zeros(1, length, width),
        verifier_lm_head_weight=torch.zeros(model.config.vocab_size, width),
    )
    for k, output in enumerate(outputs):
        # Theirs goes on past the last token that there is to predict.
        assert model.lm_head(output).argmax(-1).tolist() == io[f"drafts_{k}"].tolist()[: length - 2 - k]
