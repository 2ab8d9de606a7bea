"""Which transformer lies in a folder, whether it is the one that was asked for, and loading it."""

from collections.abc import Mapping
from pathlib import Path

import torch

from models.families import load_transformer
from models.quantized_model import QuantizedTransformer
from models.utils_quant import FULL_PRECISION_BITS
from utils.folders import read_json, tidy
from utils.process_args import LARGE
from utils.utils import pick_device, pick_dtype

SHAPE = (
    "_class_name", "in_channels", "num_layers", "num_single_layers", "num_attention_heads", "attention_head_dim",
    "joint_attention_dim", "pooled_projection_dim", "mlp_ratio", "guidance_embeds",
)  # fmt: skip


def bits_name(w_bits: int) -> str:
    """A bit width in words."""
    return "1.58 bit" if w_bits == 0 else f"{w_bits} bit"


def transformer_folder(checkpoint: Path) -> Path:
    """The transformer's folder in a checkpoint that is one or a pipeline that has one; ValueError if neither."""
    tidy(checkpoint)
    for folder in (checkpoint, checkpoint / "transformer"):
        if (folder / "config.json").is_file():
            return folder
    raise ValueError(f"{checkpoint}: neither a transformer nor a pipeline (no config.json there); check the path")


def check_quantized(folder: Path, w_bits: int | None = None) -> dict:
    """config.json of the transformer in `folder`; ValueError if it is full-precision: loading would quantize it on the
    spot. `w_bits`: what was asked for, if anything was."""
    config = read_json(folder / "config.json")
    found = config.get("w_bits", FULL_PRECISION_BITS)
    if isinstance(found, int) and found >= FULL_PRECISION_BITS:
        asked = "" if w_bits is None else f", asked for w_bits={w_bits}"
        raise ValueError(
            f"{folder}: w_bits={found} is not quantized{asked}; give what train.py, run.py or sanity.py wrote"
        )
    return config


def check_shapes(checkpoint: Path, config: Mapping, model: str, teacher: torch.nn.Module, flag: str) -> None:
    """ValueError, naming the first difference and `flag`, the script's flag for `model`, unless `config` describes a
    transformer of the teacher's shape."""
    for name in SHAPE:
        if config.get(name) != teacher.config.get(name):
            raise ValueError(
                f"{checkpoint}: {name}={config.get(name)}, but {name}={teacher.config.get(name)} in {model}; "
                f"name the checkpoint's teacher with {flag}"
            )


def load_quantized_model(
    model_args, training_args, cache_dir: Path | None = None, w_bits: int = 16, dtype: torch.dtype | None = None
) -> QuantizedTransformer:
    """The transformer at `w_bits`: from `cache_dir` if it holds one, else made from the pipeline's own.

    model_args.input_model_filename names the pipeline; without `dtype`, training_args decides (see `pick_dtype`). From
    16 bits on the quantizer's flags (lora_r, clip_init, …) do not count. Raises ValueError if `cache_dir` holds a
    transformer of other settings.
    """
    device = pick_device(model_args.device)
    settings = {"w_bits": w_bits, "dtype": dtype or pick_dtype(training_args, device)}
    if w_bits < FULL_PRECISION_BITS:
        settings |= {name: getattr(model_args, name) for name in ("lora_r", "lora_alpha", "clip_init")}
        settings["quantize_modulation"] = model_args.quantize_modulation
    # Straight to the card, where finding the step sizes takes seconds, not minutes.
    if device.type == "cuda" and model_args.offload is None:
        settings["device_map"] = str(device)
    if cache_dir is not None and (Path(cache_dir) / "config.json").is_file():
        return load_transformer(cache_dir, **settings)
    return load_transformer(model_args.input_model_filename, subfolder="transformer", **settings)


def is_packed(transformer: torch.nn.Module, asked: bool | None) -> bool:
    """Whether what is made of a transformer is to be packed: as asked, else if it is large."""
    return sum(p.numel() for p in transformer.parameters()) >= LARGE if asked is None else asked


def load_student(folder: Path, dtype: torch.dtype, w_bits: int | None = None) -> QuantizedTransformer:
    """The quantized transformer in `folder`, packed for inference if it is not yet, computing in `dtype`.

    Codes are found from the weights as they are stored. Rounded to bfloat16 before, those beside a threshold would
    fall on its other side, and training leaves many there. Raises ValueError for a full-precision transformer or, if
    `w_bits` is given, one of other bits, and what from_pretrained does.
    """
    settings = {} if w_bits is None else {"w_bits": w_bits}
    if check_quantized(folder, w_bits).get("packed"):
        return load_transformer(folder, dtype=dtype, **settings)
    student = load_transformer(folder, dtype=torch.float32, **settings).pack()
    return torch.nn.Module.to(student, dtype)  # diffusers' own warns of the step sizes, which stay in fp32 anyway
