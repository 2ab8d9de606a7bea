"""Judge a quantized checkpoint against its teacher, or draw the pictures that outside benchmarks judge.

    python test.py output/sanity/cache/bits_0                                    # what sanity.py left
    python test.py output/models/tiny-flux-1.58bit 0 --num_images 1200           # what train.py left
    python test.py output/train/run/checkpoint-200                               # one of its checkpoints
    python test.py CHECKPOINT --model black-forest-labs/FLUX.1-dev --offload     # the real one on a 24 GB card
    python test.py CHECKPOINT --offload sequential                               # on an 8 GB card
    python test.py output/oneshot --mode fast --compile                          # 8-bit activations, at full speed
    python test.py CHECKPOINT --geneval evaluation_metadata.jsonl                # GenEval's folders, four a prompt

CHECKPOINT is a transformer or a whole pipeline; W_BITS, what it was quantized to (0: 1.58 bit), is checked if given.
Teacher and checkpoint draw the same prompts from the same noise. It writes

    OUTPUT_DIR/samples/{full,bits_W}/sample_000.png …    the pictures
    OUTPUT_DIR/samples/grid.png                          teacher, checkpoint and their difference
    OUTPUT_DIR/metrics.json                              everything that was measured
    OUTPUT_DIR/geneval/CHECKPOINT/00000/…                with --geneval or --prompt_list, and nothing else
    OUTPUT_DIR/geneval/CHECKPOINT/manifest.json          what they were drawn with: nothing else goes beside them
"""

import utils.interrupt  # noqa: F401 (Ctrl-C is a line from here on)

import argparse
import json
import math
import time
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn
from tqdm import tqdm

from models.kernels import MODES
from models.packing import PackedLinear, disk_row_bytes
from models.quantized_model import QuantizedTransformer, is_quantized
from utils import scenes
from utils.checkpoints import bits_name, check_shapes, load_student, transformer_folder
from utils.cuda_graph import compile_steps
from utils.folders import check_target, locked, read_json, whole_folder, write_json, write_text
from utils.metrics import learned_scores, psnr, scene_score, ssim, velocity_nmse
from utils.pictures import save_grid, save_images, save_png, to_pil
from utils.pipelines import DEFAULTS, family_of, sampling_settings
from utils.prompts import pick_prompts, read_prompts, read_text
from utils.sampling import (
    OFFLOADS,
    check_offload,
    draw_in_less,
    drop_transformer,
    generate_images,
    load_pipeline,
    native_size,
    place,
    record_velocities,
    set_attention,
)
from utils.utils import (
    DTYPES,
    ArgumentParser,
    check_counts,
    check_guidance,
    check_resolution,
    check_seed,
    device_name,
    from_root,
    get_logger,
    memory_named,
    pick_device,
    run_script,
)
from utils.walk import fingerprint

log = get_logger("test")
OWNER = "test.py"
NMSE_PROMPTS = 24  # the velocity error is measured along the teacher's trajectories of so many prompts
GRID_PROMPTS = 8
MOST_SAMPLES = 100  # of a benchmark's prompt: sample j of prompt i starts from the noise of seed + 100 i + j


def find_teacher(checkpoint: Path) -> str:
    """The pipeline that run.py made `checkpoint` from, if it is such a pipeline or its transformer, else the embedded
    one. ValueError if it is remembered as a folder that is gone."""
    for folder in (checkpoint, *([checkpoint.resolve().parent] if checkpoint.resolve().name == "transformer" else [])):
        try:
            model = from_root(json.loads((folder / "metrics.json").read_text())["model"])
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if Path(model).is_absolute() and not Path(model).exists():
            raise ValueError(f"{checkpoint}: was made from {model}, which is gone; name its teacher with --model")
        return model
    return from_root("assets/tiny-flux")


def resident_bytes(model: nn.Module) -> int:
    """Bytes of all parameters in memory."""
    return sum(p.numel() * p.element_size() for p in model.parameters())


def bits_per_weight(model: nn.Module) -> float:
    """Bits on disk of a packed weight, its share of the step sizes included."""
    layers = [layer for layer in model.modules() if isinstance(layer, PackedLinear)]
    codes = sum(disk_row_bytes(layer.in_features, layer.w_bits) * layer.out_features for layer in layers)
    step_sizes = sum(layer.weight_clip_val.nbytes for layer in layers)
    return 8 * (codes + step_sizes) / sum(layer.in_features * layer.out_features for layer in layers)


def prepare(pipe: DiffusionPipeline, args: argparse.Namespace) -> None:
    """Put the pipeline where it computes; compile it if asked to."""
    place(pipe, args.device, args.offload)
    if args.compile:
        compile_steps(pipe.transformer)


