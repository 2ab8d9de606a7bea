"""Quantize block by block: all of a block's weights are trained through the quantizer, then the next block's.

    student   x̃ ─ quantized, done ─ [ block i, in training ] ─ blocks i+1 … i+K, full precision ─ ỹ
    teacher   x ─ full precision ────────────────────────────────────────────────────────────── y

loss = mean over the samples of (‖ỹ − y‖²/E‖y‖²)^loss_power. The samples lie on the teacher's trajectories; x̃ is what
the blocks quantized so far make of them, so that block i also corrects what those have lost. The blocks after it show
which part of its error matters: where they reach the end of the transformer, y is the velocity itself, else it is the
hidden states of image and text. AdamW trains weights, step sizes, biases and norms; for the last part of the steps the
codes stay and the rest is trained for them. What FLUX.2 modulates all blocks by is rounded before them and not trained.
In a second round the blocks after block i are the quantized ones of the first, and it makes up for what they lose, too.
Training all weights block by block is EfficientQAT's first phase (arXiv 2407.11062), there without a look ahead.

What must fit where, beside what utils/walk.py says, for blocks of width d and M tokens a sample (FLUX.1-dev in 16 bits
at 1024 pixels: d 3072, M 4608)

    device    the block in fp32, its gradients and two moments (16 bytes a weight: 5.4 GB for a double block), the K
              blocks after it (0.7 GB each), the activations of a micro-batch (about 1 GB a sample and block; with
              checkpointing those of two blocks)
    host      the targets: M·d values a sample (28 MB), as much as each of the walk's two streams
"""

import copy
import itertools
import math
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.kernels import unpack_codes
from models.packing import PackedLinear, adopt_codes, from_disk, to_disk
from models.utils_quant import QuantizeLinear, quantize_codes
from utils.oneshot import calibrate_block
from utils.utils import empty_cache, get_logger
from utils.walk import Block, Streams, Work, arguments, block_names, first_inputs, run_block, student_parameters

log = get_logger("blockwise")
CPU = torch.device("cpu")
STARTS = ("mse", "calibrated")
KINDS = ("text", "image")  # of tokens, in the order in which a block returns them
ERROR_FLOOR = 1e-12  # of a sample; the gradient of a power below 1 has a pole at zero
WARMUP = 0.05  # of the steps
WARM = 4  # steps on a side stream before one is captured as a CUDA graph
JUDGED = 512  # samples by which a trained block is judged


@dataclass(frozen=True)
class Settings:
    """How every block is trained; run.py's flags say more."""

    w_bits: int = 0
    start: str = "mse"  # or "calibrated": the codes to train from
    steps: int = 1000
    batch_size: int = 256
    micro_batch_size: int = 256
    learning_rate: float = 5e-4
    lookahead: int = 8
    loss_power: float = 0.5
    local_loss: float = 0.0
    weigh_channels: bool = False
    freeze_codes: float = 0.1
    checkpointing: bool = False
    compile: bool = False
    seed: int = 0


# ------------------------------------------------------------------------------------------------------- the samples


def used_steps(batch: int, steps: int, early_share: float, stride: int) -> list[int]:
    """Which of the denoising steps of a batch of prompts, the one of this number, to record: over many batches
    `early_share` of the samples are of the first quarter of the steps, of which every `stride`-th is taken."""
    quarter = max(1, round(steps / 4))
    odds = early_share / (1 - early_share)
    late = max(1, round(stride * odds * (steps - quarter) / quarter))
    return [step for step in range(steps) if (step + batch) % (stride if step < quarter else late) == 0]


