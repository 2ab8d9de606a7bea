"""Quantize without training: which code each weight gets, and at which step size.

    threshold   |w| below ratio·max|w| of its row → 0, else ±1, at the least-squares scale (0 bits only)
    mse         the error-minimal step size, every weight rounded by itself
    calibrated  codes that keep the layer's outputs, not its weights, on the teacher's own trajectories

Calibrated rounding walks through the transformer block by block (walk.py) and layer by layer. Two streams of hidden
states run side by side: the teacher's, and that of the blocks quantized so far. A layer with weight W and bias b sees
inputs x in the first stream and x̃ in the second; it is to give Wx + b when it gets x̃. With centred covariances
H = Σ x̃x̃ᵀ and C = Σ xx̃ᵀ over all calibration samples

    1. target    W* = W C H⁻¹, damped towards W: the full-precision weight that best undoes earlier layers' errors
    2. rounding  column by column in the order of falling H_jj, each column's error passed on to those not yet rounded
                 (GPTQ, see rounding.py)
    3. descent   sweeps over the columns; a code changes where that lowers tr((W* − Q) H (W* − Q)ᵀ)
    4. scales    between the sweeps, each row's α in closed form, (W*Hlᵀ)/(lHlᵀ) for its levels l
    5. bias      b + W E[x] − Q E[x̃]

A layer without a bias, as all of FLUX.2's are, has its moments about zero instead, and no fifth step. Each of these can
be left out, to see what it gives. Layers with the same input (q, k, v and a single block's proj_mlp)
share H and its factorization and are rounded as one matrix. A layer whose moments are not finite, or whose H is not
positive definite however much it is damped, falls back to mse and is named.

Besides what the walk holds, the device holds of the layers that are calibrated together the two moments and up to four
more fp32 matrices of in × in (15,360: 0.94 GB each), up to six of out × in (21,504 × 3,072: 0.26 GB each), and of one
call the layer's inputs four times in fp32: 8 GB at FLUX.1-dev's shape. Moments are accumulated in TF32 on a GPU, all
else is fp32: of the 28 PFLOP that 112 calls of 4,608 tokens take, 26 are the moments'.
"""

from collections.abc import Collection, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from models.packing import row_chunks, store_codes
from models.utils_quant import ALPHA_FLOOR, init_clip_val, quantize_codes
from utils.rounding import descend, factorize, fit_scale, gptq, to_codes, to_values
from utils.walk import CPU, Block, Work, run_block, walk

METHODS = ("threshold", "mse", "calibrated")
INGREDIENTS = ("target", "rounding", "descent", "scales", "bias")
DAMPING = 0.05  # of the mean diagonal of H, added to it; four times as much as long as that is not positive definite
TRIES = 6
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


@contextmanager
def _tensor_cores(device: torch.device) -> Iterator[None]:
    """fp32 products on a GPU's tensor cores: factors are rounded to 11 bits, sums stay fp32."""
    before = torch.get_float32_matmul_precision()
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


