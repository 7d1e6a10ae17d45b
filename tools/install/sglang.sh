#!/usr/bin/env bash
# Makes the rollout server's own environment, with exactly the packages of constraints/sglang-cpu.txt or sglang-gpu.txt.
# SGLang pins its torch and transformers, so it does not share the trainer's.
#
# usage: sglang.sh [--device cpu|gpu] [--venv DIR] [--python PYTHON]
#   --device  cpu (default) or gpu for CUDA 13.0
#   --venv    directory of the environment (default: .venv-sglang of this checkout)
#   --python  interpreter that makes it (default: python3)
set -euo pipefail
# shellcheck source=tools/install/common.sh
source "$(dirname "$0")/common.sh"

device=cpu venv=$ROOT/.venv-sglang python=python3
read_options "device venv python" "$@"
check_device "$device"
make_venv "$python" "$venv"
run_pip "$venv" install --no-deps -r "$ROOT/constraints/sglang-$device.txt"
