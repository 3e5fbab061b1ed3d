"""A byte-level BPE tokenizer trained on the demo's own text, with a chat template that verl can cut into turns."""

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

PAD, TURN_START, CONTENT_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_sep|>", "<|im_end|>"

# verl tokenizes each turn alone and checks that the pieces equal the whole conversation: no default system prompt, and
# nothing that depends on a turn's position. A special token ends the header: a line break there would merge with the
# spaces that open a function's body, and the prompt of generation would not be what training saw. Nothing follows the
# closing token: it would be trained on and never generated.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '<|im_sep|>' + message['content'] + '<|im_end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}"
)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Learn `vocab_size` tokens from `texts`. Any text round-trips, because the alphabet is the 256 bytes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, TURN_START, CONTENT_START, TURN_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=TURN_END,
        additional_special_tokens=[TURN_START, CONTENT_START],
        clean_up_tokenization_spaces=False,  # code is not prose: " ," must stay " ,"
        model_max_length=4096,
    )
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped
