#!/usr/bin/env bash
# Installs a copy of this package into the trainer's environment, without touching its dependencies.
#
# usage: package.sh [--venv DIR]
#   --venv  the trainer's environment (default: .venv of this checkout)
set -euo pipefail
# shellcheck source=tools/install/common.sh
source "$(dirname "$0")/common.sh"

venv=$ROOT/.venv
read_options "venv" "$@"
[ -x "$venv/bin/python" ] || refuse "--venv $venv: is no environment; make it with trainer.sh"
rm -rf "$ROOT"/build/lib "$ROOT"/build/bdist.* # modules of an earlier version would be installed with the new ones
run_pip "$venv" install --no-deps --force-reinstall "$ROOT"
