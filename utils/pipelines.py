"""What a pipeline of FLUX.1 and one of FLUX.2-klein do each in their own way; everything else asks here.

    FLUX.1         text of T5 and CLIP, position ids of three axes, latents scaled and shifted, guidance as an input of
                   the transformer; schnell draws in four steps, without guidance, and reads half as much text
    FLUX.2-klein   text of three layers of Qwen3, position ids of four axes, latents in patches, normalized by the
                   statistics of the autoencoder's batch norm. The distilled model draws in four steps and without
                   guidance; the base model calls its transformer twice a step, with the prompt and with none, and goes
                   v₀ + guidance·(v − v₀)

A pipeline's text is a dict of arguments to call it with, whose names end in prompt_embeds. Latents are packed, [N, L,
C]: L patches of 16 × 16 pixels, row by row.
"""

from collections.abc import Mapping

import torch
from diffusers import DiffusionPipeline, Flux2KleinPipeline, FluxPipeline
from torch import Tensor

from models.modeling_flux2_quant import Flux2Transformer2DModel
from models.modeling_flux_quant import FluxTransformer2DModel
from utils.utils import get_logger

log = get_logger("pipeline")
DEFAULTS = (
    "default: 28; FLUX.1-schnell and FLUX.2-klein 4, klein's base model 50",
    "default: 3.5; FLUX.1-schnell and FLUX.2-klein none, klein's base model 4",
)
EARLY_SHARE, FEW_STEPS = 0.8, 8  # see early_share


class Flux1:
    """FluxPipeline."""

    pipeline = FluxPipeline
    transformer = FluxTransformer2DModel
    text_encoders = ("text_encoder", "text_encoder_2")
    tokenizers = ("tokenizer", "tokenizer_2")
    settings = ()  # of the pipeline's own, beside its parts

    @staticmethod
    def is_distilled(pipe: FluxPipeline) -> bool:
        """Whether the model was distilled to draw in few steps and without guidance. Of FLUX.1 that is schnell, whose
        schedule, unlike dev's, is not shifted with the size of the picture; its transformer may not be loaded."""
        return not pipe.scheduler.config.get("use_dynamic_shifting", True)

    @classmethod
    def defaults(cls, pipe: FluxPipeline) -> tuple[int, float]:
        """Denoising steps, and guidance."""
        return (4, 1.0) if cls.is_distilled(pipe) else (28, 3.5)

    @staticmethod
    def calls_a_step(pipe: FluxPipeline, guidance_scale: float) -> int:
        """How often the transformer is called in a step: 1, or 2 of which the second is given no prompt."""
        return 1

    @classmethod
    def text_length(cls, pipe: FluxPipeline) -> int:
        """The number of tokens a prompt is cut or padded to; schnell was trained with 256."""
        most = 256 if cls.is_distilled(pipe) else 512
        return min(most, pipe.tokenizer_2.model_max_length) if pipe.tokenizer_2 is not None else most

    @classmethod
    def encode(cls, pipe: FluxPipeline, prompts: list[str], device: torch.device) -> dict[str, Tensor]:
        """The text of N prompts, {name: [N, …]} on the CPU; `device` is the text encoders'."""
        text, pooled, _ = pipe.encode_prompt(prompts, None, device=device, max_sequence_length=cls.text_length(pipe))
        return {"prompt_embeds": text.cpu(), "pooled_prompt_embeds": pooled.cpu()}

    @classmethod
    def encode_none(cls, pipe: FluxPipeline, device: torch.device, guidance_scale: float) -> dict[str, Tensor]:
        """What is wanted for this guidance beside the prompts' text, {name: [1, …]} on the CPU."""
        return {}

    @staticmethod
    def noise(pipe: FluxPipeline, seed: int, side: int, dtype: torch.dtype) -> Tensor:
        """What diffusers starts from with a generator of this seed on the CPU, packed [1, L, C], L = side²."""
        channels, generator = pipe.transformer.config.in_channels // 4, torch.Generator().manual_seed(seed)
        noise = torch.randn(1, channels, 2 * side, 2 * side, generator=generator, dtype=dtype)
        return pipe._pack_latents(noise, 1, channels, 2 * side, 2 * side)

    @staticmethod
    def draw(pipe: FluxPipeline, noise: Tensor, guidance_scale: float, **arguments) -> Tensor:
        """The latents that the pipeline makes of `noise`, both packed, on its device."""
        return pipe(latents=noise, guidance_scale=guidance_scale, output_type="latent", **arguments).images

    @staticmethod
    def unpack(pipe: FluxPipeline, latents: Tensor, size: int) -> Tensor:
        """What the autoencoder decodes of packed latents, in its dtype."""
        latents = pipe._unpack_latents(latents, size, size, pipe.vae_scale_factor)
        return latents / pipe.vae.config.scaling_factor + pipe.vae.config.shift_factor

    @classmethod
    def describe(cls, pipe: FluxPipeline, config: Mapping, guidance_scale: float) -> dict:
        """What of this family a trajectory depends on, and its shapes, for a manifest; `config` is the transformer's.
        Guidance counts only for a transformer that embeds it."""
        guided = config["guidance_embeds"]
        return {
            "guidance_scale": guidance_scale if guided else None,
            "guidance_embeds": guided,
            "text_shape": [cls.text_length(pipe), config["joint_attention_dim"]],
            "pooled_shape": [config["pooled_projection_dim"]],
        }

    @staticmethod
    def image_ids(side: int, dtype: torch.dtype) -> Tensor:
        """The pipeline's position ids [side², 3] of a square picture."""
        return FluxPipeline._prepare_latent_image_ids(1, side, side, "cpu", dtype)

    @staticmethod
    def text_ids(length: int, dtype: torch.dtype) -> Tensor:
        """The pipeline's position ids [length, 3] of a text."""
        return torch.zeros(length, 3, dtype=dtype)

    @staticmethod
    def conditions(text: Mapping[str, Tensor], call: int, description: Mapping) -> dict[str, Tensor]:
        """What the transformer is told beside latents, time and positions in this call of a step, without the batch
        dimension; `text` is a prompt's, `description` as of `describe`."""
        inputs = {
            "encoder_hidden_states": text["prompt_embeds"],
            "pooled_projections": text["pooled_prompt_embeds"],
        }
        if description["guidance_embeds"]:
            inputs["guidance"] = torch.tensor(description["guidance_scale"], dtype=torch.float32)
        return inputs


