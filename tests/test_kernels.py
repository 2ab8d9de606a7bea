"""Multiplication by packed codes against float64: exact and fast, for every bit width, odd shapes and every dtype.

The tests marked `kernels` run on the GPU where there is one. Where there is none they run in plain torch, and once more
in a process of their own in Triton's interpreter.
"""

import copy
import os
import subprocess
import sys
import weakref
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import FasterCacheConfig, FluxPipeline, PyramidAttentionBroadcastConfig, TaylorSeerCacheConfig
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_flux import (
    FluxAttention,
    FluxAttnProcessor,
    FluxIPAdapterAttnProcessor,
    FluxPosEmbed,
)
from diffusers.models.transformers.transformer_flux2 import Flux2Attention, Flux2ParallelSelfAttention
from tiny_models import norm_rotate
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

from models import attention, kernels, packing
from models.kernels import FP8, row_chunks
from models.modeling_flux2_quant import FusedFlux2AttnProcessor, FusedFlux2ParallelAttnProcessor
from models.modeling_flux_quant import FastGELU, FastProjectedGELU, FluxTransformer2DModel, FusedFluxAttnProcessor
from models.packing import PackedLinear

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.on_gpu

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
BITS = [0, 1, 2, 4, 8] if INTERPRETED else range(9)  # the others have no kernels
GRID = {0: (0, 1.5), 1: (0.5, 0.5), 2: (0.5, 2)} | dict.fromkeys(range(3, 9), (0, 1))  # level = (c + s)/n
SHAPES = [(48, 272), (5, 1301), (50, 512)] + [(3, 7)] * (not INTERPRETED)  # out, in
SHAPES += [(3072, 3072), (1040, 4112)] * GPU
TOKENS = [1, 3] if INTERPRETED else [1, 7, 16, 17, 512] + [4608] * GPU
# Of the largest output: fp32 sums of some thousand terms in any order, an ulp of the others.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2**-10, torch.bfloat16: 2**-7}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=["fp32", "fp16", "bf16"])


def packed_layer(out_features, in_features, w_bits, bias=True, layerwise=False, dtype=torch.float32):
    """A layer of random codes, and the integers and steps that it was made of."""
    torch.manual_seed(out_features + in_features + w_bits)
    low, high = (-1, 1) if w_bits == 0 else (-(2 ** (w_bits - 1)), 2 ** (w_bits - 1) - 1)
    codes = torch.randint(low, high + 1, (out_features, in_features), dtype=torch.int8)
    alpha = torch.rand(1, 1) + 0.1 if layerwise else torch.rand(out_features, 1) + 0.1
    bias = torch.randn(out_features, dtype=dtype) if bias else None
    return PackedLinear.from_codes(codes, alpha, bias, w_bits, layerwise).to(DEVICE), codes.to(DEVICE)


def packed_layers(w_bits, dtype):
    """Layers of all SHAPES, with a bias and a step for each row, and with neither."""
    for shape in SHAPES:
        yield packed_layer(*shape, w_bits, bias=True, layerwise=False, dtype=dtype)
        yield packed_layer(*shape, w_bits, bias=False, layerwise=True, dtype=dtype)


def levels(layer, codes, dtype):
    """The dequantized weight in float64, rounded to the dtype that it is multiplied in."""
    s, n = GRID[layer.w_bits]
    return ((codes.float() + s) / n * layer.weight_clip_val).to(dtype).double()


def tokens_of(count, width, dtype):
    torch.manual_seed(count + width)
    return torch.randn(count, width, dtype=dtype).to(DEVICE)


