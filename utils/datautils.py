"""The teacher's trajectories: written once, then read in any order while the student trains.

A trajectory is what the full-precision pipeline does with one prompt: noise z_0, then at every step a velocity v_t and
z_{t+1} = z_t + (σ_{t+1} − σ_t)·v_t. Only the noise, the velocities, σ and the text embeddings are kept, 18.5 MiB for
FLUX.1-dev at 1024 pixels and 28 steps in bfloat16; every z_t is rebuilt from them bit for bit. A sample of the
training set is one step of one trajectory: z_t, its conditions and v_t.

    folder/manifest.json           what was asked of the teacher, and the prompts
    folder/000000.safetensors      one trajectory: noise [L, C], velocities [T, L, C], sigmas [T + 1], timesteps [T],
                                   prompt_embeds [S, D], pooled_prompt_embeds [P]; metadata: a SHA-256 of all of it

Files are written beside and renamed, so whatever carries its final name is whole. Prompts are run in fixed batches,
whoever runs them, so that a cache interrupted and resumed with the same batch size is the same to the last byte as an
undisturbed one.
"""

import functools
import hashlib
import json
import math
import os
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from diffusers import FluxPipeline
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from torch.utils.data import Dataset, Sampler
from tqdm import tqdm

from utils.folders import check_disk
from utils.sampling import initial_noise, record_velocities, sample_latents, text_length
from utils.utils import get_logger

log = get_logger("cache")
FORMAT = 1
THREADS = 8  # that check and write files: most of it is hashing, for which Python lets others run
Trajectory = dict[str, Tensor]


@dataclass(frozen=True)
class TeacherSettings:
    """What is asked of the teacher. `seed`: prompt i starts from the noise of seed + i."""

    resolution: int
    num_inference_steps: int
    guidance_scale: float
    seed: int


# ------------------------------------------------------------------------------------------- recording, rebuilding


def rebuild_latents(noise: Tensor, velocities: Sequence[Tensor], sigmas: Tensor) -> Iterator[Tensor]:
    """z_0, z_1 …: the noise [..., L, C], then one more for each of `velocities`; sigmas [T + 1] belong to the z_t.

    The arithmetic of FlowMatchEulerDiscreteScheduler to the bit: the product is rounded to the velocity's dtype, the
    sum of two such numbers is taken in float32 and rounded once.
    """
    latents = noise
    yield latents
    for velocity, change in zip(velocities, sigmas.diff(), strict=False):
        latents = latents + change * velocity
        yield latents


@torch.no_grad()
def record_trajectories(pipe: FluxPipeline, prompts: Sequence[str], seed: int, settings: TeacherSettings) -> list[dict]:
    """The teacher's trajectories for `prompts`, on the CPU; prompt i starts from the noise of seed + i.

    Raises ValueError if the scheduler does more than the deterministic Euler step, so that z_t cannot be rebuilt.
    """
    noise = initial_noise(pipe, range(seed, seed + len(prompts)), settings.resolution, pipe.transformer.dtype)
    with record_velocities(pipe.transformer) as calls:
        final = sample_latents(
            pipe,
            noise,
            prompt=list(prompts),
            size=settings.resolution,
            num_inference_steps=settings.num_inference_steps,
            guidance_scale=settings.guidance_scale,
        ).cpu()
    velocities = torch.stack([velocity for _, velocity in calls]).cpu()
    if not velocities.isfinite().all():
        raise ValueError(f"the teacher's velocities hold NaN or inf in {velocities.dtype}; use another dtype")
    sigmas, timesteps = pipe.scheduler.sigmas.cpu(), pipe.scheduler.timesteps.cpu()
    states = [inputs["hidden_states"].cpu() for inputs, _ in calls] + [final]
    for state, rebuilt in zip(states, rebuild_latents(noise, velocities, sigmas), strict=True):
        if not torch.equal(state, rebuilt):
            kind = type(pipe.scheduler).__name__
            raise ValueError(
                f"the {kind} of this pipeline takes other steps than z + (σ' − σ)·v (stochastic_sampling?), which the "
                "teacher cache cannot rebuild; use FlowMatchEulerDiscreteScheduler without stochastic_sampling"
            )
    embeds, pooled = (calls[0][0][name].cpu() for name in ("encoder_hidden_states", "pooled_projections"))
    return [
        {
            "noise": noise[i].clone(),
            "velocities": velocities[:, i].clone(),
            "sigmas": sigmas,
            "timesteps": timesteps,
            "prompt_embeds": embeds[i].clone(),
            "pooled_prompt_embeds": pooled[i].clone(),
        }
        for i in range(len(prompts))
    ]


