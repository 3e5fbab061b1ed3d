"""`verl-speculator regenerate`: training data whose answers are the target's own."""

from __future__ import annotations

import argparse
import importlib.util
import json
import time
from pathlib import Path
from typing import Any

from verl_speculator.cli.arguments import (
    add_data_arguments,
    add_decoding_arguments,
    add_load_arguments,
    settings_of,
)
from verl_speculator.errors import ConfigError
from verl_speculator.evaluation.settings import EvaluationInput, EvaluationSettings

PURPOSE = "let the base model answer the training prompts itself"
DESCRIPTION = """\
Let the base model answer the prompts of chat data itself. A speculator has to predict what the base says, not what is
in the data: trained on the base's own answers it drafts longer.

  verl-speculator regenerate --base BASE --data train.parquet --output answers.parquet

Answers are kept as the tokens that the base wrote, which training takes as they are. A run that was stopped goes on
where it stood when it is started again, also with another backend.
"""

# Prompts at once that an engine can make use of.
_BATCH_SIZES = {"vllm": 256, "hf": 32}
_ENDPOINT_REQUESTS = 64


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_data_arguments(parser, limit=None)
    parser.add_argument("--output", required=True, type=Path, metavar="FILE.parquet", help="where the answers go")
    parser.add_argument(
        "--chat-template-kwargs",
        type=_json_object,
        default={},
        metavar="JSON",
        help="""settings of the chat template, such as '{"enable_thinking": false}'""",
    )
    parser.add_argument(
        "--num-samples", type=int, default=1, metavar="N", help="answers to each chat, when sampling (default: 1)"
    )
    parser.add_argument(
        "--strict", action="store_true", help="a chat that does not fit into the base's context is an error"
    )
    engine = parser.add_argument_group("what answers")
    engine.add_argument(
        "--backend", choices=_BATCH_SIZES, help="default: vllm where it is installed, else hf, which is transformers"
    )
    engine.add_argument(
        "--endpoint",
        metavar="URL",
        help="a server of the base with OpenAI's interface that returns token ids, such as `vllm serve`; its key is "
        "read from OPENAI_API_KEY",
    )
    engine.add_argument("--tensor-parallel-size", type=int, default=1, metavar="N", help="GPUs of an engine of vLLM's")
    engine.add_argument(
        "--num-engines",
        type=int,
        metavar="N",
        help="engines that share the chats out (default: with vllm one for all GPUs, or so many of them, each; with "
        "RAY_ADDRESS those of the cluster)",
    )
    add_decoding_arguments(parser, max_new_tokens=1024, batch_size=None)
    add_load_arguments(parser.add_argument_group("how to load the base"))


def run(args: argparse.Namespace) -> None:
    from verl_speculator.evaluation.preflight import check_input

    backend = args.backend or ("vllm" if importlib.util.find_spec("vllm") else "hf")
    if args.batch_size is None:
        args.batch_size = _ENDPOINT_REQUESTS if args.endpoint else _BATCH_SIZES[backend]
    given = EvaluationInput(args.base, (), tuple(args.data), args.chat_template)
    # Most flags are those of an evaluation, and mean the same.
    settings = settings_of(args)
    if args.num_samples < 1:
        raise ConfigError(f"--num-samples must be at least 1, got {args.num_samples}")
    if args.backend and args.endpoint:
        raise ConfigError("give --backend or --endpoint, not both: the server has an engine of its own")
    if args.backend == "vllm" and not importlib.util.find_spec("vllm"):
        raise ConfigError("--backend vllm needs vLLM: pip install 'verl_speculator[vllm]', or take --backend hf")
    of_hf = [f"--{name.replace('_', '-')}" for name in ("device", "device_map", "attn_implementation", "quantization")]
    given_of_hf = [flag for flag in of_hf if getattr(args, flag[2:].replace("-", "_")) not in (None, "auto")]
    if given_of_hf and (args.endpoint or backend != "hf"):
        raise ConfigError(f"{given_of_hf[0]} is for --backend hf: give that too, or leave it out")
    if not args.output.absolute().parent.is_dir():
        raise ConfigError(f"--output: there is no folder {str(args.output.absolute().parent)!r} to write into")
    check_input(given, settings)
    written = _answer(args, backend, given, settings)
    cut = f", {written.num_cut} of them cut at --max-new-tokens={args.max_new_tokens}" if written.num_cut else ""
    print(f"{args.output}: {written.num_answers} answers{cut}; {written.num_tokens} tokens in {written.num_rows} rows")
    if written.num_too_long:
        print(
            f"{written.num_too_long} chats did not fit into the context of the base less "
            f"--max-new-tokens={args.max_new_tokens}: left out from the first prompt on that does not"
        )


def _answer(args: argparse.Namespace, backend: str, given: EvaluationInput, settings: EvaluationSettings) -> Any:
    from tqdm import tqdm

    from verl_speculator.base_model.loading import explain_out_of_memory, load_tokenizer_and_config, pick_device
    from verl_speculator.data.engines import EngineSettings, answer_with
    from verl_speculator.data.regeneration import AnsweringBase, Progress, RegenerationSettings, regenerate
    from verl_speculator.decoding import SamplingParams

    regeneration = RegenerationSettings(
        max_new_tokens=args.max_new_tokens,
        batch_size=args.batch_size,
        sampling=SamplingParams(args.temperature, args.top_p, args.top_k),
        seed=args.seed,
        messages_key=args.messages_key,
        num_samples=args.num_samples,
        template_options=args.chat_template_kwargs,
        strict=args.strict,
    )
    engines = EngineSettings(backend, args.endpoint, args.num_engines, args.tensor_parallel_size)
    pick_device(args.device)  # one that is not there is said before anything is read
    tokenizer, config = load_tokenizer_and_config(given.base, settings, given.chat_template)
    base = AnsweringBase(given.base, getattr(config, "_commit_hash", None) or settings.revision)
    start = None
    with tqdm(desc="Answering", unit="chat") as bar, explain_out_of_memory("answering", settings.memory_advice):

        def report(progress: Progress) -> None:
            nonlocal start
            if start is None:
                bar.reset(total=progress.total)
                bar.initial = bar.n = progress.done_before
                start = time.monotonic()
            speed = progress.num_tokens / max(time.monotonic() - start, 1e-9)
            bar.set_postfix_str(f"{speed:.0f} tokens/s", refresh=False)
            bar.update(progress.done - bar.n)

        return regenerate(
            answer_with(engines, given.base, settings, tokenizer, regeneration),
            engines.name,
            base,
            tokenizer,
            given.data,
            args.output,
            regeneration,
            limit=settings.num_prompts,
            report=report,
        )


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"must be a JSON object, got {text!r}")
    return value
