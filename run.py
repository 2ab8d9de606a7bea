"""One-shot ternarization: a FLUX pipeline in, a small quantized one out, no training.

    python run.py --model_id assets/tiny-flux --output_path output/oneshot                     # 1.58 bit, calibrated
    python run.py --model_id assets/tiny-flux --output_path output/oneshot2 --w_bits 2
    python run.py --model_id black-forest-labs/FLUX.1-dev --output_path flux-ternary --method mse --num_images 0

    --method calibrated   codes that keep the outputs on the teacher's own trajectories (see utils/oneshot.py)
    --method mse          each row at its error-minimal step size; tensor by tensor, within a few GB of memory
    --method threshold    the published rule: |w| below THRESHOLD_RATIO·max of its row → 0; likewise

It writes

    OUTPUT_PATH/                       the whole pipeline, for FluxPipeline.from_pretrained and test.py
    OUTPUT_PATH/samples/               teacher and quantized pictures of a few prompts, and grid.png
    OUTPUT_PATH/metrics.json           layers, bytes, weight errors, seconds, memory
"""

import argparse
import gc
import json
import math
import resource
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import diffusers
import torch
from diffusers import FluxPipeline
from huggingface_hub import snapshot_download
from safetensors import safe_open
from torch import Tensor
from tqdm import tqdm

from models.kernels import MODES
from models.modeling_flux_quant import FluxTransformer2DModel, is_quantized
from models.packing import FORMAT, PackedLinear, PackedWriter, disk_row_bytes, row_chunks, store_codes, to_disk
from models.utils_quant import check_bits, code_grid
from utils.checkpoints import bits_name
from utils.folders import check_disk, whole_folder
from utils.oneshot import INGREDIENTS, METHODS, calibrate, round_weight
from utils.pictures import save_grid, save_images
from utils.prompts import pick_prompts
from utils.sampling import generate_images, load_pipeline, native_size, record_inputs, set_attention
from utils.utils import device_name, empty_cache, get_logger, pick_device, run_script

log = get_logger("run")
CALIBRATION_SEED = 2_000_000  # neither training nor evaluation starts from these
# Calibration prompts, by the pixels a side: one picture of 1024 pixels has 4,096 tokens, so that 16 at 7 steps give
# half a million samples of the inputs of a layer, of which there are at most 15,360.
MANY_PROMPTS, MANY_PIXELS, FEW_PROMPTS = 64, 512, 16
KINDS = ("norm", "attn", "ff", "proj")  # of layers, by a part of their name


def local_pipeline(model_id: str) -> Path:
    """The pipeline's folder, downloaded if `model_id` is a hub id; ValueError if it is not a FLUX pipeline."""
    folder = Path(model_id)
    if not folder.is_dir():
        patterns = ["*/*.safetensors", "*/*.json", "*/*.txt", "*/*.model", "model_index.json"]
        try:
            folder = Path(snapshot_download(model_id, allow_patterns=patterns))
        except Exception as error:
            raise ValueError(f"{model_id}: neither a folder nor a reachable hub id ({error})") from None
    file = folder / "transformer" / "config.json"
    try:
        kind = json.loads((folder / "model_index.json").read_text())["transformer"][1]
        config = json.loads(file.read_text())
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise ValueError(f"{model_id}: not a pipeline with a transformer ({error!r}); check --model_id") from None
    if kind != "FluxTransformer2DModel" or config.get("_class_name") != kind:
        raise ValueError(f"{model_id}: its transformer is a {kind}, expected a FluxTransformer2DModel")
    if is_quantized(config):
        raise ValueError(f"{model_id}: its transformer is quantized already; give the full-precision pipeline")
    return folder