def read_items(args: argparse.Namespace) -> list[dict]:
    """What a benchmark asks for: a dict with a "prompt" for each; ValueError if the file holds none."""
    if args.prompt_list:
        return [{"prompt": prompt} for prompt in read_prompts(args.prompt_list, "--prompt_list")]
    try:
        lines = [line for line in read_text(args.geneval, "--geneval").split("\n") if line.strip()]
        items = [json.loads(line) for line in lines]
        if not all(isinstance(item["prompt"], str) for item in items):
            raise TypeError("a prompt that is no string")
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(
            f'--geneval {args.geneval}: cannot be read as JSON lines with a "prompt" ({type(error).__name__}: {error})'
        ) from None
    if not items:
        raise ValueError(f'--geneval {args.geneval}: no prompts in it; write JSON lines with a "prompt"')
    return items


def benchmark_folder(args: argparse.Namespace) -> Path:
    """OUTPUT_DIR/geneval/ and the checkpoint's name: its run's too where it is one of several."""
    folder = args.checkpoint.resolve()
    if folder.name == "transformer":
        folder = folder.parent
    run = f"{folder.parent.name}-" if folder.name.startswith("checkpoint-") else ""
    return args.output_dir / "geneval" / f"{run}{folder.name}"


def check_benchmark(folder: Path, wanted: dict) -> None:
    """ValueError, naming what differs, unless pictures of these settings may go into `folder`: it has none yet, or
    those of the same settings, of no more prompts and no more samples of each."""
    file = folder / "manifest.json"
    if not file.exists():
        if any(folder.glob("[0-9]*")):
            raise ValueError(f"{folder}: holds pictures but no manifest.json; move it or choose another --output_dir")
        return
    found = read_json(file)
    for name, value in wanted.items():
        have = found.get(name)
        if name == "samples_per_prompt" and isinstance(have, int) and have <= value:
            continue
        if name == "items" and isinstance(have, list):
            number = next((i for i, item in enumerate(have) if value[i : i + 1] != [item]), None)
            if number is None:
                continue
            name, have, value = f"prompt {number}", have[number], value[number] if number < len(value) else "none"
        if have != value:
            raise ValueError(
                f"{folder}: its pictures were drawn with another {name}: found {str(have)[:80]}, asked for "
                f"{str(value)[:80]}; move it or choose another --output_dir"
            )


