"""A FLUX.1 or FLUX.2-klein pipeline in, a small quantized one out, without training it end to end.

    python run.py --model assets/tiny-flux --output_dir output/oneshot                         # 1.58 bit, calibrated
    python run.py --model assets/tiny-flux --output_dir output/oneshot2 --w_bits 2
    python run.py --model black-forest-labs/FLUX.1-dev --output_dir flux-ternary --method mse --num_images 0

    --method calibrated   codes that keep the outputs on the teacher's own trajectories (see utils/oneshot.py)
    --method mse          each row at its error-minimal step size; tensor by tensor, within a few GB of memory
    --method threshold    the published rule: |w| below THRESHOLD_RATIO·max of its row → 0; likewise
    --method blockwise    all weights of a block trained through the quantizer, block after block (utils/blockwise.py)

It writes

    OUTPUT_DIR/                        the whole pipeline, for diffusers' from_pretrained and test.py
    OUTPUT_DIR/samples/                teacher and quantized pictures of a few prompts, and grid.png
    OUTPUT_DIR/metrics.json            layers, bytes, weight errors, seconds, memory
    OUTPUT_DIR/.flux158-work/          while it calibrates or trains: what the same command goes on from after a kill
"""

import utils.interrupt  # noqa: F401 (Ctrl-C is a line from here on)

import argparse
import json
import math
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import diffusers
import torch
from diffusers import DiffusionPipeline
from huggingface_hub import snapshot_download
from safetensors import safe_open
from torch import Tensor, nn
from tqdm import tqdm

from models.families import load_transformer, transformer_class
from models.kernels import MODES
from models.packing import FORMAT, PackedLinear, PackedWriter, disk_row_bytes, row_chunks, store_codes
from models.quantized_model import QuantizedTransformer, is_quantized
from models.utils_quant import check_bits, code_grid
from utils.blockwise import STARTS, Settings, channel_weights, train_block, used_steps
from utils.checkpoints import bits_name, is_packed
from utils.folders import PREFIX, check_disks, is_empty, locked, scratch_folder, whole_folder, write_json
from utils.oneshot import INGREDIENTS, METHODS, calibrate, round_weight
from utils.pictures import save_grid, save_images
from utils.pipelines import DEFAULTS, EARLY_SHARE, FEW_STEPS, early_share, family_called, family_of, sampling_settings
from utils.prompts import pick_prompts
from utils.rates import default_rate
from utils.sampling import (
    OFFLOADS,
    check_offload,
    draw_in_less,
    drop_transformer,
    generate_images,
    load_pipeline,
    native_size,
    pipeline_family,
    place,
    set_attention,
    unplace,
)
from utils.utils import (
    DTYPES,
    ROOT,
    ArgumentParser,
    check_counts,
    check_guidance,
    check_resolution,
    check_seed,
    device_name,
    empty_cache,
    from_root,
    get_logger,
    memory_named,
    peak_rss,
    pick_device,
    run_script,
)
from utils.walk import (
    CALIBRATION_SEED,
    CALL_TOKENS,
    USED_STEPS,
    Work,
    fingerprint,
    record_calls,
    split_calls,
    stage_names,
    stored_tensors,
    walk,
)

log = get_logger("run")
# Calibration prompts, by the pixels a side: one picture of 1024 pixels has 4,096 tokens, so that 16 at 7 steps give
# half a million samples of the inputs of a layer, of which there are at most 15,360.
MANY_PROMPTS, MANY_PIXELS, FEW_PROMPTS = 64, 512, 16
# Block-wise training, likewise: prompts, stride, batch and micro-batch, blocks to look ahead (tiny-flux: all).
MANY_BLOCKWISE = {
    "calibration_prompts": 4096, "calibration_stride": 1, "block_steps": 1000, "block_batch_size": 256,
    "block_micro_batch_size": 256, "block_checkpointing": False, "lookahead": 8, "batch_size": 256,
}  # fmt: skip
FEW_BLOCKWISE = {
    "calibration_prompts": 256, "block_steps": 500, "block_batch_size": 16,
    "block_micro_batch_size": 2, "block_checkpointing": True, "lookahead": 2, "batch_size": 8,
}  # fmt: skip
WITH_CALLS = ("calibrated", "blockwise")  # methods that look at the teacher's trajectories
WEIGHED = 8  # calls by which channel weights are found
HOW = ("micro_batch_size", "checkpointing", "compile")  # what may change when a block-wise training goes on
CONTEXT_GIB = 0.6  # of a GPU, which CUDA takes beside what torch allocates
KINDS = ("norm", "attn", "ff", "proj")  # of layers, by a part of their name
# What is being done, in words and for less_memory.
LOADING, CALLS = "the pipeline is loaded", "the teacher draws the calibration prompts"
BLOCKS, WEIGHTS = "blocks are quantized", "weights are rounded"


