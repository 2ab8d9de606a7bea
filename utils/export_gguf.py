"""Write a packed FLUX.1 model into one GGUF file, for programs that are built on ggml.

    python -m utils.export_gguf assets/tiny-flux-1.58bit tiny-flux.gguf      # TQ2_0: 2.06 bits a ternary weight
    python -m utils.export_gguf CHECKPOINT flux.gguf --type TQ1_0            # 1.69 bits: smaller, fewer programs
    sd-cli --diffusion-model flux.gguf --vae … --clip_l … --t5xxl … -p "…"   # stable-diffusion.cpp, on a CPU

CHECKPOINT is a quantized transformer or a pipeline that has one, of 1.58 bits and a width that is a multiple of 256.

A row of ternary codes with its step size α is cut into ggml's blocks of 256 weights, each with a scale d = 2α/3 of its
own in fp16: the codes stay what they are, d is off by 2^−11 (4.9e-4) of itself at most, by 3e-8 below 6e-5.
Everything else is fp32; AdaLN modulation that was left unquantized is fp16. Names and shapes are those of Black Forest
Labs' checkpoints: q, k and v are one matrix, in the single blocks together with the first linear of the feed-forward,
and the last modulation has its shift before its scale. general.architecture is "flux", which ComfyUI-GGUF asks for;
stable-diffusion.cpp and diffusers go by the names.

Who reads TQ2_0 and TQ1_0 (2026-11): llama.cpp's ggml multiplies by both on a CPU, by TQ2_0 in Metal and Vulkan too, by
neither in CUDA. stable-diffusion.cpp's own ggml (0.9.8 in stable-diffusion-cpp-python 0.4.7) has them on a CPU only. Of
files of FLUX.1's width, with one double and two single blocks, it drew there what this repository draws, at 47.7 dB:
ggml multiplies by activations in 8 bits. The gguf package decodes both types in numpy, and ComfyUI-GGUF leaves that to
it at every use. diffusers 0.42 refuses them: its GGUFQuantizationConfig does not decode them.
"""

import utils.interrupt  # noqa: F401 (Ctrl-C is a line from here on)

import argparse
import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import gguf
import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from models.modeling_flux_quant import FluxTransformer2DModel
from models.packing import PackedLinear
from utils.checkpoints import bits_name, check_quantized, load_student, transformer_folder
from utils.folders import check_disk, tidy, whole_file
from utils.utils import ArgumentParser, from_root, get_logger, run_script

log = get_logger("export")
TYPES = ("TQ2_0", "TQ1_0")
BLOCK = 256  # weights that share a scale, in both types

FP32, FP16 = gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16
FP16_MAX = torch.finfo(torch.float16).max
ARCHITECTURE = "flux"

# Black Forest Labs' names of layers, and ours that they join.
FIRST = {
    "img_in": ["x_embedder"],
    "time_in.in_layer": ["time_text_embed.timestep_embedder.linear_1"],
    "time_in.out_layer": ["time_text_embed.timestep_embedder.linear_2"],
    "vector_in.in_layer": ["time_text_embed.text_embedder.linear_1"],
    "vector_in.out_layer": ["time_text_embed.text_embedder.linear_2"],
    "txt_in": ["context_embedder"],
}
GUIDANCE = {
    "guidance_in.in_layer": ["time_text_embed.guidance_embedder.linear_1"],
    "guidance_in.out_layer": ["time_text_embed.guidance_embedder.linear_2"],
}
DOUBLE = {
    "img_mod.lin": ["norm1.linear"],
    "img_attn.qkv": ["attn.to_q", "attn.to_k", "attn.to_v"],
    "img_attn.norm.query_norm": ["attn.norm_q"],
    "img_attn.norm.key_norm": ["attn.norm_k"],
    "img_attn.proj": ["attn.to_out.0"],
    "img_mlp.0": ["ff.net.0.proj"],
    "img_mlp.2": ["ff.net.2"],
    "txt_mod.lin": ["norm1_context.linear"],
    "txt_attn.qkv": ["attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"],
    "txt_attn.norm.query_norm": ["attn.norm_added_q"],
    "txt_attn.norm.key_norm": ["attn.norm_added_k"],
    "txt_attn.proj": ["attn.to_add_out"],
    "txt_mlp.0": ["ff_context.net.0.proj"],
    "txt_mlp.2": ["ff_context.net.2"],
}
SINGLE = {
    "modulation.lin": ["norm.linear"],
    "linear1": ["attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"],
    "norm.query_norm": ["attn.norm_q"],
    "norm.key_norm": ["attn.norm_k"],
    "linear2": ["proj_out"],
}
SHIFT_FIRST = "final_layer.adaLN_modulation.1"  # diffusers has the scale first
LAST = {SHIFT_FIRST: ["norm_out.linear"], "final_layer.linear": ["proj_out"]}