class Rows:
    """Tensors [B, …] of many calls, to be read on `device` by the number of a sample over all calls."""

    def __init__(self, tensors: list[Tensor], device: torch.device, resident: bool):
        """`resident`: hold them on the device."""
        self.device = device
        self.tensors = [torch.cat([tensor.to(device) for tensor in tensors])] if resident else tensors
        self.ends = torch.tensor([len(tensor) for tensor in self.tensors]).cumsum(0)

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, indices: Tensor) -> Tensor:
        """The rows [N, …] of the samples `indices` [N] (on the CPU)."""
        if len(self.tensors) == 1:
            source = self.tensors[0]
            return source[indices.to(source.device)].to(self.device)
        first = self.tensors[0]
        rows = torch.empty(len(indices), *first.shape[1:], dtype=first.dtype, device=self.device)
        calls = torch.bucketize(indices, self.ends, right=True)
        for row, index, call in zip(rows, indices.tolist(), calls.tolist(), strict=True):
            row.copy_(self.tensors[call][index - int(self.ends[call])], non_blocking=True)  # counted from its end
        return rows

    def mean_square(self) -> Tensor:
        """Of all values, as a scalar on the device."""
        parts = (part.to(self.device).float() for tensor in self.tensors for part in tensor.split(64))
        return sum(part.square().mean() * len(part) for part in parts) / len(self)


def batches(samples: int, size: int, seed: int) -> Iterator[Tensor]:
    """Endless batches [size] of the numbers of samples; each comes once before one comes again."""
    generator, rest = torch.Generator().manual_seed(seed), torch.empty(0, dtype=torch.long)
    while True:
        while len(rest) < size:
            rest = torch.cat([rest, torch.randperm(samples, generator=generator)])
        yield rest[:size]
        rest = rest[size:]


# ----------------------------------------------------------------------------------------------------- what matters


def channel_weights(
    transformer: nn.Module, calls: list[dict], device: torch.device, seed: int = 0
) -> dict[str, dict[str, Tensor]]:
    """How much an error in each channel of a block's outputs matters for the velocity: {block: {"text", "image": [d]}}.

    The mean over samples and tokens of (Jᵀr)², J the Jacobian of the velocity and r normal: the diagonal of JᵀJ
    (Hutchinson's estimate). All blocks go through the device forwards, then backwards; the inputs of each (M·d values a
    sample) are kept on the host meanwhile.
    """
    streams, names = first_inputs(transformer, calls, device), block_names(transformer)
    hidden = [tuple(pair) for pair in streams.teacher]
    inputs, found = [], {}
    for name in names:
        block = transformer.get_submodule(name).to(device)
        inputs.append(hidden)
        with torch.no_grad():
            hidden = [_pass(block, pair, streams, i)[0] for i, pair in enumerate(hidden)]
        block.to(CPU)
    outside = nn.ModuleList([transformer.norm_out, transformer.proj_out]).to(device)
    generator, gradients = torch.Generator().manual_seed(seed), []
    for i, (text, image) in enumerate(hidden):
        leaf = image.to(device).requires_grad_(True)
        with torch.enable_grad():
            velocity = transformer.proj_out(transformer.norm_out(leaf, streams.rest[i]["temb"]))
        direction = torch.randn(velocity.shape, generator=generator).to(velocity)
        gradients.append((torch.zeros_like(text), torch.autograd.grad(velocity, leaf, direction)[0].to(CPU)))
    outside.to(CPU)
    for name, hidden in zip(reversed(names), reversed(inputs), strict=True):
        for kind, parts in zip(KINDS, zip(*gradients, strict=True), strict=True):
            squares = torch.cat([part.float().square().mean(1) for part in parts])  # [samples, d]
            found.setdefault(name, {})[kind] = squares.mean(0).to(device)
        block = transformer.get_submodule(name).to(device)
        gradients = [_pass(block, pair, streams, i, gradients[i])[1] for i, pair in enumerate(hidden)]
        block.to(CPU)
    return found


