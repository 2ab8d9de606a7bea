#!/usr/bin/env bash
# Lint and tests.
#
#   bash tests/run.sh                     # everything
#   bash tests/run.sh -k packing -x       # arguments go to pytest
set -euo pipefail

source "$(dirname -- "${BASH_SOURCE[0]}")/../utils/setup.sh"

export HF_HUB_OFFLINE=1  # a test that reaches out to the hub fails
"$PYTHON" -m ruff check .
exec "$PYTHON" -m pytest "$@"
