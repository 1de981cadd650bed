# shellcheck shell=bash disable=SC2086
# Sourced by `demo` and `test`: `setup run` or `setup dev` makes or reuses .venv at the repository
# root ($root). It prints to stderr only, and keeps to bash 3.2, which is what macOS has.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export PIP_USER=0 PIP_DISABLE_PIP_VERSION_CHECK=1 UV_SYSTEM_CERTS="${UV_SYSTEM_CERTS:-1}"
unset PYTHONHOME PYTHONPATH

say() { printf 'setup: %s\n' "$*" >&2; }
die() { say "$@"; exit 2; }

check_platform() { # MLX has wheels for these
  local version
  case $(uname -s)/$(uname -m) in
    Darwin/arm64)
      version=$(sw_vers -productVersion)
      [ "${version%%.*}" -ge 14 ] || die "MLX needs macOS 14 or newer; this is macOS $version." ;;
    Darwin/*)
      [ "$(sysctl -n sysctl.proc_translated 2>/dev/null)" != 1 ] ||
        die "this terminal runs under Rosetta; use a native one, or start with: arch -arm64 bash"
      die "MLX needs a Mac with Apple silicon (M1 or newer); this one has an Intel processor." ;;
    Linux/x86_64 | Linux/aarch64)
      version=$(getconf GNU_LIBC_VERSION 2>/dev/null) || version="another C library"
      [[ $version =~ ^glibc\ 2\.([0-9]+) && ${BASH_REMATCH[1]} -ge 35 ]] ||
        die "MLX needs glibc 2.35 or newer (Ubuntu 22.04, Debian 12); this system has $version." ;;
    *) die "MLX runs on Macs with Apple silicon and on x86_64 or aarch64 Linux, not $(uname -sm)." ;;
  esac
}

fit="sys.version_info >= (3, 11) and sys.implementation.name == 'cpython' and
  (sys.platform != 'darwin' or platform.machine() == 'arm64')"

python_is() { # python_is COMMAND CONDITION, by running it: a pyenv shim may exist and yet not run
  "$1" -c "import platform, sys; sys.exit(not ($2))" >/dev/null 2>&1
}

find_python() { # sets $python
  local name bare="" seen=""
  for name in python3.14 python3.13 python3.12 python3.11 python3 python; do
    if python_is "$name" "$fit and __import__('venv') and __import__('ensurepip')"; then
      python=$name
      return
    elif python_is "$name" "$fit"; then
      bare=$("$name" -c 'import sys; print("python%d.%d" % sys.version_info[:2])')
    elif python_is "$name" True; then
      seen="$seen $name is $("$name" -c 'import platform as p
print("%s %s %s," % (p.python_implementation(), p.python_version(), p.machine()))')"
    fi
  done
  [ -z "$bare" ] ||
    die "$bare cannot make virtual environments. Debian, Ubuntu: sudo apt install $bare-venv"
  say "CPython 3.11 or newer is needed (arm64 on a Mac).${seen:+ Found:${seen%,}.}"
  die "Easiest: install uv, which brings its own Python (https://docs.astral.sh/uv)." \
    "Or: brew install python (macOS), sudo apt install python3-venv (Debian 12, Ubuntu 24.04)."
}

with_uv() { # with_uv [OPTION...]
  if ! [ -e .venv ]; then
    say "making .venv with uv (a minute or so, once)"
    uv venv --quiet --python 'cpython>=3.11' .venv && touch .venv/unfinished || return
  fi
  uv pip install $quiet --python .venv/bin/python "$@" -e .
}

with_pip() { # with_pip [OPTION...]
  if ! [ -e .venv ]; then
    find_python
    say "making .venv with $python (a few minutes, once)"
    "$python" -m venv --without-pip .venv
    touch .venv/unfinished
  fi
  local pip=".venv/bin/python -m pip"
  $pip --version >/dev/null 2>&1 || .venv/bin/python -m ensurepip >/dev/null
  $pip install $quiet 'pip>=25.1' # the first that knows --group
  $pip install $quiet "$@" -e .
}

setup() ( # setup run|dev
  set -euo pipefail
  cd "$root"
  want="$root $(cksum <pyproject.toml)"
  if [ -e .venv/unfinished ] || grep -qsvF "$root " .venv/ready-* ||
    ! python_is .venv/bin/python "$fit and sys.prefix != sys.base_prefix"; then
    rm -rf .venv # half-made, moved, or its Python is gone
  fi
  for kind in dev "$1"; do
    [ "$(cat ".venv/ready-$kind" 2>/dev/null)" != "$want" ] || exit 0
  done
  check_platform
  [ ! -e .venv ] || say "bringing .venv up to date"
  quiet=--quiet
  [ ! -t 2 ] || quiet=
  [ "$1" = run ] || set -- "$1" --group dev
  if ! command -v uv >/dev/null; then
    with_pip "${@:2}"
  elif ! with_uv "${@:2}"; then
    say "uv could not; trying Python's own venv and pip"
    with_pip "${@:2}"
  fi
  rm -f .venv/unfinished
  printf '%s\n' "$want" >".venv/ready-$1"
) >&2
