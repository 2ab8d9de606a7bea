"""models/lora_kernel.py against the layer in torch's parts; without a GPU in Triton's interpreter."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from models import lora_kernel, utils_quant
from models.packing import PackedLinear
from models.utils_quant import LoRAQuantizeLinear

ROOT = Path(__file__).parents[1]
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
INTERPRETED = lora_kernel.INTERPRETED
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
def test_nan_is_not_hidden_by_the_clip_range():
    layer = layer_of(8, 16, 0)
    with torch.no_grad():
        layer.lora_A[3] = float("nan")
    assert layer.quantized_weight().isnan().any(1).tolist() == [i == 3 for i in range(8)]


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
@pytest.mark.parametrize(
    ("kernel", "constants"), [("_compose", {"SIGN": False}), ("_compose_backward", {"SIGN": False, "FROZEN": False})]
)
def test_the_kernels_compile_for_a_gpu_that_is_not_there(kernel, constants):
    """The interpreter accepts what the compiler does not."""
    triton, function = lora_kernel.triton, getattr(lora_kernel, kernel)
    tile = dict(lora_kernel.TILE)
    options = {"num_warps": tile.pop("num_warps")}
    constants = constants | {"RANK": 32, "SPLIT": True} | tile
    types = dict.fromkeys(("weight", "out", "grad", "inner"), "*bf16")
    types |= dict.fromkeys(("a", "b", "alpha", "step", "sums"), "*fp32")
    types |= dict.fromkeys(("scaling", "low", "high", "n", "s"), "fp32")
    source = triton.compiler.ASTSource(
        function,
        {name: "constexpr" if name in constants else types.get(name, "i32") for name in function.arg_names},
        {(number,): constants[name] for number, name in enumerate(function.arg_names) if name in constants},
    )
    target = triton.backends.compiler.GPUTarget("cuda", 90, 32)
    assert "ptx" in triton.compile(source, target=target, options=options).asm


@pytest.mark.skipif(GPU or INTERPRETED or lora_kernel.triton is None, reason="the tests above ran the kernels")
def test_in_the_interpreter():
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0 and " passed" in result.stdout, result.stdout[-3000:]
