"""quantize(W + scaling · A @ B) in one pass over the weight, forward and backward, on a GPU.

Eager or compiled from torch's parts, the sum is written and read in fp32: 12 bytes a weight and direction where 4 do,
and A @ B is a product in fp32, without tensor cores. Here a program makes one tile of A @ B on the tensor cores and
rounds it where it is. fp32 factors are split into two bf16 each, x = high + low: high·high + high·low + low·high is
exact to 2⁻¹⁶ of the product. Training, evaluation, freezing and packing all see the codes that come of this.

Backward keeps the inputs alone. With g the gradient of what was put out, in its dtype,

    ∂/∂(W + scaling·A@B) = g where w/α is inside the clip range     ∂/∂α = Σ g·(level − w/α inside)   (utils_quant.py)
"""

import math

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl

    INTERPRETED = triton.knobs.runtime.interpret  # TRITON_INTERPRET=1: the kernels work on a CPU too
except ImportError:
    triton, INTERPRETED = None, False

# Small, so that several programs share a multiprocessor: one loads while another multiplies. At 3072 × 12288 and rank
# 32 on an H200 (torch 2.11, Triton 3.6), milliseconds forward and backward: 64 × 64 by 4 warps 0.067, 0.104; 128 × 64
# by 8 0.083, 0.112; 64 × 128 by 8 0.094, 0.191. With the products for A and B in it, backward takes as long as both.
TILE = {"HEIGHT": 64, "WIDTH": 64, "num_warps": 4}
MAX_RANK = 128  # what a tile's factors may take of them

if triton is not None:

    @triton.jit
    def _tile(
        weight, a, b, step, row, column, rows, columns, rank, scaling, low, high, n, s, step_stride,
        SIGN: tl.constexpr, RANK: tl.constexpr, SPLIT: tl.constexpr,
    ):  # fmt: skip
        """x = (W + scaling·A@B)/step of a tile, and its levels; NaN stays NaN."""
        k = tl.arange(0, RANK)
        here_a = (row[:, None] < rows) & (k[None, :] < rank)
        here_b = (k[:, None] < rank) & (column[None, :] < columns)
        left = tl.load(a + row[:, None] * rank + k[None, :], mask=here_a, other=0.0)
        right = tl.load(b + k[:, None] * columns + column[None, :], mask=here_b, other=0.0)
        if SPLIT:
            left_high, right_high = left.to(tl.bfloat16), right.to(tl.bfloat16)
            left_low = (left - left_high.to(tl.float32)).to(tl.bfloat16)
            right_low = (right - right_high.to(tl.float32)).to(tl.bfloat16)
            update = tl.dot(left_low, right_high)
            update = tl.dot(left_high, right_low, update)
            update = tl.dot(left_high, right_high, update)
        else:
            update = tl.dot(left, right, input_precision="ieee")
        here = (row[:, None] < rows) & (column[None, :] < columns)
        at = row.to(tl.int64)[:, None] * columns + column[None, :]
        w = tl.load(weight + at, mask=here, other=0.0).to(tl.float32) + scaling * update
        x = w * (1 / tl.load(step + row * step_stride, mask=row < rows, other=1.0))[:, None]  # one division a row
        if SIGN:
            level = tl.where(x >= 0, 1.0, -1.0)
        else:
            # Adding 1.5·2²³ leaves no room for a fraction: rounds to even, as torch does.
            level = tl.minimum(tl.maximum(x, low), high) * n - s
            level = ((level + 12582912.0) - 12582912.0 + s) * (1 / n)
        return x, tl.where(x == x, level, x), at, here

    @triton.jit
    def _compose(
        weight, a, b, alpha, step, out, rows, columns, rank, scaling, low, high, n, s, alpha_stride,
        SIGN: tl.constexpr, RANK: tl.constexpr, SPLIT: tl.constexpr, HEIGHT: tl.constexpr,
        WIDTH: tl.constexpr,
    ):  # fmt: skip
        """out = α·level of a tile."""
        across = tl.cdiv(columns, WIDTH)
        row = tl.program_id(0) // across * HEIGHT + tl.arange(0, HEIGHT)
        column = tl.program_id(0) % across * WIDTH + tl.arange(0, WIDTH)
        _, level, at, here = _tile(
            weight, a, b, step, row, column, rows, columns, rank, scaling, low, high, n, s, alpha_stride,
            SIGN, RANK, SPLIT,
        )  # fmt: skip
        scale = tl.load(alpha + row * alpha_stride, mask=row < rows, other=0.0)[:, None]
        tl.store(out + at, (level * scale).to(out.dtype.element_ty), mask=here)

    @triton.jit
    def _compose_backward(
        grad, weight, a, b, step, inner, sums, rows, columns, rank, scaling, low, high, n, s, step_stride,
        SIGN: tl.constexpr, FROZEN: tl.constexpr, RANK: tl.constexpr, SPLIT: tl.constexpr, HEIGHT: tl.constexpr,
        WIDTH: tl.constexpr,
    ):  # fmt: skip
        """inner = g inside the clip range; sums[row, tile] = Σ g·slope over the columns of a tile."""
        across = tl.cdiv(columns, WIDTH)
        row = tl.program_id(0) // across * HEIGHT + tl.arange(0, HEIGHT)
        column = tl.program_id(0) % across * WIDTH + tl.arange(0, WIDTH)
        x, level, at, here = _tile(
            weight, a, b, step, row, column, rows, columns, rank, scaling, low, high, n, s, step_stride,
            SIGN, RANK, SPLIT,
        )  # fmt: skip
        g = tl.load(grad + at, mask=here, other=0.0).to(tl.float32)
        slope = level
        if not FROZEN:
            inside = (x >= low) & (x <= high)
            tl.store(inner + at, tl.where(inside, g, 0.0).to(inner.dtype.element_ty), mask=here)
            if not SIGN:
                slope = level - tl.where(inside, x, 0.0)
        total = tl.sum(tl.where(here, g * slope, 0.0), axis=1)
        tl.store(sums + row * across + tl.program_id(0) % across, total, mask=row < rows)


