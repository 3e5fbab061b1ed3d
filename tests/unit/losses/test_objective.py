"""The objective against a loop over sequences, positions and heads that shares no code with it."""

from functools import partial
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from verl_speculator.errors import ConfigError, DataError
from verl_speculator.losses import (
    Objective,
    PackedHiddenStates,
    count_loss_rows,
    count_trained_positions,
    speculator_loss,
    speculator_metrics,
)
from verl_speculator.models import (
    ArcticLSTMSpeculator,
    ArcticLSTMSpeculatorConfig,
    ChainSpeculator,
    ChainSpeculatorConfig,
    MLPSpeculator,
    MLPSpeculatorConfig,
)

HIDDEN, WIDTH, VOCAB, N_PREDICT = 6, 5, 13, 3
LENGTHS = [7, 2, 1, 12, 3, 0, 4]


class TinySpeculator(ChainSpeculator):
    """A chain with a two-part state, as small as one can be, whose tables count as untied."""

    def __init__(self, tied: bool, n_predict: int = N_PREDICT, **settings):
        config = ChainSpeculatorConfig(input_hidden_dim=HIDDEN, vocab_size=VOCAB, n_predict=n_predict, **settings)
        super().__init__(config)
        self.start = nn.Linear(HIDDEN, WIDTH)
        self.emb = nn.Embedding(VOCAB, WIDTH)
        self.mix = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(n_predict))
        self.head = nn.ModuleList(
            nn.Linear(WIDTH, config.head_rows, bias=False) for _ in range(1 if tied else n_predict)
        )
        self.reset_parameters()

    def begin(self, hidden_states):
        start = self.start(hidden_states)
        return start, torch.zeros_like(start)

    def embed(self, tokens, head_index):
        return self.emb(tokens)

    def step(self, state, embedded, head_index):
        s, c = state
        c = c + torch.sigmoid(self.mix[head_index](s)) * embedded
        s = torch.tanh(s + c)
        return (s, c), s

    def init_std(self, weight):
        return 1.0


SIZES = {"input_hidden_dim": HIDDEN, "vocab_size": VOCAB, "n_predict": N_PREDICT}


def _mlp(tied, **settings):
    return MLPSpeculator(MLPSpeculatorConfig(**SIZES, inner_dim=WIDTH, tie_weights=tied, **settings))


def _lstm(method, tied, **settings):
    widths = {"inner_dim": WIDTH, "emb_dim": WIDTH, "proj_dim": WIDTH}
    return ArcticLSTMSpeculator(
        ArcticLSTMSpeculatorConfig(**SIZES, tie_weights=tied, method=method, **widths, **settings)
    )


SPECULATORS = {
    "tiny_tied": partial(TinySpeculator, True),
    "tiny_untied": partial(TinySpeculator, False),
    "mlp_tied": partial(_mlp, True),
    "mlp_untied": partial(_mlp, False),
    "lstm": partial(_lstm, "sum_lstm", True),
    "rnn_untied": partial(_lstm, "sum_rnn", False),
}


def _speculator(name, draft_ids=None):
    torch.manual_seed(1)
    if draft_ids is None:
        return SPECULATORS[name]().double()
    speculator = SPECULATORS[name](draft_vocab_size=len(draft_ids)).double()
    speculator.set_draft_ids(torch.tensor(draft_ids))
    return speculator


def _batch(mask_kind="random", lengths=LENGTHS, seed=2):
    generator = torch.Generator().manual_seed(seed)
    total = sum(lengths)
    masks = {
        "none": torch.zeros(total, dtype=torch.long),
        "all": torch.ones(total, dtype=torch.long),
        "one": (torch.arange(total) == 15).long(),
        "random": torch.randint(0, 2, (total,), generator=generator),
    }
    return PackedHiddenStates(
        hidden_states=torch.randn(total, HIDDEN, generator=generator, dtype=torch.float64),
        input_ids=torch.randint(VOCAB, (total,), generator=generator),
        loss_mask=masks[mask_kind],
        cu_seqlens=torch.tensor([0, *lengths]).cumsum(0),
    )


