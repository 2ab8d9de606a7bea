"""quantize(W + scaling · A @ B) in one pass over the weight, forward and backward, on a GPU.

Eager or compiled from torch's parts, the sum is written and read in fp32: 12 bytes a weight and direction where 4 do,
and A @ B is a product in fp32, without tensor cores. Here a program makes one tile of A @ B on the tensor cores and
rounds it where it is. fp32 factors are split into two bf16 each, x = high + low: high·high + high·low + low·high is
exact to 2⁻¹⁶ of the product. Training, evaluation, freezing and packing all see the codes that come of this.

Backward keeps the inputs alone. With g the gradient of what was put out, in its dtype,

    ∂/∂(W + scaling·A@B) = g where w/α is inside the clip range     ∂/∂α = Σ g·(level − w/α inside)   (utils_quant.py)

A few tokens (AdaLN has one a sample, and 27 % of FLUX.1-dev's weights) are multiplied in that pass: writing the matrix
for them, and its gradient, costs more than they do. Forward then takes 2 bytes a weight, backward (rank 32) 3.6: it
sums over rows for B and x, over columns for A and α, and no program sees all of either.
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

# The kernels of a triton_op become part of a compiled graph, which launches them itself: calling 1,406 operators of
# Python took an H100's CPU 0.24 s of FLUX.1-dev's step (0.93 in all, profiled; the GPU 0.70). A graph would pass a
# float as fp64, so fractions are constants. The interpreter cannot be traced.
# By the name wrap_triton torch finds an op's kernels, of which it makes the key of its caches.
if triton is None or INTERPRETED:
    _op, wrap_triton = torch.library.custom_op, lambda kernel: kernel
else:
    _op, wrap_triton = torch.library.triton_op, torch.library.wrap_triton

# Small, so that several programs share a multiprocessor: one loads while another multiplies. At 3072 × 12288 and rank
# 32 on an H200 (torch 2.11, Triton 3.6), milliseconds forward and backward: 64 × 64 by 4 warps 0.067, 0.104; 128 × 64
# by 8 0.083, 0.112; 64 × 128 by 8 0.094, 0.191. With the products for A and B in it, backward takes as long as both.
TILE = {"HEIGHT": 64, "WIDTH": 64, "num_warps": 4}
MAX_RANK = 128  # what a tile's factors may take of them

FEW = 16  # tokens up to which they are multiplied in the pass: the least that a tensor core takes
FEW_RANK = 64  # up to which tiles and factors fit a consumer card's shared memory
# A program goes through SPAN tiles of its rows, so that fewer sums are written. Milliseconds of FLUX.1-dev's AdaLN, one
# token, rank 32, H100 (torch 2.11, Triton 3.6): forward 4.4, where composing and multiplying take 8.6, and 4.4 to 5.0
# with 128 × 64 by 8 warps; backward 13.4 (22.6), and 14.4 to 15.8.
FEW_TILE = {"HEIGHT": 64, "WIDTH": 64, "SPAN": 16, "num_warps": 4, "num_stages": 3}
FEW_BACKWARD_TILE = {"HEIGHT": 64, "WIDTH": 64, "SPAN": 8, "num_warps": 4, "num_stages": 1, "maxnreg": 168}

if triton is not None:

    @triton.jit
    def _get(matrix, i, j, rows, columns):
        at = i.to(tl.int64) * columns + j
        return tl.load(matrix + at, mask=(i < rows) & (j < columns), other=0.0)

    @triton.jit
    def _put(matrix, i, j, rows, columns, value):
        at = i.to(tl.int64) * columns + j
        tl.store(matrix + at, value.to(matrix.dtype.element_ty), mask=(i < rows) & (j < columns))

    @triton.jit
    def _scale(alpha, row, rows, FLOOR: tl.constexpr, stride):
        scale = tl.load(alpha + row * stride, mask=row < rows, other=1.0)
        return tl.maximum(scale, FLOOR, propagate_nan=tl.PropagateNan.ALL)

    @triton.jit
    def _tile(weight, left, b, step, row, column, numbers, SIGN: tl.constexpr, RANK: tl.constexpr, SPLIT: tl.constexpr):
        """x = (W + scaling·A@B)/step, clipped; whether it was inside; its level; B's columns. NaN stays NaN."""
        rows, columns, rank, SCALING, LOW, HIGH, N, S = numbers
        right = _get(b, tl.arange(0, RANK)[:, None], column, rank, columns)
        if SPLIT:
            left_high, right_high = left.to(tl.bfloat16), right.to(tl.bfloat16)
            left_low = (left - left_high.to(tl.float32)).to(tl.bfloat16)
            right_low = (right - right_high.to(tl.float32)).to(tl.bfloat16)
            update = tl.dot(left_low, right_high)
            update = tl.dot(left_high, right_low, update)
            update = tl.dot(left_high, right_high, update)
        else:
            update = tl.dot(left, right, input_precision="ieee")
        w = _get(weight, row, column, rows, columns).to(tl.float32) + SCALING * update
        x = w * (1 / step)[:, None]  # one division a row
        clipped = tl.clamp(x, LOW, HIGH, propagate_nan=tl.PropagateNan.ALL)
        if SIGN:
            level = tl.where(x >= 0, 1.0, tl.where(x == x, -1.0, x))
        else:
            # Adding 1.5·2²³ leaves no room for a fraction: rounds to even, as torch does.
            level = (((clipped * N - S) + 12582912.0) - 12582912.0 + S) * (1 / N)
        return clipped, clipped == x, level, right

    @triton.jit
    def _through(g, x, inside, level, SIGN: tl.constexpr, FROZEN: tl.constexpr):
        """The gradient g behind the quantizer: of what is rounded, and of α as a sum over the columns of a tile."""
        inner = tl.where(inside, g, 0.0)
        slopes = g * level
        if not SIGN and not FROZEN:
            slopes -= inner * x
        return inner, tl.sum(slopes, axis=1)

    @triton.jit
    def _product(x, y, total, SPLIT: tl.constexpr):
        """total + x·y, as numbers in bf16 are multiplied."""
        if SPLIT:
            total = tl.dot(x.to(tl.bfloat16), y.to(tl.bfloat16), total)
        else:
            total = tl.dot(x.to(tl.float32), y.to(tl.float32), total, input_precision="ieee")
        return total

    @triton.jit
    def _compose(
        weight, a, b, alpha, step, out, rows, columns, rank, SCALING: tl.constexpr, LOW: tl.constexpr,
        HIGH: tl.constexpr, N: tl.constexpr, S: tl.constexpr, FLOOR: tl.constexpr, stride, SIGN: tl.constexpr,
        RANK: tl.constexpr, SPLIT: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
    ):  # fmt: skip
        """out = α·level of a tile."""
        across = tl.cdiv(columns, WIDTH)
        r = tl.program_id(0) // across * HEIGHT + tl.arange(0, HEIGHT)
        row, column = r[:, None], (tl.program_id(0) % across * WIDTH + tl.arange(0, WIDTH))[None, :]
        left, step = _get(a, row, tl.arange(0, RANK)[None, :], rows, rank), _scale(step, r, rows, FLOOR, stride)
        numbers = (rows, columns, rank, SCALING, LOW, HIGH, N, S)
        _, _, level, _ = _tile(weight, left, b, step, row, column, numbers, SIGN, RANK, SPLIT)
        _put(out, row, column, rows, columns, level * _scale(alpha, r, rows, FLOOR, stride)[:, None])

    @triton.jit
    def _compose_backward(
        grad, weight, a, b, step, inner, sums, rows, columns, rank, SCALING: tl.constexpr, LOW: tl.constexpr,
        HIGH: tl.constexpr, N: tl.constexpr, S: tl.constexpr, FLOOR: tl.constexpr, stride, SIGN: tl.constexpr,
        FROZEN: tl.constexpr, RANK: tl.constexpr, SPLIT: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
    ):  # fmt: skip
        """inner = g inside the clip range; sums[row, tile] = Σ g·slope over the columns of a tile."""
        across = tl.cdiv(columns, WIDTH)
        r = tl.program_id(0) // across * HEIGHT + tl.arange(0, HEIGHT)
        row, column = r[:, None], (tl.program_id(0) % across * WIDTH + tl.arange(0, WIDTH))[None, :]
        left, step = _get(a, row, tl.arange(0, RANK)[None, :], rows, rank), _scale(step, r, rows, FLOOR, stride)
        numbers = (rows, columns, rank, SCALING, LOW, HIGH, N, S)
        x, inside, level, _ = _tile(weight, left, b, step, row, column, numbers, SIGN, RANK, SPLIT)
        g = _get(grad, row, column, rows, columns).to(tl.float32)
        through, slopes = _through(g, x, inside, level, SIGN, FROZEN)
        if not FROZEN:
            _put(inner, row, column, rows, columns, through)
        tl.store(sums + r * across + tl.program_id(0) % across, slopes, mask=r < rows)

    @triton.jit
    def _few(
        x, weight, a, b, alpha, step, out, rows, columns, rank, SCALING: tl.constexpr, LOW: tl.constexpr,
        HIGH: tl.constexpr, N: tl.constexpr, S: tl.constexpr, FLOOR: tl.constexpr, stride, few, SIGN: tl.constexpr,
        RANK: tl.constexpr, SPLIT: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, SPAN: tl.constexpr,
        FEW: tl.constexpr,
    ):  # fmt: skip
        """out[span, token, row] = Σ x·α·level over the columns of a span of tiles."""
        spans = tl.cdiv(columns, WIDTH * SPAN)
        span, block = tl.program_id(0) % spans, tl.program_id(0) // spans
        r, m = block * HEIGHT + tl.arange(0, HEIGHT), tl.arange(0, FEW)[None, :]
        row, numbers = r[:, None], (rows, columns, rank, SCALING, LOW, HIGH, N, S)
        left = _get(a, row, tl.arange(0, RANK)[None, :], rows, rank)
        step, alpha = _scale(step, r, rows, FLOOR, stride), _scale(alpha, r, rows, FLOOR, stride)
        total = tl.zeros([HEIGHT, FEW], tl.float32)
        for i in range(SPAN):
            c = (span * SPAN + i) * WIDTH + tl.arange(0, WIDTH)
            column = c[None, :]
            _, _, level, _ = _tile(weight, left, b, step, row, column, numbers, SIGN, RANK, SPLIT)
            made = (level * alpha[:, None]).to(tl.bfloat16)
            total = _product(made, _get(x, m, c[:, None], few, columns), total, SPLIT)
        _put(out + span * few * rows, m, row, few, rows, total)

    @triton.jit
    def _few_backward(
        grad, x, weight, a, b, alpha, step, of_x, of_a, of_b, of_alpha, rows, columns, rank, SCALING: tl.constexpr,
        LOW: tl.constexpr, HIGH: tl.constexpr, N: tl.constexpr, S: tl.constexpr, FLOOR: tl.constexpr, stride, few,
        SIGN: tl.constexpr, FROZEN: tl.constexpr, RANK: tl.constexpr, SPLIT: tl.constexpr, HEIGHT: tl.constexpr,
        WIDTH: tl.constexpr, SPAN: tl.constexpr, FEW: tl.constexpr,
    ):  # fmt: skip
        """With g = gradᵀ·x, sums over the columns of a span of tiles: of_a[span, row, k], of_alpha[span, row]; and over
        the rows of a block: of_b[block, k, column], of_x[block, token, column].
        """
        spans = tl.cdiv(columns, WIDTH * SPAN)
        span, block = tl.program_id(0) % spans, tl.program_id(0) // spans
        r, m, k = block * HEIGHT + tl.arange(0, HEIGHT), tl.arange(0, FEW), tl.arange(0, RANK)[None, :]
        row, numbers = r[:, None], (rows, columns, rank, SCALING, LOW, HIGH, N, S)
        left = _get(a, row, k, rows, rank)
        step, alpha = _scale(step, r, rows, FLOOR, stride), _scale(alpha, r, rows, FLOOR, stride)
        grads = _get(grad, m[None, :], row, few, rows)
        sum_a, sum_alpha = tl.zeros([HEIGHT, RANK], tl.float32), tl.zeros([HEIGHT], tl.float32)
        for i in range(SPAN):
            c = (span * SPAN + i) * WIDTH + tl.arange(0, WIDTH)
            column = c[None, :]
            tokens = _get(x, m[:, None], column, few, columns)
            g = _product(grads, tokens, tl.zeros([HEIGHT, WIDTH], tl.float32), SPLIT)  # first: fewer registers
            clipped, inside, level, right = _tile(weight, left, b, step, row, column, numbers, SIGN, RANK, SPLIT)
            inner, slopes = _through(g, clipped, inside, level, SIGN, FROZEN)
            sum_alpha += slopes
            made = (level * alpha[:, None]).to(tl.bfloat16)
            part = _product(tl.trans(made), grads, tl.zeros([WIDTH, FEW], tl.float32), SPLIT)
            _put(of_x + block * few * columns, m[None, :], c[:, None], few, columns, part)
            if not FROZEN:
                inner = inner.to(tl.bfloat16)
                sum_a = _product(inner, tl.trans(right), sum_a, SPLIT)
                of_rows = _product(tl.trans(inner), left, tl.zeros([WIDTH, RANK], tl.float32), SPLIT)
                _put(of_b + block * rank * columns, k, c[:, None], rank, columns, of_rows)
        tl.store(of_alpha + span * rows + r, sum_alpha, mask=r < rows)
        if not FROZEN:
            _put(of_a + span * rows * rank, row, k, rows, rank, sum_a)


