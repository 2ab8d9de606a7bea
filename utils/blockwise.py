"""Quantize block by block: all of a block's weights are trained through the quantizer, then the next block's.

    student   x̃ ─ quantized, done ─ [ block i, in training ] ─ blocks i+1 … i+K, full precision ─ ỹ
    teacher   x ─ full precision ────────────────────────────────────────────────────────────── y

loss = mean over the samples of (‖ỹ − y‖²/‖y‖²)^loss_power. The samples lie on the teacher's trajectories; x̃ is what
the blocks quantized so far make of them, so that block i also corrects what those have lost. The blocks after it show
which part of its error matters: where the window reaches the end of the transformer, y is the velocity itself. In
between it is the hidden states of image and text. AdamW trains weights, step sizes, biases and norms; for the last part
of the steps the codes stay and the rest is trained for them. Block-wise training of all weights: EfficientQAT
(arXiv 2407.11062), there without a look ahead.

What must fit where, for blocks of width d and M tokens a sample (FLUX.1-dev in 16 bits at 1024 pixels: d 3072, M 4608)

    device        the block in fp32, its gradients and two moments (16 bytes a weight: 5.4 GB for a double block), the
                  K blocks after it (0.7 GB each), the activations of one micro-batch
    host or disk  the transformer (24 GB), and the hidden states of all samples before block i and after block i+K:
                  4·M·d bytes a sample (57 MB)
    disk          what was trained, block after block, in fp32 (47 GB), to go on from
"""

import copy
import json
import math
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from accelerate.utils import send_to_device
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from models.packing import PackedLinear
from models.utils_quant import QuantizeLinear
from utils.oneshot import block_inputs
from utils.utils import empty_cache, get_logger

log = get_logger("blockwise")
CPU = torch.device("cpu")
ERROR_FLOOR = 1e-12  # of a sample; the gradient of a power below 1 has a pole at zero
WARMUP = 0.05  # of the steps
WARM = 4  # steps on a side stream before one is captured as a CUDA graph


@dataclass(frozen=True)
class Settings:
    """How every block is trained."""

    w_bits: int = 0
    steps: int = 1000
    batch_size: int = 256
    micro_batch_size: int = 256
    learning_rate: float = 5e-4
    lookahead: int = 8
    together: int = 1
    rounds: int = 1
    loss_power: float = 0.5
    local_loss: float = 0.0
    freeze_codes: float = 0.1
    checkpointing: bool = False
    seed: int = 0


# ------------------------------------------------------------------------------------------------------- the samples


class Stream:
    """Hidden states of all samples between two blocks: image [N, L, D] and text [N, S, D], or the velocity [N, L, C].

    `place` is a device, or a folder in which they are mapped from files.
    """

    def __init__(self, image: Tensor, text: Tensor | None, place: torch.device | Path, name: str):
        self.place, self.name, self.depth = place, name, 0
        self.image = self._hold(image, "image")
        self.text = None if text is None else self._hold(text, "text")

    def _hold(self, tensor: Tensor, kind: str) -> Tensor:
        if isinstance(self.place, torch.device):
            return tensor.to(self.place, copy=True)
        file = self.place / f"{self.name}.{kind}"
        file.unlink(missing_ok=True)
        held = torch.from_file(str(file), shared=True, size=tensor.numel(), dtype=tensor.dtype).view(tensor.shape)
        return held.copy_(tensor)

    def tensors(self) -> dict[str, Tensor]:
        return {"image": self.image} | ({} if self.text is None else {"text": self.text})


@dataclass
class Samples:
    """What all blocks get beside the hidden states: temb [N, D] and the rotary embedding of the tokens."""

    temb: Tensor
    rotary: tuple[Tensor, Tensor]

    def __len__(self) -> int:
        return len(self.temb)


def gather(calls: list[dict], place: torch.device | Path, device: torch.device) -> tuple[Stream, Samples]:
    """The samples of all calls of the first block (see block_inputs), one after the other. `calls` is used up."""
    rotary, temb = calls[0]["image_rotary_emb"], torch.cat([call["temb"] for call in calls]).to(device)
    for call in calls:
        if any(not torch.equal(a, b) for a, b in zip(call["image_rotary_emb"], rotary, strict=True)):
            raise ValueError("block-wise training needs samples of one picture size")
    image = torch.cat([call.pop("hidden_states") for call in calls])
    text = torch.cat([call.pop("encoder_hidden_states") for call in calls])
    return Stream(image, text, place, "student"), Samples(temb, send_to_device(rotary, device))