def _slow(speculator, packed, head_loss_weights):
    """Loss and metric sums, one position at a time and through `log_softmax` of plain logits."""
    n_predict = speculator.n_predict
    names = ("head_{}/loss_sum", "head_{}/count", "head_{}/correct_sum", "prefix_{}/count", "prefix_{}/correct_sum")
    sums = {name.format(i): 0.0 for i in range(n_predict) for name in names}
    losses = [[] for _ in range(n_predict)]
    offsets = packed.cu_seqlens.tolist()
    for start, end in pairwise(offsets):
        ids, mask, hidden = (x[start:end] for x in (packed.input_ids, packed.loss_mask, packed.hidden_states))
        for t in range(end - start):
            state = speculator.begin(hidden[t])
            all_trained = all_correct = True
            for i in range(n_predict):
                if t + 2 + i >= end - start:
                    break
                state, output = speculator.step(state, speculator.embed(ids[t + 1 + i], i), i)
                log_probs = F.log_softmax(speculator.head_weight(i) @ output, dim=0)
                target = ids[t + 2 + i]
                trained = mask[t + 2 + i].item() == 1
                correct = trained and log_probs.argmax().item() == target.item()
                all_trained, all_correct = all_trained and trained, all_correct and correct
                if trained:
                    losses[i].append(-log_probs[target])
                    sums[f"head_{i}/loss_sum"] += losses[i][-1].item()
                sums[f"head_{i}/count"] += trained
                sums[f"head_{i}/correct_sum"] += correct
                sums[f"prefix_{i}/count"] += all_trained
                sums[f"prefix_{i}/correct_sum"] += all_correct
    total = sum(head_loss_weights)
    means = [torch.stack(head).mean() if head else torch.zeros((), dtype=torch.float64) for head in losses]
    return sum(w / total * mean for w, mean in zip(head_loss_weights, means, strict=True)), sums


def _gradients(loss, speculator):
    parameters = list(speculator.parameters())
    if not loss.requires_grad:
        return [torch.zeros_like(p) for p in parameters]
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]


@pytest.mark.parametrize("name", SPECULATORS)
@pytest.mark.parametrize("mask_kind", ["none", "all", "one", "random"])
@pytest.mark.parametrize("head_loss_weights", [None, [3.0, 0.0, 1.0]])
def test_objective_matches_a_slow_loop(name, mask_kind, head_loss_weights):
    speculator, packed = _speculator(name), _batch(mask_kind)
    expected, expected_sums = _slow(speculator, packed, head_loss_weights or [1.0] * N_PREDICT)
    result = speculator_loss(speculator, packed, head_loss_weights=head_loss_weights, chunk_size=4)

    torch.testing.assert_close(result.loss, expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(
        _gradients(result.loss, speculator), _gradients(expected, speculator), rtol=1e-8, atol=1e-12
    )
    assert set(result.metrics) == set(expected_sums)
    for key, value in result.metrics.items():
        assert value.shape == ()
        assert not value.requires_grad
        assert value.item() == pytest.approx(expected_sums[key], rel=1e-6), key


@pytest.mark.parametrize("lengths", [[1], [2], [0], [1, 2, 1], [3], [4]])
@pytest.mark.parametrize("name", ["tiny_tied", "mlp_untied", "lstm"])
def test_batches_too_short_for_some_heads(name, lengths):
    speculator, packed = _speculator(name), _batch("all", lengths)
    expected, _ = _slow(speculator, packed, [1.0] * N_PREDICT)
    result = speculator_loss(speculator, packed)
    torch.testing.assert_close(result.loss, expected)
    torch.testing.assert_close(_gradients(result.loss, speculator), _gradients(expected, speculator))


@pytest.mark.parametrize("name", ["tiny_tied", "tiny_untied", "mlp_untied", "lstm"])
def test_every_parameter_gets_a_gradient_where_nothing_is_trained(name):
    speculator = _speculator(name)
    speculator_loss(speculator, _batch("none")).loss.backward()
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in speculator.parameters())


