"""The teacher's trajectories: written once, then read in any order while the student trains.

A trajectory is what the full-precision pipeline does with one prompt: noise z_0, then at every step a velocity v_t and
z_{t+1} = z_t + (σ_{t+1} − σ_t)·v_t. Only the noise, the velocities, σ and the text embeddings are kept, 18.5 MiB for
FLUX.1-dev at 1024 pixels and 28 steps in bfloat16, 12.5 MiB for FLUX.2-klein at 4 steps; every z_t is rebuilt from them
bit for bit. A sample of the training set is one call of the transformer: z_t, its conditions and v_t. There is one in a
step, or where guidance takes two, with the prompt and with none, both (why: utils/teacher.py).

    folder/manifest.json       the teacher and what was asked of it: all that its trajectories have in common
    folder/KEY.safetensors     one trajectory: noise [L, C], velocities [T, L, C] (of two calls a step [2 T, L, C], in
                               turns), sigmas [T + 1], timesteps [T], prompt_embeds [S, D], and pooled_prompt_embeds
                               [P] or negative_prompt_embeds [S, D] where there are any; metadata: prompt, seed of the
                               noise, and a SHA-256 of all of it and the manifest

Given the manifest, a trajectory is identified by its prompt and the seed of its noise, from which KEY follows. Which
prompts a run wants, and in which order, is the run's affair: what is there is used, what is missing is made and added,
by several ranks and by several runs at once. Files are written beside and renamed, so whatever carries its final name
is whole.

What holds for the numbers: noise and σ are always the same. Text and velocities are computed in full batches, the last
one filled up, so that the same kernels see the same shapes whatever else is missing; where a row of a matrix product
does not depend on the others, as on CPUs and in cuBLAS's usual kernels, a cache that was interrupted, resumed, extended
or shared out is the same to the last byte as one made at once. Another batch size, another device or compiled blocks
change last bits.
"""

import errno
import fcntl
import functools
import hashlib
import json
import math
import os
import re
import time
from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from torch.utils.data import Dataset, Sampler
from tqdm import tqdm

from utils.folders import check_disk
from utils.pipelines import FAMILIES, Family, steps_taken
from utils.teacher import (
    Drawn,
    Teacher,
    TeacherSettings,
    Text,
    Trajectory,
    full_batches,
    rebuild_latents,
)
from utils.utils import empty_cache, get_logger

log = get_logger("cache")
FORMAT = 2
THREADS = 8  # that check and write files: most of it is hashing, for which Python lets others run
ROUND = 1024  # prompts whose text is encoded at a time: 4 GiB of host memory for FLUX.1-dev, 8 for FLUX.2-klein
POLL = 0.5  # seconds between looks at what other processes have made
SPARE = 16  # batches that others leave to be done; for less a rank does not load the models again
COMPILE_ABOVE = 240  # seconds of drawing: compiled blocks save a quarter of them, and cost a minute