@functools.cache
def image_ids(side: int, dtype: torch.dtype) -> Tensor:
    """The pipeline's position ids [side², 3] of a square picture."""
    return FluxPipeline._prepare_latent_image_ids(1, side, side, "cpu", dtype)


class Trajectories(Dataset):
    """Samples (one step of one trajectory) and whole trajectories; where they come from is up to a subclass.

    Sample number i is step i % T of trajectory i // T. `description` is what a manifest holds.
    """

    def __init__(self, description: dict):
        self.description = description
        self.prompts: list[str] = description["prompts"]
        self.steps: int = description["num_inference_steps"]

    def __len__(self) -> int:
        return len(self.prompts) * self.steps

    def trajectory(self, index: int) -> Trajectory:
        """Everything that is kept of trajectory `index` (see the head of this file)."""
        raise NotImplementedError

    def until(self, index: int, step: int) -> Trajectory:
        """trajectory(index), its velocities cut off after `step`."""
        trajectory = self.trajectory(index)
        return trajectory | {"velocities": trajectory["velocities"][: step + 1]}

    def __getitem__(self, index: int) -> Trajectory:
        """The transformer's inputs at one step, without the batch dimension, and what the teacher did there.

        hidden_states [L, C], encoder_hidden_states [S, D], pooled_projections [P], timestep [] (1 is pure noise),
        guidance [] where the model embeds it, img_ids [L, 3], txt_ids [S, 3]. Of the teacher: velocity [L, C].
        """
        if not 0 <= index < len(self):
            raise IndexError(index)
        number, step = divmod(index, self.steps)
        kept = self.until(number, step)
        *earlier, velocity = kept["velocities"]
        for latents in rebuild_latents(kept["noise"], earlier, kept["sigmas"]):  # noqa: B007 (the last one is wanted)
            pass
        side = math.isqrt(latents.shape[0])
        sample = {
            "hidden_states": latents,
            "encoder_hidden_states": kept["prompt_embeds"],
            "pooled_projections": kept["pooled_prompt_embeds"],
            "timestep": kept["timesteps"][step].to(latents.dtype) / 1000,  # rounded as the pipeline does
            "img_ids": image_ids(side, latents.dtype),
            "txt_ids": torch.zeros(len(kept["prompt_embeds"]), 3, dtype=latents.dtype),
            "velocity": velocity,
        }
        if self.description["guidance_embeds"]:
            sample["guidance"] = torch.tensor(self.description["guidance_scale"], dtype=torch.float32)
        return sample


def split_batch(batch: Trajectory) -> tuple[Trajectory, Tensor]:
    """What the transformer is called with, and the velocity."""
    inputs = dict(batch)
    return inputs, inputs.pop("velocity")


def collate(samples: list[Trajectory]) -> Trajectory:
    """Samples stacked to a batch; the position ids, equal in all of them, stay as they are."""
    return {
        name: first if name.endswith("_ids") else torch.stack([sample[name] for sample in samples])
        for name, first in samples[0].items()
    }