def _split(packed, cuts, head_counts):
    """Micro-batches of whole sequences; `cuts` are sequence indices."""
    parts = []
    for first, last in pairwise(cuts):
        offsets = packed.cu_seqlens[first : last + 1]
        tokens = slice(int(offsets[0]), int(offsets[-1]))
        parts.append(
            PackedHiddenStates(
                packed.hidden_states[tokens],
                packed.input_ids[tokens],
                packed.loss_mask[tokens],
                offsets - offsets[0],
                head_counts=head_counts,
            )
        )
    return parts


@pytest.mark.parametrize("name", ["tiny_tied", "tiny_untied"])
@pytest.mark.parametrize("cuts", [[0, 7], [0, 3, 7], [0, 1, 2, 3, 4, 5, 6, 7]])
def test_loss_and_gradients_do_not_depend_on_micro_batches(name, cuts):
    speculator, packed = _speculator(name), _batch()
    whole = speculator_loss(speculator, packed)
    counts = count_trained_positions(packed.loss_mask, packed.cu_seqlens, N_PREDICT)
    parts = [speculator_loss(speculator, part) for part in _split(packed, cuts, counts)]

    loss = torch.stack([part.loss for part in parts]).sum()
    torch.testing.assert_close(loss, whole.loss)
    torch.testing.assert_close(_gradients(loss, speculator), _gradients(whole.loss, speculator))
    for key, value in whole.metrics.items():
        torch.testing.assert_close(sum(part.metrics[key] for part in parts), value)


def test_upstream_scale_reaches_the_gradients():
    speculator, packed = _speculator("tiny_tied"), _batch()
    plain = _gradients(speculator_loss(speculator, packed).loss, speculator)
    scaled = _gradients(speculator_loss(speculator, packed).loss * 8, speculator)
    torch.testing.assert_close(scaled, [8 * g for g in plain])


def test_metrics_are_divided_once():
    sums = {"head_0/loss_sum": 6.0, "head_0/count": 4.0, "head_0/correct_sum": 3.0}
    sums |= {"head_1/loss_sum": 5.0, "head_1/count": 2.0, "head_1/correct_sum": 1.0}
    sums |= {"prefix_0/correct_sum": 3.0, "prefix_0/count": 4.0, "prefix_1/correct_sum": 0.0, "prefix_1/count": 0.0}
    assert speculator_metrics(sums, 2) == {
        "head_0/loss": 1.5,
        "head_0/accuracy": 0.75,
        "head_1/loss": 2.5,
        "head_1/accuracy": 0.5,
        "loss": 2.0,
        "acceptance_length": 1.75,
    }


def test_metrics_agree_with_the_loss_of_the_batch():
    speculator, packed = _speculator("mlp_tied"), _batch()
    result = speculator_loss(speculator, packed)
    metrics = speculator_metrics({key: value.item() for key, value in result.metrics.items()}, N_PREDICT)
    assert metrics["loss"] == pytest.approx(result.loss.item(), rel=1e-6)


@pytest.mark.parametrize(
    "weights",
    [
        *([1.0, 2.0], [0.0, 0.0, 0.0], [1.0, -1.0, 1.0], [1.0, float("nan"), 1.0], [1.0, True, "2"]),
        *({"decay": 0.0}, {"decay": 1.5}, {"decya": 0.5}, {"decay": None}, "adaptiv"),
    ],
)
def test_wrong_head_weights_are_refused(weights):
    with pytest.raises(ConfigError, match="head_loss_weights"):
        speculator_loss(_speculator("tiny_tied"), _batch(), head_loss_weights=weights)


def test_wrong_number_of_head_counts_is_refused():
    packed = _batch()
    packed.head_counts = torch.ones(N_PREDICT + 1, dtype=torch.long)
    with pytest.raises(DataError, match="head_counts"):
        speculator_loss(_speculator("tiny_tied"), packed)


class _RowCounter(TinySpeculator):
    def __init__(self, tied):
        super().__init__(tied)
        self.rows = []

    def step(self, state, embedded, head_index):
        self.rows.append(len(embedded))
        return super().step(state, embedded, head_index)


