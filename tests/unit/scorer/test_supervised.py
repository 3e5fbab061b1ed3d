from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch

from tests.unit.scorer.conftest import NEW, NUM_DRAFTS
from verl_speculator.errors import ConfigError, DataError
from verl_speculator.scorer.config import ScoringModelConfig
from verl_speculator.scorer.data import collect_windows
from verl_speculator.scorer.model import AutoModelForSPDScoring
from verl_speculator.scorer.supervised import SupervisedSettings, area_under_curve, fit_head, mismatch_features
from verl_speculator.scorer.windows import WindowFile


@pytest.fixture(scope="module")
def file(target, draft_model, questions, check):
    """Windows of which a scalar tells the label: a small margin is harmless."""
    from verl_speculator.decoding import DraftModel

    windows, scalars, _ = collect_windows(
        target,
        DraftModel(draft_model, NUM_DRAFTS),
        questions,
        num_drafts=NUM_DRAFTS,
        max_new_tokens=4 * NEW,
        batch_size=6,
        check=check,
        explore=0.5,
    )
    margin = scalars.index("margin")
    margins = [window.scalars[slot][margin] for window in windows for slot in window.mismatches]
    middle = sorted(margins)[len(margins) // 2]
    labelled = [
        dataclasses.replace(
            window,
            labels=[
                int(row[margin] < middle) if slot in window.mismatches else -1
                for slot, row in enumerate(window.scalars)
            ],
        )
        for window in windows
    ]
    return WindowFile(labelled, scalars, {})


def test_features_are_those_of_each_window_alone(target, file):
    config = ScoringModelConfig(32, lookahead=1)
    actor = AutoModelForSPDScoring.from_config(config, target.model)

    features, labels, owners = mismatch_features(actor, file, batch_size=7)

    columns = [file.scalars.index(name) for name in config.scalars]
    expected = {}
    for index, window in enumerate(file.windows):
        with torch.no_grad():
            hidden = target.model.get_decoder()(torch.tensor([window.input_ids])).last_hidden_state[0]
        for slot in window.mismatches:
            at = window.draft_start_idx + slot
            embedding = target.model.get_input_embeddings().weight[window.target_ids[slot]]
            after = slot + 1 < len(window.drafts)
            following = hidden[at + 1] if after else torch.zeros(32)
            flags = [float(after), float(after and window.drafts[slot + 1] == window.target_ids[slot + 1])]
            scalars = [window.scalars[slot][column] for column in columns]
            expected[index, slot] = torch.cat(
                [hidden[at - 1], hidden[at], embedding.detach(), following, torch.tensor([*flags, *scalars])]
            )
    found = {}
    for owner, group in itertools.groupby(zip(owners.tolist(), features, labels, strict=True), key=lambda one: one[0]):
        for slot, (_, row, label) in zip(file.windows[owner].mismatches, group, strict=True):
            found[owner, slot] = row
            assert label == file.windows[owner].labels[slot]
    assert found.keys() == expected.keys()
    for place, row in expected.items():
        torch.testing.assert_close(found[place], row, atol=1e-4, rtol=1e-4)


def test_a_head_learns_its_labels(target, file):
    torch.manual_seed(0)
    actor = AutoModelForSPDScoring.from_config(ScoringModelConfig(32, inner_dim=32, use_states=False), target.model)
    before = {name: tensor.clone() for name, tensor in target.model.state_dict().items()}

    result = fit_head(actor, file, SupervisedSettings(num_epochs=60, learning_rate=5e-3, validation_share=0.3))

    features, labels, _ = mismatch_features(actor, file)
    with torch.no_grad():
        logits = actor.head(features)
    assert area_under_curve(logits[:, 1] - logits[:, 0], labels) > 0.95
    assert result.validation_auc > 0.9
    assert result.num_mismatches == len(labels)
    assert all(torch.equal(tensor, before[name]) for name, tensor in target.model.state_dict().items())


def test_harm_can_weigh_more(target, file):
    accepted = []
    for weight in (0.2, 5.0):
        torch.manual_seed(0)
        actor = AutoModelForSPDScoring.from_config(ScoringModelConfig(32, use_states=False), target.model)
        fit_head(actor, file, SupervisedSettings(num_epochs=10, harm_weight=weight, validation_share=0.3))
        features, _, _ = mismatch_features(actor, file)
        accepted.append(float(actor.head(features).argmax(-1).float().mean()))

    assert accepted[0] > accepted[1]


def test_what_cannot_be_learned_from(target, file):
    actor = AutoModelForSPDScoring.from_config(ScoringModelConfig(32), target.model)
    unlabelled = [dataclasses.replace(window, labels=[-1] * len(window.drafts)) for window in file.windows]
    with pytest.raises(DataError, match="scorer label"):
        fit_head(actor, WindowFile(unlabelled, file.scalars, {}))
    one = [window for window in file.windows if window.prompt_index == 0]
    with pytest.raises(DataError, match="one prompt only"):
        fit_head(actor, WindowFile(one, file.scalars, {}))
    with pytest.raises(ConfigError, match="reads 'margin'"):
        fit_head(
            AutoModelForSPDScoring.from_config(ScoringModelConfig(32, scalars=("margin",)), target.model),
            WindowFile(file.windows, ("rank",), {}),
        )


def test_the_area_under_the_curve_counts_pairs():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(6, (40,), generator=generator).float()
    labels = torch.randint(2, (40,), generator=generator)

    pairs = [
        1.0 if good > bad else 0.5 if good == bad else 0.0
        for good in scores[labels == 1].tolist()
        for bad in scores[labels == 0].tolist()
    ]
    assert area_under_curve(scores, labels) == pytest.approx(sum(pairs) / len(pairs))
