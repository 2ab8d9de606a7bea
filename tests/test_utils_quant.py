"""Quantizers against plain formulas, finite differences and brute force, all in float64; then the layers."""

import copy
import inspect
import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from models.utils_quant import (
    ComputedWeight,
    LoRAQuantizeLinear,
    LsqBinaryTernaryExtension,
    QuantizeLinear,
    StretchedElasticQuant,
    init_clip_val,
    quantize,
)

BITS = [0, 1, 2, 3, 4, 5, 6, 7, 8]
LAYERWISE = pytest.mark.parametrize("layerwise", [False, True], ids=["rows", "matrix"])


def reference(w, alpha, bits, rounded=np.round):
    """The published formulas as printed in the paper; `rounded` stands for round()."""
    if bits == 1:
        return alpha * np.where(w >= 0, 1.0, -1.0)
    if bits in (0, 2):
        n, s = {0: (1.5, 0.0), 2: (2.0, 0.5)}[bits]
        return alpha * (rounded(np.clip(w / alpha, -0.99, 0.99) * n - s) + s) / n
    return alpha * rounded(np.clip(w / alpha, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1))


def example(bits, layerwise, seed=0):
    """float64 weight [6, 40] and step sizes that clip some weights and leave others, none of them near an edge."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(6, 40, generator=generator, dtype=torch.float64)
    spread = 0.5 + torch.rand((1,) if layerwise else (6, 1), generator=generator, dtype=torch.float64)
    return weight, spread * (1.2 if bits <= 2 else 3.0 / 2 ** (bits - 1))


def relative_error(weight, alpha, bits, layerwise=False):
    """Σ(w − q)²/Σw² by row."""
    error = weight - quantize(weight, alpha, bits, layerwise)
    return (error.square().sum(1) / weight.square().sum(1)).mean().item()


# Quantizers


@LAYERWISE
@pytest.mark.parametrize("bits", BITS)
def test_forward_is_the_published_formula(bits, layerwise):
    weight, alpha = example(bits, layerwise)
    expected = torch.from_numpy(reference(weight.numpy(), alpha.numpy(), bits))
    torch.testing.assert_close(quantize(weight, alpha, bits, layerwise), expected, rtol=1e-14, atol=0)
    torch.testing.assert_close(quantize(weight.float(), alpha.float(), bits, layerwise), expected.float())


def test_levels_per_bit_width():
    weight = torch.linspace(-40, 40, 100001).double()[None]
    levels = {b: quantize(weight, torch.ones(1, 1).double(), b).unique().tolist() for b in BITS}
    assert levels[0] == [-2 / 3, 0, 2 / 3]
    assert levels[1] == [-1, 1]
    assert levels[2] == [-0.75, -0.25, 0.25, 0.75]
    assert levels[3] == list(range(-4, 4))
    assert levels[6] == list(range(-32, 32))


def test_dispatch_is_paretoqs():
    weight, alpha = example(0, False)
    for bits in BITS:
        quantizer = StretchedElasticQuant if bits in (0, 2) else LsqBinaryTernaryExtension
        assert torch.equal(quantize(weight, alpha, bits), quantizer.apply(weight, alpha, bits, False))


def test_one_bit_has_no_zero():
    assert quantize(torch.tensor([[0.0, -0.0, -1.0]]), torch.ones(1, 1), 1).tolist() == [[1, 1, -1]]


@pytest.mark.parametrize("bits", BITS)
def test_half_precision_weights_are_compared_in_fp32(bits):
    weight, alpha = example(bits, False)
    weight, alpha = weight.bfloat16(), alpha.float()
    result = quantize(weight, alpha, bits)
    assert result.dtype == torch.bfloat16
    assert torch.equal(result, quantize(weight.float(), alpha, bits).bfloat16())


def held_rounding(weight, alpha, bits):
    """The quantizer around (weight, alpha) with the offset round(x) − x held: straight-through gradients are its."""
    if bits == 1:  # no round(): the weight passes inside ±α, and α sees the sign as it is
        signs = np.where(weight >= 0, 1.0, -1.0)
        return lambda w, a: np.clip(w, -alpha, alpha) + signs * a
    offsets = {}
    reference(weight, alpha, bits, rounded=lambda x: offsets.setdefault("at", np.round(x) - x))
    return lambda w, a: reference(w, a, bits, rounded=lambda x: x + offsets["at"])


@LAYERWISE
@pytest.mark.parametrize("bits", BITS)
def test_gradients_are_those_of_finite_differences(bits, layerwise):
    weight, alpha = example(bits, layerwise)
    upstream = torch.randn(weight.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    w, a = weight.clone().requires_grad_(), alpha.clone().requires_grad_()
    quantize(w, a, bits, layerwise).backward(upstream)
    assert w.grad.shape == weight.shape
    assert a.grad.shape == alpha.shape

    eps = 1e-6
    w0, a0 = weight.numpy(), alpha.numpy()
    held = held_rounding(w0, a0, bits)
    by_weight = (held(w0 + eps, a0) - held(w0 - eps, a0)) / (2 * eps) * upstream.numpy()
    by_alpha = (held(w0, a0 + eps) - held(w0, a0 - eps)) / (2 * eps) * upstream.numpy()
    by_alpha = by_alpha.sum(keepdims=True).reshape(a0.shape) if layerwise else by_alpha.sum(1, keepdims=True)
    integer_qp = max(2 ** (bits - 1) - 1, 1)
    np.testing.assert_allclose(w.grad.numpy(), by_weight, atol=1e-7)
    np.testing.assert_allclose(a.grad.numpy(), by_alpha / math.sqrt(weight.numel() * integer_qp), atol=1e-7)
    assert bits == 8 or 0 < (w.grad == 0).sum() < w.numel()  # clipped and unclipped weights were both there


@pytest.mark.parametrize(("bits", "level"), [(0, 2 / 3), (2, 3 / 4)])
def test_a_clipped_weight_moves_alpha_by_its_level(bits, level):
    alpha = torch.ones(2, 1, dtype=torch.float64, requires_grad=True)
    quantize(torch.tensor([[5.0], [-5.0]]).double(), alpha, bits).sum().backward()
    np.testing.assert_allclose(alpha.grad.numpy() * math.sqrt(2), [[level], [-level]])


def test_gradients_have_the_dtypes_and_shapes_of_their_inputs():
    weight = torch.randn(4, 8).bfloat16().requires_grad_()
    for shape in ([1], [1, 1], []):
        alpha = torch.full(shape, 0.7, requires_grad=True)
        quantize(weight, alpha, 0, True).sum().backward()
        assert alpha.grad.shape == alpha.shape
        assert (weight.grad.dtype, alpha.grad.dtype) == (torch.bfloat16, torch.float32)


@pytest.mark.parametrize("bits", BITS)
def test_backward_keeps_weight_and_alpha_only(bits):
    weight, alpha = (t.float().requires_grad_() for t in example(bits, False))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        quantize(weight, alpha, bits)
    assert kept == [weight.data_ptr(), alpha.data_ptr()]


def test_alpha_below_the_floor_can_come_back():
    weight = torch.tensor([[0.5, -0.5]])
    alpha = torch.tensor([[-1.0]], requires_grad=True)
    result = quantize(weight, alpha, 0)
    assert torch.allclose(result, torch.tensor([[1.0, -1.0]]) * 1e-5 * 2 / 3)
    (result - weight).square().sum().backward()
    assert alpha.grad < 0  # gradient descent raises it


@pytest.mark.parametrize("bits", [16, 32])
def test_sixteen_bits_is_the_identity(bits):
    weight, alpha = example(0, False)
    assert quantize(weight, None, bits) is weight
    for quantizer in (LsqBinaryTernaryExtension, StretchedElasticQuant):
        w = weight.clone().requires_grad_()
        out = quantizer.apply(w, alpha, bits, False)
        out.backward(weight)
        assert torch.equal(out, w)
        assert torch.equal(w.grad, weight)


@pytest.mark.parametrize("bits", [-1, 9, 15, 1.58, "2", None])
def test_unsupported_bits(bits):
    weight, alpha = example(0, False)
    for attempt in (
        lambda: quantize(weight, alpha, bits),
        lambda: init_clip_val(weight, bits),
        lambda: QuantizeLinear(4, 4, w_bits=bits),
    ):
        with pytest.raises(ValueError, match="is not supported: use 0 .* 1 to 8, or 16"):
            attempt()


@pytest.mark.parametrize(("shape", "layerwise"), [((4, 1), False), ((6,), False), ((1, 40), False), ((6, 1), True)])
def test_step_sizes_of_another_shape(shape, layerwise):
    with pytest.raises(ValueError, match="expected"):
        quantize(torch.ones(6, 40), torch.ones(shape), 0, layerwise)


# Step-size initialisation


def rows_of(kind):
    generator = torch.Generator().manual_seed(3)
    normal = torch.randn(8, 96, generator=generator, dtype=torch.float64)
    if kind == "student-t":
        return normal / torch.randn(8, 96, 3, generator=generator, dtype=torch.float64).square().mean(-1).sqrt()
    if kind == "outlier":
        normal[:, 7] = torch.tensor([20, -20, 100, -100, 1e4, -1e4, 1e10, -1e10])
    if kind == "two levels":
        return torch.where(normal > 0.3, 1.0, -0.13).double()
    return {"short": normal[:, :5], "one": normal[:, :1], "tiny": 0.01 * normal}.get(kind, normal)


KINDS = ["gaussian", "student-t", "outlier", "two levels", "short", "one", "tiny"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", BITS)
def test_mse_start_is_within_half_a_percent_of_brute_force(bits, kind):
    for row in rows_of(kind).numpy():
        # From an α at which every weight clips to one at which every weight rounds to the innermost level.
        peak, mean = np.abs(row).max(), np.abs(row).mean()
        alphas = np.geomspace(max(mean / 2 ** max(bits, 1), 1e-5), 4.5 * peak, 40000 if bits < 5 else 20000)[:, None]
        best = min(
            np.square(row - reference(row, part, bits)).sum(1).min() for part in np.array_split(alphas, 40, axis=0)
        )
        alpha = init_clip_val(torch.from_numpy(row)[None], bits).numpy()
        found = np.square(row - reference(row, alpha, bits)).sum()
        assert found <= 1.005 * best + 1e-12 * np.square(row).sum()


def test_mse_start_at_zero_and_two_bits_is_exact():
    """Every pair of levels that the sorting could choose, tried one by one."""
    row = rows_of("student-t")[0]
    for bits, inner, outer in ((0, 0, 2 / 3), (2, 1 / 4, 3 / 4)):
        errors = []
        for k in range(1, len(row) + 1):
            levels = torch.full_like(row, inner)
            levels[row.abs().topk(k).indices] = outer
            alpha = (row.abs() * levels).sum() / levels.square().sum()
            errors.append((row.abs() - alpha * levels).square().sum().item())
        found = relative_error(row[None], init_clip_val(row[None], bits), bits) * row.square().sum().item()
        assert found == pytest.approx(min(errors), rel=1e-9)


# STUDY.md 8's table: error of the "mse" and of the "max" start.
@pytest.mark.parametrize(
    ("bits", "mse", "peak"),
    [(0, 0.190, 0.492), (1, 0.363, 0.363), (2, 0.119, 0.298), (3, 0.041, 0.132), (4, 0.012, 0.024), (8, 7e-5, 7e-5)],
)
def test_figures_on_gaussian_rows(bits, mse, peak):
    weight = torch.randn(256, 3072, generator=torch.Generator().manual_seed(0))
    assert relative_error(weight, init_clip_val(weight, bits), bits) == pytest.approx(mse, rel=0.02)
    assert relative_error(weight, init_clip_val(weight, bits, "max"), bits) == pytest.approx(peak, rel=0.05)
    if bits == 0:
        assert relative_error(weight, init_clip_val(weight, bits), bits) <= 0.192


@pytest.mark.parametrize("bits", BITS)
def test_max_start_is_paretoqs(bits):
    weight = rows_of("gaussian")
    peak = weight.abs().amax(1, keepdim=True)
    expected = {0: peak, 1: weight.abs().mean(1, keepdim=True), 2: peak}.get(bits, peak / max(2 ** (bits - 1) - 1, 1))
    torch.testing.assert_close(init_clip_val(weight, bits, "max"), expected)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("method", ["mse", "max"])
def test_layerwise_start_is_that_of_one_long_row(bits, method):
    weight = rows_of("gaussian").float()
    alpha = init_clip_val(weight, bits, method, layerwise=True)
    assert alpha.shape == (1, 1)
    assert torch.equal(alpha, init_clip_val(weight.reshape(1, -1), bits, method))


@pytest.mark.parametrize("bits", BITS)
def test_start_does_not_depend_on_the_chunks(bits, monkeypatch):
    weight = rows_of("gaussian").bfloat16()
    whole = init_clip_val(weight, bits)
    monkeypatch.setattr("models.utils_quant._CHUNK", 100)
    assert whole.dtype == torch.float32
    # The scan's spacing is set by the widest row of a chunk, so the last digits may differ, the error hardly.
    torch.testing.assert_close(init_clip_val(weight, bits), whole, rtol=0.02, atol=0)


@LAYERWISE
@pytest.mark.parametrize("method", ["mse", "max"])
@pytest.mark.parametrize("bits", BITS)
def test_degenerate_weights_stay_finite(bits, method, layerwise):
    outlier = torch.randn(3, 10)
    outlier[1, 4] = 3e30
    for weight in (torch.zeros(3, 10), torch.tensor([[0.3], [0.0], [-1e-30]]), outlier, torch.full((2, 4), 1e-42)):
        alpha = init_clip_val(weight, bits, method, layerwise).requires_grad_()
        weight.requires_grad_()
        result = quantize(weight, alpha, bits, layerwise)
        result.sum().backward()
        assert (alpha >= 1e-5 * 0.999).all()
        for tensor in (alpha, result, weight.grad, alpha.grad):
            assert tensor.isfinite().all()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nan_and_inf_are_named(value):
    linear = nn.Linear(4, 3)
    linear.weight.data[1, 2] = value
    for bits in BITS:
        with pytest.raises(ValueError, match="^blocks.0.to_q: the weight holds NaN or inf"):
            QuantizeLinear.from_linear(linear, "blocks.0.to_q", w_bits=bits)
        with pytest.raises(ValueError, match="NaN or inf"):
            init_clip_val(linear.weight, bits, "max")


def test_unknown_clip_init():
    for attempt in (lambda: init_clip_val(torch.ones(2, 2), 0, "mean"), lambda: QuantizeLinear(2, 2, clip_init="mean")):
        with pytest.raises(ValueError, match="clip_init='mean' is not supported: use one of mse, max"):
            attempt()


# Layers


def make(layer_class=QuantizeLinear, **settings):
    torch.manual_seed(0)
    layer = layer_class(24, 16, **settings)
    if getattr(layer, "lora_r", 0):
        layer.lora_B.data.normal_()
    return layer


def test_constructor_has_nn_linears_arguments_and_defaults():
    ours = list(inspect.signature(QuantizeLinear).parameters.values())
    theirs = list(inspect.signature(nn.Linear).parameters.values())
    assert [(p.name, p.default) for p in ours[: len(theirs)]] == [(p.name, p.default) for p in theirs]


@pytest.mark.parametrize("layer_class", [QuantizeLinear, LoRAQuantizeLinear])
@pytest.mark.parametrize("bias", [True, False])
def test_full_precision_is_nn_linear(layer_class, bias):
    layer = layer_class(24, 16, bias, **({"lora_r": 0} if layer_class is LoRAQuantizeLinear else {}))
    linear = nn.Linear(24, 16, bias)
    assert layer.state_dict().keys() == linear.state_dict().keys()
    linear.load_state_dict(layer.state_dict())
    x = torch.randn(5, 7, 24)
    assert torch.equal(layer(x), linear(x))
    assert torch.equal(layer.bfloat16()(x.bfloat16()), linear.bfloat16()(x.bfloat16()))


@LAYERWISE
@pytest.mark.parametrize("bits", BITS)
def test_forward_multiplies_with_the_quantized_weight(bits, layerwise):
    layer = make(w_bits=bits, weight_layerwise=layerwise)
    assert layer.weight_clip_val.shape == ((1, 1) if layerwise else (16, 1))
    x = torch.randn(5, 24)
    weight = reference(*(p.detach().double().numpy() for p in (layer.weight, layer.weight_clip_val)), bits)
    torch.testing.assert_close(layer(x), F.linear(x, torch.from_numpy(weight).float(), layer.bias))


@pytest.mark.parametrize("layer_class", [QuantizeLinear, LoRAQuantizeLinear])
def test_computes_in_the_inputs_or_the_autocast_dtype(layer_class):
    layer, x = make(layer_class, w_bits=0), torch.randn(5, 24)
    weight, bias = layer.quantized_weight().bfloat16(), layer.bias.bfloat16()
    expected = F.linear(x.bfloat16(), weight, bias)
    assert torch.equal(layer(x.bfloat16()), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x), expected)
        assert torch.equal(layer.quantized_weight().bfloat16(), weight)  # the codes do not depend on autocast


def test_from_linear_shares_the_parameters():
    linear = nn.Linear(24, 16).eval()
    layer = LoRAQuantizeLinear.from_linear(linear, w_bits=0, lora_r=3)
    assert layer.weight is linear.weight
    assert layer.bias is linear.bias
    assert not layer.training
    assert torch.equal(layer.weight_clip_val, init_clip_val(linear.weight, 0))
    assert (layer.lora_A.shape, layer.lora_B.shape) == ((16, 3), (3, 24))
    on_meta = LoRAQuantizeLinear.from_linear(nn.Linear(24, 16, device="meta"), w_bits=0, lora_r=3)
    assert all(p.is_meta for p in on_meta.parameters())
    assert {n: p.shape for n, p in on_meta.named_parameters()} == {n: p.shape for n, p in layer.named_parameters()}


@pytest.mark.parametrize("bits", [0, 16])
def test_lora_is_added_inside_the_quantizer(bits):
    layer = make(LoRAQuantizeLinear, w_bits=bits, lora_r=4, lora_alpha=2.0)
    merged = layer.weight + 0.5 * layer.lora_A @ layer.lora_B
    expected = quantize(merged, layer.weight_clip_val, bits)
    torch.testing.assert_close(layer.quantized_weight(), expected)
    assert not torch.equal(expected, quantize(layer.weight, layer.weight_clip_val, bits))


def test_lora_starts_as_nothing():
    layer = LoRAQuantizeLinear(24, 2000, w_bits=0)
    assert torch.equal(layer.effective_weight(), layer.weight)
    assert layer.lora_A.std().item() == pytest.approx(0.01, rel=0.05)
    assert layer.scaling == 1 / 32


def reloaded_on_meta(layer):
    with torch.device("meta"):
        copy_of = LoRAQuantizeLinear(24, 16, w_bits=0, lora_r=4, lora_alpha=2.0)
    copy_of.load_state_dict(layer.state_dict(), assign=True)
    return copy_of


@pytest.mark.parametrize("copied", [lambda m: m, copy.deepcopy, reloaded_on_meta], ids=["itself", "deepcopy", "meta"])
def test_lora_gradients_are_those_of_its_product(copied):
    x, layer = torch.randn(5, 24), make(LoRAQuantizeLinear, w_bits=0, lora_r=4, lora_alpha=2.0)
    layer = copied(layer)
    layer(x).square().sum().backward()
    of_product = layer.weight.grad  # the weight and the update are added
    torch.testing.assert_close(layer.lora_A.grad, 0.5 * of_product @ layer.lora_B.T)
    torch.testing.assert_close(layer.lora_B.grad, 0.5 * layer.lora_A.T @ of_product)
    assert layer.lora_A.grad.any() and layer.lora_B.grad.any()


@pytest.mark.parametrize("rank", [-1, 2.5])
def test_bad_rank(rank):
    with pytest.raises(ValueError, match="is not supported: use 0 .no LoRA. or a positive rank"):
        LoRAQuantizeLinear(4, 4, lora_r=rank)


def test_casting_keeps_step_sizes_and_lora_in_fp32():
    layer = make(LoRAQuantizeLinear, w_bits=0, lora_r=4)
    layer(torch.randn(5, 24)).sum().backward()
    before = {n: p.detach().clone() for n, p in layer.named_parameters()}
    for cast in (lambda: layer.to(torch.bfloat16), layer.half, layer.double):
        cast()
        for name in ("weight_clip_val", "lora_A", "lora_B"):
            parameter = getattr(layer, name)
            assert parameter.dtype == parameter.grad.dtype == torch.float32
            assert torch.equal(parameter, before[name])
    assert layer.weight.dtype == torch.float64
    assert layer.to("meta").weight_clip_val.is_meta


@pytest.mark.parametrize("bits", [0, 1, 4])
@pytest.mark.parametrize("layer_class", [QuantizeLinear, LoRAQuantizeLinear])
def test_compiles_without_graph_breaks(layer_class, bits):
    layer, x = make(layer_class, w_bits=bits), torch.randn(5, 24)
    layer(x).square().sum().backward()
    expected = {n: p.grad.clone() for n, p in layer.named_parameters()}
    layer.zero_grad()
    torch.compile(layer, fullgraph=True, backend="aot_eager")(x).square().sum().backward()
    for name, parameter in layer.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name])


def test_works_under_activation_checkpointing():
    layer, x = make(LoRAQuantizeLinear, w_bits=0), torch.randn(5, 24, requires_grad=True)
    layer(x).square().sum().backward()
    expected = [p.grad.clone() for p in layer.parameters()]
    layer.zero_grad()
    torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False).square().sum().backward()
    assert all(torch.equal(p.grad, e) for p, e in zip(layer.parameters(), expected, strict=True))


def test_peft_can_put_a_lora_on_top():
    peft = pytest.importorskip("peft")
    base = nn.Sequential(make(w_bits=0))
    x = torch.randn(5, 24)
    expected = base(x)
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["0"]))
    assert torch.equal(model(x), expected)
    model(x).sum().backward()
    trained = [name for name, p in model.named_parameters() if p.grad is not None]
    assert trained
    assert all("lora_" in name for name in trained)


# What is multiplied with, in the hands of others


class Holder(nn.Module):
    """Holds a layer as PEFT's do."""

    def __init__(self, layer):
        super().__init__()
        self.base_layer = layer