class Flux2Klein:
    """Flux2KleinPipeline, distilled or not; functions as in Flux1."""

    pipeline = Flux2KleinPipeline
    transformer = Flux2Transformer2DModel
    text_encoders = ("text_encoder",)
    tokenizers = ("tokenizer",)
    settings = ("is_distilled",)

    @staticmethod
    def is_distilled(pipe: Flux2KleinPipeline) -> bool:
        return pipe.config.is_distilled

    @classmethod
    def defaults(cls, pipe: Flux2KleinPipeline) -> tuple[int, float]:
        return (4, 1.0) if cls.is_distilled(pipe) else (50, 4.0)

    @classmethod
    def calls_a_step(cls, pipe: Flux2KleinPipeline, guidance_scale: float) -> int:
        return 2 if guidance_scale > 1 and not cls.is_distilled(pipe) else 1

    @staticmethod
    def text_length(pipe: Flux2KleinPipeline) -> int:
        return min(pipe.tokenizer_max_length, pipe.tokenizer.model_max_length)

    @classmethod
    def encode(cls, pipe: Flux2KleinPipeline, prompts: list[str], device: torch.device) -> dict[str, Tensor]:
        embeds, _ = pipe.encode_prompt(prompts, device, max_sequence_length=cls.text_length(pipe))
        return {"prompt_embeds": embeds.cpu()}

    @classmethod
    def encode_none(cls, pipe: Flux2KleinPipeline, device: torch.device, guidance_scale: float) -> dict[str, Tensor]:
        if cls.calls_a_step(pipe, guidance_scale) == 1:
            return {}
        return {"negative_prompt_embeds": cls.encode(pipe, [""], device)["prompt_embeds"]}

    @staticmethod
    def noise(pipe: Flux2KleinPipeline, seed: int, side: int, dtype: torch.dtype) -> Tensor:
        channels, generator = pipe.transformer.config.in_channels, torch.Generator().manual_seed(seed)
        return pipe._pack_latents(torch.randn(1, channels, side, side, generator=generator, dtype=dtype))

    @classmethod
    def draw(cls, pipe: Flux2KleinPipeline, noise: Tensor, guidance_scale: float, **arguments) -> Tensor:
        last = noise

        def keep(pipe, step: int, timestep: Tensor, found: dict) -> dict:
            nonlocal last
            last = found["latents"]
            return {}

        if cls.calls_a_step(pipe, guidance_scale) == 1:
            guidance_scale = 1.0  # the pipeline would warn that it ignores another
        # It takes latents unpacked, and hands them out unpacked and scaled.
        given = cls._to_picture(noise)
        pipe(
            latents=given, guidance_scale=guidance_scale, output_type="latent", callback_on_step_end=keep, **arguments
        )
        return last

    @classmethod
    def unpack(cls, pipe: Flux2KleinPipeline, latents: Tensor, size: int) -> Tensor:
        norm, latents = pipe.vae.bn, cls._to_picture(latents)
        spread = (norm.running_var + pipe.vae.config.batch_norm_eps).sqrt()
        mean, spread = (value.view(1, -1, 1, 1).to(latents) for value in (norm.running_mean, spread))
        return pipe._unpatchify_latents(latents * spread + mean)

    @staticmethod
    def _to_picture(latents: Tensor) -> Tensor:
        """Packed latents [N, side², C] as [N, C, side, side]."""
        side = round(latents.shape[1] ** 0.5)
        return latents.mT.unflatten(-1, (side, side))

    @classmethod
    def describe(cls, pipe: Flux2KleinPipeline, config: Mapping, guidance_scale: float) -> dict:
        calls, shape = cls.calls_a_step(pipe, guidance_scale), [cls.text_length(pipe), config["joint_attention_dim"]]
        return {
            "pipeline": cls.pipeline.__name__,
            "calls_a_step": calls,
            "guidance_scale": guidance_scale if calls == 2 else None,
            "text_shape": shape,
            "negative_shape": shape if calls == 2 else [0],
        }

    @staticmethod
    def image_ids(side: int, dtype: torch.dtype) -> Tensor:
        """[side², 4]"""
        return Flux2KleinPipeline._prepare_latent_ids(torch.empty(1, 1, side, side))[0]

    @staticmethod
    def text_ids(length: int, dtype: torch.dtype) -> Tensor:
        """[length, 4]"""
        return Flux2KleinPipeline._prepare_text_ids(torch.empty(1, length, 1))[0]

    @staticmethod
    def conditions(text: Mapping[str, Tensor], call: int, description: Mapping) -> dict[str, Tensor]:
        return {"encoder_hidden_states": text["negative_prompt_embeds" if call else "prompt_embeds"]}