def write_benchmark(pipe: DiffusionPipeline, args: argparse.Namespace, items: list[dict], folder: Path) -> None:
    """GenEval's layout: folder/00000/metadata.jsonl and samples/00000.png …; what is there already is left alone."""
    names = ("dtype", "mode", "attention", "seed", "steps", "guidance_scale", "resolution", "samples_per_prompt")
    settings = {name: getattr(args, name) for name in names}
    settings["weights"] = fingerprint(pipe.transformer)
    settings["text_encoders"] = [fingerprint(getattr(pipe, name)) for name in family_of(pipe).text_encoders]
    check_benchmark(folder, settings | {"items": items})
    write_json(folder / "manifest.json", {"checkpoint": str(args.checkpoint), **settings, "items": items})
    args.doing = "the checkpoint draws, one picture at a time"
    prepare(pipe, args)
    done = 0
    for number, item in enumerate(tqdm(items, desc="prompts", unit="prompt")):
        samples = folder / f"{number:05d}" / "samples"
        write_text(samples.parent / "metadata.jsonl", json.dumps(item) + "\n")
        samples.mkdir(exist_ok=True)
        missing = [i for i in range(args.samples_per_prompt) if not (samples / f"{i:05d}.png").exists()]
        for i in missing:
            [image] = generate_images(
                pipe, [item["prompt"]], args.seed + number * MOST_SAMPLES + i, num_inference_steps=args.steps,
                guidance_scale=args.guidance_scale, size=args.resolution,
            )  # fmt: skip
            save_png(to_pil(image), samples / f"{i:05d}.png")
            done += 1
    log.info("%s: %d prompts, %d pictures drawn now", folder, len(items), done)


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
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="a quantized transformer, or a pipeline with one")
    parser.add_argument("w_bits", type=int, nargs="?", help="to check: what it was quantized to; 0 is 1.58 bit")
    parser.add_argument("--model", help="the teacher; default: what run.py made CHECKPOINT from if it is from there, "
                        "else assets/tiny-flux")  # fmt: skip
    parser.add_argument("--output_dir", type=Path, default=Path("test"), help="pictures and figures go here")
    parser.add_argument("--num_images", type=int, default=24, help="pictures to draw and to measure on")
    parser.add_argument("--prompts", help="a text file, one prompt a line, or a JSON list of prompts; default: the "
                        "model's evaluation set")  # fmt: skip
    parser.add_argument("--geneval", metavar="METADATA.jsonl", help="draw GenEval's prompts in its folder layout")
    parser.add_argument("--prompt_list", metavar="FILE", help="the same for a file as of --prompts")
    parser.add_argument("--samples_per_prompt", type=int, default=4,
                        help=f"with --geneval or --prompt_list; at most {MOST_SAMPLES}")  # fmt: skip
    parser.add_argument("--no_teacher", action="store_true", help="draw with the checkpoint only")
    parser.add_argument("--offload", nargs="?", const="model", choices=OFFLOADS, help="to draw, keep on the device "
                        "only the component that computes; sequential: what does not fit streams layer by "
                        "layer")  # fmt: skip
    parser.add_argument("--mode", choices=MODES, default="exact", help="to compute in; fast: 8-bit activations")
    parser.add_argument("--attention", metavar="NAME", help="of the quantized model: fp8, in fast mode on an H100 "
                        "(pip install fa3-fwd), or one of diffusers' backends; default: torch's own")  # fmt: skip
    parser.add_argument("--compile", action="store_true", help="compile the transformer, on CUDA into CUDA graphs: "
                        "a minute or two at the start, then faster")  # fmt: skip
    parser.add_argument("--dtype", choices=DTYPES, help="default: bfloat16 on CUDA, else float32")
    parser.add_argument("--device", help="default: cuda if there, else mps, else cpu")
    parser.add_argument("--seed", type=int, default=42, help="picture i starts from the noise of seed + i")
    parser.add_argument("--batch_size", type=int, default=8, help="pictures drawn at a time")
    parser.add_argument("--num_inference_steps", "--steps", dest="steps", type=int,
                        help=f"denoising steps; {DEFAULTS[0]}")  # fmt: skip
    parser.add_argument("--guidance_scale", type=float, help=DEFAULTS[1])
    parser.add_argument("--resolution", type=int, help="pixels a side; default: what the autoencoder was made for")
    args = parser.parse_intermixed_args(argv)  # or W_BITS would have to stand right after CHECKPOINT
    try:
        args.device = pick_device(args.device)
        if args.attention:
            set_attention(args.attention, modes=[args.mode])
        args.dtype = args.dtype or ("bfloat16" if args.device.type == "cuda" else "float32")
        check_counts(args, "num_images", "samples_per_prompt", "batch_size", "steps")
        check_resolution(args.resolution)
        check_guidance(args.guidance_scale)
        check_seed(args.seed)
        if args.samples_per_prompt > MOST_SAMPLES:
            raise ValueError(f"--samples_per_prompt must be at most {MOST_SAMPLES}, got {args.samples_per_prompt}")
        if args.geneval and args.prompt_list:
            raise ValueError("--geneval and --prompt_list: give one of them")
        if args.offload and args.compile:
            raise ValueError("--offload moves what --compile wants to stay: give one of them")
        check_offload(args.offload, args.device)
    except ValueError as error:
        parser.error(str(error))
    args.checkpoint = Path(from_root(str(args.checkpoint)))
    args.model = None if args.model is None else from_root(args.model)
    return args


def load(args: argparse.Namespace) -> tuple[QuantizedTransformer, DiffusionPipeline]:
    """The checkpoint, and the pipeline that it was quantized from."""
    dtype = getattr(torch, args.dtype)
    student = load_student(transformer_folder(args.checkpoint), dtype, w_bits=args.w_bits)
    if args.mode != "exact":
        student.set_inference_mode(args.mode)
    if args.attention:
        set_attention(args.attention, student)
    args.model = args.model or find_teacher(args.checkpoint)
    pipe = load_pipeline(args.model, dtype)
    check_shapes(args.checkpoint, student.config, args.model, pipe.transformer, "--model")
    args.w_bits = student.config.w_bits
    args.resolution = args.resolution or native_size(pipe)
    args.steps, args.guidance_scale = sampling_settings(pipe, args.steps, args.guidance_scale)
    return student, pipe


def less_memory(args: argparse.Namespace) -> str:
    """Which flag to change where memory does not suffice."""
    if args.compile:
        return "try it without --compile, with --offload"
    drawn_together = not (args.geneval or args.prompt_list) and args.batch_size > 1
    return draw_in_less(args.offload, args.device, "--batch_size" if drawn_together else "--resolution")