def held(**settings):
    layer = make(w_bits=0, **settings)
    Holder(layer)
    return layer


READS = {
    "all": lambda w: w.clone(),
    "row": lambda w: w[3],
    "rows": lambda w: w[2:5],
    "columns transposed": lambda w: w[:, 4:9].t(),
    "split": lambda w: w.split(5)[2],
    "chunk of a view": lambda w: w.view(-1).chunk(4)[1],
    "iterated": lambda w: torch.stack([row * 2 for row in w]),
    "as data": lambda w: w.data + 1,
    "detached": lambda w: w.detach().reshape(8, -1),
    "in float64": lambda w: w.double(),
    "norms": lambda w: torch.linalg.norm(w, dim=1),
    "svd": lambda w: torch.linalg.svd(w.data)[1],
    "copied": copy.deepcopy,
    "equal": lambda w: torch.tensor(torch.equal(w, w.clone())),
    "in place of another": lambda w: torch.zeros_like(w.clone()).copy_(w),
    "in a product": lambda w: F.linear(torch.ones(2, 24), w),
    "in an autocast product": lambda w: torch.autocast("cpu", torch.bfloat16)(F.linear)(torch.ones(2, 24), w),
}


@pytest.mark.parametrize("read", READS)
def test_a_computed_weight_reads_as_the_tensor_that_it_is(read):
    layer = held()
    dense = layer.quantized_weight().detach()
    weight = layer.weight
    assert type(weight) is ComputedWeight
    assert (weight.shape, weight.dtype, weight.device, weight.ndim) == (dense.shape, dense.dtype, dense.device, 2)
    assert not weight.requires_grad and len(weight) == len(dense) and weight.is_floating_point()
    assert str(dense) in repr(weight)
    result, expected = READS[read](weight), READS[read](dense)
    assert (result.shape, result.dtype, result.stride()) == (expected.shape, expected.dtype, expected.stride())
    assert torch.equal(result, expected)


