"""verl's own loss on a scorer's actions, in one process without Ray."""

from __future__ import annotations

import copy
from functools import partial

import numpy as np
import pytest
import torch
import torch.distributed as dist
from tensordict import TensorDict

from tests.support.windows import SCALAR_NAMES, make_window
from verl_speculator.platforms import cpu
from verl_speculator.scorer.model import AutoModelForSPDScoring
from verl_speculator.scorer.playing import score_windows
from verl_speculator.scorer.spd_samples import Actions, Sample, row_fields

CONTEXT, DRAFTS, TARGETS = [5, 6, 9, 30], [1, 2, 3, 4], [1, 8, 3, 7, 11]  # slots 1 and 3 differ
PROMPT = {"uid": "u", "data_source": "spd", "reward_model": {}, "extra_info": {}}


@pytest.fixture(scope="module")
def process_group(tmp_path_factory):
    cpu.ensure_registered()
    dist.init_process_group("gloo", rank=0, world_size=1, init_method=f"file://{tmp_path_factory.mktemp('pg')}/store")
    yield
    dist.destroy_process_group()


def build_engine(base_model, **values):
    from verl.trainer.config import CheckpointConfig
    from verl.workers.config import FSDPEngineConfig, FSDPOptimizerConfig

    from verl_speculator.scorer.spd_engine import ScorerModelConfig, SPDScorerEngine

    model = ScorerModelConfig(
        path=str(base_model),
        model_type="spd_scorer",
        override_config={"attn_implementation": "sdpa"},
        lora_alpha=8,
        lora_rank=values.pop("lora_rank", 0),
        scorer={"inner_dim": 8, **values},
    )
    engine_config = FSDPEngineConfig(
        strategy="fsdp2", use_torch_compile=False, use_dynamic_bsz=False, micro_batch_size_per_gpu=3
    )
    optimizer = FSDPOptimizerConfig(lr=0.05, lr_warmup_steps=0, total_training_steps=10)
    engine = SPDScorerEngine(model, engine_config, optimizer, CheckpointConfig())
    engine.initialize()
    return engine


@pytest.fixture(scope="module")
def engine(process_group, base_model):
    return build_engine(base_model)


@pytest.fixture(scope="module")
def lora_engine(process_group, base_model):
    return build_engine(base_model, lora_rank=4)


@pytest.fixture
def stirred(request):
    """An engine whose scorer has an opinion, as it was before afterwards."""

    def stir(engine):
        before = {name: tensor.clone() for name, tensor in engine.actor.trained_state().items()}
        request.addfinalizer(lambda: engine.actor.load_trained_state(before))
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in engine.trained.parameters():
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
        return engine

    return stir


def actions_of(engine, accepts):
    """The window's sequence with these actions at its two mismatches; the second is None after a reject."""
    window = make_window(CONTEXT, DRAFTS, TARGETS)
    log_odds, features = score_windows(engine.actor, [window])[0]
    taken = torch.tensor([1, accepts[0], 1, 0 if len(accepts) == 1 else accepts[1]])
    mask = torch.tensor([0, 1, 0, int(len(accepts) > 1)])
    inputs = {"features": features.flatten()}
    if engine.actor.scoring_config.lora_rank:
        inputs = {"target_ids": torch.tensor(TARGETS), "scalars": torch.tensor(window.scalars).flatten()}
    scores = torch.where(torch.tensor([False, True, False, True]), log_odds.sigmoid(), 1.0)
    return Actions(taken, mask, scores, CONTEXT, inputs, torch.tensor(DRAFTS))


def batch_of(sequences, rewards, old_log_probs=None):
    """A batch as verl's trainer hands it to the actor, with GRPO's advantages of one group."""
    from verl.trainer.ppo.core_algos import compute_grpo_outcome_advantage
    from verl.utils import tensordict_utils as tu

    rows = [
        row_fields(Sample(PROMPT, [one], None, {}, 1, 1, 1, reward), one)
        for one, reward in zip(sequences, rewards, strict=True)
    ]
    scores = torch.stack([row["rm_scores"] for row in rows])
    mask = torch.stack([row["response_mask"] for row in rows])
    advantages, _ = compute_grpo_outcome_advantage(
        scores, mask, np.array(["u"] * len(rows)), norm_adv_by_std_in_grpo=False
    )
    for place, row in enumerate(rows):
        row["advantages"] = advantages[place]
        row["old_log_probs"] = row["rollout_log_probs"] if old_log_probs is None else old_log_probs[place]
    names = [name for name, value in rows[0].items() if isinstance(value, torch.Tensor)]
    nested = {name: torch.nested.as_nested_tensor([row[name] for row in rows], layout=torch.jagged) for name in names}
    data = TensorDict(nested, batch_size=len(rows))
    tu.assign_non_tensor(
        data, temperature=1.0, use_dynamic_bsz=False, micro_batch_size_per_gpu=1, global_batch_size=len(rows)
    )
    return data


