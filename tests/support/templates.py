"""What the chat templates of well-known models do, written anew in small, and a tokenizer for each."""

from __future__ import annotations

from transformers import PreTrainedTokenizerFast

from tests.support.tiny import tiny_tokenizer

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# No system turn, strict alternation.
GEMMA2 = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + m.content | trim }}"
    "{{ '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)

# The system turn goes into the last turn of the user, and with it moves on from turn to turn; strict alternation.
MISTRAL = (
    "{% if messages and messages[0].role == 'system' %}{% set system = messages[0].content + '\n\n' %}"
    "{% set turns = messages[1:] %}{% else %}{% set system = '' %}{% set turns = messages %}{% endif %}"
    "{{ bos_token }}{% for m in turns %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m.role == 'user' %}{% set is_last = loop.revindex0 == (turns[-1].role == 'assistant') | int %}"
    "{{ '[INST] ' + (system if is_last else '') + m.content + '[/INST]' }}"
    "{% else %}{{ ' ' + m.content | trim + eos_token }}{% endif %}{% endfor %}"
)

# Reasoning of turns before the user's last one is dropped; where there is none, the last answer gets an empty one.
QWEN3 = (
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}{% set content = m.content %}"
    "{% if m.role == 'assistant' %}{% set thought = '' %}{% if '</think>' in content %}"
    "{% set thought = content.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{{ '<|im_start|>assistant\n' }}{% if loop.index0 > ns.last and (loop.last or thought) %}"
    "{{ '<think>\n' + thought + '\n</think>\n\n' }}{% endif %}{{ content + '<|im_end|>\n' }}"
    "{% else %}{{ '<|im_start|>' + m.role + '\n' + content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)

# Reasoning is dropped always, and the prompt opens it.
R1_DISTILL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}"
    "{% elif m.role == 'user' %}{{ '<|User|>' + m.content }}"
    "{% else %}{{ '<|Assistant|>' + m.content.split('</think>')[-1] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|Assistant|><think>\n' }}{% endif %}"
)

# Tools stand in the system turn; an answer may be a call without content.
LLAMA31 = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{% set system = messages[0].content %}"
    "{% set turns = messages[1:] %}{% else %}{% set system = '' %}{% set turns = messages %}{% endif %}"
    "{{ '<|start_header_id|>system<|end_header_id|>\n\n' }}{% if tools %}{{ 'Environment: ipython\n' }}"
    "{% for t in tools %}{{ t | tojson }}{% endfor %}{{ '\n' }}{% endif %}{{ system + '<|eot_id|>' }}"
    "{% for m in turns %}{{ '<|start_header_id|>' + ('ipython' if m.role == 'tool' else m.role) }}"
    "{{ '<|end_header_id|>\n\n' }}{% if m.tool_calls is defined %}{% set call = m.tool_calls[0].function %}"
    "{{ '{\"name\": \"' + call.name + '\", \"parameters\": ' + call.arguments | tojson + '}' }}"
    "{% else %}{{ m.content | trim }}{% endif %}{{ '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)

# (template, beginning of a text, the token that ends a turn, other special tokens)
TEMPLATES = {
    "chatml": (CHATML, None, "<|im_end|>", []),
    "gemma2": (GEMMA2, "<bos>", "<end_of_turn>", ["<start_of_turn>"]),
    "mistral": (MISTRAL, "<s>", "</s>", ["[INST]", "[/INST]"]),
    "qwen3": (QWEN3, None, "<|im_end|>", []),
    "r1": (R1_DISTILL, "<|begin|>", "<|end|>", ["<|User|>", "<|Assistant|>"]),
    "llama31": (LLAMA31, "<|begin|>", "<|eot_id|>", ["<|start_header_id|>", "<|end_header_id|>"]),
}


def tokenizer_of(family: str) -> PreTrainedTokenizerFast:
    """The tiny tokenizer with the template and the special tokens of a family."""
    template, begin, end, others = TEMPLATES[family]
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"eos_token": end, **({"bos_token": begin} if begin else {})})
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", *others]})
    # These are text to the decoder, as in the models that have them.
    tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.chat_template = template
    return tokenizer