def assert_close(found, expected, tolerance):
    assert (found.double() - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.kernels
@pytest.mark.parametrize("w_bits", BITS)
def test_dequantized_weights(w_bits):
    for shape in SHAPES:
        for dtype in TOLERANCE:
            layer, codes = packed_layer(*shape, w_bits)
            found, expected = layer.dequantize(dtype).double(), levels(layer, codes, dtype)
            if INTERPRETED and dtype == torch.bfloat16:  # the interpreter cuts off where a GPU rounds
                torch.testing.assert_close(found, expected, rtol=2**-7, atol=0)
            else:
                assert torch.equal(found, expected)


def test_three_bits_become_e4m3_by_way_of_floats():
    """The compiler writes such a cast into Triton, which has none of int8 (3.6, 3.8): blocks did not compile."""
    codes = packing.pack_codes(torch.randint(-4, 4, (16, 64), dtype=torch.int8), 3)
    graph = make_fx(lambda codes: kernels.integers(codes, 3, 64, FP8), tracing_mode="fake")(codes).graph
    casts = [node for node in graph.nodes if node.kwargs.get("dtype") == FP8]
    assert casts and all(node.args[0].meta["val"].is_floating_point() for node in casts)


@pytest.mark.parametrize(("device", "parts"), [("cpu", 10), ("meta", 1)])
def test_where_there_is_no_kernel_a_gpu_unpacks_a_matrix_in_few_launches(device, parts, monkeypatch):
    """As with 3 bits; FLUX.1-dev's 504 matrices in a CPU's portions took a hundred thousand."""
    calls = []
    monkeypatch.setattr(kernels, "unpack_codes", lambda codes, *_: torch.zeros(len(codes), 3072).to(codes.device))
    monkeypatch.setattr(kernels, "row_chunks", lambda *sizes: calls.extend(row_chunks(*sizes)) or iter(calls))
    row_bytes = packing.row_bytes(3072, 3)
    codes, alpha = torch.zeros(3072, row_bytes, dtype=torch.uint8, device=device), torch.ones(3072, 1, device=device)
    assert kernels._dequantize(codes, alpha, 3, 3072, torch.bfloat16).shape == (3072, 3072)
    assert len(calls) == parts


@pytest.mark.kernels
@pytest.mark.parametrize("w_bits", BITS)
def test_integers_in_eight_bits(w_bits):
    for shape in SHAPES:
        for dtype in (torch.int8, FP8) if w_bits <= kernels.FP8_BITS else (torch.int8,):
            layer, codes = packed_layer(*shape, w_bits)
            found = kernels.integers(layer.weight_codes, w_bits, shape[1], dtype)
            assert found.dtype == dtype
            s, n = GRID[w_bits]
            torch.testing.assert_close(found.double() * kernels.grid_step(w_bits), (codes.double() + s) / n)


@pytest.mark.kernels
@DTYPES
@pytest.mark.parametrize("w_bits", BITS)
def test_exact_mode_is_the_product_with_the_dequantized_weight(w_bits, dtype):
    for layer, codes in packed_layers(w_bits, dtype):
        weight = layer.dequantize(dtype).double() if INTERPRETED else levels(layer, codes, dtype)
        for count in TOKENS:
            x = tokens_of(count, layer.in_features, dtype)
            found = layer(x)
            assert found.dtype == dtype
            expected = F.linear(x.double(), weight, None if layer.bias is None else layer.bias.double())
            assert_close(found, expected, TOLERANCE[dtype])


CPU_ONLY = pytest.mark.skipif(GPU, reason="layers stay unpacked on a CPU alone")


@CPU_ONLY
@pytest.mark.parametrize("mode", kernels.MODES)
@pytest.mark.parametrize("w_bits", BITS)
def test_a_small_layer_is_unpacked_once(w_bits, mode, monkeypatch):
    layer, codes = packed_layer(50, 512, w_bits)
    layer.mode, unpack, calls = mode, kernels.unpack_codes, []
    monkeypatch.setattr(kernels, "unpack_codes", lambda *args: calls.append(args) or unpack(*args))
    for count in (1, 40):
        x = tokens_of(count, 512, torch.float32)
        for _ in range(2):
            found = layer(x)
            if mode == "exact":  # bit for bit
                assert torch.equal(found, F.linear(x, levels(layer, codes, torch.float32).float(), layer.bias))
    assert len(calls) == 1
    half = layer.to(torch.bfloat16)
    x = tokens_of(40, 512, torch.bfloat16)
    for _ in range(2):
        found = half(x)
        if mode == "exact":
            weight = levels(half, codes, torch.bfloat16).bfloat16()
            assert torch.equal(found, F.linear(x, weight, half.bias))
    assert len(calls) == 1 + (mode == "exact")


@CPU_ONLY
@pytest.mark.parametrize("traced", [True, False], ids=["for gradients", "without"])
@pytest.mark.parametrize("mode", kernels.MODES)
def test_a_small_layer_follows_its_codes_and_step_sizes(mode, traced):
    with torch.set_grad_enabled(traced):
        follow(mode)


def follow(mode):
    (layer, _), (other, _) = packed_layer(50, 512, 0), packed_layer(50, 512, 0)
    with torch.no_grad():
        other.weight_codes.copy_(other.weight_codes.flip(0))
        other.weight_clip_val.mul_(torch.rand(50, 1) + 1)
    x = tokens_of(40, 512, torch.float32)

    def fresh(changed):
        twin = PackedLinear.from_codes(changed.codes(), changed.weight_clip_val, changed.bias, 0)
        twin.mode = mode
        return twin(x)

    def written(changed):
        with torch.no_grad():
            changed.weight_codes[3:7] = other.weight_codes[:4]

    def swapped(changed):
        changed.weight_codes.data = other.weight_codes.data.clone()

    def offloaded(changed):
        here = changed.weight_codes.data
        changed.weight_codes.data = torch.zeros_like(here)
        changed(x)
        changed.weight_codes.data = here.clone()

    def scaled(changed):
        with torch.no_grad():
            changed.weight_clip_val.mul_(2)

    def autocast(changed):
        with torch.autocast("cpu", torch.bfloat16):
            found, expected = changed(x), fresh(changed)
        assert found.dtype == torch.bfloat16 and torch.equal(found, expected)

    def half_biased(changed):
        changed.bias.data = changed.bias.data.bfloat16()

    changes = [lambda c: c.load_state_dict(other.state_dict()), written, swapped, offloaded, scaled, autocast]
    changes += [half_biased] * (mode == "exact")
    changes += [lambda c: setattr(c, "weight_codes", other.weight_codes)]
    for change in changes:
        changed = copy.deepcopy(layer)
        changed.mode = mode
        changed(x)
        change(changed)
        assert torch.equal(changed(x), fresh(changed)), change
        twin = copy.deepcopy(changed)
        written(twin)
        assert torch.equal(twin(x), fresh(twin))
        assert torch.equal(changed(x), fresh(changed))


@CPU_ONLY
def test_step_sizes_of_a_small_layer_that_want_a_gradient_are_refused_without_one_too():
    layer, _ = packed_layer(50, 512, 0)
    x = tokens_of(2, 512, torch.float32)
    with torch.no_grad():
        layer(x)
        layer.weight_clip_val.requires_grad_(True)
        with pytest.raises(ValueError):
            layer(x)


@CPU_ONLY
def test_large_layers_stay_packed():
    layer, _ = packed_layer(1024, 1024, 0)
    for layer.mode in kernels.MODES:
        layer(tokens_of(2, 1024, torch.float32))
    assert layer.kept is None


@CPU_ONLY
def test_a_small_layer_works_in_inference_mode_and_out_of_it():
    with torch.inference_mode():
        made_inside, _ = packed_layer(50, 512, 0)
    made_outside, _ = packed_layer(50, 512, 0)
    x = tokens_of(40, 512, torch.float32)
    with torch.inference_mode():
        inside = [layer(x) for layer in (made_inside, made_outside)]
    wanting = x.clone().requires_grad_()
    made_outside(wanting).sum().backward()
    assert wanting.grad is not None
    assert torch.equal(inside[0], inside[1]) and torch.equal(made_outside(x), inside[1])


@pytest.mark.kernels
def test_tokens_and_codes_may_lie_anywhere_in_memory():
    """A word of codes or four of the tokens' numbers are read at once where they lie at whole words."""
    layer, codes = packed_layer(48, 512, 0, bias=False, dtype=torch.bfloat16)
    shifted = torch.zeros(layer.weight_codes.numel() + 1, dtype=torch.uint8, device=DEVICE)
    shifted[1:] = layer.weight_codes.flatten()
    everywhere = tokens_of(1, 514, torch.bfloat16)[0]
    weight = layer.dequantize(torch.bfloat16).double() if INTERPRETED else levels(layer, codes, torch.bfloat16)
    for x in (everywhere[:-2], everywhere[1:-1], everywhere[2:]):
        for packed in (layer.weight_codes, shifted[1:].view_as(layer.weight_codes)):
            found = kernels.exact_linear(x[None], packed, layer.weight_clip_val, None, 0)
            assert_close(found, x[None].double() @ weight.T, TOLERANCE[torch.bfloat16])


@DTYPES
@pytest.mark.parametrize("w_bits", BITS)
def test_fast_mode_rounds_nothing_but_the_tokens(w_bits, dtype):
    for layer, codes in packed_layers(w_bits, dtype):
        layer.mode = "fast"
        for count in TOKENS:
            x = tokens_of(count, layer.in_features, dtype)
            eight = kernels.token_dtype(x, layer.out_features, w_bits)
            weight, rounded = levels(layer, codes, dtype if eight is None else torch.float32), x.double()
            if eight is not None:
                q, scale = kernels.quantize_tokens(x, eight)
                rounded = q.double() * scale.double()
            expected = F.linear(rounded, weight, None if layer.bias is None else layer.bias.double())
            # fp8 products are given out in bf16, and summed in fewer bits than fp32
            assert_close(layer(x), expected, 2**-7 if eight == FP8 else TOLERANCE[dtype])


@pytest.mark.kernels
@pytest.mark.skipif(not (GPU or INTERPRETED), reason="needs Triton")
@pytest.mark.parametrize("w_bits", [0, 1, 2, 4])
def test_layers_unpacked_by_one_kernel(w_bits):
    """Integers, step sizes and biases of two to four layers, one below the other."""
    for rows in [(48, 5), (5, 48, 700), (7, 130, 16, 48)] + [(12288, 3072, 3072, 3072)] * GPU:
        for bias, layerwise in ((True, False), (False, True)):
            layers, codes = zip(*(packed_layer(n, 288, w_bits, bias, layerwise) for n in rows), strict=True)
            for dtype in (torch.int8, FP8):
                able = not (w_bits == 4 and dtype == FP8)
                assert kernels._can_unpack_together(layers, dtype) == able
                if not able:
                    continue
                weight, alpha, joined_bias = kernels._unpacked_together(layers, dtype, torch.bfloat16)
                assert weight.dtype == dtype
                s, n = GRID[w_bits]
                expected = (torch.cat(codes).double() + s) / n
                torch.testing.assert_close(weight.double() * kernels.grid_step(w_bits), expected)
                steps = [layer.weight_clip_val.expand(layer.out_features, 1) for layer in layers]
                assert torch.equal(alpha, torch.cat(steps))
                if bias:
                    expected = torch.cat([layer.bias for layer in layers])
                    torch.testing.assert_close(joined_bias, expected.bfloat16(), rtol=2**-7 * INTERPRETED, atol=0)
                else:
                    assert joined_bias is None


@pytest.mark.kernels
@DTYPES
@pytest.mark.parametrize("w_bits", BITS)
def test_layers_multiplied_together_are_those_multiplied_alone(w_bits, dtype):
    for rows, width in (((48, 16, 32, 64), 288), ((16, 48), 272), ((16,) * 5, 288)):
        for bias in (True, False):
            layers = [packed_layer(n, width, w_bits, bias, layerwise=not bias, dtype=dtype)[0] for n in rows]
            x = tokens_of(40, width, dtype)
            eight = kernels.token_dtype(x, 16, w_bits)
            found = kernels.fast_linear(x, eight, layers)
            for layer, y in zip(layers, found, strict=True):
                alone = kernels.fast_linear(x, eight, [layer])[0]
                if eight == FP8:  # summed in another order, and rounded to bf16
                    assert_close(y, alone.double(), 2**-7)
                else:
                    torch.testing.assert_close(y, alone)


@pytest.mark.kernels
def test_codes_that_cannot_be_unpacked_together():
    """Rows that do not end with a word, codes that lie between two words, more layers than the kernel takes."""
    layers = [packed_layer(16, 288, 0)[0] for _ in range(5)]
    for few in (layers[:1], layers, [packed_layer(16, 264, 0)[0] for _ in range(2)]):
        assert not kernels._can_unpack_together(few, torch.int8)
    assert kernels._can_unpack_together(layers[:4], torch.int8) == (GPU or INTERPRETED)
    shifted = torch.zeros(layers[0].weight_codes.numel() + 1, dtype=torch.uint8, device=DEVICE)
    layers[0].weight_codes = torch.nn.Parameter(shifted[1:].view_as(layers[0].weight_codes), requires_grad=False)
    assert not kernels._can_unpack_together(layers[:4], torch.int8)


@pytest.mark.kernels
def test_leading_dimensions_strides_and_no_tokens_at_all():
    layer, codes = packed_layer(32, 64, 0)
    for mode in kernels.MODES:
        layer.mode = mode
        for x in (torch.randn(2, 3, 64), torch.randn(64, 40).T, torch.randn(2, 80, 128)[:, :, ::2], torch.randn(64)):
            x = x.to(DEVICE)
            expected = F.linear(x.double(), levels(layer, codes, torch.float32), layer.bias.double())
            assert layer(x).shape == expected.shape
            assert_close(layer(x), expected, 2e-6 if mode == "exact" else 0.1)
        assert layer(torch.empty(2, 0, 64, device=DEVICE)).shape == (2, 0, 32)


@pytest.mark.parametrize("dtype", [torch.int8, FP8], ids=["int8", "e4m3"])
def test_tokens_are_rounded_to_eight_bits_of_their_own_maximum(dtype):
    x = torch.randn(64, 512) * torch.logspace(-6, 3, 64)[:, None]
    x[5] = 0
    q, scale = kernels.quantize_tokens(x, dtype)
    assert q.dtype == dtype and scale.shape == (64, 1) and scale.dtype == torch.float32
    top = 127 if dtype == torch.int8 else 448
    largest = q.float().abs().amax(1)
    assert (largest[torch.arange(64) != 5] == top).all() and largest[5] == 0
    error = (q.double() * scale.double() - x.double()).abs()
    # int8: half a step. e4m3: half an ulp of a 3-bit mantissa, or half the smallest subnormal 2^-9.
    bound = scale.double() / 2 if dtype == torch.int8 else (x.double().abs() / 16).clamp(min=scale.double() / 1024)
    assert (error <= bound * 1.0001).all()
    wide = torch.randn(64, 3072)
    q, scale = kernels.quantize_tokens(wide, dtype)
    error = (q.float() * scale - wide).square().mean().sqrt().item()
    uniform = (scale.square().mean() / 12).sqrt().item()  # of rounding to a grid
    assert error == pytest.approx(uniform if dtype == torch.int8 else 0.0265, rel=0.05)


@pytest.mark.parametrize("mode", kernels.MODES)
def test_gradients_reach_tokens_and_bias(mode):
    layer, codes = packed_layer(48, 64, 2)
    layer.mode = mode
    layer.bias.requires_grad_()
    x = tokens_of(40, 64, torch.float32).requires_grad_()
    weight, upstream = levels(layer, codes, torch.float32), tokens_of(40, 48, torch.float32)
    layer(x).backward(upstream)
    assert_close(x.grad, upstream.double() @ weight, 2e-6)
    assert_close(layer.bias.grad, upstream.double().sum(0), 2e-6)
    layer.bias.grad = None
    layer(x.detach()).backward(upstream)
    assert_close(layer.bias.grad, upstream.double().sum(0), 2e-6)


@pytest.mark.parametrize("wanting", range(3))
def test_the_bias_of_one_of_the_layers_with_one_input_may_want_a_gradient(wanting):
    layers = [packed_layer(48, 64, 0)[0] for _ in range(3)]
    for layer in layers:
        layer.mode = "fast"
    layers[wanting].bias.requires_grad_()
    x, upstream = tokens_of(40, 64, torch.float32), tokens_of(40, 48, torch.float32)
    sum((y * upstream).sum() for y in PackedLinear.together(layers, x)).backward()
    assert_close(layers[wanting].bias.grad, upstream.double().sum(0), 2e-6)


def test_the_ops_keep_the_rules_of_custom_ops():
    layer, _ = packed_layer(32, 64, 0)
    x = tokens_of(40, 64, torch.float32)
    codes, alpha, bias = layer.weight_codes, layer.weight_clip_val, layer.bias
    torch.library.opcheck(kernels.dequantize, (codes, alpha, 0, 64, torch.bfloat16))
    torch.library.opcheck(kernels.exact_op, (x.requires_grad_(), codes, alpha, bias, 0))
    torch.library.opcheck(kernels.exact_op, (x[:3].detach(), codes, alpha, None, 0))


# Models


@pytest.fixture(scope="module")
def small():
    """A packed ternary transformer that the 8-bit products take everywhere."""
    torch.manual_seed(0)
    return (
        FluxTransformer2DModel(
            in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=4,
            joint_attention_dim=32, pooled_projection_dim=32, guidance_embeds=True, axes_dims_rope=(4, 6, 6), w_bits=0,
        )
        .eval()
        .pack()
        .to(DEVICE)
    )  # fmt: skip


def block_inputs(seed, text=24, image=40, width=64):
    torch.manual_seed(seed)
    ids = torch.cartesian_prod(torch.zeros(1), torch.arange(8.0), torch.arange((text + image) // 8.0))
    rotary = FluxPosEmbed(10000, [4, 6, 6])(ids)
    return {
        "hidden_states": torch.randn(1, image, width).to(DEVICE),
        "encoder_hidden_states": torch.randn(1, text, width).to(DEVICE),
        "temb": torch.randn(1, width).to(DEVICE),
        "image_rotary_emb": tuple(part.to(DEVICE) for part in rotary),
    }


@pytest.mark.parametrize("mode", kernels.MODES)
@pytest.mark.parametrize("blocks", ["transformer_blocks", "single_transformer_blocks"])
def test_blocks_compile_whole_and_once(small, blocks, mode):
    model = copy.deepcopy(small).set_inference_mode(mode)
    block = getattr(model, blocks)[0]
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True), torch.no_grad():
        for seed in range(3):
            inputs = block_inputs(seed)
            for found, expected in zip(compiled(**inputs), block(**inputs), strict=True):
                if GPU and mode == "fast":  # GELU is compiled in another form, whose last digit can flip an e4m3
                    assert (found - expected).norm() < 1e-5 * expected.norm()
                else:
                    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", kernels.MODES)
def test_blocks_of_a_kind_share_their_compiled_code(small, joining, mode):
    """What is asked of hooks must not tie code to one block: 38 would be compiled one by one."""
    model = FluxTransformer2DModel(**{**small.config, "num_layers": 3, "num_single_layers": 4, "packed": 0})
    model.eval().pack().to(DEVICE)
    torch._dynamo.reset()
    model.set_inference_mode(mode).compile_repeated_blocks(fullgraph=True, dynamic=False, backend="eager")
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for seed in range(2):
        velocity(model, seed)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] - before == 2 + len(model.family.around)


@pytest.mark.parametrize("mode", kernels.MODES)
@pytest.mark.parametrize("w_bits", BITS)
def test_a_layer_is_compiled_down_to_its_steps(w_bits, mode):
    """So that the compiler can fuse them: as an op of its own, a layer of tiny-flux took twice as long on a CPU."""
    ops = []

    def backend(graph, inputs):
        ops.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    for in_features in (64, 61):
        layer, _ = packed_layer(48, in_features, w_bits)
        layer.mode, x = mode, tokens_of(40, in_features, torch.float32)
        torch._dynamo.reset()
        with torch.no_grad():
            found, expected = torch.compile(layer, fullgraph=True, backend=backend)(x), layer(x)
        assert (found - expected).norm() <= 1e-6 * expected.norm()
    assert ops and not any("flux158" in op for op in ops)


@pytest.fixture
def launched(monkeypatch):
    """The kernels that were to be launched. Their fractions are constants: a compiled graph would pass them as fp64."""
    pytest.importorskip("triton", reason="Triton is made for Linux only")
    found, floats = [], []

    def launch(kernel, _grid, *arguments, **_options):  # traced: names are looked up afterwards
        found.append(kernel)
        floats.append([isinstance(argument, float) for argument in arguments])

    monkeypatch.setattr(kernels, "_launch", launch)
    yield found
    for kernel, given in zip(found, floats, strict=True):
        for name, is_float in zip(kernel.arg_names, given, strict=True):
            assert name.isupper() or not is_float, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("blocks", ["transformer_blocks", "single_transformer_blocks"])
def test_what_leads_to_a_kernel_can_be_traced(small, blocks, dtype, launched, monkeypatch):
    """As on a GPU, where the kernels become part of the graph; here they are only counted."""
    monkeypatch.setattr(kernels, "in_triton", lambda codes, w_bits: True)
    block = copy.deepcopy(getattr(small, blocks)[0]).to(dtype)
    inputs = {name: part if name == "image_rotary_emb" else part.to(dtype) for name, part in block_inputs(0).items()}
    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(block, fullgraph=True, backend="eager")(**inputs)
    few = kernels._few_tokens_ternary if dtype == torch.bfloat16 else kernels._few_tokens
    packed = [name for name, layer in block.named_modules() if isinstance(layer, PackedLinear)]
    modulation = sum(name.endswith("linear") for name in packed)
    assert launched.count(few) == modulation
    assert launched.count(kernels._unpack) == len(packed) - modulation


@pytest.mark.parametrize(("blocks", "groups"), [("transformer_blocks", 2), ("single_transformer_blocks", 1)])
def test_fast_mode_launches_one_kernel_for_the_projections_of_one_input(small, blocks, groups, launched, monkeypatch):
    monkeypatch.setattr(kernels, "_triton_works_on", lambda tensor: True)
    block = getattr(copy.deepcopy(small).set_inference_mode("fast"), blocks)[0]
    packed = [name for name, layer in block.named_modules() if isinstance(layer, PackedLinear)]
    joined = sum(name.endswith(("_q", "_k", "_v", "_q_proj", "_k_proj", "_v_proj")) for name in packed)
    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(block, fullgraph=True, backend="eager")(**block_inputs(0))
    alone = len(packed) - joined - (sum(name.endswith("linear") for name in packed) if GPU else 0)
    assert launched.count(kernels._unpack_siblings) == groups
    assert launched.count(kernels._unpack_words) == alone
    assert launched.count(kernels._norm_rotate) == 1


@pytest.fixture
def joining(monkeypatch):
    """Fast mode's attention as on a GPU, where there is none: what its kernel does, in plain torch."""
    if GPU or INTERPRETED:
        return

    monkeypatch.setattr(attention, "can_rotate", lambda *_: not torch.is_grad_enabled())
    monkeypatch.setattr(attention, "norm_rotate", norm_rotate)


@pytest.mark.parametrize(("blocks", "inputs"), [("transformer_blocks", 8), ("single_transformer_blocks", 3)])
def test_projections_of_one_input_are_multiplied_as_one(small, blocks, inputs, joining, monkeypatch):
    if not GPU:  # where modulation is exact
        inputs += 2 if blocks == "transformer_blocks" else 1
    calls = []
    quantize = kernels.quantize_tokens
    monkeypatch.setattr(kernels, "quantize_tokens", lambda *args: calls.append(args) or quantize(*args))
    block = getattr(copy.deepcopy(small).set_inference_mode("fast"), blocks)[0]
    layers = [module for module in block.modules() if isinstance(module, PackedLinear)]
    with torch.no_grad():
        found = block(**block_inputs(0))
        assert len(calls) == inputs < len(layers)
        with torch.autocast(DEVICE.type, torch.bfloat16):
            calls.clear()
            block(**block_inputs(0))
            assert len(calls) == inputs

        calls.clear()
        torch._dynamo.reset()
        compiled = torch.compile(block, fullgraph=True, backend="eager")(**block_inputs(0))
        assert len(calls) == inputs  # traced
        block.attn.set_processor(FluxAttnProcessor())
        calls.clear()
        alone = block(**block_inputs(0))
        assert len(calls) == inputs + (4 if blocks == "transformer_blocks" else 2)
        for a, b, c in zip(found, compiled, alone, strict=True):
            torch.testing.assert_close(a, b)
            torch.testing.assert_close(a, c)


# Fast mode in the hands of libraries that hook layers


def velocity_inputs(seed=0):
    given = block_inputs(seed)
    return {
        "hidden_states": torch.randn(1, 40, 16).to(DEVICE),
        "encoder_hidden_states": torch.randn(1, 24, 32).to(DEVICE),
        "pooled_projections": given["temb"][:, :32],
        "timestep": torch.tensor([0.5], device=DEVICE),
        "guidance": torch.tensor([3.5], device=DEVICE),
        "img_ids": torch.cartesian_prod(torch.zeros(1), torch.arange(5.0), torch.arange(8.0)).to(DEVICE),
        "txt_ids": torch.zeros(24, 3, device=DEVICE),
    }


@torch.no_grad()
def velocity(model, seed=0):
    with model.cache_context("cond"):
        return model(**velocity_inputs(seed)).sample


@pytest.fixture
def fast(small, joining):
    return copy.deepcopy(small).set_inference_mode("fast")


def packed_in(model):
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, PackedLinear)}


