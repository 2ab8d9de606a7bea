# Meant to be sourced, by the shell scripts that start something in Python:
#
#     source utils/setup.sh      # goes to the repository root and sets PYTHON
#
# A PYTHON that is set already is used as it is: PYTHON=python3.12 bash 0_sanity_check.sh. Otherwise it becomes the first
# of these that has every package of requirements.txt:
#   1. the running Python: an activated conda environment or venv, or the system's; versions may differ from the pins
#   2. .venv in the repository root, if it was made from the present requirements.txt
#   3. .venv, made or brought up to date now
# .venv/requirements.txt is a copy written when the installation is complete. So a changed requirements.txt and an
# interrupted installation are both noticed, and the next call carries on.

setup_fail() { echo "setup: $*" >&2; exit 1; }

# Prints the path of interpreter $1 if it is new enough and has all the packages. Reads their metadata only, which
# takes milliseconds where importing torch takes seconds.
with_packages() {
    "$1" - 2>/dev/null <<'PY'
import platform, re, sys
from importlib.metadata import version

assert sys.version_info >= (3, 11)
for line in open("requirements.txt"):
    if (name := re.match(r"[\w.-]+", line)) and ("platform_system" not in line or platform.system() in line):
        version(name[0])  # raises if it is not installed
print(sys.executable)
PY
}

venv_is_current() { cmp -s requirements.txt .venv/requirements.txt && with_packages .venv/bin/python >/dev/null; }

# Prints the first interpreter that can make .venv.
base_python() {
    local candidate found=
    for candidate in python3 python python3.11 python3.12 python3.13 python3.14; do
        "$candidate" -c 'import sys; assert sys.version_info >= (3, 11)' 2>/dev/null || continue
        found=$candidate
        "$candidate" -c 'import ensurepip, venv' 2>/dev/null && echo "$candidate" && return
    done
    [ -z "$found" ] || setup_fail "$found lacks the venv module; install it (Debian, Ubuntu: apt install python3-venv)"
    setup_fail "needs Python 3.11 or newer on the PATH; install it, or use conda (environment.yaml)"
}

make_venv() (
    base=$(base_python) || exit 1
    exec 9>.venv.lock || setup_fail "cannot write to $PWD"
    # One set-up at a time. The lock belongs to file descriptor 9, so it ends with this subshell, however that ends.
    "$base" - <<'PY' || setup_fail "cannot lock $PWD/.venv.lock"
import fcntl
try:
    fcntl.flock(9, fcntl.LOCK_EX | fcntl.LOCK_NB)
except BlockingIOError:
    print("setup: waiting for another set-up in this folder to finish", flush=True)
    fcntl.flock(9, fcntl.LOCK_EX)
PY
    if venv_is_current; then exit; fi  # the other set-up has done it

    echo "setup: installing requirements.txt into $PWD/.venv (once: a few minutes, 1.5 GB of disk," \
        "several GB if torch comes with CUDA)"
    if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
        "$base" -m venv --clear .venv || setup_fail "$base could not make $PWD/.venv"
    fi
    [ -t 1 ] && quiet= || quiet=--quiet  # pip's progress is for people to watch
    .venv/bin/python -m pip install $quiet --disable-pip-version-check -r requirements.txt ||
        setup_fail "pip could not install requirements.txt (its message is above); the next call tries again"
    cp requirements.txt .venv/requirements.txt || setup_fail "cannot write to $PWD/.venv"
    echo "setup: done in $SECONDS s"
)

CDPATH= cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."

PYTHON=${PYTHON:-}
# An activated .venv of this repository goes through the check against requirements.txt below like an idle one.
if [ -z "$PYTHON" ] && [ "${VIRTUAL_ENV:-}" != "$PWD/.venv" ]; then
    PYTHON=$(with_packages python || with_packages python3 || true)
fi
if [ -z "$PYTHON" ]; then
    venv_is_current || make_venv || exit 1
    PYTHON=$PWD/.venv/bin/python
fi

export TRANSFORMERS_VERBOSITY="${TRANSFORMERS_VERBOSITY:-error}"  # or every start warns that torchvision is missing
