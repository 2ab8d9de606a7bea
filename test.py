"""Judge a quantized checkpoint against its teacher, or draw the pictures that outside benchmarks judge.

    python test.py output/sanity/cache/bits_0 0                                  # what sanity.py left
    python test.py output/models/tiny-flux-1.58bit 0 --num_images 1200           # what train.py left
    python test.py output/train/run/checkpoint-200 0                             # one of its checkpoints
    python test.py CHECKPOINT 0 --model black-forest-labs/FLUX.1-dev --offload   # the real one on a 24 GB card
    python test.py CHECKPOINT 0 --offload sequential                             # on an 8 GB card
    python test.py output/oneshot 0 --mode fast --compile                        # 8-bit activations, at full speed
    python test.py CHECKPOINT 0 --geneval evaluation_metadata.jsonl              # GenEval's folders, four a prompt

CHECKPOINT is a transformer or a whole pipeline, W_BITS what it was quantized to (0: 1.58 bit). Teacher and checkpoint
draw the same prompts from the same noise. It writes

    OUTPUT_DIR/samples/{full,bits_W}/sample_000.png …    the pictures
    OUTPUT_DIR/samples/grid.png                          teacher, checkpoint and their difference
    OUTPUT_DIR/metrics.json                              everything that was measured
    OUTPUT_DIR/geneval/bits_W/00000/…                    with --geneval or --prompt_list, and nothing else
"""

import argparse
import json
import os
import time
from pathlib import Path

import torch
from diffusers import FluxPipeline
from torch import Tensor, nn
from tqdm import tqdm

from models.kernels import MODES
from models.packing import PackedLinear, disk_row_bytes
from utils import scenes
from utils.checkpoints import bits_name, check_shapes, load_student, transformer_folder
from utils.cuda_graph import compile_steps
from utils.metrics import learned_scores, nmse, psnr, scene_score, ssim
from utils.pictures import save_grid, save_images, to_pil
from utils.prompts import pick_prompts
from utils.sampling import (
    OFFLOADS,
    check_offload,
    drop_transformer,
    generate_images,
    load_pipeline,
    native_size,
    place,
    record_velocities,
    set_attention,
)
from utils.utils import device_name, get_logger, pick_device, run_script

log = get_logger("test")
NMSE_PROMPTS = 24  # the velocity error is measured along the teacher's trajectories of so many prompts
GRID_PROMPTS = 8


def find_teacher(checkpoint: Path) -> str:
    """The pipeline that run.py made `checkpoint` from, if it is such a pipeline, else the embedded one."""
    try:
        return json.loads((checkpoint / "metrics.json").read_text())["model"]
    except (OSError, ValueError, KeyError, TypeError):
        return "assets/tiny-flux"


def resident_bytes(model: nn.Module) -> int:
    """Bytes of all parameters in memory."""
    return sum(p.numel() * p.element_size() for p in model.parameters())


def bits_per_weight(model: nn.Module) -> float:
    """Bits on disk of a packed weight, its share of the step sizes included."""
    layers = [layer for layer in model.modules() if isinstance(layer, PackedLinear)]
    codes = sum(disk_row_bytes(layer.in_features, layer.w_bits) * layer.out_features for layer in layers)
    step_sizes = sum(layer.weight_clip_val.nbytes for layer in layers)
    return 8 * (codes + step_sizes) / sum(layer.in_features * layer.out_features for layer in layers)


def prepare(pipe: FluxPipeline, args: argparse.Namespace) -> None:
    """Put the pipeline where it computes; compile it if asked to."""
    place(pipe, args.device, args.offload)
    if args.compile:
        compile_steps(pipe.transformer)


def velocity_errors(transformer: nn.Module, calls: list[tuple[dict, Tensor]], steps: int) -> dict:
    """NMSE of the velocity at the teacher's own states, over all and for each denoising step."""
    device = next(transformer.parameters()).device
    predictions, targets = [[] for _ in range(steps)], [[] for _ in range(steps)]
    for number, (inputs, velocity) in enumerate(tqdm(calls, desc="velocity error", leave=False)):
        here = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in inputs.items()}
        with torch.no_grad():
            predictions[number % steps].append(transformer(**here)[0].float().cpu())
        targets[number % steps].append(velocity.float().cpu())
    by_step = [nmse(torch.cat(p), torch.cat(t)) for p, t in zip(predictions, targets, strict=True)]
    whole = nmse(torch.cat(sum(predictions, [])), torch.cat(sum(targets, [])))
    return {"nmse": whole, "nmse_by_step": by_step}


