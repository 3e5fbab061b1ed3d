"""What the serving tests serve: a tiny base model, a speculator of every kind trained on its own text, prompts.

usage: serving_world.py FOLDER
"""

from __future__ import annotations

import dataclasses
import json
import random
import sys
from itertools import product
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from tests.support.tiny import VOCAB_SIZE, WORDS, tiny_tokenizer
from verl_speculator.decoding import DecodingResult, generate, speculative_generate
from verl_speculator.losses import PackedHiddenStates, speculator_loss
from verl_speculator.models import (
    ArcticLSTMSpeculator,
    ArcticLSTMSpeculatorConfig,
    MLPSpeculator,
    MLPSpeculatorConfig,
    Speculator,
)
from verl_speculator.scorer.config import DRAFT_SCALARS, SCALARS, ScoringModelConfig
from verl_speculator.scorer.model import AutoModelForSPDScoring
from verl_speculator.scorer.rule import load_rule
from verl_speculator.serving.export import export_speculator

HIDDEN = 64
N_PREDICT = 3
TRAINING_STEPS = 30
LONGEST_PROMPT = 60
NEW_TOKENS = 100

COMMON = {"input_hidden_dim": HIDDEN, "vocab_size": VOCAB_SIZE, "n_predict": N_PREDICT}
EQUAL = {"inner_dim": "48", "emb_dim": "48", "proj_dim": "48"}
DOTTED = {"inner_dim": "32.48", "emb_dim": "24.32", "proj_dim": "40.24"}


def make_speculators(said: torch.Tensor) -> dict[str, Speculator]:
    """One of every kind; of those with a draft vocabulary it is what the base has `said` [V'], ascending."""

    def mlp(**settings) -> Speculator:
        return MLPSpeculator(MLPSpeculatorConfig(**COMMON, inner_dim=48, **settings))

    def arctic(method: str, **settings) -> Speculator:
        return ArcticLSTMSpeculator(ArcticLSTMSpeculatorConfig(**COMMON, method=method, **settings))

    made = {
        "mlp": mlp(),
        "mlp_untied_scaled": mlp(tie_weights=False, scale_input=True),
        "rnn_drafts": arctic("sum_rnn", **EQUAL, scale_input=True, draft_vocab_size=len(said)),
        "rnn_untied_dotted": arctic("sum_rnn", **DOTTED, tie_weights=False),
        "lstm": arctic("sum_lstm", **EQUAL),
        "lstm_tied_embeddings_dotted": arctic("sum_lstm", **DOTTED, scale_input=True, tie_lstm_embs=True),
    }
    made["rnn_drafts"].set_draft_ids(said)
    return made


def write_base(folder: Path) -> None:
    """Attention heads of 32, the smallest that vLLM has on CPU."""
    config = AutoConfig.for_model(
        "qwen2",
        vocab_size=VOCAB_SIZE,
        hidden_size=HIDDEN,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        initializer_range=0.15,
    )
    torch.manual_seed(5)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)


def write_adapter(folder: Path) -> None:
    """A LoRA adapter of the base, as PEFT writes it, which changes what the base says."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(4)
    tensors = {}
    for layer, name in product(range(2), ("q_proj", "v_proj")):
        prefix = f"base_model.model.model.layers.{layer}.self_attn.{name}"
        for part, shape in (("lora_A", (8, HIDDEN)), ("lora_B", (HIDDEN, 8))):
            tensors[f"{prefix}.{part}.weight"] = torch.randn(shape, generator=generator) / 8
    save_file(tensors, folder / "adapter_model.safetensors")
    values = {"peft_type": "LORA", "r": 8, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(values | {"task_type": "CAUSAL_LM"}))


def make_prompts() -> list[list[int]]:
    """Token ids: prompts of one token, of lengths in between, and one longer than a chunk of the prefill."""
    generator = random.Random(1)
    tokenizer = tiny_tokenizer()
    prompts = [tokenizer.encode(" ".join(generator.choices(WORDS, k=length))) for length in (2, 5, 9, 14, 20, 3, 7)]
    return [[17], [300], *prompts, [generator.randrange(3, VOCAB_SIZE) for _ in range(LONGEST_PROMPT)]]


def train(
    base: torch.nn.Module, speculators: dict[str, Speculator], prompts: list[list[int]], answers: list[list[int]]
) -> None:
    """A few steps on the base model's own answers to the prompts: drafts are then often right, and often wrong."""
    rows = [torch.tensor(prompt + answer) for prompt, answer in zip(prompts, answers, strict=True)]
    with torch.no_grad():
        hidden = torch.cat([base.model(ids.unsqueeze(0)).last_hidden_state[0] for ids in rows])
    packed = PackedHiddenStates(
        hidden_states=hidden,
        input_ids=torch.cat(rows),
        loss_mask=torch.ones(len(hidden), dtype=torch.long),
        cu_seqlens=torch.tensor([0, *(len(ids) for ids in rows)]).cumsum(0),
    )
    for speculator in speculators.values():
        optimizer = torch.optim.AdamW(speculator.parameters(), lr=1e-2)
        for _ in range(TRAINING_STEPS):
            optimizer.zero_grad()
            speculator_loss(speculator, packed).loss.backward()
            optimizer.step()


