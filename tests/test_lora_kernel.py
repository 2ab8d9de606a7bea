"""models/lora_kernel.py against the layer in torch's parts; without a GPU in Triton's interpreter."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._higher_order_ops import triton_kernel_wrap
from torch._library.triton import get_triton_kernels_for_op
from torch.utils.checkpoint import checkpoint

from models import lora_kernel, utils_quant
from models.packing import PackedLinear
from models.utils_quant import LoRAQuantizeLinear

ROOT = Path(__file__).parents[1]
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
INTERPRETED = lora_kernel.INTERPRETED
pytestmark = pytest.mark.on_gpu
here = pytest.mark.skipif(not (GPU or INTERPRETED), reason="needs Triton; run in its interpreter by another test")
SHAPES = [(5, 7), (130, 300), (128, 256)] + [(3072, 12288), (18432, 3072)] * GPU


def layer_of(out_features, in_features, w_bits, dtype=torch.float32, **settings) -> LoRAQuantizeLinear:
    """A layer whose LoRA changes many codes."""
    torch.manual_seed(out_features + w_bits)
    layer = LoRAQuantizeLinear(
        in_features, out_features, bias=False, w_bits=w_bits, lora_r=settings.pop("rank", 5), lora_alpha=10, **settings
    ).to(DEVICE)
    layer.weight.data = layer.weight.data.to(dtype)
    with torch.no_grad():
        layer.lora_A.normal_(std=0.3)
        layer.lora_B.normal_(std=layer.weight.abs().mean().item())
    return layer


@pytest.fixture
def parts(monkeypatch):
    """parts(f) calls f while the layers compute by torch's parts."""

    def parts(f):
        with monkeypatch.context() as patch:
            patch.setattr(utils_quant, "works_on", lambda *_: False)
            return f()

    return parts


@here
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("w_bits", [0, 1, 2, 4, 8])
def test_weights_and_gradients_are_those_of_the_parts(w_bits, shape, frozen, parts):
    """Of 2¹⁴ weights a few may lie so near a threshold that 2⁻¹⁶ of the product moves them over it."""
    layer = layer_of(*shape, w_bits)
    if frozen:
        layer.freeze_codes()
        with torch.no_grad():
            layer.weight_clip_val.mul_(1.3)
    slope = torch.randn(shape, device=DEVICE)
    results = []
    for how in (lambda f: f(), parts):
        layer.zero_grad()
        weight = how(layer.quantized_weight)
        how(lambda weight=weight: (weight * slope).sum().backward())
        results.append([weight.detach(), *(p.grad for p in layer.parameters())])
    ours, theirs = results
    allowed = 2**-9 * slope.numel() if w_bits == 8 else 2**-12 * slope.numel()
    assert (~torch.isclose(ours[0], theirs[0], rtol=1e-5)).sum() <= allowed
    for name, mine, other in zip([n for n, _ in layer.named_parameters()], ours[1:], theirs[1:], strict=True):
        assert mine.dtype == other.dtype and mine.shape == other.shape
        assert (mine - other).norm() <= 0.01 * other.norm(), name
        assert frozen == (not mine.any()) or name == "weight_clip_val"


@here
def test_one_step_size_and_a_bfloat16_weight(parts):
    layer = layer_of(64, 96, 0, torch.bfloat16, weight_layerwise=True, rank=17)
    layer.weight.requires_grad_(False)
    slope = torch.randn(64, 96, device=DEVICE)
    results = []
    for how in (lambda f: f(), parts):
        layer.zero_grad()
        weight = how(lambda: layer.quantized_weight(torch.bfloat16))
        assert weight.dtype == torch.bfloat16
        how(lambda weight=weight: (weight * slope).sum().backward())
        results.append([layer.lora_A.grad, layer.lora_B.grad, layer.weight_clip_val.grad])
    assert layer.weight.grad is None
    for mine, other in zip(*results, strict=True):
        assert mine.dtype == torch.float32 and (mine - other).norm() < 0.02 * other.norm()


@here
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("w_bits", [0, 1, 2, 4, 8])
def test_what_is_packed_is_what_was_trained(w_bits, frozen):
    layer = layer_of(130, 300, w_bits, torch.bfloat16)
    if frozen:
        layer.freeze_codes()
        with torch.no_grad():
            layer.weight_clip_val.mul_(1.3)
    assert torch.equal(PackedLinear.from_quantized(layer).dequantize(), layer.quantized_weight())


