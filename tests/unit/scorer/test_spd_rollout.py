"""What a rollout makes of scores: actions, masks, rewards and rows; no Ray and no model."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf

from tests.support.windows import SCALAR_NAMES, make_window, write_window_file
from verl_speculator.errors import DataError
from verl_speculator.scorer.config import ScoringModelConfig
from verl_speculator.scorer.controllers import Controllers
from verl_speculator.scorer.playing import Decision, PlayedAnswer
from verl_speculator.scorer.settings import OWN_SCORE
from verl_speculator.scorer.spd_dataset import SPDRLHFDataset
from verl_speculator.scorer.spd_reward_manager import SPDRewardManager
from verl_speculator.scorer.spd_rollout import SPDRollout
from verl_speculator.scorer.spd_samples import (
    answer_sequences,
    decide,
    kept_drafts,
    reward_input,
    rollout_metrics,
    row_fields,
)

FEATURES = 6


class Tokenizer:
    pad_token_id = 0

    def decode(self, tokens, skip_special_tokens=True):
        return " ".join(map(str, tokens))


class Client:
    """Scores by a table: the log odds of each draft's slot."""

    scoring_config = ScoringModelConfig(4, scalars=SCALAR_NAMES)

    def __init__(self, log_odds, answers=()):
        self.log_odds, self.answers = torch.tensor(log_odds), list(answers)
        self.controllers = Controllers(cost_price=0.25, threshold=0.5)

    def score_windows(self, windows):
        return [
            (self.log_odds[: len(one.drafts)], torch.arange(len(one.drafts) * FEATURES).view(-1, FEATURES).float())
            for one in windows
        ]

    def set_decoding(self, config):
        self.told = (self.controllers.threshold, config.score_mean, config.score_scale)

    def play_answers(self, prompts, temperature, threshold, seed):
        return self.answers


class Completions:
    def answers(self, texts, lengths):
        self.texts = texts
        return [[*text[length:], 12] for text, length in zip(texts, lengths, strict=True)]


def config(**reward):
    score = dict(zip(("path", "name"), OWN_SCORE, strict=True))
    return OmegaConf.create(
        {
            "actor_rollout_ref": {
                "rollout": {"n": 4, "seed": 1, "temperature": 1.0, "custom": {"target_model_path": "t"}},
            },
            "reward": {"custom_reward_function": {**score, **reward.pop("function", {})}, "reward_kwargs": reward},
        }
    )


def rows_of(windows, tmp_path):
    data = OmegaConf.create({"max_prompt_length": 20, "max_response_length": 9})
    dataset = SPDRLHFDataset(str(write_window_file(tmp_path / "windows.parquet", windows)), Tokenizer(), data)
    return [{**dataset[place], "uid": f"u{place}"} for place in range(len(dataset))]


def rewarded(samples, settings, price=0.25):
    manager = SPDRewardManager(settings, Tokenizer(), load(settings))
    data = reward_input(samples, price)
    for place, sample in enumerate(samples):
        result = asyncio.run(manager.run_single(data[place : place + 1]))
        sample.reward, sample.info = result["reward_score"], result["reward_extra_info"]
    return samples


def load(settings):
    from verl.utils.import_utils import load_extern_object

    function = settings.reward.custom_reward_function
    return load_extern_object(function.path, function.name)


WINDOW = {"context": [5, 6, 9, 30], "drafts": [1, 2, 3, 4], "targets": [1, 8, 3, 7, 11]}


@pytest.mark.parametrize(
    ("scores", "accepts", "mask", "kept"),
    [
        ([0.1, 0.2, 0.1, 0.9], [1, 0, 1, 1], [0, 1, 0, 0], 1),
        ([0.1, 0.7, 0.1, 0.2], [1, 1, 1, 0], [0, 1, 0, 1], 3),
        ([0.1, 0.7, 0.1, 0.9], [1, 1, 1, 1], [0, 1, 0, 1], 4),
    ],
)
def test_the_mask_ends_with_the_first_reject(scores, accepts, mask, kept):
    mismatches = torch.tensor([False, True, False, True])

    found, found_mask = decide(torch.tensor(scores), mismatches, None)

    assert (found.tolist(), found_mask.tolist(), kept_drafts(found)) == (accepts, mask, kept)


def test_actions_are_drawn_by_their_scores():
    generator = torch.Generator().manual_seed(0)
    mismatches = torch.tensor([True, True])
    drawn = torch.stack([decide(torch.tensor([0.3, 0.8]), mismatches, generator)[0] for _ in range(4000)])

    torch.testing.assert_close(drawn.float().mean(0), torch.tensor([0.3, 0.8]), atol=0.03, rtol=0)