def works_on(weight: Tensor, rank: int) -> bool:
    """Whether the kernels take this weight and rank: on CUDA, or anywhere in Triton's interpreter."""
    cuda = weight.is_cuda and torch.version.hip is None
    return triton is not None and (cuda or INTERPRETED) and 0 < rank <= MAX_RANK


def _launch(kernel, weight: Tensor, a: Tensor, *arguments, **options) -> None:
    rows, columns = weight.shape
    tiles = -(-rows // TILE["HEIGHT"]) * -(-columns // TILE["WIDTH"])
    rank = max(16, 1 << (a.shape[1] - 1).bit_length())
    device = torch.cuda.device(weight.device) if weight.is_cuda else torch.device("cpu")
    with device:  # Triton launches on the current device, which need not be the tensors'
        # The interpreter cannot multiply bf16.
        kernel[(tiles,)](*arguments, **options, RANK=rank, SPLIT=not INTERPRETED, **TILE)


@torch.library.custom_op("flux158::compose", mutates_args=())
def compose(
    weight: Tensor, a: Tensor, b: Tensor, alpha: Tensor, frozen: Tensor | None, scaling: float, grid: list[float],
    sign: bool, floor: float, numel_qp: int, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """α·level((weight + scaling·a@b)/α) [out, in] in `dtype`, differentiable in weight, a, b and alpha.

    weight [out, in]; a [out, r], b [r, in] fp32; alpha [out, 1] or [1, 1] fp32, at least `floor`; `frozen`: step sizes
    at which the levels are found instead, and then they are constants. grid: low, high, n, s of utils_quant._grid, or
    the sign alone with `sign`. The gradient of alpha is divided by √numel_qp.
    """
    out = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    scale = alpha.clamp(min=floor)
    step = scale if frozen is None else frozen.clamp(min=floor)
    rows, columns = weight.shape
    _launch(
        _compose, weight, a, weight.contiguous(), a.contiguous(), b.contiguous(), scale, step, out, rows, columns,
        a.shape[1], scaling, *grid, int(alpha.numel() > 1), SIGN=sign,
    )  # fmt: skip
    return out


@compose.register_fake
def _(weight, a, b, alpha, frozen, scaling, grid, sign, floor, numel_qp, dtype):
    return torch.empty(weight.shape, dtype=dtype, device=weight.device)


@torch.library.custom_op("flux158::compose_backward", mutates_args=())
def compose_backward(
    grad: Tensor, weight: Tensor, a: Tensor, b: Tensor, step: Tensor, scaling: float, grid: list[float], sign: bool,
    frozen: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The gradient of the sum [out, in] in grad's dtype (with `frozen`: empty), and of α [out, 1] without a factor."""
    rows, columns = weight.shape
    inner = torch.empty((0,) if frozen else weight.shape, dtype=grad.dtype, device=grad.device)
    sums = torch.empty(rows, -(-columns // TILE["WIDTH"]), dtype=torch.float32, device=grad.device)
    _launch(
        _compose_backward, weight, a, grad.contiguous(), weight.contiguous(), a.contiguous(), b.contiguous(), step,
        inner, sums, rows, columns, a.shape[1], scaling, *grid, int(step.numel() > 1), SIGN=sign, FROZEN=frozen,
    )  # fmt: skip
    return inner, sums.sum(1, keepdim=True)


@compose_backward.register_fake
def _(grad, weight, a, b, step, scaling, grid, sign, frozen):
    inner = torch.empty((0,) if frozen else weight.shape, dtype=grad.dtype, device=grad.device)
    return inner, torch.empty(len(weight), 1, dtype=torch.float32, device=grad.device)


def _save(ctx, inputs, output) -> None:
    weight, a, b, alpha, frozen, ctx.scaling, ctx.grid, ctx.sign, ctx.floor, ctx.numel_qp, _ = inputs
    ctx.save_for_backward(weight, a, b, alpha, frozen)


def _backward(ctx, grad: Tensor):
    weight, a, b, alpha, frozen = ctx.saved_tensors
    step = (alpha if frozen is None else frozen).clamp(min=ctx.floor)
    constants = frozen is not None
    inner, slopes = compose_backward(grad, weight, a, b, step, ctx.scaling, ctx.grid, ctx.sign, constants)
    grad_alpha = slopes.sum_to_size(alpha.shape)
    if constants:
        return (torch.zeros_like(weight), torch.zeros_like(a), torch.zeros_like(b), grad_alpha, *[None] * 7)
    grad_a = (inner @ b.to(inner.dtype).T).float() * ctx.scaling
    grad_b = (a.to(inner.dtype).T @ inner).float() * ctx.scaling
    grad_weight = inner.to(weight.dtype) if ctx.needs_input_grad[0] else None
    return (grad_weight, grad_a, grad_b, grad_alpha / math.sqrt(ctx.numel_qp), *[None] * 7)


compose.register_autograd(_backward, setup_context=_save)
