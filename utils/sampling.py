"""Pipelines: loading one, what it starts from, the pictures that it draws, and what its transformer does meanwhile."""

import gc
import itertools
import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil
import torch
from diffusers import DiffusionPipeline, ModelMixin
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

from models import fp8_attention
from utils.pipelines import Family, family_called, family_of, sampling_settings
from utils.utils import empty_cache

LOADING_ERRORS = (OSError, ValueError, RuntimeError, SafetensorError, HTTPError)
OFFLOADS = ("model", "sequential")
PINNED = 2  # bytes of pinned memory a byte at most: torch takes powers of two


def pipeline_family(name: str) -> Family:
    """Which of the families that are taken the pipeline `name` is of, a folder or a hub id, from its model_index.json.

    Raises ValueError, in one line that says what to do, if there is none, access is missing or it is another pipeline.
    """
    folder = Path(name)
    if not folder.is_dir() and (folder.is_file() or not _is_hub_id(name)):
        raise ValueError(f"{name}: neither a folder nor a hub id (owner/model); check the path")
    try:
        kind = DiffusionPipeline.load_config(name).get("_class_name")
    except LOADING_ERRORS as error:
        raise _in_one_line(name, error) from error
    return family_called(kind, name)


def load_pipeline(name: str, dtype: torch.dtype, **parts: object) -> DiffusionPipeline:
    """The pipeline `name` of FLUX.1 or FLUX.2-klein, a folder or a hub id, on the CPU.

    parts: components that take the place of its own, whose files are neither read nor downloaded; None for without.
    Raises ValueError, in one line that says what to do, as pipeline_family does and if its files are incomplete.
    """
    family = pipeline_family(name)
    try:
        _check_tokenizers(family, Path(name))
        return family.pipeline.from_pretrained(name, dtype=dtype, use_safetensors=True, **parts)
    except LOADING_ERRORS as error:
        raise _in_one_line(name, error) from error


def with_transformer(pipe: DiffusionPipeline, transformer: nn.Module) -> DiffusionPipeline:
    """Another pipeline of the same parts with this transformer in it."""
    settings = {name: pipe.config[name] for name in family_of(pipe).settings}
    return type(pipe)(**{**pipe.components, "transformer": transformer}, **settings)


def pipeline_folder(name: str) -> Path:
    """Where the files of the pipeline `name` lie: the folder itself, or the hub's snapshot, downloaded as far as it is
    not. Raises ValueError as load_pipeline does."""
    if Path(name).is_dir():
        return Path(name)
    try:
        return Path(DiffusionPipeline.download(name, use_safetensors=True))
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


def _check_tokenizers(family: Family, folder: Path) -> None:
    """OSError if the pipeline's `folder` lacks a vocabulary: transformers would make a tokenizer without any words."""
    for part in family.tokenizers:
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


def place(pipe: DiffusionPipeline, device: torch.device, offload: str | None = None) -> None:
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


def _bring(pipe: DiffusionPipeline, name: str) -> None:
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


def unplace(pipe: DiffusionPipeline) -> None:
    """Undo `place`: the whole pipeline on the CPU, as it was loaded."""
    pipe.remove_all_hooks()
    for part in pipe.components.values():
        if isinstance(part, nn.Module):
            stop_streaming(part)


def drop_transformer(pipe: DiffusionPipeline) -> None:
    """Take the transformer out and free its memory: two of them at once would not fit on every card."""
    device = pipe._execution_device
    pipe.remove_all_hooks()  # of "model"; they hold the transformer
    pipe.transformer = None
    gc.collect()
    empty_cache(device)


