"""A training step of EAGLE-3, ours against that of Speculators 0.9, on the same hidden states.

    pip install 'speculators==0.9.*'      # in an environment with this package
    python benchmarks/bench_eagle3_step.py --json eagle3.json

Both models have SmolLM2-135M's shapes, random weights, one layer, three steps of training-time test, KL divergence to
the target, and a draft vocabulary of 8,192 tokens. The batch is 16 packed texts of uneven lengths, 62 % trained, with
the base's states in memory; a step is forward, backward, clipping and AdamW, which is what Speculators' own trainer
does with a batch. Each kind of attention that Speculators offers is timed, where it runs on this device. Each round
times every variant once, in alternating order; ratios are paired.

Speculators computes logits at every position and masks their losses, and masks by the token that is read; here the
trained positions alone have logits, those whose predicted token is trained. Losses are close, not equal, and are
printed.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import describe_machine, peak_extra_bytes, print_table, seconds, versions
from transformers import LlamaConfig, LlamaForCausalLM

from verl_speculator.models import Speculator

LAYER_IDS = [2, 15, 27]
ATTENTION = ("simple_flex_attention", "sdpa", "eager")
MIB = 2**20


def base_config() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        rope_theta=1e5,
    )


def random_batch(args: argparse.Namespace, width: int, vocab_size: int, device: torch.device) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    mean = args.tokens // args.texts
    lengths = [mean + int(extra) for extra in torch.linspace(-2 / 3, 2 / 3, args.texts) * mean]
    total = sum(lengths)
    trained = torch.cat([(torch.arange(n) >= 0.38 * n) for n in lengths])
    batch = {
        "hidden_states": torch.randn(1, total, 3 * width, generator=generator),
        "input_ids": torch.randint(vocab_size, (1, total), generator=generator),
        "document_ids": torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[None],
        "loss_mask": trained[None].long(),
        "position_ids": torch.cat([torch.arange(n) for n in lengths])[None],
        "verifier_last_hidden_states": torch.randn(1, total, width, generator=generator),
    }
    return {name: tensor.to(device) for name, tensor in batch.items()}


def draft_tokens(args: argparse.Namespace, vocab_size: int) -> torch.Tensor:
    chosen = torch.randperm(vocab_size, generator=torch.Generator().manual_seed(2))[: args.draft_vocab]
    return torch.zeros(vocab_size, dtype=torch.bool).index_fill(0, chosen, True)


def make_ours(folder: Path, config: LlamaConfig, args: argparse.Namespace, device: torch.device) -> Any:
    model_class: Any = Speculator.get_class("eagle3")
    arguments = {"num_layers": 1, "target_layer_ids": LAYER_IDS, "ttt_steps": 3}
    t2d = draft_tokens(args, config.vocab_size)
    model = model_class.from_training_args(config, t2d=t2d, verifier_name_or_path=str(folder), **arguments)
    embeddings = LlamaForCausalLM.from_pretrained(folder).get_input_embeddings().weight
    model.load_verifier_weights(embeddings, embeddings)
    train_kwargs, _ = model_class.get_trainer_kwargs(arguments)
    train_kwargs["verifier_lm_head_weight"] = embeddings.detach().to(device)
    return model.to(device).train(), train_kwargs


def make_theirs(
    folder: Path, config: LlamaConfig, attention: str, args: argparse.Namespace, device: torch.device
) -> Any:
    from speculators.losses import resolve_loss_config
    from speculators.models.eagle3 import Eagle3DraftModel

    t2d = draft_tokens(args, config.vocab_size)
    ids = t2d.nonzero().squeeze(1)
    layer = copy.deepcopy(config)
    layer.num_hidden_layers, layer.tie_word_embeddings = 1, False
    model = Eagle3DraftModel.from_training_args(
        layer,
        t2d=t2d,
        d2t=ids - torch.arange(len(ids)),
        draft_vocab_size=args.draft_vocab,
        norm_before_residual=True,
        norm_before_fc=True,
        norm_output=True,
        target_layer_ids=LAYER_IDS,
        ttt_steps=3,
        verifier_name_or_path=str(folder),
        draft_attn_impl=attention,
    )
    implementation = "fused" if device.type == "cuda" else "eager"
    return model.to(device).train(), {"ttt_steps": 3, "loss_config": resolve_loss_config("kl_div", implementation)}


def make_step(model: Any, batch: dict[str, Any], kwargs: dict[str, Any]) -> Callable[[], float]:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)

    def step() -> float:
        _, loss, _ = model(**batch, **kwargs)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return step


def shifted(batch: dict[str, Any]) -> dict[str, Any]:
    """As Speculators' data module hands a batch over: entry t has the state of t and the token of t + 1."""
    cut = {"hidden_states": slice(None, -1), "document_ids": slice(1, None), "position_ids": slice(1, None)}
    return {name: tensor[:, cut.get(name, slice(1, None))] for name, tensor in batch.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2704, help="of the batch")
    parser.add_argument("--texts", type=int, default=16)
    parser.add_argument("--draft-vocab", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="also write everything to this file")
    args = parser.parse_args()
    has_accelerator = torch.accelerator.is_available()
    device = torch.accelerator.current_accelerator() if has_accelerator else torch.device("cpu")
    assert device is not None

    with tempfile.TemporaryDirectory() as name:
        folder, config = Path(name), base_config()
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
        batch = random_batch(args, config.hidden_size, config.vocab_size, device)
        ours, kwargs = make_ours(folder, config, args, device)
        steps = {"ours": make_step(ours, batch, kwargs)}
        for attention in ATTENTION:
            theirs, kwargs = make_theirs(folder, config, attention, args, device)
            steps[f"speculators, {attention}"] = make_step(theirs, shifted(batch), kwargs)
        losses = {"ours": steps["ours"]()}
        for variant in list(steps)[1:]:
            try:
                losses[variant] = steps[variant]()
            except (RuntimeError, NotImplementedError, ValueError) as error:
                # Flex attention has no backward on a CPU; that a variant is missing shows in the table too.
                print(f"{variant}: does not run here ({str(error).splitlines()[0][:100]})")
                del steps[variant]
        times: dict[str, list[float]] = {variant: [] for variant in steps}
        peaks = {variant: peak_extra_bytes(step, device) for variant, step in steps.items()}
        for number in range(args.rounds):
            for variant in list(steps)[:: 1 if number % 2 == 0 else -1]:
                times[variant].append(seconds(steps[variant], device))

    tokens = batch["input_ids"].shape[1]
    rows = []
    for variant, own in times.items():
        ratios = [theirs / ours for theirs, ours in zip(own, times["ours"], strict=True)]
        rows.append(
            {
                "variant": variant,
                "seconds_median": statistics.median(own),
                "seconds_min": min(own),
                "seconds_max": max(own),
                "tokens_per_second": tokens / statistics.median(own),
                "ours_is_faster_by": statistics.median(ratios),
                "ratio_min": min(ratios),
                "ratio_max": max(ratios),
                "peak_extra_mb": peaks[variant] / MIB,
                "first_loss": losses[variant],
            }
        )
    print_table(rows, tuple(rows[0]))
    machine = describe_machine(device)
    print(f"\n{machine['device']}, {machine['cores']} cores, load average {machine['load_average']}")
    if args.json:
        whole = {"machine": machine, "versions": versions("torch", "transformers", "speculators"), "rows": rows}
        args.json.write_text(json.dumps(whole, indent=2) + "\n")


if __name__ == "__main__":
    main()
