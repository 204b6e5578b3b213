#!/bin/sh
# The browser tests drive the system's Chromium. Where it is missing and packages can be installed, install it.
set -eu
for name in "${CHROMIUM:-}" chromium chromium-browser google-chrome; do
  [ -n "$name" ] && command -v "$name" >/dev/null && exit 0
done
if command -v apt-get >/dev/null && [ "$(id -u)" = 0 ]; then
  echo "installing Chromium for the browser tests"
  export DEBIAN_FRONTEND=noninteractive
  if apt-get -qq update && apt-get -qq install -y --no-install-recommends chromium >/dev/null; then exit 0; fi
fi
echo "make: Chromium not found; install it (Debian: apt install chromium) or name it: CHROMIUM=/path/to/chromium" >&2
exit 2
