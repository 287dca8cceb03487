#!/usr/bin/env bash
# Look at a timm model, halve it, and say what that did to its quality and its speed.
#
#   examples/timm_pipeline.sh [MODEL [DATA [OUT]]]
#   examples/timm_pipeline.sh timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k photos@test
#
# Without arguments it takes the small ViT of `peftc demo` and scikit-learn's digits: offline, about a minute.
# RATIO is the share of the weights to keep (default: 0.5), ROUNDS how often the bench times each model (default: 30).
set -euo pipefail

model=${1:-peftc-demo/dense-seed-0}
data=${2:-sklearn:digits}
out=${3:-timm-pipeline}
ratio=${RATIO:-0.5}

if [[ $# -eq 0 && ! -d $model ]]; then
  peftc demo >/dev/null
fi
mkdir -p "$out"

peftc analyze "$model" --ratio "$ratio" --plan "$out/plan.json"   # edit the plan here, if you like
small=$(peftc decompose "$model" --plan "$out/plan.json" -o "$out/small")
peftc evaluate "$small" --data "$data" --against base --json >"$out/quality.json"
peftc bench "$small" --against base --rounds "${ROUNDS:-30}" --json >"$out/speed.json"
echo "$small"
