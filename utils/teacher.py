"""The teacher: a full-precision FLUX pipeline that is known from its files and loaded only where something is to be
drawn.

What the trajectories of a teacher depend on (see Teacher.describe) is read from configurations and from a few values
of each tensor, in about a second for FLUX.1-dev's 33 GB. Text encoders and transformer are never on the device
together: prompts are encoded first, then the encoders make room.

A teacher that is guided by two calls of its transformer a step (FLUX.2-klein's base model) has both calls kept, and the
student learns both. It could learn the guided velocity in one call instead, and would draw twice as fast; but it would
be another model then, for one guidance only. This one takes the teacher's place in every pipeline, at any guidance and
with adapters made for the teacher. What it costs is twice the velocities on disk: the text is the larger part.
"""

import gc
import hashlib
import inspect
import itertools
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import diffusers
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from utils.pipelines import Family, steps_taken
from utils.sampling import (
    encode_prompts,
    initial_noise,
    load_pipeline,
    pipeline_family,
    pipeline_folder,
    sample_latents,
)
from utils.utils import empty_cache

Trajectory = dict[str, Tensor]
Text = dict[str, Tensor]  # of a prompt, without the batch dimension: arguments of the pipeline


@dataclass(frozen=True)
class TeacherSettings:
    """What is asked of the teacher, besides prompts and their noise."""

    resolution: int
    num_inference_steps: int
    guidance_scale: float


def prompt_seeds(prompts: Sequence[str], seed: int) -> list[int]:
    """A noise seed for each prompt, from `seed`, the prompt and how often it came before: the same wherever it stands.

    Numbers of 32 bits, all that torch's generator on the CPU looks at, the highest of them set: seeds that are counted
    up from a small one do not reach them.
    """
    seen: Counter[str] = Counter()
    seeds = []
    for prompt in prompts:
        digest = hashlib.sha256(json.dumps([seed, prompt, seen[prompt]]).encode()).hexdigest()
        seeds.append(1 << 31 | int(digest[:8], 16))
        seen[prompt] += 1
    return seeds


