"""Blocked rounding against the plain column by column definitions in float64, and against brute force.

The tests marked `kernels` run on the GPU where there is one. Where there is none they run in plain torch, and once more
in a process of their own in Triton's interpreter.
"""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from models.utils_quant import code_grid, init_clip_val, quantize, quantize_codes
from utils import rounding

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.on_gpu

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
BITS = [0, 1, 2, 4] if INTERPRETED else [0, 1, 2, 3, 4, 8]
BLOCKS = [9] if INTERPRETED else [8, 9, 24]


@pytest.fixture
def problem():
    """A weight [5, 24] and a covariance [24, 24] of strongly correlated inputs, the largest first; float32, seeded."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(5, 24, generator=generator)
    mixed = torch.randn(24, 24, generator=generator)
    hessian = mixed @ torch.diag(torch.logspace(0, -3, 24)) @ mixed.T
    order = hessian.diagonal().argsort(descending=True)
    return weight[:, order], (hessian + hessian.T)[order][:, order] / 2 + 1e-3 * torch.eye(24)


def error(weight, quantized, hessian):
    """tr((W − Q) H (W − Q)ᵀ) in float64, row by row."""
    gap = (weight - quantized).double()
    return ((gap @ hessian.double()) * gap).sum(1)


def level(column, alpha, bits):
    n, s = code_grid(bits)
    return alpha * ((quantize_codes(column, alpha, bits).double() + s) / n)


def gptq_by_columns(weight, alpha, bits, hessian):
    """As published: each column's error passed on by a row of the upper Cholesky factor of the inverse of H."""
    inverse = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    weight, quantized = weight.clone(), torch.empty_like(weight)
    for j in range(weight.shape[1]):
        quantized[:, j : j + 1] = level(weight[:, j : j + 1], alpha, bits)
        weight[:, j:] -= (weight[:, j : j + 1] - quantized[:, j : j + 1]) / inverse[j, j] * inverse[j, j:]
    return quantized


def descend_by_columns(weight, quantized, alpha, bits, hessian):
    """Each column at the best of its levels, with the gradient computed anew for each."""
    quantized = quantized.clone()
    for j in range(weight.shape[1]):
        gradient = (weight - quantized) @ hessian[:, j : j + 1]
        quantized[:, j : j + 1] = level(quantized[:, j : j + 1] + gradient / hessian[j, j], alpha, bits)
    return quantized


