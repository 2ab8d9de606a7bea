"""From block to block of a FLUX transformer that may be larger than the device, along recorded calls, resumable.

Two streams of hidden states go side by side: the teacher's, and the student's, which went through the blocks as they
were treated so far. What is done with a block is up to a function that gets both streams' inputs of it:

    work = Work(folder, {"model": ..., "w_bits": ...})     # refuses a folder of other settings
    calls = work.calls() or record_calls(pipe, prompts, …)   # keyword arguments of the transformer
    walk(transformer, calls, w_bits, lambda block: stored_tensors_of_the_treated(block), work, device)
    for name, tensor in stored_tensors(transformer, work): ...   # every tensor, as a packed folder stores it

What FLUX.2 modulates all its blocks by, linears outside of them, is treated before the blocks, each as one of its own.

What must fit where, for blocks of width d and M tokens a call (FLUX.1-dev in 16 bits at 1024 pixels: d 3072, M 4608)

    host    the transformer once, whose blocks are freed one after the other as they are finished (24 GB), and the two
            streams: 2·M·d values a call (57 MB; pinned memory comes in powers of two: 8 GB for 112 calls)
    device  while the teacher is recorded: first the text encoders (10 GB), then the transformer whole where it fits,
            else two of its blocks at a time; later one block (0.7 GB), one call on its way through it, and what the
            treatment takes
    disk    the recorded calls, text once a prompt (0.5 MB a call, 4 MB a prompt), and the finished blocks (2.5 GB at
            1.58 bits). After a kill the finished blocks are run once more, which rebuilds the student's stream.
"""

import functools
import hashlib
import inspect
import json
import math
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate.utils import send_to_device
from diffusers import DiffusionPipeline
from diffusers.hooks import apply_group_offloading
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from models.families import transformer_class
from models.kernels import dequantize
from models.packing import from_disk
from utils.pipelines import family_of
from utils.sampling import (
    encode_prompts,
    initial_noise,
    record_inputs,
    sample_latents,
    stop_streaming,
    stream_settings,
)
from utils.utils import empty_cache, get_logger

log = get_logger("walk")
CPU = torch.device("cpu")
# What is calibrated on: noise that neither training nor evaluation starts from, so many of a picture's denoising steps,
# and tokens that go through a block at a time (one picture of 1024 pixels, or many small ones).
CALIBRATION_SEED, USED_STEPS, CALL_TOKENS = 2_000_000, 7, 8192
HIDDEN = ("encoder_hidden_states", "hidden_states")  # in the order in which a block returns them
BATCHED = (*HIDDEN, "pooled_projections", "timestep", "guidance")  # arguments of the transformer, a row for each sample

ACTIVATIONS = 32  # of the width of a block: values that a token takes on its way through one, estimated with some room
ENCODED = 16  # prompts encoded at a time

# --------------------------------------------------------------------------------------------------- what is on disk


