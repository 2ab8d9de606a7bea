"""Pipelines: loading one, what it starts from, the pictures that it draws, and what its transformer does meanwhile."""

import gc
import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil
import torch
from diffusers import FluxPipeline, ModelMixin
from diffusers.hooks import HookRegistry, apply_group_offloading
from diffusers.hooks.group_offloading import _is_group_offload_enabled
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,  # of httpx or httpx2, whichever the hub client stands on
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError
from torch import Tensor, nn
from tqdm import tqdm

from utils.utils import empty_cache

LOADING_ERRORS = (OSError, ValueError, RuntimeError, SafetensorError, HTTPError)
OFFLOADS = ("model", "sequential")
PINNED = 2  # bytes of pinned memory a byte at most: torch takes powers of two


def load_pipeline(name: str, dtype: torch.dtype, **parts: object) -> FluxPipeline:
    """The FLUX pipeline `name`, a folder or a hub id, on the CPU.

    parts: components that take the place of its own, whose files are neither read nor downloaded; None for without.
    Raises ValueError, in one line that says what to do, if there is none, access is missing, it is not FLUX or its
    files are incomplete.
    """
    folder = Path(name)
    if not folder.is_dir() and (folder.is_file() or not _is_hub_id(name)):
        raise ValueError(f"{name}: neither a folder nor a hub id (owner/model); check the path")
    try:
        kind = FluxPipeline.load_config(name).get("_class_name")
        if kind == "FluxPipeline":
            _check_tokenizers(folder)
            return FluxPipeline.from_pretrained(name, dtype=dtype, use_safetensors=True, **parts)
    except LOADING_ERRORS as error:
        raise _in_one_line(name, error) from error
    raise ValueError(f"{name}: expected a FluxPipeline, found a {kind}; give a FLUX text-to-image pipeline")


def pipeline_folder(name: str) -> Path:
    """Where the files of the pipeline `name` lie: the folder itself, or the hub's snapshot, downloaded as far as it is
    not. Raises ValueError as load_pipeline does."""
    if Path(name).is_dir():
        return Path(name)
    try:
        return Path(FluxPipeline.download(name, use_safetensors=True))
    except LOADING_ERRORS as error:
        raise _in_one_line(name, error) from error


def _in_one_line(name: str, error: Exception) -> ValueError:
    """What to do about an error that loading the pipeline `name` ended in."""
    advice = None if Path(name).is_dir() else _hub_advice(name, error)
    broken = f"cannot be loaded ({error}); if files are missing or cut short, save or download it again"
    return ValueError(f"{name}: {advice or broken}")