@pytest.mark.kernels
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("block", BLOCKS)
def test_blocks_of_columns_are_the_column_by_column_definitions(bits, block, problem):
    weight, hessian = (tensor.to(DEVICE) for tensor in problem)
    alpha = init_clip_val(weight, bits)
    exact = [tensor.double() for tensor in (weight, alpha, hessian)]
    fed = rounding.gptq(weight, alpha, bits, rounding.factorize(hessian), block)
    wanted = gptq_by_columns(exact[0], exact[1], bits, exact[2])
    torch.testing.assert_close(fed.double(), wanted, atol=1e-5, rtol=1e-5)
    better = rounding.descend(weight, fed.clone(), alpha, bits, hessian, block)
    wanted = descend_by_columns(exact[0], wanted, exact[1], bits, exact[2])
    torch.testing.assert_close(better.double(), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.kernels
@pytest.mark.parametrize("bits", BITS)
def test_error_feedback_and_descent_each_lower_the_error(bits, problem):
    weight, hessian = (tensor.to(DEVICE) for tensor in problem)
    alpha = init_clip_val(weight, bits)
    plain = quantize(weight, alpha, bits)
    identity = torch.eye(24, device=DEVICE)
    torch.testing.assert_close(rounding.gptq(weight, alpha, bits, identity, block=8), plain)
    fed = rounding.gptq(weight, alpha, bits, rounding.factorize(hessian), block=8)
    assert error(weight, fed, hessian).sum() < error(weight, plain, hessian).sum()
    before = error(weight, fed, hessian)
    after = error(weight, rounding.descend(weight, fed.clone(), alpha, bits, hessian, block=8), hessian)
    assert (after <= before * (1 + 1e-5)).all()


@pytest.mark.kernels
@pytest.mark.parametrize("rows", [1, 37])
def test_rows_are_independent_and_strides_are_heeded(rows, problem):
    """A wide matrix whose columns are cut out of a wider one, with rows that no program of the kernel is filled by."""
    generator = torch.Generator().manual_seed(4)
    base, slack = torch.randn(2, rows, 40, generator=generator).to(DEVICE)
    alpha, matrix = torch.rand(rows, 1, generator=generator).to(DEVICE) + 0.5, problem[1].to(DEVICE)
    cut = slice(7, 7 + 20)
    found = rounding.round_block(base[:, cut], slack[:, cut], alpha, matrix[2:22, 2:22], 0)
    turned = [tensor.mT.contiguous().mT for tensor in (base[:, cut], slack[:, cut], matrix[2:22, 2:22])]
    assert torch.equal(rounding.round_block(*turned[:2], alpha, turned[2], 0), found)
    for i in range(rows):
        one = rounding.round_block(
            base[i : i + 1, cut].double(), slack[i : i + 1, cut].double(), alpha[i : i + 1].double(),
            matrix[2:22, 2:22].double(), 0,
        )  # fmt: skip
        torch.testing.assert_close(found[i : i + 1].double(), one, atol=1e-5, rtol=1e-5)


def test_descent_ends_where_no_single_code_does_better():
    generator = torch.Generator().manual_seed(1)
    weight, mixed = torch.randn(4, 6, generator=generator), torch.randn(6, 6, generator=generator)
    hessian, alpha = mixed @ mixed.T + 0.1 * torch.eye(6), torch.full((4, 1), 1.5)
    quantized = quantize(weight, alpha, 0)
    for _ in range(20):
        quantized = rounding.descend(weight, quantized, alpha, 0, hessian, block=4)
    reached = error(weight, quantized, hessian)
    for column, value in itertools.product(range(6), (-1.0, 0.0, 1.0)):
        other = quantized.clone()
        other[:, column] = value
        assert (error(weight, other, hessian) >= reached - 1e-5).all()


@pytest.mark.parametrize("bits", BITS)
def test_values_and_codes_are_each_other_back(bits, problem):
    weight, _ = problem
    alpha = init_clip_val(weight, bits)
    codes = quantize_codes(weight, alpha, bits)
    values = rounding.to_values(codes, alpha, bits)
    torch.testing.assert_close(values, quantize(weight, alpha, bits), atol=1e-6, rtol=1e-6)
    assert torch.equal(rounding.to_codes(values, alpha, bits), codes)
    low, high = rounding.code_range(bits)
    far = quantize_codes(torch.tensor([[-1e9, 1e9]]), torch.ones(1, 1), bits)
    assert far.tolist() == [[low, high]]


@pytest.mark.parametrize("bits", [0, 2, 4])
def test_the_fitted_scale_is_the_best_one(bits, problem):
    weight, hessian = problem
    start = init_clip_val(weight, bits)
    codes = quantize_codes(weight, start, bits)
    alpha = rounding.fit_scale(weight, codes, bits, hessian, start)
    best = error(weight, rounding.to_values(codes, alpha, bits), hessian)
    for factor in (0.98, 1.02):
        assert (error(weight, rounding.to_values(codes, alpha * factor, bits), hessian) > best).all()


def test_what_cannot_be_factorized_is_none(problem):
    _, hessian = problem
    factor = rounding.factorize(hessian)
    torch.testing.assert_close(factor @ factor.T, hessian)
    assert torch.equal(factor, factor.triu())
    assert rounding.factorize(hessian - hessian.trace() * torch.eye(24)) is None
    assert rounding.factorize(torch.full((3, 3), torch.nan)) is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernel itself is tested")
def test_the_kernel_in_the_interpreter():
    pytest.importorskip("triton", reason="Triton is made for Linux only")
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-m", "kernels", "-p", "no:cacheprovider", __file__],
        cwd=ROOT, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-4000:]


@pytest.mark.skipif(torch.cuda.is_available() or INTERPRETED, reason="the tests above ran the kernel")
def test_the_kernel_compiles_for_a_gpu_that_is_not_there():
    triton = pytest.importorskip("triton", reason="Triton is made for Linux only")
    constants = {"WIDTH": 128, "COLUMNS": 128, "ROWS": rounding.ROWS}
    types = dict.fromkeys(("base", "slack", "alpha", "matrix", "out"), "*fp32")
    types |= dict.fromkeys(("n", "s", "low", "high"), "fp32") | dict.fromkeys(constants, "constexpr")
    function = rounding._round_block
    source = triton.compiler.ASTSource(
        function,
        {name: types.get(name, "i32") for name in function.arg_names},
        {(number,): constants[name] for number, name in enumerate(function.arg_names) if name in constants},
    )
    target = triton.backends.compiler.GPUTarget("cuda", 90, 32)
    assert "ptx" in triton.compile(source, target=target, options={"num_warps": 4}).asm
