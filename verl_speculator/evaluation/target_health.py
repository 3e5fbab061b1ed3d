"""How good the target itself is: a target that repeats itself flatters every drafter."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from verl_speculator.evaluation.measure import Report
from verl_speculator.evaluation.memory import explain_out_of_memory
from verl_speculator.evaluation.prompts import Prompt
from verl_speculator.evaluation.settings import EvaluationSettings
from verl_speculator.evaluation.target import Target


def held_out_loss(
    target: Target, prompts: Sequence[Prompt], settings: EvaluationSettings, report: Report
) -> tuple[float | None, int]:
    """The target's mean cross entropy (nats) over all tokens of the reference answers, and how many those are.

    Each answer is read after its own prompt, cut where the context ends. None without a single reference token.
    """
    answered = [prompt for prompt in prompts if prompt.answer_ids]
    context = getattr(target.model.config.get_text_config(), "max_position_embeddings", None)
    total, count = 0.0, 0
    advice = "lower --num-prompts to leave out the longest answers, or use --dtype bfloat16"
    with explain_out_of_memory("reading the reference answers", settings, advice):
        for done, prompt in enumerate(answered, start=1):
            loss, tokens = _answer_loss(target, prompt, context)
            total, count = total + loss, count + tokens
            report("Reference answers", done, len(answered))
    return (total / count, count) if count else (None, 0)


@torch.inference_mode()
def _answer_loss(target: Target, prompt: Prompt, context: int | None) -> tuple[float, int]:
    tokens = [*prompt.prompt_ids, *prompt.answer_ids][:context]
    num_answer = len(tokens) - len(prompt.prompt_ids)
    input_ids = torch.tensor([tokens], device=target.device)
    # The model's own forward, because some models scale or cap what lm_head returns.
    logits = target.model(input_ids=input_ids, logits_to_keep=num_answer + 1).logits[0, -num_answer - 1 : -1]
    loss = torch.nn.functional.cross_entropy(logits.float(), input_ids[0, -num_answer:], reduction="sum")
    return loss.item(), num_answer
