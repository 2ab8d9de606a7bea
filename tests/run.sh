#!/usr/bin/env bash
# Lint and tests.
#
#   bash tests/run.sh                     # everything that this machine can test, on every core
#   bash tests/run.sh -k packing -x       # arguments go to pytest; -n 0: one test after the other
#   bash tests/run.sh --gpu               # only what a GPU computes, without lint: minutes
#   bash tests/run.sh --gpu --record assets/rehearsal/gpu_tests.txt   # commit, GPU, versions and result into a file
#   FLUX158_TEST_REAL_PROCESSES=1 bash tests/run.sh      # no script is forked (tests/forked.py): minutes longer
#
# Where there is no .git, COMMIT names the commit for --record.
set -euo pipefail

source "$(dirname -- "${BASH_SOURCE[0]}")/../utils/setup.sh"

if [ "${1:-}" = --gpu ]; then
    shift
    if ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
        echo "tests/run.sh: --gpu: torch sees no GPU here" >&2
        exit 2
    fi
    exec "$PYTHON" -m pytest -m "gpu or on_gpu" "$@"
fi
"$PYTHON" -m ruff check .
exec "$PYTHON" -m pytest -n auto --dist loadscope "$@"
