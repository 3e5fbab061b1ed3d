#!/usr/bin/env bash
# GRPO in the world of this folder: on windows, and on whole answers; then all rules side by side. On 2 cores.
#
#   python -m examples.scorer.run --output OUTPUT     the world, its windows and labels, a supervised head
#   ./run_grpo.sh OUTPUT [key=value ...]
#
# Settings are those of `verl-speculator scorer train`. Started again it goes on where it was stopped. Decoding with a
# scorer is lossy. SEED, WINDOW_STEPS and ANSWER_STEPS may be set.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../sft/common.sh"

if [[ $# -lt 1 || $1 == -* || $1 == *=* ]]; then
    echo "usage: run_grpo.sh OUTPUT [key=value ...]" >&2
    exit 2
fi
output=$1
shift
[[ -f $output/work/labelled.parquet ]] || die "$output has no work/labelled.parquet: run python -m examples.scorer.run first"
command=$(find_command verl-speculator)
seed=${SEED:-0}

# train NAME STEPS SETTING...: leaves the scorer in OUTPUT/scorers/NAME.
train() {
    local name=$1 steps=$2
    shift 2
    local run=$output/grpo/$name-$seed
    "$command" scorer train \
        rollout.target_model_path="$(hydra_string "$output/target")" \
        model.scorer.path="$(hydra_string "$output/scorers/supervised")" \
        data.train_files="$(hydra_string "$output/work/labelled.parquet")" \
        data.seed="$seed" rollout.seed="$seed" \
        actor.optim.lr=1e-3 \
        algorithm.rollout_correction.bypass_mode=true \
        trainer.total_epochs=1000 \
        trainer.total_training_steps="$steps" \
        trainer.save_freq=20 \
        trainer.default_local_dir="$(hydra_string "$run")" \
        "$@"
    rm -rf "$output/scorers/$name"
    cp -r "$run/global_step_$(cat "$run/latest_checkpointed_iteration.txt")/actor/scorer" "$output/scorers/$name"
}

train grpo-windows "${WINDOW_STEPS:-100}" data.train_batch_size=64 rollout.n=8 rollout.temperature=2.5 "$@"
train grpo-answers "${ANSWER_STEPS:-100}" rollout.closed_loop=true data.train_batch_size=32 rollout.n=8 rollout.temperature=1.5 \
    reward.reward_kwargs.cost=0.5 reward.reward_kwargs.cost_step=0.05 \
    rollout.draft_model_path="$(hydra_string "$output/draft")" rollout.num_draft_tokens=5 rollout.max_new_tokens=48 "$@"

rules=(--accept probability --accept margin --accept kl)
for scorer in "$output"/scorers/*/; do
    rules+=(--accept "scorer:${scorer%/}")
done
"$command" scorer evaluate --base "$output/target" --draft "$output/draft" --answers answer --num-drafts 5 \
    --max-new-tokens 48 --batch-size 500 --validation "$output/data/validation.parquet" --data "$output/data/test.parquet" \
    "${rules[@]}" --output "$output/grpo/evaluation-$seed.json" --report "$output/grpo/report-$seed"
