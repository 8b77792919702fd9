#!/usr/bin/env bash
# Make .venv with this package in it, editable. Called by make; may be run by hand: scripts/setup.sh [EXTRA ...]
# Finds a Python >= 3.11 (as mlx-lm does); on Debian or Ubuntu as root it installs what the system lacks. Everything that
# is missing is said in one sentence.
set -uo pipefail
cd "$(dirname "$0")/.."

fail() { echo "setup: $*" >&2; exit 1; }

log=.venv/setup.log
extras=$(IFS=,; echo "$*")
need_mb=1500
case ",$extras," in *,test,*|*,bench,*|*,bases,*) need_mb=3000 ;; esac

free_mb=$(df -Pm . | awk 'NR == 2 {print $4}')
[ -d .venv ] || [ "$free_mb" -ge "$need_mb" ] || \
  fail "the disk has ${free_mb} MB free, the environment needs about ${need_mb} MB; free some and run it again."

apt_install() { # install Debian packages where that is possible, quietly
  command -v apt-get >/dev/null || return 1
  local sudo=""
  if [ "$(id -u)" -ne 0 ]; then sudo -n true 2>/dev/null || return 1; sudo="sudo"; fi
  echo "setup: apt-get install $*" >&2
  $sudo apt-get -qq update >/dev/null 2>&1
  DEBIAN_FRONTEND=noninteractive $sudo apt-get -qq install -y --no-install-recommends "$@" >/dev/null 2>&1
}

usable() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

find_python() {
  for name in "${PYTHON:-}" python3 python3.13 python3.12 python3.11 python3.14 \
      /opt/homebrew/bin/python3 /usr/local/bin/python3; do
    [ -n "$name" ] && command -v "$name" >/dev/null && usable "$name" && { command -v "$name"; return 0; }
  done
  return 1
}

make_venv() { "$1" -m venv .venv >/dev/null 2>&1 && [ -x .venv/bin/pip ]; }

if [ ! -x .venv/bin/pip ]; then
  python=$(find_python) || { apt_install python3 python3-venv; python=$(find_python); } || \
    fail "no Python 3.11 or newer was found; install one (macOS: brew install python@3.12, or python.org) and run it again."
  if ! make_venv "$python"; then
    rm -rf .venv
    apt_install python3-venv
    make_venv "$python" || fail "$python cannot make a virtual environment; install its venv module (Debian: apt-get install python3-venv)."
  fi
fi

if [ "$(uname -s)" = Linux ]; then
  if ! command -v g++ >/dev/null && ! apt_install g++; then
    echo "setup: no g++ was found; MLX runs without compiled graphs (slower). Debian: apt-get install g++." >&2
  fi
  # x86-64 gets MKL from PyPI with the package; other processors need Debian's OpenBLAS.
  if [ "$(uname -m)" != x86_64 ] && ! ldconfig -p 2>/dev/null | grep -q libopenblas; then
    apt_install libopenblas0-pthread || \
      echo "setup: no OpenBLAS was found; MLX computes fifty times slower without. Debian: apt-get install libopenblas0-pthread." >&2
  fi
fi

echo "setup: installing Python packages into .venv${extras:+ (with $extras)} ..." >&2
if ! .venv/bin/pip install --disable-pip-version-check -q -e ".${extras:+[$extras]}" >"$log" 2>&1; then
  if grep -qiE "connection|resolve|timed out|network|ProxyError|Temporary failure|from versions: none" "$log"; then
    fail "the package index could not be reached; connect to the network and run it again (details: $log)."
  fi
  grep -qi "no space left" "$log" && fail "the disk is full; free about ${need_mb} MB and run it again."
  tail -n 3 "$log" >&2
  fail "pip could not install the packages; see $log."
fi