@functools.cache
def position_ids(family: Family, side: int, length: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """The pipeline's position ids of a square picture [side², axes] and of its text [length, axes]."""
    return {"img_ids": family.image_ids(side, dtype), "txt_ids": family.text_ids(length, dtype)}


class Trajectories(Dataset):
    """Samples (one call of the transformer in one trajectory) and whole trajectories; where they come from is up to a
    subclass.

    Sample number i is call i % S of trajectory i // S. `description` is what a manifest holds.

    calls             in a step: 1, or 2 that are combined by `guidance` (else None), with the prompt and with none
    steps             calls in a trajectory, S
    guidance_scale    to call the pipeline with: 1 where it has no effect
    """

    def __init__(self, description: dict):
        self.description = description
        self.prompts: list[str] = description["prompts"]
        self.family = FAMILIES[description.get("pipeline", "FluxPipeline")]
        self.calls: int = description.get("calls_a_step", 1)
        scale: float | None = description["guidance_scale"]
        self.guidance = scale if self.calls == 2 else None
        self.guidance_scale = 1.0 if scale is None else scale
        self.steps: int = self.calls * description["num_inference_steps"]

    def __len__(self) -> int:
        return len(self.prompts) * self.steps

    def trajectory(self, index: int) -> Trajectory:
        """Everything that is kept of trajectory `index` (see the head of this file)."""
        raise NotImplementedError

    def until(self, index: int, call: int) -> Trajectory:
        """trajectory(index), its velocities cut off after `call`."""
        trajectory = self.trajectory(index)
        return trajectory | {"velocities": trajectory["velocities"][: call + 1]}

    def last_latents(self, trajectory: Trajectory, steps: int | None = None) -> Tensor:
        """z [L, C] after all steps, or so many of them."""
        velocities = trajectory["velocities"][: None if steps is None else steps * self.calls]
        taken = steps_taken(velocities, self.guidance)
        *_, last = rebuild_latents(trajectory["noise"], taken, trajectory["sigmas"])
        return last

    def __getitem__(self, index: int) -> Trajectory:
        """The transformer's inputs in one call, without the batch dimension, and what the teacher did there.

        hidden_states [L, C], encoder_hidden_states [S, D], timestep [] (1 is pure noise), img_ids [L, axes], txt_ids
        [S, axes]; for FLUX.1 pooled_projections [P] and, where the model embeds it, guidance []. Of the teacher:
        velocity [L, C].
        """
        if not 0 <= index < len(self):
            raise IndexError(index)
        number, call = divmod(index, self.steps)
        step, which = divmod(call, self.calls)
        kept = self.until(number, call)
        latents = self.last_latents(kept, step)
        side, length = math.isqrt(latents.shape[0]), len(kept["prompt_embeds"])
        return {
            "hidden_states": latents,
            "timestep": kept["timesteps"][step].to(latents.dtype) / 1000,  # rounded as the pipeline does
            "velocity": kept["velocities"][call],
            **position_ids(self.family, side, length, latents.dtype),
            **self.family.conditions(kept, which, self.description),
        }


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
    rest; or each step has its own of `shares`, whatever their sum. With 0.25 every sample is drawn once; else each
    prompt still gives `steps` samples, and only on average over the prompts so many of each step.
    With `window`, prompts are shuffled and taken `window` at a time, their steps mixed: of trajectories that are made
    while training, no more than these are needed at once.
    """

    def __init__(
        self, prompts: int, steps: int, seed: int, window: int | None = None,
        early_share: float | None = 0.25, shares: Sequence[float] | None = None,
    ):  # fmt: skip
        self.prompts, self.steps, self.seed, self.window = prompts, steps, seed, window or prompts
        if shares is None:
            ends = torch.arange(1, steps, dtype=torch.float64) / steps
            early, late = 4 * early_share * ends, early_share + (1 - early_share) * (ends - 0.25) / 0.75
            ends = torch.where(ends < 0.25, early, late)
        else:
            parts = torch.tensor(shares, dtype=torch.float64).cumsum(0)
            ends = parts[:-1] / parts[-1]
        self.bounds = steps * ends  # where in [0, steps) the share of a step ends
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


# --------------------------------------------------------------------------------------------------------- cache


def check_manifest(folder: Path, manifest: dict) -> None:
    """ValueError, naming the field, unless the cache in `folder` has the same manifest.

    The model may have another name, as long as its weights are the same.
    """
    file, advice = folder / "manifest.json", "delete the folder or choose another --teacher_cache"
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError("not a manifest")
    except (OSError, ValueError) as error:
        raise ValueError(f"{file}: cannot be read ({error}); {advice}") from None
    if found.get("format") != FORMAT:
        raise ValueError(
            f"{folder}: a teacher cache of format {found.get('format')}, which this version (format {FORMAT}) cannot "
            f"use; {advice}"
        )
    for field, wanted in manifest.items():
        have = found.get(field)
        if field == "model" or have == wanted:
            continue
        if field == "weights":
            have, wanted = f"those of {found.get('model')}", f"those of {manifest['model']}, which are others"
        raise ValueError(
            f"{folder}: the teacher cache was made with another {field}: found {have}, asked for {wanted}; {advice}"
        )


def default_folder(root: Path, manifest: dict) -> Path:
    """Where in `root` a cache belongs: the model's name and a digest of the rest of the manifest. A cache that has the
    digest under another model's name is taken, for its weights are the same."""
    rest = {"format": FORMAT} | {field: value for field, value in manifest.items() if field != "model"}
    digest = hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()[:8]
    name = re.sub(r"[^\w.-]+", "_", Path(manifest["model"]).resolve().name)
    return next(iter(sorted(root.glob(f"*-{digest}"))), root / f"{name}-{digest}")


def trajectory_bytes(manifest: dict) -> int:
    """The size of a trajectory's file, from the shapes and the dtype in the manifest; a KiB of it is for the header."""
    steps, latents = manifest["num_inference_steps"], math.prod(manifest["latents_shape"])
    numbers = (steps * manifest.get("calls_a_step", 1) + 1) * latents
    texts = ("text_shape", "pooled_shape", "negative_shape")
    numbers += sum(math.prod(manifest[name]) for name in texts if name in manifest)
    return numbers * getattr(torch, manifest["dtype"]).itemsize + 4 * (2 * steps + 1) + 1024


class TeacherCache(Trajectories):
    """The trajectories of `prompts` from the noise of `seeds`, in a folder that fill_cache fills; each access opens,
    reads and closes one file.

    manifest: what Teacher.describe returns.
    """

    def __init__(self, folder: Path, manifest: dict, prompts: Sequence[str], seeds: Sequence[int]):
        self.folder, self.seeds = Path(folder), list(seeds)
        self.manifest = {"format": FORMAT} | manifest
        super().__init__(describe(manifest, prompts, seeds))

    def file(self, index: int) -> Path:
        key = hashlib.sha256(json.dumps([self.prompts[index], self.seeds[index]]).encode()).hexdigest()[:16]
        return self.folder / f"{key}.safetensors"

    def joined(self, other: "TeacherCache") -> "TeacherCache":
        """The trajectories of both, which lie in the same folder."""
        return TeacherCache(self.folder, self.manifest, self.prompts + other.prompts, self.seeds + other.seeds)

    def bytes_to_write(self) -> int:
        """How much room the trajectories will take that are not there yet."""
        return trajectory_bytes(self.manifest) * sum(not self.file(i).exists() for i in range(len(self.prompts)))

    def trajectory(self, index: int) -> Trajectory:
        return self.until(index, self.steps - 1)

    def until(self, index: int, call: int) -> Trajectory:
        with safe_open(self.file(index), framework="pt") as file:
            kept = {name: file.get_tensor(name) for name in file.keys() if name != "velocities"}  # noqa: SIM118
            return kept | {"velocities": file.get_slice("velocities")[: call + 1]}

    def metadata(self, index: int, tensors: Trajectory) -> dict[str, str]:
        """What the file says of itself: prompt, seed, and a SHA-256 of these, the manifest and every tensor."""
        settings = [self.prompts[index], self.seeds[index], self.manifest | {"model": None}]
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
        for name, tensor in sorted(tensors.items()):
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
            digest.update(tensor.contiguous().view(torch.uint8).numpy())
        said = {"prompt": self.prompts[index], "seed": self.seeds[index], "sha256": digest.hexdigest()}
        return {"trajectory": json.dumps(said)}  # in one entry: safetensors writes several in any order

    def holds(self, index: int) -> bool:
        """Whether the file of this trajectory is there and unaltered."""
        try:
            with safe_open(self.file(index), framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                return file.metadata() == self.metadata(index, tensors)
        except (OSError, SafetensorError):
            return False

    def store(self, index: int, tensors: Trajectory) -> None:
        """Write the file of one trajectory, whole or not at all."""
        partial = self.file(index).with_suffix(f".{os.getpid()}.tmp")  # another run may fill the same cache
        try:
            partial.write_bytes(save(tensors, metadata=self.metadata(index, tensors)))
            os.replace(partial, self.file(index))
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise ValueError(
                f"{self.folder}: the teacher cache cannot be written ({error.strerror}); make room and start again"
            ) from None


def describe(manifest: dict, prompts: Sequence[str], seeds: Sequence[int]) -> dict:
    """What Trajectories are made from: the manifest, the prompts and a digest of the seeds."""
    noise = hashlib.sha256(json.dumps(list(seeds)).encode()).hexdigest()
    return manifest | {"prompts": list(prompts), "noise": noise}


class OnlineTeacher(Trajectories):
    """Trajectories made when they are first asked for, of which the last `keep` stay in memory; no files.

    The teacher is loaded onto `device` with the first one and stays there. For --teacher_cache off, with `keep` no
    smaller than the window of ShuffledSamples.
    """

    def __init__(
        self, teacher: Teacher, settings: TeacherSettings, prompts: Sequence[str], seeds: Sequence[int], keep: int,
        device: torch.device,
    ):  # fmt: skip
        super().__init__(describe(teacher.describe(settings), prompts, seeds))
        self.teacher, self.settings, self.seeds, self.keep, self.device = teacher, settings, seeds, keep, device
        self.made: OrderedDict[int, Trajectory] = OrderedDict()

    def trajectory(self, index: int) -> Trajectory:
        if index not in self.made:
            self.teacher.load(*self.teacher.parts, device=self.device)
            text = self.teacher.encode([self.prompts[index]], 1, self.device, self.settings.guidance_scale)
            self.made[index] = self.teacher.draw(text, [self.seeds[index]], self.settings).trajectory(0)
            while len(self.made) > self.keep:
                self.made.popitem(last=False)
        return self.made[index]


# ------------------------------------------------------------------------------------------------------- filling it


def fill_cache(
    cache: TeacherCache, teacher: Teacher, batch_size: int, device: torch.device, compile_blocks: bool | None = None
) -> None:
    """Make what is missing in the cache or damaged, `batch_size` trajectories at a time, shared by all ranks.

    The teacher's models are loaded, onto `device`, only if there is something to make, and dropped afterwards. Its
    blocks are compiled with `compile_blocks`; by default on CUDA, where it saves time. Other processes may fill
    the same folder meanwhile: nothing is made twice. Raises ValueError if the folder holds a cache with another
    manifest, cannot be written to, or the disk is too small.
    """
    state, folder = PartialState(), cache.folder
    with _one_for_all(state) as first:
        if first:
            open_folder(cache)
    missing = _find_missing(cache, state)
    if not missing:
        if state.is_main_process:
            log.info("%s: complete, %d prompts", folder, len(cache.prompts))
        return
    size = trajectory_bytes(cache.manifest)
    with _one_for_all(state) as first:
        if first:
            if not _may_write(folder):  # a complete cache may well be read-only
                raise ValueError(f"{folder}: no permission to add what is missing; choose another --teacher_cache")
            check_disk(folder, len(missing) * size, "the teacher cache")
    if state.is_main_process:
        whole = len(missing) * size / 2**30
        log.info(
            "%s: %d of %d prompts to do, %.2f MiB each: %.2f GiB", folder, len(missing), len(cache.prompts),
            size / 2**20, whole,
        )  # fmt: skip
    started = time.time()
    with Filling(cache, teacher, batch_size, device, compile_blocks, missing) as filling:
        filling.run()
    if state.is_main_process:
        log.info("%s: %d prompts made in %.0f s", folder, len(missing), time.time() - started)


@contextmanager
def _one_for_all(state: PartialState) -> Iterator[bool]:
    """Whether this rank is the first of its machine; a ValueError that it raises in the block ends the other ranks too,
    silently."""
    error = None
    try:
        yield state.is_local_main_process
    except ValueError as raised:
        error = raised
    if any(gather_object([error is not None])):
        raise error or SystemExit(1)


def open_folder(cache: TeacherCache) -> None:
    """Make the folder and its manifest, or check the manifest that is there; remove what killed runs left."""
    folder, file = cache.folder, cache.folder / "manifest.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not file.exists():
            if any(folder.glob("*.safetensors")):
                raise ValueError(
                    f"{folder}: holds safetensors files but no manifest.json; choose another --teacher_cache"
                )
            partial = folder / f"manifest.{os.getpid()}.tmp"
            partial.write_text(json.dumps(cache.manifest, indent=1) + "\n", encoding="utf-8")
            with suppress(FileNotFoundError):  # another run has made the manifest and cleaned up
                os.replace(partial, file)
    except OSError as error:
        raise ValueError(
            f"{folder}: the teacher cache cannot be written ({error.strerror}); choose another --teacher_cache"
        ) from None
    check_manifest(folder, cache.manifest)
    _remove_leftovers(folder)
    for older in (where / name for where in (folder, folder.parent) for name in ("train", "eval")):
        with suppress(OSError, ValueError, AttributeError):
            if json.loads((older / "manifest.json").read_text(encoding="utf-8")).get("format") == 1:
                log.info("%s: made by an earlier version and not used any more; delete it to have its room", older)


def _may_write(folder: Path) -> bool:
    """Whether trajectories may be added, and claimed in the manifest."""
    return os.access(folder, os.W_OK) and os.access(folder / "manifest.json", os.W_OK)


def _remove_leftovers(folder: Path) -> None:
    """Remove the unfinished files of processes that are no more: nobody holds the claims that they had."""
    names = [file for file in folder.glob("*.tmp") if re.fullmatch(r"(manifest|[0-9a-f]{16})\.\d+\.tmp", file.name)]
    if not names or not _may_write(folder):
        return
    with _Claims(folder) as claims:
        for name in names:
            key = name.name.partition(".")[0]
            if key == "manifest" or (claims.take(key) and claims.kept):
                name.unlink(missing_ok=True)


class _Claims:
    """Who makes which trajectory: the process that holds the lock on a byte of manifest.json that follows from its KEY.

    All processes that see the file see its locks, on other machines too, and a lock goes with the process that held it.
    Where the file system has no locks everything is granted (`kept` is False then): work may be done twice.
    """

    def __init__(self, folder: Path):
        self.file, self.kept = (folder / "manifest.json").open("rb+", buffering=0), True

    def __enter__(self) -> "_Claims":
        return self

    def __exit__(self, *error) -> None:
        self.file.close()

    def take(self, key: str, patient: bool = False) -> bool:
        """Whether this process is to make the trajectory; False if another one does. The patient look twice: for a
        moment it may be another one's look that they see."""
        try:
            fcntl.lockf(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, int(key[:7], 16))
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                if patient:
                    time.sleep(0.02)
                return patient and self.take(key)
            self.kept = False
        return True

    def release(self, key: str) -> None:
        if self.kept:
            fcntl.lockf(self.file, fcntl.LOCK_UN, 1, int(key[:7], 16))


def _stamp(file: Path) -> tuple[int, int] | None:
    """What changes when a file is replaced; None without one."""
    try:
        status = file.stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns


def _find_missing(cache: TeacherCache, state: PartialState) -> dict[int, tuple[int, int] | None]:
    """The trajectories to make and, where a damaged file is in their place, its stamp. The ranks of a machine share the
    looking, those of other machines look too: they need not see the same disk."""
    ranks = min(state.num_processes, int(os.environ.get("LOCAL_WORLD_SIZE", state.num_processes)))
    mine = range(state.local_process_index, len(cache.prompts), ranks)
    stamps = [_stamp(cache.file(i)) for i in mine]
    with ThreadPoolExecutor(THREADS) as pool:
        whole = tqdm(pool.map(cache.holds, mine), "check", len(mine), leave=False, disable=not state.is_main_process)
        bad = [(i, stamp) for i, stamp, holds in zip(mine, stamps, whole, strict=True) if not holds]
    found = dict(sorted(gather_object(bad)))
    once = {cache.file(i): i for i in reversed(found)}.values()  # a prompt may stand there twice with the same seed
    return {i: found[i] for i in sorted(once)}


class Filling:
    """One rank's part in making the `missing` trajectories, without a word to the other ranks: it makes its share, then
    what nobody else has made or is making, until all are there.

    No collective stands in the way, so a slow rank keeps nobody from working, and one that fails can be ended by its
    launcher at once.
    """

    def __init__(
        self, cache: TeacherCache, teacher: Teacher, batch_size: int, device: torch.device,
        compile_blocks: bool | None, missing: dict[int, tuple[int, int] | None],
    ):  # fmt: skip
        self.cache, self.teacher, self.missing = cache, teacher, missing
        self.batch_size, self.device, self.compile_blocks = batch_size, device, compile_blocks
        asked = cache.manifest
        self.settings = TeacherSettings(asked["resolution"], asked["num_inference_steps"], cache.guidance_scale)
        self.state = PartialState()
        self.claims, self.pool = _Claims(cache.folder), ThreadPoolExecutor(THREADS)
        self.pending: deque[Future] = deque()
        self.bar: tqdm | None = None  # once the models are loaded, which has bars of its own

    def __enter__(self) -> "Filling":
        return self

    def __exit__(self, *error) -> None:
        self.pool.shutdown(cancel_futures=True)
        self.claims.__exit__()
        if self.bar is not None:
            self.bar.close()
        self.teacher.drop(*self.teacher.parts)
        if self.compile_blocks:
            torch.compiler.reset()  # what was compiled holds on to the weights

    def run(self) -> None:
        numbers, rank, ranks = list(self.missing), self.state.process_index, self.state.num_processes
        numbers = numbers[len(numbers) * rank // ranks : len(numbers) * (rank + 1) // ranks]
        while True:
            for start in range(0, len(numbers), ROUND):
                self.round(numbers[start : start + ROUND])
            self.finish(0)
            numbers = self.left()
            if not numbers:
                return

    def round(self, numbers: list[int]) -> None:
        """Make those of these that nobody else has made or is making."""
        numbers = [i for i in numbers if not self.there(i) and self.free(i)]
        if not numbers:
            return
        self.claims.take(self.key(numbers[0]))  # so that others see that somebody is at work
        text, batch = self.encode(numbers), []
        for i in numbers:
            if self.claims.take(self.key(i), patient=True):
                if self.there(i):
                    self.claims.release(self.key(i))
                else:
                    batch.append(i)
            if len(batch) == self.batch_size:
                self.draw(batch, text)
                batch = []
        if batch:
            self.draw(batch, text)

    def left(self) -> list[int]:
        """What this rank is to make besides its share: much that others have not come to, or all that they have given
        up. Waits for what they are making."""
        numbers, looks = list(self.missing), 0
        while numbers := [i for i in numbers if not self.there(i)]:
            time.sleep(POLL)
            looks += 1
            if looks * POLL == 5:
                log.info("%s: waiting for %d prompts that other processes draw", self.cache.folder, len(numbers))
            free = [i for i in numbers if self.free(i)]
            if len(free) == len(numbers) or len(free) > SPARE * self.batch_size:
                return free
        return []

    def key(self, i: int) -> str:
        return self.cache.file(i).stem

    def free(self, i: int) -> bool:
        """Whether nobody else is making this one."""
        taken = self.claims.take(self.key(i))
        if taken:
            self.claims.release(self.key(i))
        return taken

    def there(self, i: int) -> bool:
        """Whether somebody has made this one by now."""
        return _stamp(self.cache.file(i)) not in (None, self.missing[i])

    def encode(self, numbers: list[int]) -> dict[int, Text]:
        """The text of these prompts; afterwards the transformer is on the device, and the encoders are gone."""
        if self.teacher.pipe.transformer is not None:
            self.teacher.pipe.transformer.to("cpu")
            empty_cache(self.device)
        encoders = self.teacher.family.text_encoders
        self.teacher.load(*encoders, device=self.device)
        prompts = [self.cache.prompts[i] for i in numbers]
        rows = self.teacher.encode(prompts, self.batch_size, self.device, self.settings.guidance_scale)
        text = dict(zip(numbers, rows, strict=True))
        self.teacher.drop(*encoders)
        self.teacher.load("transformer", device=self.device)
        if self.bar is None:
            self.prepare(text[numbers[0]])
        return text

    def prepare(self, text: Text) -> None:
        """Compile the transformer's blocks if that is asked for or saves time, and say how long it will take."""
        share, ranks = math.ceil(len(self.missing) / self.state.num_processes), self.state.num_processes
        seconds = self.seconds(text)
        if self.compile_blocks is None:
            self.compile_blocks = self.device.type == "cuda" and share * seconds > COMPILE_ABOVE
        if self.compile_blocks:
            self.teacher.pipe.transformer.compile_repeated_blocks()
            seconds = self.seconds(text)
        if self.state.is_main_process:
            minutes = share * seconds / 60
            log.info("%s: about %.2f s a prompt, %.0f min on %d ranks", self.cache.folder, seconds, minutes, ranks)
        self.bar = tqdm(total=share, desc="teacher", unit="prompt", disable=not self.state.is_main_process)

    def seconds(self, text: Text) -> float:
        """How long a prompt takes, from two short runs, of which the first warms up."""
        quick = replace(self.settings, num_inference_steps=2)
        for _ in range(2):
            started = time.time()
            self.teacher.draw([text] * self.batch_size, [0] * self.batch_size, quick).trajectory(0)
        return (time.time() - started) / 2 * self.settings.num_inference_steps / self.batch_size

    def draw(self, batch: list[int], text: dict[int, Text]) -> None:
        """Have a batch drawn; its trajectories are checked and written while the device goes on with the next."""
        [rows] = full_batches(batch, self.batch_size)
        drawn = self.teacher.draw([text[i] for i in rows], [self.cache.seeds[i] for i in rows], self.settings)
        self.pending += [self.pool.submit(self.keep, i, drawn, row) for row, i in enumerate(batch)]
        self.finish(2 * self.batch_size)
        self.bar.update(len(batch))

    def keep(self, i: int, drawn: Drawn, row: int) -> None:
        self.cache.store(i, drawn.trajectory(row))
        self.claims.release(self.key(i))

    def finish(self, most: int) -> None:
        """Wait until no more than `most` trajectories are to be written; raises what went wrong with one."""
        while len(self.pending) > most:
            self.pending.popleft().result()
