"""Does the pipeline still draw? The same prompts and seeds at full precision and at lower bit widths, untrained.

    python sanity.py --w_bits 8 4 2 0                                            # the embedded tiny-flux
    python sanity.py --model black-forest-labs/FLUX.1-dev --dtype bfloat16 --w_bits 4 0
    python sanity.py --model black-forest-labs/FLUX.2-klein-4B --dtype bfloat16 --w_bits 4 0
    python sanity.py --prompts my_prompts.txt --num_images 4 --num_inference_steps 8

Every linear inside the transformer's blocks, and their modulation, is quantized with error-minimal step sizes and
nothing is trained, so this is where quantization-aware training starts from; `--trained FOLDER` adds what training made
of it, as the last row. The pictures and the table come together at the end, in the place of an earlier run's. It writes

    OUTPUT_DIR/samples/{full,bits_W,trained}/sample_000.png …    the pictures
    OUTPUT_DIR/samples/grid.png                                  all of them, rows = bit widths, columns = prompts
    OUTPUT_DIR/samples/metrics.json                              the table that it prints
    OUTPUT_DIR/cache/bits_W/                                     each quantized transformer, for from_pretrained
                                                                 (as small as its bits from a billion
                                                                 parameters on, or with --pack True)
"""

import utils.interrupt  # noqa: F401 (Ctrl-C is a line from here on)

import math
from pathlib import Path

import torch
from torch import Tensor, nn

from models.families import transformer_class
from models.packing import PackedLinear, disk_row_bytes
from models.quantized_model import QuantizedTransformer
from models.utils_quant import FULL_PRECISION_BITS, QuantizeLinear
from utils import scenes
from utils.checkpoints import (
    bits_name,
    check_quantized,
    check_shapes,
    is_packed,
    load_quantized_model,
    load_student,
    transformer_folder,
)
from utils.folders import check_disks, check_target, locked, whole_folder, write_json
from utils.metrics import psnr, scene_score, velocity_nmse
from utils.pictures import save_grid, save_images
from utils.pipelines import family_of, sampling_settings
from utils.process_args import process_args
from utils.prompts import pick_prompts
from utils.sampling import (
    draw_in_less,
    drop_transformer,
    generate_images,
    load_pipeline,
    native_size,
    place,
    record_velocities,
)
from utils.utils import from_root, get_logger, memory_named, pick_device, pick_dtype, run_script

log = get_logger("sanity")
OWNER = "sanity.py"
USED = (
    "input_model_filename", "w_bits", "prompts", "num_images", "num_inference_steps", "guidance_scale", "resolution",
    "seed", "output_dir", "trained", "pack", "clip_init", "quantize_modulation", "lora_r", "lora_alpha", "device",
    "offload", "dtype", "bf16", "fp16",
)  # fmt: skip


def quantized_layers(transformer: nn.Module) -> list[QuantizeLinear | PackedLinear]:
    """Its layers that hold quantized weights or their codes."""
    return [module for module in transformer.modules() if isinstance(module, (QuantizeLinear, PackedLinear))]


def count_parameters(transformer: nn.Module) -> tuple[int, int, int]:
    """All parameters but step sizes; how many of them are quantized weights; step sizes."""
    layers = quantized_layers(transformer)
    quantized = sum(layer.in_features * layer.out_features for layer in layers)
    step_sizes = sum(layer.weight_clip_val.numel() for layer in layers)
    names = ["weight_codes" if isinstance(layer, PackedLinear) else "weight" for layer in layers]
    stored = sum(layer.get_parameter(name).numel() for layer, name in zip(layers, names, strict=True))
    return sum(p.numel() for p in transformer.parameters()) - stored - step_sizes + quantized, quantized, step_sizes


def packed_bytes(transformer: nn.Module) -> int:
    """Bytes of the tensors of a packed checkpoint: codes, fp32 step sizes, and the rest in 16 bits."""
    total, quantized, step_sizes = count_parameters(transformer)
    layers = quantized_layers(transformer)
    codes = sum(disk_row_bytes(layer.in_features, layer.w_bits) * layer.out_features for layer in layers)
    return codes + 4 * step_sizes + 2 * (total - quantized)


def saved_bytes(transformer: nn.Module, model_args, w_bits: int, dtype: torch.dtype) -> int:
    """Bytes of the full-precision `transformer` once it is quantized to `w_bits` and saved."""
    total = dtype.itemsize * sum(p.numel() for p in transformer.parameters())
    if w_bits >= FULL_PRECISION_BITS:
        return total
    linears = transformer_class(transformer).family.linears(transformer, model_args.quantize_modulation)
    matrices = [linear.weight.shape for linear in linears.values()]
    total += sum(4 * (rows + model_args.lora_r * (rows + columns)) for rows, columns in matrices)
    if is_packed(transformer, model_args.pack):
        total += sum(rows * (disk_row_bytes(columns, w_bits) - dtype.itemsize * columns) for rows, columns in matrices)
    return total


def print_table(rows: list[dict], with_scores: bool) -> None:
    """The result of each bit width as a line of text."""
    print(f"\n{'transformer':<18}{'velocity NMSE':>14}{'PSNR dB':>9}{'scene score':>13}{'packed MB':>11}")
    for row in rows:
        teacher = row["w_bits"] == 16 and "nmse" not in row
        error = "-" if teacher else f"{row['nmse']:.5f}"
        ratio = "-" if teacher else f"{row['psnr']:.1f}"
        score = f"{row['scene_score']['mean']:.2f}" if with_scores else "-"
        print(f"{row['name']:<18}{error:>14}{ratio:>9}{score:>13}{row['packed_bytes'] / 1e6:>11,.1f}")
    print("NMSE (over all denoising steps), PSNR: against full precision, same prompts and seeds.")
    print("packed: codes as stored (1.58 bit: five a byte), fp32 step sizes, 16 bits for the rest.")
    if not with_scores:
        print("No scene score: it is defined for the drawn scenes of utils/scenes.py at 128 pixels.")


