"""How fast the teacher cache is filled: beside diffusers' own pipeline, and in GPU-hours.

    python -m utils.compare_cache_speed --model black-forest-labs/FLUX.1-dev --output output/cache_speed  # an 80 GB GPU
    python -m utils.compare_cache_speed --output output/cache_speed --images 2 --eager                    # a laptop

Both go from the same prompts and noise to the same latents, with compiled blocks, --batch_size pictures at a time. The
pipeline is called batch after batch, all of it on the device; the cache makes fill_cache's own passes: texts first, and
what was drawn is checked and written while the device goes on. What happens once is timed apart. It writes to
OUTPUT/cache_speed.json

    seconds_per_prompt    of the cache; pipeline_seconds_per_prompt likewise
    ratio                 of the two
    once_seconds          of the cache: loading, compiling, the first steps
    gpu_hours             that --count prompts take on one GPU
    nmse                  of the cache's latents against the pipeline's
"""

import utils.interrupt  # noqa: F401 (Ctrl-C is a line from here on)

import argparse
import gc
import time
from pathlib import Path

import diffusers
import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from utils.datautils import Filling, TeacherCache, open_folder
from utils.folders import scratch_folder, write_json
from utils.metrics import nmse
from utils.prompts import pick_prompts
from utils.rivals import synchronize
from utils.sampling import initial_noise, load_pipeline, native_size, sample_latents
from utils.teacher import Teacher, TeacherSettings, prompt_seeds
from utils.utils import (
    DTYPES,
    ArgumentParser,
    check_counts,
    check_resolution,
    device_name,
    empty_cache,
    from_root,
    get_logger,
    memory_named,
    pick_device,
    run_script,
)

log = get_logger("speed")


class Stopwatch:
    """Seconds between calls, all that the device was given to do included."""

    def __init__(self, device: torch.device):
        self.device, self.last = device, time.perf_counter()

    def __call__(self) -> float:
        synchronize(self.device)
        before, self.last = self.last, time.perf_counter()
        return self.last - before


def draw(
    pipe: DiffusionPipeline, cache: TeacherCache, numbers: list[int], steps: int, args: argparse.Namespace
) -> Tensor:
    """The latents [N, L, C] that the pipeline makes of these prompts."""
    seeds = [cache.seeds[i] for i in numbers]
    noise = initial_noise(pipe, seeds, args.resolution, args.dtype)
    settings = {"num_inference_steps": steps, "guidance_scale": args.guidance_scale, "size": args.resolution}
    return sample_latents(pipe, noise, prompt=[cache.prompts[i] for i in numbers], **settings)


def time_pipeline(cache: TeacherCache, batches: list[list[int]], args: argparse.Namespace) -> tuple[float, Tensor]:
    """Seconds in which diffusers' pipeline draws the batches, and its latents on the CPU."""
    pipe = load_pipeline(args.model, args.dtype).to(args.device)
    if not args.eager:
        pipe.transformer.compile_repeated_blocks()
    draw(pipe, cache, batches[0], 2, args)  # warms up
    lap = Stopwatch(args.device)
    latents = [draw(pipe, cache, batch, args.num_inference_steps, args) for batch in batches]
    seconds = lap()
    torch.compiler.reset()  # what was compiled holds on to the weights
    return seconds, torch.cat(latents).cpu()


def time_cache(cache: TeacherCache, teacher: Teacher, batches: list[list[int]], args: argparse.Namespace) -> dict:
    """Seconds in which the cache is filled with the batches: of what is done once, and of the rest."""
    numbers, lap = [i for batch in batches for i in batch], Stopwatch(args.device)
    prompts, size, device = [cache.prompts[i] for i in numbers], args.batch_size, args.device
    teacher.load(*teacher.family.text_encoders, device=device)
    teacher.encode(prompts[:size], size, device, cache.guidance_scale)  # warms up
    once = lap()
    teacher.encode(prompts, size, device, cache.guidance_scale)
    encoding = lap()
    open_folder(cache)
    with Filling(cache, teacher, size, device, not args.eager, dict.fromkeys(numbers)) as filling:
        text = filling.encode(numbers)
        once += lap() - encoding
        for batch in batches:
            filling.draw(batch, text)
        filling.finish(0)
        return {"once": once, "rest": encoding + lap()}