def write_scorer(folder: Path, base: torch.nn.Module) -> None:
    """A scorer that has not learnt anything, and yet accepts some mismatches and others not."""
    config = ScoringModelConfig(HIDDEN, scalars=(*SCALARS, *DRAFT_SCALARS), lookahead=1, inner_dim=32)
    torch.manual_seed(8)
    actor = AutoModelForSPDScoring.from_config(config, base)
    torch.nn.init.normal_(actor.head.out.weight, std=0.5)
    actor.save_pretrained(folder)


def decode_lossily(
    base: torch.nn.Module, speculator: Speculator, rule: str, prompts: list[list[int]], new_tokens: int, stop: int
) -> DecodingResult:
    """By this project's own decoding, with `stop` for the token that ends a text."""
    inputs = padded(prompts)
    return speculative_generate(
        base, speculator.eval(), *inputs, max_new_tokens=new_tokens, eos_token_id=stop, lossy_rule=load_rule(rule, base)
    )


def padded(prompts: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and mask, padded on the left."""
    width = max(map(len, prompts))
    ids = [[0] * (width - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(ids), torch.tensor(mask)


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    write_base(folder / "base")
    write_adapter(folder / "adapter")
    base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32).eval()
    prompts = make_prompts()
    answers = generate(base, *padded(prompts), max_new_tokens=NEW_TOKENS).tokens
    counts = torch.bincount(torch.cat([torch.tensor(answer) for answer in answers]), minlength=VOCAB_SIZE)
    torch.manual_seed(6)
    # Some of what the base says cannot be drafted, and ids of both vocabularies differ.
    speculators = make_speculators((counts > 1).nonzero().squeeze(1))
    train(base, speculators, prompts, answers)
    for name, speculator in speculators.items():
        # As a training leaves it.
        speculator.save_pretrained(folder / name / "global_step_60" / "speculator")
    export_speculator(folder / "mlp_untied_scaled" / "global_step_60", folder / "ibm", "ibm")
    export_speculator(folder / "mlp" / "global_step_60", folder / "arctic", "arctic", "Qwen2ForCausalLM")
    (folder / "prompts.json").write_text(json.dumps(prompts))
    strict = reference(base, speculators, prompts)
    (folder / "reference.json").write_text(json.dumps(strict))
    write_scorer(folder / "scorer", base)
    stop = strict["tokens"][2][18]
    rules = ("strict", f"scorer:{folder / 'scorer'}@0.5", "accept-all")
    (folder / "lossy.json").write_text(json.dumps(lossy_reference(base, speculators["lstm"], rules, prompts, stop)))


def lossy_reference(
    base: torch.nn.Module, speculator: Speculator, rules: tuple[str, ...], prompts: list[list[int]], stop: int
) -> dict:
    """What each rule makes of the prompts, by its kind: tokens, and how many of them are the rule's alone."""
    report: dict = {"stop": stop, "rules": {}}
    for rule in rules:
        result = decode_lossily(base, speculator, rule, prompts, NEW_TOKENS, stop)
        kept = sum(map(len, result.lossy_tokens or []))
        report["rules"][rule.partition(":")[0]] = {"accept": rule, "tokens": result.tokens, "lossy_accepted": kept}
    return report


def reference(base: torch.nn.Module, speculators: dict[str, Speculator], prompts: list[list[int]]) -> dict:
    """The greedy text of each prompt, and the counters of each speculator, by this project's own decoding."""
    tokens: list[list[int]] = []
    counts = {}
    for name, speculator in speculators.items():
        result = speculative_generate(base, speculator.eval(), *padded(prompts), max_new_tokens=NEW_TOKENS)
        tokens = result.tokens
        counts[name] = dataclasses.asdict(result.counts)
    return {"tokens": tokens, "counts": counts}


if __name__ == "__main__":
    main(Path(sys.argv[1]))
