"""FLUX pipelines of random weights in the shapes of FLUX.1 and FLUX.2-klein, as unkind to quantization as trained ones.

They show everything but the pictures: sizes, memory, time, and where arithmetic breaks. What trained diffusion
transformers have and Gaussian weights lack is put in:

heavy tails         matrices are Student-t with 5 degrees of freedom (kurtosis 9), of variance 1/in where nothing else
                    is said, so that activations keep their size; norm weights and biases are heavy-tailed too
larger rows         the spread of a row's gain is log-normal, and one row in 64 is four times larger
massive channels    of the embedders' biases a few channels are 100, of the rest about 0.1; the layers that write into
                    the residual stream have rows eight times larger there; AdaLN's scales enlarge these channels
                    fourfold. What a block's linears see of them is about a hundred times what they see of the others
means far from zero AdaLN's shifts and the biases are the same for all tokens, so that in most channels of an input the
                    mean is as large as what differs from token to token; some units of GELU never fire
peaked attention    one channel of each query and key norm weighs six times the others

FLUX.2 has no biases. There the embedders' rows of the massive channels are a hundred times the others, and what AdaLN's
biases are in FLUX.1 is read from the mean of the time embedding. Tensor i depends on the seed, on i and on the kind of
device.
"""

import json
import math
from collections.abc import Iterable, Iterator
from pathlib import Path

import diffusers
import torch
import transformers
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2Transformer2DModel,
    FluxTransformer2DModel,
)
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from models.kernels import row_chunks
from utils.prompt_list import train_prompts
from utils.tokenizers import make_qwen_tokenizer, make_tokenizers

