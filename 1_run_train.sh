#!/usr/bin/env bash
# Quantization-aware training: the teacher's trajectories are cached, then the quantized transformer learns from them.
#
#   bash 1_run_train.sh                               # 1 process, batch 4: the embedded tiny-flux, on a laptop
#   bash 1_run_train.sh NPROC BATCH ACCUM [FLAGS]     # processes (one a GPU), batch a process, gradient accumulation
#   bash 1_run_train.sh 1 4 1 --w_bits 2 --max_steps 1000            # any further flag of train.py; the last one counts
#   MODEL=black-forest-labs/FLUX.1-dev bash 1_run_train.sh 8 1 4     # the real one, on GPUs: what fits them is trained
#   MODEL=black-forest-labs/FLUX.2-klein-4B bash 1_run_train.sh 1 1 4    # all of its weights, on one 80 GB GPU
#   NNODES=2 HEAD=node0 MODEL=… bash 1_run_train.sh 8 1 1            # on two nodes: the same command on each
#
# Paths are relative to where it is started; it writes to output/ in the repository. Started again, it goes on where it
# was interrupted.
set -euo pipefail

NPROC=${1:-1} BATCH=${2:-4} ACCUM=${3:-1}
for number in "$NPROC" "$BATCH" "$ACCUM"; do
    if ! [[ $number =~ ^[1-9][0-9]*$ ]]; then
        echo "1_run_train.sh: expected NPROC BATCH ACCUM, three positive numbers, then flags; got \"$number\"" >&2
        exit 2
    fi
done
shift $(($# < 3 ? $# : 3))

MODEL=${MODEL:-assets/tiny-flux}
MODEL=${MODEL%/}

HERE=$PWD
source "$(dirname -- "${BASH_SOURCE[0]}")/utils/setup.sh"
ROOT=$PWD
cd -- "$HERE"
if [ . -ef "$ROOT" ]; then ROOT=.; fi

# The same numbers from MKL in every process: what was killed and goes on ends where it would have ended.
export MKL_CBWR=${MKL_CBWR:-AUTO}

# A model that just fits does not fit in pieces: what torch itself advises when GPU memory is reserved but not free.
export PYTORCH_ALLOC_CONF=${PYTORCH_ALLOC_CONF-${PYTORCH_CUDA_ALLOC_CONF-expandable_segments:True}}

export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"  # for the programs in utils/

PLAN=()
case $MODEL in
    *tiny-flux)  # what a laptop can do in a few minutes
        SIZE=(--num_train_prompts 160 --num_images 12 --max_steps 400 --eval_steps 200 --save_steps 200
            --per_device_eval_batch_size 8)
        ;;
    *)
        SIZE=(--num_train_prompts 3000 --num_images 8 --num_train_epochs 1 --eval_steps 500 --save_steps 500
            --per_device_eval_batch_size 1 --gradient_checkpointing True)
        # What fits the GPUs: a LoRA, or all weights; says which and why.
        CHOSEN=$("$PYTHON" -m utils.plan "$MODEL" "$NPROC" "$BATCH" "$@")
        if [ -n "$CHOSEN" ]; then read -ra PLAN <<< "$CHOSEN"; fi
        ;;
esac

BITS=0 LAST=
for WORD in "$@"; do
    if [ "$LAST" = __w_bits ]; then BITS=$WORD; fi
    LAST=${WORD%%=*}
    LAST=${LAST//-/_}${WORD#"$LAST"}  # train.py takes --w-bits for --w_bits
    case $LAST in
        __w_bits=*) BITS=${WORD#*=} ;;
        __model | __model=* | __input_model_filename | __input_model_filename=*)
            echo "1_run_train.sh: $WORD: name the model in front, MODEL=… bash 1_run_train.sh: its size decides" >&2
            exit 2
            ;;
    esac
done
if [ "$BITS" = 0 ]; then BITS=1.58; fi
NAME=$(basename "$MODEL")-${BITS}bit

LAUNCH=("$PYTHON")
if [ "${NNODES:-1}" -gt 1 ]; then  # the same command on every node, HEAD the name of one of them
    LAUNCH+=(-m utils.launch --nnodes="$NNODES" --nproc_per_node="$NPROC"
        --rdzv_backend=c10d --rdzv_endpoint="${HEAD:?the name of a node that all of them reach}:${PORT:-29500}")
elif [ "$NPROC" -gt 1 ]; then
    LAUNCH+=(-m utils.launch --standalone --nproc_per_node="$NPROC")
fi
exec "${LAUNCH[@]}" "$ROOT/train.py" \
    --local_dir "$ROOT/output" --output_dir "$ROOT/output/train/$NAME" \
    --input_model_filename "$MODEL" --qat True --w_bits 0 "${SIZE[@]}" ${PLAN[@]+"${PLAN[@]}"} \
    --per_device_train_batch_size "$BATCH" --gradient_accumulation_steps "$ACCUM" "$@"