def _device_bytes(device: torch.device) -> float:
    """The memory of the device; of one that does not tell, infinity."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else float("inf")


def native_size(pipe: DiffusionPipeline) -> int:
    """The picture size in pixels that the autoencoder was made for."""
    return pipe.vae.config.sample_size


def initial_noise(pipe: DiffusionPipeline, seeds: Sequence[int], size: int, dtype: torch.dtype) -> Tensor:
    """What sampling starts from, packed [N, L, C] on the CPU: row i drawn on the CPU from seeds[i], whatever the device
    and the batch size."""
    side = size // (pipe.vae_scale_factor * 2)
    return torch.cat([family_of(pipe).noise(pipe, seed, side, dtype) for seed in seeds])


@torch.no_grad()
def sample_latents(
    pipe: DiffusionPipeline, noise: Tensor, *, size: int, num_inference_steps: int, guidance_scale: float, **text
) -> Tensor:
    """Latents [N, L, C] that the pipeline makes of `noise` [N, L, C], on its device.

    text: prompt=list of N strings, or what encode_prompts returns for this guidance.
    """
    pipe.set_progress_bar_config(disable=True)
    family, device = family_of(pipe), pipe._execution_device
    return family.draw(
        pipe, noise.to(device), guidance_scale, height=size, width=size, num_inference_steps=num_inference_steps,
        max_sequence_length=family.text_length(pipe), **_moved(text, device),
    )  # fmt: skip


def _moved(text: dict, device: torch.device) -> dict:
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in text.items()}


@torch.no_grad()
def decode_latents(pipe: DiffusionPipeline, latents: Tensor, size: int) -> Tensor:
    """The pictures [N, 3, size, size] of packed latents [N, L, C]: float32 in 0…1 on the CPU."""
    # An offloaded autoencoder rests elsewhere than it computes.
    latents = latents.to(pipe._execution_device, pipe.vae.dtype)
    decoded = pipe.vae.decode(family_of(pipe).unpack(pipe, latents, size), return_dict=False)[0]
    return pipe.image_processor.postprocess(decoded, output_type="pt").float().cpu()


@torch.no_grad()
def encode_prompts(
    pipe: DiffusionPipeline, prompts: Sequence[str], batch_size: int, device: torch.device, guidance_scale: float
) -> dict[str, Tensor]:
    """The text of N prompts, {name: [N, …]} on the CPU, `batch_size` at a time: arguments to call the pipeline with at
    this guidance. `device` is the text encoders'."""
    family = family_of(pipe)
    parts = [list(prompts[start : start + batch_size]) for start in range(0, len(prompts), batch_size)]
    found = [family.encode(pipe, part, device) for part in parts]
    text = {name: torch.cat([part[name] for part in found]) for name in found[0]}
    none = family.encode_none(pipe, device, guidance_scale)
    return text | {name: row.expand(len(prompts), *row.shape[1:]) for name, row in none.items()}


def generate_images(
    pipe: DiffusionPipeline,
    prompts: Sequence[str],
    seed: int = 42,
    *,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    size: int | None = None,
    batch_size: int = 1,
    desc: str | None = None,
) -> Tensor:
    """Draw each of `prompts`: float32 pictures [N, 3, size, size] in 0…1 on the CPU.

    Picture i starts from the noise of seed + i (see initial_noise). `size` defaults to what the autoencoder was made
    for, steps and guidance to the family's. `desc` shows a progress bar under that name. All texts are encoded first
    and all pictures decoded last, so that an offloaded part comes once.
    """
    size = size or native_size(pipe)
    parts = [slice(start, min(start + batch_size, len(prompts))) for start in range(0, len(prompts), batch_size)]
    device, latents, images = pipe._execution_device, [], []
    steps, guidance = sampling_settings(pipe, num_inference_steps, guidance_scale)
    text = encode_prompts(pipe, prompts, batch_size, device, guidance)
    _bring(pipe, "transformer")
    with tqdm(total=len(prompts), desc=desc, unit="image", disable=desc is None) as bar:
        for part in parts:
            noise = initial_noise(pipe, range(seed + part.start, seed + part.stop), size, pipe.transformer.dtype)
            rows = {name: embeds[part] for name, embeds in text.items()}
            found = sample_latents(
                pipe, noise, size=size, num_inference_steps=steps, guidance_scale=guidance, **rows
            )
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

    A tensor that stands in several calls in a row, or in every other one, such as a text embedding, is kept once.
    """
    calls: list[dict] = []
    moved: dict[str, deque[tuple[Tensor, Tensor]]] = {}  # the last two under each name, and where they went
    numbers = itertools.count()

    def moved_once(name: str, value: object) -> object:
        if not isinstance(value, Tensor):
            return value
        last = moved.setdefault(name, deque(maxlen=2))
        if not any(there is value for there, _ in last):
            last.append((value, value.cpu()))
        return next(copy for there, copy in last if there is value)

    def keep(module, args, kwargs):
        if not wanted(next(numbers)):
            return
        calls.append({name: moved_once(name, value) for name, value in kwargs.items()})

    hook = transformer.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        yield calls
    finally:
        hook.remove()


def set_attention(name: str, model: ModelMixin | None = None, modes: Sequence[str] = ("fast",)) -> None:
    """Let `model`, and no other, compute attention by the backend that diffusers knows as `name`; fp8: by our own.

    ValueError if there is none of that name, it is not installed or for none of these inference modes; without a
    model, that is all.
    """
    if name == fp8_attention.NAME:
        if "fast" not in modes:
            raise ValueError(f"--attention {name} is fast mode's: add --mode fast")
        try:
            return fp8_attention.choose(model)
        except ValueError as error:
            raise ValueError(f"--attention {name}: {error}") from None
    logger = logging.getLogger("diffusers.models.modeling_utils")
    logger.disabled = True  # it warns of an interface that may change
    try:
        (ModelMixin() if model is None else model).set_attention_backend(name)
    except (RuntimeError, ValueError, ImportError, OSError) as error:
        raise ValueError(f"--attention {name}: {' '.join(str(error).split())}") from None
    finally:
        ModelMixin().set_attention_backend("native")  # diffusers makes it the one of every model
        logger.disabled = False