class Work:
    """A folder of recorded calls and finished blocks: what a walk that was killed goes on from.

    manifest.json       what it belongs to
    calls.safetensors   the recorded calls
    BLOCK.safetensors   a finished block's tensors under their full names; its metadata holds the notes on it
    """

    def __init__(self, folder: Path, manifest: dict):
        """Open or make `folder`. ValueError, naming the first difference, if it belongs to another `manifest`, a dict
        of JSON values."""
        self.folder = folder
        file = folder / "manifest.json"
        wanted = json.loads(json.dumps(manifest))
        try:
            found = json.loads(file.read_text()) if file.exists() else None
        except ValueError as error:
            raise ValueError(f"{file}: cannot be read ({error}); delete {folder} to start over") from None
        if found is not None:
            for name in wanted | found:
                if wanted.get(name) != found.get(name):
                    raise ValueError(
                        f"{folder}: begun with {name}={_short(found.get(name))}, now {name}="
                        f"{_short(wanted.get(name))}; delete it to start over, or go on with the former"
                    )
            return
        folder.mkdir(parents=True, exist_ok=True)
        partial = folder / "manifest.tmp"
        partial.write_text(json.dumps(wanted, indent=2) + "\n")
        partial.rename(file)

    def _save(self, tensors: dict[str, Tensor], name: str, **metadata) -> None:
        partial = self.folder / "partial.tmp"
        save_file(tensors, partial, metadata={key: json.dumps(value) for key, value in metadata.items()})
        os.replace(partial, self.folder / name)

    def keep_calls(self, calls: list[dict]) -> None:
        """Write calls, dicts of tensors and JSON values; a tensor that stands in several of them is written once."""
        names: dict[int, str] = {}
        tensors, table = {}, []
        for call in calls:
            row = {}
            for key, value in call.items():
                if isinstance(value, Tensor):
                    name = names.setdefault(id(value), str(len(names)))
                    tensors[name] = value.detach().to(CPU, copy=True).contiguous()
                    row[key] = {"tensor": name}
                else:
                    row[key] = {"value": value}
            table.append(row)
        self._save(tensors, "calls.safetensors", calls=table)

    def calls(self) -> list[dict] | None:
        """The calls that were kept, on the CPU, or None."""
        file = self.folder / "calls.safetensors"
        if not file.exists():
            return None
        with _opened(file) as stored:
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}
            table = json.loads(stored.metadata()["calls"])
        return [{k: tensors[v["tensor"]] if "tensor" in v else v["value"] for k, v in row.items()} for row in table]

    def _file(self, block: str) -> Path:
        return self.folder / f"{block}.safetensors"

    def has(self, block: str) -> bool:
        return self._file(block).exists()

    def keep(self, block: str, tensors: dict[str, Tensor], notes: dict) -> None:
        """Write a finished block: its tensors by full name, as a packed folder stores them, and JSON notes on it."""
        self._save({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, self._file(block).name, notes=notes)

    def block(self, block: str) -> dict[str, Tensor]:
        """A finished block's tensors, on the CPU."""
        with _opened(self._file(block)) as stored:
            return {name: stored.get_tensor(name) for name in stored.keys()}

    def notes(self, block: str) -> dict:
        """The notes on a finished block."""
        with _opened(self._file(block)) as stored:
            return json.loads(stored.metadata()["notes"])


def _short(value) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}…"


