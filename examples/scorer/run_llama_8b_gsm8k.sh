#!/usr/bin/env bash
# A scorer for Llama-3.1-8B-Instruct with a 1B draft on GSM8K, on one machine of 8 GPUs: windows, labels, a head, GRPO on
# whole answers, and what each rule saves and costs. Written for that machine and not yet run on one.
#
#   ../sft/gsm8k/prepare_gsm8k.py
#   ./run_llama_8b_gsm8k.sh OUTPUT [key=value ...]
#
# TARGET and DRAFT name other models, DATA_DIR another folder of the parquet files. Settings are those of
# `verl-speculator scorer train`. Steps whose output is there are not done again. Decoding with a scorer is lossy.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../sft/common.sh"

if [[ $# -lt 1 || $1 == -* || $1 == *=* ]]; then
    echo "usage: run_llama_8b_gsm8k.sh OUTPUT [key=value ...]" >&2
    exit 2
fi
output=$1
shift

target=${TARGET:-meta-llama/Llama-3.1-8B-Instruct}
draft=${DRAFT:-meta-llama/Llama-3.2-1B-Instruct}
data_dir=${DATA_DIR:-$HOME/data/gsm8k}
command=$(find_command verl-speculator)
python=$(dirname "$command")/python
models=(--base "$target" --draft "$draft" --answers answer --dtype bfloat16 --num-drafts 6 --max-new-tokens 512)
mkdir -p "$output"

# The worked solution ends with `#### 12`; the last 500 training questions choose thresholds.
[[ -f $output/test.parquet ]] || "$python" - "$data_dir" "$output" <<'PYTHON'
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

data, output = map(Path, sys.argv[1:])


def with_answers(split):
    chats = pq.read_table(data / f"{split}.parquet").column("messages").to_pylist()
    return pa.table({"messages": chats, "answer": [chat[-1]["content"] for chat in chats]})


train = with_answers("train")
pq.write_table(train.slice(0, len(train) - 500), output / "train.parquet")
pq.write_table(train.slice(len(train) - 500), output / "validation.parquet")
pq.write_table(with_answers("test"), output / "test.parquet")
PYTHON

[[ -f $output/windows.parquet ]] ||
    "$command" scorer data "${models[@]}" --data "$output/train.parquet" --output "$output/windows.parquet"
[[ -f $output/labelled.parquet ]] ||
    "$command" scorer label --base "$target" --dtype bfloat16 --windows "$output/windows.parquet" \
        --output "$output/labelled.parquet"
[[ -d $output/head ]] ||
    "$command" scorer fit --base "$target" --dtype bfloat16 --windows "$output/labelled.parquet" --output "$output/head"

# One copy of the target on each GPU, which decodes 128 answers a step: 16 prompts, 8 samples each.
"$command" scorer train \
    rollout.target_model_path="$(hydra_string "$target")" \
    rollout.draft_model_path="$(hydra_string "$draft")" \
    rollout.closed_loop=true \
    rollout.n=8 \
    rollout.num_draft_tokens=6 \
    rollout.max_new_tokens=512 \
    model.scorer.path="$(hydra_string "$output/head")" \
    data.train_files="$(hydra_string "$output/labelled.parquet")" \
    data.train_batch_size=16 \
    actor.fsdp_config.model_dtype=bf16 \
    actor.optim.lr=3e-4 \
    actor.entropy_coeff=0.003 \
    actor.use_kl_loss=true \
    trainer.n_gpus_per_node=8 \
    trainer.total_training_steps=200 \
    trainer.save_freq=20 \
    trainer.default_local_dir="$(hydra_string "$output/grpo")" \
    "$@"

step=$(cat "$output/grpo/latest_checkpointed_iteration.txt")
"$command" scorer evaluate "${models[@]}" --validation "$output/validation.parquet" --data "$output/test.parquet" \
    --accept probability --accept kl --accept "scorer:$output/head" \
    --accept "scorer:$output/grpo/global_step_$step/actor/scorer" \
    --output "$output/evaluation.json" --report "$output/report"