def write_geneval(pipe: FluxPipeline, args: argparse.Namespace, folder: Path) -> None:
    """GenEval's layout: folder/00000/metadata.jsonl and samples/00000.png …; what is there already is left alone."""
    file = args.geneval or args.prompt_list
    wanted = 'JSON lines with a "prompt"' if args.geneval else "UTF-8 text, a prompt a line"
    try:
        lines = [line for line in Path(file).read_text(encoding="utf-8-sig").splitlines() if line.strip()]
        items = [json.loads(line) if args.geneval else {"prompt": line.strip()} for line in lines]
        prompts = [item["prompt"] for item in items]
        if not all(isinstance(prompt, str) for prompt in prompts):
            raise TypeError("a prompt that is no string")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file}: cannot be read as {wanted} ({error!r})") from None
    if not prompts:
        raise ValueError(f"{file}: no prompts in it; write {wanted}")
    done = 0
    for number, (item, prompt) in enumerate(zip(items, tqdm(prompts, desc="prompts", unit="prompt"), strict=True)):
        samples = folder / f"{number:05d}" / "samples"
        samples.mkdir(parents=True, exist_ok=True)
        (samples.parent / "metadata.jsonl").write_text(json.dumps(item) + "\n", encoding="utf-8")
        missing = [i for i in range(args.samples_per_prompt) if not (samples / f"{i:05d}.png").exists()]
        for i in missing:
            [image] = generate_images(
                pipe, [prompt], args.seed + number * args.samples_per_prompt + i, num_inference_steps=args.steps,
                guidance_scale=args.guidance_scale, size=args.resolution,
            )  # fmt: skip
            partial = samples / f"{i:05d}.tmp"
            to_pil(image).save(partial, format="PNG")
            os.replace(partial, samples / f"{i:05d}.png")
            done += 1
    log.info("%s: %d prompts, %d pictures drawn now", folder, len(prompts), done)


def print_table(metrics: dict) -> None:
    """The figures as lines of text."""
    print()
    for name in ("nmse", "psnr", "ssim", "lpips", "clip_score"):
        if name in metrics:
            value = metrics[name]
            print(f"{name:<22}{value if isinstance(value, str) else format(value, '.5g')}")
    scores = {name: metrics[name] for name in ("scene_score_teacher", "scene_score") if name in metrics}
    if scores:
        print(f"\n{'scene score':<22}" + "".join(f"{n.removeprefix('scene_score').strip('_') or 'student':>10}"
                                                 for n in scores))  # fmt: skip
        for category in metrics["scene_score"]:
            print(f"  {category:<20}" + "".join(f"{score[category]:>10.3f}" for score in scores.values()))
    print(f"\n{'bits a weight':<22}{metrics['bits_per_weight']:.3f}")
    print(f"{'on disk, resident':<22}{metrics['disk_bytes'] / 1e6:,.1f} MB, {metrics['resident_bytes'] / 1e6:,.1f} MB")
    print(f"{'seconds a picture':<22}{metrics['seconds_per_image']:.3g}\n")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="a quantized transformer, or a pipeline with one")
    parser.add_argument("w_bits", type=int, help="what it was quantized to; 0 is 1.58 bit")
    parser.add_argument("--model", help="the teacher; default: what run.py made CHECKPOINT from if it is from there, "
                        "else assets/tiny-flux")  # fmt: skip
    parser.add_argument("--output_dir", type=Path, default=Path("test"), help="pictures and figures go here")
    parser.add_argument("--num_images", type=int, default=24, help="pictures to draw and to measure on")
    parser.add_argument("--prompts", help="a text file, one prompt a line; default: the model's evaluation set")
    parser.add_argument("--geneval", metavar="METADATA.jsonl", help="draw GenEval's prompts in its folder layout")
    parser.add_argument("--prompt_list", metavar="FILE", help="the same for a text file, one prompt a line")
    parser.add_argument("--samples_per_prompt", type=int, default=4, help="with --geneval or --prompt_list")
    parser.add_argument("--no_teacher", action="store_true", help="draw with the checkpoint only")
    parser.add_argument("--offload", nargs="?", const="model", choices=OFFLOADS, help="to draw, keep on the device "
                        "only the component that computes; sequential: what does not fit streams layer by "
                        "layer")  # fmt: skip
    parser.add_argument("--mode", choices=MODES, default="exact", help="to compute in; fast: 8-bit activations")
    parser.add_argument("--attention", metavar="NAME", help="of the quantized model, one of diffusers' backends, "
                        "such as sage, flash or _flash_3; default: torch's own")  # fmt: skip
    parser.add_argument("--compile", action="store_true", help="compile the transformer, on CUDA into CUDA graphs: "
                        "a minute or two at the start, then faster")  # fmt: skip
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="default: bfloat16 on CUDA")
    parser.add_argument("--device", help="default: cuda if there, else mps, else cpu")
    parser.add_argument("--seed", type=int, default=42, help="picture i starts from the noise of seed + i")
    parser.add_argument("--batch_size", type=int, default=8, help="pictures drawn at a time")
    parser.add_argument("--steps", type=int, default=28, help="denoising steps")
    parser.add_argument("--guidance_scale", type=float, default=3.5)
    parser.add_argument("--resolution", type=int, help="pixels a side; default: what the autoencoder was made for")
    args = parser.parse_args(argv)
    try:
        args.device = pick_device(args.device)
        if args.attention:
            set_attention(args.attention)
        for name in ("num_images", "samples_per_prompt", "batch_size", "steps", "resolution"):
            if getattr(args, name) is not None and getattr(args, name) < 1:
                raise ValueError(f"--{name} must be at least 1, got {getattr(args, name)}")
        if args.resolution and args.resolution % 16:
            raise ValueError(f"--resolution must be a multiple of 16, got {args.resolution}")
        if args.geneval and args.prompt_list:
            raise ValueError("--geneval and --prompt_list: give one of them")
        if args.offload and args.compile:
            raise ValueError("--offload moves what --compile wants to stay: give one of them")
        check_offload(args.offload, args.device)
    except ValueError as error:
        parser.error(str(error))
    return args


