"""A training step's time and memory at full size: a LoRA inside the quantizer against the same LoRA on plain linears.

    python -m utils.compare_training_step --output output/training_step                # FLUX.1-dev at 1024², 80 GB GPU
    python -m utils.compare_training_step --output output/step --config small --resolution 128 --batch_sizes 1

Random weights, blocks checkpointed and compiled, bfloat16 autocast, fused AdamW on what is trained: `quantized` is what
`train.py --lora_r 32 --lora_alpha 32` does, `plain` is diffusers' transformer with a LoRA by PEFT on the same linears.
Both get the same batches. The median of the timed steps, the most memory that was allocated during them and how long
the GPU computed in one more step are written to OUTPUT/training_step.json. Where that is well below the step, the GPU
waits for the CPU, and another machine gives another figure.
"""

import utils.interrupt  # noqa: F401 (Ctrl-C is a line from here on)

import argparse
import gc
import statistics
import time
from pathlib import Path
from types import SimpleNamespace

import diffusers
import torch
from peft import LoraConfig
from torch import Tensor, nn

from models.modeling_flux_quant import FluxTransformer2DModel, QuantizeLinear
from utils.folders import write_json
from utils.pipelines import Flux1
from utils.random_flux import CONFIGS, is_klein
from utils.trainer import choose_parameters
from utils.utils import ArgumentParser, device_name, empty_cache, get_logger, pick_device, run_script

log = get_logger("step")
TEXT_TOKENS = 512


@torch.no_grad()
def fill(model: nn.Module, seed: int) -> None:
    """Give every matrix N(0, 1/in), norms one, biases zero."""
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            parameter.normal_(0, parameter.shape[1] ** -0.5)
        else:
            parameter.fill_(float(name.endswith("weight")))


def quantized(config: dict, args: argparse.Namespace) -> nn.Module:
    """Ternary linears with a LoRA inside the quantizer; LoRA, step sizes, biases and norms are trained."""
    with torch.device("meta"):
        model = FluxTransformer2DModel(**config, w_bits=0, lora_r=args.lora_r, lora_alpha=args.lora_r)
    model = nn.Module.to(model, torch.bfloat16).to_empty(device=args.device)
    fill(model, args.seed)
    for layer in model.modules():
        if isinstance(layer, QuantizeLinear):
            layer.reset_quantizer()
    flags = SimpleNamespace(train_weights=False, lora_r=args.lora_r, train_unquantized=True)
    choose_parameters(model, flags, None, frozen_dtype=torch.bfloat16)
    return model


def plain(config: dict, args: argparse.Namespace) -> nn.Module:
    """diffusers' transformer in bfloat16 with PEFT's LoRA in float32 on the linears that `quantized` quantizes."""
    with torch.device("meta"):
        model = diffusers.FluxTransformer2DModel(**config)
    model = model.to(torch.bfloat16).to_empty(device=args.device)
    fill(model, args.seed)
    model.requires_grad_(False)
    blocks = (*model.transformer_blocks, *model.single_transformer_blocks)
    inside = {module for block in blocks for module in block.modules() if isinstance(module, nn.Linear)}
    names = [name for name, module in model.named_modules() if module in inside]
    model.add_adapter(LoraConfig(r=args.lora_r, lora_alpha=args.lora_r, target_modules=names))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model


def random_batch(config: dict, size: int, args: argparse.Namespace) -> tuple[dict[str, Tensor], Tensor]:
    """A batch of `size` as the trainer hands it to the transformer, in float32, and a velocity [B, L, C]."""
    side = args.resolution // 16

    def normal(*shape: int) -> Tensor:
        return torch.randn(size, *shape, device=args.device)

    inputs = {
        "hidden_states": normal(side**2, config["in_channels"]),
        "encoder_hidden_states": normal(TEXT_TOKENS, config["joint_attention_dim"]),
        "pooled_projections": normal(config["pooled_projection_dim"]),
        "timestep": torch.rand(size, device=args.device),
        "img_ids": Flux1.image_ids(side, torch.float32).to(args.device),
        "txt_ids": torch.zeros(TEXT_TOKENS, 3, device=args.device),
    }
    if config["guidance_embeds"]:
        inputs["guidance"] = torch.full((size,), 3.5, device=args.device)
    return inputs, normal(side**2, config["in_channels"])