class Statistics:
    """First and second moments of a layer's inputs in both streams, weighted.

    Second moments are taken about each call's own mean and merged with what is there (Chan, Golub and LeVeque 1979):
    nothing cancels, however far the mean is from zero.
    """

    def __init__(self, in_features: int, device: torch.device):
        self.weight = 0.0
        self.mean, self.teacher_mean = (torch.zeros(in_features, device=device) for _ in range(2))
        self.square, self.cross = (torch.zeros(in_features, in_features, device=device) for _ in range(2))

    def add(self, inputs: Tensor, teacher_inputs: Tensor, weight: float) -> None:
        """inputs, teacher_inputs [..., in] of the same samples."""
        x, t = (tensor.reshape(-1, tensor.shape[-1]).float() for tensor in (inputs, teacher_inputs))
        mean, teacher_mean = x.mean(0), t.mean(0)
        x, t = x - mean, t - teacher_mean
        with _tensor_cores(x.device):
            self.square.addmm_(x.T, x, alpha=weight)
            self.cross.addmm_(t.T, x, alpha=weight)
        before, added = self.weight, weight * len(x)
        self.weight += added
        apart, teacher_apart = mean - self.mean, teacher_mean - self.teacher_mean
        self.square.addr_(apart, apart, alpha=before * added / self.weight)
        self.cross.addr_(teacher_apart, apart, alpha=before * added / self.weight)
        self.mean += apart * (added / self.weight)
        self.teacher_mean += teacher_apart * (added / self.weight)

    def moments(self, centred: bool = True) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Means of x and of the teacher's x, second moment H [in, in] and cross moment C [in, in], about the means or
        about zero; once, since these are the sums themselves, divided in place."""
        square, cross = self.square.div_(self.weight), self.cross.div_(self.weight)
        self.square = self.cross = None
        if not centred:
            square.addr_(self.mean, self.mean)
            cross.addr_(self.teacher_mean, self.mean)
        return self.mean, self.teacher_mean, square, cross


class Uncalibratable(ValueError):
    """Why a layer cannot be calibrated."""


def _damped(hessian: Tensor) -> tuple[Tensor, float]:
    """The factor of `hessian` and what was added to its diagonal for that, which is in it afterwards."""
    damping = DAMPING * hessian.diagonal().mean().clamp(min=1e-8).item()
    added = 0.0
    for _ in range(TRIES):
        hessian.diagonal().add_(damping - added)
        factor, added = factorize(hessian), damping
        if factor is not None:
            return factor, added
        damping *= 4
    raise Uncalibratable(f"not positive definite, damped by {added:.1e}")


def best_target(weight: Tensor, hessian: Tensor, cross: Tensor, keep: bool = False) -> tuple[Tensor, Tensor]:
    """W* [out, in] of a weight, or with `keep` that itself, and the factor of H; H and C are damped in place.

    Raises Uncalibratable where H is not positive definite or W* not finite.
    """
    factor, damping = _damped(hessian)
    target = weight
    if not keep:
        cross.diagonal().add_(damping)
        target = torch.linalg.solve_triangular(factor.mT, weight @ cross, upper=False, left=False)
        target = torch.linalg.solve_triangular(factor, target, upper=True, left=False).contiguous()
    if not target.isfinite().all():
        raise Uncalibratable("its target is not finite")
    return target, factor


@torch.no_grad()
def calibrate_weight(
    weight: Tensor, statistics: Statistics, w_bits: int, without: Collection[str] = (), has_bias: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes (int8) [out, in], step sizes [out, 1] and what is to be added to the bias [out], if the layer has one, of a
    weight [out, in].

    `without` names INGREDIENTS to leave out. The statistics are used up. Raises Uncalibratable, which says why, where
    their moments are not finite or H is not positive definite.
    """
    mean, teacher_mean, hessian, cross = statistics.moments(centred=has_bias)
    # A column or row that holds NaN or inf shows in the diagonal of H or in the means.
    if not all(found.isfinite().all() for found in (mean, teacher_mean, hessian.diagonal(), cross.diagonal())):
        raise Uncalibratable("its inputs' moments are not finite")
    order = hessian.diagonal().argsort(descending=True)
    weight = weight.float()[:, order]
    hessian = hessian[order][:, order]
    cross = cross[order][:, order]
    target, factor = best_target(weight, hessian, cross, keep="target" in without)
    del cross
    alpha = init_clip_val(target, w_bits)
    if "rounding" in without:
        quantized = to_values(quantize_codes(target, alpha, w_bits), alpha, w_bits)
    else:
        quantized = gptq(target, alpha, w_bits, factor)
    del factor
    codes = to_codes(quantized, alpha, w_bits)
    for _ in range(SWEEPS):
        if "scales" not in without:
            alpha = fit_scale(target, codes, w_bits, hessian, alpha)
        if "descent" not in without:
            codes = to_codes(descend(target, to_values(codes, alpha, w_bits), alpha, w_bits, hessian), alpha, w_bits)
    if "scales" not in without:
        alpha = fit_scale(target, codes, w_bits, hessian, alpha)
    shift = torch.zeros_like(alpha[:, 0])
    if has_bias and "bias" not in without:
        shift = weight @ teacher_mean[order] - to_values(codes, alpha, w_bits) @ mean[order]
    found = torch.empty_like(codes)
    found[:, order] = codes
    return found, alpha, shift


class _Reached(Exception):
    """Raised to stop a forward pass where all that was wanted has been seen."""


