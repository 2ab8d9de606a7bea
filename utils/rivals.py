"""What bench.py sets beside the ternary transformer, the same random numbers in every rival's own form, and its watch.

No weight is made on the CPU and moved, and no full-precision model need exist: random codes are drawn on the device a
few rows at a time, and each rival is made from them a layer at a time.
"""

import contextlib
import importlib.util
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import diffusers
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.kernels import FP8, quantize_tokens
from models.modeling_flux_quant import FluxTransformer2DModel
from models.packing import FORMAT, PackedLinear, disk_row_bytes, pack_codes, row_chunks
from models.quantized_model import DEFAULT_SETTINGS, QuantizedTransformer
from models.utils_quant import code_grid
from utils.utils import lacks_memory

NONZERO = 0.54  # of the codes, as error-minimal step sizes leave them in Gaussian rows
NO_MEMORY = "out of memory"
RUNS = 2  # timed in each turn of a rival
FLUSHES = 16  # of 256 MB: 1.5 ms on an H100, in which Python has launched any layer


def skeleton(
    config: dict, dtype: torch.dtype, kind: type[QuantizedTransformer] = FluxTransformer2DModel
) -> QuantizedTransformer:
    """The packed ternary transformer of this class and architecture on the meta device."""
    try:
        with torch.device("meta"):
            # diffusers' own .to() warns of the step sizes; they stay fp32 whatever it is called with.
            return nn.Module.to(kind(**config, w_bits=0, packed=FORMAT), dtype)
    except (ArithmeticError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"--config describes no transformer ({' '.join(str(error).split())[:200]})") from None


@torch.no_grad()
def random_packed(
    config: dict, dtype: torch.dtype, device: torch.device, seed: int,
    kind: type[QuantizedTransformer] = FluxTransformer2DModel,
) -> QuantizedTransformer:  # fmt: skip
    """The same with random numbers: weights of variance 1/in, of which only codes and step sizes ever exist."""
    torch.manual_seed(seed)
    model = skeleton(config, dtype, kind).to_empty(device=device)
    for module in model.modules():
        if isinstance(module, PackedLinear):
            for rows in row_chunks(module.out_features, module.in_features):
                uniform = torch.rand(rows.stop - rows.start, module.in_features, device=device)
                codes = (uniform < NONZERO / 2).to(torch.int8) - (uniform > 1 - NONZERO / 2).to(torch.int8)
                module.weight_codes[rows] = pack_codes(codes, 0)
            alpha = code_grid(0)[0] / (NONZERO * module.in_features) ** 0.5
            module.weight_clip_val.uniform_(0.5 * alpha, 1.5 * alpha)
        elif isinstance(module, nn.Linear):
            module.weight.normal_(std=module.in_features**-0.5)
        elif getattr(module, "weight", None) is not None:  # of a norm
            module.weight.fill_(1)
        if getattr(module, "bias", None) is not None:
            module.bias.normal_(std=0.02)
    return model.eval()


def twin(packed: QuantizedTransformer, make: Callable[[PackedLinear], nn.Module]) -> nn.Module:
    """diffusers' transformer with make(layer) for each packed layer and the packed model's other parameters."""
    config = {key: value for key, value in packed.config.items() if key[0] != "_" and key not in DEFAULT_SETTINGS}
    with torch.device("meta"):
        model = getattr(diffusers, type(packed).__name__)(**config)
    for name, module in packed.named_modules():
        if isinstance(module, PackedLinear):
            model.set_submodule(name, make(module))
            continue
        for kind, parameter in module.named_parameters(recurse=False):
            setattr(model.get_submodule(name), kind, parameter)
    return model.requires_grad_(False).eval()


def dense(layer: PackedLinear, dtype: torch.dtype) -> nn.Linear:
    """nn.Linear with the layer's numbers."""
    linear = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
    linear.weight = nn.Parameter(layer.dequantize(dtype), requires_grad=False)
    if layer.bias is not None:
        linear.bias = nn.Parameter(layer.bias.to(dtype), requires_grad=False)
    return linear


class Fp8Linear(nn.Module):
    """x [..., in] -> [..., out] through fp8 e4m3 weights, a scale a row, and activations, a scale a token."""

    def __init__(self, layer: PackedLinear):
        super().__init__()
        weight, scale = quantize_tokens(layer.dequantize(), FP8)
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale.T.contiguous())
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        codes, scale = quantize_tokens(x.flatten(0, -2), FP8)
        y = torch._scaled_mm(
            codes, self.weight.T, scale, self.scale, bias=self.bias, out_dtype=x.dtype, use_fast_accum=True
        )
        return y.unflatten(0, x.shape[:-1])


class Int8CodesLinear(nn.Module):
    """x [..., in] -> [..., out] from codes held as int8 [out, in], cast to x's dtype for each multiplication."""

    def __init__(self, layer: PackedLinear):
        super().__init__()
        self.register_buffer("codes", layer.codes())
        self.register_buffer("scale", (layer.weight_clip_val / code_grid(0)[0]).flatten())
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.codes.to(x.dtype)) * self.scale.to(x.dtype)
        return y if self.bias is None else y + self.bias


def torchao_fp8(layer: PackedLinear) -> nn.Module:
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow, quantize_

    holder = nn.Sequential(dense(layer, torch.bfloat16))
    # Its own inductor settings would hold for every other rival of this process too.
    quantize_(holder, Float8DynamicActivationFloat8WeightConfig(granularity=PerRow(), set_inductor_config=False))
    return holder[0]