def local_pipeline(model_id: str) -> Path:
    """The pipeline's folder, downloaded if `model_id` is a hub id; ValueError if it is of no family that is taken."""
    folder = Path(model_id)
    if not folder.is_dir():
        pipeline_family(model_id)  # before anything large is downloaded
        endings = ("safetensors", "json", "txt", "model", "jinja")
        patterns = ["model_index.json", *(f"*/*.{ending}" for ending in endings)]
        try:
            folder = Path(snapshot_download(model_id, allow_patterns=patterns))
        except Exception as error:
            raise ValueError(f"{model_id}: neither a folder nor a reachable hub id ({error})") from None
    file = folder / "transformer" / "config.json"
    try:
        index = json.loads((folder / "model_index.json").read_text())
        config = json.loads(file.read_text())
        pipeline, kinds = index["_class_name"], (index["transformer"][1], config.get("_class_name"))
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise ValueError(f"{model_id}: not a pipeline with a transformer ({error!r}); check --model") from None
    expected = family_called(pipeline, model_id).transformer.__name__
    for kind in kinds:
        if kind != expected:
            raise ValueError(f"{model_id}: its transformer is a {kind}, expected a {expected}")
    if is_quantized(config):
        raise ValueError(f"{model_id}: its transformer is quantized already; give the full-precision pipeline")
    return folder