def test_a_window_whose_labels_say_all_needs_no_text(tmp_path):
    rows = rows_of([make_window(**WINDOW, correct=[-1, 0, -1, 1])], tmp_path)
    completions = Completions()
    settings = config(cost=0.25)
    outcomes = []
    for log_odds in ([9, 9, 9, 9], [9, 9, 9, -9], [9, -9, 9, 9]):
        rollout = SPDRollout(settings, Client([float(one) for one in log_odds]), [], lambda: completions)
        outcomes += rewarded(rollout._sample_windows(rows, 1, None), settings)

    assert [sample.answer for sample in outcomes] == [None] * 3
    assert [sample.info["correct"] for sample in outcomes] == [1, 0, 1]  # the last accepted one's, or strict
    # Kept drafts 4, 3, 1; strict decoding keeps 1. A call gives one token more.
    expected = [1 - 0.25 * 2 / 5, 0 - 0.25 * 2 / 4, 1 - 0.25]
    assert [sample.reward for sample in outcomes] == pytest.approx(expected)


def test_other_windows_are_finished_by_the_target(tmp_path):
    rows = rows_of([make_window(**WINDOW, answer="12")], tmp_path)
    completions = Completions()
    rollout = SPDRollout(config(), Client([9.0, 9.0, 9.0, -9.0]), [], lambda: completions)

    (sample,) = rewarded(rollout._sample_windows(rows, 1, None), config())

    assert completions.texts == [[5, 6, 9, 30, 1, 2, 3, 7]]  # accepted drafts, then the target's own token
    assert sample.answer == [30, 1, 2, 3, 7, 12]
    assert sample.info["correct"] == 1


def test_rows_have_what_verl_and_the_engine_read(tmp_path):
    rows = rows_of([make_window(**WINDOW, correct=[-1, 0, -1, 1])], tmp_path)
    settings = config()
    rollout = SPDRollout(settings, Client([9.0, 0.5, 9.0, 0.2]), [], Completions)

    samples = rewarded(rollout._sample_windows(rows * 4, 4, seed=3), settings)
    again = rewarded(rollout._sample_windows(rows * 4, 4, seed=3), settings)

    for sample, same in zip(samples, again, strict=True):
        (sequence,) = sample.sequences
        assert torch.equal(sequence.accepts, same.sequences[0].accepts)
        fields = row_fields(sample, sequence)
        assert fields["prompts"].tolist() == WINDOW["context"]
        assert fields["input_ids"].tolist() == WINDOW["context"] + WINDOW["drafts"]
        assert len(fields["responses"]) == len(fields["response_mask"]) == len(fields["rm_scores"]) == 4
        assert fields["rm_scores"].sum() == pytest.approx(sample.reward)
        assert fields["features"].view(4, FEATURES)[1, 0] == FEATURES
        p = torch.tensor([0.5, 0.2]).sigmoid()
        chosen = torch.where(sequence.accepts[[1, 3]].bool(), p, 1 - p).log() * fields["response_mask"][[1, 3]]
        torch.testing.assert_close(fields["rollout_log_probs"][[1, 3]], chosen)
    assert {tuple(sample.sequences[0].accepts.tolist()) for sample in samples} != {(1, 1, 1, 1)}


def decision(accepted, log_odds, number):
    return Decision(accepted, log_odds, torch.full((Client.scoring_config.num_features,), float(number)))