class ShuffledSamples(Sampler[int]):
    """As many samples an epoch as there are, in an order that depends on seed and epoch alone.

    `early_share` of them are of the first quarter of the steps, one of these as often as the other, and likewise the
    rest. With 0.25 every sample is drawn once; else each prompt still gives `steps` samples, and only on average over
    the prompts so many of each step.
    With `window`, prompts are shuffled and taken `window` at a time, their steps mixed: of trajectories that are made
    while training, no more than these are needed at once.
    """

    def __init__(self, prompts: int, steps: int, seed: int, window: int | None = None, early_share: float = 0.25):
        self.prompts, self.steps, self.seed, self.window = prompts, steps, seed, window or prompts
        ends = torch.arange(1, steps, dtype=torch.float64) / steps
        early, late = 4 * early_share * ends, early_share + (1 - early_share) * (ends - 0.25) / 0.75
        self.bounds = steps * torch.where(ends < 0.25, early, late)  # where in [0, steps) the share of a step ends
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.prompts * self.steps

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        for group in torch.randperm(self.prompts, generator=generator).split(self.window):
            order = torch.randperm(len(group) * self.steps, generator=generator)
            places = torch.arange(self.steps) + torch.rand(len(group), 1, generator=generator, dtype=torch.float64)
            steps = torch.bucketize(places, self.bounds, right=True)
            yield from (group.view(-1, 1) * self.steps + steps).flatten()[order].tolist()


# --------------------------------------------------------------------------------------------------- description


