#!/usr/bin/env bash
# Tries the container's install steps outside Docker: the files that the Dockerfile copies, its pip
# commands in a bare virtual environment, then one edit by what was installed, away from the source.
# usage: tools/rehearse_image.sh [PYTHON]
set -euo pipefail
cd "$(dirname "$0")/.."
python=${1:-python3}
app=$(mktemp -d)
trap 'rm -rf "$app"' EXIT

mapfile -t copied < <(sed -n 's/^COPY \(.*\) [^ ]*$/\1/p' Dockerfile | tr ' ' '\n')
echo "copied: ${copied[*]}"
cp -r "${copied[@]}" "$app"
mapfile -t steps < <(sed -n 's/^RUN pip /pip /p' Dockerfile)
"$python" -m venv "$app/venv"
cd "$app"
export PATH=$app/venv/bin:$PATH
for step in "${steps[@]}"; do
  echo "step: $step"
  bash -euo pipefail -c "$step" >/dev/null
done
test ! -e src
env -i PATH="$PATH" HOME="$app" MODEL=mini python handler.py --test_input "$(cat test_input.json)"
test -n "$(ls generated-images)"
env -i PATH="$PATH" HOME="$app" python -m image_worker.serve.health
echo "the image's install steps work"