def test_layers_are_cast_to_float8_and_back_by_diffusers(fast, small):
    rounded = copy.deepcopy(small)
    for name, module in rounded.named_modules():
        if isinstance(module, torch.nn.Linear) and not name.startswith("proj_out") and "norm" not in name:
            for parameter in module.parameters(recurse=False):
                if parameter.is_floating_point() and "clip_val" not in name and parameter.ndim:
                    skipped = parameter is getattr(module, "weight_clip_val", None)
                    parameter.data = parameter if skipped else parameter.to(FP8).to(parameter.dtype)
    expected = velocity(rounded.set_inference_mode("fast"))
    fast.enable_layerwise_casting(FP8, torch.float32, skip_modules_pattern=("norm", "^proj_out$"))
    assert {layer.bias.dtype for name, layer in packed_in(fast).items() if "norm" not in name} == {FP8}
    torch.testing.assert_close(velocity(fast), expected)


def test_leaves_are_offloaded_by_diffusers(fast, tmp_path):
    expected = velocity(fast)
    fast.enable_group_offload(DEVICE, torch.device("cpu"), "leaf_level", offload_to_disk_path=str(tmp_path))
    for _ in range(2):
        torch.testing.assert_close(velocity(fast), expected)


CACHES = {
    "pyramid attention broadcast": lambda timestep: PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2, spatial_attention_timestep_skip_range=(-1, 600),
        current_timestep_callback=timestep,
    ),
    "faster cache": lambda timestep: FasterCacheConfig(
        spatial_attention_block_skip_range=2, spatial_attention_timestep_skip_range=(-1, 600),
        current_timestep_callback=timestep, is_guidance_distilled=True,
    ),
    "taylorseer": lambda timestep: TaylorSeerCacheConfig(cache_interval=2, disable_cache_before_step=2),
}  # fmt: skip


