#!/usr/bin/env bash
# Replaces the trainer's NCCL by the one that SGLang's torch requires (constraints/gpu-nccl.txt): both sides of a weight
# broadcast must have the same version.
#
# usage: nccl.sh [--venv DIR]
#   --venv  the trainer's environment (default: .venv of this checkout)
set -euo pipefail
# shellcheck source=tools/install/common.sh
source "$(dirname "$0")/common.sh"

venv=$ROOT/.venv
read_options "venv" "$@"
[ -x "$venv/bin/python" ] || refuse "--venv $venv: is no environment; make it with trainer.sh --device gpu"
run_pip "$venv" install --no-deps -r "$ROOT/constraints/gpu-nccl.txt"