def wanted_calls(steps: int, early_share: float, stride: int) -> Callable[[int], bool]:
    """Which of the transformer's calls, `steps` a batch of prompts, to record: `early_share` of the samples from the
    first quarter of the steps, of which every `stride`-th is taken. Each batch starts with another step."""
    quarter = max(1, round(steps / 4))
    odds = early_share / (1 - early_share)
    late = max(1, round(stride * odds * (steps - quarter) / quarter))

    def wanted(number: int) -> bool:
        batch, step = divmod(number, steps)
        return (step + batch) % (stride if step < quarter else late) == 0

    return wanted


def run_blocks(
    blocks: Iterable[nn.Module], text: Tensor, image: Tensor, temb: Tensor, rotary, checkpointing: bool = False
) -> tuple[Tensor, Tensor]:
    """Text and image tokens after `blocks`; with `checkpointing` only what is between them is kept for the gradient."""
    for block in blocks:
        inputs = {"hidden_states": image, "encoder_hidden_states": text, "temb": temb, "image_rotary_emb": rotary}
        if checkpointing:
            text, image = checkpoint(block, **inputs, use_reentrant=False, preserve_rng_state=False)
        else:
            text, image = block(**inputs)
    return text, image


# ------------------------------------------------------------------------------------------------------- one window


def quantized_copy(block: nn.Module, name: str, w_bits: int, device: torch.device) -> nn.Module:
    """A trainable fp32 copy of a full-precision block on `device`, its linears quantized."""
    block = copy.deepcopy(block).to(device).float().train().requires_grad_(True)
    for path, layer in list(block.named_modules()):
        if isinstance(layer, nn.Linear):
            block.set_submodule(path, QuantizeLinear.from_linear(layer, f"{name}.{path}", w_bits=w_bits))
    return block


def sample_errors(found: Tensor, target: Tensor, energy: Tensor) -> Tensor:
    """Mean squared error of each sample [B, …], over `energy`, the mean square of all targets: [B]."""
    return (found.float() - target.float()).square().flatten(1).mean(1) / energy


def rate_at(step: int, steps: int) -> float:
    """The share of the learning rate: linear warm-up, then a cosine to zero."""
    return min(1.0, (step + 1) / max(1, WARMUP * steps)) * 0.5 * (1 + math.cos(math.pi * step / steps))


def batches(samples: int, size: int, count: int, seed: int) -> Iterator[Tensor]:
    """`count` batches of `size` indices; every sample comes once before one comes again."""
    generator, rest = torch.Generator().manual_seed(seed), torch.empty(0, dtype=torch.long)
    for _ in range(count):
        while len(rest) < size:
            rest = torch.cat([rest, torch.randperm(samples, generator=generator)])
        batch, rest = rest[:size], rest[size:]
        yield batch


def ahead(work: Callable, items: Iterable) -> Iterator:
    """work(item) of every item, the next one on its way in a thread."""
    with ThreadPoolExecutor(1) as pool:
        pending = None
        for item in items:
            following = pool.submit(work, item)
            if pending is not None:
                yield pending.result()
            pending = following
        if pending is not None:
            yield pending.result()