def _opened(file: Path):
    try:
        return safe_open(file, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{file}: damaged ({error}); delete it, and it is made again") from None


# ----------------------------------------------------------------------------------------------- recording the teacher


def fingerprint(model: nn.Module) -> str:
    """SHA-256 over the names, the shapes and the first values of a model's parameters."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        head = parameter.detach().flatten()[:64].float().cpu().numpy().tobytes()
        digest.update(f"{name} {list(parameter.shape)} ".encode() + head)
    return digest.hexdigest()


def _free_memory(device: torch.device, limit: float | None) -> float:
    """Bytes that may still be taken on the device, of at most `limit` in all."""
    if device.type != "cuda":
        return math.inf
    empty_cache(device)
    free = torch.cuda.mem_get_info(device)[0]
    return free if limit is None else min(free, limit - torch.cuda.memory_allocated(device))


@contextmanager
def _placed(
    transformer: nn.Module, tokens: int, batch_size: int, device: torch.device, limit: float | None
) -> Iterator[int]:
    """Within the block the transformer, else on the CPU, computes on the device, whole or block by block.

    Gives how many pictures of so many tokens there is room for at a time.
    """
    room = 0.9 * _free_memory(device, limit)
    weights = sum(parameter.nbytes for parameter in transformer.parameters())
    picture = tokens * transformer.inner_dim * transformer.dtype.itemsize * ACTIVATIONS
    if weights + picture < room:
        transformer.to(device)
        try:
            yield batch_size if room == math.inf else int(min(batch_size, (room - weights) // picture))
        finally:
            transformer.to(CPU)
        return
    # Every step takes all weights to the device, so as many pictures as there is room for share it.
    blocks = 3 * max(sum(p.nbytes for p in transformer.get_submodule(n).parameters()) for n in block_names(transformer))
    log.info("%.1f GB of weights, %.1f GB of room: block by block", weights / 1e9, room / 1e9)
    streams = stream_settings(transformer, device)
    apply_group_offloading(transformer, device, offload_type="block_level", num_blocks_per_group=1, **streams)
    try:
        yield int(max(1, (room - blocks) // picture))
    finally:
        stop_streaming(transformer)


def _encode(
    pipe: DiffusionPipeline, prompts: Sequence[str], device: torch.device, guidance_scale: float
) -> dict[str, Tensor]:
    """The text of the prompts, {name: [N, …]} on the CPU, where the text encoders come from and go back to."""
    encoders = [getattr(pipe, name) for name in family_of(pipe).text_encoders]
    encoders = [encoder for encoder in encoders if encoder is not None]
    for encoder in encoders:
        encoder.to(device)
    text = encode_prompts(pipe, prompts, ENCODED, device, guidance_scale)
    for encoder in encoders:
        encoder.to(CPU)
    return text


@torch.no_grad()
def record_calls(
    pipe: DiffusionPipeline, prompts: Sequence[str], used: Collection[int] | Callable[[int], Collection[int]], *,
    seed: int, size: int, num_inference_steps: int, guidance_scale: float, batch_size: int, device: torch.device,
    limit: float | None = None,
) -> list[dict]:  # fmt: skip
    """The transformer's keyword arguments in the `used` steps of drawing the prompts, on the CPU; of the n-th batch of
    prompts in used(n), if that is a function.

    Where a step takes two calls, both are kept. Each call gets one entry more, "weight": the length of its step in
    sigma times the number of steps, since an error of the velocity enters the picture times that length. The pipeline
    is on the CPU before and after; nothing is decoded. On CUDA no more than `limit` bytes are taken, by default what is
    free.
    """
    text = _encode(pipe, prompts, device, guidance_scale)
    pipe.vae.to(device)  # the pipeline computes where its first component is
    tokens = (size // (2 * pipe.vae_scale_factor)) ** 2 + text["prompt_embeds"].shape[1]
    each = family_of(pipe).calls_a_step(pipe, guidance_scale)
    calls = []
    with (
        _placed(pipe.transformer, tokens, batch_size, device, limit) as count,
        tqdm(total=len(prompts), desc="teacher", unit="image") as bar,
    ):
        for batch, start in enumerate(range(0, len(prompts), count)):
            steps = [step for step in sorted(used(batch) if callable(used) else used) for _ in range(each)]
            part = slice(start, min(start + count, len(prompts)))
            noise = initial_noise(pipe, range(seed + part.start, seed + part.stop), size, pipe.transformer.dtype)
            with record_inputs(pipe.transformer, lambda call, steps=steps: call // each in steps) as found:
                sample_latents(
                    pipe, noise, size=size, num_inference_steps=num_inference_steps, guidance_scale=guidance_scale,
                    **{name: rows[part] for name, rows in text.items()},
                )  # fmt: skip
            lengths = (pipe.scheduler.sigmas[:-1] - pipe.scheduler.sigmas[1:]).abs().tolist()
            for step, call in zip(steps, found, strict=True):
                calls.append(call | {"weight": lengths[step] * num_inference_steps})
            bar.update(part.stop - part.start)
    pipe.vae.to(CPU)
    empty_cache(device)
    return calls


# -------------------------------------------------------------------------------------------------- the two streams


def split_calls(calls: Iterable[dict], tokens: int) -> list[dict]:
    """The recorded calls of the transformer, cut along the batch so that none has more than `tokens` tokens of text and
    image (or than one sample). What was one tensor in several calls still is."""
    cut: dict[tuple, Tensor] = {}
    found = []
    for call in calls:
        batch = len(call["hidden_states"])
        size = max(1, tokens // sum(call[name].shape[1] for name in HIDDEN))
        for start in range(0, batch, size):
            part = dict(call)
            for name in BATCHED:
                if isinstance(call.get(name), Tensor) and size < batch:
                    whole = call[name]
                    part[name] = cut.setdefault((id(whole), start), whole[start : start + size].clone())
            found.append(part)
    return found


class _Reached(Exception):
    """Raised to stop a forward pass where the blocks begin."""


@dataclass
class Streams:
    """The inputs of the next block in every call.

    teacher, student: (encoder_hidden_states, hidden_states) [B, tokens, d] of each call, on the host, pinned for CUDA.
    rest: all other keyword arguments that blocks take, of each call, on the device; see arguments.
    vectors: those of them that are made of the time, [B, …].
    changed: of each call, what the student has in the place of the teacher's vectors.
    folder: where hidden states are mapped from files that have no name, and are gone with the process; None: in memory.
    """

    device: torch.device
    folder: Path | None = None
    vectors: tuple[str, ...] = ()
    rest: list[dict] = field(default_factory=list)
    changed: list[dict] = field(default_factory=list)
    teacher: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    student: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.rest)

    def append(self, inputs: dict) -> None:
        """Take the keyword arguments, on the device, of the blocks in another call; hidden states are the first's."""
        rest = {name: value for name, value in inputs.items() if name not in HIDDEN}
        if self.rest and all(map(torch.equal, rest["image_rotary_emb"], self.rest[-1]["image_rotary_emb"])):
            rest["image_rotary_emb"] = self.rest[-1]["image_rotary_emb"]  # megabytes, and most calls' are equal
        self.rest.append(rest)
        self.changed.append({})
        for stream in (self.teacher, self.student):
            stream.append(tuple(self.to_host(inputs[name]) for name in HIDDEN))

    def to_host(self, tensor: Tensor) -> Tensor:
        """A copy in host memory, pinned for CUDA, or mapped from a file in `folder`."""
        if self.folder is None:
            return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=self.device.type == "cuda").copy_(tensor)
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self.folder / "hidden_states"
        held = torch.from_file(str(file), shared=True, size=tensor.numel(), dtype=tensor.dtype).view(tensor.shape)
        file.unlink()  # it lives on for as long as it is mapped
        return held.copy_(tensor)

    def inputs(self, stream: list[tuple[Tensor, Tensor]], i: int) -> dict:
        """Call i's keyword arguments for the next blocks, on the device; `stream` is self.teacher or self.student.

        On a CPU they are the stream's own tensors: not to be written to, and other values after `advance`.
        """
        hidden = (tensor.to(self.device, non_blocking=True) for tensor in stream[i])
        changed = self.changed[i] if stream is self.student else {}
        return self.rest[i] | changed | dict(zip(HIDDEN, hidden, strict=True))

    def advance(self, module: nn.Module, parameters: dict[str, Tensor]) -> None:
        """Put the outputs of the block `module` in the place of its inputs, the student's with `parameters` in place of
        the block's own."""
        for i in range(len(self)):
            for stream, own in ((self.teacher, {}), (self.student, parameters)):
                for host, made in zip(stream[i], run_block(module, own, self.inputs(stream, i)), strict=True):
                    host.copy_(made, non_blocking=True)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # before anyone reads them on the host

    def modulate(self, name: str, module: nn.Module, parameters: dict[str, Tensor]) -> None:
        """Let the student's blocks take what `module` makes with `parameters` as their argument `name`."""
        for i, rest in enumerate(self.rest):
            self.changed[i][name] = run_block(module, parameters, rest)