Family = type[Flux1] | type[Flux2Klein]
FAMILIES: dict[str, Family] = {family.pipeline.__name__: family for family in (Flux1, Flux2Klein)}


def family_of(pipe: DiffusionPipeline) -> Family:
    """The family of a loaded pipeline."""
    return next(family for family in FAMILIES.values() if isinstance(pipe, family.pipeline))


def family_called(kind: object, name: str) -> Family:
    """The family whose pipelines are of the class `kind`. ValueError, about the pipeline `name`, if there is none."""
    if kind in FAMILIES:
        return FAMILIES[kind]
    taken = " or ".join(f"a {pipeline}" for pipeline in FAMILIES)
    raise ValueError(f"{name}: expected {taken}, found a {kind}; give a FLUX text-to-image pipeline")


def family_with(transformer: type) -> Family:
    """The family whose transformers are of this class of ours."""
    return next(family for family in FAMILIES.values() if family.transformer is transformer)


def sampling_settings(pipe: DiffusionPipeline, steps: int | None, guidance_scale: float | None) -> tuple[int, float]:
    """Denoising steps and guidance: those that were asked for, else the family's. A guidance that a distilled model
    cannot follow is said to have no effect, and 1."""
    family = family_of(pipe)
    usual_steps, usual_guidance = family.defaults(pipe)
    guidance = usual_guidance if guidance_scale is None else guidance_scale
    if family.is_distilled(pipe) and guidance > 1:
        log.info("guidance %g has no effect: this model is distilled to draw without", guidance)
        guidance = 1.0
    return usual_steps if steps is None else steps, guidance


def early_share(steps: int) -> float:
    """How much of a training goes to the first quarter of the denoising steps, which decide the layout, unless said
    otherwise. Of few steps, to which a model was distilled, each is a large part of the way through the noise: there
    all count alike."""
    return EARLY_SHARE if steps >= FEW_STEPS else 0.25


def steps_taken(velocities: Tensor, guidance: float | None) -> Tensor:
    """The velocities [T, …] that the scheduler was given: those of the calls or, with `guidance`, of the calls with the
    prompt and with none, [2 T, …], in turns, what the pipeline makes of two, rounded as there."""
    if guidance is None:
        return velocities
    prompted, empty = velocities[0::2], velocities[1::2]
    return empty + guidance * (prompted - empty)