WRITES = {
    "add": lambda w: w.add_(1),
    "augmented": lambda w: w.__iadd__(1),
    "copy": lambda w: w.copy_(torch.zeros(16, 24)),
    "fill a row": lambda w: w[3].fill_(0),
    "set a row": lambda w: w.__setitem__(3, 0.0),
    "set in a view": lambda w: w.view(-1).__setitem__(slice(None, None, 7), 0.0),
    "transposed": lambda w: w.T.mul_(2),
    "split": lambda w: w.split(5)[1].zero_(),
    "iterated": lambda w: [row.zero_() for row in w],
    "data": lambda w: w.data.mul_(2),
    "other data": lambda w: setattr(w, "data", torch.zeros(16, 24)),
    "detached": lambda w: w.detach().sub_(1),
    "out": lambda w: torch.add(torch.ones(16, 24), 1, out=w),
    "init": nn.init.zeros_,
    "gradient": lambda w: w.requires_grad_(),
    "gradient flag": lambda w: setattr(w, "requires_grad", True),
}


@pytest.mark.parametrize("write", WRITES)
def test_writing_to_a_computed_weight_is_refused(write):
    layer = held()
    before, latent = layer.quantized_weight(), layer.latent_weight().clone()
    for guard in (torch.no_grad, torch.enable_grad):
        with guard(), pytest.raises(ValueError, match="^the weight of a quantized layer .* leave adapters unmerged"):
            WRITES[write](layer.weight)
    assert torch.equal(layer.quantized_weight(), before) and torch.equal(layer.latent_weight(), latent)


