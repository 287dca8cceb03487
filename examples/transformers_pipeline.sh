#!/usr/bin/env bash
# The same for a transformers text model: look at it, halve it, and say what that did to its quality and its speed.
#
#   examples/transformers_pipeline.sh MODEL DATA [OUT]
#   examples/transformers_pipeline.sh sentence-transformers/all-MiniLM-L6-v2 stsb-test.csv
#
# RATIO is the share of the weights to keep (default: 0.5), ROUNDS how often the bench times each model (default: 30).
set -euo pipefail

if [[ $# -lt 2 ]]; then
  echo "usage: $0 MODEL DATA [OUT]" >&2
  exit 2
fi
model=$1
data=$2
out=${3:-transformers-pipeline}
ratio=${RATIO:-0.5}
mkdir -p "$out"

peftc analyze "$model" --ratio "$ratio" --plan "$out/plan.json"   # edit the plan here, if you like
small=$(peftc decompose "$model" --plan "$out/plan.json" -o "$out/small")
peftc evaluate "$small" --data "$data" --against base --json >"$out/quality.json"
peftc bench "$small" --against base --rounds "${ROUNDS:-30}" --json >"$out/speed.json"
echo "$small"
