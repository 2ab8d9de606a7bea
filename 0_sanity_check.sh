#!/usr/bin/env bash
# Does the pipeline still draw? Full precision and 8, 4, 2 and 1.58 bits (0) side by side, without any training; for
# tiny-flux also the trained 1.58-bit student that comes with it.
#
#   bash 0_sanity_check.sh                                  # the embedded tiny-flux, on a laptop
#   bash 0_sanity_check.sh black-forest-labs/FLUX.1-dev     # a folder or a hub id, on a GPU
#   bash 0_sanity_check.sh --w_bits 4 3                     # any further flag of sanity.py; the last one counts
#
# Paths are relative to where it is started. It writes to output/sanity in the repository.
set -euo pipefail

MODEL=assets/tiny-flux
if [ $# -gt 0 ] && [[ $1 != -* ]]; then
    MODEL=${1%/}
    shift
fi

HERE=$PWD
source "$(dirname -- "${BASH_SOURCE[0]}")/utils/setup.sh"
ROOT=$PWD
cd -- "$HERE"
if [ . -ef "$ROOT" ]; then ROOT=.; fi

FOLDER=$MODEL
if [ ! -e "$FOLDER" ]; then FOLDER=$ROOT/$MODEL; fi  # the repository's own are found from anywhere
TRAINED=()
if [ "$FOLDER" -ef "$ROOT/assets/tiny-flux" ]; then TRAINED=(--trained "$ROOT/assets/tiny-flux-1.58bit"); fi

exec "$PYTHON" "$ROOT/sanity.py" --local_dir "$ROOT/output/sanity" --output_dir "$ROOT/output/sanity" \
    --input_model_filename "$MODEL" --qat True --w_bits 8 4 2 0 ${TRAINED[@]+"${TRAINED[@]}"} "$@"