FLUX = {
    "patch_size": 1, "in_channels": 64, "num_layers": 19, "num_single_layers": 38, "attention_head_dim": 128,
    "num_attention_heads": 24, "joint_attention_dim": 4096, "pooled_projection_dim": 768,
    "axes_dims_rope": (16, 56, 56),
}  # fmt: skip
KLEIN = {
    "patch_size": 1, "in_channels": 128, "num_layers": 5, "num_single_layers": 20, "attention_head_dim": 128,
    "num_attention_heads": 24, "joint_attention_dim": 7680, "timestep_guidance_channels": 256, "mlp_ratio": 3.0,
    "axes_dims_rope": (32, 32, 32, 32), "rope_theta": 2000, "guidance_embeds": False,
}  # fmt: skip
SMALL_KLEIN = KLEIN | {
    "num_layers": 2, "num_single_layers": 3, "attention_head_dim": 64, "num_attention_heads": 2,
    "joint_attention_dim": 192, "axes_dims_rope": (16, 16, 16, 16),
}  # fmt: skip
CONFIGS = {  # arguments of FluxTransformer2DModel, or of Flux2Transformer2DModel
    "flux-dev": FLUX | {"guidance_embeds": True},
    "flux-schnell": FLUX | {"guidance_embeds": False},
    "small": FLUX | {
        "num_layers": 2, "num_single_layers": 3, "num_attention_heads": 2, "joint_attention_dim": 128,
        "pooled_projection_dim": 64, "guidance_embeds": True,
    },
    "flux2-klein-4b": KLEIN,
    "flux2-klein-base-4b": KLEIN,
    "small-klein": SMALL_KLEIN,
    "small-klein-base": SMALL_KLEIN,
}  # fmt: skip
# CLIP-L, T5-XXL and the 16-channel autoencoder as FLUX.1's config.json files describe them; Qwen3-4B and the 32-channel
# autoencoder as FLUX.2-klein's do.
CLIP = {
    "vocab_size": 49408, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
    "num_attention_heads": 12, "max_position_embeddings": 77, "projection_dim": 768, "hidden_act": "quick_gelu",
}  # fmt: skip
T5 = {
    "vocab_size": 32128, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64,
    "dropout_rate": 0.1, "feed_forward_proj": "gated-gelu", "is_encoder_decoder": False, "tie_word_embeddings": False,
}  # fmt: skip
AUTOENCODER = {
    "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": 16, "sample_size": 1024,
    "scaling_factor": 0.3611, "shift_factor": 0.1159, "use_quant_conv": False, "use_post_quant_conv": False,
}  # fmt: skip
QWEN3 = {
    "vocab_size": 151936, "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 40960,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0}, "tie_word_embeddings": True,
}  # fmt: skip
AUTOENCODER2 = AUTOENCODER | {"latent_channels": 32, "use_quant_conv": True, "use_post_quant_conv": True}
AUTOENCODER2 = {name: value for name, value in AUTOENCODER2.items() if name not in ("scaling_factor", "shift_factor")}
SCHEDULER = {
    "shift": 3.0, "use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15, "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
}  # fmt: skip
SMALL_AUTOENCODER = {
    "block_out_channels": (8, 8, 16, 16), "layers_per_block": 1, "norm_num_groups": 4, "sample_size": 96,
}  # fmt: skip
DEV = {"clip": CLIP, "t5": T5, "autoencoder": AUTOENCODER, "scheduler": SCHEDULER, "t5_tokens": 512}
REST = {  # what stands around the transformer
    "flux-dev": DEV,
    "flux-schnell": DEV | {"scheduler": SCHEDULER | {"shift": 1.0, "use_dynamic_shifting": False}, "t5_tokens": 256},
    "small": DEV | {
        "clip": CLIP | {
            "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
            "num_attention_heads": 2, "projection_dim": 64,
        },
        "t5": T5 | {"vocab_size": 8192, "d_model": 128, "d_ff": 256, "num_layers": 2, "num_heads": 2},
        "autoencoder": AUTOENCODER | SMALL_AUTOENCODER, "t5_tokens": 32,
    },
}  # fmt: skip
KLEIN_REST = {"qwen3": QWEN3, "autoencoder": AUTOENCODER2, "scheduler": SCHEDULER, "tokens": 512}
SMALL_KLEIN_REST = KLEIN_REST | {
    "qwen3": QWEN3 | {  # its 9th, 18th and 27th layer make the text embedding
        "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 28,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "max_position_embeddings": 512,
    },
    "autoencoder": AUTOENCODER2 | SMALL_AUTOENCODER, "tokens": 32,
}  # fmt: skip
REST |= {  # with is_distilled, of model_index.json
    "flux2-klein-4b": KLEIN_REST | {"distilled": True},
    "flux2-klein-base-4b": KLEIN_REST | {"distilled": False},
    "small-klein": SMALL_KLEIN_REST | {"distilled": True},
    "small-klein-base": SMALL_KLEIN_REST | {"distilled": False},
}
SHARD_BYTES = {False: 10_000_000_000, True: 6_000_000}  # of a transformer as on the hub; by is_small
ENCODER_SHARD_BYTES = {False: 5_000_000_000, True: 1_500_000}
PARTS = {  # of model_index.json
    "FluxPipeline": {
        "scheduler": ("diffusers", "FlowMatchEulerDiscreteScheduler"),
        "text_encoder": ("transformers", "CLIPTextModel"),
        "text_encoder_2": ("transformers", "T5EncoderModel"),
        "tokenizer": ("transformers", "CLIPTokenizer"),
        "tokenizer_2": ("transformers", "T5Tokenizer"),
        "transformer": ("diffusers", "FluxTransformer2DModel"),
        "vae": ("diffusers", "AutoencoderKL"),
    },
    "Flux2KleinPipeline": {
        "scheduler": ("diffusers", "FlowMatchEulerDiscreteScheduler"),
        "text_encoder": ("transformers", "Qwen3ForCausalLM"),
        "tokenizer": ("transformers", "Qwen2TokenizerFast"),
        "transformer": ("diffusers", "Flux2Transformer2DModel"),
        "vae": ("diffusers", "AutoencoderKLFlux2"),
    },
}
STEM = "diffusion_pytorch_model"
FREEDOM = 5  # degrees of freedom of the weights' distribution
MASSIVE = 100.0  # what the embedders add to the massive channels
WRITERS = (
    "attn.to_out.0.weight", "attn.to_add_out.weight", "net.2.weight", "s.proj_out.weight",
    "attn.to_out.weight", "linear_out.weight",
)  # fmt: skip
EMBEDDERS = ("x_embedder", "context_embedder")
TIME_GAIN = 3.0  # of FLUX.2's time embedding, so that the mean of what SiLU makes of it is
TIME_MEAN = 0.3  # about this


def is_klein(config: str) -> bool:
    """Whether a name in CONFIGS is FLUX.2-klein's kind."""
    return "qwen3" in REST[config]


def stock_class(config: str) -> type[nn.Module]:
    """diffusers' class of the transformer of a name in CONFIGS."""
    return Flux2Transformer2DModel if is_klein(config) else FluxTransformer2DModel


def is_small(config: str) -> bool:
    """Whether a name in CONFIGS is of a few MB."""
    return config.startswith("small")


def skeleton(config: str, blocks: tuple[int, int] | None = None) -> nn.Module:
    """diffusers' model of a name in CONFIGS on the meta device, with `blocks` double and single blocks if given."""
    settings = dict(CONFIGS[config])
    if blocks is not None:
        settings |= {"num_layers": blocks[0], "num_single_layers": blocks[1]}
    with torch.device("meta"):
        return stock_class(config)(**settings)