def gemlite_2bit(layer: PackedLinear, processor: str) -> nn.Module:
    import gemlite.helper

    device, dtype = layer.weight_codes.device, torch.bfloat16
    make = getattr(gemlite.helper, processor)(device=str(device), dtype=dtype)
    return make.from_weights(layer.codes().to(dtype), torch.tensor(1.0), layer.bias)  # one scale for all rows


MAKERS: dict[str, Callable[[PackedLinear], nn.Module]] = {
    "float32": lambda layer: dense(layer, torch.float32),
    "float16": lambda layer: dense(layer, torch.float16),
    "bfloat16": lambda layer: dense(layer, torch.bfloat16),
    "fp8 row-wise, torchao": torchao_fp8,
    "fp8 row-wise, torch._scaled_mm": Fp8Linear,
    "int8 codes, cast": Int8CodesLinear,
    "gemlite A16W158": lambda layer: gemlite_2bit(layer, "A16W158_INT"),
    "gemlite A8W158": lambda layer: gemlite_2bit(layer, "A8W158_INT_dynamic"),
}


def why_not(kind: str, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why there can be no rival of this kind here, or None."""
    package = next((name for name in ("torchao", "gemlite") if name in kind), None)
    if package and importlib.util.find_spec(package) is None:
        return "not installed"
    if "fp8" in kind and (device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 9)):
        return "needs a GPU with fp8 (sm_89 or newer)"
    if package and device.type != "cuda":
        return "needs an NVIDIA GPU"
    return "needs --dtype bfloat16" if ("fp8" in kind or package) and dtype != torch.bfloat16 else None


def tensor_bytes(tensor: Tensor) -> int:
    """Bytes of a tensor, or of those that a wrapper such as torchao's holds."""
    if hasattr(tensor, "__tensor_flatten__"):
        return sum(tensor_bytes(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    return tensor.numel() * tensor.element_size()


def model_bytes(model: nn.Module) -> tuple[int, int]:
    """Bytes in memory and in a checkpoint."""
    resident = sum(tensor_bytes(t) for t in (*model.parameters(), *model.buffers()))
    packed = [m for m in model.modules() if isinstance(m, PackedLinear)]
    saved = sum(m.weight_codes.numel() - m.out_features * disk_row_bytes(m.in_features, m.w_bits) for m in packed)
    return resident, resident - saved


# -------------------------------------------------------------------------------------------------------- stopwatch


@dataclass(frozen=True)
class Rival:
    name: str
    kind: str  # of MAKERS, or "ours"; rivals of a kind share a model
    way: str = "eager"  # or "compiled", or "graph": a CUDA graph of what is compiled
    mode: str | None = None  # of ours

    @contextlib.contextmanager
    def on_stage(self, model: nn.Module) -> Iterator[None]:
        """Within the block the model runs as this rival."""
        if self.mode:
            model.set_inference_mode(self.mode)
        with torch.no_grad(), torch.compiler.set_stance("force_eager" if self.way == "eager" else "default"):
            yield


def one_line(error: Exception) -> str:
    """What went wrong: of a traceback within the message its last line, and nothing of how to debug a compiler."""
    if lacks_memory(error):
        return NO_MEMORY
    before, *traceback = str(error).split("\nSet TORCHDYNAMO_VERBOSE")[0].split("Traceback (most recent call last):")
    reason = before + traceback[-1].strip().splitlines()[-1] if traceback else before
    return f"{type(error).__name__}: {' '.join(reason.split())}"[:240]


def synchronize(device: torch.device) -> None:
    if device.type in ("cuda", "mps"):
        getattr(torch, device.type).synchronize()


def seconds(call: Callable[[], object], device: torch.device, flush: Tensor | None = None) -> float:
    """Time of one call. `flush` is overwritten before it, which empties the L2 cache and lets the CPU run ahead, so
    that what is left is the GPU's own time."""
    synchronize(device)
    if device.type != "cuda":
        started = time.perf_counter()
        call()
        synchronize(device)
        return time.perf_counter() - started
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    if flush is not None:
        for _ in range(FLUSHES):
            flush.zero_()
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def take_turns(
    cases: list[tuple[Rival, nn.Module, Callable]], rounds: int, device: torch.device, flush: Tensor | None = None
) -> dict[str, list[float] | str]:
    """Milliseconds of each rival's calls, RUNS of them a round after an untimed one; of one that fails, the reason."""
    times: dict[str, list[float] | str] = {rival.name: [] for rival, _, _ in cases}
    for _ in range(rounds):
        for rival, model, call in cases:
            if isinstance(times[rival.name], str):
                continue
            try:
                with rival.on_stage(model):
                    call()
                    times[rival.name] += [1e3 * seconds(call, device, flush) for _ in range(RUNS)]
            except Exception as error:
                times[rival.name] = one_line(error)
    return times


class Allocations:
    """Bytes allocated on a CUDA device; everywhere else nothing is known and all is None."""

    def __init__(self, device: torch.device):
        self.device = device if device.type == "cuda" else None

    def now(self) -> int:
        return torch.cuda.memory_allocated(self.device) if self.device else 0

    def peak_of(self, call: Callable[[], object]) -> int | None:
        """The most that is allocated during the call beyond what was before it."""
        if self.device is None:
            return None
        torch.cuda.reset_peak_memory_stats(self.device)
        before = self.now()
        call()
        return torch.cuda.max_memory_allocated(self.device) - before