def stored_tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a folder of safetensors, one at a time.

    Each is read from a mapping of its own: what was read of one shard would count as memory until it is closed.
    """
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            names = list(tensors.keys())
        for name in names:
            with safe_open(file, framework="pt") as tensors:
                yield name, tensors.get_tensor(name)


def packed_skeleton(config: dict, w_bits: int) -> FluxTransformer2DModel:
    """The packed model of this config on the meta device: which layers are packed, and the config to save."""
    with torch.device("meta"):
        return FluxTransformer2DModel.from_config({**config, "w_bits": w_bits, "packed": FORMAT})


def packed_bytes(source: Path, w_bits: int) -> int:
    """Bytes that the transformer in `source` will take on disk, what is not quantized counted at 4 each."""
    skeleton, total = packed_skeleton(json.loads((source / "config.json").read_text()), w_bits), 0
    for layer in skeleton.modules():
        total += 4 * sum(p.numel() for p in layer.parameters(recurse=False) if p.dtype != torch.uint8)
        if isinstance(layer, PackedLinear):
            total += layer.out_features * disk_row_bytes(layer.in_features, w_bits)
    return total


class Errors:
    """Squared errors and energies of the weights, by kind of layer."""

    def __init__(self):
        self.sums = {kind: [0.0, 0.0, 0] for kind in KINDS}

    def add(self, name: str, error: float, energy: float) -> None:
        row = self.sums[next(kind for kind in KINDS if kind in name.partition(".")[2])]
        row[0] += error
        row[1] += energy
        row[2] += 1

    def table(self) -> dict[str, dict]:
        return {k: {"layers": n, "weight_error": e / w} for k, (e, w, n) in self.sums.items() if n}


def quantize_matrix(weight: Tensor, args: argparse.Namespace) -> tuple[Tensor, Tensor, float, float]:
    """Codes as on disk, step sizes [out, 1], squared error and energy of a weight [out, in], chunk after chunk."""
    n, s = code_grid(args.w_bits)
    stored, alphas, error, energy = [], [], 0.0, 0.0
    for rows in row_chunks(*weight.shape):
        part = weight[rows].to(args.device).float()
        square = part.square().sum().item()
        if not math.isfinite(square) and not part.isfinite().all():  # the sum alone is four times as fast
            raise ValueError("holds NaN or inf")
        codes, alpha = round_weight(part, args.w_bits, args.method, args.threshold_ratio)
        stored.append(store_codes(codes, args.w_bits).cpu())
        alphas.append(alpha.cpu())
        energy += square
        error += codes.float().add_(s).mul_(alpha / n).sub_(part).square_().sum().item()
    return torch.cat(stored), torch.cat(alphas), error, energy


def stream(source: Path, target: Path, args: argparse.Namespace, errors: Errors) -> None:
    """From the transformer in `source` to a packed one in `target`, one tensor at a time."""
    skeleton = packed_skeleton(json.loads((source / "config.json").read_text()), args.w_bits)
    writer = PackedWriter(target)
    total = sum(file.stat().st_size for file in source.glob("*.safetensors"))
    shapes = {name: parameter.shape for name, parameter in skeleton.named_parameters()}
    missing = set(shapes)
    layers = {name: m for name, m in skeleton.named_modules() if isinstance(m, PackedLinear)}
    shapes |= {f"{name}.weight": (layer.out_features, layer.in_features) for name, layer in layers.items()}
    with tqdm(total=total, desc=args.method, unit="B", unit_scale=True) as bar:
        for name, tensor in stored_tensors(source):
            path, _, kind = name.rpartition(".")
            if shapes.get(name) != tensor.shape:
                expected = f"expected {list(shapes[name])}" if name in shapes else "not expected by its config.json"
                raise ValueError(f"{source}: {name} has shape {list(tensor.shape)}, {expected}; download it again")
            if path in layers and kind == "weight":
                try:
                    stored, alpha, error, energy = quantize_matrix(tensor, args)
                except ValueError as problem:
                    raise ValueError(f"{source}: {name}: {problem}") from None
                found = {f"{path}.weight_codes": stored, f"{path}.weight_clip_val": alpha}
                errors.add(path, error, energy)
            else:
                found = {name: tensor}
            for key, value in found.items():
                writer.add(key, value)
            missing -= set(found)
            bar.update(tensor.nbytes)
    if missing:
        raise ValueError(f"{source}: {min(missing)} is missing; download the model again")
    skeleton.save_config(target)
    writer.close(dict(skeleton.config))


def calibrated(pipe: FluxPipeline, target: Path, args: argparse.Namespace, errors: Errors) -> None:
    """Record the teacher on the calibration prompts, round layer after layer, write the packed transformer."""
    transformer, dtype = pipe.transformer, pipe.transformer.dtype
    count = args.calibration_prompts or (FEW_PROMPTS if args.resolution > MANY_PIXELS else MANY_PROMPTS)
    prompts, source = pick_prompts(pipe, count, split="train")
    log.info("calibration: %d prompts, every %d. step: %s", len(prompts), args.calibration_stride, source)
    pipe.to(args.device)
    used = range(0, args.steps, args.calibration_stride)
    with record_inputs(transformer, lambda number: number % args.steps in used) as calls:
        generate_images(
            pipe, prompts, CALIBRATION_SEED, num_inference_steps=args.steps, guidance_scale=args.guidance_scale,
            size=args.resolution, batch_size=args.batch_size, desc="teacher",
        )  # fmt: skip
    pipe.to("cpu")
    empty_cache(args.device)
    # An error of the velocity enters the picture times the step that is taken with it.
    lengths = (pipe.scheduler.sigmas[:-1] - pipe.scheduler.sigmas[1:]).abs().tolist()
    weights = [lengths[step] * args.steps for step in used] * (len(calls) // len(used))
    skeleton = packed_skeleton(dict(transformer.config), args.w_bits)
    writer, done = PackedWriter(target), set()

    def keep(name: str, packed: PackedLinear, weight: Tensor) -> None:
        weight = weight.float()
        energy, error = weight.square().sum().item(), (weight - packed.dequantize()).square().sum().item()
        errors.add(name, error, energy)
        writer.add(f"{name}.weight_codes", to_disk(packed.weight_codes, packed.w_bits, packed.in_features))
        writer.add(f"{name}.weight_clip_val", packed.weight_clip_val)
        if packed.bias is not None:
            writer.add(f"{name}.bias", packed.bias.to(dtype))
        done.update((f"{name}.weight", f"{name}.bias"))

    pipe.transformer = None
    calibrate(transformer, calls, weights, args.w_bits, keep, args.device, without=args.without)
    for name, parameter in transformer.named_parameters():
        if name not in done:
            writer.add(name, parameter)
    skeleton.save_config(target)
    writer.close(dict(skeleton.config))


def copy_rest(source: Path, target: Path) -> None:
    """Everything of a pipeline but its transformer, and a model_index.json that names ours."""
    for path in sorted(source.iterdir()):
        if path.is_dir() and path.name != "transformer" and (any(path.glob("*.json")) or any(path.glob("*.txt"))):
            shutil.copytree(path, target / path.name, ignore=shutil.ignore_patterns("*.bin", ".*"))
    index = json.loads((source / "model_index.json").read_text())
    index["transformer"] = ["models.modeling_flux_quant", "FluxTransformer2DModel"]
    (target / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


def folder_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def peak_rss() -> int:
    """The most bytes of memory that this process has had so far, files mapped into it included."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def draw(pipe: FluxPipeline, prompts: list[str], args: argparse.Namespace, desc: str) -> Tensor:
    pipe.to(args.device)
    return generate_images(
        pipe, prompts, args.seed, num_inference_steps=args.steps, guidance_scale=args.guidance_scale,
        size=args.resolution, batch_size=args.batch_size, desc=desc,
    )  # fmt: skip


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_id", default="assets/tiny-flux", help="the FLUX pipeline: a folder or a hub id")
    parser.add_argument("--output_path", type=Path, default=Path("output/oneshot"), help="must not hold anything yet")
    parser.add_argument("--method", choices=METHODS, default="calibrated")
    parser.add_argument("--w_bits", type=int, default=0, help="0 (1.58 bit, ternary), 1 to 8")
    parser.add_argument("--threshold_ratio", type=float, default=0.05, help="with --method threshold")
    parser.add_argument("--calibration_prompts", type=int,
                        help=f"training prompts to calibrate on; default: {MANY_PROMPTS}, above {MANY_PIXELS} pixels "
                        f"{FEW_PROMPTS}")  # fmt: skip
    parser.add_argument("--calibration_stride", type=int, default=4, help="of the steps, every so many-th is used")
    parser.add_argument("--without", nargs="+", choices=INGREDIENTS, default=[], metavar="INGREDIENT",
                        help=f"leave out of the calibration: {', '.join(INGREDIENTS)}")  # fmt: skip
    parser.add_argument("--num_images", type=int, default=4, help="sample pairs to draw; 0: none")
    parser.add_argument("--prompts_json", help="a JSON list of prompts to draw; default: the model's evaluation set")
    parser.add_argument("--steps", type=int, default=28, help="denoising steps")
    parser.add_argument("--guidance_scale", type=float, default=3.5)
    parser.add_argument("--resolution", type=int, help="pixels a side; default: what the autoencoder was made for")
    parser.add_argument("--batch_size", type=int, default=8, help="pictures drawn at a time")
    parser.add_argument("--mode", choices=MODES, default="exact", help="to draw in; fast: 8-bit activations")
    parser.add_argument("--attention", metavar="NAME", help="of the quantized model, one of diffusers' backends, "
                        "such as sage, flash or _flash_3; default: torch's own")  # fmt: skip
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="default: bfloat16 on CUDA")
    parser.add_argument("--device", help="default: cuda if there, else mps, else cpu")
    parser.add_argument("--seed", type=int, default=42, help="picture i starts from the noise of seed + i")
    args = parser.parse_args(argv)
    try:
        args.device = pick_device(args.device)
        if args.attention:
            set_attention(args.attention)
        if check_bits(args.w_bits) >= 16:
            raise ValueError(f"--w_bits {args.w_bits}: nothing to quantize; use 0 to 8")
        if args.method == "threshold" and args.w_bits:
            raise ValueError(f"--method threshold is a ternary rule: --w_bits must be 0, got {args.w_bits}")
        if not 0 <= args.threshold_ratio < 1:
            raise ValueError(f"--threshold_ratio must be at least 0 and below 1, got {args.threshold_ratio}")
        for name in ("calibration_prompts", "calibration_stride", "steps", "batch_size"):
            if getattr(args, name) is not None and getattr(args, name) < 1:
                raise ValueError(f"--{name} must be at least 1, got {getattr(args, name)}")
        if args.num_images < 0:
            raise ValueError(f"--num_images must not be negative, got {args.num_images}")
    except ValueError as error:
        parser.error(str(error))
    return args