def test_a_whole_answer_is_one_sequence_of_its_decisions(tmp_path):
    rows = rows_of([make_window(**WINDOW)], tmp_path)
    played = PlayedAnswer([40, 12], calls=4, rounds=3, accepted=5, drafted=9)
    played.decisions = [decision(True, 2.0, 1), decision(False, -1.0, 2), decision(True, 0.5, 3)]
    silent = PlayedAnswer([41], calls=2, rounds=1, accepted=3, drafted=3)
    settings = config()
    rollout = SPDRollout(settings, Client([], [played, silent]), [], Completions)

    first, second = rewarded(rollout._play(rows * 2, 2, seed=5), settings)

    (sequence,) = first.sequences
    assert (sequence.accepts.tolist(), sequence.mask.tolist(), sequence.context) == ([1, 0, 1], [1, 1, 1], [5, 6, 9])
    assert sequence.inputs["features"].view(3, -1)[:, 0].tolist() == [1, 2, 3]
    torch.testing.assert_close(sequence.log_probs, torch.tensor([2.0, 1.0, 0.5]).sigmoid().log())
    assert first.reward == pytest.approx(1 - 0.25 * 4 / 6)
    # Nothing was decided on: one action without weight, with the reward.
    (none,) = second.sequences
    assert (none.accepts.tolist(), none.mask.tolist()) == ([1], [0])
    assert row_fields(second, none)["rm_scores"].tolist() == [pytest.approx(0 - 0.25 * 2 / 6)]
    metrics = rollout_metrics([first, second], Controllers(0.25, 0.5))
    assert metrics["mismatch_accept_rate"] == pytest.approx(2 / 3)
    assert metrics["tokens_per_target_call"] == pytest.approx(3 / 6)
    assert metrics["accepted_length"] == pytest.approx(1 + 8 / 4)
    assert metrics["without_decision_rate"] == 0.5
    assert (metrics["accuracy"], metrics["strict_accuracy"], metrics["equals_strict"]) == (0.5, 1.0, 0.0)
    assert (metrics["case_rate/right_right"], metrics["case_rate/wrong_right"]) == (0.5, 0.5)
    assert metrics["case_reward/wrong_right"] == pytest.approx(second.reward)


def test_with_lora_a_round_is_a_row_of_the_session():
    scoring = ScoringModelConfig(4, lora_rank=2, scalars=SCALAR_NAMES)
    window = make_window(**WINDOW)
    played = PlayedAnswer([1], decisions=[decision(True, 2.0, 0), decision(False, -1.0, 0), decision(True, 1.0, 0)])
    played.windows = [(window, [1, 3]), (window, [1])]

    one, other = answer_sequences([5, 6, 9], played, scoring, temperature=2.0)

    assert (one.accepts.tolist(), one.mask.tolist()) == ([1, 1, 1, 0], [0, 1, 0, 1])
    assert (other.accepts.tolist(), other.mask.tolist()) == ([1, 1, 1, 1], [0, 1, 0, 0])
    assert one.inputs["target_ids"].tolist() == WINDOW["targets"]
    torch.testing.assert_close(one.scores[[1, 3]], torch.tensor([1.0, -0.5]).sigmoid())


def test_a_scorer_that_rejects_everything_is_named(tmp_path):
    rows = rows_of([make_window(**WINDOW, correct=[-1, 0, -1, 1])], tmp_path)
    settings = config()
    rollout = SPDRollout(settings, Client([9.0, -9.0, 9.0, -9.0]), [], Completions)
    samples = rewarded(rollout._sample_windows(rows, 1, None), settings)

    metrics = rollout_metrics(samples, Controllers(0.0, 0.5))

    assert (metrics["equals_strict"], metrics["mismatch_accept_rate"], metrics["harmful_accept_rate"]) == (1, 0, 0)


def test_a_step_function_of_the_users_is_asked(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("def judge(context, outcome, extra_info):\n    return len(context.split()) + outcome['accepted']\n")
    rows = rows_of([make_window(**WINDOW, correct=[-1, 0, -1, 1])], tmp_path)
    settings = config(step_weight=0.5, step_reward_path=str(file), step_reward_name="judge")
    rollout = SPDRollout(settings, Client([9.0] * 4), [], Completions)

    (sample,) = rewarded(rollout._sample_windows(rows, 1, None), settings, price=0)

    assert sample.info["reward_step"] == 0.5 * (9 + 4)
    assert sample.reward == pytest.approx(1 + 0.5 * 13)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (
            "raise KeyError('no such unit')",
            r"mine\.py:score failed on row 0 of .*windows\.parquet.*KeyError.*no such unit",
        ),
        ("return 'good'", r"mine\.py:score gave 'good' for row 0 of .*which is no number"),
    ],
)
def test_a_reward_function_that_fails_is_named_with_the_row(tmp_path, body, message):
    file = tmp_path / "mine.py"
    file.write_text(f"def score(**row):\n    {body}\n")
    rows = rows_of([make_window(**WINDOW, correct=[-1, 0, -1, 1])], tmp_path)
    settings = config(function={"path": str(file), "name": "score"})
    rollout = SPDRollout(settings, Client([9.0] * 4), [], Completions)
    samples = rollout._sample_windows(rows, 1, None)

    assert samples[0].answer is not None  # a function of the user's sees every text
    with pytest.raises(DataError, match=message):
        rewarded(samples, settings)


