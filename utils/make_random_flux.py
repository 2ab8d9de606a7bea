"""A FLUX transformer of random weights at full size, to measure sizes, memory and time on without FLUX.1-dev's licence.

    python -m utils.make_random_flux --output output/random-flux-dev                    # 23.8 GB
    python -m utils.make_random_flux --output output/small --config tiny --blocks 1 2

It writes a folder that run.py takes with `--method threshold` or `mse` and `--num_images 0`: model_index.json and
transformer/ in bfloat16, in shards as the hub has them. Matrices are N(0, 1/in), so that activations keep their size,
norms one, biases zero. Tensor i depends on the seed and i only. Memory holds two shards at most.
"""

import argparse
import json
import math
from collections.abc import Iterator
from pathlib import Path

import diffusers
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from utils.folders import check_disk, whole_folder
from utils.utils import get_logger, run_script

log = get_logger("random")
FLUX = {
    "patch_size": 1, "in_channels": 64, "num_layers": 19, "num_single_layers": 38, "attention_head_dim": 128,
    "num_attention_heads": 24, "joint_attention_dim": 4096, "pooled_projection_dim": 768,
    "axes_dims_rope": (16, 56, 56),
}  # fmt: skip
CONFIGS = {  # arguments of FluxTransformer2DModel
    "flux-dev": FLUX | {"guidance_embeds": True},
    "flux-schnell": FLUX | {"guidance_embeds": False},
    "tiny": {
        "in_channels": 16, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16,
        "num_attention_heads": 2, "joint_attention_dim": 32, "pooled_projection_dim": 32, "guidance_embeds": True,
        "axes_dims_rope": (4, 6, 6),
    },
}  # fmt: skip
STEM = "diffusion_pytorch_model"


def skeleton(config: str, blocks: tuple[int, int] | None = None) -> diffusers.FluxTransformer2DModel:
    """diffusers' model of a name in CONFIGS on the meta device, with `blocks` double and single blocks if given."""
    settings = dict(CONFIGS[config])
    if blocks is not None:
        settings |= {"num_layers": blocks[0], "num_single_layers": blocks[1]}
    with torch.device("meta"):
        return diffusers.FluxTransformer2DModel(**settings)


def random_tensors(model: nn.Module, seed: int) -> Iterator[tuple[str, Tensor]]:
    """A value in bfloat16 for every parameter of `model`, one at a time."""
    for i, (name, parameter) in enumerate(model.named_parameters()):
        if parameter.ndim == 2:
            generator = torch.Generator().manual_seed(seed + i)
            tensor = torch.empty(parameter.shape, dtype=torch.bfloat16)
            tensor.normal_(0, 1 / math.sqrt(parameter.shape[1]), generator=generator)
        else:
            value = float(name.endswith("weight"))
            tensor = torch.full(parameter.shape, value, dtype=torch.bfloat16)
        yield name, tensor


def shards(tensors: Iterator[tuple[str, Tensor]], shard_bytes: int) -> Iterator[dict[str, Tensor]]:
    """The tensors in groups of at most `shard_bytes` (or of one tensor), in their order."""
    shard: dict[str, Tensor] = {}
    size = 0
    for name, tensor in tensors:
        if shard and size + tensor.nbytes > shard_bytes:
            yield shard
            shard, size = {}, 0
        shard[name] = tensor
        size += tensor.nbytes
    yield shard


def write(folder: Path, model: diffusers.FluxTransformer2DModel, seed: int, shard_bytes: int) -> int:
    """Write model_index.json and transformer/ into `folder`; returns the bytes of the weights."""
    target = folder / "transformer"
    target.mkdir()
    written: list[list[str]] = []
    total = 2 * sum(p.numel() for p in model.parameters())
    with tqdm(total=total, desc="random weights", unit="B", unit_scale=True) as bar:
        for shard in shards(random_tensors(model, seed), shard_bytes):
            save_file(shard, target / f"shard-{len(written)}", metadata={"format": "pt"})
            written.append(list(shard))
            bar.update(sum(tensor.nbytes for tensor in shard.values()))
    files = [f"{STEM}-{i + 1:05d}-of-{len(written):05d}.safetensors" for i in range(len(written))]
    for i, file in enumerate(files):
        (target / f"shard-{i}").rename(target / file)
    weight_map = {name: file for file, names in zip(files, written, strict=True) for name in names}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (target / f"{STEM}.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    model.save_config(target)
    index = {"_class_name": "FluxPipeline", "_diffusers_version": diffusers.__version__}
    index["transformer"] = ["diffusers", "FluxTransformer2DModel"]
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    return total


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="must not hold anything yet")
    parser.add_argument("--config", choices=CONFIGS, default="flux-dev", help="whose shape")
    parser.add_argument("--blocks", type=int, nargs=2, metavar=("DOUBLE", "SINGLE"), help="other numbers of blocks")
    parser.add_argument("--shard_gb", type=float, default=2.0, help="size of a shard; memory holds two of them")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.blocks and min(args.blocks) < 1:
        parser.error(f"--blocks: at least one of each kind, got {args.blocks[0]} {args.blocks[1]}")
    if args.shard_gb <= 0:
        parser.error(f"--shard_gb must be above 0, got {args.shard_gb:g}")
    return args


def main() -> None:
    args = parse_args()
    if args.output.exists() and (not args.output.is_dir() or any(args.output.iterdir())):
        raise ValueError(f"--output {args.output}: exists and is not empty; choose another")
    model = skeleton(args.config, args.blocks)
    check_disk(args.output, 2 * sum(p.numel() for p in model.parameters()), "the transformer")
    with whole_folder(args.output) as folder:
        total = write(folder, model, args.seed, int(args.shard_gb * 1e9))
    log.info("%s: %s parameters, %.2f GB", args.output, f"{total // 2:,}", total / 1e9)


if __name__ == "__main__":
    run_script(main)