def massive_channels(width: int) -> list[int]:
    """Those channels of a residual stream of this width whose activations are a hundred times the others'."""
    return [width * (2 * i + 1) // 7 for i in range(max(1, min(3, width // 1024)))]


def student_t(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """float32 Student-t numbers, FREEDOM degrees of freedom, variance 1 (Bailey 1994, Math. Comp. 62: from two uniform
    u, v, t = sqrt(n (u^(-2/n) - 1)) cos 2πv)."""
    uniform = torch.rand((2, *shape), generator=generator, device=generator.device)
    radius = uniform[0].neg_().add_(1).pow_(-2 / FREEDOM).sub_(1).mul_(FREEDOM - 2).sqrt_()
    return radius.mul_(uniform[1].mul_(2 * math.pi).cos_())


def matrix(name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
    """A linear, convolution or embedding in bfloat16, a few rows at a time. `name` says what it writes to."""
    flat, inputs = (shape[0], math.prod(shape[1:])), math.prod(shape[1:])
    gain = torch.randn(flat[0], 1, generator=generator, device=generator.device).mul_(0.3).exp_()
    gain *= inputs**-0.5
    if name.endswith("norm_out.linear.weight") or ".linear.weight" in name and (".norm" in name or "_mod" in name):
        gain *= 0.3  # AdaLN: around what its bias says
    elif "blocks." in name and name.endswith("weight"):
        gain[torch.rand(flat[0], generator=generator, device=generator.device) < 1 / 64] *= 4
    if name.endswith(WRITERS):
        gain[massive_channels(flat[0])] *= 8
    value = torch.empty(flat, dtype=torch.bfloat16, device=generator.device)
    for rows in row_chunks(*flat):
        value[rows] = student_t((rows.stop - rows.start, inputs), generator).mul_(gain[rows])
    return value.view(shape)


def vector(name: str, length: int, generator: torch.Generator) -> Tensor:
    """A norm's weight or a bias of the transformer, float32."""
    value = student_t((length,), generator)
    if ".norm_" in name:  # of queries and keys
        value = value.mul_(0.2).add_(1)
        value[length // 3] = 6
    elif name in ("x_embedder.bias", "context_embedder.bias"):
        value *= 0.1
        value[massive_channels(length)] = MASSIVE
    elif ".norm" in name or "norm_out" in name or "_modulation" in name:
        # AdaLN: a chunk as wide as the model for each of its parts.
        chunks = 2 if name.startswith("norm_out") else 3 if "single" in name else 6
        width = length // chunks
        parts = ("scale", "shift") if chunks == 2 else ("shift", "scale", "gate") * 2
        for part, piece in zip(parts, value.view(chunks, width), strict=False):
            piece *= {"shift": 0.2, "scale": 0.2, "gate": 0.1}[part]
            if part == "scale":  # the last norm takes them out again: they carry no picture
                piece[massive_channels(width)] = 3 if chunks > 2 else -0.99
    else:
        value *= 0.1
    return value


def without_biases(name: str, value: Tensor, generator: torch.Generator) -> Tensor:
    """A matrix of FLUX.2's transformer: `value`, and what biases are for in FLUX.1."""
    module = name.removesuffix(".weight")
    if module in EMBEDDERS:
        value[massive_channels(len(value))] *= MASSIVE
    elif module.endswith("timestep_embedder.linear_2"):
        value *= TIME_GAIN
    elif module.endswith(".linear"):
        bias = vector(f"{module}.bias", len(value), generator).unsqueeze(1)
        for rows in row_chunks(*value.shape):
            value[rows] = value[rows].float().add_(bias[rows] / (TIME_MEAN * value.shape[1]))
    return value


def random_tensors(model: nn.Module, seed: int, device: torch.device) -> Iterator[tuple[str, Tensor]]:
    """A value in bfloat16 on `device` for every parameter of `model`, and float32 for its statistics, one at a time."""
    transformer = isinstance(model, FluxTransformer2DModel | Flux2Transformer2DModel)
    for name, buffer in model.named_buffers():
        if name.endswith(("running_mean", "running_var")):  # of the latents' channels
            generator = torch.Generator(device).manual_seed(seed)
            drawn = torch.rand(buffer.shape, generator=generator, device=device)
            yield name, drawn + 0.5 if name.endswith("var") else drawn - 0.5
        elif name.endswith("num_batches_tracked"):
            yield name, torch.ones_like(buffer, device=device)
    for i, (name, parameter) in enumerate(model.named_parameters()):
        generator = torch.Generator(device).manual_seed(seed + i)
        if parameter.ndim > 1:
            value = matrix(name if transformer else "", parameter.shape, generator)
            if isinstance(model, Flux2Transformer2DModel):
                value = without_biases(name, value, generator)
        elif transformer:
            value = vector(name, len(parameter), generator)
        else:  # norms one, biases zero
            value = torch.full(parameter.shape, float(name.endswith("weight")), device=device)
        yield name, value.to(torch.bfloat16)


def shards(tensors: Iterator[tuple[str, Tensor]], shard_bytes: int) -> Iterator[dict[str, Tensor]]:
    """The tensors in groups of at most `shard_bytes` (or of one tensor), in their order."""
    shard: dict[str, Tensor] = {}
    size = 0
    for name, tensor in tensors:
        if shard and size + tensor.nbytes > shard_bytes:
            yield shard
            shard, size = {}, 0
        shard[name] = tensor
        size += tensor.nbytes
    yield shard


def write_transformer(folder: Path, model: nn.Module, seed: int, shard_bytes: int, device: torch.device) -> int:
    """Write transformer/ and a model_index.json that names it into `folder`; returns the bytes of the weights."""
    target = folder / "transformer"
    target.mkdir()
    written: list[list[str]] = []
    total = 2 * sum(p.numel() for p in model.parameters())
    with tqdm(total=total, desc="random weights", unit="B", unit_scale=True) as bar:
        tensors = ((name, tensor.cpu()) for name, tensor in random_tensors(model, seed, device))
        for shard in shards(tensors, shard_bytes):
            save_file(shard, target / f"shard-{len(written)}", metadata={"format": "pt"})
            written.append(list(shard))
            bar.update(sum(tensor.nbytes for tensor in shard.values()))
    files = [f"{STEM}-{i + 1:05d}-of-{len(written):05d}.safetensors" for i in range(len(written))]
    for i, file in enumerate(files):
        (target / f"shard-{i}").rename(target / file)
    weight_map = {name: file for file, names in zip(files, written, strict=True) for name in names}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (target / f"{STEM}.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    model.save_config(target)
    kind = "Flux2KleinPipeline" if isinstance(model, Flux2Transformer2DModel) else "FluxPipeline"
    write_index(folder, kind, ["transformer"])
    return total


def write_index(folder: Path, kind: str, parts: Iterable[str], **settings) -> None:
    """model_index.json of a pipeline of this class with these of its parts, and its own settings."""
    index = {"_class_name": kind, "_diffusers_version": diffusers.__version__} | settings
    index |= {part: PARTS[kind][part] for part in parts}
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


def rest_skeletons(config: str) -> dict[str, nn.Module]:
    """Text encoders and autoencoder of a name in CONFIGS on the meta device, by their names in the pipeline."""
    rest = REST[config]
    with torch.device("meta"):
        if is_klein(config):
            ends = {"bos_token_id": None, "eos_token_id": 0, "pad_token_id": 0}  # as make_qwen_tokenizer numbers them
            return {
                "text_encoder": transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**rest["qwen3"], **ends)),
                "vae": AutoencoderKLFlux2(**rest["autoencoder"]),
            }
        ends = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}  # as make_tokenizers numbers them
        return {
            "text_encoder": transformers.CLIPTextModel(transformers.CLIPTextConfig(**rest["clip"], **ends)),
            "text_encoder_2": transformers.T5EncoderModel(transformers.T5Config(**rest["t5"])),
            "vae": AutoencoderKL(**rest["autoencoder"]),
        }


def filled(model: nn.Module, seed: int, device: torch.device) -> nn.Module:
    """`model`, which is on the meta device, with random weights in bfloat16 on `device`."""
    model.load_state_dict(dict(random_tensors(model, seed, device)), strict=False, assign=True)
    if isinstance(model, transformers.PreTrainedModel):
        model.tie_weights()  # the two names of an embedding
    return model


def make_tokenizer_parts(config: str) -> dict[str, transformers.PreTrainedTokenizerBase]:
    """Tokenizers of a name in CONFIGS, by their names in the pipeline."""
    rest, prompts = REST[config], train_prompts(2000)
    if is_klein(config):
        return {"tokenizer": make_qwen_tokenizer(prompts, 512, rest["tokens"])}
    made = make_tokenizers(prompts, rest["clip"]["max_position_embeddings"], rest["t5_tokens"])
    return dict(zip(("tokenizer", "tokenizer_2"), made, strict=True))


def write_rest(folder: Path, config: str, seed: int, device: torch.device) -> None:
    """Write all of the pipeline but its transformer into `folder`, and a model_index.json that names everything."""
    for part, tokenizer in make_tokenizer_parts(config).items():
        tokenizer.save_pretrained(folder / part)
    FlowMatchEulerDiscreteScheduler(**REST[config]["scheduler"]).save_pretrained(folder / "scheduler")
    for part, model in rest_skeletons(config).items():
        shard_bytes = ENCODER_SHARD_BYTES[is_small(config)]
        filled(model, seed, device).save_pretrained(folder / part, max_shard_size=shard_bytes)
    kind, settings = "FluxPipeline", {}
    if is_klein(config):
        kind, settings = "Flux2KleinPipeline", {"is_distilled": REST[config]["distilled"]}
    write_index(folder, kind, PARTS[kind], **settings)