def read_prompts(pipe: FluxPipeline, args: argparse.Namespace) -> list[str]:
    """The prompts to draw; ValueError if --prompts_json is not a list of strings."""
    if args.prompts_json is None:
        return pick_prompts(pipe, args.num_images)[0]
    try:
        prompts = json.loads(Path(args.prompts_json).read_text(encoding="utf-8-sig"))
        if not prompts or not all(isinstance(prompt, str) for prompt in prompts):
            raise ValueError("no list of strings")
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"--prompts_json {args.prompts_json}: cannot be read as a JSON list ({error})") from None
    return list(prompts)[: args.num_images]


def main() -> None:
    args = parse_args()
    started = time.time()
    source = local_pipeline(args.model_id)
    if args.output_path.exists() and (not args.output_path.is_dir() or any(args.output_path.iterdir())):
        raise ValueError(f"--output_path {args.output_path}: exists and is not empty; choose another")
    rest = sum(f.stat().st_size for f in source.rglob("*.safetensors") if f.parent.name != "transformer")
    check_disk(args.output_path, rest + packed_bytes(source / "transformer", args.w_bits), "the quantized pipeline")
    dtype = getattr(torch, args.dtype or ("bfloat16" if args.device.type == "cuda" else "float32"))
    name = bits_name(args.w_bits)

    pipe, teacher_images, prompts, errors = None, None, [], Errors()
    with whole_folder(args.output_path) as folder:  # a place that cannot be written to shows here
        if args.method == "calibrated" or args.num_images:
            pipe = load_pipeline(str(source), dtype)
            args.resolution = args.resolution or native_size(pipe)
        if args.num_images:
            prompts = read_prompts(pipe, args)
            teacher_images = draw(pipe, prompts, args, "teacher")
        quantizing = time.time()
        if args.method == "calibrated":
            calibrated(pipe, folder / "transformer", args, errors)
        else:
            if pipe is not None:
                pipe.transformer = None
            gc.collect()
            empty_cache(args.device)
            stream(source / "transformer", folder / "transformer", args, errors)
        quantizing = time.time() - quantizing
        copy_rest(source, folder)
        metrics = {
            "model": args.model_id, "method": args.method, "w_bits": args.w_bits, "without": args.without,
            "mode": args.mode, "attention": args.attention,
            "bytes_before": folder_bytes(source / "transformer"),
            "bytes_after": folder_bytes(folder / "transformer"),
            "layers": errors.table(), "seconds": round(quantizing, 1),
            "gb_per_second": round(folder_bytes(source / "transformer") / quantizing / 1e9, 3),
            "peak_rss_bytes": peak_rss(), "device": device_name(args.device), "torch": torch.__version__,
            "diffusers": diffusers.__version__,
        }  # fmt: skip
        if args.num_images:
            student = FluxTransformer2DModel.from_pretrained(folder / "transformer", dtype=dtype)
            pipe.register_modules(transformer=student.set_inference_mode(args.mode))
            if args.attention:
                set_attention(args.attention, student)
            images = draw(pipe, prompts, args, name)
            save_images(teacher_images, folder / "samples" / "full")
            save_images(images, folder / "samples" / f"bits_{args.w_bits}")
            save_grid({"full": teacher_images, name: images}, prompts, folder / "samples" / "grid.png")
        (folder / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")

    print(f"\n{'layers':<10}{'number':>8}{'weight error':>14}")
    for kind, row in metrics["layers"].items():
        print(f"{kind:<10}{row['layers']:>8}{row['weight_error']:>14.4f}")
    before, after = metrics["bytes_before"], metrics["bytes_after"]
    print(f"transformer: {before / 1e6:,.1f} MB -> {after / 1e6:,.1f} MB ({before / after:.1f}x)")
    speed, peak = metrics["gb_per_second"], metrics["peak_rss_bytes"] / 1e9
    print(f"quantized in {metrics['seconds']:.0f} s ({speed:.3f} GB/s, {peak:.1f} GB of memory at most), ", end="")
    print(f"{time.time() - started:.0f} s in all\n")
    log.info("pipeline: %s", args.output_path)


if __name__ == "__main__":
    run_script(main)