def test_a_client_fills_up_what_verl_cuts_into_equal_parts():
    from tensordict import TensorDict
    from tensordict.tensorclass import NonTensorData, NonTensorStack

    from verl_speculator.scorer.spd_rollout import ScorerClient

    def score_windows(data):
        rows = [getattr(row, "data", row) for row in data["window"]]
        seen.append(len(rows))
        return TensorDict({"scored": NonTensorStack(*(NonTensorData(row * 2) for row in rows))}, batch_size=len(rows))

    seen: list[int] = []
    workers = SimpleNamespace(
        world_size=4, score_windows=score_windows, scoring_config=lambda: [ScoringModelConfig(4)] * 4
    )

    assert ScorerClient(workers, Controllers(0, 0.5)).score_windows([1, 2, 3, 4, 5]) == [2, 4, 6, 8, 10]
    assert seen == [8]


def test_validation_decides_by_normalised_scores_and_training_draws_by_plain_ones(tmp_path):
    settings = config()
    settings.actor_rollout_ref.rollout.custom.score_momentum = 0.5
    rows = rows_of([make_window(**WINDOW)], tmp_path)
    client = Client([9.0, 3.0, 9.0, 5.0])  # the second and the last draft are mismatches
    rollout = SPDRollout(settings, client, [], Completions)
    client.controllers.score_mean, client.controllers.score_variance = 4.0, 0.25
    client.controllers.has_statistics = True

    (drawn,) = rollout._sample_windows(rows, 1, seed=3)
    rollout.tell_decoding()
    (judged,) = rollout._sample_windows(rows, 1, None)

    assert client.told == (0.5, 4.0, 0.5)
    torch.testing.assert_close(judged.sequences[0].scores[[1, 3]], torch.tensor([-2.0, 2.0]).sigmoid())
    torch.testing.assert_close(drawn.sequences[0].scores[[1, 3]], torch.tensor([3.0, 5.0]).sigmoid())
    assert not judged.sequences[0].accepts[1], "below the mean, above the threshold without normalising"


class Queue:
    """The part of verl's TransferQueue that a rollout fills."""

    def __init__(self):
        self.puts = []

    def kv_batch_put(self, **put):
        self.puts.append(put)


class RewardWorker:
    """verl's worker, in this process."""

    def __init__(self, settings):
        self.manager = SPDRewardManager(settings, Tokenizer(), load(settings))
        self.compute_score_batch = SimpleNamespace(remote=self._score)

    def _score(self, data):
        return [asyncio.run(self.manager.run_single(data[place : place + 1])) for place in range(len(data))]


def test_a_batch_of_the_trainers_becomes_rows_of_its_queue(tmp_path, monkeypatch):
    import numpy as np
    from verl.utils import tensordict_utils as tu
    from verl.utils.dataset.rl_dataset import collate_fn

    from verl_speculator.scorer import spd_rollout

    queue, settings = Queue(), config()
    monkeypatch.setattr(spd_rollout, "tq", queue)
    monkeypatch.setattr(spd_rollout.ray, "get", lambda asked: asked)
    windows = [
        make_window([5, 6, 9, 30 + place], [1, 2, 3, 4][: 4 - place], [1, 8, 3, 7, 11][: 5 - place], prompt_index=place)
        for place in range(3)
    ]
    rows = rows_of(windows, tmp_path)
    collated = collate_fn([{name: value for name, value in row.items() if name != "uid"} for row in rows])
    collated["uid"] = np.array([row["uid"] for row in rows], dtype=object)
    batch = tu.get_tensordict(collated)
    tu.assign_non_tensor_data(batch, "global_steps", 5)
    workers = [RewardWorker(settings), RewardWorker(settings)]
    rollout = SPDRollout(settings, Client([9.0, 0.1, 9.0, 0.2]), workers, Completions)

    rollout.generate_sequences(batch)

    samples, prompts = queue.puts
    assert samples["partition_id"] == prompts["partition_id"] == "train"
    assert samples["keys"] == [f"u{place}_{sample}_0" for place in range(3) for sample in range(4)]
    assert prompts["keys"] == ["u0", "u1", "u2"]
    assert {tag["status"] for tag in prompts["tags"]} == {"finished"}
    assert [tag["place"] for tag in samples["tags"]] == list(range(12))
    assert samples["tags"][0]["global_steps"] == 5
    fields = samples["fields"]
    assert fields["prompts"].size(0) == 12
    assert [len(row) for row in fields["responses"].unbind()] == [4] * 4 + [3] * 4 + [2] * 4
    assert set(rollout.take_metrics("train")) >= {"scorer/accuracy", "scorer/threshold", "scorer/case_rate/right_right"}
    assert rollout.take_metrics("val") == {}