def test_another_weight_is_refused_while_it_is_held():
    layer, other = held(), held()
    for weight in (torch.zeros(16, 24), nn.Parameter(torch.zeros(16, 24)), None, other.weight):
        with pytest.raises(ValueError, match="cannot be written to"):
            layer.weight = weight
    layer.weight = layer.weight  # as PEFT does on letting go
    layer.bias = nn.Parameter(torch.ones(16))


@pytest.mark.parametrize("bits", [0, 4, 16])
@pytest.mark.parametrize("layer_class", [QuantizeLinear, LoRAQuantizeLinear])
def test_a_layer_shows_what_it_multiplies_with_while_it_is_held(layer_class, bits):
    layer = make(layer_class, w_bits=bits)
    parameter, x = layer.weight, torch.randn(5, 24)
    layer(x).sum().backward()
    gradients = {name: p.grad.clone() for name, p in layer.named_parameters()}
    quantized = bits < 16 or layer_class is LoRAQuantizeLinear
    holder = Holder(layer)
    assert isinstance(layer, layer_class) and (layer.weight is not parameter) == quantized
    assert torch.equal(layer.weight, layer.quantized_weight())
    layer.zero_grad()
    holder.base_layer(x).sum().backward()  # trained as before
    assert all(torch.equal(p.grad, gradients[name]) for name, p in layer.named_parameters())
    assert holder.state_dict()["base_layer.weight"].data_ptr() == parameter.data_ptr()
    assert type(copy.deepcopy(holder).base_layer) is type(layer)
    if bits < 16:
        shown = layer.weight.clone()
        layer.freeze_codes()
        assert torch.equal(layer.weight, shown)
    nn.Sequential(layer)
    assert type(layer) is layer_class and layer.weight is parameter
    with torch.no_grad():
        layer.weight.mul_(2)


