#!/usr/bin/env bash
# Compiles the packages in constraints/gpu-compiled.txt against the installed torch: Transformer Engine's part for torch,
# flash-attn and apex. Needs CUDA's compiler, in the version that torch was built with, and the headers of cuDNN. Takes an
# hour or more; what is installed in the right version already is left alone.
#
# usage: extensions.sh [--venv DIR] [--jobs N] [--architecture X.Y]
#   --venv          the trainer's environment (default: .venv of this checkout)
#   --jobs          compilers at the same time, about 8 GB of memory each (default: 4)
#   --architecture  compute capability of the GPUs (default: 9.0, Hopper)
set -euo pipefail
# shellcheck source=tools/install/common.sh
source "$(dirname "$0")/common.sh"

venv=$ROOT/.venv jobs=4 architecture=9.0
read_options "venv jobs architecture" "$@"

[ -x "$venv/bin/python" ] || refuse "--venv $venv: is no environment; make it with trainer.sh --device gpu"
compiler=${CUDA_HOME:-/usr/local/cuda}/bin/nvcc
[ -x "$compiler" ] || refuse "$compiler: there is no CUDA compiler; CUDA_HOME must be the directory of CUDA"
found=$("$compiler" --version | sed -n 's/.*release \([0-9.]*\),.*/\1/p')
wanted=$("$venv/bin/python" -c 'import torch; print(torch.version.cuda)')
[ "$found" = "$wanted" ] || refuse "$compiler: is of CUDA $found; torch in $venv was built with CUDA $wanted"

export CUDA_HOME=${CUDA_HOME:-/usr/local/cuda} MAX_JOBS=$jobs TORCH_CUDA_ARCH_LIST=$architecture
export NVTE_FRAMEWORK=pytorch APEX_CPP_EXT=1 APEX_CUDA_EXT=1 FLASH_ATTN_CUDA_ARCHS=${architecture/./}
run_pip "$venv" install --no-deps --no-build-isolation -r "$ROOT/constraints/gpu-compiled.txt"