def works_on(weight: Tensor, rank: int) -> bool:
    """Whether the kernels take this weight and rank: on CUDA, or anywhere in Triton's interpreter."""
    cuda = weight.is_cuda and torch.version.hip is None
    return triton is not None and (cuda or INTERPRETED) and 0 < rank <= MAX_RANK


def takes_few(x: Tensor, weight: Tensor, rank: int) -> bool:
    """Whether x [..., in] is few tokens in bf16, and the weight one that `few` takes and is not trained itself."""
    tokens = x.numel() // x.shape[-1]
    return (
        x.dtype == torch.bfloat16 and 0 < tokens <= FEW and rank <= FEW_RANK
        and not weight.requires_grad and works_on(weight, rank)
    )  # fmt: skip


def _programs(weight: Tensor, tile: dict) -> tuple[int, int]:
    """How many programs share the rows of a weight, and its columns."""
    rows, columns = weight.shape
    return -(-rows // tile["HEIGHT"]), -(-columns // (tile["WIDTH"] * tile.get("SPAN", 1)))


def _launch(kernel, tile: dict, tensors: tuple, weight, a, step, scaling, grid, floor, **options) -> None:
    rank = max(16, 1 << (a.shape[1] - 1).bit_length())
    device = torch.cuda.device(weight.device) if weight.is_cuda else torch.device("cpu")
    with device:  # Triton launches on the current device, which need not be the tensors'
        # The interpreter cannot multiply bf16.
        kernel[(math.prod(_programs(weight, tile)),)](
            *(tensor.contiguous() for tensor in tensors), *weight.shape, a.shape[1], scaling, *grid, floor,
            int(step.numel() > 1), **options, RANK=rank, SPLIT=not INTERPRETED, **tile,
        )  # fmt: skip


@_op("flux158::compose", mutates_args=())
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
    step = alpha if frozen is None else frozen
    tensors = (weight, a, b, alpha, step, out)
    _launch(wrap_triton(_compose), TILE, tensors, weight, a, step, scaling, grid, floor, SIGN=sign)
    return out


@compose.register_fake
def _(weight, a, b, alpha, frozen, scaling, grid, sign, floor, numel_qp, dtype):
    return torch.empty(weight.shape, dtype=dtype, device=weight.device)


@_op("flux158::compose_backward", mutates_args=())
def compose_backward(
    grad: Tensor, weight: Tensor, a: Tensor, b: Tensor, step: Tensor, scaling: float, grid: list[float], sign: bool,
    floor: float, frozen: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The gradient of the sum [out, in] in grad's dtype (with `frozen`: empty), and of α [out, 1] without a factor."""
    inner = torch.empty((0,) if frozen else weight.shape, dtype=grad.dtype, device=grad.device)
    sums = torch.empty(len(weight), _programs(weight, TILE)[1], dtype=torch.float32, device=grad.device)
    tensors = (grad, weight, a, b, step, inner, sums)
    options = {"SIGN": sign, "FROZEN": frozen}
    _launch(wrap_triton(_compose_backward), TILE, tensors, weight, a, step, scaling, grid, floor, **options)
    return inner, sums.sum(1, keepdim=True)


@compose_backward.register_fake
def _(grad, weight, a, b, step, scaling, grid, sign, floor, frozen):
    inner = torch.empty((0,) if frozen else weight.shape, dtype=grad.dtype, device=grad.device)
    return inner, torch.empty(len(weight), 1, dtype=torch.float32, device=grad.device)


@_op("flux158::few", mutates_args=())
def few(
    x: Tensor, weight: Tensor, a: Tensor, b: Tensor, alpha: Tensor, frozen: Tensor | None, scaling: float,
    grid: list[float], sign: bool, floor: float, numel_qp: int,
) -> Tensor:  # fmt: skip
    """x @ compose(weight, …)ᵀ [m, out] in fp32, the composed weight in bf16; for x [m, in] in bf16, m up to FEW.

    Differentiable in x, a, b and alpha, not in weight.
    """
    spans, step = _programs(weight, FEW_TILE)[1], alpha if frozen is None else frozen
    out = torch.empty(spans, x.shape[0], len(weight), dtype=torch.float32, device=x.device)
    tensors, options = (x, weight, a, b, alpha, step, out), {"few": x.shape[0], "FEW": FEW}
    _launch(wrap_triton(_few), FEW_TILE, tensors, weight, a, step, scaling, grid, floor, SIGN=sign, **options)
    return out.sum(0)


@few.register_fake
def _(x, weight, *_):
    return torch.empty(x.shape[0], len(weight), dtype=torch.float32, device=x.device)


def _room(x: Tensor, weight: Tensor, a: Tensor) -> list[Tensor]:
    """For what few_backward gives. The sums for B are as many as blocks: rounded, as a product of bf16 would be."""
    (blocks, spans), (rows, rank) = _programs(weight, FEW_BACKWARD_TILE), a.shape
    shapes = ((blocks, *x.shape), (spans, rows, rank), (blocks, rank, x.shape[1]), (spans, rows))
    dtypes = (torch.float32, torch.float32, torch.bfloat16, torch.float32)
    return [torch.empty(s, dtype=dtype, device=x.device) for s, dtype in zip(shapes, dtypes, strict=True)]


@torch.library.custom_op("flux158::few_backward", mutates_args=())  # torch.compile knows no maxnreg
def few_backward(
    grad: Tensor, x: Tensor, weight: Tensor, a: Tensor, b: Tensor, alpha: Tensor, frozen: Tensor | None,
    scaling: float, grid: list[float], sign: bool, floor: float,
) -> list[Tensor]:  # fmt: skip
    """Of x, a/scaling, b/scaling and α without a factor: gradients in parts, to be summed over the first dimension.

    grad [m, out] in bf16. With `frozen`, what is given for a and b is not filled.
    """
    room, step = _room(x, weight, a), alpha if frozen is None else frozen
    tensors = (grad, x, weight, a, b, alpha, step, *room)
    options = {"few": x.shape[0], "FEW": FEW, "FROZEN": frozen is not None}
    _launch(_few_backward, FEW_BACKWARD_TILE, tensors, weight, a, step, scaling, grid, floor, SIGN=sign, **options)
    return room


@few_backward.register_fake
def _(grad, x, weight, a, *_):
    return _room(x, weight, a)


def _save(ctx, inputs, output) -> None:
    weight, a, b, alpha, frozen, ctx.scaling, ctx.grid, ctx.sign, ctx.floor, ctx.numel_qp, _ = inputs
    ctx.save_for_backward(weight, a, b, alpha, frozen)


def _backward(ctx, grad: Tensor):
    weight, a, b, alpha, frozen = ctx.saved_tensors
    step, constants = alpha if frozen is None else frozen, frozen is not None
    inner, slopes = compose_backward(grad, weight, a, b, step, ctx.scaling, ctx.grid, ctx.sign, ctx.floor, constants)
    grad_alpha = slopes.sum_to_size(alpha.shape)
    if constants:
        return (torch.zeros_like(weight), torch.zeros_like(a), torch.zeros_like(b), grad_alpha, *[None] * 7)
    grad_a = (inner @ b.to(inner.dtype).T).float() * ctx.scaling
    grad_b = (a.to(inner.dtype).T @ inner).float() * ctx.scaling
    grad_weight = inner.to(weight.dtype) if ctx.needs_input_grad[0] else None
    return (grad_weight, grad_a, grad_b, grad_alpha / math.sqrt(ctx.numel_qp), *[None] * 7)


def _few_save(ctx, inputs, output) -> None:
    *tensors, ctx.scaling, ctx.grid, ctx.sign, ctx.floor, ctx.numel_qp = inputs
    ctx.save_for_backward(*tensors)


def _few_backward_of(ctx, grad: Tensor):
    x, weight, a, b, alpha, frozen = ctx.saved_tensors
    of_x, of_a, of_b, of_alpha = few_backward(
        grad.to(x.dtype), x, weight, a, b, alpha, frozen, ctx.scaling, ctx.grid, ctx.sign, ctx.floor
    )
    grad_x = of_x.sum(0).to(x.dtype)
    grad_alpha = of_alpha.sum(0).unsqueeze(1).sum_to_size(alpha.shape)
    if frozen is not None:
        return (grad_x, None, torch.zeros_like(a), torch.zeros_like(b), grad_alpha, *[None] * 6)
    grad_a, grad_b = (part.sum(0, dtype=torch.float32) * ctx.scaling for part in (of_a, of_b))
    return (grad_x, None, grad_a, grad_b, grad_alpha / math.sqrt(ctx.numel_qp), *[None] * 6)


compose.register_autograd(_backward, setup_context=_save)
few.register_autograd(_few_backward_of, setup_context=_few_save)
