#!/usr/bin/env bash
# Prints the versions of both environments and checks that they fit: the package works, and with --device gpu the compiled
# packages are there and both environments have the same NCCL. Needs no GPU.
#
# usage: check.sh [--device cpu|gpu] [--venv DIR] [--sglang-venv DIR|none]
#   --device       device for which the environments were made (default: cpu)
#   --venv         the trainer's environment (default: .venv of this checkout)
#   --sglang-venv  the rollout server's environment (default: none)
set -euo pipefail
# shellcheck source=tools/install/common.sh
source "$(dirname "$0")/common.sh"

device=cpu venv=$ROOT/.venv sglang_venv=none
read_options "device venv sglang-venv" "$@"
check_device "$device"

# Prints the installed version of a package: VENV PACKAGE.
version_of() {
  "$1/bin/python" -c 'import importlib.metadata, sys; print(importlib.metadata.version(sys.argv[1]))' "$2" 2>/dev/null ||
    refuse "$1: $2 is not installed"
}

trainer=(fipo-megatron torch megatron-core transformers)
servers=(sglang torch transformers)
if [ "$device" = gpu ]; then
  trainer+=(transformer-engine transformer-engine-torch flash-attn apex nvidia-nccl-cu13)
  servers+=(nvidia-nccl-cu13)
fi
for package in "${trainer[@]}"; do
  found=$(version_of "$venv" "$package")
  echo "trainer: $package $found"
done
"$venv/bin/fipo" --version
if [ "$sglang_venv" != none ]; then
  for package in "${servers[@]}"; do
    found=$(version_of "$sglang_venv" "$package")
    echo "servers: $package $found"
  done
  if [ "$device" = gpu ]; then
    one=$(version_of "$venv" nvidia-nccl-cu13)
    other=$(version_of "$sglang_venv" nvidia-nccl-cu13)
    [ "$one" = "$other" ] || refuse "NCCL is $one in $venv and $other in $sglang_venv; both must be the same: run nccl.sh"
  fi
fi
