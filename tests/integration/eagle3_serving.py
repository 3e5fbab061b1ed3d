"""EAGLE-3 and DFlash in a vLLM that knows nothing of this package (`VLLM_PLUGINS=""`), or with our plugin in it.

Medusa of docs/adding_an_algorithm.md too, where our plugin is.

usage: eagle3_serving.py world FOLDER            writes base, speculators trained on its text, prompts and our decoding
       eagle3_serving.py serve FOLDER OUTPUT     writes what vLLM says without and with each speculator
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import torch

SPECULATORS = {
    "eagle3": {},
    "eagle3_draft_vocab": {
        "norm_before_residual": False, "norm_before_fc": False, "norm_output": False, "num_layers": 2,
    },
    "eagle3_qwen3": {"draft_arch": "qwen3", "norm_before_fc": False, "fc_norm": True},
    "dflash_draft_vocab": {"num_layers": 2, "block_size": 4, "mask_token_id": 0},
}  # fmt: skip
TRAINING_STEPS = 70
NEW_TOKENS = 60
PAGE = Path(__file__).parents[2] / "docs" / "adding_an_algorithm.md"


def read_states(base: Any, rows: list[torch.Tensor], layer_ids: list[int]) -> dict[str, torch.Tensor]:
    """What a speculator of a transformer's layers is called with in training, for some sequences of tokens."""
    with torch.no_grad():
        outputs = [base.model(ids[None], output_hidden_states=True) for ids in rows]
    return {
        "hidden_states": torch.cat(
            [torch.cat([o.hidden_states[i] for i in layer_ids], dim=-1) for o in outputs], dim=1
        ),
        "input_ids": torch.cat(rows)[None],
        "document_ids": torch.cat([torch.full_like(ids, i) for i, ids in enumerate(rows)])[None],
        "loss_mask": torch.ones(1, sum(map(len, rows)), dtype=torch.long),
        "position_ids": torch.cat([torch.arange(len(ids)) for ids in rows])[None],
        "verifier_last_hidden_states": torch.cat([o.last_hidden_state for o in outputs], dim=1),
        "verifier_lm_head_weight": base.lm_head.weight.detach(),
    }


