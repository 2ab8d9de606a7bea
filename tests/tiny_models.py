"""What tests of models/ share: a small transformer of each family, random weights for it, and what to call it with."""

from collections.abc import Mapping
from pathlib import Path

import diffusers
import torch
from diffusers.models.embeddings import apply_rotary_emb

from models.modeling_flux2_quant import Flux2Transformer2DModel
from models.modeling_flux_quant import FluxTransformer2DModel

CONFIG = {
    "in_channels": 8, "num_layers": 2, "num_single_layers": 3, "attention_head_dim": 16, "num_attention_heads": 2,
    "joint_attention_dim": 24,
}  # fmt: skip
CONFIGS = {
    "FLUX.1": CONFIG | {"pooled_projection_dim": 20, "axes_dims_rope": (4, 6, 6)},
    "FLUX.2": CONFIG | {"timestep_guidance_channels": 32, "axes_dims_rope": (4, 4, 4, 4)},
}
OURS = {"FLUX.1": FluxTransformer2DModel, "FLUX.2": Flux2Transformer2DModel}
STOCK = {"FLUX.1": diffusers.FluxTransformer2DModel, "FLUX.2": diffusers.Flux2Transformer2DModel}


def stock(family: str, guidance: bool = True, seed: int = 0):
    """diffusers' model of CONFIGS[family], every parameter random."""
    return randomized(STOCK[family](**CONFIGS[family], guidance_embeds=guidance), seed)


def randomized(model, seed: int = 0):
    """Every parameter but step sizes random, zero-initialised ones included."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if not name.endswith("weight_clip_val"):
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def inputs(config: Mapping, dtype: torch.dtype = torch.float32, seed: int = 0, text_tokens: int = 5) -> dict:
    """Keyword arguments for a transformer of this config, whichever its family: two pictures of 2 x 3 tokens."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    axes = len(config["axes_dims_rope"])
    given = {
        "hidden_states": randn(2, 6, config["in_channels"]),
        "encoder_hidden_states": randn(2, text_tokens, config["joint_attention_dim"]),
        "timestep": torch.tensor([0.3, 0.9], dtype=dtype),
        "guidance": torch.tensor([3.5, 1.0], dtype=dtype) if config["guidance_embeds"] else None,
        "img_ids": torch.cartesian_prod(torch.zeros(1), torch.arange(2.0), torch.arange(3.0), torch.zeros(1))[:, :axes],
        "txt_ids": torch.zeros(text_tokens, axes),
        "return_dict": False,
    }
    if "pooled_projection_dim" in config:
        given["pooled_projections"] = randn(2, config["pooled_projection_dim"])
    else:  # text has positions, too
        given["txt_ids"][:, -1] = torch.arange(text_tokens)
    return given


@torch.no_grad()
def output(model, dtype: torch.dtype = torch.float32, seed: int = 0, **kwargs) -> torch.Tensor:
    """The velocity for `inputs`."""
    return model(**inputs(model.config, dtype, seed), **kwargs)[0]


def norm_rotate(text, image, rotary, dtype):
    """What kernels.norm_rotate does, in plain torch, for where Triton is not."""
    parts = [[norm(x) for x, norm in pair] for pair in (text, image) if pair]
    joined = (torch.cat(part, 1) for part in zip(*parts, strict=True))
    return [apply_rotary_emb(part, rotary, sequence_dim=1).to(dtype) for part in joined]


def write_klein(folder: Path) -> Path:
    """A Flux2KleinPipeline of stock classes without text encoder and tokenizer, its weights random, in `folder`."""
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 8, 8), layers_per_block=1, latent_channels=4, norm_num_groups=4, sample_size=64,
    )  # fmt: skip
    transformer = diffusers.Flux2Transformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, timestep_guidance_channels=32, axes_dims_rope=(4, 4, 4, 4), guidance_embeds=False,
    )  # fmt: skip
    for parameter in transformer.parameters():
        parameter.data *= 2  # blocks that matter, so that quantizing them is seen
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    parts = {"scheduler": scheduler, "vae": vae, "transformer": transformer, "text_encoder": None, "tokenizer": None}
    diffusers.Flux2KleinPipeline(**parts).save_pretrained(folder)
    return folder


def load_pipeline(folder: Path, **settings):
    """The pipeline in `folder`, whichever its family; settings are from_pretrained's."""
    if not (folder / "tokenizer").exists():
        settings |= {"text_encoder": None, "tokenizer": None}
    return diffusers.DiffusionPipeline.from_pretrained(folder, **settings)


def draw(pipe, output_type: str = "np", **kwargs) -> torch.Tensor:
    """A picture of 64 pixels in two steps."""
    pipe.set_progress_bar_config(disable=True)
    arguments = {"height": 64, "width": 64, "num_inference_steps": 2, "output_type": output_type} | kwargs
    if isinstance(pipe, diffusers.Flux2KleinPipeline):
        text = torch.randn(2, 1, 5, 32, generator=torch.Generator().manual_seed(1)).to(pipe.transformer.dtype)
        arguments |= {"prompt_embeds": text[0], "negative_prompt_embeds": text[1]}
    else:
        arguments["prompt"] = "a red ball on a table"
    return torch.as_tensor(pipe(generator=torch.Generator().manual_seed(0), **arguments).images)