def collect(block: Block, layers: Collection[str], finished: dict[str, Tensor], weights: list[float]) -> list:
    """[(names of layers with the same input, Statistics of it)] for the linears called `layers` inside the block.

    `finished` holds the student's parameters so far; call i counts by weights[i].
    """
    seen: dict[str, Tensor] = {}

    def see(name: str, given: Tensor) -> None:
        seen[name] = given
        if len(seen) == len(layers):
            raise _Reached

    def inputs(parameters: dict[str, Tensor], call: dict) -> dict[str, Tensor]:
        seen.clear()
        try:
            run_block(block.module, parameters, call)
        except _Reached:
            return dict(seen)
        raise ValueError(f"{block.name}: {', '.join(sorted(set(layers) - set(seen)))} got no input")

    hooks = [
        block.module.get_submodule(name).register_forward_pre_hook(lambda module, args, name=name: see(name, args[0]))
        for name in layers
    ]
    shared: dict[str, list[str]] = {}
    statistics: dict[str, Statistics] = {}
    try:
        for i, weight in enumerate(weights):
            teacher = inputs({}, block.teacher_inputs(i))
            student = inputs(finished, block.student_inputs(i))
            if not statistics:
                first: dict[int, str] = {}  # of the layers that get this very tensor
                for name, given in student.items():
                    shared.setdefault(first.setdefault(id(given), name), []).append(name)
                statistics = {n: Statistics(student[n].shape[-1], block.streams.device) for n in shared}
            for name in shared:
                statistics[name].add(student[name], teacher[name], weight)
    finally:
        for hook in hooks:
            hook.remove()
    return [(names, statistics.pop(name)) for name, names in shared.items()]


def calibrate_block(
    block: Block, weights: list[float], w_bits: int, without: Collection[str] = ()
) -> dict[str, Tensor]:
    """The tensors of a block whose linears are calibrated one group after the other, as a packed folder stores them.

    The block's notes get, for every linear by its full name, the "layers": [squared error of the weight, its energy],
    and "fell_back": {name: why} of those that were rounded by mse. ValueError names a layer whose weight holds NaN or
    inf.
    """
    linears = {name: layer for name, layer in block.module.named_modules() if isinstance(layer, nn.Linear)}
    quantized = {f"{name}.weight" for name in linears}
    stored = {f"{block.name}.{n}": p for n, p in block.module.named_parameters() if n not in quantized}
    finished: dict[str, Tensor] = {}
    block.notes.update(layers={}, fell_back={})
    for group in block.order:
        names = [name for name in linears if name in group]
        if not names:
            continue
        found = collect(block, names, finished, weights)
        while found:
            together, statistics = found.pop(0)
            layers = [linears[name] for name in together]
            for name, layer, (codes, alpha, shift) in zip(
                together, layers, _round_together(block, together, layers, statistics, w_bits, without), strict=True
            ):
                full = f"{block.name}.{name}"
                values = to_values(codes, alpha, w_bits)
                own = layer.weight.float()
                block.notes["layers"][full] = [(own - values).square().sum().item(), own.square().sum().item()]
                stored[f"{full}.weight_codes"] = torch.cat([
                    store_codes(codes[rows], w_bits) for rows in row_chunks(*codes.shape)
                ])  # fmt: skip
                stored[f"{full}.weight_clip_val"] = alpha
                finished[f"{name}.weight"] = values.to(layer.weight.dtype)
                if layer.bias is not None:
                    bias = (layer.bias.float() + shift).to(layer.bias.dtype)
                    stored[f"{full}.bias"] = finished[f"{name}.bias"] = bias
    return stored


def _round_together(
    block: Block, names: list[str], layers: list[nn.Linear], statistics: Statistics, w_bits: int,
    without: Collection[str],
) -> list[tuple[Tensor, Tensor, Tensor]]:  # fmt: skip
    """Codes, step sizes and bias shifts of each of the layers that share an input."""
    rows = [layer.out_features for layer in layers]
    for name, layer in zip(names, layers, strict=True):
        if not layer.weight.isfinite().all():
            raise ValueError(f"{block.name}.{name}: its weight holds NaN or inf; download the model again")
    weight = torch.cat([layer.weight for layer in layers])
    try:
        made = calibrate_weight(weight, statistics, w_bits, without, has_bias=layers[0].bias is not None)
        made = made[0], made[1].clamp(min=ALPHA_FLOOR), made[2]
    except Uncalibratable as problem:
        for name in names:
            block.notes["fell_back"][f"{block.name}.{name}"] = str(problem)
        made = *round_weight(weight, w_bits, "mse", 0), torch.zeros(len(weight), device=weight.device)
    return list(zip(*(part.split(rows) for part in made), strict=True))


def calibrate(
    transformer: nn.Module,
    calls: list[dict],
    weights: list[float],
    w_bits: int,
    work: Work,
    device: torch.device = CPU,
    without: Collection[str] = (),
) -> None:
    """Quantize modulation and blocks of `transformer` one after the other, from calibration `calls` of it.

    A call counts by its weight. Transformer and calls are on the CPU; block after block goes to `device` and is freed.
    Finished blocks lie in `work` (see calibrate_block for the notes on them); those that do already are kept.
    """
    walk(transformer, calls, w_bits, lambda block: calibrate_block(block, weights, w_bits, without), work, device)