@here
@pytest.mark.parametrize("w_bits", [0, 1])
def test_nan_is_not_hidden_by_the_clip_range_or_the_floor(w_bits):
    layer = layer_of(8, 16, w_bits)
    layer.weight.requires_grad_(False)
    with torch.no_grad():
        layer.lora_A[3] = float("nan")
        layer.weight_clip_val[5] = float("nan")
    assert layer.quantized_weight().isnan().any(1).tolist() == [i in (3, 5) for i in range(8)]
    x = torch.ones(1, 16, dtype=torch.bfloat16, device=DEVICE)
    assert layer(x)[0].isnan().tolist() == [i in (3, 5) for i in range(8)]


@here
def test_a_step_size_below_the_floor_counts_as_the_floor(parts):
    layer = layer_of(8, 16, 4)
    with torch.no_grad():
        layer.weight_clip_val[2:5] = torch.tensor([[0.0], [-1.0], [1e-9]])
    ours, theirs = layer.quantized_weight(), parts(layer.quantized_weight)
    assert ours[2:5].abs().max() <= 8e-5 and torch.allclose(ours, theirs, rtol=1e-5)


# ------------------------------------------------------------------------------------------------------- a few tokens


@pytest.fixture
def small_tiles(monkeypatch):
    """Several blocks and spans where the interpreter has small matrices to multiply; on a GPU what is used there."""
    if not GPU:
        for name in ("FEW_TILE", "FEW_BACKWARD_TILE"):
            monkeypatch.setattr(lora_kernel, name, {"HEIGHT": 64, "WIDTH": 32, "SPAN": 2, "num_warps": 4})


def few_layer(out_features, in_features, w_bits, **settings) -> LoRAQuantizeLinear:
    layer = layer_of(out_features, in_features, w_bits, torch.bfloat16, **settings)
    layer.weight.requires_grad_(False)
    return layer


def exact_gradients(layer, x, grad) -> dict[str, torch.Tensor]:
    """By the formulas of utils_quant.py, in float64."""
    low, high, n, s, qp = utils_quant._grid(layer.w_bits, stretched=layer.w_bits in (0, 2))
    a, b, alpha = layer.lora_A.double(), layer.lora_B.double(), layer.weight_clip_val.double()
    step = alpha if layer.frozen is None else layer.frozen.double()
    v = (layer.weight.double() + layer.scaling * a @ b) / step
    level = v.sign() if layer.w_bits == 1 else (v.clamp(low, high) * n - s).round().add(s) / n
    g = grad.double().T @ x.double()
    inside = (v >= low) & (v <= high)
    inner = torch.where(inside, g, 0) * layer.scaling
    slope, factor = level - torch.where(inside, v, 0) * (layer.w_bits != 1), (v.numel() * qp) ** -0.5
    if layer.frozen is not None:
        inner, slope, factor = 0 * inner, level, 1
    found = {"x": grad.double() @ (alpha * level), "lora_A": inner @ b.T, "lora_B": a.T @ inner}
    return found | {"weight_clip_val": factor * (g * slope).sum_to_size(alpha.shape)}