def measure(model: nn.Module, config: dict, size: int, args: argparse.Namespace) -> dict:
    """Median seconds of a step, GiB at its peak and seconds of a GPU's kernels in it (None without CUDA)."""
    on_cuda = args.device.type == "cuda"
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5, fused=True)
    inputs, target = random_batch(config, size, args)

    def step() -> None:
        with torch.autocast(args.device.type, torch.bfloat16):
            velocity = model(**inputs, return_dict=False)[0]
        (velocity.float() - target).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    times = []
    for number in range(args.warmup + args.steps):
        if on_cuda:
            if number == args.warmup:
                torch.cuda.reset_peak_memory_stats()
            torch.cuda.synchronize()
        started = time.perf_counter()
        step()
        if on_cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    peak = busy = None
    if on_cuda:
        peak = torch.cuda.max_memory_allocated() / 2**30
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            step()
            torch.cuda.synchronize()
        busy = sum(event.self_device_time_total for event in profile.key_averages()) / 1e6
    seconds = statistics.median(times[args.warmup :])
    return {"seconds": seconds, "all_seconds": times, "gpu_busy_seconds": busy, "peak_gib": peak}


def parse_args() -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="training_step.json goes here")
    names = [name for name in CONFIGS if not is_klein(name)]
    parser.add_argument("--config", choices=names, default="flux-dev", help="whose shape")
    parser.add_argument("--resolution", type=int, default=1024, help="pixels a side")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--lora_r", type=int, default=32, help="rank; lora_alpha is the same")
    parser.add_argument("--steps", type=int, default=6, help="timed steps")
    parser.add_argument("--warmup", type=int, default=2, help="steps before them")
    parser.add_argument("--eager", action="store_true", help="do not compile the blocks")
    parser.add_argument("--device", help="default: cuda if there, else mps, else cpu")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    try:
        args.device = pick_device(args.device)
        for name in ("resolution", "lora_r", "steps", "warmup"):
            if getattr(args, name) < 1:
                raise ValueError(f"--{name} must be at least 1, got {getattr(args, name)}")
        if args.resolution % 16 or min(args.batch_sizes) < 1:
            raise ValueError("--resolution must be a multiple of 16 and --batch_sizes at least 1")
    except ValueError as error:
        parser.error(str(error))
    return args


def main() -> None:
    args = parse_args()
    torch.backends.cuda.enable_cudnn_sdp(False)  # its backward fails at this shape (torch 2.11, H100)
    config = {"guidance_embeds": False} | CONFIGS[args.config]
    report = {
        "config": args.config, "resolution": args.resolution, "lora_r": args.lora_r, "compiled": not args.eager,
        "device": device_name(args.device), "torch": torch.__version__, "diffusers": diffusers.__version__, "rows": [],
    }  # fmt: skip
    args.output.mkdir(parents=True, exist_ok=True)
    for name, make in (("plain", plain), ("quantized", quantized)):
        model = make(config, args).train()
        model.enable_gradient_checkpointing()
        if not args.eager:
            model.compile_repeated_blocks()
        for size in args.batch_sizes:
            row = {"name": name, "batch_size": size} | measure(model, config, size, args)
            anchor = next(r for r in report["rows"] + [row] if r["batch_size"] == size)
            row["ratio"] = row["seconds"] / anchor["seconds"]
            report["rows"].append(row)
            line = f"{name}, batch {size}: {row['seconds']:.3f} s a step ({row['ratio']:.3f})"
            if row["peak_gib"] is not None:
                line += f", the GPU busy for {row['gpu_busy_seconds']:.3f}, {row['peak_gib']:.1f} GiB"
            log.info(line)
            write_json(args.output / "training_step.json", report)
        del model
        gc.collect()
        empty_cache(args.device)
        torch.compiler.reset()


if __name__ == "__main__":
    run_script(main)