def last_latents(cache: TeacherCache, numbers: list[int]) -> Tensor:
    """What the trajectories in the cache end in, [N, L, C]."""
    found = []
    for i in numbers:
        found.append(cache.last_latents(cache.trajectory(i)))
    return torch.stack(found)


def parse_args() -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="cache_speed.json goes here")
    parser.add_argument("--model", default="assets/tiny-flux", help="a full-precision pipeline's folder or hub id")
    parser.add_argument("--images", type=int, default=4, help="to draw each way; whole batches")
    parser.add_argument("--batch_size", type=int, default=1, help="drawn at a time")
    parser.add_argument("--num_inference_steps", type=int, default=28, help="denoising steps")
    parser.add_argument("--guidance_scale", type=float, default=3.5)
    parser.add_argument("--resolution", type=int, help="pixels a side; default: what the autoencoder was made for")
    parser.add_argument("--count", type=int, default=3000, help="prompts whose cost gpu_hours tells")
    parser.add_argument("--eager", action="store_true", help="do not compile the blocks")
    parser.add_argument("--dtype", choices=DTYPES, help="default: bfloat16 on CUDA, else float32")
    parser.add_argument("--device", help="default: cuda if there, else mps, else cpu")
    parser.add_argument("--seed", type=int, default=42)
    args = parser.parse_args()
    try:
        args.device = pick_device(args.device)
        check_counts(args, "images", "batch_size", "num_inference_steps", "count")
        check_resolution(args.resolution)
        if args.images % args.batch_size:
            raise ValueError(f"--images {args.images}: must be a multiple of --batch_size {args.batch_size}")
    except ValueError as error:
        parser.error(str(error))
    args.dtype = getattr(torch, args.dtype or ("bfloat16" if args.device.type == "cuda" else "float32"))
    args.model = from_root(args.model)
    return args


def measure(args: argparse.Namespace) -> None:
    args.output.mkdir(parents=True, exist_ok=True)
    teacher = Teacher(args.model, args.dtype)
    args.resolution = args.resolution or native_size(teacher.pipe)
    prompts, _ = pick_prompts(teacher.pipe, args.images, None, split="train")
    settings = TeacherSettings(args.resolution, args.num_inference_steps, args.guidance_scale)
    batches = [list(range(i, i + args.batch_size)) for i in range(0, args.images, args.batch_size)]
    with scratch_folder(args.output) as folder:
        manifest, seeds = teacher.describe(settings), prompt_seeds(prompts, args.seed)
        cache = TeacherCache(folder, manifest, prompts, seeds)
        theirs, latents = time_pipeline(cache, batches, args)
        gc.collect()
        empty_cache(args.device)
        ours = time_cache(cache, teacher, batches, args)
        error = nmse(last_latents(cache, list(range(args.images))).float(), latents.float())
    each = ours["rest"] / args.images
    report = {
        "model": args.model, "images": args.images, "batch_size": args.batch_size, "resolution": args.resolution,
        "steps": args.num_inference_steps, "dtype": str(args.dtype), "compiled": not args.eager, "nmse": error,
        "seconds_per_prompt": each, "pipeline_seconds_per_prompt": theirs / args.images, "ratio": ours["rest"] / theirs,
        "once_seconds": ours["once"], "count": args.count,
        "gpu_hours": (args.count * each + ours["once"]) / 3600, "device": device_name(args.device),
        "torch": torch.__version__, "diffusers": diffusers.__version__,
    }  # fmt: skip
    write_json(args.output / "cache_speed.json", report)
    log.info(
        "%.3f s a prompt, the pipeline %.3f: ratio %.3f; %d prompts take %.2f GPU-hours; NMSE of the latents %.1e",
        each, theirs / args.images, report["ratio"], args.count, report["gpu_hours"], error,
    )  # fmt: skip


def main() -> None:
    args = parse_args()
    advice = "try a smaller --batch_size" if args.batch_size > 1 else "try a smaller --resolution"
    with memory_named("pictures are drawn", advice, args.device):
        measure(args)


if __name__ == "__main__":
    run_script(main)
