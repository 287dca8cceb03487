#!/usr/bin/env bash
# What a CI job runs: compress a model, heal it, measure it, fail where that cost too much, and export what passed.
#
#   examples/ci/compress.sh [MODEL [DATA [OUT]]]
#   MAX_DROP=0.02 examples/ci/compress.sh models/vit photos release
#
# Exit code 3 and one line on stderr where a gate is not met; then nothing is exported, and no path printed. Run it again,
# and it goes on where it stopped: what was done is not done again.
#
# MAX_DROP (0.05) is the most that the first metric may lose, MAX_BYTES the largest file, if set. RATIO (0.6) is the share
# of the weights to keep, KEEP the number of layers, if set, STEPS (200) how long to heal, SAMPLES how much data to read,
# FORMAT (safetensors) that of the export.
set -euo pipefail

model=${1:-peftc-demo/dense-seed-0}
data=${2:-sklearn:digits}
out=${3:-release}
on=(--data "$data" ${SAMPLES:+--num-samples "$SAMPLES"})
heal=(--steps "${STEPS:-200}" --learning-rate 1e-3)

if [[ $# -eq 0 && ! -d $model ]]; then
  peftc demo -q >/dev/null
fi
mkdir -p "$out"

current=$(peftc decompose "$model" --ratio "${RATIO:-0.6}" "${on[@]}" -o "$out/1-decompose" -q)
current=$(peftc distill "$current" "${on[@]}" "${heal[@]}" -o "$out/2-distill" -q)
if [[ -n ${KEEP:-} ]]; then
  current=$(peftc prune-layers "$current" "${on[@]}" --score block-influence --keep "$KEEP" -o "$out/3-prune-layers" -q)
  current=$(peftc finetune "$current" "${on[@]}" "${heal[@]}" -o "$out/4-finetune" -q)
fi

peftc evaluate "$current" --data "$data" --against "$model" --max-drop "${MAX_DROP:-0.05}" -q --json >"$out/quality.json"
size=(--rounds "${ROUNDS:-30}" ${MAX_BYTES:+--max-bytes "$MAX_BYTES"})
peftc bench "$current" --against "$model" "${size[@]}" -q --json >"$out/speed.json"
peftc export "$current" --format "${FORMAT:-safetensors}" --rounds "${ROUNDS:-30}" -o "$out/export" --overwrite -q