@pytest.mark.parametrize("layer_class", [QuantizeLinear, LoRAQuantizeLinear])
def test_its_state_dict_is_for_its_like(layer_class, tmp_path):
    layer, linear = make(layer_class, w_bits=2), nn.Linear(24, 16)
    before = linear.weight.clone()
    for strict, assign in itertools.product((True, False), repeat=2):
        with pytest.raises(ValueError, match=r"^a layer is quantized \(w_bits=2\): an ordinary layer cannot load"):
            linear.load_state_dict(copy.deepcopy(layer.state_dict()), strict=strict, assign=assign)
        with pytest.raises(ValueError, match="^0: quantized with w_bits=2, this layer has w_bits=3"):
            other = nn.Sequential(make(layer_class, w_bits=3))
            other.load_state_dict(nn.Sequential(layer).state_dict(), strict=strict, assign=assign)
    assert torch.equal(linear.weight, before)
    torch.save(layer.state_dict(), tmp_path / "file")
    own = layer.state_dict()
    for state in (own, copy.deepcopy(own), torch.load(tmp_path / "file", weights_only=True)):
        twin = make(layer_class, w_bits=2)
        twin.weight.data.zero_()
        twin.load_state_dict(state)
        assert torch.equal(twin.quantized_weight(), layer.quantized_weight())


@pytest.mark.parametrize("bits", BITS)
def test_frozen_codes_do_not_depend_on_the_default_dtype(bits):
    layer = make(w_bits=bits)
    layer.freeze_codes()
    expected = layer.quantized_weight()
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert torch.equal(layer.quantized_weight(), expected)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("layer_class", [QuantizeLinear, LoRAQuantizeLinear])
def test_gradients_of_a_layer_stored_in_8_bit_floats(layer_class):
    """As diffusers' layerwise casting has it: widened before the forward pass, narrowed after it."""
    layer, x = make(layer_class, w_bits=0).bfloat16(), torch.randn(5, 24).bfloat16()
    for name in ("weight", "bias"):
        getattr(layer, name).data = getattr(layer, name).data.to(torch.float8_e4m3fn).bfloat16()
    layer(x).square().sum().backward()
    expected = {name: parameter.grad.clone() for name, parameter in layer.named_parameters()}
    layer.zero_grad()
    loss = layer(x).square().sum()
    for name in ("weight", "bias"):
        getattr(layer, name).data = getattr(layer, name).data.to(torch.float8_e4m3fn)
    loss.backward()
    assert all(torch.equal(parameter.grad, expected[name]) for name, parameter in layer.named_parameters())