def train(name: str, base: Any, batch: dict[str, torch.Tensor], steps: int, **settings: Any) -> Any:
    """The algorithm `name` after a few steps on `batch`."""
    from verl_speculator.models import Speculator

    speculator = Speculator.get_class(name).from_training_args(
        base.config, verifier_architectures=base.config.architectures, **settings
    )
    speculator.load_verifier_weights(base.get_input_embeddings().weight, base.lm_head.weight)
    optimizer = torch.optim.AdamW([p for p in speculator.parameters() if p.requires_grad], lr=5e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        speculator(**batch)[1].backward()
        optimizer.step()
    return speculator.eval()


def write_world(folder: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    from tests.integration.serving_world import make_prompts, padded
    from tests.support.tiny import VOCAB_SIZE, tiny_tokenizer
    from verl_speculator.decoding import generate, speculative_generate
    from verl_speculator.losses import PackedHiddenStates, speculator_loss
    from verl_speculator.models import Speculator
    from verl_speculator.models.importing import import_code
    from verl_speculator.serving.export import export_speculator

    torch.set_num_threads(1)
    torch.manual_seed(5)
    config = AutoConfig.for_model(
        "llama", vocab_size=VOCAB_SIZE, hidden_size=64, intermediate_size=96, num_hidden_layers=4,
        num_attention_heads=2, num_key_value_heads=1, head_dim=32, max_position_embeddings=512,
        tie_word_embeddings=False, initializer_range=0.15,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},
    )  # fmt: skip
    base = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    base.save_pretrained(folder / "base")
    tiny_tokenizer().save_pretrained(folder / "base")

    prompts = make_prompts()
    answers = generate(base, *padded(prompts), max_new_tokens=NEW_TOKENS).tokens
    rows = [torch.tensor(prompt + answer) for prompt, answer in zip(prompts, answers, strict=True)]
    layer_ids = [1, 2, 3]
    batch = read_states(base, rows, layer_ids)
    said = torch.cat(rows).bincount(minlength=VOCAB_SIZE)
    counts = {}
    tokens: list[list[int]] = []
    for name, settings in SPECULATORS.items():
        # Most of what is said, but not all.
        vocabulary = {"t2d": said > 1} if name.endswith("draft_vocab") else {}
        speculator = train(
            *(name.partition("_")[0], base, batch, TRAINING_STEPS), target_layer_ids=layer_ids,
            verifier_name_or_path=str(folder / "base"), **settings, **vocabulary,
        )  # fmt: skip
        speculator.save_pretrained(folder / name)
        result = speculative_generate(base, speculator, *padded(prompts), max_new_tokens=NEW_TOKENS)
        tokens, counts[name] = result.tokens, dataclasses.asdict(result.counts)

    export_speculator(folder / "eagle3", folder / "eagle3_native", "eagle3")

    (folder / "medusa.py").write_text(re.search("```python\n(.*?)```", PAGE.read_text(), re.DOTALL)[1])
    config_class = import_code(str(folder / "medusa.py"), "--import").MedusaConfig
    medusa = Speculator.from_config(config_class(input_hidden_dim=64, vocab_size=VOCAB_SIZE, n_predict=3))
    packed = PackedHiddenStates(
        hidden_states=batch["verifier_last_hidden_states"][0],
        input_ids=batch["input_ids"][0],
        loss_mask=batch["loss_mask"][0],
        cu_seqlens=torch.tensor([0, *map(len, rows)]).cumsum(0),
    )
    optimizer = torch.optim.AdamW(medusa.parameters(), lr=5e-3)
    for _ in range(TRAINING_STEPS):
        optimizer.zero_grad()
        speculator_loss(medusa, packed).loss.backward()
        optimizer.step()
    medusa.save_pretrained(folder / "medusa")
    result = speculative_generate(base, medusa.eval(), *padded(prompts), max_new_tokens=NEW_TOKENS)
    assert result.tokens == tokens
    counts["medusa"] = dataclasses.asdict(result.counts)
    (folder / "prompts.json").write_text(json.dumps(prompts))
    (folder / "reference.json").write_text(json.dumps({"tokens": tokens, "counts": counts}))


def serve(folder: Path) -> dict:
    from tests.integration.serving_in_process import Engine, is_runner_hooked

    prompts = json.loads((folder / "prompts.json").read_text())
    requests = [(ids, {"max_tokens": NEW_TOKENS, "ignore_eos": True}) for ids in prompts]
    report = {}
    # Prompts go in at once: where one is cut into chunks, vLLM 0.28 hands the drafter the prompt's last token in place
    # of the one that follows the chunk, and then drafts otherwise than we do. What it says must not change by that.
    engines = {
        name: (folder / name, 512, {"method": name.partition("_")[0], "num_speculative_tokens": 3})
        for name in [*SPECULATORS, "eagle3_native"]
    }
    chunked = (folder / "eagle3", 32, {"method": "eagle3", "num_speculative_tokens": 3})
    engines = {"None": (None, 512, {}), **engines, "chunked": chunked}
    if os.environ.get("VERL_SPECULATOR_IMPORT"):
        engines["medusa"] = (folder / "medusa", 512, {"num_speculative_tokens": 3})
    for name, (source, chunk, settings) in engines.items():
        engine = Engine(folder, source, chunk, speculative=settings)
        answers = [answer["tokens"] for answer in engine.generate(requests)]
        speculative = engine.llm.llm_engine.vllm_config.speculative_config
        report[name] = {
            "tokens": answers,
            "counters": engine.counters(),
            "method": speculative and speculative.method,
            "hooked": is_runner_hooked(),
        }
        engine.close()
    return report


if __name__ == "__main__":
    if sys.argv[1] == "world":
        write_world(Path(sys.argv[2]))
    else:
        Path(sys.argv[3]).write_text(json.dumps(serve(Path(sys.argv[2]))))