class Window:
    """Blocks in training, frozen ones after them, and what the outputs are compared with.

    trained   the blocks in training, the first one for the last time
    frozen    the blocks after them
    head      what makes the velocity of the image tokens, (image, temb) -> [B, L, C], if `frozen` ends the transformer
    targets   the teacher's stream after so many blocks of the window: {number of blocks: (stream, weight in the loss)}
    """

    def __init__(
        self, trained: list[nn.Module], frozen: list[nn.Module], head: Callable | None, inputs: Stream,
        targets: dict[int, tuple[Stream, float]], samples: Samples, settings: Settings, device: torch.device,
    ):  # fmt: skip
        self.trained, self.blocks, self.head = trained, [*trained, *frozen], head
        self.inputs, self.targets, self.samples = inputs, targets, samples
        self.settings, self.device = settings, device
        self.energy = {
            (end, kind): mean_square(tensor, device)
            for end, (stream, _) in targets.items() for kind, tensor in stream.tensors().items()
        }  # fmt: skip

    def fetch(self, indices: Tensor) -> dict[str, Tensor]:
        """Inputs and targets of these samples on the device, by name."""
        streams = {"in": self.inputs} | {f"{end}": stream for end, (stream, _) in self.targets.items()}
        found = {f"{name}.{kind}": t for name, stream in streams.items() for kind, t in stream.tensors().items()}
        found["temb"] = self.samples.temb
        return {name: tensor[indices.to(tensor.device)].to(self.device) for name, tensor in found.items()}

    def errors(self, batch: dict[str, Tensor]) -> list[tuple[Tensor, float]]:
        """Normalized errors [B] of each target's image and text tokens (or of the velocity), with their weights."""
        text, image, found, start = batch["in.text"], batch["in.image"], [], 0
        for end, (stream, weight) in sorted(self.targets.items()):
            text, image = run_blocks(
                self.blocks[start:end], text, image, batch["temb"], self.samples.rotary, self.settings.checkpointing
            )
            last = self.head is not None and end == len(self.blocks)
            outputs = {"image": self.head(image, batch["temb"])} if last else {"image": image, "text": text}
            for kind in stream.tensors():
                error = sample_errors(outputs[kind], batch[f"{end}.{kind}"], self.energy[end, kind])
                found.append((error, weight))
            start = end
        return found

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        with autocast(self.device, self.inputs.image.dtype):
            errors = self.errors(batch)
        return sum(w * e.clamp(min=ERROR_FLOOR).pow(self.settings.loss_power).mean() for e, w in errors)

    @torch.no_grad()
    def measure(self, count: int = 512) -> float:
        """Normalized squared error of the image tokens (or of the velocity) at the window's end, over `count` samples
        spread over all."""
        picked = torch.linspace(0, len(self.samples) - 1, min(count, len(self.samples))).long()
        found = []
        with torch.compiler.set_stance("force_eager"), autocast(self.device, self.inputs.image.dtype):
            for indices in picked.split(self.settings.micro_batch_size):
                ends = [error for error, _ in self.errors(self.fetch(indices))]
                found.append(ends[-1] if self.targets[max(self.targets)][0].text is None else ends[-2])
        return torch.cat(found).mean().item()

    def fit(self, steps: int, seed: int) -> None:
        """Train what wants a gradient for `steps` steps. On CUDA a step of one micro-batch is replayed as a graph."""
        settings, graph = self.settings, None
        micro = min(settings.micro_batch_size, settings.batch_size)
        parts = -(-settings.batch_size // micro)
        rate = torch.tensor(0.0, device=self.device)  # a tensor: a graph replays numbers as they were
        on_cuda = self.device.type == "cuda"
        parameters = [p for block in self.trained for p in block.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(
            parameters, lr=rate if on_cuda else 0.0, betas=(0.9, 0.95), weight_decay=0, fused=True, capturable=on_cuda
        )
        side = torch.cuda.Stream(self.device) if on_cuda and parts == 1 else None
        drawn = batches(len(self.samples), micro, steps * parts, seed)
        # While one thread captures a graph, no other may call CUDA.
        fetched = ahead(self.fetch, drawn) if side is None else map(self.fetch, drawn)

        def backward(batch: dict[str, Tensor]) -> None:
            (self.loss(batch) / parts).backward()

        def step(batch: dict[str, Tensor]) -> None:
            optimizer.zero_grad(set_to_none=True)
            backward(batch)
            optimizer.step()

        static: dict[str, Tensor] = {}
        for number in range(steps):
            value = settings.learning_rate * rate_at(number, steps)
            rate.fill_(value)
            if not on_cuda:
                optimizer.param_groups[0]["lr"] = value
            if side is None:
                optimizer.zero_grad(set_to_none=True)
                for _ in range(parts):
                    backward(next(fetched))
                optimizer.step()
                continue
            batch = next(fetched)
            if number < WARM:
                side.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(side):
                    step(batch)
                torch.cuda.current_stream().wait_stream(side)
                continue
            if graph is None:
                static = {name: tensor.clone() for name, tensor in batch.items()}
                optimizer.zero_grad(set_to_none=True)
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    step(static)
            for name, tensor in batch.items():
                static[name].copy_(tensor)
            graph.replay()
        for parameter in parameters:
            parameter.grad = None

    def train(self, seed: int) -> None:
        """All steps of the window, the last freeze_codes of them with the codes of the first block as they are."""
        steps = self.settings.steps
        before = steps - round(self.settings.freeze_codes * steps)
        if before:
            self.fit(before, seed)
        if before < steps:
            for layer in self.trained[0].modules():
                if isinstance(layer, QuantizeLinear):
                    layer.freeze_codes()
                    layer.weight.requires_grad_(False)
            self.fit(steps - before, seed + 1)
            for layer in self.trained[0].modules():
                if isinstance(layer, QuantizeLinear):
                    layer.settle()
                    layer.frozen_codes = None
                    layer.weight.requires_grad_(True)


def autocast(device: torch.device, dtype: torch.dtype):
    """What the samples are computed in: their own dtype. A graph must not remember casts of an earlier step."""
    if dtype == torch.float32:
        return nullcontext()
    return torch.autocast(device.type, dtype, cache_enabled=False)


def mean_square(tensor: Tensor, device: torch.device) -> Tensor:
    """Mean square of [N, …] on the device, a few samples at a time."""
    parts = [part.to(device).float().square().mean() * len(part) for part in tensor.split(64)]
    return torch.stack(parts).sum() / len(tensor)


# ------------------------------------------------------------------------------------------------------- all blocks


class Walk:
    """Goes through the blocks of `transformer`, which stays on the CPU, window after window.

    calls    keyword arguments of the transformer's calls on the CPU, each a batch of samples
    folder   holds what was trained, and the hidden states if `on_disk`
    what     what else an interrupted walk must agree with, JSON-able
    """

    def __init__(
        self, transformer: nn.Module, calls: list[dict], settings: Settings, device: torch.device, folder: Path,
        on_disk: bool = False, compile: bool = False, what: dict | None = None,
    ):  # fmt: skip
        self.transformer, self.settings, self.device, self.folder = transformer, settings, device, folder
        self.compile = compile
        lists = ("transformer_blocks", "single_transformer_blocks")
        self.names = [f"{name}.{i}" for name in lists for i in range(len(getattr(transformer, name)))]
        self.teacher = [transformer.get_submodule(name) for name in self.names]
        self.current = list(self.teacher)  # quantized ones in their place from the second round on
        self._agree(asdict(settings) | (what or {}))
        inputs = block_inputs(transformer, calls, device)
        place = folder / "streams" if on_disk else self._place(inputs)
        if on_disk:
            place.mkdir(exist_ok=True)
        self.inputs, self.samples = gather(inputs, place, device)
        self.first = Stream(self.inputs.image, self.inputs.text, place, "first") if settings.rounds > 1 else None
        ends = {settings.together + settings.lookahead: 1.0}
        if settings.local_loss and settings.lookahead:
            ends[settings.together] = settings.local_loss
        self.targets = {
            end: (Stream(self.inputs.image, self.inputs.text, place, f"teacher_{end}"), weight)
            for end, weight in ends.items()
        }
        held = (self.inputs, self.first, *(stream for stream, _ in self.targets.values()))
        size = sum(t.nbytes for stream in held if stream for t in stream.tensors().values())
        log.info("%d samples, whose hidden states take %.1f GB: %s", len(self.samples), size / 1e9, place)

    def _place(self, inputs: list[dict]) -> torch.device:
        """The device if all streams fit in a quarter of its free memory, else the CPU."""
        if self.device.type != "cuda":
            return CPU
        size = sum(call[name].nbytes for call in inputs for name in ("hidden_states", "encoder_hidden_states"))
        return self.device if 16 * size < torch.cuda.mem_get_info(self.device)[0] else CPU

    def _agree(self, what: dict) -> None:
        """Take up the walk that `folder` holds, if any; ValueError, naming the setting, if it was another one."""
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self.folder / "settings.json"
        if not file.exists():
            write_text(file, json.dumps(what, indent=2) + "\n")
            return
        found = json.loads(file.read_text())
        for name, wanted in what.items():
            if found.get(name) != wanted:
                raise ValueError(
                    f"{self.folder}: trained with {name}={found.get(name)}, asked for {name}={wanted}; give the same "
                    "settings, or delete the folder to start anew"
                )

    # A position is a round and a block: number = round·blocks + block. Files are named NUMBER-BLOCK.safetensors.

    def _file(self, number: int, block: int) -> Path:
        return self.folder / f"{number}-{block}.safetensors"

    def _finished(self) -> int:
        """How many positions are done: the last thing written for each is the file of its own block."""
        found = (map(int, file.stem.split("-")) for file in self.folder.glob("*-*.safetensors"))
        return max((number + 1 for number, block in found if block == number % len(self.names)), default=0)

    def _newest(self, block: int, before: int) -> Path | None:
        """The file of a block that was written last before position `before`."""
        numbers = (int(file.name.partition("-")[0]) for file in self.folder.glob(f"*-{block}.safetensors"))
        number = max((n for n in numbers if n < before), default=None)
        return None if number is None else self._file(number, block)

    def student(self, block: int, before: int, device: torch.device | None = None) -> nn.Module:
        """The trainable block as it was before position `before`: trained so far, or rounded from the teacher's."""
        made = quantized_copy(self.teacher[block], self.names[block], self.settings.w_bits, device or self.device)
        if file := self._newest(block, before):
            made.load_state_dict(load_file(file, device=str(device or self.device)))
        return made

    @torch.no_grad()
    def advance(self, stream: Stream, block: nn.Module) -> None:
        """Take all samples of a stream through the next block, full-precision or a plain_copy, in their place."""
        with torch.compiler.set_stance("force_eager"):
            for start in range(0, len(self.samples), self.settings.micro_batch_size):
                part = slice(start, start + self.settings.micro_batch_size)
                text, image = (tensor[part].to(self.device) for tensor in (stream.text, stream.image))
                text, image = run_blocks([block], text, image, self.samples.temb[part], self.samples.rotary)
                stream.text[part], stream.image[part] = text.to(stream.text.device), image.to(stream.image.device)
        stream.depth += 1

    def head(self, image: Tensor, temb: Tensor) -> Tensor:
        """The velocity of the image tokens after the last block."""
        return self.transformer.proj_out(self.transformer.norm_out(image, temb))

    @torch.no_grad()
    def advance_teacher(self, stream: Stream, depth: int) -> None:
        """Take the teacher's hidden states to where `depth` blocks are behind them, at the end to the velocity."""
        while stream.depth < min(depth, len(self.teacher)):
            block = self.teacher[stream.depth].to(self.device)
            self.advance(stream, block)
            block.to(CPU)
        if stream.depth == len(self.teacher) and stream.text is not None:
            parts = zip(stream.image.split(256), self.samples.temb.split(256), strict=True)
            velocity = [self.head(image.to(self.device), temb).to(stream.image.device) for image, temb in parts]
            stream.image, stream.text = torch.cat(velocity), None

    def next_round(self) -> None:
        """All streams as they were before the first block; what has become the velocity stays."""
        self.inputs = Stream(self.first.image, self.first.text, self.inputs.place, self.inputs.name)
        for end, (stream, weight) in self.targets.items():
            if stream.text is not None or end < len(self.teacher):
                self.targets[end] = Stream(self.first.image, self.first.text, stream.place, stream.name), weight

    def put(self, block: int, student: nn.Module, ahead: bool = True) -> None:
        """Take the student's stream through a trained block, which also gets its place for another round."""
        plain = plain_copy(self.teacher[block], student)
        if ahead:
            self.advance(self.inputs, plain.to(self.device))
        if self.settings.rounds > 1:
            self.current[block] = plain.to(CPU)

    def take_up(self, finished: int) -> None:
        """Put the blocks trained before position `finished` in their places, and the student's stream behind them."""
        turn, position = divmod(finished, len(self.names))
        for block in range(len(self.names)):
            if block < position or turn:
                student = self.student(block, finished)
                self.put(block, student, ahead=block < position)

    def go(self) -> None:
        """Train every block, from where an interrupted walk ended."""
        blocks, finished, total = len(self.names), self._finished(), len(self.names) * self.settings.rounds
        for module in (self.transformer.norm_out, self.transformer.proj_out):
            module.to(self.device).requires_grad_(False)
        torch.backends.cuda.enable_cudnn_sdp(False)  # its backward fails for tiny-flux's shapes (torch 2.11, H100)
        torch._dynamo.config.recompile_limit = 64  # blocks of both kinds, in training, frozen or with frozen codes
        if finished:
            log.info("going on from %s", self.folder)
            self.take_up(finished)
        with tqdm(total=total, initial=finished, desc="blocks", unit="block") as bar:
            for number in range(finished, total):
                block, started = number % blocks, time.time()
                if block == 0 and number > finished:
                    self.next_round()
                trained, error = self.train_window(number)
                self.put(block, trained)
                del trained
                empty_cache(self.device)
                bar.update()
                log.info("%s: error %.4f, %.0f s", self.names[block], error, time.time() - started)

    def train_window(self, number: int) -> tuple[nn.Module, float]:
        """Train the window that starts at a position; its first block, and the error at its end."""
        blocks, settings = len(self.names), self.settings
        block = number % blocks
        middle = min(block + settings.together, blocks)
        end = min(middle + settings.lookahead, blocks)
        targets: dict[int, tuple[Stream, float]] = {}
        for reach, (stream, weight) in self.targets.items():
            self.advance_teacher(stream, block + reach)
            targets.setdefault(min(block + reach, blocks) - block, (stream, weight))
        trained = [self.student(i, number) for i in range(block, middle)]
        frozen = [self.current[i].to(self.device).requires_grad_(False) for i in range(middle, end)]
        if self.compile:
            for module in (*trained, *frozen):
                module.compile(dynamic=False)
        head = self.head if end == blocks else None
        window = Window(trained, frozen, head, self.inputs, targets, self.samples, settings, self.device)
        window.train(settings.seed + 2 * number)
        for i, module in reversed(list(enumerate(trained))):  # the first one last: it says that all are there
            write_tensors(self._file(number, block + i), module.state_dict())
        for i in range(block, middle):
            for file in self.folder.glob(f"*-{i}.safetensors"):
                if file != self._newest(i, number + 1):
                    file.unlink()
        error = window.measure()
        for i in range(middle, end):
            self.current[i].to(CPU)
            self.current[i].__dict__.pop("_compiled_call_impl", None)
        trained[0].__dict__.pop("_compiled_call_impl", None)
        return trained[0], error

    def finish(self, keep: Callable[[str, PackedLinear, Tensor], None]) -> None:
        """Hand over every layer as keep(name, packed, full-precision weight); the transformer takes the other trained
        parameters, in fp32."""
        positions = len(self.names) * self.settings.rounds
        for module in (self.transformer.norm_out, self.transformer.proj_out):
            module.to(CPU)
        for i, name in enumerate(self.names):
            student = self.student(i, positions)
            for path, layer in student.named_modules():
                if isinstance(layer, QuantizeLinear):
                    packed = PackedLinear.from_quantized(layer, f"{name}.{path}")
                    keep(f"{name}.{path}", packed, self.teacher[i].get_submodule(path).weight.to(self.device))
            for path, parameter in self.teacher[i].named_parameters():
                if not isinstance(student.get_submodule(path.rpartition(".")[0]), QuantizeLinear):
                    parameter.data = student.get_parameter(path).detach().to(CPU)
        shutil.rmtree(self.folder)


@torch.no_grad()
def plain_copy(teacher: nn.Module, student: nn.Module) -> nn.Module:
    """The teacher's block, on the CPU and in its dtype, with the student's quantized weights and other parameters."""
    block = copy.deepcopy(teacher)
    for name, parameter in block.named_parameters():
        path, _, kind = name.rpartition(".")
        layer = student.get_submodule(path)
        quantized = isinstance(layer, QuantizeLinear) and kind == "weight"
        parameter.copy_(layer.quantized_weight() if quantized else getattr(layer, kind))
    return block


def write_text(file: Path, text: str) -> None:
    """A file that is there whole or not at all."""
    partial = file.with_name(file.name + ".tmp")
    partial.write_text(text)
    partial.replace(file)


def write_tensors(file: Path, tensors: dict[str, Tensor]) -> None:
    """The same for safetensors."""
    partial = file.with_name(file.name + ".tmp")
    save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, partial)
    partial.replace(file)