@pytest.mark.parametrize("cache", CACHES)
def test_where_attention_is_skipped_nothing_is_held_and_nothing_computed_in_vain(fast, cache, monkeypatch):
    names = {layer: name for name, layer in packed_in(fast).items()}
    made, products, multiply = [], [], kernels.fast_linear

    def recorded(x, dtype, layers):
        found = multiply(x, dtype, layers)
        made.extend(names[layer] for layer in layers)
        # What the attention gives out is what these caches keep.
        products.extend(weakref.ref(part) for part in found if "_out" not in names[layers[0]])
        return found

    monkeypatch.setattr(kernels, "fast_linear", recorded)
    first = velocity(fast)
    projections = {name for name in made if ".attn." in name and "_out" not in name}
    assert len(projections) == 9
    now, skipped = [], 0
    fast.enable_cache(CACHES[cache](lambda: now[-1]))
    for seed, timestep in enumerate([900, 800, 500, 400, 300, 200]):
        now.append(timestep)
        made.clear()
        products.clear()
        found = velocity(fast, seed)
        if seed == 0:
            torch.testing.assert_close(found, first)
        assert not any(product() is not None for product in products)
        assert any("proj_mlp" in name for name in made)
        computed = projections.intersection(made)
        assert computed in (set(), projections)
        skipped += not computed
    assert 2 <= skipped <= 4
    fast.disable_cache()
    torch.testing.assert_close(velocity(fast), first)