def _pass(
    block: nn.Module, hidden: tuple[Tensor, Tensor], streams: Streams, call: int, gradients: tuple | None = None
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """A block's outputs (text, image) and, with `gradients` of them, its inputs' gradients, all on the CPU."""
    device, rest = streams.device, streams.rest[call]
    text, image = (tensor.detach().to(device).requires_grad_(gradients is not None) for tensor in hidden)
    with torch.set_grad_enabled(gradients is not None):
        outputs = run_block(block, {}, rest | {"hidden_states": image, "encoder_hidden_states": text})
    wanted = ()
    if gradients is not None:
        wanted = torch.autograd.grad(outputs, (text, image), [g.to(device) for g in gradients])
    return tuple(output.detach().to(CPU) for output in outputs), tuple(gradient.to(CPU) for gradient in wanted)


# --------------------------------------------------------------------------------------------------------- the window


def quantized_copy(block: Block, w_bits: int, start: dict[str, Tensor] | None = None) -> nn.Module:
    """A trainable fp32 copy of the block on its device, its linears quantized at their error-minimal step sizes or to
    the codes, step sizes and biases of `start`, the tensors of the block as a packed folder stores them."""
    module = copy.deepcopy(block.module).float().train().requires_grad_(True)
    for path, layer in list(module.named_modules()):
        if isinstance(layer, nn.Linear):
            name = f"{block.name}.{path}"
            layer = QuantizeLinear.from_linear(layer, name, w_bits=w_bits)
            module.set_submodule(path, layer)
            if start is not None:
                codes = unpack_codes(from_disk(start[f"{name}.weight_codes"], w_bits, layer.in_features), w_bits,
                                     layer.in_features)  # fmt: skip
                alpha, bias = start[f"{name}.weight_clip_val"], start.get(f"{name}.bias")
                adopt_codes(layer, PackedLinear.from_codes(codes, alpha, bias, w_bits), name)
    return module


@torch.no_grad()
def packed_layer(layer: QuantizeLinear, name: str) -> PackedLinear:
    """The packed twin of a trained layer; ValueError, opening with `name`, if training has left NaN or inf in it."""
    if not all(parameter.isfinite().all() for parameter in layer.parameters()):
        raise ValueError(f"{name}: not finite after training; try a lower --block_learning_rate")
    layer.weight.copy_(layer.quantized_weight())  # frozen codes are not those of the weight at the step size
    codes = quantize_codes(layer.weight, layer.weight_clip_val, layer.w_bits)
    return PackedLinear.from_codes(codes, layer.weight_clip_val, layer.bias, layer.w_bits)


def sample_errors(found: Tensor, target: Tensor, energy: Tensor, weights: Tensor | None = None) -> Tensor:
    """Mean squared error of each sample [B, …, d], its channels weighted by `weights` [d], over `energy`: [B]."""
    squares = (found.float() - target.float()).square()
    return (squares if weights is None else squares * weights).flatten(1).mean(1) / energy


def rate_at(step: int, steps: int) -> float:
    """The share of the learning rate: linear warm-up, then a cosine to zero."""
    return min(1.0, (step + 1) / max(1, WARMUP * steps)) * 0.5 * (1 + math.cos(math.pi * step / steps))


def autocast(device: torch.device, dtype: torch.dtype):
    """Compute in the samples' dtype. A CUDA graph must not take over the casts of an earlier step."""
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype, cache_enabled=False)