# ------------------------------------------------------------------------------------------------ what the files say


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of one model of a pipeline, a single one or the shards of its index.

    Raises ValueError if there are none.
    """
    for stem in ("diffusion_pytorch_model", "model"):
        single, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
        if index.is_file():
            try:
                shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
                raise ValueError(f"{index}: cannot be read ({error}); save or download the pipeline again") from None
            return [folder / shard for shard in sorted(shards)]
        if single.is_file():
            return [single]
    raise ValueError(f"{folder}: no safetensors weights there; save or download the pipeline again")


def large_parts(family: Family) -> tuple[str, ...]:
    """What of a pipeline is large, and decides what is drawn: transformer and text encoders."""
    return ("transformer", *family.text_encoders)


def fingerprint(folder: Path, dtype: torch.dtype) -> str:
    """SHA-256 over names, shapes and eight values, rounded to `dtype`, of every tensor of a pipeline's text encoders
    and transformer; how they are spread over files does not matter.

    Reads a few pages of each file. Raises ValueError if one is missing or cut short.
    """
    lines = []
    for part in large_parts(pipeline_family(str(folder))):
        for path in weight_files(folder / part):
            try:
                with safe_open(path, framework="pt") as file:
                    floats = [name for name in file.keys() if "F" in file.get_slice(name).get_dtype()]  # noqa: SIM118
                    lines += [f"{part}.{name} {_few_values(file, name, dtype)}" for name in floats]
            except (OSError, SafetensorError) as error:
                raise ValueError(f"{path}: cannot be read ({error}); save or download the pipeline again") from None
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


def _few_values(file: safe_open, name: str, dtype: torch.dtype) -> tuple[list[int], list[float]]:
    """The shape of a tensor, and eight of its values at even distances."""
    tensor = file.get_slice(name)
    shape = tensor.get_shape()
    if not shape:
        return shape, [file.get_tensor(name).to(dtype).item()]
    size = torch.Size(shape).numel()
    values = []
    for flat in range(0, size, max(1, size // 8))[:8]:
        place = torch.unravel_index(torch.tensor(flat), shape)
        values.append(tensor[tuple(slice(int(i), int(i) + 1) for i in place)].to(dtype).item())
    return shape, values


def transformer_config(folder: Path) -> dict:
    """The configuration of a pipeline's transformer, with diffusers' defaults for what is not in it."""
    kind = getattr(diffusers, pipeline_family(str(folder)).transformer.__name__)
    parameters = inspect.signature(kind.__init__).parameters.values()
    defaults = {parameter.name: parameter.default for parameter in parameters if parameter.name != "self"}
    return defaults | kind.load_config(folder, subfolder="transformer")


class Teacher:
    """The pipeline `name`, a folder or a hub id, in `dtype`.

    family    of the pipeline
    parts     those of large_parts
    pipe      at first its autoencoder, scheduler and tokenizers alone; see load
    config    the transformer's
    Raises ValueError as load_pipeline does.
    """

    def __init__(self, name: str, dtype: torch.dtype):
        self.name, self.dtype, self.family = name, dtype, pipeline_family(name)
        self.parts = large_parts(self.family)
        self.pipe = load_pipeline(name, dtype, **dict.fromkeys(self.parts))
        self.folder = pipeline_folder(name)
        self.config = transformer_config(self.folder)

    @cached_property
    def weights(self) -> str:
        return fingerprint(self.folder, self.dtype)

    def describe(self, settings: TeacherSettings) -> dict:
        """All that a trajectory depends on besides its prompt, its noise's seed and the last bits of the arithmetic,
        and its shapes; JSON-able."""
        side = settings.resolution // (self.pipe.vae_scale_factor * 2)
        # Names that open with an underscore say where the scheduler came from, not what it does.
        scheduler = {name: value for name, value in self.pipe.scheduler.config.items() if not name.startswith("_")}
        description = {
            "model": self.name,
            "dtype": str(self.dtype).removeprefix("torch."),  # before the weights, which it changes too
            "weights": self.weights,
            **vars(settings),
            "scheduler": scheduler,
            "latents_shape": [side**2, self.config["in_channels"]],
            **self.family.describe(self.pipe, self.config, settings.guidance_scale),
        }
        return json.loads(json.dumps(description))  # as it will be read again

    # -------------------------------------------------------------------------------------------------- its models

    def load(self, *parts: str, device: torch.device) -> None:
        """Have these of its parts on `device`; those that are not loaded yet are read from their files."""
        components = self.pipe.components
        missing = [part for part in parts if components[part] is None]
        if missing:
            kept = {part: component for part, component in components.items() if part not in missing}
            self.pipe = load_pipeline(str(self.folder), self.dtype, **kept)
        for part in ("vae", *parts):  # the pipeline takes its device from the first model that it has
            getattr(self.pipe, part).to(device)

    def drop(self, *parts: str) -> None:
        """Forget these of its parts, so that their memory is free again."""
        devices = {getattr(self.pipe, part).device for part in parts if getattr(self.pipe, part) is not None}
        self.pipe.register_modules(**dict.fromkeys(parts))
        gc.collect()
        for device in devices:
            empty_cache(device)

    @torch.no_grad()
    def encode(
        self, prompts: Sequence[str], batch_size: int, device: torch.device, guidance_scale: float
    ) -> list[Text]:
        """Of each prompt, what the loaded encoders make of it for this guidance, on the CPU.

        Encoded `batch_size` at a time, the last batch filled up, so that the numbers do not depend on how many there
        are.
        """
        rows: list[Text] = []
        for batch in full_batches(prompts, batch_size):
            text = encode_prompts(self.pipe, batch, batch_size, device, guidance_scale)
            rows += [{name: embeds[i] for name, embeds in text.items()} for i in range(batch_size)]
        return rows[: len(prompts)]

    @torch.no_grad()
    def draw(self, text: Sequence[Text], seeds: Sequence[int], settings: TeacherSettings) -> "Drawn":
        """The loaded transformer's trajectories from the noise of `seeds`, for as many texts as encode returns them.

        Returns without waiting for the device: what it has done is copied to the host behind it.
        """
        pipe, steps = self.pipe, settings.num_inference_steps
        calls = self.family.calls_a_step(pipe, settings.guidance_scale)
        rows = {name: torch.stack([row[name] for row in text]) for name in text[0]}
        noise = initial_noise(pipe, seeds, settings.resolution, self.dtype)
        states, velocities = (
            torch.empty(count, *noise.shape, dtype=self.dtype, device=pipe.device) for count in (steps, calls * steps)
        )
        numbers = itertools.count()

        def keep(module, args, inputs, output):
            call = next(numbers)
            states[call // calls], velocities[call] = inputs["hidden_states"], output[0]

        hook = pipe.transformer.register_forward_hook(keep, with_kwargs=True)
        try:
            final = sample_latents(
                pipe, noise, size=settings.resolution, num_inference_steps=steps,
                guidance_scale=settings.guidance_scale, **rows,
            )  # fmt: skip
        finally:
            hook.remove()
        states = torch.cat([states, final[None]])
        sigmas, timesteps = pipe.scheduler.sigmas, pipe.scheduler.timesteps
        on_host = [_to_host(tensor) for tensor in (states, velocities, sigmas, timesteps)]
        copied = None
        if pipe.device.type == "cuda":
            copied = torch.cuda.Event()
            copied.record(torch.cuda.current_stream(pipe.device))
        guidance = settings.guidance_scale if calls == 2 else None
        return Drawn(type(pipe.scheduler).__name__, guidance, noise, *on_host, rows, copied)


def full_batches(items: Sequence, size: int) -> Iterator[list]:
    """`items`, `size` at a time, the last batch filled up with its first item."""
    for start in range(0, len(items), size):
        batch = list(items[start : start + size])
        yield batch + batch[:1] * (size - len(batch))


def _to_host(tensor: Tensor) -> Tensor:
    """A copy on the CPU; from a GPU into pinned memory, finished only when the stream gets there."""
    if tensor.device.type != "cuda":
        return tensor.cpu()
    return torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)


# ------------------------------------------------------------------------------------------------------- trajectories


def rebuild_latents(noise: Tensor, velocities: Sequence[Tensor], sigmas: Tensor) -> Iterator[Tensor]:
    """z_0, z_1 …: the noise [..., L, C], then one more for each of `velocities`, those of steps_taken; sigmas [T + 1]
    belong to the z_t.

    The arithmetic of FlowMatchEulerDiscreteScheduler to the bit: the product is rounded to the velocity's dtype, the
    sum of two such numbers is taken in float32 and rounded once.
    """
    latents = noise
    yield latents
    for velocity, change in zip(velocities, sigmas.diff(), strict=False):
        latents = latents + change * velocity
        yield latents


@dataclass
class Drawn:
    """What Teacher.draw returns of a batch: states [T + 1, B, L, C], velocities [T, B, L, C] ([2 T, …], a step's two
    calls in turns, where `guidance` is the scale by which they are combined), sigmas [T + 1] and timesteps [T], on the
    host once `copied` has happened; noise [B, L, C] and text {name: [B, …]} that they came from."""

    scheduler: str
    guidance: float | None
    noise: Tensor
    states: Tensor
    velocities: Tensor
    sigmas: Tensor
    timesteps: Tensor
    text: Text
    copied: "torch.cuda.Event | None"

    def trajectory(self, row: int) -> Trajectory:
        """Number `row` of the batch: what is kept of a trajectory (see utils/datautils.py).

        Waits for the device. Raises ValueError unless the velocities are finite and every state is rebuilt from them,
        on the CPU, bit for bit.
        """
        if self.copied is not None:
            self.copied.synchronize()
        noise, velocities = self.noise[row].clone(), self.velocities[:, row].clone()
        if not velocities.isfinite().all():
            raise ValueError(f"the teacher's velocities hold NaN or inf in {velocities.dtype}; use another dtype")
        taken = steps_taken(velocities, self.guidance)
        for state, rebuilt in zip(self.states[:, row], rebuild_latents(noise, taken, self.sigmas), strict=True):
            if not torch.equal(state, rebuilt):
                raise ValueError(
                    f"the {self.scheduler} of this pipeline takes other steps than z + (σ' − σ)·v "
                    "(stochastic_sampling?), which the teacher cache cannot rebuild; use "
                    "FlowMatchEulerDiscreteScheduler without stochastic_sampling"
                )
        return {
            "noise": noise,
            "velocities": velocities,
            "sigmas": self.sigmas,
            "timesteps": self.timesteps,
            **{name: embeds[row].clone() for name, embeds in self.text.items()},
        }