def main() -> None:
    args = parse_args()
    args.doing = "the models are loaded"
    with memory_named(lambda: args.doing, less_memory(args), args.device):
        if args.geneval or args.prompt_list:
            items, folder = read_items(args), benchmark_folder(args)
            with locked(folder):
                student, pipe = load(args)
                pipe.register_modules(transformer=student)
                write_benchmark(pipe, args, items, folder)
        else:
            with locked(args.output_dir):
                judge(args)


def judge(args: argparse.Namespace) -> None:
    """Draw with the teacher and with the checkpoint, and measure how they differ."""
    device, samples = args.device, args.output_dir / "samples"
    check_target(samples, OWNER)
    if (args.output_dir / "metrics.json").exists() and "checkpoint" not in read_json(args.output_dir / "metrics.json"):
        raise ValueError(f"{args.output_dir}: holds a metrics.json of something else; choose another --output_dir")
    student, pipe = load(args)
    if is_quantized(pipe.transformer.config) and not args.no_teacher:
        raise ValueError(f"{args.model}: already quantized; the teacher must be full precision, or use --no_teacher")
    folder, name, model = transformer_folder(args.checkpoint), bits_name(args.w_bits), args.model
    dtype = pipe.transformer.dtype
    prompts, source = pick_prompts(pipe, args.num_images, args.prompts)
    with_scores = args.resolution == scenes.SIZE and all(scenes.parse(prompt) for prompt in prompts)
    log.info("%s (%s) against %s, %s on %s", folder, name, model, dtype, device)
    log.info("%d prompts: %s; %d pixels, seed %d", len(prompts), source, args.resolution, args.seed)

    each = family_of(pipe).calls_a_step(pipe, args.guidance_scale)

    def draw(prompts: list[str], seed: int, desc: str, steps: int = args.steps) -> Tensor:
        return generate_images(
            pipe, prompts, seed, num_inference_steps=steps, guidance_scale=args.guidance_scale,
            size=args.resolution, batch_size=args.batch_size, desc=desc,
        )  # fmt: skip

    # 1. The teacher.
    teacher_images, calls = None, []
    if not args.no_teacher:
        args.doing = f"the teacher draws, {args.batch_size} pictures at a time"
        prepare(pipe, args)
        first, rest = prompts[:NMSE_PROMPTS], prompts[NMSE_PROMPTS:]
        with record_velocities(pipe.transformer) as calls:
            teacher_images = draw(first, args.seed, "teacher")
        if rest:
            teacher_images = torch.cat([teacher_images, draw(rest, args.seed + len(first), "teacher")])

    # 2. The checkpoint in its place.
    args.doing = f"the checkpoint draws, {args.batch_size} pictures at a time"
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
    if args.compile:  # what is timed next finds the compiled code, of a last batch of fewer pictures too
        for count in {min(args.batch_size, len(prompts)), len(prompts) % args.batch_size} - {0}:
            draw(prompts[:count], args.seed, "compiling", steps=1)
    started = time.time()
    images = draw(prompts, args.seed, name)
    metrics["seconds_per_image"] = (time.time() - started) / len(prompts)
    if calls:
        args.doing = "velocities are compared"
        metrics["nmse"], metrics["nmse_by_step"] = velocity_nmse(student, calls, args.steps, device, each)

    # 3. The figures.
    args.doing = "pictures are compared"
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
    (args.output_dir / "metrics.json").unlink(missing_ok=True)  # the pictures beside it are about to be others
    with whole_folder(samples, OWNER) as part:
        save_images(images, part / f"bits_{args.w_bits}")
        if teacher_images is not None:
            save_images(teacher_images, part / "full")
            shown = range(min(GRID_PROMPTS, len(prompts)))
            rows = {
                prompts[i]: torch.stack([teacher_images[i], images[i], (teacher_images[i] - images[i]).abs()])
                for i in shown
            }
            save_grid(rows, ["full", name, "difference"], part / "grid.png")
        else:
            save_grid({name: images[:GRID_PROMPTS]}, prompts[:GRID_PROMPTS], part / "grid.png")
    write_json(args.output_dir / "metrics.json", metrics)
    print_table(metrics)
    if not math.isfinite(metrics.get("nmse", 0.0)):
        raise ValueError(f"{args.checkpoint}: its velocities or its teacher's are not finite; try another --dtype")
    log.info("pictures: %s; figures: %s", samples / "grid.png", args.output_dir / "metrics.json")


if __name__ == "__main__":
    run_script(main, "what --geneval or --prompt_list has drawn is kept; the same command goes on")
