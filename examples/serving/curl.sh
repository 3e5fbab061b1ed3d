#!/usr/bin/env bash
# Ask a server started with `verl-speculator serve`, then print its drafting counters.
#
#   ./curl.sh http://localhost:8000 "Write a haiku about trains."
set -euo pipefail

address=${1:-http://localhost:8000}
question=${2:-Hello}

model=$(curl -fsS "$address/v1/models" | python3 -c 'import json, sys; print(json.load(sys.stdin)["data"][0]["id"])')
body=$(python3 -c 'import json, sys
print(json.dumps({"model": sys.argv[1], "messages": [{"role": "user", "content": sys.argv[2]}],
                  "max_tokens": 128, "temperature": 0}))' "$model" "$question")
curl -fsS "$address/v1/chat/completions" -H 'Content-Type: application/json' -d "$body"
echo

# Totals since the server started. Tokens per step of the base model = 1 + accepted tokens / drafts.
curl -fsS "$address/metrics" | grep -E '^vllm:spec_decode_num_(drafts|draft_tokens|accepted_tokens)'