def _is_hub_id(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return "/" in name


def _check_tokenizers(folder: Path) -> None:
    """OSError if the pipeline's `folder` lacks a vocabulary: transformers would make a tokenizer without any words."""
    for part in ("tokenizer", "tokenizer_2"):
        files = [folder / part / file for file in ("tokenizer.json", "vocab.json", "spiece.model")]
        if folder.is_dir() and not any(file.is_file() for file in files):
            raise OSError(f"no vocabulary in {part}")


def _hub_advice(name: str, error: Exception) -> str | None:
    """What to do about an error of the hub, or None if the hub is not to blame."""
    causes = _causes(error)  # diffusers wraps the hub's errors in its own

    def has(*kinds: type) -> bool:
        return any(isinstance(cause, kinds) for cause in causes)

    if has(GatedRepoError):
        return f"access is gated; accept its licence at https://huggingface.co/{name}, then run `hf auth login`"
    if has(RepositoryNotFoundError):
        return "no such folder, and no such model on the hub or it is private; check the name, or run `hf auth login`"
    if has(RemoteEntryNotFoundError):
        return "the hub has it, but not as a diffusers pipeline; give one, such as black-forest-labs/FLUX.1-dev"
    for cause in causes:
        if isinstance(cause, HfHubHTTPError) and cause.response is not None:
            return f"the hub answers {cause.response.status_code}; renew your token with `hf auth login`, or try later"
    if has(LocalEntryNotFoundError, OfflineModeIsEnabled, HTTPError):
        return "no such folder, not in the local cache, and the hub cannot be reached; check the network"
    return None


def _causes(error: BaseException | None) -> list[BaseException]:
    chain = []
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__ or error.__context__
    return chain


def check_offload(offload: str | None, device: torch.device) -> None:
    """ValueError unless `offload` (see place) is known and there is a device to bring the parts to."""
    if offload is not None and offload not in OFFLOADS:
        raise ValueError(f"--offload {offload}: expected one of {', '.join(OFFLOADS)}")
    if offload is not None and device.type == "cpu":
        raise ValueError("--offload needs a GPU to bring the parts to")


def draw_in_less(offload: str | None, device: torch.device, *flags: str) -> str:
    """Which flag makes a pipeline draw in less memory: another way to offload it, or a smaller value of `flags`."""
    ways = {None: "--offload", "model": "--offload sequential"}
    choices = [ways[offload]] if offload in ways and device.type != "cpu" else []
    return f"try {' or '.join([*choices, *(f'a smaller {flag}' for flag in flags)])}"


def place(pipe: FluxPipeline, device: torch.device, offload: str | None = None) -> None:
    """Put the pipeline where it computes; to be called again when it got another transformer.

    offload None: all of it on `device`. "model": each component comes when it is needed and goes for the next
    (diffusers' model offloading; the most that is there at once is T5, 9.5 GB). "sequential": text encoders, and a
    transformer that takes more than half of the device, stream layer by layer (diffusers' group offloading); a packed
    transformer and the autoencoder take turns.
    """
    if offload is None:
        pipe.to(device)
    elif offload == "model":
        pipe.remove_all_hooks()
        pipe.enable_model_cpu_offload(device=device)
    else:
        for name, part in pipe.components.items():
            if not isinstance(part, nn.Module) or _is_group_offload_enabled(part):
                continue
            large = sum(p.nbytes for p in part.parameters()) > _device_bytes(device) / 2
            if name.startswith("text_encoder") or large:
                # Streams pay where a part runs step after step: they want its memory pinned, which takes a while.
                stream = stream_settings(part, device) if large else {}
                apply_group_offloading(part, onload_device=device, offload_type="leaf_level", **stream)
        _bring(pipe, "transformer")


def stream_settings(part: nn.Module, device: torch.device) -> dict[str, bool]:
    """How group offloading brings a part that runs step after step: in a CUDA stream of its own, from pinned memory.

    It is pinned once if the host has room; if not, each layer is every time, which takes longer than bringing it.
    """
    if device.type != "cuda":
        return {}
    pinned = PINNED * sum(parameter.nbytes for parameter in part.parameters())
    return {"use_stream": True, "low_cpu_mem_usage": psutil.virtual_memory().available < pinned}


def _bring(pipe: FluxPipeline, name: str) -> None:
    """Where parts stream, the others take turns on the device: `name` comes, and what stands there goes."""
    parts = {other: part for other, part in pipe.components.items() if isinstance(part, nn.Module)}
    whole = {other: part for other, part in parts.items() if not _is_group_offload_enabled(part)}
    if len(whole) < len(parts):
        device = pipe._execution_device
        for other, part in whole.items():
            if other != name:
                part.to("cpu")
        empty_cache(device)  # what one part computed in is not what fits the other
        if name in whole:
            whole[name].to(device)


def stop_streaming(part: nn.Module) -> None:
    """Take group offloading's hooks off a component, and the component to the CPU."""
    if _is_group_offload_enabled(part):
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # a layer may still be on its way in a stream of its own
        registry = HookRegistry.check_if_exists_or_initialize(part)
        for name in ("group_offloading", "layer_execution_tracker", "lazy_prefetch_group_offloading"):
            registry.remove_hook(name, recurse=True)
        gc.collect()  # hooks and what they hold refer to each other
    part.to("cpu")


def unplace(pipe: FluxPipeline) -> None:
    """Undo `place`: the whole pipeline on the CPU, as it was loaded."""
    pipe.remove_all_hooks()
    for part in pipe.components.values():
        if isinstance(part, nn.Module):
            stop_streaming(part)


def drop_transformer(pipe: FluxPipeline) -> None:
    """Take the transformer out and free its memory: two of them at once would not fit on every card."""
    device = pipe._execution_device
    pipe.remove_all_hooks()  # of "model"; they hold the transformer
    pipe.transformer = None
    gc.collect()
    empty_cache(device)


def _device_bytes(device: torch.device) -> float:
    """The memory of the device; of one that does not tell, infinity."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else float("inf")


def native_size(pipe: FluxPipeline) -> int:
    """The picture size in pixels that the autoencoder was made for."""
    return pipe.vae.config.sample_size


def text_length(pipe: FluxPipeline) -> int:
    """The number of T5 tokens a prompt is cut or padded to."""
    return min(512, pipe.tokenizer_2.model_max_length) if pipe.tokenizer_2 is not None else 512


def initial_noise(pipe: FluxPipeline, seeds: Sequence[int], size: int, dtype: torch.dtype) -> Tensor:
    """What sampling starts from, packed [N, L, C] on the CPU: row i drawn on the CPU from seeds[i], whatever the device
    and the batch size."""
    side = 2 * (size // (pipe.vae_scale_factor * 2))
    channels = pipe.transformer.config.in_channels // 4
    noise = [
        torch.randn(1, channels, side, side, generator=torch.Generator().manual_seed(seed), dtype=dtype)
        for seed in seeds
    ]
    return FluxPipeline._pack_latents(torch.cat(noise), len(seeds), channels, side, side)


@torch.no_grad()
def sample_latents(
    pipe: FluxPipeline, noise: Tensor, *, size: int, num_inference_steps: int, guidance_scale: float, **text
) -> Tensor:
    """Latents [N, L, C] that the pipeline makes of `noise` [N, L, C], on its device.

    text: prompt=list of N strings, or prompt_embeds=[N, S, D] and pooled_prompt_embeds=[N, D].
    """
    pipe.set_progress_bar_config(disable=True)
    return pipe(
        **text,
        latents=noise.to(pipe._execution_device),
        height=size,
        width=size,
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        max_sequence_length=text_length(pipe),
        output_type="latent",
    ).images


@torch.no_grad()
def decode_latents(pipe: FluxPipeline, latents: Tensor, size: int) -> Tensor:
    """The pictures [N, 3, size, size] of packed latents [N, L, C]: float32 in 0…1 on the CPU."""
    # An offloaded autoencoder rests elsewhere than it computes.
    latents = latents.to(pipe._execution_device, pipe.vae.dtype)
    latents = pipe._unpack_latents(latents, size, size, pipe.vae_scale_factor)
    latents = latents / pipe.vae.config.scaling_factor + pipe.vae.config.shift_factor
    decoded = pipe.vae.decode(latents, return_dict=False)[0]
    return pipe.image_processor.postprocess(decoded, output_type="pt").float().cpu()


@torch.no_grad()
def encode_prompts(
    pipe: FluxPipeline, prompts: Sequence[str], batch_size: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Embeddings [N, S, D] and pooled ones [N, D] of the prompts, on the CPU; `device` is the text encoders'."""
    found = []
    for start in range(0, len(prompts), batch_size):
        part = list(prompts[start : start + batch_size])
        text, pooled, _ = pipe.encode_prompt(part, None, device=device, max_sequence_length=text_length(pipe))
        found.append((text.cpu(), pooled.cpu()))
    texts, pooled = zip(*found, strict=True)
    return torch.cat(texts), torch.cat(pooled)


def generate_images(
    pipe: FluxPipeline,
    prompts: Sequence[str],
    seed: int = 42,
    *,
    num_inference_steps: int = 28,
    guidance_scale: float = 3.5,
    size: int | None = None,
    batch_size: int = 1,
    desc: str | None = None,
) -> Tensor:
    """Draw each of `prompts`: float32 pictures [N, 3, size, size] in 0…1 on the CPU.

    Picture i starts from the noise of seed + i (see initial_noise). `size` defaults to what the autoencoder was made
    for. `desc` shows a progress bar under that name. All texts are encoded first and all pictures decoded last, so that
    an offloaded part comes once.
    """
    size = size or native_size(pipe)
    parts = [slice(start, min(start + batch_size, len(prompts))) for start in range(0, len(prompts), batch_size)]
    device, latents, images = pipe._execution_device, [], []
    texts, pooled = encode_prompts(pipe, prompts, batch_size, device)
    _bring(pipe, "transformer")
    with tqdm(total=len(prompts), desc=desc, unit="image", disable=desc is None) as bar:
        for part in parts:
            noise = initial_noise(pipe, range(seed + part.start, seed + part.stop), size, pipe.transformer.dtype)
            found = sample_latents(
                pipe, noise, size=size, num_inference_steps=num_inference_steps, guidance_scale=guidance_scale,
                prompt_embeds=texts[part].to(device), pooled_prompt_embeds=pooled[part].to(device),
            )  # fmt: skip
            latents.append(found.cpu())
            bar.update(part.stop - part.start)
    _bring(pipe, "vae")
    for found in latents:
        images.append(decode_latents(pipe, found, size))
    _bring(pipe, "transformer")
    return torch.cat(images)


@contextmanager
def record_velocities(transformer: nn.Module) -> Iterator[list[tuple[dict, Tensor]]]:
    """Within the block, keep every call of `transformer`: a list of (keyword arguments, velocity [B, L, C])."""
    calls: list[tuple[dict, Tensor]] = []
    hook = transformer.register_forward_hook(
        lambda module, args, kwargs, output: calls.append((kwargs, output[0])), with_kwargs=True
    )
    try:
        yield calls
    finally:
        hook.remove()


@contextmanager
def record_inputs(transformer: nn.Module, wanted: Callable[[int], bool]) -> Iterator[list[dict]]:
    """Within the block, keep the keyword arguments of those calls of `transformer` whose number is wanted, on the CPU.

    A tensor that stands in several calls in a row, such as a text embedding, is kept once.
    """
    calls: list[dict] = []
    moved: dict[str, tuple[Tensor, Tensor]] = {}  # the last one under each name, and where it went
    numbers = itertools.count()

    def keep(module, args, kwargs):
        if not wanted(next(numbers)):
            return
        for name, value in kwargs.items():
            if isinstance(value, Tensor) and (name not in moved or moved[name][0] is not value):
                moved[name] = value, value.cpu()
        calls.append({name: moved[name][1] if isinstance(value, Tensor) else value for name, value in kwargs.items()})

    hook = transformer.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        yield calls
    finally:
        hook.remove()


def set_attention(name: str, model: ModelMixin | None = None) -> None:
    """Let `model`, and no other, compute attention by the backend that diffusers knows as `name`.

    ValueError if there is none of that name or it is not installed; without a model, that is all.
    """
    logger = logging.getLogger("diffusers.models.modeling_utils")
    logger.disabled = True  # it warns of an interface that may change
    try:
        (ModelMixin() if model is None else model).set_attention_backend(name)
    except (RuntimeError, ValueError, ImportError, OSError) as error:
        raise ValueError(f"--attention {name}: {' '.join(str(error).split())}") from None
    finally:
        ModelMixin().set_attention_backend("native")  # diffusers makes it the one of every model
        logger.disabled = False
