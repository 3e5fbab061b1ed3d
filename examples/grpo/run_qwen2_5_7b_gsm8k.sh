#!/usr/bin/env bash
# GRPO of Qwen2.5-7B-Instruct on GSM8K on one machine with 8 GPUs, its rollout drafted by a speculator that follows.
#
#   ./run_qwen2_5_7b_gsm8k.sh SPECULATOR SAVE_PATH [key=value ...]
#
# SPECULATOR: a chain of heads (MLP, LSTM) trained on the model's own answers to these prompts, such as
#   verl-speculator regenerate --base Qwen/Qwen2.5-7B-Instruct --data gsm8k_chats.parquet --output answers.parquet --temperature 1
#   verl-speculator train --speculator-type lstm --verifier-name-or-path Qwen/Qwen2.5-7B-Instruct \
#       --data-path answers.parquet --save-path SPECULATOR --nproc 8
# DATA: where verl's examples/data_preprocess/gsm8k.py has written train.parquet and test.parquet; ~/data/gsm8k by default.
#
# Not measured: no figure of speed on GPUs is claimed. Look at rollout/spec_acceptance_length and rollout/tokens_per_second
# of the first steps, and of a run without speculative_config, before you let it run.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../sft/common.sh"

if [[ $# -lt 2 || $1 == -* || $1 == *=* ]]; then
    echo "usage: run_qwen2_5_7b_gsm8k.sh SPECULATOR SAVE_PATH [key=value ...]" >&2
    exit 2
fi
speculator=$1
save_path=$2
shift 2
data=${DATA:-$HOME/data/gsm8k}
command=$(find_command verl-speculator)

# Up to 64 requests on an engine are drafted in full, up to 128 by one token, and a full batch not at all: the prompts of a
# step come at once, and most of its time is the tail of long answers. `verl-speculator bench --tune` finds your numbers.
drafts='[[1,64,3],[65,128,1],[129,1024,0]]'

exec "$command" grpo \
    model.path=Qwen/Qwen2.5-7B-Instruct \
    model.enable_gradient_checkpointing=true \
    speculator.path="$(hydra_string "$speculator")" \
    speculator.lr=1e-4 \
    speculator.clip_grad=1.0 \
    speculator.max_tokens_per_step=262144 \
    speculator.shadow_frozen=true \
    speculator.adaptive=true \
    data.train_files="$(hydra_string "$data/train.parquet")" \
    data.val_files="$(hydra_string "$data/test.parquet")" \
    data.train_batch_size=1024 \
    data.max_prompt_length=512 \
    data.max_response_length=1024 \
    data.filter_overlong_prompts=true \
    actor.optim.lr=1e-6 \
    actor.ppo_mini_batch_size=256 \
    actor.ppo_max_token_len_per_gpu=24576 \
    actor.use_kl_loss=true \
    actor.kl_loss_coef=0.001 \
    actor.fsdp_config.param_offload=false \
    actor.fsdp_config.optimizer_offload=false \
    ref.fsdp_config.param_offload=true \
    rollout.n=8 \
    rollout.tensor_model_parallel_size=1 \
    rollout.gpu_memory_utilization=0.6 \
    rollout.max_num_seqs=1024 \
    rollout.checkpoint_engine.update_weights_bucket_megabytes=2304 \
    rollout.engine_kwargs.vllm.speculative_config.num_speculative_tokens=3 \
    rollout.engine_kwargs.vllm.speculative_config.num_speculative_tokens_per_batch_size="$drafts" \
    trainer.n_gpus_per_node=8 \
    trainer.nnodes=1 \
    trainer.total_epochs=15 \
    trainer.save_freq=20 \
    trainer.test_freq=5 \
    trainer.logger=[console,tensorboard] \
    trainer.default_local_dir="$(hydra_string "$save_path")" \
    "$@"