@functools.cache
def _taken(kind: type) -> frozenset[str]:
    return frozenset(inspect.signature(kind.forward).parameters)


def arguments(module: nn.Module, inputs: dict) -> dict:
    """Those of the keyword arguments `inputs` that the module takes."""
    return {name: value for name, value in inputs.items() if name in _taken(type(module))}


def run_block(module: nn.Module, parameters: dict[str, Tensor], inputs: dict) -> tuple[Tensor, Tensor]:
    """The block's output (encoder_hidden_states, hidden_states), with `parameters` in place of its own of that name."""
    return torch.func.functional_call(module, parameters, kwargs=arguments(module, inputs))


@torch.no_grad()
def first_inputs(
    transformer: nn.Module, calls: Iterable[dict], device: torch.device, folder: Path | None = None
) -> Streams:
    """Both streams where the blocks begin, in each of the transformer's calls (keyword arguments); see Streams.

    Of the transformer only what comes before the blocks is taken to `device`, and back to the CPU.
    """
    made, fixed = _made(transformer), {}
    for blocks in transformer_class(transformer).family.blocks.values():
        fixed |= blocks.fixed
    streams, seen = Streams(device, folder, tuple(dict.fromkeys(["temb", *made.values()]))), {}
    before = [module for module in transformer.children() if not isinstance(module, nn.ModuleList)]

    def stop(module, args, kwargs):
        streams.append(kwargs | seen | fixed)
        raise _Reached

    hooks = [transformer.get_submodule(block_names(transformer)[0]).register_forward_pre_hook(stop, with_kwargs=True)]
    for path, name in made.items():
        module = transformer.get_submodule(path)
        hooks.append(module.register_forward_hook(lambda _, args, output, name=name: seen.update({name: output})))
        if path in modulation_names(transformer):
            hooks.append(module.register_forward_pre_hook(lambda _, args: seen.update(temb=args[0])))
    for module in before:
        module.to(device)
    try:
        for inputs in calls:
            try:
                transformer(**send_to_device(inputs, device))
            except _Reached:
                pass
    finally:
        for hook in hooks:
            hook.remove()
        for module in before:
            module.to(CPU)
    return streams


# ---------------------------------------------------------------------------------------------------------- the walk


@dataclass
class Block:
    """A block that is to be treated, or a modulation outside of the blocks. `module` is on the device and holds the
    teacher's parameters; it stays as it is.

    order: its linears by name, in the order in which they compute, those together whose inputs are made together.
    notes: JSON values to be kept with what the treatment makes of it.
    """

    name: str
    module: nn.Module
    streams: Streams
    order: tuple[tuple[str, ...], ...]
    notes: dict = field(default_factory=dict)

    def teacher_inputs(self, i: int) -> dict:
        """The block's keyword arguments in call i of the teacher, on the device."""
        return self.streams.inputs(self.streams.teacher, i)

    def student_inputs(self, i: int) -> dict:
        """The block's keyword arguments in call i of the student, on the device."""
        return self.streams.inputs(self.streams.student, i)