def loss_function(**values):
    from verl.workers.config import FSDPActorConfig
    from verl.workers.utils.losses import ppo_loss

    config = FSDPActorConfig(
        strategy="fsdp2",
        rollout_n=1,
        ppo_micro_batch_size_per_gpu=3,
        loss_agg_mode="seq-mean-token-sum",
        **values,
    )
    return partial(ppo_loss, config=config)


def log_probs(engine, sequences):
    from verl.utils import tensordict_utils as tu
    from verl.workers.utils.padding import no_padding_2_padding

    data = batch_of(sequences, [0.0] * len(sequences))
    tu.assign_non_tensor(data, calculate_entropy=True)
    output = engine.infer_batch(data)["model_output"]
    return no_padding_2_padding(output["log_probs"], data), no_padding_2_padding(output["entropy"], data)


@pytest.mark.parametrize("kind", ["engine", "lora_engine"])
def test_log_probs_and_entropy_are_those_of_a_bernoulli_by_hand(request, stirred, kind):
    engine = stirred(request.getfixturevalue(kind))
    window = make_window(CONTEXT, DRAFTS, TARGETS)
    z = score_windows(engine.actor, [window])[0][0].double()[[1, 3]]

    found, entropy = log_probs(engine, [actions_of(engine, one) for one in ((0,), (1, 0), (1, 1))])

    reject, accept = -(1 + z.exp()).log(), -(1 + (-z).exp()).log()
    expected = torch.stack([torch.stack([reject[0], reject[1]]), torch.stack([accept[0], reject[1]]), accept])
    torch.testing.assert_close(found[:, [1, 3]].double(), expected, rtol=1e-5, atol=1e-6)
    p = z.sigmoid()
    by_hand = -(p * p.log() + (1 - p) * (1 - p).log())
    torch.testing.assert_close(entropy[0, [1, 3]].double(), by_hand, rtol=1e-5, atol=1e-6)


def test_matches_are_forced_in_the_windows_of_lora(lora_engine, stirred):
    found, _ = log_probs(stirred(lora_engine), [actions_of(lora_engine, (1, 1))])

    assert found[0, [0, 2]].abs().max() < 1e-30


def test_grpos_gradient_is_that_of_the_exact_table(engine, request):
    """Two mismatches have three outcomes. At p = 1/2 four samples can have them in exact proportion."""
    outcomes, rewards = [(0,), (0,), (1, 0), (1, 1)], [0.2, 0.2, 1.0, -0.7]
    before = {name: tensor.clone() for name, tensor in engine.actor.trained_state().items()}
    request.addfinalizer(lambda: engine.actor.load_trained_state(before))
    sequences = [actions_of(engine, one) for one in outcomes]

    engine.optimizer_zero_grad()
    engine.forward_backward_batch(batch_of(sequences, rewards), loss_function(), forward_only=False)
    found = {name: one.grad.clone() for name, one in engine.actor.head.named_parameters()}

    head = copy.deepcopy(engine.actor.head).double()
    features = score_windows(engine.actor, [make_window(CONTEXT, DRAFTS, TARGETS)])[0][1].double()
    # Not through the head's own casts: this is the formula.
    hidden = torch.nn.functional.gelu(head.layers[0](features[[1, 3]]))
    z = (head.out(hidden)[:, 1] - head.out(hidden)[:, 0]).sigmoid()
    value = (1 - z[0]) * 0.2 + z[0] * (1 - z[1]) * 1.0 + z[0] * z[1] * -0.7
    (-value).backward()
    for name, parameter in head.named_parameters():
        torch.testing.assert_close(found[name].double(), parameter.grad, rtol=1e-4, atol=1e-6, msg=name)
    assert found["out.weight"].abs().max() > 1e-4


def test_lora_learns_and_gradient_checkpointing_changes_nothing(lora_engine, stirred):
    engine, backbone = stirred(lora_engine), lora_engine.actor.backbone
    batch = batch_of([actions_of(engine, one) for one in ((0,), (1, 0), (1, 1))], [0.2, 1.0, -0.7])
    gradients = []
    for switch in (backbone.gradient_checkpointing_disable, backbone.gradient_checkpointing_enable):
        switch()
        engine.module.train()
        engine.optimizer_zero_grad()
        engine.forward_backward_batch(batch, loss_function(), forward_only=False)
        gradients.append({name: one.grad.clone() for name, one in engine.trained.items()})

    lora = [name for name in gradients[0] if "lora_" in name]
    assert lora
    assert all(gradients[0][name].abs().max() > 0 for name in lora)
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], msg=name)


def test_what_comes_after_a_reject_has_no_weight(engine, stirred):
    engine = stirred(engine)
    gradients = []
    for second in (0, 1):
        rejected = actions_of(engine, (0,))
        rejected.accepts[3] = second  # not decided on, whatever stands there
        engine.optimizer_zero_grad()
        batch = batch_of([rejected, actions_of(engine, (1, 1))], [1.0, 0.0])
        engine.forward_backward_batch(batch, loss_function(), forward_only=False)
        gradients.append(engine.actor.head.out.weight.grad.clone())

    assert torch.equal(*gradients)


