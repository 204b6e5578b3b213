#!/bin/sh
# The programs that the tests drive beside our own: a browser, Redis, Prometheus. Where one is missing and packages can be
# installed, install it.
set -eu
missing=
want() { # want PACKAGE NAME…
  package=$1; shift
  for name in "$@"; do
    [ -n "$name" ] && command -v "$name" >/dev/null && return 0
  done
  missing="$missing $package"
}
want chromium "${CHROMIUM:-}" chromium chromium-browser google-chrome
want redis-server redis-server
want prometheus promtool
[ -n "$missing" ] || exit 0
if command -v apt-get >/dev/null && [ "$(id -u)" = 0 ]; then
  echo "installing for the tests:$missing"
  export DEBIAN_FRONTEND=noninteractive
  # shellcheck disable=SC2086 - a list of packages
  if apt-get -qq update && apt-get -qq install -y --no-install-recommends $missing >/dev/null; then exit 0; fi
fi
echo "make: not found:$missing; install them (Debian: apt install$missing)" >&2
echo "make: a browser elsewhere can be named: CHROMIUM=/path/to/chromium" >&2
exit 2