def main() -> None:
    args = parse_args()
    device = args.device
    default = "bfloat16" if device.type == "cuda" else "float32"
    dtype = getattr(torch, args.dtype or default)

    folder = transformer_folder(args.checkpoint)
    student = load_student(folder, dtype, w_bits=args.w_bits)
    if args.mode != "exact":
        student.set_inference_mode(args.mode)
    if args.attention:
        set_attention(args.attention, student)
    model = args.model or find_teacher(args.checkpoint)
    pipe = load_pipeline(model, dtype)
    check_shapes(args.checkpoint, student.config, model, pipe.transformer, "--model")
    args.resolution = args.resolution or native_size(pipe)
    name = bits_name(args.w_bits)
    if args.geneval or args.prompt_list:
        pipe.register_modules(transformer=student)
        prepare(pipe, args)
        write_geneval(pipe, args, args.output_dir / "geneval" / f"bits_{args.w_bits}")
        return

    prompts, source = pick_prompts(pipe, args.num_images, args.prompts)
    with_scores = args.resolution == scenes.SIZE and all(scenes.parse(prompt) for prompt in prompts)
    log.info("%s (%s) against %s, %s on %s", folder, name, model, dtype, device)
    log.info("%d prompts: %s; %d pixels, seed %d", len(prompts), source, args.resolution, args.seed)
    samples = args.output_dir / "samples"
    samples.mkdir(parents=True, exist_ok=True)

    def draw(prompts: list[str], seed: int, desc: str, steps: int = args.steps) -> Tensor:
        return generate_images(
            pipe, prompts, seed, num_inference_steps=steps, guidance_scale=args.guidance_scale,
            size=args.resolution, batch_size=args.batch_size, desc=desc,
        )  # fmt: skip

    # 1. The teacher.
    teacher_images, calls = None, []
    if not args.no_teacher:
        prepare(pipe, args)
        first, rest = prompts[:NMSE_PROMPTS], prompts[NMSE_PROMPTS:]
        with record_velocities(pipe.transformer) as calls:
            teacher_images = draw(first, args.seed, "teacher")
        if rest:
            teacher_images = torch.cat([teacher_images, draw(rest, args.seed + len(first), "teacher")])
        save_images(teacher_images, samples / "full")

    # 2. The checkpoint in its place.
    drop_transformer(pipe)
    pipe.register_modules(transformer=student)
    prepare(pipe, args)
    metrics = {
        "checkpoint": str(args.checkpoint), "w_bits": args.w_bits, "model": model, "prompts": len(prompts),
        "prompt_source": source, "seed": args.seed, "steps": args.steps, "guidance_scale": args.guidance_scale,
        "resolution": args.resolution, "dtype": str(dtype), "mode": args.mode, "attention": args.attention,
        "compile": args.compile,
        "batch_size": args.batch_size, "device": device_name(device), "torch": torch.__version__,
    }  # fmt: skip
    if args.compile:  # what is timed next finds the compiled code
        draw(prompts[: args.batch_size], args.seed, "compiling", steps=1)
    started = time.time()
    images = draw(prompts, args.seed, name)
    metrics["seconds_per_image"] = (time.time() - started) / len(prompts)
    save_images(images, samples / f"bits_{args.w_bits}")
    if calls:
        metrics |= velocity_errors(student, calls, args.steps)

    # 3. The figures.
    if teacher_images is not None:
        metrics |= {"psnr": psnr(images, teacher_images), "ssim": ssim(images, teacher_images)}
    metrics |= learned_scores(images, teacher_images, prompts, device)
    if with_scores:
        metrics["scene_score"] = scene_score(images, prompts)
        if teacher_images is not None:
            metrics["scene_score_teacher"] = scene_score(teacher_images, prompts)
    metrics["disk_bytes"] = sum(file.stat().st_size for file in folder.glob("diffusion_pytorch_model*.safetensors"))
    metrics["resident_bytes"] = resident_bytes(student)
    metrics["bits_per_weight"] = bits_per_weight(student)
    if teacher_images is not None:
        shown = range(min(GRID_PROMPTS, len(prompts)))
        rows = {
            prompts[i]: torch.stack([teacher_images[i], images[i], (teacher_images[i] - images[i]).abs()])
            for i in shown
        }
        save_grid(rows, ["full", name, "difference"], samples / "grid.png")
    else:
        save_grid({name: images[:GRID_PROMPTS]}, prompts[:GRID_PROMPTS], samples / "grid.png")
    (args.output_dir / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    print_table(metrics)
    log.info("pictures: %s; figures: %s", samples / "grid.png", args.output_dir / "metrics.json")


if __name__ == "__main__":
    run_script(main)
