"""Quantize without training: which code each weight gets, and at which step size.

    threshold   |w| below ratio·max|w| of its row → 0, else ±1, at the least-squares scale (0 bits only)
    mse         the error-minimal step size, every weight rounded by itself
    calibrated  codes that keep the layer's outputs, not its weights, on the teacher's own trajectories

Calibrated rounding goes through the transformer block by block and layer by layer. Two streams of hidden states run
side by side: the teacher's, and that of the blocks quantized so far. A layer with weight W and bias b sees inputs x
in the first stream and x̃ in the second; it is to give Wx + b when it gets x̃. With centred covariances H = Σ x̃x̃ᵀ
and C = Σ xx̃ᵀ over all calibration samples

    1. target    W* = W C H⁻¹, damped towards W: the full-precision weight that best undoes earlier layers' errors
    2. rounding  column by column in the order of falling H_jj, each column's error passed on to those not yet rounded
                 (GPTQ, arXiv 2210.17323)
    3. descent   sweeps over the columns; a code changes where that lowers tr((W* − Q) H (W* − Q)ᵀ)
    4. scales    between the sweeps, each row's α in closed form, (W*Hlᵀ)/(lHlᵀ) for its levels l
    5. bias      b + W E[x] − Q E[x̃]

Each of these can be left out, to see what it gives.

What must fit where, for blocks of width d and M tokens in a call (FLUX.1-dev in 16 bits at 1024 pixels: d 3072, M 4608
a picture)

    host    the transformer once, whose layers are freed one after the other as they are quantized (24 GB); the two
            streams, 2·M·d values for each picture and step (57 MB: 6.3 GB for 16 prompts at 7 steps each)
    device  one block twice, one call on its way through it, and of the layers that are quantized together the two
            moments, of one also some copies of them: about ten fp32 matrices of in × in (15360: 9 GB)
"""

from collections.abc import Callable, Collection, Iterable

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from tqdm import tqdm

from models.packing import PackedLinear
from models.utils_quant import code_grid, init_clip_val, quantize_codes
from utils.utils import get_logger

