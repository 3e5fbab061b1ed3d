"""The head learned from labels: where RL starts from, and what it has to beat."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from verl_speculator.errors import ConfigError, DataError
from verl_speculator.scorer.model import ScoringActor
from verl_speculator.scorer.windows import UNKNOWN, Window, WindowFile


@dataclass(frozen=True)
class SupervisedSettings:
    """Attributes:
    harm_weight: How much a harmful mismatch counts beside a harmless one: the price of an error over that of a call.
    """

    num_epochs: int = 20
    batch_size: int = 1024
    learning_rate: float = 2e-3
    weight_decay: float = 0.01
    harm_weight: float = 1.0
    validation_share: float = 0.1
    seed: int = 0


@dataclass(frozen=True)
class SupervisedResult:
    num_mismatches: int
    best_epoch: int
    validation_loss: float
    validation_auc: float


@torch.no_grad()
def mismatch_features(actor: ScoringActor, file: WindowFile, *, batch_size: int = 64) -> tuple[Tensor, Tensor, Tensor]:
    """What the head reads of every labelled mismatch, [N, F], their labels [N], and which window each is of [N].

    Raises:
        ConfigError: The scorer reads a scalar that the windows do not have.
        DataError: No mismatch is labelled.
    """
    names = actor.scoring_config.scalars
    if missing := [name for name in names if name not in file.scalars]:
        raise ConfigError(f"the scorer reads {missing[0]!r}, and the windows have {', '.join(file.scalars)}")
    columns = [file.scalars.index(name) for name in names]
    device = actor.head.shift.device
    features, labels, owners = [], [], []
    # Windows of about one length together: little padding.
    order = sorted(range(len(file.windows)), key=lambda index: len(file.windows[index].input_ids))
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        windows = [file.windows[index] for index in batch]
        found, slots = window_features(actor, windows, columns, device)
        for place, slot in slots:
            if (label := windows[place].labels[slot]) != UNKNOWN:
                labels.append(label)
                owners.append(batch[place])
                features.append(found[place, slot])
    if not labels:
        raise DataError("no mismatch of the windows is labelled: run `verl-speculator scorer label` on them first")
    return torch.stack(features), torch.tensor(labels), torch.tensor(owners)


def window_features(
    actor: ScoringActor, windows: Sequence[Window], columns: Sequence[int], device: torch.device
) -> tuple[Tensor, list[tuple[int, int]]]:
    """Features [B, k, F] of the drafts of windows, and the places `(window, slot)` of their mismatches.

    `columns` says which of the windows' scalars the scorer reads.
    """
    width = max(len(window.input_ids) for window in windows)
    count = max(len(window.drafts) for window in windows)
    ids = torch.zeros(len(windows), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    drafts = torch.zeros(len(windows), count, dtype=torch.long)
    targets = torch.zeros_like(drafts)
    drafted = torch.zeros_like(drafts, dtype=torch.bool)
    scalars = torch.zeros(len(windows), count, len(columns))
    hidden_at = []
    for row, window in enumerate(windows):
        length, k = len(window.input_ids), len(window.drafts)
        ids[row, :length] = torch.tensor(window.input_ids)
        mask[row, :length] = 1
        drafts[row, :k] = torch.tensor(window.drafts)
        targets[row, :k] = torch.tensor(window.target_ids[:k])
        drafted[row, :k] = True
        scalars[row, :k] = torch.tensor(window.scalars)[:, list(columns)].reshape(k, len(columns))
        # Where a window has fewer drafts than others, its last state stands in for those that nobody looks at.
        hidden_at.append([min(window.draft_start_idx - 1 + i, length - 1) for i in range(count + 1)])
    hidden = actor.states(ids.to(device), mask.to(device), None)
    at = torch.tensor(hidden_at, device=device)
    hidden = hidden.gather(1, at[..., None].expand(-1, -1, hidden.size(-1)))
    matches = (drafts == targets) & drafted
    features = actor.features(hidden, matches.to(device), drafted.to(device), targets.to(device), scalars.to(device))
    places = [(row, slot) for row, window in enumerate(windows) for slot in window.mismatches]
    return features, places


def fit_head(actor: ScoringActor, file: WindowFile, settings: SupervisedSettings | None = None) -> SupervisedResult:
    """Train the head of `actor` on the labels, and keep it as it was in the epoch of the least validation loss.

    With LoRA the backbone stays as it is: fresh LoRA changes nothing, so this is a start for it too.
    """
    settings = settings or SupervisedSettings()
    features, labels, owners = mismatch_features(actor, file)
    generator = torch.Generator().manual_seed(settings.seed)
    # By prompt: windows of one answer are alike, and must not stand on both sides.
    prompts = torch.tensor([file.windows[int(owner)].prompt_index for owner in owners])
    shuffled = prompts.unique()[torch.randperm(len(prompts.unique()), generator=generator)]
    held_out = torch.isin(prompts, shuffled[: max(1, int(settings.validation_share * len(shuffled)))])
    if bool(held_out.all()):
        raise DataError("the windows are of one prompt only: some must be held out, so at least two are needed")
    train, validation = (~held_out).nonzero().flatten(), held_out.nonzero().flatten()
    labels = labels.to(features.device)
    head = actor.head
    head.standardise(features[train])
    optimizer = torch.optim.AdamW(
        [parameter for parameter in head.parameters() if parameter.requires_grad],
        lr=settings.learning_rate,
        weight_decay=settings.weight_decay,
    )
    weights = torch.where(labels == 0, settings.harm_weight, 1.0)
    best, best_epoch, best_state = float("inf"), 0, {}
    for epoch in range(1, settings.num_epochs + 1):
        order = train[torch.randperm(len(train), generator=generator)]
        for rows in order.split(settings.batch_size):
            loss = _loss(head(features[rows]), labels[rows], weights[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            held = float(_loss(head(features[validation]), labels[validation], weights[validation]))
        if held < best:
            best, best_epoch = held, epoch
            best_state = {name: tensor.clone() for name, tensor in head.state_dict().items()}
    head.load_state_dict(best_state)
    with torch.no_grad():
        logits = head(features[validation])
        auc = area_under_curve(logits[:, 1] - logits[:, 0], labels[validation])
    return SupervisedResult(len(labels), best_epoch, best, auc)


def _loss(logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    losses = F.cross_entropy(logits, labels, reduction="none")
    return (losses * weights).sum() / weights.sum()


def area_under_curve(scores: Tensor, labels: Tensor) -> float:
    """Of the ROC curve: how often a harmless mismatch (1) scores above a harmful one (0), ties as a half.

    NaN where there are not both.
    """
    positive, negative = scores[labels == 1].double(), scores[labels == 0].double().sort().values
    if not len(positive) or not len(negative):
        return float("nan")
    below = torch.searchsorted(negative, positive, right=False)
    up_to = torch.searchsorted(negative, positive, right=True)
    return float((below + up_to).double().mean() / 2 / len(negative))
