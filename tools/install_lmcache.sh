#!/bin/sh
# Install the real LMCache on the CPU into an environment of its own and print the path of its Python.
# Usage: install_lmcache.sh PYTHON
# It is kept between runs and clones under $XDG_CACHE_HOME (default ~/.cache); about 3 GB.
set -eu
python=$1
lmcache=0.5.6 torch=2.13.0
requirements=$(dirname "$0")/../tests/lmcache/requirements.txt
version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
hash=$({ cat "$requirements"; echo "$lmcache $torch"; } | sha256sum | cut -c1-12)
venv=${XDG_CACHE_HOME:-$HOME/.cache}/lmcache-ops/lmcache-$lmcache-python$version-$hash

mkdir -p "$venv"
exec 9>"$venv/.lock"
flock 9
if [ ! -e "$venv/.complete" ]; then
  echo "installing LMCache $lmcache into $venv (once; some minutes)" >&2
  {
    "$python" -m venv "$venv"
    "$venv/bin/python" -m pip install --quiet "torch==$torch" numpy
    "$venv/bin/python" -m pip install --quiet --no-deps "lmcache==$lmcache"
    "$venv/bin/python" -m pip install --quiet -r "$requirements"
  } 1>&2
  touch "$venv/.complete"
fi
echo "$venv/bin/python"
