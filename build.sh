#!/usr/bin/env bash
# Builds the linux/amd64 container. Weights are not inside.
# usage: ./build.sh [NAME [TAG]] [--push] [--user]
#   NAME    image name, with its registry if it is to be pushed (default: qwen-image-worker)
#   TAG     image tag (default: the project's version)
#   --push  push it instead of loading it into the local Docker
#   --user  run as a user without rights; RunPod's network volumes need root, the default
set -euo pipefail
cd "$(dirname "$0")"

usage() { sed -n '2,7s/^# \{0,1\}//p' "$0"; }

names=() output=--load run_as=root
for argument in "$@"; do
  case $argument in
    --push) output=--push ;;
    --user) run_as=worker ;;
    -h | --help) usage && exit 0 ;;
    -*) echo "unknown option: $argument" >&2 && usage >&2 && exit 2 ;;
    *) names+=("$argument") ;;
  esac
done
if [ ${#names[@]} -gt 2 ]; then usage >&2 && exit 2; fi
name=${names[0]:-qwen-image-worker}
tag=${names[1]:-$(sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)}

if ! docker buildx version >/dev/null 2>&1; then
  echo "docker with buildx is needed; see https://docs.docker.com/build/" >&2
  exit 1
fi
set -x
docker buildx build --platform linux/amd64 --build-arg "RUN_AS=$run_as" --tag "$name:$tag" "$output" .
