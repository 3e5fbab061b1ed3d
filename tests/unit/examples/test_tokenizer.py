import pytest
from verl.utils.dataset.multiturn_sft_dataset import MultiTurnSFTDataset

from examples.demo.stdlib_functions import FunctionExample, write_splits
from examples.demo.tokenizer import TURN_END, train_tokenizer
from verl_speculator.data.prompts import encode_prompt

TEXTS = ['def f(x):\n    """Doc."""', "    return x + 1", "    if x is None:\n        return [1, 2]"]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS * 5, vocab_size=320)


def test_any_text_round_trips(tokenizer):
    for text in [*TEXTS, " leading , spaces .", "tab\tnewline\r\n", "naïve 統計 🙂"]:
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text


def test_size_and_special_tokens(tokenizer):
    assert len(tokenizer) <= 320
    assert tokenizer(TURN_END).input_ids == [tokenizer.eos_token_id]
    assert tokenizer.pad_token_id != tokenizer.eos_token_id


def test_verl_cuts_a_conversation_into_its_turns(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    example = FunctionExample("train_me", "f", "def f(x):", "Adds one.", "    return x + 1")
    counts = write_splits([example], tmp_path)
    assert counts["train"] == 1

    # The dataset raises when the turns put together differ from the whole conversation.
    dataset = MultiTurnSFTDataset(
        str(tmp_path / "train.parquet"),
        str(tmp_path / "tokenizer"),
        {"pad_mode": "no_padding", "max_length": 512, "truncation": "error"},
    )
    row = dataset[0]

    trained = tokenizer.decode(row["input_ids"][row["loss_mask"].bool()])
    context = tokenizer.decode(row["input_ids"][~row["loss_mask"].bool()])
    assert trained == "    return x + 1<|im_end|>"
    assert context == f"<|im_start|>user<|im_sep|>{example.request}<|im_end|><|im_start|>assistant<|im_sep|>"


def test_the_prompt_of_generation_is_what_training_saw(tokenizer):
    messages = [{"role": "user", "content": "f"}, {"role": "assistant", "content": "    return"}]

    prompt = encode_prompt(tokenizer, messages[:1], "a chat")[1]
    whole = tokenizer(tokenizer.apply_chat_template(messages, tokenize=False)).input_ids

    assert whole[: len(prompt)] == prompt
    assert tokenizer.decode(whole[len(prompt) :]) == "    return" + TURN_END