@here
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize(("m", "shape"), [(1, (70, 130)), (4, (33, 97)), (16, (64, 31))] + [(4, (18432, 3072))] * GPU)
@pytest.mark.parametrize("w_bits", [0, 1, 2, 4])
def test_few_tokens_are_multiplied_in_the_pass(w_bits, m, shape, frozen, small_tiles):
    layer = few_layer(*shape, w_bits, weight_layerwise=w_bits == 4)
    layer.bias = nn.Parameter(torch.randn(shape[0], device=DEVICE))
    if frozen:
        layer.freeze_codes()
        with torch.no_grad():
            layer.weight_clip_val.mul_(1.3)
    x = torch.randn(m, shape[1], device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    grad = torch.randn(m, shape[0], device=DEVICE, dtype=torch.bfloat16)
    y = layer(x)
    y.backward(grad)
    wanted = F.linear(x.double(), layer.quantized_weight(torch.bfloat16).double(), layer.bias.bfloat16().double())
    assert y.dtype == torch.bfloat16 and (y - wanted).norm() < 0.003 * wanted.norm()
    found = {"x": x.grad} | {name: p.grad for name, p in layer.named_parameters() if p.requires_grad}
    assert (found.pop("bias") - grad.double().sum(0)).norm() < 0.006 * grad.double().sum(0).norm()
    assert found.pop("x").dtype == torch.bfloat16 and {grad.dtype for grad in found.values()} == {torch.float32}
    for name, exact in exact_gradients(layer, x, grad).items():
        mine = x.grad if name == "x" else found[name]
        assert mine.shape == exact.shape and (mine - exact).norm() <= 0.01 * exact.norm(), name


@here
@pytest.mark.parametrize("w_bits", [0, 1, 4])
def test_few_tokens_see_the_codes_that_are_trained_and_packed(w_bits, small_tiles):
    """Forward and backward, by unit vectors: to the last bit."""
    layer = few_layer(70, 90, w_bits)
    composed = layer.quantized_weight(torch.bfloat16)
    for unit in torch.eye(90, dtype=torch.bfloat16, device=DEVICE).split(16):
        assert torch.equal(layer(unit), unit @ composed.T)
    x = torch.zeros(16, 90, dtype=torch.bfloat16, device=DEVICE, requires_grad=True)
    for unit in torch.eye(80, 70, dtype=torch.bfloat16, device=DEVICE).split(16):
        assert torch.equal(torch.autograd.grad(layer(x), x, unit)[0], unit @ composed)


@here
def test_what_the_pass_does_not_take_is_multiplied_by_the_composed_weight(monkeypatch, small_tiles):
    calls = []
    monkeypatch.setattr(utils_quant, "few", lambda *a: calls.append(a[0].shape[0]) or lora_kernel.few(*a))
    layer, x = few_layer(8, 16, 0), torch.randn(2, 8, 16, device=DEVICE, dtype=torch.bfloat16)
    assert layer(x).shape == (2, 8, 8) and layer(x[0, 0]).shape == (8,) and calls == [16, 1]
    with torch.autocast(DEVICE, torch.bfloat16):
        layer(x.float())
    assert calls == [16, 1, 16]
    layer(x.expand(3, 2, 8, 16))
    layer(x[:, :0])
    layer(x.float())
    few_layer(8, 16, 0, rank=lora_kernel.FEW_RANK + 1)(x)
    with torch.no_grad():
        layer.weight.requires_grad_(True)
        layer(x)
    assert calls == [16, 1, 16]


class Block(nn.Module):
    """Tokens [B, L, 32], modulated by what is known of the sample [B, 32], as in a FLUX block."""

    def __init__(self):
        super().__init__()
        self.modulation, self.linear = few_layer(64, 32, 0), few_layer(32, 32, 2)

    def forward(self, x, known):
        shift, scale = self.modulation(F.silu(known))[:, None].chunk(2, -1)
        return x + self.linear(F.layer_norm(x, (32,)) * (1 + scale) + shift)


@here
@pytest.mark.parametrize("compiled", [False, True])
def test_a_small_model_learns_the_same_with_checkpoints_compiled_or_not(compiled, monkeypatch, small_tiles):
    data = torch.randn(3, 2, 20, 32, device=DEVICE)
    losses = []
    for rank in (lora_kernel.FEW_RANK, 0):
        monkeypatch.setattr(lora_kernel, "FEW_RANK", rank)
        block, known = Block(), nn.Parameter(torch.ones(2, 32, device=DEVICE))
        parameters = [known, *(p for p in block.parameters() if p.requires_grad)]
        optimizer = torch.optim.AdamW(parameters, lr=0.02)
        call = block
        if compiled:
            torch.compiler.reset()
            call = torch.compile(block, fullgraph=True, backend="inductor" if GPU else "aot_eager")
        losses.append([])
        for x in data:
            with torch.autocast(DEVICE, torch.bfloat16):
                out = checkpoint(call, x, known, use_reentrant=False)
            loss = (out.float() - x.flip(-1)).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=0.01) and losses[0][-1] < 0.95 * losses[0][0]


@pytest.mark.skipif(not GPU, reason="needs a GPU")
def test_compiled_it_is_one_graph_with_the_same_numbers():
    layer = layer_of(256, 512, 0, torch.bfloat16)
    layer.weight.requires_grad_(False)
    x = torch.randn(64, 512, device=DEVICE)
    results = []
    for call in (layer, torch.compile(layer, fullgraph=True)):
        layer.zero_grad()
        with torch.autocast(x.device.type, torch.bfloat16):
            out = call(x)
        out.float().square().mean().backward()
        results.append([out.detach().float(), *(p.grad for p in layer.parameters() if p.requires_grad)])
    for eager, compiled in zip(*results, strict=True):
        assert (eager - compiled).norm() <= 0.01 * eager.norm()


