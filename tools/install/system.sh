#!/usr/bin/env bash
# Installs what the other scripts need from the system's packages: Python, a compiler, git and libraries of InfiniBand and
# NUMA. For Debian and Ubuntu, as root. CUDA itself comes with the base image or the cluster.
#
# usage: system.sh [--packages "NAME ..."]
#   --packages  other packages to install instead
set -euo pipefail
# shellcheck source=tools/install/common.sh
source "$(dirname "$0")/common.sh"

packages="python3 python3-dev python3-venv build-essential git ca-certificates libnuma1 libibverbs1 ibverbs-providers"
read_options "packages" "$@"

read -ra wanted <<<"$packages"
missing=()
for package in "${wanted[@]}"; do
  status=$(dpkg-query --show --showformat '${db:Status-Status}' "$package" 2>/dev/null || true)
  [ "$status" = installed ] || missing+=("$package")
done
if [ ${#missing[@]} -eq 0 ]; then
  echo "system.sh: all packages are installed"
  exit 0
fi
[ "$(id -u)" = 0 ] || refuse "must run as root to install ${missing[*]}"
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
rm -rf /var/lib/apt/lists/*