def make_block(transformer: nn.Module, name: str, streams: Streams) -> Block:
    """The transformer's block of this name, taken to the streams' device."""
    order = transformer_class(transformer).family.order
    if name in modulation_names(transformer):
        order = (("linear",),)
    return Block(name, transformer.get_submodule(name).to(streams.device), streams, order)


def block_names(transformer: nn.Module) -> list[str]:
    """The names of the blocks, in the order in which they compute."""
    return transformer_class(transformer).family.block_names(transformer)


def modulation_names(transformer: nn.Module) -> list[str]:
    """The names of the modules outside of the blocks whose linears are quantized as well."""
    family = transformer_class(transformer).family
    linears = family.linears(transformer)
    return [name.rpartition(".")[0] for name in linears if name.partition(".")[0] not in family.blocks]


def stage_names(transformer: nn.Module) -> list[str]:
    """The names of all that a walk treats, in its order."""
    return [*modulation_names(transformer), *block_names(transformer)]


def _made(transformer: nn.Module) -> dict[str, str]:
    """Modules before the blocks by name, and which argument of the blocks is what they put out."""
    lists = transformer_class(transformer).family.blocks.values()
    return {module: name for blocks in lists for name, module in blocks.made.items()}


def student_parameters(block: Block, tensors: dict[str, Tensor], w_bits: int) -> dict[str, Tensor]:
    """A block's parameters, by their names inside it, that the stored `tensors` stand for: on the device, in the
    dtype of the block's own."""
    found, device = {}, block.streams.device
    for name, own in block.module.named_parameters():
        full = f"{block.name}.{name}"
        if full in tensors:
            found[name] = tensors[full].to(device, own.dtype)
        else:
            codes = from_disk(tensors[f"{full}_codes"].to(device), w_bits, own.shape[1])
            alpha = tensors[f"{full}_clip_val"].to(device)
            found[name] = dequantize(codes, alpha, w_bits, own.shape[1], own.dtype)
    return found


@torch.no_grad()
def walk(
    transformer: nn.Module,
    calls: Iterable[dict],
    w_bits: int,
    treat: Callable[[Block], dict[str, Tensor]],
    work: Work,
    device: torch.device = CPU,
    folder: Path | None = None,
) -> None:
    """Treat modulation and blocks of `transformer` one after the other, each on `device`, along `calls` of it.

    treat(block) returns all tensors of the treated block under their full names as a packed folder stores them: a
    layer's weight_codes, weight_clip_val and bias, or a parameter as it is. They are kept in `work`; blocks that are
    there already are run but not treated again. With a `folder` the streams lie there, not in memory. Transformer and
    calls are on the CPU. The transformer is used up: the blocks behind are freed, on the meta device. No gradients:
    treat turns them on where it wants them.
    """
    streams = first_inputs(transformer, calls, device, folder)
    names, made, modulation = stage_names(transformer), _made(transformer), modulation_names(transformer)
    finished = sum(work.has(name) for name in names)
    if finished:
        log.info("%s: %d of %d blocks are finished; going on from there", work.folder, finished, len(names))
    with tqdm(total=len(names), initial=finished, desc="blocks", unit="block") as bar:
        for name in names:
            block = make_block(transformer, name, streams)
            if not work.has(name):
                work.keep(name, treat(block), block.notes)
                bar.update()
            # Read back even if it was just made: a walk that goes on later sees the same numbers.
            parameters = student_parameters(block, work.block(name), w_bits)
            if name in modulation:
                streams.modulate(made[name], block.module, parameters)
            else:
                streams.advance(block.module, parameters)
            _free(block.module)


def _free(module: nn.Module) -> None:
    """Give a module's memory back, whoever else still holds its parameters, and leave it on the meta device."""
    for parameter in module.parameters():
        parameter.data = parameter.data.new_empty(0)
    module.to("meta")


def stored_tensors(transformer: nn.Module, work: Work) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of the whole transformer after a walk: the finished blocks', and its own outside of them."""
    for name in stage_names(transformer):
        yield from work.block(name).items()
    for name, parameter in transformer.named_parameters():
        if not parameter.is_meta:
            yield name, parameter