def test_a_row_that_verl_pads_with_changes_nothing(engine, stirred):
    from verl.trainer.ppo.padding_utils import construct_minimal_padding_template

    engine = stirred(engine)
    data = batch_of([actions_of(engine, one) for one in ((0,), (1, 1))], [1.0, 0.0])
    row = {name: data[name][0] for name in data.keys() if isinstance(data[name], torch.Tensor)}  # noqa: SIM118
    padding, _ = construct_minimal_padding_template(row, {}, eos_token_id=300)
    for name in ("advantages", "old_log_probs"):
        padding[name] = torch.zeros(1)
    padded = batch_of([actions_of(engine, one) for one in ((0,), (1, 1))], [1.0, 0.0])
    for name in row:
        rows = [*padded[name].unbind(), padding[name]]
        row[name] = torch.nested.as_nested_tensor(rows, layout=torch.jagged)
    from verl.utils import tensordict_utils as tu

    longer = TensorDict(row, batch_size=3)
    tu.assign_non_tensor(
        longer, temperature=1.0, use_dynamic_bsz=False, micro_batch_size_per_gpu=3, global_batch_size=2
    )
    gradients = []
    for batch in (data, longer):
        engine.optimizer_zero_grad()
        engine.forward_backward_batch(batch, loss_function(), forward_only=False)
        gradients.append(engine.actor.head.out.weight.grad.clone())

    torch.testing.assert_close(*gradients)


def test_the_reference_is_the_policy_of_the_start(engine, stirred):
    sequences = [actions_of(engine, (1, 0))]
    start, _ = log_probs(engine, sequences)
    engine = stirred(engine)
    changed, _ = log_probs(engine, sequences)

    with engine.disable_adapter():
        reference, _ = log_probs(engine, sequences)
    after, _ = log_probs(engine, sequences)

    assert torch.equal(reference, start)
    assert torch.equal(after, changed)
    assert not torch.equal(changed, start)


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_a_checkpoint_goes_on_exactly_and_decodes_alike(process_group, base_model, tmp_path, lora_rank):
    one, other = (build_engine(base_model, lora_rank=lora_rank) for _ in range(2))
    outcomes, rewards = ((0,), (1, 0), (1, 1)), [0.0, 1.0, 0.3]

    def step(engine):
        batch = batch_of([actions_of(engine, taken) for taken in outcomes], rewards)
        with engine.train_mode():
            engine.train_batch(batch, loss_function(entropy_coeff=0.01))
        engine.lr_scheduler_step()

    one.standardise(torch.randn(20, one.actor.scoring_config.num_features))
    step(one)
    one.threshold = 0.625
    one.save_checkpoint(str(tmp_path / "global_step_1" / "actor"))
    other.load_checkpoint(str(tmp_path / "global_step_1" / "actor"))
    step(one)
    step(other)

    states = one.actor.trained_state(), other.actor.trained_state()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    folder = tmp_path / "global_step_1" / "actor" / "scorer"
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    saved = AutoModelForSPDScoring.from_pretrained(folder, one.target.model)
    assert saved.scoring_config.threshold == 0.625
    assert saved.scoring_config.scalars == SCALAR_NAMES
    again = AutoModelForSPDScoring.from_pretrained(folder, str(base_model))
    window = make_window(CONTEXT, DRAFTS, TARGETS)
    assert torch.equal(score_windows(saved, [window])[0][0], score_windows(again, [window])[0][0])


def test_a_learned_threshold_is_taken_out_of_the_head(engine, stirred, tmp_path):
    engine = stirred(engine)
    engine.learns_threshold = True
    engine.save_checkpoint(str(tmp_path))
    engine.learns_threshold = False
    saved = AutoModelForSPDScoring.from_pretrained(tmp_path / "scorer", engine.target.model)
    windows = [make_window([4 + shift, 3, 9], DRAFTS, TARGETS) for shift in range(20)]

    trained = torch.stack([log_odds[[1, 3]] for log_odds, _ in score_windows(engine.actor, windows)])
    scores = torch.stack([log_odds[[1, 3]] for log_odds, _ in score_windows(saved, windows)]).sigmoid()

    assert torch.equal(scores >= saved.scoring_config.threshold, trained >= 0)
    assert saved.scoring_config.threshold != 0.5


def test_standardising_brings_the_first_features_to_one_size(process_group, base_model):
    engine = build_engine(base_model)
    features = torch.randn(50, engine.actor.scoring_config.num_features) * 7 + 3
    engine.standardise(features)
    engine.standardise(features + 100)  # once only
    head = engine.actor.head

    scaled = (features - head.shift) / head.scale
    torch.testing.assert_close(scaled.mean(0), torch.zeros_like(head.shift), atol=1e-4, rtol=0)
    torch.testing.assert_close(scaled.std(0, unbiased=False), torch.ones_like(head.shift), atol=1e-2, rtol=0)