def folder_tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a folder of safetensors, one at a time.

    Each is read from a mapping of its own: what was read of one shard would count as memory until it is closed.
    """
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            names = list(tensors.keys())
        for name in names:
            with safe_open(file, framework="pt") as tensors:
                yield name, tensors.get_tensor(name)


def packed_skeleton(config: dict, w_bits: int) -> QuantizedTransformer:
    """The packed model of this config on the meta device: which layers are packed, and the config to save."""
    with torch.device("meta"):
        return transformer_class(config).from_config({**config, "w_bits": w_bits, "packed": FORMAT})


def packed_bytes(source: Path, w_bits: int) -> int:
    """Bytes that the transformer in `source` will take on disk, what is not quantized counted at 4 each."""
    skeleton, total = packed_skeleton(json.loads((source / "config.json").read_text()), w_bits), 0
    for layer in skeleton.modules():
        total += 4 * sum(p.numel() for p in layer.parameters(recurse=False) if p.dtype != torch.uint8)
        if isinstance(layer, PackedLinear):
            total += layer.out_features * disk_row_bytes(layer.in_features, w_bits)
    return total


class Errors:
    """Squared errors and energies of the weights, by kind of layer; why which layers fell back to mse; the error and
    the seconds of each block that was trained."""

    def __init__(self):
        self.fell_back: dict[str, str] = {}
        self.blocks: dict[str, dict] = {}
        self.sums = {kind: [0.0, 0.0, 0] for kind in KINDS}

    def add(self, name: str, error: float, energy: float) -> None:
        path = name.partition(".")[2]
        row = self.sums["norm" if "modulation" in name else next(kind for kind in KINDS if kind in path)]
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
        for name, tensor in folder_tensors(source):
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


def block_settings(args: argparse.Namespace) -> Settings:
    """The flags of block-wise training."""
    compile = args.device.type == "cuda" if args.block_compile is None else args.block_compile
    return Settings(
        w_bits=args.w_bits, start=args.block_start, steps=args.block_steps, batch_size=args.block_batch_size,
        micro_batch_size=args.block_micro_batch_size,
        learning_rate=args.block_learning_rate or default_rate(args.width, "weights"),
        lookahead=args.lookahead, loss_power=args.block_loss_power, local_loss=args.block_local_loss,
        weigh_channels=args.block_weigh_channels,
        freeze_codes=args.block_freeze_codes, checkpointing=args.block_checkpointing, compile=compile, seed=args.seed,
    )  # fmt: skip


def recorded_steps(args: argparse.Namespace) -> Callable[[int], Sequence[int]]:
    """Of the number of a batch of prompts, the denoising steps in which the teacher is recorded."""
    stride = args.calibration_stride
    if args.method == "blockwise":
        return partial(used_steps, steps=args.steps, early_share=args.block_early_share, stride=stride)
    return lambda batch: range(0, args.steps, stride)


def hidden_bytes(tokens: int, transformer: nn.Module) -> int:
    """Of the hidden states that block-wise training keeps: both streams, and the targets."""
    return 3 * tokens * transformer.inner_dim * transformer.dtype.itemsize


def work_bytes(pipe: DiffusionPipeline, packed: int, args: argparse.Namespace) -> int:
    """Bytes that work_folder(args) takes at most, less what is there already; `packed`: those of a packed transformer.

    Finished blocks of every round, the text of each prompt, the latents of each call, and with --activations_on_disk
    the hidden states. Where the number of steps differs from batch to batch the largest counts.
    """
    family, config, dtype = family_of(pipe), pipe.transformer.config, pipe.transformer.dtype
    steps = max(len(recorded_steps(args)(batch)) for batch in range(args.steps))
    steps *= family.calls_a_step(pipe, args.guidance_scale)
    side, text = args.resolution // (2 * pipe.vae_scale_factor), family.text_length(pipe)
    shapes = family.describe(pipe, config, args.guidance_scale)
    once = sum(math.prod(shape) for name, shape in shapes.items() if name.endswith("_shape")) * dtype.itemsize
    once += family.image_ids(side, dtype).nbytes + family.text_ids(text, dtype).nbytes
    each = (side**2 * config.in_channels + 4) * dtype.itemsize  # with time and guidance
    calls = args.calibration_prompts * (once + steps * each)
    tokens = args.calibration_prompts * steps * (side**2 + text)
    hidden = hidden_bytes(tokens, pipe.transformer) if args.method == "blockwise" and args.activations_on_disk else 0
    rounds = args.block_rounds if args.method == "blockwise" else 1
    there = sum(file.stat().st_size for file in work_folder(args).rglob("*.safetensors"))
    return max(0, rounds * packed + calls - there) + hidden


def work_folder(args: argparse.Namespace) -> Path:
    """Recorded calls and finished blocks: in the output folder, which may be the only place to write to."""
    return args.output_path / f"{PREFIX}work"


def remove_work(args: argparse.Namespace) -> None:
    """Nothing goes on from them once the pipeline is written."""
    if work_folder(args).exists():
        with scratch_folder(args.output_path) as doomed:  # what a kill leaves of it is tidied
            work_folder(args).rename(doomed / "work")


def along_calls(pipe: DiffusionPipeline, target: Path, args: argparse.Namespace, errors: Errors) -> None:
    """Record the teacher on the calibration prompts, quantize block after block, write the packed transformer.

    Recorded calls and finished blocks lie in work_folder(args): the same command goes on from there.
    """
    prompts, source = pick_prompts(pipe, args.calibration_prompts, split="train")
    log.info("calibration: %d prompts, every %d. step: %s", len(prompts), args.calibration_stride, source)
    unplace(pipe)
    empty_cache(args.device)
    limit = args.memory_gib and (args.memory_gib - CONTEXT_GIB) * 2**30
    if limit and args.device.type == "cuda":
        total = torch.cuda.get_device_properties(args.device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total), args.device.index)
    transformer = pipe.transformer
    args.width = transformer.inner_dim
    names = ("method", "w_bits", "steps", "calibration_stride", "guidance_scale", "resolution")
    settings = {name: getattr(args, name) for name in names} | {"dtype": str(transformer.dtype), "prompts": prompts}
    if args.method == "calibrated":
        settings["without"] = args.without
    else:
        settings |= asdict(block_settings(args)) | {"early_share": args.block_early_share}
        settings = {name: value for name, value in settings.items() if name not in HOW}
    settings["weights"] = fingerprint(transformer)
    work = Work(work_folder(args), settings)
    calls = work.calls()
    if calls is None:
        args.doing = CALLS
        calls = record_calls(
            pipe, prompts, recorded_steps(args), seed=CALIBRATION_SEED, size=args.resolution,
            num_inference_steps=args.steps, guidance_scale=args.guidance_scale, batch_size=args.batch_size,
            device=args.device, limit=limit,
        )  # fmt: skip
        work.keep_calls(calls)
    calls = split_calls(calls, CALL_TOKENS)
    weights = [call.pop("weight") for call in calls]
    skeleton = packed_skeleton(dict(transformer.config), args.w_bits)
    pipe.transformer = None
    args.doing = BLOCKS
    if args.method == "calibrated":
        calibrate(transformer, calls, weights, args.w_bits, work, args.device, without=args.without)
    else:
        transformer, work = blockwise(transformer, calls, work, settings, args)
    for block in stage_names(transformer):
        notes = work.notes(block)
        errors.fell_back |= notes.get("fell_back", {})
        if args.method == "blockwise":
            errors.blocks[block] = {name: notes[name] for name in ("error", "seconds")}
        for name, (error, energy) in notes["layers"].items():
            errors.add(name, error, energy)
    writer = PackedWriter(target)
    for name, tensor in stored_tensors(transformer, work):
        writer.add(name, tensor)
    skeleton.save_config(target)
    writer.close(dict(skeleton.config))


def blockwise(
    transformer: nn.Module, calls: list[dict], work: Work, settings: dict, args: argparse.Namespace
) -> tuple[nn.Module, Work]:
    """Train the blocks along the calls, round after round; the used-up transformer and the last round's work."""
    disk, before, weights = work_folder(args) if args.activations_on_disk else None, None, None
    tokens = sum(call[name].shape[:-1].numel() for call in calls for name in ("hidden_states", "encoder_hidden_states"))
    size = hidden_bytes(tokens, transformer)
    samples = sum(len(call["hidden_states"]) for call in calls)
    log.info("%d samples, whose hidden states take %.1f GB of %s", samples, size / 1e9, "disk" if disk else "memory")
    if args.block_weigh_channels:
        weights = channel_weights(transformer, calls[:: max(1, len(calls) // WEIGHED)][:WEIGHED], args.device)
    for number in range(args.block_rounds):
        if number:
            work = Work(work_folder(args) / f"round_{number}", settings)
            source = local_pipeline(args.model_id) / "transformer"
            transformer = load_transformer(source, dtype=transformer.dtype)
        more = {"settings": block_settings(args), "before": before, "weights": weights}
        treat = partial(train_block, transformer=transformer, **more)
        walk(transformer, calls, args.w_bits, treat, work, args.device, disk)
        before = work
    return transformer, work


def copy_rest(source: Path, target: Path) -> None:
    """Everything of a pipeline but its transformer, and a model_index.json that names ours."""
    for path in sorted(source.iterdir()):
        if path.is_dir() and path.name != "transformer" and (any(path.glob("*.json")) or any(path.glob("*.txt"))):
            shutil.copytree(path, target / path.name, ignore=shutil.ignore_patterns("*.bin", ".*"))
    index = json.loads((source / "model_index.json").read_text())
    kind = transformer_class(index["transformer"][1])
    index["transformer"] = [kind.__module__, kind.__name__]
    (target / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


def folder_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def peak_device(device: torch.device) -> int:
    """The most bytes of a GPU's memory that tensors of this process have taken so far."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


def less_memory(args: argparse.Namespace) -> str:
    """Which flag to change where memory does not suffice for what is being done."""
    if args.doing == BLOCKS and args.method == "blockwise":
        return "go on with a lower --block_micro_batch_size, or --block_checkpointing"
    if args.doing in (CALLS, BLOCKS):
        less = "a smaller --batch_size" if args.doing == CALLS and args.batch_size > 1 else "a smaller --resolution"
        less = "a higher --memory_gib" if args.memory_gib else less
        return f"try {less}, or --method mse, which looks at the weights alone"
    if args.doing == LOADING:
        return "try --method mse --num_images 0, which takes one tensor at a time"
    if args.doing == WEIGHTS:
        return "try --device cpu"
    return draw_in_less(args.offload, args.device, "--batch_size" if args.batch_size != 1 else "--resolution")


def draw(pipe: DiffusionPipeline, prompts: list[str], args: argparse.Namespace, desc: str) -> Tensor:
    args.doing = f"pictures are drawn ({desc})"
    place(pipe, args.device, args.offload)
    return generate_images(
        pipe, prompts, args.seed, num_inference_steps=args.steps, guidance_scale=args.guidance_scale,
        size=args.resolution, batch_size=args.batch_size, desc=desc,
    )  # fmt: skip


def add_block_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of --method blockwise."""
    many, few = MANY_BLOCKWISE, FEW_BLOCKWISE

    def both(name: str) -> str:
        return f"default: {many[name]}, above {MANY_PIXELS} pixels or a billion parameters {few[name]}"

    group = parser.add_argument_group("with --method blockwise")
    group.add_argument("--block_start", choices=STARTS, default="calibrated",
                       help="codes, step sizes and biases to train from; calibrated ones are the better start by far, "
                       "mse is quicker")  # fmt: skip
    group.add_argument("--block_steps", type=int, help=f"for each block: the more the better; {both('block_steps')}")
    group.add_argument("--block_batch_size", type=int, help=f"samples of a step; {both('block_batch_size')}")
    group.add_argument("--block_micro_batch_size", type=int,
                       help="samples on the device at a time; less if its memory runs out; "
                       f"{both('block_micro_batch_size')}")  # fmt: skip
    group.add_argument("--block_learning_rate", type=float,
                       help="of AdamW; default: by the transformer's width, as train.py's --learning_rate")  # fmt: skip
    group.add_argument("--lookahead", type=int, metavar="K",
                       help="full-precision blocks after the one in training, whose outputs count: as many as there is "
                       f"time and memory for on the device; {both('lookahead')}")  # fmt: skip
    group.add_argument("--block_rounds", type=int, default=1,
                       help="how often to go through all blocks: from the second round on each also makes up for those "
                       "after it")  # fmt: skip
    group.add_argument("--activations_on_disk", action="store_true",
                       help="keep the samples' hidden states in OUTPUT_DIR, if host memory is short")  # fmt: skip
    group.add_argument("--block_loss_power", type=float, default=0.5,
                       help="a sample's error counts to this power: below 1 hard samples count less")  # fmt: skip
    group.add_argument("--block_local_loss", type=float, default=0.0,
                       help="weight of the block's own outputs beside those after K blocks")  # fmt: skip
    group.add_argument("--block_weigh_channels", action=argparse.BooleanOptionalAction, default=False,
                       help="where K blocks do not reach the velocity, weigh each channel by what its error does to "
                       "that")  # fmt: skip
    group.add_argument("--block_freeze_codes", type=float, default=0.1,
                       help="for this last part of the steps the codes stay and the rest is trained")  # fmt: skip
    group.add_argument("--block_early_share", type=float,
                       help="share of the samples from the first quarter of the denoising steps; default: "
                       f"{EARLY_SHARE}, of fewer than {FEW_STEPS} steps 0.25: all alike")  # fmt: skip
    group.add_argument("--block_checkpointing", action=argparse.BooleanOptionalAction,
                       help="compute the activations of the blocks ahead twice instead of keeping them; default: "
                       f"above {MANY_PIXELS} pixels")  # fmt: skip
    group.add_argument("--block_compile", action=argparse.BooleanOptionalAction,
                       help="compile the blocks; default: on CUDA. It takes a minute or so")  # fmt: skip


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", "--model_id", dest="model_id", default="assets/tiny-flux",
                        help="the FLUX pipeline: a folder or a hub id")  # fmt: skip
    parser.add_argument("--output_dir", "--output_path", dest="output_path", type=Path, default=Path("output/oneshot"),
                        help="must not hold anything yet")  # fmt: skip
    parser.add_argument("--method", choices=(*METHODS, "blockwise"), default="calibrated")
    parser.add_argument("--w_bits", type=int, default=0, help="0 (1.58 bit, ternary), 1 to 8")
    parser.add_argument("--threshold_ratio", type=float, default=0.05, help="with --method threshold")
    parser.add_argument("--calibration_prompts", type=int,
                        help=f"training prompts to calibrate on; default: {MANY_PROMPTS}, above {MANY_PIXELS} pixels "
                        f"{FEW_PROMPTS}; blockwise {MANY_BLOCKWISE['calibration_prompts']}, "
                        f"{FEW_BLOCKWISE['calibration_prompts']}")  # fmt: skip
    parser.add_argument("--calibration_stride", type=int,
                        help=f"of the steps, every so many-th is used; default: such that {USED_STEPS} are; "
                        f"blockwise up to {MANY_PIXELS} pixels {MANY_BLOCKWISE['calibration_stride']}")  # fmt: skip
    parser.add_argument("--memory_gib", type=float, help="device memory to stay within; default: all that is free")
    parser.add_argument("--without", nargs="+", choices=INGREDIENTS, default=[], metavar="INGREDIENT",
                        help=f"leave out of the calibration: {', '.join(INGREDIENTS)}")  # fmt: skip
    add_block_flags(parser)
    parser.add_argument("--num_images", type=int, default=4, help="sample pairs to draw; 0: none")
    parser.add_argument("--prompts", help="a text file, one prompt a line, or a JSON list of prompts; default: the "
                        "model's evaluation set")  # fmt: skip
    parser.add_argument("--prompts_json", help="the same, a JSON list only")
    parser.add_argument("--num_inference_steps", "--steps", dest="steps", type=int,
                        help=f"denoising steps; {DEFAULTS[0]}")  # fmt: skip
    parser.add_argument("--guidance_scale", type=float, help=DEFAULTS[1])
    parser.add_argument("--resolution", type=int, help="pixels a side; default: what the autoencoder was made for")
    parser.add_argument("--batch_size", type=int, help="pictures drawn at a time; default: 8; blockwise up to "
                        f"{MANY_PIXELS} pixels {MANY_BLOCKWISE['batch_size']}")  # fmt: skip
    parser.add_argument("--offload", nargs="?", const="model", choices=OFFLOADS, help="to draw, keep on the device "
                        "only the component that computes; sequential: what does not fit streams layer by "
                        "layer")  # fmt: skip
    parser.add_argument("--mode", choices=MODES, default="exact", help="to draw in; fast: 8-bit activations")
    parser.add_argument("--attention", metavar="NAME", help="of the quantized model: fp8, in fast mode on an H100 "
                        "(pip install fa3-fwd), or one of diffusers' backends; default: torch's own")  # fmt: skip
    parser.add_argument("--dtype", choices=DTYPES, help="default: bfloat16 on CUDA, else float32")
    parser.add_argument("--device", help="default: cuda if there, else mps, else cpu")
    parser.add_argument("--seed", type=int, default=42, help="picture i starts from the noise of seed + i")
    args = parser.parse_args(argv)
    try:
        args.device = pick_device(args.device)
        if args.attention:
            set_attention(args.attention, modes=[args.mode])
        check_offload(args.offload, args.device)
        if check_bits(args.w_bits) >= 16:
            raise ValueError(f"--w_bits {args.w_bits}: nothing to quantize; use 0 to 8")
        if args.method == "threshold" and args.w_bits:
            raise ValueError(f"--method threshold is a ternary rule: --w_bits must be 0, got {args.w_bits}")
        if not 0 <= args.threshold_ratio < 1:
            raise ValueError(f"--threshold_ratio must be at least 0 and below 1, got {args.threshold_ratio}")
        check_counts(args, "calibration_prompts", "calibration_stride", "steps", "batch_size")
        check_counts(args, "num_images", least=0)
        check_resolution(args.resolution)
        check_guidance(args.guidance_scale)
        check_seed(args.seed)
        if args.prompts and args.prompts_json:
            raise ValueError("--prompts and --prompts_json: give one of them")
        for name in ("block_steps", "block_batch_size", "block_micro_batch_size", "block_rounds"):
            if getattr(args, name) is not None and getattr(args, name) < 1:
                raise ValueError(f"--{name} must be at least 1, got {getattr(args, name)}")
        for name in ("block_local_loss", "lookahead"):
            if getattr(args, name) is not None and getattr(args, name) < 0:
                raise ValueError(f"--{name} must not be negative, got {getattr(args, name)}")
        for name in ("block_learning_rate", "block_loss_power"):
            if getattr(args, name) is not None and getattr(args, name) <= 0:
                raise ValueError(f"--{name} must be above 0, got {getattr(args, name)}")
        if not 0 <= args.block_freeze_codes <= 1:
            raise ValueError(f"--block_freeze_codes must be 0 to 1, got {args.block_freeze_codes}")
        if args.block_early_share is not None and not 0 < args.block_early_share < 1:
            raise ValueError(f"--block_early_share must be above 0 and below 1, got {args.block_early_share}")
        if args.memory_gib is not None and args.memory_gib <= CONTEXT_GIB:
            raise ValueError(
                f"--memory_gib must be above {CONTEXT_GIB}, which CUDA itself takes; got {args.memory_gib:g}"
            )
    except ValueError as error:
        parser.error(str(error))
    args.model_id = from_root(args.model_id)
    return args


def choose_sizes(args: argparse.Namespace, pipe: DiffusionPipeline) -> None:
    """What depends on the pipeline, the method and the picture size and was not given."""
    args.resolution = args.resolution or native_size(pipe)
    args.steps, args.guidance_scale = sampling_settings(pipe, args.steps, args.guidance_scale)
    if args.block_early_share is None:
        args.block_early_share = early_share(args.steps)
    big, stride = args.resolution > MANY_PIXELS, max(1, round(args.steps / USED_STEPS))
    few = big or is_packed(pipe.transformer, None)  # the hidden states of many would be hundreds of GB
    sizes = FEW_BLOCKWISE | {"calibration_stride": stride} if few else dict(MANY_BLOCKWISE)
    if args.method != "blockwise":
        prompts = FEW_PROMPTS if big else MANY_PROMPTS
        sizes |= {"calibration_prompts": prompts, "calibration_stride": stride, "batch_size": 8}
    for name, value in sizes.items():
        if getattr(args, name) is None:
            setattr(args, name, value)


def lasting_name(model: str) -> str:
    """By which test.py finds the teacher again from another folder: a path from the root, assets/… of the repository,
    a hub id."""
    folder = Path(model).resolve()
    if not folder.is_dir():
        return model
    return str(folder.relative_to(ROOT) if folder.is_relative_to(ROOT / "assets") else folder)


def main() -> None:
    args = parse_args()
    args.doing = LOADING
    with locked(args.output_path), memory_named(lambda: args.doing, lambda: less_memory(args), args.device):
        quantize(args)


def quantize(args: argparse.Namespace) -> None:
    """Write the quantized pipeline, and pictures of it beside its teacher's."""
    started = time.time()
    if not is_empty(args.output_path):
        raise ValueError(f"--output_dir {args.output_path}: exists and is not empty; choose another")
    source = local_pipeline(args.model_id)
    rest = sum(f.stat().st_size for f in source.rglob("*.safetensors") if f.parent.name != "transformer")
    packed = packed_bytes(source / "transformer", args.w_bits)
    needs = [(args.output_path, rest + packed, "the quantized pipeline")]
    check_disks(needs)
    dtype = getattr(torch, args.dtype or ("bfloat16" if args.device.type == "cuda" else "float32"))
    name = bits_name(args.w_bits)

    pipe, teacher_images, prompts, errors = None, None, [], Errors()
    with whole_folder(args.output_path, "run.py") as folder:
        if args.method in WITH_CALLS or args.num_images:
            pipe = load_pipeline(str(source), dtype)
            choose_sizes(args, pipe)
        if args.method in WITH_CALLS:
            kept = work_bytes(pipe, packed, args)
            check_disks([*needs, (args.output_path, kept, "what a killed run goes on from")])
        if args.num_images:
            file, flag = args.prompts_json or args.prompts, "--prompts_json" if args.prompts_json else "--prompts"
            prompts, _ = pick_prompts(pipe, args.num_images, file, flag=flag)
            teacher_images = draw(pipe, prompts, args, "teacher")
        quantizing = time.time()
        if args.method in WITH_CALLS:
            along_calls(pipe, folder / "transformer", args, errors)
        else:
            if pipe is not None:
                drop_transformer(pipe)
            args.doing = WEIGHTS
            stream(source / "transformer", folder / "transformer", args, errors)
        quantizing = time.time() - quantizing
        copy_rest(source, folder)
        metrics = {
            "model": lasting_name(args.model_id), "method": args.method, "w_bits": args.w_bits, "without": args.without,
            "mode": args.mode, "attention": args.attention,
            "bytes_before": folder_bytes(source / "transformer"),
            "bytes_after": folder_bytes(folder / "transformer"),
            "layers": errors.table(), "seconds": round(quantizing, 1),
            "gb_per_second": round(folder_bytes(source / "transformer") / quantizing / 1e9, 3),
            "peak_rss_bytes": peak_rss(), "peak_device_bytes": peak_device(args.device), "fell_back": errors.fell_back,
            "device": device_name(args.device), "torch": torch.__version__,
            "diffusers": diffusers.__version__,
            "blockwise": asdict(block_settings(args)) if args.method == "blockwise" else None, "blocks": errors.blocks,
        }  # fmt: skip
        if args.num_images:
            student = load_transformer(folder / "transformer", dtype=dtype)
            pipe.register_modules(transformer=student.set_inference_mode(args.mode))
            if args.attention:
                set_attention(args.attention, student)
            images = draw(pipe, prompts, args, name)
            save_images(teacher_images, folder / "samples" / "full")
            save_images(images, folder / "samples" / f"bits_{args.w_bits}")
            save_grid({"full": teacher_images, name: images}, prompts, folder / "samples" / "grid.png")
        write_json(folder / "metrics.json", metrics)
    remove_work(args)

    print(f"\n{'layers':<10}{'number':>8}{'weight error':>14}")
    for kind, row in metrics["layers"].items():
        print(f"{kind:<10}{row['layers']:>8}{row['weight_error']:>14.4f}")
    if args.method in WITH_CALLS:
        print(f"{args.method} keeps what the layers put out, not their weights: an error twice that of mse is usual.")
    for layer, why in errors.fell_back.items():
        print(f"{layer}: not calibrated but rounded by mse: {why}")
    before, after = metrics["bytes_before"], metrics["bytes_after"]
    print(f"transformer: {before / 1e6:,.1f} MB -> {after / 1e6:,.1f} MB ({before / after:.1f}x)")
    speed, peak = metrics["gb_per_second"], metrics["peak_rss_bytes"] / 1e9
    print(f"quantized in {metrics['seconds']:.0f} s ({speed:.3f} GB/s, {peak:.1f} GB of memory at most), ", end="")
    print(f"{time.time() - started:.0f} s in all\n")
    log.info("pipeline: %s", args.output_path)


if __name__ == "__main__":
    run_script(main, "recorded calls and finished blocks are kept; the same command goes on")
