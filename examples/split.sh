#!/usr/bin/env bash
# Cut a folder of class folders into samples to train on and samples to test on: every fifth file of a class is for the test.
#
#   examples/split.sh SOURCE OUT
#   examples/split.sh Sign-Language-Digits-Dataset/Dataset photos
#
# OUT/train and OUT/test hold copies of the files of SOURCE, in a folder for each class, as `--data OUT` reads them.
set -euo pipefail

if [[ $# -ne 2 ]]; then
  echo "usage: $0 SOURCE OUT" >&2
  exit 2
fi
source=$(cd "$1" && pwd)
train=0 test=0
for class in "$source"/*/; do
  name=$(basename "$class")
  mkdir -p "$2/train/$name" "$2/test/$name"
  number=0
  for file in "$class"*; do
    number=$((number + 1))
    if ((number % 5)); then split=train train=$((train + 1)); else split=test test=$((test + 1)); fi
    cp "$file" "$2/$split/$name/"
  done
done
echo "$2: $train train, $test test"