def fingerprint(pipe: FluxPipeline) -> str:
    """SHA-256 over names, shapes and eight values of every tensor of the transformer and the text encoders."""
    digest = hashlib.sha256()
    for part in ("transformer", "text_encoder", "text_encoder_2"):
        for name, tensor in sorted(getattr(pipe, part).state_dict().items()):
            flat = tensor.detach().flatten()
            picked = flat[:: max(1, len(flat) // 8)][:8].cpu().double()
            digest.update(f"{part}.{name} {list(tensor.shape)}".encode() + picked.numpy().tobytes())
    return digest.hexdigest()


def describe_cache(pipe: FluxPipeline, model: str, prompts: list[str], settings: TeacherSettings) -> dict:
    """What a manifest holds: all that the trajectories depend on."""
    return {
        "format": FORMAT,
        "model": model,
        "dtype": str(pipe.transformer.dtype).removeprefix("torch."),  # before the weights, which it changes too
        "weights": fingerprint(pipe),
        "guidance_embeds": pipe.transformer.config.guidance_embeds,
        "text_length": text_length(pipe),
        # Names that open with an underscore say where the scheduler came from, not what it does.
        "scheduler": {name: value for name, value in pipe.scheduler.config.items() if not name.startswith("_")},
        **vars(settings),
        "prompts": prompts,
    }


def check_manifest(folder: Path, description: dict) -> None:
    """ValueError, naming the field, unless the cache in `folder` was made with the same settings and prompts.

    The model may have another name, as long as its weights are the same.
    """
    file = folder / "manifest.json"
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError("not a manifest")
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{file}: cannot be read ({error}); delete the folder or choose another --teacher_cache"
        ) from None
    for field, wanted in description.items():
        have = found.get(field)
        if field == "model" or have == wanted:
            continue
        if field == "weights":
            have, wanted = f"those of {found.get('model')}", f"those of {description['model']}, which are others"
        if field == "prompts":
            have, wanted = _first_difference(have or [], wanted)
        raise ValueError(
            f"{folder}: the teacher cache was made with another {field}: found {have}, asked for {wanted}; "
            "delete the folder or choose another --teacher_cache"
        )


def _first_difference(have: list[str], wanted: list[str]) -> tuple[str, str]:
    for i, (first, second) in enumerate(zip(have, wanted, strict=False)):
        if first != second:
            return f"{first[:60]!r} as number {i}", f"{second[:60]!r}"
    return f"{len(have)} prompts", f"{len(wanted)}"


# --------------------------------------------------------------------------------------------------------- cache


class TeacherCache(Trajectories):
    """The trajectories in a folder that `fill_cache` has filled; each access opens, reads and closes one file."""

    def __init__(self, folder: Path):
        super().__init__(json.loads((folder / "manifest.json").read_text(encoding="utf-8")))
        self.folder = folder

    def file(self, index: int) -> Path:
        return self.folder / f"{index:06d}.safetensors"

    def trajectory(self, index: int) -> Trajectory:
        return self.until(index, self.steps - 1)

    def until(self, index: int, step: int) -> Trajectory:
        with safe_open(self.file(index), framework="pt") as file:
            kept = {name: file.get_tensor(name) for name in file.keys() if name != "velocities"}  # noqa: SIM118
            return kept | {"velocities": file.get_slice("velocities")[: step + 1]}

    def digest(self, index: int, tensors: Trajectory) -> str:
        """SHA-256 of the settings, the prompt and every tensor."""
        settings = self.description | {"prompts": self.prompts[index], "model": None}
        digest = hashlib.sha256(json.dumps([index, settings], sort_keys=True).encode())
        for name, tensor in sorted(tensors.items()):
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
            digest.update(tensor.contiguous().view(torch.uint8).numpy())
        return digest.hexdigest()

    def holds(self, index: int) -> bool:
        """Whether the file of this trajectory is there and unaltered."""
        try:
            with safe_open(self.file(index), framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                return (file.metadata() or {}).get("sha256") == self.digest(index, tensors)
        except (OSError, SafetensorError):
            return False

    def store(self, index: int, tensors: Trajectory) -> None:
        """Write the file of one trajectory, whole or not at all."""
        partial = self.file(index).with_suffix(f".{os.getpid()}.tmp")  # another run may fill the same cache
        try:
            partial.write_bytes(save(tensors, metadata={"sha256": self.digest(index, tensors)}))
            os.replace(partial, self.file(index))
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise ValueError(
                f"{self.folder}: the teacher cache cannot be written ({error.strerror}); make room and start again"
            ) from None


def fill_cache(
    folder: Path, pipe: FluxPipeline, model: str, prompts: list[str], settings: TeacherSettings, batch_size: int,
    device: torch.device,
) -> TeacherCache:  # fmt: skip
    """The teacher cache of `prompts` in `folder`; what is missing in it or damaged is made now, shared by all ranks.

    pipe, called `model` in messages, moves to `device` if there is anything to do. Raises ValueError if the folder
    holds a cache of other settings, cannot be written to, or the disk is too small.
    """
    state = PartialState()
    description = describe_cache(pipe, model, prompts, settings)
    with _one_for_all(state) as first:
        if first:
            _open_folder(folder, description)
    cache = TeacherCache(folder)

    mine = range(state.process_index, len(prompts), state.num_processes)
    with ThreadPoolExecutor(THREADS) as pool:
        whole = tqdm(pool.map(cache.holds, mine), "check", len(mine), leave=False, disable=not state.is_main_process)
        bad = [i for i, holds in zip(mine, whole, strict=True) if not holds]
    missing = set(gather_object(bad))
    if missing:
        if not os.access(folder, os.W_OK):  # a complete cache may well be read-only
            raise ValueError(f"{folder}: no permission to add what is missing; choose another --teacher_cache")
        pipe.to(device)
        batches = sorted({i // batch_size for i in missing})
        _announce(cache, pipe, settings, len(missing), batch_size, state)
        started = time.time()
        share = batches[state.process_index :: state.num_processes]
        bar = tqdm(total=len(share) * batch_size, desc=f"teacher, rank {state.process_index}", unit="prompt")
        with bar, ThreadPoolExecutor(THREADS) as pool:
            for batch in share:
                numbers = range(batch * batch_size, min((batch + 1) * batch_size, len(prompts)))
                made = record_trajectories(pipe, [prompts[i] for i in numbers], settings.seed + numbers[0], settings)
                wanted = [(i, trajectory) for i, trajectory in zip(numbers, made, strict=True) if i in missing]
                list(pool.map(lambda pair: cache.store(*pair), wanted))
                bar.update(batch_size)
        state.wait_for_everyone()
        if state.is_main_process:
            size = sum(cache.file(i).stat().st_size for i in range(len(prompts)))
            log.info("%s: %d prompts, %.2f GB, made in %.0f s", folder, len(prompts), size / 1e9, time.time() - started)
    elif state.is_main_process:
        log.info("%s: complete, %d prompts", folder, len(prompts))
    return cache


@contextmanager
def _one_for_all(state: PartialState) -> Iterator[bool]:
    """Whether this rank is the first; a ValueError that it raises in the block ends the other ranks too, silently."""
    error = None
    try:
        yield state.is_main_process
    except ValueError as raised:
        error = raised
    if any(gather_object([error is not None])):
        raise error or SystemExit(1)


def _open_folder(folder: Path, description: dict) -> None:
    """Make the folder and its manifest, or check the manifest that is there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "manifest.json").exists():
            if any(folder.glob("*.safetensors")):
                raise ValueError(
                    f"{folder}: holds safetensors files but no manifest.json; choose another --teacher_cache"
                )
            partial = folder / f"manifest.{os.getpid()}.tmp"
            partial.write_text(json.dumps(description, indent=1) + "\n", encoding="utf-8")
            os.replace(partial, folder / "manifest.json")
    except OSError as error:
        raise ValueError(
            f"{folder}: the teacher cache cannot be written ({error.strerror}); choose another --teacher_cache"
        ) from None
    check_manifest(folder, description)


@torch.no_grad()
def _announce(
    cache: TeacherCache,
    pipe: FluxPipeline,
    settings: TeacherSettings,
    missing: int,
    batch_size: int,
    state: PartialState,
) -> None:
    """Say what the missing trajectories will cost, and stop if the disk cannot hold them."""
    quick = TeacherSettings(settings.resolution, 2, settings.guidance_scale, settings.seed)
    probe = cache.prompts[:1] * batch_size
    for _ in range(2):  # the first call warms up
        started = time.time()
        one = record_trajectories(pipe, probe, 0, quick)[0]
        seconds = (time.time() - started) * settings.num_inference_steps / 2 / batch_size
    size = sum(t.numel() * t.element_size() for t in one.values()) + 1024  # and the header
    size += (settings.num_inference_steps - 2) * (one["velocities"][0].numel() * one["velocities"].element_size() + 8)
    if state.is_main_process:
        log.info(
            "%s: %d of %d prompts to do, %.2f MiB and about %.2f s each: %.2f GB, %.0f min on %d ranks",
            cache.folder, missing, len(cache.prompts), size / 2**20, seconds, missing * size / 1e9,
            missing * seconds / 60 / state.num_processes, state.num_processes,
        )  # fmt: skip
    with _one_for_all(state) as first:
        if first:
            check_disk(cache.folder, missing * size, "the teacher cache")


class OnlineTeacher(Trajectories):
    """Trajectories made when they are first asked for, of which the last `keep` stay in memory; no files.

    The teacher `pipe` stays on its device. For --teacher_cache off, with `keep` no smaller than the window of
    ShuffledSamples.
    """

    def __init__(self, pipe: FluxPipeline, model: str, prompts: list[str], settings: TeacherSettings, keep: int):
        super().__init__(describe_cache(pipe, model, prompts, settings))
        self.pipe, self.settings, self.keep = pipe, settings, keep
        self.made: OrderedDict[int, Trajectory] = OrderedDict()

    def trajectory(self, index: int) -> Trajectory:
        if index not in self.made:
            seed = self.settings.seed + index
            self.made[index] = record_trajectories(self.pipe, [self.prompts[index]], seed, self.settings)[0]
            while len(self.made) > self.keep:
                self.made.popitem(last=False)
        return self.made[index]