def test_a_hook_on_one_projection_sees_its_call(fast):
    seen = []
    expected = velocity(fast)
    attn = fast.transformer_blocks[0].attn
    handles = [
        attn.to_k.register_forward_hook(lambda layer, given, product: seen.append(product)),
        attn.add_v_proj.register_forward_pre_hook(lambda layer, given: seen.append(given[0])),
        attn.norm_q.register_forward_hook(lambda norm, given, product: seen.append(product)),
    ]
    torch.testing.assert_close(velocity(fast), expected)
    assert len(seen) == 3
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(velocity(fast), expected)
    assert len(seen) == 3
    layer = fast.single_transformer_blocks[0].attn.to_q
    layer.forward = lambda x: torch.zeros(*x.shape[:-1], layer.out_features, device=x.device)  # as a library may
    assert not torch.allclose(velocity(fast), expected)
    del layer.forward
    torch.testing.assert_close(velocity(fast), expected)


def test_an_adapter_on_a_projection_takes_part(fast):
    peft = pytest.importorskip("peft")
    expected = velocity(fast)
    fast.add_adapter(peft.LoraConfig(r=4, target_modules=["to_q", "proj_mlp"], init_lora_weights=False))
    assert (velocity(fast) - expected).norm() > 1e-3 * expected.norm()
    fast.delete_adapters("default")
    torch.testing.assert_close(velocity(fast), expected)


def test_attention_is_the_fast_one_again_after_an_ip_adapter(fast):
    expected, width, cross = velocity(fast), 64, fast.config.joint_attention_dim
    image_proj = {"proj.weight": torch.randn(4 * cross, 8), "proj.bias": torch.zeros(4 * cross)}
    image_proj |= {"norm.weight": torch.ones(cross), "norm.bias": torch.zeros(cross)}
    adapter = {f"0.to_{kind}_ip.weight": torch.randn(width, cross) for kind in "kv"}
    adapter |= {f"0.to_{kind}_ip.bias": torch.zeros(width) for kind in "kv"}
    fast._load_ip_adapter_weights([{"image_proj": image_proj, "ip_adapter": adapter}])
    kinds = {type(block.attn.processor) for block in fast.transformer_blocks}
    assert kinds == {FluxIPAdapterAttnProcessor}
    with torch.no_grad():
        images = [torch.randn(1, 1, 8, device=DEVICE)]
        shown = fast(**velocity_inputs(), joint_attention_kwargs={"ip_adapter_image_embeds": images}).sample
    assert not torch.allclose(shown, expected)
    FluxPipeline.unload_ip_adapter(SimpleNamespace(transformer=fast))
    assert {type(processor) for processor in fast.attn_processors.values()} == {FusedFluxAttnProcessor}
    torch.testing.assert_close(velocity(fast), expected)
    fast.set_inference_mode("exact").set_attn_processor(FluxAttnProcessor())
    assert {type(processor) for processor in fast.attn_processors.values()} == {FluxAttnProcessor}