def main() -> None:
    model_args, data_args, training_args = process_args(description=__doc__, used=USED)
    device = pick_device(model_args.device)
    less = draw_in_less(model_args.offload, device, "--resolution")
    model_args.doing = "the models are loaded"
    with locked(Path(training_args.output_dir)), memory_named(lambda: model_args.doing, less, device):
        compare(model_args, data_args, training_args)


def compare(model_args, data_args, training_args) -> None:
    """Draw with the full-precision transformer and with each quantized one, and write down what differs."""
    device = pick_device(model_args.device)
    dtype = pick_dtype(training_args, device)
    samples, cache = Path(training_args.output_dir) / "samples", Path(training_args.output_dir) / "cache"
    for folder in (samples, *(cache / f"bits_{w_bits}" for w_bits in model_args.w_bits)):
        check_target(folder, OWNER)

    pipe = load_pipeline(model_args.input_model_filename, dtype)
    steps, guidance = sampling_settings(pipe, data_args.num_inference_steps, data_args.guidance_scale)
    prompts, source = pick_prompts(pipe, data_args.num_images, data_args.prompts)
    size = data_args.resolution or native_size(pipe)
    with_scores = size == scenes.SIZE and all(scenes.parse(prompt) for prompt in prompts)
    total, *_ = count_parameters(pipe.transformer)
    log.info(
        "%s: transformer with %s parameters, %s on %s", model_args.input_model_filename, f"{total:,}", dtype, device
    )
    log.info("%d prompts: %s; %d pixels, seed %d", len(prompts), source, size, training_args.seed)

    if model_args.trained is not None:
        trained = transformer_folder(Path(from_root(model_args.trained)))
        config, model = check_quantized(trained), model_args.input_model_filename
        check_shapes(trained, config, model, pipe.transformer, "--input_model_filename")
    check_disks(
        [
            (
                cache / f"bits_{w_bits}",
                saved_bytes(pipe.transformer, model_args, w_bits, dtype),
                f"the transformer at {bits_name(w_bits)}",
            )
            for w_bits in model_args.w_bits
        ]
    )

    def sample(name: str) -> Tensor:
        model_args.doing = f"pictures are drawn ({name})"
        return generate_images(
            pipe,
            prompts,
            training_args.seed,
            num_inference_steps=steps,
            guidance_scale=guidance,
            size=size,
            desc=name,
        )

    place(pipe, device, model_args.offload)
    with record_velocities(pipe.transformer) as teacher_calls:
        teacher_images = sample("full")
    grid, folders = {"full": teacher_images}, ["full"]
    rows = [{"name": "full", "w_bits": 16, "packed_bytes": packed_bytes(pipe.transformer)}]
    if with_scores:
        rows[0]["scene_score"] = scene_score(teacher_images, prompts)

    def measure(name: str, folder: str, w_bits: int, transformer: QuantizedTransformer) -> None:
        pipe.register_modules(transformer=transformer)
        place(pipe, device, model_args.offload)
        images = sample(name)
        each = family_of(pipe).calls_a_step(pipe, guidance)
        row = {
            "name": name,
            "w_bits": w_bits,
            "nmse": velocity_nmse(transformer, teacher_calls, steps, device, each)[0],
            "psnr": psnr(images, teacher_images),
            "packed_bytes": packed_bytes(transformer),
        }
        if with_scores:
            row["scene_score"] = scene_score(images, prompts)
        grid[name] = images
        folders.append(folder)
        rows.append(row)

    for w_bits in model_args.w_bits:
        drop_transformer(pipe)
        model_args.doing = f"the transformer is quantized ({bits_name(w_bits)})"
        transformer = load_quantized_model(model_args, training_args, w_bits=w_bits)
        total, quantized, _ = count_parameters(transformer)
        name = bits_name(w_bits)
        log.info(
            "%s: %s of %s parameters quantized (%.1f %%)", name, f"{quantized:,}", f"{total:,}", 100 * quantized / total
        )
        if w_bits < FULL_PRECISION_BITS and is_packed(transformer, model_args.pack):
            transformer.pack()  # draws the same, in a fraction of the memory
        measure(name, f"bits_{w_bits}", w_bits, transformer)
        with whole_folder(cache / f"bits_{w_bits}", OWNER) as part:
            transformer.save_pretrained(part)
        del transformer

    if model_args.trained is not None:
        drop_transformer(pipe)
        transformer = load_student(trained, dtype)
        w_bits = transformer.config.w_bits
        measure(f"{bits_name(w_bits)}, trained", "trained", w_bits, transformer)

    with whole_folder(samples, OWNER) as part:
        for folder, images in zip(folders, grid.values(), strict=True):
            save_images(images, part / folder)
        save_grid(grid, prompts, part / "grid.png")
        write_json(part / "metrics.json", {"prompts": prompts, "rows": rows})
    print_table(rows, with_scores)
    if bad := [row["name"] for row in rows if not math.isfinite(row.get("nmse", 0.0))]:
        raise ValueError(f"{', '.join(bad)}: the transformer puts out numbers that are not finite; try another --dtype")
    log.info("pictures: %s; quantized transformers: %s", samples / "grid.png", cache)


if __name__ == "__main__":
    run_script(main)
