"""Does the pipeline still draw? The same prompts and seeds at full precision and at lower bit widths, untrained.

    python sanity.py --w_bits 8 4 2 0                                            # the embedded tiny-flux
    python sanity.py --input_model_filename black-forest-labs/FLUX.1-dev --bf16 True --w_bits 4 0
    python sanity.py --prompts my_prompts.txt --num_images 4 --num_inference_steps 8

Every linear inside the transformer's blocks is quantized with error-minimal step sizes and nothing is trained, so
this is where quantization-aware training starts from; `--trained FOLDER` adds what training made of it, as the last
row. It writes

    OUTPUT_DIR/samples/{full,bits_W,trained}/sample_000.png …    the pictures
    OUTPUT_DIR/samples/grid.png                                  all of them, rows = bit widths, columns = prompts
    OUTPUT_DIR/samples/metrics.json                              the table that it prints
    OUTPUT_DIR/cache/bits_W/                                     each quantized transformer, for from_pretrained
                                                                 (--pack True: as small as its bits)
"""

import json
from pathlib import Path

import torch
from torch import Tensor, nn

from models.modeling_flux_quant import FluxTransformer2DModel, QuantizeLinear
from models.packing import PackedLinear, disk_row_bytes
from models.utils_quant import FULL_PRECISION_BITS
from utils import scenes
from utils.checkpoints import (
    bits_name,
    check_quantized,
    check_shapes,
    load_quantized_model,
    load_student,
    transformer_folder,
)
from utils.folders import check_disk, whole_folder
from utils.metrics import nmse, psnr, scene_score
from utils.pictures import save_grid, save_images
from utils.process_args import process_args
from utils.prompts import pick_prompts
from utils.sampling import drop_transformer, generate_images, load_pipeline, native_size, place, record_velocities
from utils.utils import get_logger, pick_device, pick_dtype, run_script

log = get_logger("sanity")
NMSE_STRIDE = 4  # the velocity error is measured at every fourth step of the teacher's trajectories


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


@torch.no_grad()
def velocity_error(transformer: nn.Module, teacher_calls: list[tuple[dict, Tensor]]) -> float:
    """NMSE of the velocity at the teacher's own states (see record_velocities)."""
    calls = teacher_calls[::NMSE_STRIDE]
    predictions = [transformer(**inputs)[0].float().cpu() for inputs, _ in calls]
    return nmse(torch.stack(predictions), torch.stack([velocity.float().cpu() for _, velocity in calls]))


def print_table(rows: list[dict], with_scores: bool) -> None:
    """The result of each bit width as a line of text."""
    print(f"\n{'transformer':<18}{'velocity NMSE':>14}{'PSNR dB':>9}{'scene score':>13}{'packed MB':>11}")
    for row in rows:
        teacher = row["w_bits"] == 16 and "nmse" not in row
        error = "-" if teacher else f"{row['nmse']:.5f}"
        ratio = "-" if teacher else f"{row['psnr']:.1f}"
        score = f"{row['scene_score']['mean']:.2f}" if with_scores else "-"
        print(f"{row['name']:<18}{error:>14}{ratio:>9}{score:>13}{row['packed_bytes'] / 1e6:>11,.1f}")
    print("NMSE, PSNR: against full precision, same prompts and seeds. packed: codes as stored (1.58 bit: five a")
    print("byte), fp32 step sizes, 16 bits for the rest.")
    if not with_scores:
        print("No scene score: it is defined for the drawn scenes of utils/scenes.py at 128 pixels.")


def main() -> None:
    model_args, data_args, training_args = process_args()
    device = pick_device(model_args.device)
    dtype = pick_dtype(training_args, device)
    samples, cache = Path(training_args.output_dir) / "samples", Path(training_args.output_dir) / "cache"

    pipe = load_pipeline(model_args.input_model_filename, dtype)
    prompts, source = pick_prompts(pipe, data_args.num_images, data_args.prompts)
    size = data_args.resolution or native_size(pipe)
    with_scores = size == scenes.SIZE and all(scenes.parse(prompt) for prompt in prompts)
    total, *_ = count_parameters(pipe.transformer)
    log.info(
        "%s: transformer with %s parameters, %s on %s", model_args.input_model_filename, f"{total:,}", dtype, device
    )
    log.info("%d prompts: %s; %d pixels, seed %d", len(prompts), source, size, training_args.seed)

    if model_args.trained is not None:
        trained = transformer_folder(Path(model_args.trained))
        config, model = check_quantized(trained), model_args.input_model_filename
        check_shapes(trained, config, model, pipe.transformer, "--input_model_filename")
    samples.mkdir(parents=True, exist_ok=True)  # here, and not after the first pictures, a bad folder shows

    def sample(name: str, folder: str) -> Tensor:
        images = generate_images(
            pipe,
            prompts,
            training_args.seed,
            num_inference_steps=data_args.num_inference_steps,
            guidance_scale=data_args.guidance_scale,
            size=size,
            desc=name,
        )
        save_images(images, samples / folder)
        return images

    place(pipe, device, model_args.offload)
    with record_velocities(pipe.transformer) as teacher_calls:
        teacher_images = sample("full", "full")
    grid = {"full": teacher_images}
    rows = [{"name": "full", "w_bits": 16, "packed_bytes": packed_bytes(pipe.transformer)}]
    if with_scores:
        rows[0]["scene_score"] = scene_score(teacher_images, prompts)

    def measure(name: str, folder: str, w_bits: int, transformer: FluxTransformer2DModel) -> None:
        pipe.register_modules(transformer=transformer)
        place(pipe, device, model_args.offload)
        images = sample(name, folder)
        row = {
            "name": name,
            "w_bits": w_bits,
            "nmse": velocity_error(transformer, teacher_calls),
            "psnr": psnr(images, teacher_images),
            "packed_bytes": packed_bytes(transformer),
        }
        if with_scores:
            row["scene_score"] = scene_score(images, prompts)
        grid[name] = images
        rows.append(row)

    for w_bits in model_args.w_bits:
        drop_transformer(pipe)
        transformer = load_quantized_model(model_args, training_args, w_bits=w_bits)
        total, quantized, _ = count_parameters(transformer)
        name = bits_name(w_bits)
        log.info(
            "%s: %s of %s parameters quantized (%.1f %%)", name, f"{quantized:,}", f"{total:,}", 100 * quantized / total
        )
        measure(name, f"bits_{w_bits}", w_bits, transformer)

        if model_args.pack and w_bits < FULL_PRECISION_BITS:
            transformer.pack()
        folder = cache / f"bits_{w_bits}"
        check_disk(folder, sum(p.numel() * p.element_size() for p in transformer.parameters()), "the transformer")
        with whole_folder(folder) as partial:
            transformer.save_pretrained(partial)
        del transformer

    if model_args.trained is not None:
        drop_transformer(pipe)
        transformer = load_student(trained, dtype)
        w_bits = transformer.config.w_bits
        measure(f"{bits_name(w_bits)}, trained", "trained", w_bits, transformer)

    save_grid(grid, prompts, samples / "grid.png")
    (samples / "metrics.json").write_text(json.dumps({"prompts": prompts, "rows": rows}, indent=2) + "\n")
    print_table(rows, with_scores)
    log.info("pictures: %s; quantized transformers: %s", samples / "grid.png", cache)


if __name__ == "__main__":
    run_script(main)