def test_hooks_on_gelu_stay_when_the_mode_changes(fast):
    called, gelu = [], fast.single_transformer_blocks[0].act_mlp

    class Counting(ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            called.append(module)
            return args, kwargs

    HookRegistry.check_if_exists_or_initialize(gelu).register_hook(Counting(), "counting")
    for count, mode in enumerate(("exact", "fast", "exact"), 1):
        velocity(fast.set_inference_mode(mode))
        assert len(called) == count
    HookRegistry.check_if_exists_or_initialize(gelu).remove_hook("counting")
    velocity(fast)
    assert len(called) == 3


def test_layers_that_differ_are_multiplied_each_by_its_own():
    x = tokens_of(40, 64, torch.float32)
    layers = [packed_layer(48, 64, 0)[0], packed_layer(16, 64, 2, bias=False)[0], packed_layer(48, 64, 4)[0]]
    for layer in layers:
        layer.mode = "fast"
    for found, layer in zip(PackedLinear.together(layers, x), layers, strict=True):
        torch.testing.assert_close(found, layer(x))


def test_gelu_is_the_same_function_compiled():
    x = torch.cat([torch.linspace(-40, 40, 20001), torch.tensor([0.0, 1e-30, -1e30, 1e30])]).to(DEVICE)
    torch._dynamo.reset()
    compiled = torch.compile(kernels.gelu, fullgraph=True, backend="aot_eager")
    expected = F.gelu(x.double(), approximate="tanh")
    torch.testing.assert_close(compiled(x).double(), expected, rtol=1e-5, atol=1e-6)
    slopes = []
    for function in (kernels.gelu, compiled):
        given = x[:-4].clone().requires_grad_()
        slopes += torch.autograd.grad(function(given).sum(), given)
    torch.testing.assert_close(*slopes)
    assert slopes[0].abs().max() < 1.2
    assert torch.equal(kernels.gelu(x), F.gelu(x, approximate="tanh"))
    assert compiled(x.bfloat16()).dtype == torch.bfloat16


def test_fast_mode_takes_another_gelu_and_exact_mode_gives_it_back_unless_blocks_are_compiled(small):
    model = copy.deepcopy(small)
    block, single = model.transformer_blocks[0], model.single_transformer_blocks[0]

    def found():
        places = [block.ff.net[0], block.ff_context.net[0], single.act_mlp]
        return [type(module) in (FastGELU, FastProjectedGELU) for module in places]

    assert not any(found())
    model.set_inference_mode("fast")
    assert all(found())
    model.set_inference_mode("exact")
    assert not any(found())
    model.compile_repeated_blocks(backend="eager")
    assert all(found())
    for mode in ("fast", "exact"):
        assert model.set_inference_mode(mode) and all(found())


def test_compiled_blocks_that_are_not_packed_stay_diffusers_own(small):
    settings = {name: value for name, value in small.config.items() if name[0] != "_"}
    for changes in ({"w_bits": 16, "packed": 0}, {"packed": 0}):
        model = FluxTransformer2DModel(**(settings | changes))
        model.compile_repeated_blocks(backend="eager")
        assert {type(processor) for processor in model.attn_processors.values()} == {FluxAttnProcessor}
        assert type(model.single_transformer_blocks[0].act_mlp) is torch.nn.GELU
        assert not any(module._compiled_call_impl for module in model.children())


def test_fast_mode_has_an_attention_processor_of_its_own_unless_there_is_another(small):
    model = copy.deepcopy(small)
    first, other = [block.attn for block in (*model.transformer_blocks, *model.single_transformer_blocks)][:2]

    class Another(FluxAttnProcessor):
        pass

    first.processor._attention_backend = "native"
    other.set_processor(Another())
    for mode, expected in (("fast", FusedFluxAttnProcessor), ("exact", FluxAttnProcessor)):
        model.set_inference_mode(mode)
        assert type(first.processor) is expected and type(other.processor) is Another
        assert first.processor._attention_backend == "native"
    assert vars(first.processor) == {"_attention_backend": "native"}
    model.compile_repeated_blocks(backend="eager")
    for mode in ("exact", "fast", "exact"):
        model.set_inference_mode(mode)
        assert type(first.processor) is FusedFluxAttnProcessor and type(other.processor) is Another
        assert vars(first.processor) == {"_attention_backend": "native", "mode": mode}


def test_exact_mode_has_queries_and_keys_from_one_kernel_where_it_is_compiled(small, joining, monkeypatch):
    rotated, rotate = [], attention.norm_rotate
    monkeypatch.setattr(attention, "norm_rotate", lambda *given: rotated.append(given) or rotate(*given))
    model = copy.deepcopy(small)
    expected = velocity(model)
    torch._dynamo.reset()
    model.compile_repeated_blocks(fullgraph=True, dynamic=False, backend="eager")
    with torch.compiler.set_stance("force_eager"):
        assert torch.equal(velocity(model), expected)
    assert not rotated
    torch.testing.assert_close(velocity(model), expected, rtol=1e-4, atol=1e-5)
    assert len(rotated) == 2  # blocks
    torch._dynamo.reset()


@pytest.mark.gpu
@pytest.mark.parametrize("mode", kernels.MODES)
def test_cuda_graphs_replay_both_modes(mode):
    for w_bits in (0, 2, 4, 8):
        layer, _ = packed_layer(256, 128, w_bits, dtype=torch.bfloat16)
        layer.mode = mode
        for count in (1, 64):
            x, other = (torch.randn(count, 128, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
            layer(x.clone())
            graph = torch.cuda.CUDAGraph()
            with torch.no_grad(), torch.cuda.graph(graph):
                found = layer(x.view_as(x))
            x.copy_(other)
            graph.replay()
            torch.testing.assert_close(found, layer(other.clone()))


def test_the_mode_of_a_model_is_that_of_its_packed_layers(small):
    model = copy.deepcopy(small)
    packed = [module for module in model.modules() if isinstance(module, PackedLinear)]
    assert packed and {layer.mode for layer in packed} == {"exact"}
    assert model.set_inference_mode("fast") is model
    assert {layer.mode for layer in packed} == {"fast"}
    assert {layer.mode for layer in small.modules() if isinstance(layer, PackedLinear)} == {"exact"}
    with pytest.raises(ValueError, match="inference mode 'quick': expected one of exact, fast"):
        model.set_inference_mode("quick")
    with pytest.raises(ValueError, match=r"holds weights, not codes; pack\(\) it first"):
        FluxTransformer2DModel(**{**small.config, "packed": 0}).set_inference_mode("fast")


def test_fast_mode_hardly_changes_the_velocity_of_tiny_flux():
    model = FluxTransformer2DModel.from_pretrained(ROOT / "assets/tiny-flux/transformer", w_bits=0).pack().to(DEVICE)
    torch.manual_seed(0)
    ids = torch.cartesian_prod(torch.zeros(1), torch.arange(8.0), torch.arange(8.0)).to(DEVICE)
    inputs = {
        "hidden_states": torch.randn(2, 64, model.config.in_channels, device=DEVICE),
        "encoder_hidden_states": torch.randn(2, 24, model.config.joint_attention_dim, device=DEVICE),
        "pooled_projections": torch.randn(2, model.config.pooled_projection_dim, device=DEVICE),
        "timestep": torch.tensor([0.9, 0.4], device=DEVICE),
        "guidance": torch.tensor([3.5, 3.5], device=DEVICE),
        "img_ids": ids,
        "txt_ids": torch.zeros(24, 3, device=DEVICE),
    }
    with torch.no_grad():
        exact = model(**inputs).sample.double()
        fast = model.set_inference_mode("fast")(**inputs).sample.double()
    nmse = ((fast - exact).square().sum() / exact.square().sum()).item()
    eight = kernels.token_dtype(inputs["hidden_states"], 256, 0)
    assert 0 < nmse < (1e-2 if eight == FP8 else 1e-3)


def norm_and_rotation(x, weight, cos, sin, eps):
    """x·w/√(mean x² + eps), then each (x[2i], x[2i + 1]) as a complex number times cos + i·sin; in float64."""
    x = x.double()
    x = x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double()
    turned = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    turn = torch.complex(cos[:, ::2].double(), sin[:, ::2].double())
    return torch.view_as_real(turned * turn[:, None]).flatten(-2)


def heads_between_others(batch, tokens, heads, width, dtype):
    """Heads [batch, tokens, heads, width] out of the middle of a wider matrix, as a product of several layers is."""
    wide = torch.randn(batch, tokens, heads * width + 3 * width, dtype=dtype).to(DEVICE)
    return wide[..., width : -2 * width].unflatten(-1, (heads, width))


@pytest.mark.kernels
@pytest.mark.skipif(not (GPU or INTERPRETED), reason="where there is no Triton, diffusers itself does it")
@DTYPES
@pytest.mark.parametrize("text_tokens", [0, 5])
@pytest.mark.parametrize(("heads", "width"), [(24, 128), (4, 64), (1, 16)])
def test_queries_and_keys_are_normalized_and_rotated_in_one_kernel(heads, width, text_tokens, dtype):
    torch.manual_seed(heads + text_tokens)
    cos, sin = FluxPosEmbed(10000, [width // 2, width // 2])(torch.randint(50, (text_tokens + 7, 2)).to(DEVICE))
    norms = [torch.nn.RMSNorm(width, eps=1e-6, dtype=dtype, device=DEVICE) for _ in range(4)]
    for norm in norms:
        norm.weight.data.normal_()
    queries, keys = ([heads_between_others(2, n, heads, width, dtype) for n in (text_tokens, 7)] for _ in range(2))
    with torch.no_grad():
        assert kernels.can_rotate(queries[1], width, norms[1])
        text = [(queries[0], norms[0]), (keys[0], norms[1])] if text_tokens else None
        found = kernels.norm_rotate(text, [(queries[1], norms[2]), (keys[1], norms[3])], (cos, sin), dtype)
        turned_around = keys[1].transpose(1, 2).contiguous().transpose(1, 2)  # the heads of a token far apart
        same = kernels.norm_rotate(text, [(queries[1], norms[2]), (turned_around, norms[3])], (cos, sin), dtype)
        eight = kernels.norm_rotate(text, [(queries[1], norms[2]), (keys[1], norms[3])], (cos, sin), kernels.FP8)
    for place, parts in enumerate((queries, keys)):
        assert found[place].dtype == dtype and found[place].is_contiguous()
        assert torch.equal(found[place], same[place])
        weights = [norm.weight.expand(part.shape[1], width) for norm, part in zip(norms[place::2], parts, strict=True)]
        expected = norm_and_rotation(torch.cat(parts, 1), torch.cat(weights)[:, None], cos, sin, 1e-6)
        assert_close(found[place], expected, TOLERANCE[dtype])
        assert eight[place].dtype == kernels.FP8
        if GPU:  # the interpreter loses the carry of such a rounding: 1.99 becomes 1
            # Four bits of significand, and 2^-9 between numbers below 2^-6.
            torch.testing.assert_close(eight[place].double(), expected, rtol=2**-4, atol=2**-10 + 1e-5)


@pytest.mark.kernels
def test_the_kernel_of_queries_and_keys_leaves_alone_what_it_cannot_do():
    x = torch.zeros(1, 3, 64, device=DEVICE)

    def taken(width, **settings):
        return kernels.can_rotate(x, width, torch.nn.RMSNorm(width, **({"eps": 1e-6, "device": DEVICE} | settings)))

    with torch.no_grad():
        assert taken(64) == (GPU or INTERPRETED)
        assert not taken(48)  # not a power of 2
        assert not taken(64, elementwise_affine=False)
        assert not taken(64, eps=None)  # it depends on the dtype then
        assert not taken(64, device="meta")  # offloaded
    assert not taken(64)  # a gradient may be wanted


HEADS = {"query_dim": 96, "out_dim": 96, "heads": 3, "dim_head": 32, "eps": 1e-6}
ATTENTION = {  # in double and in single blocks
    "FLUX.1 joint": (partial(FluxAttention, added_kv_proj_dim=96, bias=True, **HEADS), FusedFluxAttnProcessor),
    "FLUX.1 single": (partial(FluxAttention, pre_only=True, bias=True, **HEADS), FusedFluxAttnProcessor),
    "FLUX.2 joint": (partial(Flux2Attention, added_kv_proj_dim=96, **HEADS), FusedFlux2AttnProcessor),
    "FLUX.2 single": (partial(Flux2ParallelSelfAttention, mlp_ratio=2.0, **HEADS), FusedFlux2ParallelAttnProcessor),
}


@pytest.mark.kernels
@pytest.mark.skipif(not (GPU or INTERPRETED), reason="where there is no Triton, diffusers itself does it")
@pytest.mark.parametrize("kind", ATTENTION)
def test_attention_with_that_kernel_is_that_of_diffusers(kind, monkeypatch):
    torch.manual_seed(0)
    make, fused = ATTENTION[kind]
    attn, joint = make().to(DEVICE).requires_grad_(False), kind.endswith("joint")
    stock = type(attn.processor)
    for norm in (module for module in attn.modules() if isinstance(module, torch.nn.RMSNorm)):
        norm.weight.normal_()
    image, text = (torch.randn(2, count, 96, device=DEVICE) for count in (7, 5))
    given = {"encoder_hidden_states": text} if joint else {}
    tokens = 12 if joint else 7
    given["image_rotary_emb"] = FluxPosEmbed(10000, [16, 16])(torch.randint(50, (tokens, 2)).to(DEVICE))
    expected = attn(image, **given)
    attn.set_processor(fused())
    with torch.no_grad():
        found = attn(image, **given)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        with monkeypatch.context() as patch:
            patch.setattr(torch.nn.RMSNorm, "forward", lambda *_: pytest.fail("diffusers' own was called"))
            attn(image, **given)
        attn.norm_k.eps = 1.0  # the kernel knows one eps
        found = attn(image, **given)
        attn.set_processor(stock())
        torch.testing.assert_close(found, attn(image, **given))


@pytest.mark.kernels
@pytest.mark.skipif(not (GPU or INTERPRETED), reason="where there is no Triton, diffusers itself does it")
@torch.no_grad()
def test_what_that_kernel_rounds_once_is_nearer_than_what_diffusers_rounds_twice():
    torch.manual_seed(0)
    dtype = torch.bfloat16 if GPU else torch.float16  # the interpreter cuts off what does not fit bf16
    heads = torch.randn(2, 30, 3, 32, device=DEVICE, dtype=dtype)
    norm = torch.nn.RMSNorm(32, eps=1e-6, device=DEVICE, dtype=dtype)
    norm.weight.normal_()
    cos, sin = FluxPosEmbed(10000, [16, 16])(torch.randint(50, (30, 2)).to(DEVICE))
    found = kernels.norm_rotate(None, [(heads, norm)] * 2, (cos, sin), dtype)[0]
    stock = apply_rotary_emb(norm(heads), (cos, sin), sequence_dim=1)
    expected = norm_and_rotation(heads, norm.weight, cos, sin, 1e-6)
    ours, theirs = ((part.double() - expected).norm() / expected.norm() for part in (found, stock))
    assert 0 < ours < 0.9 * theirs


# Triton


@pytest.mark.skipif(GPU or INTERPRETED, reason="the tests above ran the kernels")
def test_every_kernel_in_the_interpreter_of_triton():
    pytest.importorskip("triton", reason="Triton is made for Linux only")
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-m", "kernels", "-p", "no:cacheprovider", __file__],
        cwd=ROOT, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-4000:]


CODES = {"codes": "*u8", "alpha": "*fp32", "columns": "i32", "alpha_stride": "i32"}
LEVELS = {"in_features": "i32"}
FRACTIONS = {"SHIFT": 0.5, "FACTOR": 2 / 3}
WORDS = {"out": "*fp8e4nv", "count": "i32"}
FOUR = {f"{name}_{place}": kind for name, kind in (("codes", "*u8"), ("alpha", "*fp32")) for place in (1, 2, 3)}
FOUR |= dict.fromkeys(("rows", "rows_1", "rows_2", "rows_3"), "i32") | {"all_alpha": "*fp32"}
BIASES = ("bias", "bias_1", "bias_2", "bias_3", "all_bias")
UNBIASED = FOUR | dict.fromkeys(BIASES, "*fp32")  # step sizes in their place
FOUR |= dict.fromkeys(BIASES, "*bf16")
ROTATION = {f"{part}query{kind}": "*bf16" for part in ("text_", "") for kind in ("", "_weight")}
ROTATION |= {f"{part}key{kind}": "*bf16" for part in ("text_", "") for kind in ("", "_weight")}
ROTATION |= {"cos": "*fp32", "sin": "*fp32", "heads": "i32"}
ROTATION |= dict.fromkeys(("text_tokens", "text_batch", "text_row", "image_batch", "image_row"), "i32")
OUTPUT = {"scale": "*fp32", "bias": "*bf16", "out": "*bf16", "tokens": "i32", "rows": "i32"}
ALL = FRACTIONS | {"BLOCK": 1024}
ROTATED = {"HEADS": 32, "WIDTH": 128, "EPS": 1e-6}
TILE = FRACTIONS | {"BIASED": True, "ROWS": 16, "COLUMNS": 64}
TERNARY = TILE | {"COLUMNS": 768, "WORDS": 64, "WIDTH": 1024, "ALPHA_STRIDE": 1}


@pytest.mark.skipif(GPU or INTERPRETED, reason="the tests above ran the kernels")
@pytest.mark.parametrize(
    ("kernel", "types", "constants"),
    [
        ("_unpack", LEVELS | {"out": "*bf16", "count": "i32"}, ALL | {"WIDTH": 2, "SCALED": True}),
        ("_unpack", LEVELS | {"out": "*fp8e4nv", "count": "i32"}, ALL | {"WIDTH": 4, "SCALED": False}),
        ("_unpack_words", WORDS, {"BITS": 0, "IS_FP8": True, "BLOCK": 1024}),
        ("_unpack_words", WORDS, {"BITS": 2, "IS_FP8": False, "BLOCK": 1024}),
        ("_unpack_siblings", WORDS | FOUR, {"BITS": 0, "IS_FP8": True, "BIASED": True, "BLOCK": 1024}),
        ("_unpack_siblings", WORDS | UNBIASED, {"BITS": 0, "IS_FP8": True, "BIASED": False, "BLOCK": 1024}),
        ("_few_tokens", LEVELS | OUTPUT | {"x": "*bf16"}, TILE | {"WIDTH": 4}),
        ("_few_tokens_ternary", LEVELS | OUTPUT | {"x": "*bf16"}, TERNARY),
        ("_few_tokens_ternary", LEVELS | OUTPUT | {"x": "*bf16"}, TERNARY | {"BIASED": False}),
        ("_few_tokens_ternary", LEVELS | OUTPUT | {"x": "*fp16", "out": "*fp16"}, TERNARY),
        ("_norm_rotate", OUTPUT | ROTATION, ROTATED),
        ("_norm_rotate", OUTPUT | ROTATION | {"out": "*fp8e4nv"}, ROTATED),
    ],
)
def test_the_kernels_compile_for_a_gpu_that_is_not_there(kernel, types, constants):
    """The interpreter accepts what the compiler does not."""
    triton = pytest.importorskip("triton", reason="Triton is made for Linux only")
    function, types = getattr(kernels, kernel), CODES | types
    source = triton.compiler.ASTSource(
        function,
        {name: "constexpr" if name in constants else types[name] for name in function.arg_names},
        {(number,): constants[name] for number, name in enumerate(function.arg_names) if name in constants},
    )
    target = triton.backends.compiler.GPUTarget("cuda", 90, 32)
    assert "ptx" in triton.compile(source, target=target, options={"num_warps": 4}).asm


def test_without_triton_there_is_plain_torch(run):
    script = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch\n"
        "from models import kernels\n"
        "from models.packing import PackedLinear\n"
        "layer = PackedLinear.from_codes(torch.ones(8, 16, dtype=torch.int8), torch.full((8, 1), 1.5), None, 0)\n"
        "assert not kernels.in_triton(layer.weight_codes, 0)\n"
        "for layer.mode in kernels.MODES:\n"
        "    for count in (1, 40):\n"
        "        print(layer(torch.ones(count, 16)).unique().tolist())\n"
    )
    result = run("-c", script)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["[16.0]"] * 4
