"""Rounding a weight column by column, each column's error known to those that come after it, in blocks of columns.

For E = W − Q and a covariance H of a layer's inputs, tr(E H Eᵀ) is the error of its outputs. Rows of W are independent.
Two passes over the columns lower it:

    gptq      With H = R Rᵀ, R upper triangular, a row's error is ‖E R‖², whose entry k is Σ_{j ≤ k} E_j R_jk. Column k
              takes the level closest to W_k + Σ_{j < k} E_j R_jk / R_kk, which keeps that entry small. These are the
              codes of GPTQ (arXiv 2210.17323), whose columns take each error on by the rows of a Cholesky factor of
              H⁻¹, that is of R⁻¹; but nothing is inverted.
    descend   Column k takes the level closest to Q_k + (E H)_k / H_kk, where the error is least as long as the other
              columns stay as they are.

Both are one recursion, over b = W and M = R, or b = Q and M = H:

    q_k = level(b_k + s_k / M_kk),    then s_j += (b_k − q_k) M_kj for every later j

Column by column it would be a rank-1 update of all that is left, bound by memory. So s is computed for a block of
columns by one matrix product with all columns outside of it, and only within the block column by column: `round_block`,
on a GPU one Triton kernel that keeps its rows in registers.
"""

import torch
from torch import Tensor

from models.utils_quant import code_grid

try:
    import triton
    import triton.language as tl

    INTERPRETED = triton.knobs.runtime.interpret  # TRITON_INTERPRET=1: the kernel works on a CPU too
except ImportError:
    triton, INTERPRETED = None, False

BLOCK = 128  # columns
ROWS = 16  # of a program

if triton is not None:

    @triton.jit
    def _round_block(
        base, slack, alpha, matrix, out, rows, base_stride, slack_stride, matrix_stride, out_stride, n, s, low, high,
        WIDTH: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
    ):  # fmt: skip
        row, column = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, COLUMNS)
        inside = (row < rows)[:, None] & (column < WIDTH)[None, :]
        b = tl.load(base + row[:, None] * base_stride + column[None, :], mask=inside, other=0.0)
        rest = tl.load(slack + row[:, None] * slack_stride + column[None, :], mask=inside, other=0.0)
        step = tl.load(alpha + row, mask=row < rows, other=1.0)
        quantized = b
        for k in range(WIDTH):
            coupling = tl.load(matrix + k * matrix_stride + column, mask=column < WIDTH, other=0.0)
            pivot = tl.load(matrix + k * matrix_stride + k)
            here = (column == k)[None, :]
            old = tl.sum(tl.where(here, b, 0.0), 1)
            wanted = old + tl.sum(tl.where(here, rest, 0.0), 1) / pivot
            code = tl.minimum(tl.maximum(tl.floor(wanted / step * n + (0.5 - s)), low), high)
            new = (code + s) / n * step
            quantized = tl.where(here, new[:, None], quantized)
            rest += (old - new)[:, None] * coupling[None, :]
        tl.store(out + row[:, None] * out_stride + column[None, :], quantized, mask=inside)


def code_range(w_bits: int) -> tuple[int, int]:
    """The lowest and the highest code."""
    return (-1, 1) if w_bits == 0 else (-(2 ** (w_bits - 1)), 2 ** (w_bits - 1) - 1)


