"""What every script needs: pipelines, prompts and checkpoints, pictures and grids, devices and one-line errors."""

import json
import logging
import os
import queue
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers import FluxPipeline
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
from PIL import Image, ImageDraw, ImageFont
from safetensors import SafetensorError
from torch import Tensor
from tqdm import tqdm

from models.modeling_flux_quant import FluxTransformer2DModel
from models.utils_quant import FULL_PRECISION_BITS
from utils import prompt_list, scenes

ROOT = Path(__file__).parents[1]

# ---------------------------------------------------------------------------------------------------- scripts


def get_logger(name: str) -> logging.Logger:
    """A logger that prints "[name] message" lines."""
    logger = logging.getLogger(name)
    if not logger.handlers:
        handler = logging.StreamHandler(sys.stdout)
        handler.setFormatter(logging.Formatter("[%(name)s] %(message)s"))
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        logger.propagate = False
    return logger


def run_script(main: Callable[[], None]) -> None:
    """Call `main`; ValueError, OSError and SafetensorError, which name their cause, end in one line and status 1.

    With TRACEBACK=1 in the environment they are raised as usual. At the end a process that torchrun started leaves its
    group, whose threads could otherwise outlive the interpreter and abort it, and torchrun would then end the other
    ranks, whatever they are writing. Not after an error: leaving may wait for a rank that is in a collective.
    """
    try:
        main()
    except (ValueError, OSError, SafetensorError) as error:
        if os.environ.get("TRACEBACK"):
            raise
        print(f"{Path(sys.argv[0]).name}: error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(1)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def run_logged(words: Sequence[object], log: Path, environment: Mapping[str, str] | None = None) -> None:
    """Run one of the repository's scripts (words: file name and flags, or what starts it), its output added to `log`.

    `environment` adds variables (see spread). Raises ValueError, with the last line of the output, if it fails.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as output:
        command = [sys.executable, *map(str, words)]
        variables = {**os.environ, **(environment or {})}
        status = subprocess.run(command, cwd=ROOT, env=variables, stdout=output, stderr=subprocess.STDOUT).returncode
    if status:
        lines = log.read_text().splitlines()
        script = next(word for word in words if str(word).endswith(".py"))
        raise ValueError(f"{script} failed, see {log}: {lines[-1] if lines else 'no output'}")


def visible_gpus() -> list[str]:
    """What to put into CUDA_VISIBLE_DEVICES for each GPU that this process may use."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",") if named else [str(number) for number in range(torch.cuda.device_count())]


def spread(work: Callable[[object, dict[str, str]], object], items: Sequence[object], parallel: int) -> list:
    """[work(item, environment) for every item], `parallel` at a time on each GPU (without one: at all).

    `environment` holds the variables by which what `work` starts sees one GPU and takes its share of the cores.
    """
    slots = (visible_gpus() or [None]) * parallel
    # were each to start a thread per core, the CPU's part (grading, SSIM) would crawl
    share = (os.cpu_count() or 1) // max(1, min(len(slots), len(items)))
    threads = os.environ.get("OMP_NUM_THREADS", str(max(1, share)))
    free: queue.Queue[dict[str, str]] = queue.Queue()
    for gpu in slots:
        free.put({"OMP_NUM_THREADS": threads} | ({} if gpu is None else {"CUDA_VISIBLE_DEVICES": gpu}))

    def one(item: object) -> object:
        environment = free.get()
        try:
            return work(item, environment)
        finally:
            free.put(environment)

    with ThreadPoolExecutor(len(slots)) as pool:
        return list(pool.map(one, items))


def pick_device(name: str | None = None) -> torch.device:
    """The device called `name`, else cuda if there is one, else mps, else cpu.

    Raises ValueError if this machine has no such device.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    here = ["cuda"] * (gpus > 0) + ["mps"] * torch.backends.mps.is_available() + ["cpu"]
    if name is None:
        return torch.device(here[0])
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in here or (device.type == "cuda" and (device.index or 0) >= gpus):
        raise ValueError(f"--device {name} is not available here: use one of {', '.join(here)}")
    return device


def device_name(device: torch.device) -> str:
    """For the records, such as "NVIDIA H100 80GB HBM3" or "2 CPU cores"."""
    return torch.cuda.get_device_name() if device.type == "cuda" else f"{os.cpu_count()} CPU cores"


def empty_cache(device: torch.device) -> None:
    """Give memory that nothing uses any more back to the device."""
    if device.type in ("cuda", "mps"):
        getattr(torch, device.type).empty_cache()


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A folder to write into that takes the place of `folder` when the block is through, and not before."""
    partial = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def check_disk(folder: Path, needed: int, what: str) -> None:
    """ValueError unless the disk that will hold `folder` has `needed` bytes free."""
    parent = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise ValueError(
            f"{folder}: {what} takes {needed / 1e9:.1f} GB but only {free / 1e9:.1f} GB are free; "
            "make room or choose another folder"
        )


# ------------------------------------------------------------------------------------------ pipelines and prompts


def load_pipeline(name: str, dtype: torch.dtype) -> FluxPipeline:
    """The FLUX pipeline `name`, a folder or a hub id, on the CPU.

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
            return FluxPipeline.from_pretrained(name, dtype=dtype, use_safetensors=True)
    except (OSError, ValueError, RuntimeError, SafetensorError, HTTPError) as error:
        advice = None if folder.is_dir() else _hub_advice(name, error)
        broken = f"cannot be loaded ({error}); if files are missing or cut short, save or download it again"
        raise ValueError(f"{name}: {advice or broken}") from error
    raise ValueError(f"{name}: expected a FluxPipeline, found a {kind}; give a FLUX text-to-image pipeline")


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


def load_quantized_model(
    model_args, training_args, cache_dir: Path | None = None, w_bits: int = 16, dtype: torch.dtype | None = None
) -> FluxTransformer2DModel:
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
    if device.type == "cuda":  # straight to the card, where finding the step sizes takes seconds, not minutes
        settings["device_map"] = str(device)
    if cache_dir is not None and (Path(cache_dir) / "config.json").is_file():
        return FluxTransformer2DModel.from_pretrained(cache_dir, **settings)
    return FluxTransformer2DModel.from_pretrained(model_args.input_model_filename, subfolder="transformer", **settings)


def load_student(folder: Path, dtype: torch.dtype, w_bits: int | None = None) -> FluxTransformer2DModel:
    """The quantized transformer in `folder`, packed for inference if it is not yet, computing in `dtype`.

    Codes are found from the weights as they are stored. Rounded to bfloat16 before, those beside a threshold would
    fall on its other side, and training leaves many there. Raises ValueError for a full-precision transformer or, if
    `w_bits` is given, one of other bits, and what from_pretrained does.
    """
    settings = {} if w_bits is None else {"w_bits": w_bits}
    if check_quantized(folder, w_bits).get("packed"):
        return FluxTransformer2DModel.from_pretrained(folder, dtype=dtype, **settings)
    student = FluxTransformer2DModel.from_pretrained(folder, dtype=torch.float32, **settings).pack()
    return torch.nn.Module.to(student, dtype)  # diffusers' own warns of the step sizes, which stay in fp32 anyway


def pick_dtype(training_args, device: torch.device) -> torch.dtype:
    """bfloat16 with --bf16, float16 with --fp16; with neither, bfloat16 on CUDA and float32 elsewhere."""
    if training_args.fp16:
        return torch.float16
    return torch.bfloat16 if training_args.bf16 or device.type == "cuda" else torch.float32


def native_size(pipe: FluxPipeline) -> int:
    """The picture size in pixels that the autoencoder was made for."""
    return pipe.vae.config.sample_size


def pick_prompts(pipe: FluxPipeline, count: int, file: str | None = None, split: str = "eval") -> tuple[list[str], str]:
    """`count` prompts for `pipe`, and where they come from in words.

    The lines of `file` if given (all of them if there are fewer), else the set of this split, "eval" or "train", that
    suits the model: drawn scenes for a model made for 128 pixels such as tiny-flux, the prompts of prompt_list.py for
    FLUX. Raises ValueError if there are too few or the file is empty or unreadable.
    """
    if file is not None:
        flag = "--train_prompts" if split == "train" else "--prompts"
        try:
            lines = [line.strip() for line in Path(file).read_text(encoding="utf-8-sig").splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{flag} {file}: cannot be read as UTF-8 text ({error})") from error
        if not lines:
            raise ValueError(f"{flag} {file}: no prompts in it; write one a line")
        return lines[:count], file
    world = scenes if native_size(pipe) == scenes.SIZE else prompt_list
    kind = "scenes" if world is scenes else "prompts"
    if split == "train":
        return world.train_prompts(count), f"training {kind} of {world.__name__.replace('.', '/')}.py"
    return world.eval_prompts(count), f"evaluation {kind} of {world.__name__.replace('.', '/')}.py"


# ---------------------------------------------------------------------------------------------------- checkpoints


SHAPE = (
    "in_channels", "num_layers", "num_single_layers", "num_attention_heads", "attention_head_dim",
    "joint_attention_dim", "pooled_projection_dim", "guidance_embeds",
)  # fmt: skip


def bits_name(w_bits: int) -> str:
    """A bit width in words."""
    return "1.58 bit" if w_bits == 0 else f"{w_bits} bit"


def transformer_folder(checkpoint: Path) -> Path:
    """The transformer's folder in a checkpoint that is one or a pipeline that has one; ValueError if neither."""
    for folder in (checkpoint, checkpoint / "transformer"):
        if (folder / "config.json").is_file():
            return folder
    raise ValueError(f"{checkpoint}: neither a transformer nor a pipeline (no config.json there); check the path")


def check_quantized(folder: Path, w_bits: int | None = None) -> dict:
    """config.json of the transformer in `folder`; ValueError if it is full-precision: loading would quantize it on the
    spot. `w_bits`: what was asked for, if anything was."""
    try:
        config = json.loads((folder / "config.json").read_text())
        found = config.get("w_bits", FULL_PRECISION_BITS)
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(f"{folder / 'config.json'}: cannot be read ({error}); save it again") from None
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
        if config.get(name) != teacher.config[name]:
            raise ValueError(
                f"{checkpoint}: {name}={config.get(name)}, but {name}={teacher.config[name]} in {model}; "
                f"name the checkpoint's teacher with {flag}"
            )


# ------------------------------------------------------------------------------------------------------ pictures


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
        latents=noise.to(pipe.device),
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
    latents = pipe._unpack_latents(latents, size, size, pipe.vae_scale_factor).to(pipe.vae.device, pipe.vae.dtype)
    latents = latents / pipe.vae.config.scaling_factor + pipe.vae.config.shift_factor
    decoded = pipe.vae.decode(latents, return_dict=False)[0]
    return pipe.image_processor.postprocess(decoded, output_type="pt").float().cpu()


def text_length(pipe: FluxPipeline) -> int:
    """The number of T5 tokens a prompt is cut or padded to."""
    return min(512, pipe.tokenizer_2.model_max_length) if pipe.tokenizer_2 is not None else 512


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
    for. `desc` shows a progress bar under that name.
    """
    size = size or native_size(pipe)
    images = []
    with tqdm(total=len(prompts), desc=desc, unit="image", disable=desc is None) as bar:
        for start in range(0, len(prompts), batch_size):
            batch = list(prompts[start : start + batch_size])
            seeds = range(seed + start, seed + start + len(batch))
            latents = sample_latents(
                pipe,
                initial_noise(pipe, seeds, size, pipe.transformer.dtype),
                prompt=batch,
                size=size,
                num_inference_steps=num_inference_steps,
                guidance_scale=guidance_scale,
            )
            images.append(decode_latents(pipe, latents, size))
            bar.update(len(batch))
    return torch.cat(images)


@contextmanager
def record_velocities(transformer: torch.nn.Module) -> Iterator[list[tuple[dict, Tensor]]]:
    """Within the block, keep every call of `transformer`: a list of (keyword arguments, velocity [B, L, C])."""
    calls: list[tuple[dict, Tensor]] = []
    hook = transformer.register_forward_hook(
        lambda module, args, kwargs, output: calls.append((kwargs, output[0])), with_kwargs=True
    )
    try:
        yield calls
    finally:
        hook.remove()


def to_pil(image: Tensor) -> Image.Image:
    """A picture [3, H, W] in 0…1 as a PIL image."""
    return Image.fromarray((image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).contiguous().numpy())


def save_images(images: Tensor, folder: Path) -> None:
    """Write pictures [N, 3, H, W] as folder/sample_000.png, sample_001.png, …; older samples there are removed."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("sample_*.png"):
        old.unlink()
    for index, image in enumerate(images):
        to_pil(image).save(folder / f"sample_{index:03d}.png")


def save_grid(rows: dict[str, Tensor], columns: Sequence[str], file: Path, cell: int = 256) -> None:
    """One labelled picture: a row of pictures [N, 3, H, W] for each entry of `rows`, under a title for each column.

    Pictures are shown at most `cell` pixels wide.
    """
    height, width = next(iter(rows.values())).shape[-2:]
    scale = min(1.0, cell / max(height, width))
    height, width = round(height * scale), round(width * scale)
    font = ImageFont.load_default(size=max(11, width // 11))
    letter = font.getlength("n")
    titles = [textwrap.fill(text, max(8, int(width / letter)), max_lines=4, placeholder=" …") for text in columns]
    line = font.getbbox("Ag")[3] + 3
    top = 8 + line * max(title.count("\n") + 1 for title in titles)
    names = [textwrap.fill(name, 18, max_lines=6, placeholder=" …") for name in rows]
    left = 16 + round(max(font.getlength(part) for name in names for part in name.split("\n")))
    grid = Image.new("RGB", (left + (width + 4) * len(columns), top + (height + 4) * len(rows)), "white")
    draw = ImageDraw.Draw(grid)
    for x, title in enumerate(titles):
        draw.multiline_text((left + x * (width + 4), 4), title, fill="black", font=font, spacing=3)
    for y, (name, images) in enumerate(zip(names, rows.values(), strict=True)):
        row_top = top + y * (height + 4)
        draw.multiline_text((8, row_top + height // 2), name, fill="black", font=font, spacing=3, anchor="lm")
        for x, image in enumerate(images):
            grid.paste(to_pil(image).resize((width, height)), (left + x * (width + 4), row_top))
    file.parent.mkdir(parents=True, exist_ok=True)
    grid.save(file)