def test_untrained_rows_never_enter_the_chain():
    packed = _batch("one")
    speculator = _RowCounter(tied=True).double()
    speculator_loss(speculator, packed)
    # Token 15 is the target of one position per head, and only later heads' positions stay in the chain.
    assert speculator.rows == [3, 2, 1]


@pytest.mark.parametrize(("name", "readings"), [("mlp_tied", 1), ("mlp_untied", 3), ("lstm", 1), ("rnn_untied", 3)])
def test_a_shared_table_is_read_once(name, readings):
    """One reading has one gradient of the table's size, whatever the number of heads and gates."""
    speculator = _speculator(name)
    read = []
    for module in speculator.modules():
        if isinstance(module, nn.Embedding):
            module.register_forward_hook(lambda *_: read.append(1))
    speculator_loss(speculator, _batch()).loss.backward()
    assert len(read) == readings


def test_index_sets_come_from_the_mask_once():
    """On an accelerator every `nonzero` makes the host wait for the device."""
    with _Operations() as operations:
        speculator_loss(_speculator("mlp_tied"), _batch())
    assert operations.names.count("aten::nonzero") == 1


class _Operations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


TARGET_WEIGHT = torch.randn(VOCAB, HIDDEN, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def _slow_rows(speculator, packed):
    """(head, position in its sequence, sequence, logits, target logits, token) of every trained row, one at a time."""
    for sequence, (start, end) in enumerate(pairwise(packed.cu_seqlens.tolist())):
        ids, mask, hidden = (x[start:end] for x in (packed.input_ids, packed.loss_mask, packed.hidden_states))
        for t in range(end - start):
            state = speculator.begin(hidden[t])
            for i in range(speculator.n_predict):
                if t + 2 + i >= end - start:
                    break
                state, output = speculator.step(state, speculator.embed(ids[t + 1 + i], i), i)
                if mask[t + 2 + i].item() == 1:
                    logits = speculator.head_weight(i) @ output
                    yield i, t, sequence, logits, TARGET_WEIGHT @ hidden[t + 1 + i], ids[t + 2 + i]


def _slow_soft(speculator, packed, weights, head_loss_weights):
    """The loss against the target's distributions, by the formulas, and the sum of each head's overlaps."""
    n_predict = speculator.n_predict
    losses, overlaps, kept = [[] for _ in range(n_predict)], [0.0] * n_predict, {}
    for i, t, sequence, logits, target_logits, token in _slow_rows(speculator, packed):
        q, p = logits.softmax(0), target_logits.softmax(0)
        overlap = torch.minimum(p, q).sum()
        kl = (p * (p.log() - q.log())).sum()
        blend = torch.exp(-3 * overlap.detach())
        terms = {"ce": -q[token].log(), "kl": kl, "tv": 1 - overlap, "lk": blend * kl + (1 - blend) * (1 - overlap)}
        loss = sum(weight * terms[name] for name, weight in weights.items())
        needs_target = set(weights) != {"ce"}
        reach = 1.0
        if head_loss_weights == "adaptive":
            kept[sequence, t, i] = (overlap if needs_target else q[token]).item()
            # A gap in the answer says nothing of the heads behind it.
            for before in range(i - 1, -1, -1):
                if (sequence, t, before) not in kept:
                    break
                reach *= (1 + kept[sequence, t, before]) / 2
        losses[i].append(reach * loss)
        overlaps[i] += overlap.item()
    means = [torch.stack(head).mean() if head else torch.zeros((), dtype=torch.float64) for head in losses]
    return torch.stack(means).mean(), overlaps


@pytest.mark.parametrize("name", ["tiny_tied", "tiny_untied", "mlp_tied", "lstm"])
@pytest.mark.parametrize("mask_kind", ["none", "all", "one", "random"])
@pytest.mark.parametrize(
    ("weights", "head_loss_weights"),
    [({"kl": 1.0}, None), ({"tv": 0.5, "ce": 0.5}, None), ({"lk": 1.0}, "adaptive"), ({"ce": 1.0}, "adaptive")],
)
def test_soft_objectives_match_a_slow_loop(name, mask_kind, weights, head_loss_weights):
    speculator, packed = _speculator(name), _batch(mask_kind)
    expected, overlaps = _slow_soft(speculator, packed, weights, head_loss_weights)
    packed.lm_head_weight = TARGET_WEIGHT
    result = speculator_loss(
        speculator, packed, objective=Objective(weights), head_loss_weights=head_loss_weights, chunk_size=3
    )
    torch.testing.assert_close(result.loss, expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(
        _gradients(result.loss, speculator), _gradients(expected, speculator), rtol=1e-8, atol=1e-12
    )
    if "ce" not in weights:
        found = [result.metrics[f"head_{i}/overlap_sum"].item() for i in range(N_PREDICT)]
        assert found == pytest.approx(overlaps, rel=1e-6)
    plain = speculator_loss(speculator, packed).metrics
    for key in plain:
        if "loss" not in key:
            assert result.metrics[key] == plain[key], key


@pytest.mark.parametrize("head_loss_weights", [None, "adaptive"])
def test_soft_losses_and_gradients_do_not_depend_on_micro_batches(head_loss_weights):
    speculator, packed = _speculator("tiny_tied"), _batch()
    settings = {"objective": Objective({"lk": 1.0}), "head_loss_weights": head_loss_weights}
    counts = count_trained_positions(packed.loss_mask, packed.cu_seqlens, N_PREDICT)
    packed.lm_head_weight = TARGET_WEIGHT
    parts = _split(packed, [0, 3, 7], counts)
    for part in parts:
        part.lm_head_weight = TARGET_WEIGHT
    full = speculator_loss(speculator, packed, **settings).loss
    loss = sum(speculator_loss(speculator, part, **settings).loss for part in parts)
    torch.testing.assert_close(loss, full)
    torch.testing.assert_close(_gradients(loss, speculator), _gradients(full, speculator))


def test_soft_objective_without_the_target_is_refused():
    with pytest.raises(DataError, match="needs target_head"):
        speculator_loss(_speculator("tiny_tied"), _batch(), objective=Objective({"kl": 1.0}))


def test_decaying_weights_are_powers():
    speculator, packed = _speculator("tiny_tied"), _batch()
    decayed = speculator_loss(speculator, packed, head_loss_weights={"decay": 0.5}).loss
    listed = speculator_loss(speculator, packed, head_loss_weights=[4.0, 2.0, 1.0]).loss
    torch.testing.assert_close(decayed, listed)


DRAFT_IDS = [0, 2, 3, 6, 7, 8, 12]


def _slow_reduced(speculator, packed, weights, head_loss_weights):
    """Loss, and per head the tokens outside of the draft vocabulary and the drafts that are right."""
    n_predict = speculator.n_predict
    losses, kept = [[] for _ in range(n_predict)], {}
    outside, correct = [0] * n_predict, [0] * n_predict
    for i, t, sequence, logits, target_logits, token in _slow_rows(speculator, packed):
        q, p = logits.softmax(0), target_logits[DRAFT_IDS].softmax(0)
        drafted = DRAFT_IDS[int(q.argmax())]
        outside[i] += token.item() not in DRAFT_IDS
        correct[i] += drafted == token.item()
        chance = q[DRAFT_IDS.index(token.item())] if token.item() in DRAFT_IDS else torch.zeros(())
        kl = (p * (p.log() - q.log())).sum()
        overlap = torch.minimum(p, q).sum()
        reach = 1.0
        if head_loss_weights == "adaptive":
            kept[sequence, t, i] = (chance if set(weights) == {"ce"} else overlap).item()
            for before in range(i - 1, -1, -1):
                if (sequence, t, before) not in kept:
                    break
                reach *= (1 + kept[sequence, t, before]) / 2
        if "ce" in weights and token.item() not in DRAFT_IDS:
            continue
        terms = {"ce": -chance.log(), "kl": kl, "tv": 1 - overlap}
        losses[i].append(reach * sum(weight * terms[name] for name, weight in weights.items()))
    means = [torch.stack(head).mean() if head else torch.zeros((), dtype=torch.float64) for head in losses]
    return torch.stack(means).mean(), outside, correct


@pytest.mark.parametrize("name", ["tiny_tied", "tiny_untied", "mlp_untied", "lstm", "rnn_untied"])
@pytest.mark.parametrize("mask_kind", ["none", "all", "one", "random"])
@pytest.mark.parametrize(
    ("weights", "head_loss_weights"),
    [
        *(({"ce": 1.0}, kind) for kind in (None, "adaptive")),
        *(({"kl": 1.0}, kind) for kind in (None, "adaptive")),
        ({"ce": 0.5, "tv": 0.5}, None),
    ],
)
def test_draft_vocabulary_matches_a_slow_loop(name, mask_kind, weights, head_loss_weights):
    speculator, packed = _speculator(name, DRAFT_IDS), _batch(mask_kind)
    expected, outside, correct = _slow_reduced(speculator, packed, weights, head_loss_weights)
    packed.lm_head_weight = TARGET_WEIGHT
    settings = {"objective": Objective(weights), "head_loss_weights": head_loss_weights, "chunk_size": 3}
    result = speculator_loss(speculator, packed, **settings)

    torch.testing.assert_close(result.loss, expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(
        _gradients(result.loss, speculator), _gradients(expected, speculator), rtol=1e-8, atol=1e-12
    )
    full = speculator_loss(_speculator(name), packed).metrics
    for i in range(N_PREDICT):
        assert result.metrics[f"head_{i}/outside_sum"] == outside[i]
        assert result.metrics[f"head_{i}/correct_sum"] == correct[i]
        # A token outside counts as a position, whose draft is a miss.
        assert result.metrics[f"head_{i}/count"] == full[f"head_{i}/count"]
        assert result.metrics[f"prefix_{i}/count"] == full[f"prefix_{i}/count"]
    if head_loss_weights is None:
        metrics = speculator_metrics({key: value.item() for key, value in result.metrics.items()}, N_PREDICT)
        assert metrics["loss"] == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("weights", [{"ce": 1.0}, {"kl": 1.0}], ids=str)
def test_draft_vocabulary_and_micro_batches(weights):
    speculator, packed = _speculator("tiny_tied", DRAFT_IDS), _batch()
    objective = Objective(weights)
    batch = (packed.input_ids, packed.loss_mask, packed.cu_seqlens)
    counts = count_loss_rows(speculator, objective, *batch)
    assert torch.equal(counts, count_trained_positions(*batch[1:], N_PREDICT)) == ("ce" not in weights)
    packed.lm_head_weight = TARGET_WEIGHT
    whole = speculator_loss(speculator, packed, objective=objective)
    parts = _split(packed, [0, 3, 7], counts)
    for part in parts:
        part.lm_head_weight = TARGET_WEIGHT
    losses = [speculator_loss(speculator, part, objective=objective) for part in parts]
    loss = losses[0].loss + losses[1].loss
    torch.testing.assert_close(loss, whole.loss)
    torch.testing.assert_close(_gradients(loss, speculator), _gradients(whole.loss, speculator))
    for key, value in whole.metrics.items():
        torch.testing.assert_close(losses[0].metrics[key] + losses[1].metrics[key], value)


@pytest.mark.parametrize("name", SPECULATORS)
@pytest.mark.parametrize("objective", [Objective(), Objective({"lk": 1.0}), Objective({"ce": 0.5, "kl": 0.5})], ids=str)
def test_a_draft_vocabulary_of_all_tokens_changes_no_bit(name, objective):
    packed = _batch()
    packed.lm_head_weight = TARGET_WEIGHT
    plain, reduced = _speculator(name), _speculator(name, list(range(VOCAB)))
    reduced.load_state_dict({**plain.state_dict(), "d2t": reduced.d2t})
    losses = [speculator_loss(speculator, packed, objective=objective) for speculator in (plain, reduced)]
    assert losses[0].loss.item() == losses[1].loss.item()
    gradients = [_gradients(result.loss, model) for result, model in zip(losses, (plain, reduced), strict=True)]
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(*gradients, strict=True))
    assert all(losses[1].metrics[key] == value for key, value in losses[0].metrics.items())