class Original(NamedTuple):
    """A tensor of Black Forest Labs' checkpoint: the `kind` ("weight", "bias") of `layers`, joined row by row."""

    name: str
    kind: str
    layers: list[nn.Module]
    stored: gguf.GGMLQuantizationType

    def shape(self) -> tuple[int, ...]:
        """[rows, in], or [rows] of a vector."""
        if self.kind == "weight" and isinstance(self.layers[0], nn.Linear):
            return sum(layer.out_features for layer in self.layers), self.layers[0].in_features
        return (sum(len(getattr(layer, self.kind)) for layer in self.layers),)

    def nbytes(self) -> int:
        return math.prod(gguf.quant_shape_to_byte_shape(self.shape(), self.stored))

    def encoded(self) -> np.ndarray:
        """The tensor as it is stored; ValueError, naming it, if it holds more than fp16 does and that is needed."""
        parts = []
        for layer in self.layers:  # one after the other: the largest takes 230 MB in fp32
            packed = self.kind == "weight" and isinstance(layer, PackedLinear)
            values = layer.dequantize() if packed else getattr(layer, self.kind).detach().float()
            if self.name.startswith(SHIFT_FIRST):
                values = torch.cat(values.chunk(2)[::-1])
            if self.stored != FP32 and (largest := max(-values.min(), values.max()).item()) > FP16_MAX:
                raise ValueError(f"{self.name}: {largest:.3g} is beyond fp16, which {self.stored.name} needs")
            parts.append(gguf.quantize(values.numpy(), self.stored))
        return np.concatenate(parts)


def originals(model: nn.Module, ternary: str) -> Iterator[Original]:
    """All tensors of Black Forest Labs' checkpoint of `model`, ternary matrices to be stored as `ternary`."""
    for name, layers in original_layers(model):
        linear = isinstance(layers[0], nn.Linear)
        in_block = name.startswith(("double_blocks.", "single_blocks."))
        stored = FP16 if linear and in_block else FP32
        if isinstance(layers[0], PackedLinear):
            stored = gguf.GGMLQuantizationType[ternary]
        yield Original(f"{name}.weight" if linear else f"{name}.scale", "weight", layers, stored)
        if linear:
            yield Original(f"{name}.bias", "bias", layers, FP32)


def original_layers(model: nn.Module) -> Iterator[tuple[str, list[nn.Module]]]:
    """The layers of Black Forest Labs' FLUX.1 by name, each with those of `model` that it joins."""

    def found(table: dict[str, list[str]], inside: nn.Module, prefix: str = ""):
        for name, paths in table.items():
            yield prefix + name, [inside.get_submodule(path) for path in paths]

    yield from found(FIRST, model)
    if model.config.guidance_embeds:
        yield from found(GUIDANCE, model)
    for i, block in enumerate(model.transformer_blocks):
        yield from found(DOUBLE, block, f"double_blocks.{i}.")
    for i, block in enumerate(model.single_transformer_blocks):
        yield from found(SINGLE, block, f"single_blocks.{i}.")
    yield from found(LAST, model)


def load(checkpoint: Path, ternary: str) -> nn.Module:
    """The packed transformer in `checkpoint`; ValueError, saying what can be exported, if it cannot be."""
    folder = transformer_folder(checkpoint)
    config = check_quantized(folder)
    if (kind := config.get("_class_name")) != FluxTransformer2DModel.__name__:
        raise ValueError(f"{folder}: a {kind}; only FLUX.1's {FluxTransformer2DModel.__name__} can be exported")
    if (w_bits := config["w_bits"]) != 0:
        raise ValueError(f"{folder}: {bits_name(w_bits)}; {ternary} holds ternary codes: export one of 1.58 bits")
    model = load_student(folder, torch.float32, 0)
    if model.inner_dim % BLOCK:
        raise ValueError(
            f"{folder}: its rows of {model.inner_dim} weights are no whole blocks of {ternary}; only models whose "
            f"width is a multiple of {BLOCK} can be exported"
        )
    return model


def check_new(file: Path) -> None:
    """ValueError if there is something at `file`."""
    if file.exists():
        raise ValueError(f"{file}: exists; move it or choose another name")


def write(model: nn.Module, file: Path, ternary: str) -> int:
    """Write `file`, tensor by tensor, whole or not at all; its size in bytes."""
    tensors = list(originals(model, ternary))
    total = sum(tensor.nbytes() for tensor in tensors)
    tidy(file.resolve().parent)
    check_disk(file.parent, total, "the model")
    with whole_file(file) as part:
        writer = gguf.GGUFWriter(part, ARCHITECTURE)
        try:
            writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
            writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{ternary}"])
            for tensor in tensors:
                writer.add_tensor_info(tensor.name, tensor.shape(), np.float32, tensor.nbytes(), tensor.stored)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            with tqdm(total=total, desc=ternary, unit="B", unit_scale=True) as bar:
                for tensor in tensors:
                    writer.write_tensor_data(tensor.encoded())
                    bar.update(tensor.nbytes())
        except OSError as error:  # numpy's, of a disk that is full all the same, names no file
            reason = error.strerror or error
            raise ValueError(f"{file}: cannot be written ({reason}); make room or choose another folder") from error
        finally:
            writer.close()
        check_new(file)  # it may have taken minutes
        return part.stat().st_size


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=from_root, help="a quantized transformer, or a pipeline that has one")
    parser.add_argument("file", type=Path, help="to be written, NAME.gguf; must not be there yet")
    parser.add_argument("--type", choices=TYPES, default=TYPES[0], help="how ternary weights are stored")
    args = parser.parse_args(argv)
    if args.file.suffix != ".gguf":
        parser.error(f"{args.file}: expected a name that ends in .gguf")
    return args


def main() -> None:
    args = parse_args()
    check_new(args.file)
    size = write(load(Path(args.checkpoint), args.type), args.file, args.type)
    log.info("%s: %s, %.3f GB", args.file, args.type, size / 1e9)


if __name__ == "__main__":
    run_script(main)
