#!/bin/sh
# Make the project's virtual environment and install the project with the dependencies of one purpose.
# Usage: make_venv.sh PYTHON FOLDER run|test|lint|bench
set -eu
python=$1 venv=$2 purpose=$3

fail() { echo "make: $1" >&2; exit 2; }

command -v "$python" >/dev/null || fail "$python not found; install Python 3.10 or newer, or name one: make PYTHON=/path/to/python3"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
  fail "$("$python" --version) is too old; Python 3.10 or newer is needed: make PYTHON=/path/to/python3"
"$python" -c 'import ensurepip, venv' 2>/dev/null ||
  fail "$python cannot make virtual environments; on Debian and Ubuntu: apt install python3-venv"

if [ ! -x "$venv/bin/python" ] || ! "$venv/bin/python" -c 'import pip' 2>/dev/null; then
  echo "making $venv with $("$python" --version)"
  "$python" -m venv "$venv" || fail "cannot make $venv"
fi
case $purpose in
  run) what=. ;;
  lint) what=".[lint,test]" ;; # the type checker reads the fixtures too
  *) what=".[$purpose]" ;;
esac
echo "installing the project and its dependencies ($purpose)"
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check --editable "$what" ||
  fail "installing failed; see above, then run the command again"