class Window:
    """A block in training, the blocks after it, and what their outputs are compared with.

    teacher   the block and those after it in full precision, to compute the targets with
    student   the block in training, and those after it as they stay
    head      (image tokens, temb) -> velocity [B, L, C], if they end the transformer, else None
    weights   of the channels of text and image at the window's end, if that is not the transformer's (channel_weights)
    """

    def __init__(
        self, streams: Streams, teacher: list[nn.Module], student: list[nn.Module],
        head: Callable[[Tensor, Tensor], Tensor] | None, settings: Settings,
        weights: dict[str, Tensor] | None = None,
    ):  # fmt: skip
        self.trained, self.blocks, self.head = student[0], student, head
        self.settings, self.device, self.dtype = settings, streams.device, streams.student[0][0].dtype
        self.vectors = streams.vectors
        self.rest = {name: value for name, value in streams.rest[0].items() if name not in self.vectors}
        if any(rest["image_rotary_emb"] is not self.rest["image_rotary_emb"] for rest in streams.rest):
            raise ValueError("block-wise training wants all pictures of one size")
        self.ends = {len(self.blocks): 1.0}  # after how many blocks errors count, and how much
        if settings.local_loss and len(student) > 1:
            self.ends[1] = settings.local_loss
        targets = self._targets(streams, teacher)
        held = {f"in.{kind}": [pair[i] for pair in streams.student] for i, kind in enumerate(KINDS)} | targets
        resident = self._fits(sum(tensor.nbytes for tensors in held.values() for tensor in tensors))
        seen = [rest | changed for rest, changed in zip(streams.rest, streams.changed, strict=True)]
        held |= {name: [rest[name] for rest in seen] for name in self.vectors}
        self.rows = {name: Rows(tensors, self.device, resident) for name, tensors in held.items()}
        self.energy = {name: self.rows[name].mean_square() for name in targets}
        self.weights: dict[str, Tensor] = {}
        if weights is not None and head is None:
            # One measure for both, in which a text token may matter less than an image token.
            mean, end = weights["image"].mean(), len(student)
            self.weights = {f"{end}.{kind}": weights[kind] / mean for kind in KINDS}
            self.energy[f"{end}.text"] = self.energy[f"{end}.image"]

    def _fits(self, size: int) -> bool:
        """Whether the samples may lie on the device: in a quarter of its free memory."""
        return self.device.type != "cuda" or 4 * size < torch.cuda.mem_get_info(self.device)[0]

    @torch.no_grad()
    def _targets(self, streams: Streams, blocks: list[nn.Module]) -> dict[str, list[Tensor]]:
        """The teacher's outputs at each of the ends, on the host, call by call: {"END.KIND": …}."""
        found: dict[str, list[Tensor]] = {}
        for i in range(len(streams)):
            inputs = streams.inputs(streams.teacher, i)
            text, image = inputs["encoder_hidden_states"], inputs["hidden_states"]
            for name, output in self._outputs(blocks, text, image, inputs).items():
                found.setdefault(name, []).append(streams.to_host(output))
        return found

    def _outputs(
        self, blocks: list[nn.Module], text: Tensor, image: Tensor, given: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """What comes of the tokens [B, tokens, d] at each of the ends, {"END.KIND": …}; at the transformer's end the
        velocity counts as image. The streams' vectors are among what is `given`."""
        found, shared = {}, self.rest | {name: given[name] for name in self.vectors}
        for number, block in enumerate(blocks, 1):
            inputs = arguments(block, shared | {"hidden_states": image, "encoder_hidden_states": text})
            # Not the block in training, whose weights would be quantized twice.
            if self.settings.checkpointing and torch.is_grad_enabled() and number > 1:
                text, image = checkpoint(block, **inputs, use_reentrant=False, preserve_rng_state=False)
            else:
                text, image = block(**inputs)
            if number in self.ends:
                last = self.head is not None and number == len(blocks)
                found[f"{number}.image"] = self.head(image, given["temb"]) if last else image
                if not last:
                    found[f"{number}.text"] = text
        return found

    def fetch(self, indices: Tensor) -> dict[str, Tensor]:
        """Inputs and targets of these samples on the device, by name."""
        return {name: rows[indices] for name, rows in self.rows.items()}

    def errors(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """The normalized error [B] of each of the outputs, by name."""
        with autocast(self.device, self.dtype):
            outputs = self._outputs(self.blocks, batch["in.text"], batch["in.image"], batch)
        return {
            name: sample_errors(found, batch[name], self.energy[name], self.weights.get(name))
            for name, found in outputs.items()
        }

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        power = self.settings.loss_power
        terms = {name: error.clamp(min=ERROR_FLOOR).pow(power).mean() for name, error in self.errors(batch).items()}
        return sum(self.ends[int(name.partition(".")[0])] * term for name, term in terms.items())

    @torch.no_grad()
    def judge(self) -> float:
        """Normalized squared error of the image tokens, or of the velocity, at the window's end."""
        samples = len(self.rows["temb"])
        picked = torch.linspace(0, samples - 1, min(JUDGED, samples)).long()
        with torch.compiler.set_stance("force_eager"):
            parts = [self.errors(self.fetch(part)) for part in picked.split(self.settings.micro_batch_size)]
        return torch.cat([part[f"{len(self.blocks)}.image"] for part in parts]).mean().item()

    def fit(self, steps: int, seed: int) -> None:
        """Train for `steps` steps what wants a gradient. On CUDA, steps of one micro-batch are replayed as a graph."""
        settings, cuda = self.settings, self.device.type == "cuda"
        micro = min(settings.micro_batch_size, settings.batch_size)
        parts = -(-settings.batch_size // micro)
        parameters = [p for p in self.trained.parameters() if p.requires_grad]
        rate = torch.tensor(0.0, device=self.device)  # a tensor: a graph replays numbers as they were
        optimizer = torch.optim.AdamW(
            parameters, lr=rate, betas=(0.9, 0.95), weight_decay=0, fused=True, capturable=cuda
        )
        drawn = batches(len(self.rows["temb"]), micro, seed)

        def step(micro_batches: list[dict[str, Tensor]]) -> None:
            optimizer.zero_grad(set_to_none=True)
            for batch in micro_batches:
                (self.loss(batch) / parts).backward()
            optimizer.step()

        replay = Replayed(step, self.device) if cuda and parts == 1 else step
        for number in range(steps):
            rate.fill_(settings.learning_rate * rate_at(number, steps))
            replay([self.fetch(indices) for indices in itertools.islice(drawn, parts)])
        optimizer.zero_grad(set_to_none=True)

    def train(self, seed: int) -> None:
        """All steps, the last `freeze_codes` of them with the codes as they then are."""
        steps = self.settings.steps
        frozen = round(self.settings.freeze_codes * steps)
        if steps > frozen:
            self.fit(steps - frozen, seed)
        if frozen:
            layers = [layer for layer in self.trained.modules() if isinstance(layer, QuantizeLinear)]
            for layer in layers:
                layer.freeze_codes()
                layer.weight.requires_grad_(False)
            self.fit(frozen, seed + 1)


class Replayed:
    """step([batch]) as a CUDA graph, after a few calls that compile and load what a capture must not.

    Where it cannot be captured, a line says so and steps go on as they are.
    """

    def __init__(self, step: Callable[[list[dict[str, Tensor]]], None], device: torch.device):
        self.step, self.side, self.calls = step, torch.cuda.Stream(device), 0
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, batches: list[dict[str, Tensor]]) -> None:
        self.calls += 1
        if self.calls <= WARM:
            self.side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.side):
                self.step(batches)
            torch.cuda.current_stream().wait_stream(self.side)
            return
        if self.calls == WARM + 1:
            self.batch, graph = batches[0], torch.cuda.CUDAGraph()
            try:
                with torch.cuda.graph(graph):
                    self.step([self.batch])
                self.graph = graph
            except RuntimeError as error:
                log.info("no CUDA graph of a step: %s", str(error).splitlines()[0])
        if self.graph is None:
            self.step(batches)
            return
        for name, tensor in batches[0].items():
            self.batch[name].copy_(tensor)
        self.graph.replay()


# ---------------------------------------------------------------------------------------------------------- a block


def quantized_blocks(names: list[str], blocks: list[nn.Module], work: Work, w_bits: int) -> list[nn.Module]:
    """Copies of full-precision blocks on their device, with the quantized parameters that an earlier walk left."""
    found = []
    for name, module in zip(names, blocks, strict=True):
        block = Block(name, copy.deepcopy(module), Streams(next(module.parameters()).device), ())
        block.module.load_state_dict(student_parameters(block, work.block(name), w_bits))
        found.append(block.module)
    return found


def stored_block(block: Block, trained: nn.Module) -> dict[str, Tensor]:
    """All tensors of a quantized copy of the block under their full names, as a packed folder stores them; the block's
    notes get, for every linear by its full name, the "layers": [squared error of the weight, its energy]."""
    found: dict[str, Tensor] = {}
    block.notes["layers"] = {}
    for path, layer in trained.named_modules():
        name = f"{block.name}.{path}"
        if isinstance(layer, QuantizeLinear):
            packed = packed_layer(layer, name)
            own, made = block.module.get_submodule(path).weight.float(), packed.dequantize()
            block.notes["layers"][name] = [(own - made).square().sum().item(), own.square().sum().item()]
            found[f"{name}.weight_codes"] = to_disk(packed.weight_codes, packed.w_bits, packed.in_features)
            found[f"{name}.weight_clip_val"] = packed.weight_clip_val
            if packed.bias is not None:
                found[f"{name}.bias"] = packed.bias
        else:
            found |= {f"{name}.{kind}": parameter for kind, parameter in layer.named_parameters(recurse=False)}
    return found


def round_modulation(block: Block, settings: Settings, before: Work | None) -> dict[str, Tensor]:
    """As train_block for a modulation outside of the blocks, whose outputs' error all of them would have to show."""
    started, calls = time.time(), range(len(block.streams))
    if before is not None:
        block.notes |= before.notes(block.name)
        return before.block(block.name)
    if settings.start == "calibrated":
        found = calibrate_block(block, [1.0] * len(calls), settings.w_bits)
    else:
        found = stored_block(block, quantized_copy(block, settings.w_bits))
    parameters = student_parameters(block, found, settings.w_bits)
    made, target = (
        torch.cat([run_block(block.module, own, block.teacher_inputs(i)).float() for i in calls])
        for own in (parameters, {})
    )
    block.notes["error"] = ((made - target).square().mean() / target.square().mean()).item()
    block.notes["seconds"] = round(time.time() - started, 1)
    return found


def train_block(
    block: Block, transformer: nn.Module, settings: Settings, before: Work | None = None,
    weights: dict[str, dict[str, Tensor]] | None = None,
) -> dict[str, Tensor]:
    """Train a block of the walk along `transformer`: all its tensors under their full names, as a packed folder stores
    them.

    `before` is an earlier walk's: the block goes on from there, and the blocks after it are quantized as they were
    then, so that it makes up for them too. `weights` are channel_weights. The block's notes get the "error" at the
    window's end, "seconds", and for every linear by its full name the "layers": [squared error of the weight, its
    energy]. ValueError if training leaves NaN or inf.
    """
    names, device, started = block_names(transformer), block.streams.device, time.time()
    if block.name not in names:
        return round_modulation(block, settings, before)
    number = names.index(block.name)
    after = [transformer.get_submodule(name) for name in names[number + 1 :][: settings.lookahead]]
    outside = [transformer.norm_out, transformer.proj_out]
    for module in (*after, *outside):
        module.to(device).requires_grad_(False)

    def velocity(image: Tensor, temb: Tensor) -> Tensor:
        return transformer.proj_out(transformer.norm_out(image, temb))

    following, start = after, None
    if before is not None:
        following = quantized_blocks(names[number + 1 :][: settings.lookahead], after, before, settings.w_bits)
        start = before.block(block.name)
    elif settings.start == "calibrated":
        start = calibrate_block(block, [1.0] * len(block.streams), settings.w_bits)
    cudnn = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)  # its backward fails for tiny-flux's shapes (torch 2.11, H100)
    try:
        with torch.enable_grad():
            trained = quantized_copy(block, settings.w_bits, start)
            reaches = number + len(after) == len(names) - 1
            head = velocity if reaches else None
            at_end = weights and weights[names[number + len(after)]]
            window = Window(block.streams, [block.module, *after], [trained, *following], head, settings, at_end)
            if settings.compile:
                torch._dynamo.config.recompile_limit = 64  # both kinds of block, in training, frozen, codes frozen
                for module in window.blocks:
                    module.compile(dynamic=False)
            window.train(settings.seed + 2 * number)
            block.notes["error"] = window.judge()
    finally:
        torch.backends.cuda.enable_cudnn_sdp(cudnn)
        for module in (*after, *outside):
            module.to(CPU)
            module._compiled_call_impl = None
        del following
    block.notes["seconds"] = round(time.time() - started, 1)
    log.info("%s: error %.4f, %.0f s", block.name, block.notes["error"], block.notes["seconds"])
    found = stored_block(block, trained)
    del window, trained
    empty_cache(device)
    return found
