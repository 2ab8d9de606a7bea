"""FLUX pipelines of random weights at full size, to measure sizes, memory and time on without a download or licence.

    python -m utils.make_random_flux --output output/random-flux-dev                    # its transformer, 23.8 GB
    python -m utils.make_random_flux --output output/random-flux-dev --whole            # all of it, 33.8 GB
    python -m utils.make_random_flux --output output/small --config small --whole       # the same in small, 20 MB
    python -m utils.make_random_flux --output output/klein --config flux2-klein-4b --whole    # FLUX.2-klein-4B, 16 GB
    python -m utils.make_random_flux --output output/small --config small-klein --whole       # that in small, 6 MB

It writes model_index.json and transformer/ in bfloat16, in shards as the hub has them: a folder that run.py takes with
`--method threshold` or `mse` and `--num_images 0`. With --whole come T5-XXL and CLIP-L, or Qwen3-4B, the autoencoder,
the scheduler and tokenizers made from the training prompts: a pipeline that draws, if only noise. How the weights are
as unkind as trained ones is told in utils/random_flux.py. Memory holds a shard and a tensor, or T5; a GPU fills them in
seconds.
"""

import utils.interrupt  # noqa: F401 (Ctrl-C is a line from here on)

import argparse
from pathlib import Path

from utils.folders import check_disk, whole_folder
from utils.random_flux import (
    CONFIGS,
    SHARD_BYTES,
    is_small,
    rest_skeletons,
    skeleton,
    write_rest,
    write_transformer,
)
from utils.utils import ArgumentParser, get_logger, pick_device, run_script

log = get_logger("random")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="must not hold anything yet")
    parser.add_argument("--config", choices=CONFIGS, default="flux-dev", help="whose shape")
    parser.add_argument("--whole", action="store_true", help="text encoders, autoencoder, scheduler and tokenizers too")
    parser.add_argument("--blocks", type=int, nargs=2, metavar=("DOUBLE", "SINGLE"), help="other numbers of blocks")
    parser.add_argument("--shard_gb", type=float, help="size of the transformer's shards; default: as on the hub")
    parser.add_argument("--device", help="where the numbers are drawn; default: cuda if there, else mps, else cpu")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if args.blocks and min(args.blocks) < 1:
        parser.error(f"--blocks: at least one of each kind, got {args.blocks[0]} {args.blocks[1]}")
    if args.shard_gb is not None and args.shard_gb <= 0:
        parser.error(f"--shard_gb must be above 0, got {args.shard_gb:g}")
    try:
        args.device = pick_device(args.device)
    except ValueError as error:
        parser.error(str(error))
    return args


def main() -> None:
    args = parse_args()
    if args.output.exists() and (not args.output.is_dir() or any(args.output.iterdir())):
        raise ValueError(f"--output {args.output}: exists and is not empty; choose another")
    model = skeleton(args.config, args.blocks)
    models = [model, *rest_skeletons(args.config).values()] if args.whole else [model]
    total = 2 * sum(parameter.numel() for part in models for parameter in part.parameters())
    check_disk(args.output, total, "the pipeline" if args.whole else "the transformer")
    shard_bytes = SHARD_BYTES[is_small(args.config)] if args.shard_gb is None else int(args.shard_gb * 1e9)
    with whole_folder(args.output) as folder:
        write_transformer(folder, model, args.seed, shard_bytes, args.device)
        if args.whole:
            write_rest(folder, args.config, args.seed, args.device)
    log.info("%s: %s parameters, %.2f GB", args.output, f"{total // 2:,}", total / 1e9)


if __name__ == "__main__":
    run_script(main)
