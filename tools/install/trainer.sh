#!/usr/bin/env bash
# Makes the trainer's environment: torch, unpatched megatron-core and the other dependencies with the versions in
# constraints/, and this package. Running it again installs only what is missing. On a GPU it also sets NCCL back to
# torch's version, so nccl.sh follows.
#
# usage: trainer.sh [--device cpu|gpu] [--venv DIR] [--python PYTHON] [--package editable|none] [--extras NAME,...]
#                   [--constraints FILE]
#   --device       cpu (default), or gpu for CUDA 13.0 with Transformer Engine's core
#   --venv         directory of the environment (default: .venv of this checkout)
#   --python       interpreter that makes it (default: python3)
#   --package      editable (default): the package is this checkout; none: only its dependencies are installed
#   --extras       extras of pyproject.toml (default: none)
#   --constraints  file of exact versions beside constraints/cpu.txt (default: constraints/python3.12.txt on CPU with
#                  Python 3.12 or newer, else constraints/python3.11.txt)
set -euo pipefail
# shellcheck source=tools/install/common.sh
source "$(dirname "$0")/common.sh"

device=cpu venv=$ROOT/.venv python=python3 package=editable extras='' constraints=''
read_options "device venv python package extras constraints" "$@"
check_device "$device"

make_venv "$python" "$venv"
if [ -z "$constraints" ]; then
  constraints=$ROOT/constraints/python3.11.txt
  if [ "$device" = cpu ] && "$venv/bin/python" -c 'import sys; sys.exit(sys.version_info < (3, 12))'; then
    constraints=$ROOT/constraints/python3.12.txt
  fi
fi
files=("$ROOT/constraints/cpu.txt" "$constraints")
requirements=()
if [ "$device" = gpu ]; then
  files+=("$ROOT/constraints/gpu.txt")
  # What compiled extensions need at build time and, as they are installed without dependencies, at run time.
  requirements+=(transformer-engine transformer-engine-cu13 einops onnx onnxscript ninja pybind11 psutil setuptools wheel)
fi
exact=$(mktemp)
trap 'rm -f "$exact"' EXIT
merged_constraints "${files[@]}" >"$exact"

case $package in
  editable) requirements+=(-e "$ROOT${extras:+[$extras]}") ;;
  none)
    mapfile -t -O ${#requirements[@]} requirements < <("$venv/bin/python" - "$ROOT/pyproject.toml" "$extras" <<'PROGRAM'
import sys
import tomllib

project = tomllib.load(open(sys.argv[1], "rb"))["project"]
extras = [project["optional-dependencies"][name] for name in sys.argv[2].split(",") if name]
print(*project["dependencies"], *(line for lines in extras for line in lines), sep="\n")
PROGRAM
    )
    ;;
  *) refuse "--package $package: must be editable or none" ;;
esac
run_pip "$venv" install -c "$exact" "${requirements[@]}"
