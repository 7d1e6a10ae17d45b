# Functions of the other scripts of this directory, which source this file.
# shellcheck shell=bash

# shellcheck disable=SC2034  # the scripts use it
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)

# Prints the comment at the head of the calling script.
usage() {
  sed -n '2,/^[^#]/{/^#/s/^# \{0,1\}//p}' "$0"
}

# Prints an error and exits with the code for wrong arguments.
refuse() {
  echo "$(basename "$0"): $*" >&2
  exit 2
}

# Reads the options --NAME VALUE into the variables of the same names; the first argument lists the names.
read_options() {
  local known=" $1 "
  shift
  while [ $# -gt 0 ]; do
    case $1 in
      -h | --help)
        usage
        exit 0
        ;;
    esac
    local name=${1#--}
    [[ $1 == --* && $known == *" $name "* ]] || refuse "unknown argument $1; --help lists the options"
    [ $# -ge 2 ] || refuse "$1: a value is missing"
    printf -v "${name//-/_}" '%s' "$2"
    shift 2
  done
}

# Requires that a variable is cpu or gpu.
check_device() {
  [[ $1 == cpu || $1 == gpu ]] || refuse "--device $1: must be cpu or gpu"
}

# Makes a virtual environment, unless it is there: PYTHON VENV.
make_venv() {
  "$1" -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python >= 3.11 is needed, this is " + sys.version.split()[0] + "; choose another with --python (make: PYTHON=...)")'
  [ -x "$2/bin/python" ] || "$1" -m venv "$2"
}

# Runs pip of an environment: VENV ARGUMENTS...
run_pip() {
  local venv=$1
  shift
  "$venv/bin/python" -m pip "$1" --quiet --disable-pip-version-check "${@:2}"
}

# Prints constraints of which later files replace earlier ones: FILE FILE...
merged_constraints() {
  awk -F '==' '!/^ *(#|-|$)/ { name = tolower($1); gsub(/[_.]/, "-", name); line[name] = $0 } END { for (name in line) print line[name] }' "$@" | sort
}