log = get_logger("oneshot")
CPU = torch.device("cpu")
METHODS = ("threshold", "mse", "calibrated")
INGREDIENTS = ("target", "rounding", "descent", "scales", "bias")
# The linears of a block in the order in which they compute; those of one group share their inputs' making.
GROUPS = (
    ("norm1.linear", "norm1_context.linear", "norm.linear"),
    ("attn.to_q", "attn.to_k", "attn.to_v", "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "proj_mlp"),
    ("attn.to_out.0", "attn.to_add_out", "proj_out"),
    ("ff.net.0.proj", "ff_context.net.0.proj"),
    ("ff.net.2", "ff_context.net.2"),
)
DAMPING = 0.05  # of the mean diagonal of H, added to it
SWEEPS = 4

# ---------------------------------------------------------------------------------------------- one weight by itself


def threshold_codes(weight: Tensor, ratio: float) -> tuple[Tensor, Tensor]:
    """Ternary codes (int8) and step sizes [out, 1] of the published threshold rule, applied row by row."""
    weight = weight.float()
    magnitude = weight.abs()
    kept = magnitude >= ratio * magnitude.amax(1, keepdim=True)
    codes = weight.sign().mul_(kept)
    scale = (weight * codes).sum(1, keepdim=True) / kept.sum(1, keepdim=True).clamp(min=1)
    return codes.to(torch.int8), (1.5 * scale).clamp(min=1e-5)


def round_weight(weight: Tensor, w_bits: int, method: str, ratio: float) -> tuple[Tensor, Tensor]:
    """Codes (int8) [out, in] and step sizes [out, 1] by "threshold" or "mse"."""
    if method == "threshold":
        return threshold_codes(weight, ratio)
    alpha = init_clip_val(weight, w_bits)
    return quantize_codes(weight, alpha, w_bits), alpha


# ------------------------------------------------------------------------------------------------ with real inputs


class Statistics:
    """First and second moments of a layer's inputs in both streams, weighted."""

    def __init__(self, in_features: int, device: torch.device):
        self.weight = 0.0
        self.mean, self.teacher_mean = (torch.zeros(in_features, device=device) for _ in range(2))
        self.square, self.cross = (torch.zeros(in_features, in_features, device=device) for _ in range(2))

    def add(self, inputs: Tensor, teacher_inputs: Tensor, weight: float) -> None:
        """inputs, teacher_inputs [..., in] of the same samples."""
        x, t = (tensor.reshape(-1, tensor.shape[-1]).float() for tensor in (inputs, teacher_inputs))
        self.weight += weight * len(x)
        self.mean += weight * x.sum(0)
        self.teacher_mean += weight * t.sum(0)
        self.square += weight * (x.T @ x)
        self.cross += weight * (t.T @ x)

    def moments(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Means of x and of the teacher's x, covariance H [in, in] and cross-covariance C [in, in]."""
        mean, teacher_mean = self.mean / self.weight, self.teacher_mean / self.weight
        square = self.square / self.weight - torch.outer(mean, mean)
        cross = self.cross / self.weight - torch.outer(teacher_mean, mean)
        return mean, teacher_mean, square, cross


def fit_scale(target: Tensor, codes: Tensor, w_bits: int, hessian: Tensor, fallback: Tensor) -> Tensor:
    """α [out, 1] that minimizes tr((target − αl) H (target − αl)ᵀ) for the levels l of the codes."""
    n, s = code_grid(w_bits)
    levels = (codes.float() + s) / n
    projected = levels @ hessian
    alpha = (projected * target).sum(1, keepdim=True) / (projected * levels).sum(1, keepdim=True).clamp(min=1e-12)
    return torch.where(alpha > 1e-5, alpha, fallback)


def levels_of(weight: Tensor, alpha: Tensor, w_bits: int) -> Tensor:
    """The quantized values of one or more columns [out, k] at the step sizes [out, 1]."""
    n, s = code_grid(w_bits)
    return alpha * ((quantize_codes(weight, alpha, w_bits).float() + s) / n)


def gptq(target: Tensor, alpha: Tensor, w_bits: int, hessian: Tensor, block: int = 128) -> Tensor:
    """Codes (int8) [out, in] by error feedback over the columns in the order of falling H_jj; hessian is damped."""
    order = hessian.diagonal().argsort(descending=True)
    weight, h = target[:, order].clone(), hessian[order][:, order]
    inverse = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
    quantized = torch.empty_like(weight)
    for start in range(0, weight.shape[1], block):
        stop = min(start + block, weight.shape[1])
        errors = torch.empty_like(weight[:, start:stop])
        for j in range(start, stop):
            column = weight[:, j : j + 1]
            quantized[:, j : j + 1] = levels_of(column, alpha, w_bits)
            error = (column - quantized[:, j : j + 1]) / inverse[j, j]
            weight[:, j + 1 : stop] -= error * inverse[j, j + 1 : stop]
            errors[:, j - start : j - start + 1] = error
        weight[:, stop:] -= errors @ inverse[start:stop, stop:]
    codes = torch.empty(target.shape, dtype=torch.int8, device=target.device)
    codes[:, order] = quantize_codes(quantized, alpha, w_bits)
    return codes


def descend(target: Tensor, codes: Tensor, alpha: Tensor, w_bits: int, hessian: Tensor) -> Tensor:
    """One sweep of coordinate descent over the columns; no row's error grows. Codes (int8) [out, in]."""
    n, s = code_grid(w_bits)
    quantized = alpha * ((codes.float() + s) / n)
    gradient = (target - quantized) @ hessian
    diagonal = hessian.diagonal()
    for j in hessian.diagonal().argsort(descending=True).tolist():
        old = quantized[:, j : j + 1].clone()
        new = levels_of(old + gradient[:, j : j + 1] / diagonal[j], alpha, w_bits)
        gradient -= (new - old) * hessian[j]
        quantized[:, j : j + 1] = new
    return quantize_codes(quantized, alpha, w_bits)


@torch.no_grad()
def calibrate_layer(
    layer: nn.Linear, statistics: Statistics, w_bits: int, without: Collection[str] = ()
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes (int8) [out, in], step sizes [out, 1] and bias [out] (None if the layer has none) of one layer.

    `without` names INGREDIENTS to leave out.
    """
    mean, teacher_mean, hessian, cross = statistics.moments()
    weight = layer.weight.float()
    damping = DAMPING * hessian.diagonal().mean().clamp(min=1e-8)
    eye = torch.eye(len(hessian), device=hessian.device)
    hessian = hessian + damping * eye
    target = weight
    if "target" not in without:
        target = torch.linalg.solve(hessian, weight @ (cross + damping * eye), left=False)
    alpha = init_clip_val(target, w_bits)
    if "rounding" in without:
        codes = quantize_codes(target, alpha, w_bits)
    else:
        codes = gptq(target, alpha, w_bits, hessian)
    for _ in range(SWEEPS):
        if "scales" not in without:
            alpha = fit_scale(target, codes, w_bits, hessian, alpha)
        if "descent" not in without:
            codes = descend(target, codes, alpha, w_bits, hessian)
    if "scales" not in without:
        alpha = fit_scale(target, codes, w_bits, hessian, alpha)
    if layer.bias is None or "bias" in without:
        return codes, alpha, layer.bias
    n, s = code_grid(w_bits)
    quantized = alpha * ((codes.float() + s) / n)
    return codes, alpha, layer.bias.float() + weight @ teacher_mean - quantized @ mean


class _Reached(Exception):
    """Raised to stop a forward pass where the blocks begin."""


@torch.no_grad()
def block_inputs(transformer: nn.Module, calls: Iterable[dict], device: torch.device) -> list[dict]:
    """What the first block gets in each of the transformer's calls (keyword arguments), on the CPU.

    Of the transformer only what comes before the blocks is taken to `device`, and back to the CPU.
    """
    found: list[dict] = []
    before = [module for module in transformer.children() if not isinstance(module, nn.ModuleList)]

    def stop(module, args, kwargs):
        found.append(send_to_device(dict(kwargs), CPU))
        raise _Reached

    hook = transformer.transformer_blocks[0].register_forward_pre_hook(stop, with_kwargs=True)
    for module in before:
        module.to(device)
    try:
        for inputs in calls:
            try:
                transformer(**send_to_device(inputs, device))
            except _Reached:
                pass
    finally:
        hook.remove()
        for module in before:
            module.to(CPU)
    return found


@torch.no_grad()
def calibrate(
    transformer: nn.Module,
    calls: list[dict],
    weights: list[float],
    w_bits: int,
    keep: Callable[[str, PackedLinear, Tensor], None],
    device: torch.device = CPU,
    skip: Callable[[str], bool] = lambda name: False,
    without: Collection[str] = (),
) -> None:
    """Quantize the linears inside the blocks of `transformer` one after the other, from calibration `calls` of it.

    A call counts by its weight. Transformer and calls are on the CPU; block after block goes to `device` and back.
    Each finished layer is handed over as keep(name, packed, weight), on `device`, with the full-precision weight
    [out, in] that it stands for; what `skip(name)` names stays as it is. The transformer is used up: the finished
    layers are freed, on the meta device.
    """
    tokens = sum(call[name].shape[:-1].numel() for call in calls for name in ("hidden_states", "encoder_hidden_states"))
    size = 2 * tokens * transformer.inner_dim * transformer.dtype.itemsize
    log.info("calibration: %d calls, whose hidden states take %.1f GB of host memory", len(calls), size / 1e9)
    streams = [block_inputs(transformer, calls, device)]  # the student's, the teacher's
    streams.append(list(streams[0]))
    blocks = [*transformer.transformer_blocks, *transformer.single_transformer_blocks]
    names = {module: name for name, module in transformer.named_modules()}
    total = sum(isinstance(m, nn.Linear) and not skip(names[m]) for b in blocks for m in b.modules())
    with tqdm(total=total, desc="layers", unit="layer") as bar:
        for block in blocks:
            block.to(device)
            original = {name: p.detach().clone() for name, p in block.named_parameters()}
            done = []
            for group in GROUPS:
                layers = {n: m for n, m in block.named_modules() if n in group and isinstance(m, nn.Linear)}
                layers = {n: m for n, m in layers.items() if not skip(names[m])}
                if not layers:
                    continue
                statistics = _collect(block, original, layers, streams, weights, device)
                for name, layer in layers.items():
                    codes, alpha, bias = calibrate_layer(layer, statistics.pop(name), w_bits, without)
                    packed = PackedLinear.from_codes(codes, alpha, bias, w_bits)
                    keep(names[layer], packed, original[f"{name}.weight"])
                    layer.weight.copy_(packed.dequantize())
                    if bias is not None:
                        layer.bias.copy_(bias)
                    done.append(layer)
                    bar.update()
            for i in range(len(calls)):
                for stream, parameters in zip(streams, (None, original), strict=True):
                    text, image = _run(block, parameters, send_to_device(stream[i], device))
                    stream[i] = stream[i] | {"encoder_hidden_states": text.to(CPU), "hidden_states": image.to(CPU)}
            for layer in done:
                layer.to("meta")
            block._apply(lambda tensor: tensor if tensor.is_meta else tensor.to(CPU))
            del original


def _run(block: nn.Module, parameters: dict[str, Tensor] | None, inputs: dict) -> tuple[Tensor, Tensor]:
    """The block's output, with `parameters` in place of its own if given."""
    if parameters is None:
        return block(**inputs)
    return torch.func.functional_call(block, parameters, kwargs=inputs)


def _collect(
    block: nn.Module, original: dict, layers: dict, streams: list[list[dict]], weights: list[float],
    device: torch.device,
) -> dict[str, Statistics]:  # fmt: skip
    """Statistics of the inputs of `layers`, by name; layers with the same input, such as q, k and v, share theirs."""
    seen: dict[str, Tensor] = {}
    hooks = [
        layer.register_forward_pre_hook(lambda module, args, name=name: seen.__setitem__(name, args[0]))
        for name, layer in layers.items()
    ]
    statistics: dict[str, Statistics] = {}
    try:
        for student, teacher, weight in zip(*streams, weights, strict=True):
            _run(block, original, send_to_device(teacher, device))
            reference = dict(seen)
            _run(block, None, send_to_device(student, device))
            first: dict[int, str] = {}  # of the layers that get this very tensor
            for name, tensor in seen.items():
                leader = first.setdefault(id(tensor), name)
                if name not in statistics:
                    statistics[name] = Statistics(tensor.shape[-1], device) if leader == name else statistics[leader]
                if leader == name:
                    statistics[name].add(tensor, reference[name], weight)
    finally:
        for hook in hooks:
            hook.remove()
    return statistics