def round_block(base: Tensor, slack: Tensor, alpha: Tensor, matrix: Tensor, w_bits: int) -> Tensor:
    """The recursion above over one block of columns: quantized values [out, k].

    base, slack [out, k], alpha [out, 1], matrix [k, k], in fp32 or, in plain torch, fp64; a level is α·(c + s)/n.
    """
    (n, s), (low, high) = code_grid(w_bits), code_range(w_bits)
    rows, width = base.shape
    if triton is not None and (base.is_cuda or INTERPRETED) and base.dtype == torch.float32:
        # What linalg and flip return may lie column by column.
        base, slack, matrix = (t if t.stride(1) == 1 else t.contiguous() for t in (base, slack, matrix))
        out = torch.empty_like(slack, memory_format=torch.contiguous_format)
        columns = triton.next_power_of_2(width)
        with torch.cuda.device_of(base):
            _round_block[(triton.cdiv(rows, ROWS),)](
                base, slack, alpha.contiguous(), matrix, out, rows, base.stride(0), slack.stride(0), matrix.stride(0),
                out.stride(0), n, s, float(low), float(high), WIDTH=width, COLUMNS=columns, ROWS=ROWS,
            )  # fmt: skip
        return out
    slack, quantized = slack.clone(), torch.empty_like(base)
    for k in range(width):
        old = base[:, k : k + 1]
        wanted = old + slack[:, k : k + 1] / matrix[k, k]
        codes = (wanted / alpha).mul_(n).add_(0.5 - s).floor_().clamp_(low, high)
        new = quantized[:, k : k + 1] = codes.add_(s).div_(n).mul_(alpha)
        slack[:, k + 1 :].addcmul_(old - new, matrix[k, k + 1 :])
    return quantized


def to_codes(quantized: Tensor, alpha: Tensor, w_bits: int) -> Tensor:
    """The codes (int8) of values [out, in] that are levels already."""
    n, s = code_grid(w_bits)
    return (quantized / alpha).mul_(n).sub_(s).round_().to(torch.int8)


def to_values(codes: Tensor, alpha: Tensor, w_bits: int) -> Tensor:
    """The levels α·(c + s)/n [out, in] of codes (int8), in the dtype of alpha [out, 1]."""
    n, s = code_grid(w_bits)
    return codes.to(alpha.dtype).add_(s).div_(n).mul_(alpha)


def factorize(hessian: Tensor) -> Tensor | None:
    """R [in, in], upper triangular, with R Rᵀ = hessian; None if that is, in its precision, not positive definite."""
    lower, info = torch.linalg.cholesky_ex(hessian.flip(0, 1))
    if info.item() or not lower.diagonal().isfinite().all():
        return None
    return lower.flip(0, 1)


def gptq(target: Tensor, alpha: Tensor, w_bits: int, factor: Tensor, block: int = BLOCK) -> Tensor:
    """Quantized values [out, in] of a weight by error feedback from the first column to the last.

    alpha [out, 1]; factor: the upper triangular R of `factorize`.
    """
    quantized, errors = torch.empty_like(target), torch.empty_like(target)
    for start in range(0, target.shape[1], block):
        here = slice(start, start + block)
        slack = errors[:, :start] @ factor[:start, here]
        quantized[:, here] = round_block(target[:, here], slack, alpha, factor[here, here], w_bits)
        torch.sub(target[:, here], quantized[:, here], out=errors[:, here])
    return quantized


def descend(
    target: Tensor, quantized: Tensor, alpha: Tensor, w_bits: int, hessian: Tensor, block: int = BLOCK
) -> Tensor:
    """One sweep of coordinate descent from the first column to the last; no row's error grows.

    Changes and returns `quantized` [out, in], levels of the step sizes alpha [out, 1].
    """
    errors = target - quantized
    for start in range(0, target.shape[1], block):
        here = slice(start, start + block)
        new = round_block(quantized[:, here], errors @ hessian[:, here], alpha, hessian[here, here], w_bits)
        errors[:, here] += quantized[:, here] - new
        quantized[:, here] = new
    return quantized


def fit_scale(target: Tensor, codes: Tensor, w_bits: int, hessian: Tensor, fallback: Tensor) -> Tensor:
    """α [out, 1] that minimizes tr((target − αl) H (target − αl)ᵀ) for the levels l of the codes."""
    levels = to_values(codes, torch.ones_like(fallback), w_bits)
    projected = levels @ hessian
    norm = (projected * levels).sum(1, keepdim=True).clamp(min=1e-12)
    alpha = projected.mul_(target).sum(1, keepdim=True) / norm
    return torch.where(alpha > 1e-5, alpha, fallback)