@pytest.mark.skipif(GPU or INTERPRETED or lora_kernel.triton is None, reason="the tests above ran the kernels")
@pytest.mark.parametrize("kernel", ["compose", "compose_backward", "few", "few_backward"])
def test_the_kernels_compile_for_a_gpu_that_is_not_there(kernel):
    """The interpreter accepts what the compiler does not."""
    triton, function = lora_kernel.triton, getattr(lora_kernel, f"_{kernel}")
    tiles = {"few": lora_kernel.FEW_TILE, "few_backward": lora_kernel.FEW_BACKWARD_TILE}
    tile = tiles.get(kernel, lora_kernel.TILE)
    options = {name: value for name, value in tile.items() if name.islower()}
    constants = {"SIGN": False, "FROZEN": False, "RANK": 32, "SPLIT": True, "FEW": lora_kernel.FEW} | tile
    constants |= {"SCALING": 0.5, "LOW": -0.99, "HIGH": 0.99, "N": 1.5, "S": 0.0, "FLOOR": 1e-5}
    constants = {name: value for name, value in constants.items() if name in function.arg_names}
    types = dict.fromkeys(("weight", "out", "grad", "inner", "x", "of_b"), "*bf16")
    types |= dict.fromkeys(("a", "b", "alpha", "step", "sums", "of_x", "of_a", "of_alpha"), "*fp32")
    source = triton.compiler.ASTSource(
        function,
        {name: "constexpr" if name in constants else types.get(name, "i32") for name in function.arg_names},
        {(number,): constants[name] for number, name in enumerate(function.arg_names) if name in constants},
    )
    target = triton.backends.compiler.GPUTarget("cuda", 90, 32)
    assert "ptx" in triton.compile(source, target=target, options=options).asm


class Target:
    """A driver of Triton for a GPU that is not there: kernels are compiled, not launched."""

    def get_current_target(self):
        return lora_kernel.triton.backends.compiler.GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_active_torch_device(self):
        return torch.device("cpu")


@pytest.mark.skipif(GPU or INTERPRETED or lora_kernel.triton is None, reason="the tests above ran the kernels")
@pytest.mark.parametrize(("tokens", "forward", "backward"), [(64, "_compose", "_compose_backward"), (4, "_few", None)])
def test_compiled_graphs_hold_the_kernels_themselves_and_each_once(tokens, forward, backward, monkeypatch):
    """As torch.compile hands them on; the fractions are among the constants of a kernel."""
    monkeypatch.setattr(lora_kernel.triton.runtime.driver, "_active", Target())
    for module in (lora_kernel, utils_quant):
        monkeypatch.setattr(module, "works_on", lambda *_: True)
    kernels, fractions = [], []

    def keep(module, _):
        table, calls = triton_kernel_wrap.kernel_side_table, [n for n in module.graph.nodes if n.op == "call_function"]
        launches = [node.kwargs for node in calls if "triton_kernel_wrapper" in str(node.target)]
        given = [table.get_constant_args(launch["constant_args_idx"]) | launch["kwargs"] for launch in launches]
        fractions.extend(name for call in given for name, value in call.items() if isinstance(value, float))
        kernels.append([table.get_kernel(launch["kernel_idx"]).fn.__name__ for launch in launches])
        kernels[-1] += [str(node.target) for node in calls if "flux158" in str(node.target)]
        made = [node and node.meta["val"] for node in module.graph.output_node().args[0]]
        return make_boxed_func(lambda *_: [None if x is None else torch.zeros(x.shape, dtype=x.dtype) for x in made])

    layer = layer_of(64, 128, 0, torch.bfloat16, rank=8)
    layer.weight.requires_grad_(False)
    torch.compiler.reset()
    backend = aot_autograd(fw_compiler=keep, bw_compiler=keep, partition_fn=min_cut_rematerialization_partition)
    with torch.autocast("cpu", torch.bfloat16):
        torch.compile(layer, fullgraph=True, backend=backend)(torch.randn(tokens, 128)).float().sum().backward()
    assert kernels == [[forward], [backward or "flux158.few_backward.default"]]
    assert len(fractions) == 6 * (1 + bool(backward)) and all(name.isupper() for name in fractions)
    known = get_triton_kernels_for_op(f"flux158::{forward[1:]}")
    assert known == [getattr(lora_kernel, forward)]  # of which the key of a compiler's cache is made


@pytest.mark.skipif(GPU or INTERPRETED or lora_kernel.triton is None, reason="the tests above ran the kernels")
def test_in_the_interpreter():
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0 and " passed" in result.stdout, result.stdout[-3000:]
