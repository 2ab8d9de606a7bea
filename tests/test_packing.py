"""Packed weights against the quantizers they replace: codes and bytes, layers, whole models on disk, adapters, damage.

Codes and bytes are checked against plain Python integers and fractions, files against their description in
models/packing.py. Equal means equal in every bit but the sign of a zero.
"""

import contextlib
import copy
import hashlib
import inspect
import itertools
import json
import random
import resource
import shutil
import signal
import textwrap
import types
from fractions import Fraction
from math import ceil, floor
from pathlib import Path

import accelerate
import diffusers
import pytest
import torch
from diffusers.models import modeling_utils
from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor
from diffusers.utils import hub_utils
from safetensors import safe_open
from safetensors.torch import load_file, load_model, save_file, save_model
from tiny_models import draw, inputs, load_pipeline, output, write_klein
from torch import nn

from models import kernels, packing, quantized_model
from models.families import load_transformer
from models.modeling_flux_quant import FluxTransformer2DModel
from models.packing import INDEX, PackedLinear
from models.utils_quant import ALPHA_FLOOR, LoRAQuantizeLinear, QuantizeLinear

SHIPPED = Path(__file__).parents[1] / "assets/tiny-flux-1.58bit"
BITS = range(9)
SHAPES = [(1, 1), (2, 5), (3, 7), (4, 13), (5, 256), (7, 1001)]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def ids(shape):
    return "x".join(map(str, shape))


@pytest.fixture(params=[None, 11], ids=["one chunk", "many chunks"])
def chunks(request, monkeypatch):
    """Rows are worked on in chunks of a million elements: more than these shapes have, so once in tiny ones."""
    if request.param:
        monkeypatch.setattr(kernels, "_CHUNK", request.param)


def random_codes(rows, columns, w_bits, seed=0):
    """Signed codes [rows, in] as nested lists, all that there are among them if there is room."""
    low, high = code_range(w_bits)
    rng = random.Random(f"{seed} {rows} {columns} {w_bits}")
    return [[rng.randint(low, high) for _ in range(columns)] for _ in range(rows)]


def code_range(w_bits):
    if w_bits == 0:
        return -1, 1
    return -(2 ** (w_bits - 1)), 2 ** (w_bits - 1) - 1


# Codes: the definition in models/utils_quant.py, in fractions


def half_even(x: Fraction) -> int:
    whole = floor(x)
    return whole + (x - whole > Fraction(1, 2) or (x - whole == Fraction(1, 2) and whole % 2))


def clip(x, low, high):
    return min(max(x, low), high)


def reference_code(w: float, alpha: float, w_bits: int) -> int:
    x = Fraction(w) / max(Fraction(alpha), Fraction(torch.tensor(ALPHA_FLOOR).item()))
    if w_bits == 0:
        return half_even(clip(x, Fraction(-99, 100), Fraction(99, 100)) * Fraction(3, 2))
    if w_bits == 1:
        return 0 if x >= 0 else -1
    if w_bits == 2:
        return half_even(clip(x, Fraction(-99, 100), Fraction(99, 100)) * 2 - Fraction(1, 2))
    return half_even(clip(x, *code_range(w_bits)))


def reference_level(code: int, w_bits: int) -> Fraction:
    """w/α of a code, as in the table there."""
    if w_bits == 0:
        return Fraction(2, 3) * code
    if w_bits == 1:
        return Fraction(2 * code + 1)
    if w_bits == 2:
        return Fraction(2 * code + 1, 4)
    return Fraction(code)


def layer_of(shape, w_bits, bias=True, layerwise=False, lora_r=0, dtype=torch.float32):
    """A layer as if trained: random weight, bias, step sizes (of which some are below the floor) and LoRA."""
    torch.manual_seed(sum(shape) + w_bits)
    settings = {"w_bits": w_bits, "weight_layerwise": layerwise, "clip_init": "max"}
    if lora_r:
        layer = LoRAQuantizeLinear(shape[1], shape[0], bias, lora_r=lora_r, lora_alpha=0.5, **settings)
        layer.lora_B.data.normal_()
        layer.lora_A.data.normal_()
    else:
        layer = QuantizeLinear(shape[1], shape[0], bias, **settings)
    layer.weight.data.normal_()
    layer.weight.data.view(-1)[::7] = 0  # at one bit zero is the upper level
    layer.weight.data.view(-1)[::11] *= 1e3  # far outside the clip range
    layer.weight_clip_val.data = layer.weight_clip_val.data.uniform_(0.5, 1.5) * 3 / 2 ** max(w_bits - 1, 0)
    if not layerwise:
        layer.weight_clip_val.data[2::4] = -0.1
        layer.weight_clip_val.data[3::4] = ALPHA_FLOOR / 7
    return layer.to(dtype).eval()


@pytest.mark.parametrize("lora_r", [0, 3], ids=["plain", "lora"])
@pytest.mark.parametrize("layerwise", [False, True], ids=["row-wise", "layer-wise"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("w_bits", BITS)
def test_a_packed_layer_computes_what_the_quantized_one_does(w_bits, bias, layerwise, lora_r):
    for shape, dtype in itertools.product(SHAPES, DTYPES.values()):
        layer = layer_of(shape, w_bits, bias, layerwise, lora_r, dtype)
        packed = PackedLinear.from_quantized(layer)
        assert packed.weight_codes.shape == (shape[0], packing.row_bytes(shape[1], w_bits))
        assert packed.weight_clip_val.shape == ((1, 1) if layerwise else (shape[0], 1))
        with torch.no_grad():
            expected = layer.quantized_weight()
            assert torch.equal(packed.dequantize(expected.dtype), expected)
            if bias:  # the bias says which dtype the layer has
                assert packed.weight.dtype == dtype
                assert torch.equal(packed.weight, expected.to(dtype))
            x = torch.randn(2, 3, shape[1], dtype=dtype)
            assert torch.equal(packed(x), layer(x))
            assert packed(x).dtype == dtype
            with torch.autocast("cpu", torch.bfloat16):
                assert torch.equal(packed(x), layer(x))
                assert packed(x).dtype == torch.bfloat16
            if dtype == torch.float32:  # activations narrower than the weights
                assert torch.equal(packed(x.bfloat16()), layer(x.bfloat16()))


@pytest.mark.parametrize("w_bits", BITS)
def test_packing_in_chunks_of_rows_changes_nothing(w_bits, chunks):
    for shape, layerwise in itertools.product(SHAPES[:5], [False, True]):
        layer = layer_of(shape, w_bits, layerwise=layerwise)
        packed = PackedLinear.from_quantized(layer)
        assert torch.equal(packed.dequantize(), layer.quantized_weight())
        stored = packing.to_disk(packed.weight_codes, w_bits, shape[1])
        assert torch.equal(packing.from_disk(stored, w_bits, shape[1]), packed.weight_codes)


@pytest.mark.parametrize("layerwise", [False, True], ids=["row-wise", "layer-wise"])
@pytest.mark.parametrize("w_bits", BITS)
def test_codes_are_those_of_the_definition_in_fractions(w_bits, layerwise):
    for shape in SHAPES[: 5 if layerwise else 6]:
        layer = layer_of(shape, w_bits, layerwise=layerwise)
        alphas = layer.weight_clip_val.expand(shape[0], 1)[:, 0].tolist()
        expected = [
            [reference_code(w, alpha, w_bits) for w in row]
            for row, alpha in zip(layer.weight.tolist(), alphas, strict=True)
        ]
        packed = PackedLinear.from_quantized(layer)
        assert packed.codes().dtype == torch.int8
        assert packed.codes().tolist() == expected


@pytest.mark.parametrize("w_bits", BITS)
def test_codes_of_weights_on_and_around_every_threshold(w_bits):
    # Sixteenths of a power of two: w/α, and its product with n, are exact in fp32, so that ties are ties.
    low, high = code_range(w_bits)
    weights = [i / 16 * 2.0**-3 for i in range(16 * low - 24, 16 * high + 25)]
    layer = QuantizeLinear(len(weights), 1, w_bits=w_bits)
    layer.weight.data, layer.weight_clip_val.data = torch.tensor([weights]), torch.tensor([[2.0**-3]])
    codes = PackedLinear.from_quantized(layer).codes()[0].tolist()
    assert codes == [reference_code(w, 2.0**-3, w_bits) for w in weights]
    assert set(codes) == set(range(low, high + 1))


@pytest.mark.parametrize("w_bits", BITS)
def test_every_code_stands_for_its_level(w_bits):
    low, high = code_range(w_bits)
    codes = torch.arange(low, high + 1, dtype=torch.int8)[None]
    packed = PackedLinear.from_codes(codes, torch.tensor([[0.7]]), None, w_bits)
    expected = [float(reference_level(c, w_bits) * Fraction(0.7)) for c in range(low, high + 1)]
    torch.testing.assert_close(packed.dequantize()[0], torch.tensor(expected), rtol=2e-7, atol=0)
    assert packed.bias is None
    assert torch.equal(packed.codes(), codes)


def test_from_codes_keeps_step_sizes_positive_and_in_fp32():
    codes = torch.tensor([[1, -1], [0, 1]], dtype=torch.int8)
    bias = torch.ones(2, dtype=torch.bfloat16)
    packed = PackedLinear.from_codes(codes, torch.tensor([[-3.0], [2.0]], dtype=torch.bfloat16), bias, 0)
    assert torch.equal(packed.weight_clip_val, torch.tensor([[ALPHA_FLOOR], [2.0]]))
    assert packed.weight_clip_val.dtype == torch.float32
    assert packed.bias.dtype == packed.weight.dtype == torch.bfloat16
    layerwise = PackedLinear.from_codes(codes, torch.tensor(2.0), None, 0, layerwise=True)
    assert torch.equal(layerwise.weight_clip_val, torch.tensor([[2.0]]))


# Bytes


def reference_planes(row, w_bits):
    """Bytes of a row of codes: plane by plane, each holding the next lowest bits; byte j holds j, j + columns, …"""
    widths = {0: [2], 1: [1], 2: [2], 3: [2, 1], 4: [4], 5: [4, 1], 6: [4, 2], 7: [4, 2, 1], 8: [8]}[w_bits]
    result, shift = [], 0
    for width in widths:
        columns = ceil(Fraction(len(row) * width, 8))
        plane = [0] * columns
        for position, code in enumerate(row):
            field = (code >> shift) % 2**width  # of Python's endless two's complement
            plane[position % columns] += field << width * (position // columns)
        result += plane
        shift += width
    return result


def reference_trits(row):
    """Bytes of a row of ternary codes: five digits d₁ … d₅ as 0.d₁d₂d₃d₄d₅ in base 3, rounded up to 1/256."""
    columns = ceil(Fraction(len(row), 5))
    row = row + [0] * (5 * columns - len(row))
    fractions = [sum(Fraction(row[j + i * columns] + 1, 3 ** (i + 1)) for i in range(5)) for j in range(columns)]
    return [ceil(256 * fraction) for fraction in fractions]


def as_codes(rows):
    return torch.tensor(rows, dtype=torch.int8)


def as_bytes(rows):
    return torch.tensor(rows, dtype=torch.uint8)


@pytest.mark.parametrize("shape", SHAPES + [(2, n) for n in range(2, 12)], ids=ids)
@pytest.mark.parametrize("w_bits", BITS)
def test_bytes_in_memory_are_the_documented_planes(w_bits, shape):
    codes = random_codes(*shape, w_bits)
    expected = [reference_planes(row, w_bits) for row in codes]
    packed = packing.pack_codes(as_codes(codes), w_bits)
    assert packed.tolist() == expected
    assert packed.shape[1] == packing.row_bytes(shape[1], w_bits)
    assert packing.unpack_codes(as_bytes(expected), w_bits, shape[1]).tolist() == codes


@pytest.mark.parametrize("shape", SHAPES + [(2, n) for n in range(2, 12)], ids=ids)
@pytest.mark.parametrize("w_bits", BITS)
def test_bytes_on_disk_are_the_documented_ones_and_come_back(w_bits, shape):
    codes = random_codes(*shape, w_bits)
    expected = [reference_trits(row) if w_bits == 0 else reference_planes(row, w_bits) for row in codes]
    memory = packing.pack_codes(as_codes(codes), w_bits)
    for stored in (packing.to_disk(memory, w_bits, shape[1]), packing.store_codes(as_codes(codes), w_bits)):
        assert stored.tolist() == expected
        assert stored.shape[1] == packing.disk_row_bytes(shape[1], w_bits)
        assert torch.equal(packing.from_disk(stored, w_bits, shape[1]), memory)
    if w_bits == 0:
        assert packing.disk_row_bytes(shape[1], 0) == ceil(Fraction(shape[1], 5))
        assert packing.pack_trits(as_codes(codes)).tolist() == expected
        assert packing.unpack_trits(as_bytes(expected), shape[1]).tolist() == codes


VALID = {reference_trits(list(codes))[0]: list(codes) for codes in itertools.product((-1, 0, 1), repeat=5)}
IMPOSSIBLE = sorted(set(range(256)) - set(VALID))


def test_all_243_values_of_five_codes_have_a_byte_of_their_own():
    assert len(VALID) == 243
    for byte, codes in VALID.items():
        assert packing.pack_trits(as_codes([codes])).tolist() == [[byte]]
        assert packing.unpack_trits(as_bytes([[byte]]), 5).tolist() == [codes]


@pytest.mark.parametrize("byte", IMPOSSIBLE)
def test_bytes_that_no_five_codes_give_are_refused(byte):
    assert len(IMPOSSIBLE) == 13
    stored = as_bytes([[reference_trits([0] * 5)[0]] * 4] * 3)
    packing.from_disk(stored, 0, 20)
    for position in range(12):
        broken = stored.clone()
        broken.view(-1)[position] = byte
        with pytest.raises(ValueError, match="a byte holds no five ternary codes"):
            packing.from_disk(broken, 0, 20)


@pytest.mark.parametrize("columns", [1, 2, 3, 4, 6, 7, 11, 13])
def test_ternary_padding_that_is_not_zero_is_refused(columns, chunks):
    count = ceil(Fraction(columns, 5))
    codes = random_codes(3, columns, 0)
    for position, code in itertools.product(range(columns, 5 * count), (-1, 1)):
        longer = [row + [0] * (5 * count - columns) for row in codes]
        longer[2][position] = code
        stored = as_bytes([reference_trits(row) for row in longer])
        with pytest.raises(ValueError, match="the padding is not zero"):
            packing.from_disk(stored, 0, columns)


@pytest.mark.parametrize("columns", [1, 2, 3, 5, 7, 9, 13])
@pytest.mark.parametrize("w_bits", range(1, 9))
def test_dense_padding_that_is_not_zero_is_refused(w_bits, columns, chunks):
    memory = [reference_planes(row, w_bits) for row in random_codes(3, columns, w_bits)]
    # The bits that hold a code are those that a row of ones has.
    used = reference_planes([-1] * columns, w_bits)
    unused = [(j, bit) for j, byte in enumerate(used) for bit in range(8) if not byte >> bit & 1]
    assert len(unused) == 8 * len(used) - w_bits * columns
    for row, (j, bit) in itertools.product((0, 2), unused):
        broken = as_bytes(memory)
        broken[row, j] |= 1 << bit
        with pytest.raises(ValueError, match="the padding is not zero"):
            packing.from_disk(broken, w_bits, columns)


# Models


both = pytest.mark.parametrize("pipeline_folder", ["FLUX.1", "FLUX.2"], indirect=True)


@pytest.fixture(scope="module")
def pipeline_folder(request, pipeline_folder, tmp_path_factory):
    """Of FLUX.1 unless a test asks for both."""
    if getattr(request, "param", "FLUX.1") == "FLUX.1":
        return pipeline_folder
    return write_klein(tmp_path_factory.mktemp("models") / "random-klein")


def student(pipeline_folder, **settings):
    """A quantized model, as if trained."""
    model = load_transformer(pipeline_folder / "transformer", **settings).eval()
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if name.endswith("weight_clip_val"):
            parameter.data *= torch.empty_like(parameter).uniform_(0.7, 1.3)
        elif "lora_" in name:
            parameter.data.normal_(std=0.1)
    return model


def packed_layers(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, PackedLinear)}


def same_parameters(a, b):
    a, b = dict(a.named_parameters()), dict(b.named_parameters())
    return a.keys() == b.keys() and all(a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a)


@pytest.fixture(scope="module")
def base(pipeline_folder):
    """The stock pipeline."""
    return load_pipeline(pipeline_folder)


@pytest.fixture(scope="module")
def ternary(pipeline_folder, tmp_path_factory):
    """A packed ternary model, and the folder that it is saved in; not to be changed."""
    model = student(pipeline_folder, w_bits=0).pack()
    folder = tmp_path_factory.mktemp("packed") / "ternary"
    model.save_pretrained(folder)
    return model, folder


@pytest.mark.parametrize(
    ("pipeline_folder", "settings"),
    [
        *(("FLUX.1", {"w_bits": w_bits}) for w_bits in (0, 1, 2, 3, 4, 8)),
        ("FLUX.1", {"w_bits": 0, "weight_layerwise": True}),
        ("FLUX.1", {"w_bits": 4, "weight_layerwise": True}),
        *((family, {"w_bits": 0, "quantize_modulation": False}) for family in ("FLUX.1", "FLUX.2")),
        *((family, {"w_bits": 0, "lora_r": 2, "lora_alpha": 3.0}) for family in ("FLUX.1", "FLUX.2")),
        *(("FLUX.2", {"w_bits": w_bits}) for w_bits in (0, 3)),
    ],
    ids=str,
    indirect=["pipeline_folder"],
)
def test_packing_saving_and_loading_change_neither_output_nor_image(pipeline_folder, base, tmp_path, settings):
    model = student(pipeline_folder, **settings)
    pipe = type(base)(**base.components | {"transformer": model})
    expected, image = output(model), draw(pipe)
    quantized = {name for name, module in model.named_modules() if isinstance(module, QuantizeLinear)}
    assert model.pack() is model
    assert set(packed_layers(model)) == quantized
    assert not any(isinstance(module, QuantizeLinear) for module in model.modules())
    assert torch.equal(output(model), expected)
    assert torch.equal(draw(pipe), image)
    assert not torch.equal(draw(base), image)

    for size, folder in ((2 * 10**9, tmp_path / "one"), (5000, tmp_path / "many")):
        model.save_pretrained(folder, max_shard_size=size)
        shards = sorted(folder.glob("*.safetensors"))
        assert len(shards) == 1 if size > 10**6 else len(shards) > 3
        assert {file.name for file in folder.iterdir()} == {"config.json", INDEX} | {file.name for file in shards}
        loaded = type(model).from_pretrained(folder)
        assert same_parameters(loaded, model)
        assert not loaded.training
        assert torch.equal(output(loaded), expected)
        for key in ("w_bits", "weight_layerwise", "quantize_modulation"):
            assert loaded.config[key] == model.config[key]
        assert (loaded.config.packed, loaded.config.lora_r) == (packing.FORMAT, 0)
    pipe = load_pipeline(pipeline_folder, transformer=loaded)
    assert pipe.transformer is loaded
    assert torch.equal(draw(pipe), image)
    pipe.save_pretrained(tmp_path / "pipe")
    again = load_pipeline(tmp_path / "pipe")
    assert type(again.transformer) is type(model)
    assert packed_layers(again.transformer)
    assert torch.equal(draw(again), image)


# Training from given codes


def reference_place(w: Fraction, code: int, alpha: Fraction, w_bits: int) -> Fraction:
    """The nearest weight to w of this code that is a twentieth of a level's width inside the code's range."""
    low, high = code_range(w_bits)
    here = reference_level(code, w_bits)
    gap = reference_level(low + 1, w_bits) - reference_level(low, w_bits)
    if code > low:
        w = max(w, alpha * (here - gap * Fraction(9, 20)))
    return min(w, alpha * (here + gap * Fraction(9, 20))) if code < high else w


@pytest.mark.parametrize("layerwise", [False, True])
@pytest.mark.parametrize("w_bits", [0, 1, 2, 3, 4, 8])
def test_weights_move_no_further_than_to_the_codes_they_are_given(w_bits, layerwise):
    shape = (9, 13)
    codes = torch.tensor(random_codes(*shape, w_bits), dtype=torch.int8)
    alpha = torch.rand(1 if layerwise else shape[0], 1) + 0.2
    layer = layer_of(shape, w_bits, layerwise=layerwise)
    before, bias = layer.weight.tolist(), torch.randn(shape[0])
    packed = PackedLinear.from_codes(codes, alpha, bias, w_bits, layerwise)
    packing.adopt_codes(layer, packed)
    assert torch.equal(layer.quantized_weight(), packed.dequantize())
    assert torch.equal(layer.weight_clip_val, packed.weight_clip_val) and torch.equal(layer.bias, bias)
    for i, j in itertools.product(*map(range, shape)):
        a = Fraction(alpha[0 if layerwise else i, 0].item())
        expected = reference_place(Fraction(before[i][j]), int(codes[i, j]), a, w_bits)
        assert layer.weight[i, j].item() == pytest.approx(float(expected), rel=1e-5, abs=1e-6)


@both
@pytest.mark.parametrize("settings", [{"w_bits": 0}, {"w_bits": 3, "lora_r": 2}, {"w_bits": 4}])
def test_a_model_starts_from_another_ones_codes(settings, pipeline_folder):
    """And from what else a block-wise training changes: norms. All in all it computes the same."""
    bits = settings["w_bits"]
    packed = student(pipeline_folder, w_bits=bits).pack()
    for name in ("transformer_blocks.0.attn.norm_q.weight", "single_transformer_blocks.0.attn.norm_k.weight"):
        packed.get_parameter(name).data.mul_(1.5)
    model = load_transformer(pipeline_folder / "transformer", **settings).eval()
    assert not torch.equal(output(model), output(packed))
    assert model.start_from(packed) is model
    assert torch.equal(output(model.pack()), output(packed))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"w_bits": 2}, "w_bits=0, this model has w_bits=2"),
        ({"w_bits": 0, "weight_layerwise": True}, "weight_layerwise=False, this model has weight_layerwise=True"),
        ({"w_bits": 0, "quantize_modulation": False}, "norm.*linear is quantized in one of the models only"),
    ],
)
def test_codes_of_a_model_that_is_quantized_otherwise_are_refused(settings, message, pipeline_folder):
    packed = student(pipeline_folder, w_bits=0).pack()
    with pytest.raises(ValueError, match=message):
        student(pipeline_folder, **settings).start_from(packed)


def test_codes_of_another_shape_are_refused():
    packed = PackedLinear.from_codes(torch.zeros(4, 8, dtype=torch.int8), torch.ones(4, 1), None, 0)
    for shape, bias in (((4, 9), False), ((4, 8), True)):
        with pytest.raises(ValueError, match="^here: .*expected the shape of"):
            packing.adopt_codes(layer_of(shape, 0, bias=bias), packed, "here")


def test_packing_a_model_loaded_from_a_quantized_checkpoint(pipeline_folder, tmp_path):
    model = student(pipeline_folder, w_bits=3, lora_r=2)
    model.save_pretrained(tmp_path / "quantized")
    FluxTransformer2DModel.from_pretrained(tmp_path / "quantized").pack().save_pretrained(tmp_path / "packed")
    assert torch.equal(output(FluxTransformer2DModel.from_pretrained(tmp_path / "packed")), output(model))


def test_ternary_codes_take_a_byte_for_five_on_disk_and_for_four_in_memory(ternary):
    model, folder = ternary
    stored = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            stored |= {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}  # noqa: SIM118
    assert set(stored) == {name for name, _ in model.named_parameters()}
    for name, layer in packed_layers(model).items():
        assert stored[f"{name}.weight_codes"] == [layer.out_features, ceil(layer.in_features / 5)]
        assert layer.weight_codes.shape == (layer.out_features, ceil(layer.in_features / 4))


def test_the_index_describes_the_files(ternary):
    _, folder = ternary
    index, config = (json.loads((folder / name).read_text()) for name in (INDEX, "config.json"))
    tensors = {}
    for file, digest in index["metadata"]["sha256"].items():
        assert hashlib.sha256((folder / file).read_bytes()).hexdigest() == digest
        tensors |= {name: (file, tensor) for name, tensor in load_file(folder / file).items()}
    assert index["weight_map"] == {name: file for name, (file, _) in tensors.items()}
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for _, t in tensors.values())
    kept = {name: value for name, value in config.items() if not name.startswith("_")}
    assert set(kept.pop("quantization_config")) == {"quant_method"}  # for other classes
    digest = hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()
    assert index["metadata"]["config_sha256"] == digest


@pytest.mark.parametrize("size", [5000, 2 * 10**9])
def test_saving_again_gives_the_same_bytes(ternary, tmp_path, size):
    model, folder = ternary
    model.save_pretrained(tmp_path / "first", max_shard_size=size)
    loaded = FluxTransformer2DModel.from_pretrained(tmp_path / "first")
    loaded.save_pretrained(tmp_path / "second", max_shard_size=size)
    before = {file.name: file.read_bytes() for file in (tmp_path / "first").iterdir()}
    loaded.save_pretrained(tmp_path / "first", max_shard_size=size)  # whose tensors may still be mapped from there
    for again in ("first", "second"):
        after = {file.name: file.read_bytes() for file in (tmp_path / again).iterdir()}
        assert after.keys() == before.keys()
        assert [name for name in before if after[name] != before[name] and name != "config.json"] == []
    assert torch.equal(output(loaded), output(model))


def test_a_shard_size_in_words_as_diffusers_takes_it(ternary, tmp_path):
    model, _ = ternary
    model.save_pretrained(tmp_path, max_shard_size="5KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    assert same_parameters(FluxTransformer2DModel.from_pretrained(tmp_path), model)


def test_what_an_earlier_model_left_in_the_folder_does_no_harm(pipeline_folder, ternary, tmp_path):
    model, _ = ternary
    plain = FluxTransformer2DModel.from_pretrained(pipeline_folder / "transformer")
    for earlier, size in ((plain, "10GB"), (plain, "50KB"), (model, 5000), (model, 20000)):
        earlier.save_pretrained(tmp_path, max_shard_size=size)
        model.save_pretrained(tmp_path)
        assert same_parameters(FluxTransformer2DModel.from_pretrained(tmp_path), model)
        assert len(list(tmp_path.iterdir())) == 3  # config, index and one shard


def test_an_unpacked_model_saved_where_a_packed_one_was_is_loaded(pipeline_folder, ternary, tmp_path):
    ternary[0].save_pretrained(tmp_path)
    model = student(pipeline_folder, w_bits=3)
    model.save_pretrained(tmp_path)
    loaded = FluxTransformer2DModel.from_pretrained(tmp_path)
    assert loaded.config.packed == 0
    assert torch.equal(output(loaded), output(model))


def test_loading_says_what_diffusers_would_say(ternary):
    _, info = FluxTransformer2DModel.from_pretrained(ternary[1], output_loading_info=True)
    assert not any(info.values())


@pytest.mark.parametrize("device_map", ["cpu", {"": "cpu"}, {}, None])
def test_a_device_can_be_named(ternary, device_map):
    loaded = FluxTransformer2DModel.from_pretrained(ternary[1], device_map=device_map)
    assert same_parameters(loaded, ternary[0])


@pytest.mark.parametrize(("device_map", "number"), [("cuda", 3), ({"": "cuda"}, 3), ("cuda:1", 1)])
def test_a_gpu_without_a_number_is_the_current_one(ternary, device_map, number, monkeypatch):
    """Of the caller: threads that load have their own, which is the first."""
    found = []
    monkeypatch.setattr(quantized_model, "load_packed", lambda *arguments: found.append(arguments[-1]))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    FluxTransformer2DModel.from_pretrained(ternary[1], device_map=device_map)
    assert found == [torch.device("cuda", number)]


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
def test_an_automatic_dtype_is_the_stored_one(ternary, tmp_path, name):
    copy.deepcopy(ternary[0]).to(torch.bfloat16).save_pretrained(tmp_path)
    assert FluxTransformer2DModel.from_pretrained(tmp_path, **{name: "auto"}).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("name", "value"),
    [("dtype", "half"), ("torch_dtype", {"default": torch.float16}), ("device_map", "auto"), ("device_map", "nowhere"),
     ("device_map", {"a": "cpu", "b": "meta"}), ("device_map", {"": "disk"})],
)  # fmt: skip
def test_dtypes_and_devices_that_cannot_be_are_named(ternary, name, value):
    with pytest.raises(ValueError) as caught:
        FluxTransformer2DModel.from_pretrained(ternary[1], **{name: value})
    assert str(caught.value).startswith(f"{name.removeprefix('torch_')}={value!r} is not supported: name ")


def test_loading_from_the_cache_of_the_hub(ternary, tmp_path):
    model, folder = ternary
    repository = tmp_path / "models--someone--packed"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs/main").write_text("a" * 40)
    shutil.copytree(folder, repository / "snapshots" / ("a" * 40) / "transformer")
    loaded = FluxTransformer2DModel.from_pretrained(
        "someone/packed", subfolder="transformer", cache_dir=tmp_path, local_files_only=True
    )
    assert same_parameters(loaded, model)


def test_a_copy_is_the_same_and_its_own(ternary):
    model, _ = ternary
    twin = copy.deepcopy(model)
    assert same_parameters(twin, model)
    expected = output(model)
    assert torch.equal(output(twin), expected)
    for parameter in twin.parameters():
        parameter.data.zero_()
    assert torch.equal(output(model), expected)


@both
def test_casting_leaves_codes_and_step_sizes_alone(ternary):
    model, folder = ternary
    loaded = load_transformer(folder, torch_dtype=torch.bfloat16)
    for cast in (copy.deepcopy(model).to(torch.bfloat16), copy.deepcopy(model).bfloat16(), loaded):
        assert cast.dtype == torch.bfloat16
        original = dict(model.named_parameters())
        for name, parameter in cast.named_parameters():
            if name.endswith(("weight_codes", "weight_clip_val")):
                assert parameter.dtype == (torch.uint8 if name.endswith("codes") else torch.float32)
                assert torch.equal(parameter, original[name])
            else:
                assert torch.equal(parameter, original[name].bfloat16()), name
        # With a bias or without: adapters take their dtype from here.
        assert {layer.weight.dtype for layer in packed_layers(cast).values()} == {torch.bfloat16}
        assert torch.equal(output(cast, torch.bfloat16), output(loaded, torch.bfloat16))
    assert output(loaded, torch.bfloat16).dtype == torch.bfloat16
    assert {layer.weight.dtype for layer in packed_layers(model).values()} == {torch.float32}
    assert same_parameters(load_transformer(folder, torch_dtype=None), model)


@both
def test_a_model_cast_before_it_is_packed_computes_the_same(pipeline_folder, tmp_path):
    model = student(pipeline_folder, w_bits=0).to(torch.bfloat16)
    expected = output(model, torch.bfloat16)
    model.pack().save_pretrained(tmp_path)
    loaded = load_transformer(tmp_path, torch_dtype="auto")
    assert loaded.dtype == torch.bfloat16
    for each in (model, loaded):
        assert {layer.weight.dtype for layer in packed_layers(each).values()} == {torch.bfloat16}
        assert torch.equal(output(each, torch.bfloat16), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(output(loaded, torch.bfloat16), expected)


def test_without_a_dtype_a_model_is_loaded_as_diffusers_loads_it(pipeline_folder, tmp_path):
    """So that a pipeline and its packed transformer, both loaded without one, fit together."""
    student(pipeline_folder, w_bits=0).to(torch.bfloat16).pack().save_pretrained(tmp_path / "packed")
    plain = diffusers.FluxTransformer2DModel.from_pretrained(pipeline_folder / "transformer")
    plain.to(torch.bfloat16).save_pretrained(tmp_path / "plain")
    loaded = FluxTransformer2DModel.from_pretrained(tmp_path / "packed")
    assert loaded.dtype == diffusers.FluxTransformer2DModel.from_pretrained(tmp_path / "plain").dtype == torch.float32
    assert draw(diffusers.FluxPipeline.from_pretrained(pipeline_folder, transformer=loaded), "latent").isfinite().all()


@both
def test_a_state_dict_goes_into_another_model(ternary):
    model, _ = ternary
    state = model.state_dict()
    for name, layer in packed_layers(model).items():
        # Looked up by diffusers; of no shape that a layer could take for a weight.
        assert state[f"{name}.weight"].tolist() == [layer.out_features, layer.in_features, layer.w_bits]
    other = type(model).from_config(model.config)
    assert set(packed_layers(other)) == set(packed_layers(model))
    keys = set(state)
    other.load_state_dict(state)
    assert set(state) == keys
    assert same_parameters(other, model)
    assert torch.equal(output(other), output(model))
    codes = next(name for name in state if name.endswith("weight_codes"))
    with pytest.raises(RuntimeError, match=codes):
        other.load_state_dict({name: tensor for name, tensor in state.items() if name != codes})


@both
def test_a_compiled_model_computes_the_same(ternary):
    model = copy.deepcopy(ternary[0])
    expected = output(model)
    torch._dynamo.reset()
    try:
        assert torch.equal(output(torch.compile(model, backend="aot_eager")), expected)
    finally:
        torch._dynamo.reset()


@both
def test_a_model_offloaded_by_accelerate_computes_the_same(ternary):
    expected = output(ternary[0])
    model = accelerate.cpu_offload(copy.deepcopy(ternary[0]), execution_device=torch.device("cpu"))
    assert all(layer.weight_codes.is_meta for layer in packed_layers(model).values())
    assert torch.equal(output(model), expected)
    assert all(layer.weight_codes.is_meta for layer in packed_layers(model).values())
    model, hook = accelerate.cpu_offload_with_hook(copy.deepcopy(ternary[0]), torch.device("cpu"))
    assert torch.equal(output(model), expected)
    hook.offload()
    assert same_parameters(model, ternary[0])


LOAD_AND_MEASURE = """
    import sys
    from models.modeling_flux_quant import FluxTransformer2DModel

    def resident(key):
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith(key))

    FluxTransformer2DModel.from_pretrained(sys.argv[1])  # a small one: what is imported on the way is not counted
    for folder in sys.argv[2:]:
        for settings in ({"torch_dtype": "auto"}, {}):  # bfloat16, as stored; float32
            with open("/proc/self/clear_refs", "w") as file:
                file.write("5")  # the peak counts from here
            before = resident("VmRSS")
            model = FluxTransformer2DModel.from_pretrained(folder, **settings)
            size = sum(p.numel() * p.element_size() for p in model.parameters())
            print(model.dtype, resident("VmHWM") - before, size)
            del model
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads peak memory from /proc")
def test_loading_never_has_a_dense_weight_in_memory(ternary, tmp_path, run):
    folders, dense = [], []
    torch.manual_seed(0)
    bytes_of_codes = as_bytes([reference_planes(codes, 0) for codes in itertools.product((-1, 0, 1), repeat=4)])[:, 0]
    for w_bits in (0, 4):
        with torch.device("meta"):
            model = FluxTransformer2DModel(
                num_layers=0, num_single_layers=1, attention_head_dim=128, num_attention_heads=12, in_channels=16,
                joint_attention_dim=32, pooled_projection_dim=32, w_bits=w_bits, packed=packing.FORMAT,
            )  # fmt: skip
        model.to_empty(device="cpu")
        for name, parameter in model.named_parameters():
            if name.endswith("weight_codes"):
                values = torch.randint(0, 81 if w_bits == 0 else 256, parameter.shape, dtype=torch.uint8)
                parameter.data = bytes_of_codes[values.int()] if w_bits == 0 else values
            else:
                parameter.data.fill_(1e-3)
        folders.append(tmp_path / str(w_bits))
        model.to(torch.bfloat16).save_pretrained(folders[-1])
        dense = [4 * layer.in_features * layer.out_features for layer in packed_layers(model).values()]
    try:
        # What is freed goes back at once, or the peak would depend on what malloc has kept of the load before.
        malloc = {"MALLOC_MMAP_THRESHOLD_": "1000000", "MALLOC_ARENA_MAX": "1"}
        result = run("-c", textwrap.dedent(LOAD_AND_MEASURE), ternary[1], *folders, PYTHONPATH=".", **malloc)
    finally:
        shutil.rmtree(tmp_path)
    assert result.returncode == 0, result.stderr
    assert sum(dense) > 140e6 and max(dense) > 45e6
    for line in result.stdout.splitlines():
        dtype, peak, size = line.split()
        peak, size = int(peak), int(size)
        # Half of this goes into looking for NaN in the largest weight that is not quantized, norm_out's.
        assert peak - size < 0.75 * max(dense), result.stdout
        if dtype == "torch.bfloat16":  # in float32 what is not quantized alone comes near to that here
            assert peak < sum(dense) / 2, result.stdout


@pytest.mark.parametrize("w_bits", [0, 1, 3, 8])
def test_packing_and_unpacking_for_the_disk_need_little_memory(w_bits):
    rows, columns = 8000, 5000  # 40 million codes, and as many bytes if all were unpacked at a time
    if w_bits:
        stored = torch.randint(0, 256, (rows, packing.row_bytes(columns, w_bits)), dtype=torch.uint8)
    else:
        stored = torch.tensor(sorted(VALID), dtype=torch.uint8)[torch.randint(0, 243, (rows, columns // 5))]
    with bounded(peak=packing.row_bytes(columns, w_bits) * rows + 20e6):
        memory = packing.from_disk(stored, w_bits, columns)
    with bounded(peak=packing.disk_row_bytes(columns, w_bits) * rows * 2 + 20e6):  # the chunks, and put together
        assert torch.equal(packing.to_disk(memory, w_bits, columns), stored)


@pytest.mark.parametrize("w_bits", BITS)
def test_decoding_waits_for_no_device(w_bits):
    """On the meta device there is nothing to wait for: a question to the host would be an error."""
    stored = torch.empty(7, packing.disk_row_bytes(1001, w_bits), dtype=torch.uint8, device="meta")
    packed, wrong = packing.decode(stored, w_bits, 1001)
    assert packed.shape == (7, packing.row_bytes(1001, w_bits)) and packed.dtype == torch.uint8
    assert wrong.shape == (len(packing.PROBLEMS),) and wrong.is_meta


def test_loading_leaves_the_number_of_threads_as_it_was(ternary, tmp_path):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        FluxTransformer2DModel.from_pretrained(ternary[1])
        assert torch.get_num_threads() == 2
        shutil.copytree(ternary[1], tmp_path, dirs_exist_ok=True)
        next(tmp_path.glob("*.safetensors")).write_bytes(b"")
        with pytest.raises(ValueError, match="damaged"):
            FluxTransformer2DModel.from_pretrained(tmp_path)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


# What a packed model cannot do


@pytest.mark.parametrize("kind", ["weight", "weight_clip_val"])
def test_numbers_that_are_none_are_not_packed(pipeline_folder, kind):
    model = student(pipeline_folder, w_bits=0)
    model.transformer_blocks[0].attn.to_k.get_parameter(kind).data[1, 0] = torch.nan  # as a diverged training leaves it
    with pytest.raises(ValueError, match="transformer_blocks.0.attn.to_k: .*NaN or inf"):
        model.pack()
    # A model that was left half packed would be saved as if it were whole.
    assert not packed_layers(model)
    assert model.config.packed == 0
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_packed_model_starts_frozen_and_its_codes_get_no_gradient(ternary):
    model, folder = ternary
    loaded, built = FluxTransformer2DModel.from_pretrained(folder), FluxTransformer2DModel.from_config(model.config)
    for each in (model, loaded, built):
        assert not any(module.training for module in each.modules())
        assert not any(parameter.requires_grad for parameter in each.parameters())
        with pytest.raises(ValueError, match="^codes cannot be trained: .* train an adapter on top"):
            each.requires_grad_()
        assert each.requires_grad_(False) is each
    assert built.train() is built and all(module.training for module in built.modules())
    layer = PackedLinear.from_codes(torch.ones(2, 3, dtype=torch.int8), torch.ones(2, 1), None, 0)
    layer.weight_clip_val.requires_grad_()
    with pytest.raises(ValueError, match="cannot be written to or trained"):
        layer(torch.ones(1, 3))
    with pytest.raises(ValueError, match="cannot be written to or trained"):
        layer.requires_grad_()
    assert layer.requires_grad_(False) is layer
    with pytest.raises(RuntimeError, match="floating point"):
        layer.weight_codes.requires_grad_()


def test_a_full_precision_model_is_not_packed(pipeline_folder):
    model = FluxTransformer2DModel.from_pretrained(pipeline_folder / "transformer")
    with pytest.raises(ValueError, match=r"pack\(\): w_bits=16 has no codes"):
        model.pack()
    assert not packed_layers(model)
    assert model.config.packed == 0
    with pytest.raises(ValueError, match="packed=1 with w_bits=16, lora_r=2"):
        FluxTransformer2DModel(packed=1, lora_r=2)


def test_packing_twice_changes_nothing(ternary):
    model, folder = ternary
    for each in (copy.deepcopy(model), FluxTransformer2DModel.from_pretrained(folder)):
        assert each.pack() is each
        assert same_parameters(each, model)


@pytest.mark.parametrize(
    ("key", "value", "stored"),
    [("w_bits", 2, 0), ("w_bits", 16, 0), ("lora_r", 4, 0), ("weight_layerwise", True, False), ("packed", 0, 1)],
)
def test_settings_that_contradict_the_packed_checkpoint_are_named(ternary, key, value, stored):
    match = f"asked for {key}={value} but .* with {key}={stored}; leave {key} out"
    with pytest.raises(ValueError, match=match) as info:
        FluxTransformer2DModel.from_pretrained(ternary[1], **{key: value})
    assert "\n" not in str(info.value)
    assert same_parameters(FluxTransformer2DModel.from_pretrained(ternary[1], **{key: stored}), ternary[0])


@both
def test_nothing_is_fused_into_codes(ternary):
    with pytest.raises(ValueError, match="cannot merge an adapter into quantized weights"):
        ternary[0].fuse_lora()
    with pytest.raises(ValueError, match="would drop the quantizers"):
        ternary[0].fuse_qkv_projections()


# Adapters made for the plain model


@pytest.fixture(scope="module")
def adapters(base, tmp_path_factory):
    """Folders of two LoRAs, trained, as it were, on the stock transformer."""
    peft = pytest.importorskip("peft")
    folders = []
    targets = ["to_q", "to_k", "to_v", "to_out.0", "proj_mlp", "proj_out", "norm.linear", "add_k_proj", "ff.net.2"]
    if isinstance(base, diffusers.Flux2KleinPipeline):
        targets[4:7] = ["to_qkv_mlp_proj", "single_transformer_blocks.0.attn.to_out", "single_stream_modulation.linear"]
        targets[-1] = "ff.linear_out"
    for seed, modules in enumerate((targets[:7], targets[3:])):
        torch.manual_seed(seed)
        transformer = copy.deepcopy(base.transformer)
        config = peft.LoraConfig(r=4 + seed, lora_alpha=8, init_lora_weights=False, target_modules=modules)
        transformer.add_adapter(config)
        folders.append(tmp_path_factory.mktemp("adapter"))
        base.save_lora_weights(
            folders[-1],
            transformer_lora_layers=peft.utils.get_peft_model_state_dict(transformer),
            transformer_lora_adapter_metadata=config.to_dict() | {"target_modules": modules} if seed else None,
        )
    return folders


@pytest.mark.parametrize(
    ("pipeline_folder", "w_bits"), [("FLUX.1", 0), ("FLUX.1", 3), ("FLUX.2", 0)], indirect=["pipeline_folder"]
)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_adapters_of_the_plain_model_work_on_the_packed_one(pipeline_folder, base, adapters, tmp_path, w_bits, dtype):
    packed = student(pipeline_folder, w_bits=w_bits).pack().to(dtype)
    plain = copy.deepcopy(base.transformer).to(dtype)
    for name, layer in packed_layers(packed).items():
        plain.get_submodule(name).weight.data = layer.dequantize(dtype)
    pipes = [
        load_pipeline(pipeline_folder, torch_dtype=dtype, transformer=transformer) for transformer in (packed, plain)
    ]

    def latents():
        ours, expected = (draw(pipe, "latent").float() for pipe in pipes)
        assert expected.isfinite().all()
        assert torch.equal(ours, expected)
        return ours

    drawn = [latents()]
    for pipe in pipes:
        pipe.load_lora_weights(adapters[0], adapter_name="one")
    drawn.append(latents())
    for pipe in pipes:
        pipe.load_lora_weights(adapters[1], adapter_name="two")
        pipe.set_adapters(["one", "two"], [0.7, 0.4])
    drawn.append(latents())
    for pipe in pipes:
        pipe.set_adapters("two")
    drawn.append(latents())
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(drawn, 2))
    with pytest.raises(ValueError, match="cannot merge an adapter into quantized weights"):
        pipes[0].fuse_lora()
    for pipe in pipes:
        pipe.unload_lora_weights()
    assert torch.equal(latents(), drawn[0])
    packed.save_pretrained(tmp_path)
    assert same_parameters(load_transformer(tmp_path, torch_dtype="auto"), packed)


@both
def test_loading_an_adapter_dequantizes_nothing(pipeline_folder, adapters, monkeypatch):
    packed = student(pipeline_folder, w_bits=0).pack()
    pipe = load_pipeline(pipeline_folder, transformer=packed)
    monkeypatch.setattr(kernels, "dequantize", None)
    for name, folder in zip(("one", "two"), adapters, strict=True):
        pipe.load_lora_weights(folder, adapter_name=name)
    assert pipe.get_list_adapters()["transformer"] == ["one", "two"]


@pytest.fixture(params=["packed", "trainable", "LoRA inside"])
def quantized(request, pipeline_folder):
    """A fresh model, as if trained."""
    model = student(pipeline_folder, w_bits=0, lora_r=2 if request.param == "LoRA inside" else 0, lora_alpha=4.0)
    return model.pack() if request.param == "packed" else model


def plain_twin(model, base):
    """The stock model that multiplies with the same weights."""
    plain = copy.deepcopy(base.transformer)
    for name, layer in model.named_modules():
        if isinstance(layer, PackedLinear):
            plain.get_submodule(name).weight.data = layer.dequantize()
        elif isinstance(layer, QuantizeLinear):
            plain.get_submodule(name).weight.data = layer.quantized_weight().detach()
    return plain


TARGETS = ["to_q", "proj_mlp", "add_k_proj"]
METHODS = {
    "LoRA": ("LoraConfig", {"r": 2, "init_lora_weights": False}),
    "DoRA": ("LoraConfig", {"r": 2, "use_dora": True}),
    "LoKr": ("LoKrConfig", {"r": 2}),
    "LoHa": ("LoHaConfig", {"r": 2}),
    "IA3": ("IA3Config", {"feedforward_modules": []}),
    "OFT": ("OFTConfig", {"r": 0, "oft_block_size": 8}),
    "HRA": ("HRAConfig", {"r": 2}),
}


def adapted(model, method):
    """The model in PEFT's hands, its adapter random."""
    peft = pytest.importorskip("peft")
    name, settings = METHODS[method]
    torch.manual_seed(0)
    model = peft.get_peft_model(model, getattr(peft, name)(target_modules=TARGETS, **settings))
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model


@pytest.mark.parametrize("method", METHODS)
def test_peft_adapts_it_as_it_does_the_plain_model_and_merges_nothing(quantized, base, method):
    before, parameters = output(quantized), copy.deepcopy(dict(quantized.named_parameters()))
    expected = output(adapted(plain_twin(quantized, base), method))
    model = adapted(quantized, method)
    assert not torch.allclose(expected, before, rtol=0.01)
    torch.testing.assert_close(output(model), expected, rtol=1e-4, atol=1e-4)
    for merge in (model.merge_adapter, model.merge_and_unload, lambda: model.merge_and_unload(safe_merge=True)):
        with pytest.raises(ValueError, match="^the weight of a quantized layer .* leave adapters unmerged"):
            merge()
    torch.testing.assert_close(output(model), expected, rtol=1e-4, atol=1e-4)
    model = model.unload()
    assert torch.equal(output(model), before)
    assert all(torch.equal(parameter, parameters[name]) for name, parameter in model.named_parameters())


def test_a_dora_file_is_loaded_as_onto_the_plain_model(quantized, base, pipeline_folder, tmp_path):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    plain = plain_twin(quantized, base)
    source = copy.deepcopy(plain)
    settings = {"r": 2, "lora_alpha": 2, "target_modules": TARGETS, "init_lora_weights": False}
    source.add_adapter(peft.LoraConfig(use_dora=True, **settings))
    layers = peft.utils.get_peft_model_state_dict(source)
    assert any("magnitude" in name for name in layers)
    diffusers.FluxPipeline.save_lora_weights(tmp_path, transformer_lora_layers=layers)
    before, outputs = output(quantized), []
    for model in (plain, quantized):
        pipe = diffusers.FluxPipeline.from_pretrained(pipeline_folder, transformer=model)
        pipe.load_lora_weights(tmp_path)
        outputs.append(output(model))
    assert not torch.allclose(outputs[0], before, rtol=0.01)
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(outputs[0], output(source), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_2", "olora"])
def test_adapters_that_start_by_changing_the_weight_are_refused(quantized, start):
    peft = pytest.importorskip("peft")
    before = output(quantized)
    with pytest.raises(ValueError, match="cannot be written to"):
        peft.get_peft_model(quantized, peft.LoraConfig(r=2, target_modules=TARGETS, init_lora_weights=start))
    assert torch.equal(output(quantized), before)


def test_adapters_are_not_fused(quantized):
    peft = pytest.importorskip("peft")
    quantized.add_adapter(peft.LoraConfig(r=2, target_modules=TARGETS, init_lora_weights=False))
    before = output(quantized)
    with pytest.raises(ValueError, match="cannot merge an adapter into quantized weights: leave it unfused"):
        quantized.fuse_lora()
    with pytest.raises(ValueError, match="leave adapters unmerged"):
        quantized.transformer_blocks[0].attn.to_q.merge()
    assert torch.equal(output(quantized), before)


def losses(model, checkpointing=False):
    """Of thirty steps from another model's velocities, by diffusers' own training scripts' way."""
    target, model = torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(3)), model.train()
    given = inputs(model.config)
    if checkpointing:
        model.enable_gradient_checkpointing()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer, result = torch.optim.AdamW(trained, lr=1e-2), []
    for _ in range(30):
        loss = (model(**given)[0] - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        result.append(loss.item())
    return torch.tensor(result)


@both
@pytest.mark.parametrize("wrap", ["add_adapter", "get_peft_model"])
def test_a_lora_is_trained_on_packed_codes_as_on_the_plain_model(ternary, base, wrap):
    peft = pytest.importorskip("peft")
    twin, curves = plain_twin(ternary[0], base), []
    for model, checkpointing in ((twin, False), (ternary[0], False), (ternary[0], True)):
        model = copy.deepcopy(model).requires_grad_(False)
        torch.manual_seed(0)
        targets = ["to_q", "ff.net.2", "ff.linear_out", "to_qkv_mlp_proj"]
        config = peft.LoraConfig(r=4, lora_alpha=4, init_lora_weights="gaussian", target_modules=targets)
        inner, before = model, {name: p.clone() for name, p in model.named_parameters()}
        if wrap == "add_adapter":
            model.add_adapter(config)
        else:
            model = peft.get_peft_model(model, config)
        assert all("lora_" in name for name, parameter in inner.named_parameters() if parameter.requires_grad)
        inner.enable_gradient_checkpointing() if checkpointing else None
        curves.append(losses(model))
        after = {name.replace(".base_layer", ""): p for name, p in inner.named_parameters() if "lora_" not in name}
        assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    plain, packed, checkpointed = curves
    assert plain[-1] < 0.8 * plain[0]
    torch.testing.assert_close(packed, plain, rtol=1e-3, atol=0)
    torch.testing.assert_close(checkpointed, packed, rtol=1e-5, atol=0)


def test_backward_keeps_codes_and_no_weights(ternary):
    layer = ternary[0].transformer_blocks[0].ff.net[2]
    kept, x = [], torch.randn(3, layer.in_features, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        y = layer(x)
        z = nn.functional.linear(x, layer.weight, layer.bias)
    (first,), (second,) = torch.autograd.grad(y.sum(), x), torch.autograd.grad(z.sum(), x)
    torch.testing.assert_close(first, layer.dequantize().sum(0).expand(3, -1))
    torch.testing.assert_close(second, first)
    assert any(tensor is layer.weight_codes for tensor in kept)
    dense = [tensor for tensor in kept if type(tensor) in (torch.Tensor, nn.Parameter) and tensor is not x]
    assert sum(tensor.nbytes for tensor in dense) < layer.in_features * layer.out_features


# In the hands of other libraries


def test_ordinary_layers_do_not_take_its_state_dict(quantized, base):
    plain = copy.deepcopy(base.transformer)
    for strict, assign in itertools.product((True, False), repeat=2):
        with pytest.raises(ValueError, match=r"^transformer_blocks.0.* is quantized \(w_bits=0\): an ordinary layer"):
            plain.load_state_dict(quantized.state_dict(), strict=strict, assign=assign)
    shape = {"num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2}
    with pytest.raises(ValueError, match="is quantized"):
        diffusers.FluxControlNetModel.from_transformer(quantized, **shape)
    diffusers.FluxControlNetModel.from_transformer(plain, **shape)
    twin, before = copy.deepcopy(quantized), output(quantized)
    for tensor in twin.state_dict().values():
        if tensor.is_floating_point():
            tensor.zero_()
    twin.load_state_dict(quantized.state_dict())
    assert torch.equal(output(twin), before)
    in_file = quantized.transformer_blocks[0].attn.to_q.state_dict()  # which says nothing of its kind
    if quantized.config.packed:
        with pytest.raises(RuntimeError, match="size mismatch for weight"):
            plain.transformer_blocks[0].attn.to_q.load_state_dict(dict(in_file), strict=False)


def test_another_weight_is_not_loaded_into_codes(ternary):
    model = copy.deepcopy(ternary[0])
    name = "transformer_blocks.0.attn.to_q.weight"
    for change in (lambda t: torch.zeros(32, 32), lambda t: t + 1):
        state = model.state_dict()
        state[name] = change(state[name])
        with pytest.raises(ValueError, match=f"^{name}: codes take no other weight"):
            model.load_state_dict(state)
    assert same_parameters(model, ternary[0])


def test_codes_of_other_bits_are_not_loaded(pipeline_folder, ternary):
    other = student(pipeline_folder, w_bits=2).pack()  # in bytes of the same number
    one, two = ([layer.weight_codes.shape for layer in packed_layers(model).values()] for model in (ternary[0], other))
    assert one == two
    for state in (ternary[0].state_dict(), dict(ternary[0].state_dict())):
        with pytest.raises(ValueError, match="weight: codes take no other weight"):
            other.load_state_dict(state)


def test_files_of_its_state_dict_are_as_small_as_the_codes_and_come_back(ternary, tmp_path):
    model, _ = ternary
    size = sum(parameter.nbytes for parameter in model.parameters())
    save_file(model.state_dict(), tmp_path / "a.safetensors")
    save_model(model, str(tmp_path / "b.safetensors"))
    torch.save(model.state_dict(), tmp_path / "c.pt")
    for load in (
        lambda twin: twin.load_state_dict(load_file(tmp_path / "a.safetensors")),
        lambda twin: load_model(twin, tmp_path / "b.safetensors"),
        lambda twin: twin.load_state_dict(torch.load(tmp_path / "c.pt", weights_only=True)),
    ):
        twin = FluxTransformer2DModel.from_config(model.config)
        load(twin)
        assert same_parameters(twin, model)
    for file in ("a.safetensors", "b.safetensors"):
        assert (tmp_path / file).stat().st_size < size + 20000  # names, and three integers a layer


def test_accelerate_saves_and_restores_it(ternary, tmp_path):
    size = sum(parameter.nbytes for parameter in ternary[0].parameters())
    accelerator = accelerate.Accelerator(cpu=True)
    model = accelerator.prepare_model(copy.deepcopy(ternary[0]), evaluation_mode=True)
    accelerator.save_model(model, tmp_path / "model")
    twin = copy.deepcopy(ternary[0])
    twin.load_state_dict(load_file(tmp_path / "model/model.safetensors"))
    assert same_parameters(twin, ternary[0])
    for safe in (True, False):
        accelerator = accelerate.Accelerator(cpu=True)
        model = accelerator.prepare(copy.deepcopy(ternary[0]))
        accelerator.save_state(tmp_path / str(safe), safe_serialization=safe)
        for parameter in model.parameters():
            parameter.data.zero_()
        accelerator.load_state(tmp_path / str(safe))
        assert same_parameters(model, ternary[0])
    assert (tmp_path / "model/model.safetensors").stat().st_size < size + 20000


def test_a_model_offloaded_to_disk_computes_the_same(quantized, tmp_path):
    expected, size = output(quantized), sum(parameter.nbytes for parameter in quantized.parameters())
    model = accelerate.disk_offload(quantized, tmp_path, execution_device=torch.device("cpu"))
    torch.testing.assert_close(output(model), expected)
    assert sum(file.stat().st_size for file in tmp_path.glob("*.dat")) < size + 2000


def test_a_model_offloaded_with_its_buffers_computes_the_same(quantized):
    for _ in range(2):
        expected, model = output(quantized), copy.deepcopy(quantized)
        model = accelerate.cpu_offload(model, execution_device=torch.device("cpu"), offload_buffers=True)
        torch.testing.assert_close(output(model), expected)
        for layer in quantized.modules():
            layer.freeze_codes() if isinstance(layer, QuantizeLinear) else None


def test_a_quantizer_of_another_library_is_refused(ternary, pipeline_folder, tmp_path):
    quantization = diffusers.BitsAndBytesConfig(load_in_8bit=True)
    for folder, settings in ((ternary[1], {}), (pipeline_folder / "transformer", {"w_bits": 0})):
        with pytest.raises(ValueError, match="quantization_config does not go with"):
            FluxTransformer2DModel.from_pretrained(folder, quantization_config=quantization, **settings)
        copied = shutil.copytree(folder, tmp_path / folder.name)
        config = json.loads((copied / "config.json").read_text()) | {"quantization_config": {"quant_method": "other"}}
        (copied / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match="quantization_config does not go with"):
            FluxTransformer2DModel.from_pretrained(copied, **settings)


# Folders


def empty_or_missing(folder):
    return not folder.exists() or not any(folder.iterdir())


@pytest.mark.parametrize("wrap", ["add_adapter", "get_peft_model", "IP-Adapter"])
def test_a_model_with_an_adapter_is_not_saved(quantized, tmp_path, wrap):
    if wrap == "IP-Adapter":
        processor = FluxIPAdapterAttnProcessor(hidden_size=32, cross_attention_dim=32)
        quantized.transformer_blocks[0].attn.set_processor(processor)
    else:
        peft = pytest.importorskip("peft")
        config = peft.LoraConfig(r=2, target_modules=["to_q"])
        quantized.add_adapter(config) if wrap == "add_adapter" else peft.get_peft_model(quantized, config)
    with pytest.raises(ValueError, match=r"^save_pretrained\(\): .* save and unload them first$"):
        quantized.save_pretrained(tmp_path / "folder")
    assert empty_or_missing(tmp_path / "folder")


@pytest.mark.parametrize("remove", ["delete_adapters", "unload_lora"])
def test_once_its_adapters_are_gone_it_is_saved(quantized, tmp_path, remove):
    peft = pytest.importorskip("peft")
    expected = output(quantized)
    for name in ("one", "two"):
        quantized.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False), name)
    if remove == "unload_lora":
        quantized.unload_lora()
    else:
        quantized.delete_adapters("one")
        with pytest.raises(ValueError, match="unload them first"):
            quantized.save_pretrained(tmp_path)
        quantized.delete_adapters("two")
    quantized.save_pretrained(tmp_path)
    loaded = FluxTransformer2DModel.from_pretrained(tmp_path)
    assert same_parameters(loaded, quantized)
    torch.testing.assert_close(output(loaded), expected)


def test_what_the_config_does_not_describe_is_not_saved(quantized, tmp_path):
    # As Control LoRAs widen it: diffusers writes the new width beside the config's entries.
    quantized.x_embedder = nn.Linear(32, 32)
    with pytest.raises(ValueError, match="x_embedder.weight is not what this model's config describes"):
        quantized.save_pretrained(tmp_path / "folder")
    assert empty_or_missing(tmp_path / "folder")


@both
def test_other_classes_do_not_read_its_folder(quantized, base, tmp_path):
    quantized.save_pretrained(tmp_path)
    kind = type(quantized)
    for reader in (type(base.transformer), diffusers.AutoModel):
        for folder in (tmp_path, SHIPPED) if kind is FluxTransformer2DModel else (tmp_path,):
            match = rf"flux-1.58bit \(to be loaded with {kind.__module__}.{kind.__name__}\)"
            with pytest.raises(ValueError, match=match):
                reader.from_pretrained(str(folder))
    assert "quantization_config" not in kind.from_pretrained(tmp_path).config


def test_a_full_precision_folder_stays_one_for_every_class(pipeline_folder, tmp_path):
    FluxTransformer2DModel.from_pretrained(pipeline_folder / "transformer").save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    assert type(diffusers.AutoModel.from_pretrained(str(tmp_path))) is diffusers.FluxTransformer2DModel


def test_a_packed_model_remembers_what_it_is_whatever_it_was_made_with(pipeline_folder):
    model = FluxTransformer2DModel(**SMALL, w_bits=0).pack()
    again = FluxTransformer2DModel.from_config(model.config)
    assert (again.config.packed, again.config.w_bits) == (packing.FORMAT, 0)
    assert set(packed_layers(again)) == set(packed_layers(model))


def test_variants_lie_beside_each_other(quantized, tmp_path):
    quantized.save_pretrained(tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    other = copy.deepcopy(quantized).to(torch.bfloat16)
    for _ in range(2):
        other.save_pretrained(tmp_path, variant="bf16", max_shard_size="5KB")
    assert all((tmp_path / name).read_bytes() == before[name] for name in before)
    assert all(".bf16" in file.name for file in tmp_path.iterdir() if file.name not in before)
    for variant, model in ((None, quantized), ("bf16", other)):
        loaded = FluxTransformer2DModel.from_pretrained(tmp_path, variant=variant, dtype=model.dtype)
        assert same_parameters(loaded, model)
    with pytest.raises((ValueError, OSError), match="fp16"):
        FluxTransformer2DModel.from_pretrained(tmp_path, variant="fp16")


def test_a_pipeline_saves_it_as_one_of_its_variants(quantized, base, tmp_path):
    base.save_pretrained(tmp_path)
    weights = tmp_path / "transformer/diffusion_pytorch_model.safetensors"
    before = weights.read_bytes()
    pipe = diffusers.FluxPipeline(**base.components | {"transformer": quantized})
    pipe.save_pretrained(tmp_path, variant="mine")
    assert weights.read_bytes() == before
    again = diffusers.FluxPipeline.from_pretrained(tmp_path, variant="mine")
    assert same_parameters(again.transformer, quantized)


def test_other_ranks_write_nothing(ternary, tmp_path):
    ternary[0].save_pretrained(tmp_path / "folder", is_main_process=False)
    assert empty_or_missing(tmp_path / "folder")


def test_arguments_are_those_of_diffusers_and_none_is_swallowed(quantized, tmp_path):
    ours, theirs = (
        inspect.signature(cls.save_pretrained).parameters for cls in (FluxTransformer2DModel, diffusers.ModelMixin)
    )
    assert list(ours) == list(theirs)
    assert {name for name in ours if ours[name].default != theirs[name].default} == {"max_shard_size"}
    for settings in ({"safe_serialization": False}, {"use_flashpack": True}):
        with pytest.raises(ValueError, match="saved as safetensors only"):
            quantized.save_pretrained(tmp_path / "folder", **settings)
    with pytest.raises(TypeError, match=r"save_pretrained\(\) got an unexpected keyword argument 'varient'"):
        quantized.save_pretrained(tmp_path / "folder", varient="bf16")
    assert empty_or_missing(tmp_path / "folder")
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="file is a file; name a folder"):
        quantized.save_pretrained(tmp_path / "file")
    quantized.save_pretrained(tmp_path / "folder")
    with pytest.raises(TypeError, match=r"from_pretrained\(\) got an unexpected keyword argument 'w_bit'"):
        FluxTransformer2DModel.from_pretrained(tmp_path / "folder", w_bit=0)
    with pytest.raises(ValueError, match="use_safetensors=False is not supported"):
        FluxTransformer2DModel.from_pretrained(tmp_path / "folder", use_safetensors=False)
    with pytest.raises(ValueError, match="num_layers=2|does? not belong|is missing"):
        FluxTransformer2DModel.from_pretrained(tmp_path / "folder", num_layers=2)
    FluxTransformer2DModel.from_pretrained(tmp_path / "folder", num_layers=1, low_cpu_mem_usage=True, max_memory=None)


@pytest.mark.parametrize("push", ["save_pretrained", "push_to_hub"])
def test_it_is_uploaded_whole(quantized, tmp_path, monkeypatch, push):
    calls = []

    def upload_folder(repo_id, folder_path, token, commit_message, create_pr, path_in_repo):
        loaded = FluxTransformer2DModel.from_pretrained(folder_path, variant="mine")
        calls.append((repo_id, token, commit_message, create_pr, same_parameters(loaded, quantized)))

    def create_repo(repo_id, private=None, token=None, exist_ok=False):
        return types.SimpleNamespace(repo_id=f"someone/{repo_id}" if private else "")

    card = types.SimpleNamespace(save=lambda file: None)
    for module in (hub_utils, modeling_utils):
        monkeypatch.setattr(module, "create_repo", create_repo)
        monkeypatch.setattr(module, "load_or_create_model_card", lambda *_, **__: card)
        monkeypatch.setattr(module, "populate_model_card", lambda card: card)
    monkeypatch.setattr(hub_utils, "upload_folder", upload_folder)
    settings = {"private": True, "token": "secret", "commit_message": "all of it", "create_pr": True, "variant": "mine"}
    if push == "save_pretrained":
        quantized.save_pretrained(tmp_path / "folder", push_to_hub=True, repo_id="mine", **settings)
        loaded = FluxTransformer2DModel.from_pretrained(tmp_path / "folder", variant="mine")
        assert same_parameters(loaded, quantized)
    else:
        quantized.push_to_hub("mine", **settings)
    assert calls == [("someone/mine", "secret", "all of it", True, True)]


def test_what_leads_from_one_pipeline_to_another(quantized, base):
    pipe = diffusers.FluxPipeline(**base.components | {"transformer": quantized})
    assert diffusers.FluxImg2ImgPipeline(**pipe.components).transformer is quantized
    assert diffusers.AutoPipelineForImage2Image.from_pipe(pipe).transformer is quantized
    assert diffusers.FluxImg2ImgPipeline.from_pipe(pipe, transformer=quantized).transformer is quantized


# Damage
#
# The model is as small as one can be, with rows that need padding: six columns, or 24.

SMALL = {
    "in_channels": 3, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 6, "num_attention_heads": 1,
    "joint_attention_dim": 5, "pooled_projection_dim": 4, "axes_dims_rope": (2, 2, 2),
}  # fmt: skip
CODES = "transformer_blocks.0.attn.to_k.weight_codes"
STEPS = "transformer_blocks.0.attn.to_k.weight_clip_val"
BIAS = "transformer_blocks.0.attn.to_k.bias"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """By bit width, a packed model and the files of its folder."""
    result = {}
    for w_bits in (0, 2, 3):
        torch.manual_seed(w_bits)
        model = FluxTransformer2DModel(**SMALL, w_bits=w_bits).pack()
        folder = tmp_path_factory.mktemp("whole")
        model.save_pretrained(folder, max_shard_size=5000)
        result[w_bits] = model, {file.name: file.read_bytes() for file in folder.iterdir()}
        assert len(result[w_bits][1]) > 3  # two shards at least
    return result


@pytest.fixture
def folder(whole, tmp_path):
    """The folder of the ternary model, to be damaged."""
    return write(tmp_path / "damaged", whole[0][1])


def write(folder, files):
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


class TookTooLong(BaseException):  # TimeoutError would be an OSError
    pass


def _status(key):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(key))


@contextlib.contextmanager
def bounded(seconds=20, peak=64 * 2**20):
    """Damage may cost neither time nor memory. The address space is limited too: a test must not bring a host down."""

    def stop(*_):
        raise TookTooLong

    measured = Path("/proc/self/clear_refs").exists()
    limit = resource.getrlimit(resource.RLIMIT_AS)
    before = signal.signal(signal.SIGALRM, stop)
    if measured:
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
        resource.setrlimit(resource.RLIMIT_AS, (_status("VmSize") + 4 * 2**30, limit[1]))
        resident = _status("VmRSS")
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, limit)
    if measured:
        assert _status("VmHWM") - resident < peak


def complaint(folder, model):
    """What is wrong with how the loading of a damaged folder ended; None if nothing."""
    try:
        loaded = FluxTransformer2DModel.from_pretrained(folder)
    except (ValueError, OSError) as error:
        text = str(error)
        return None if text and "\n" not in text else f"not one line: {text!r}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"

    def settings(model):
        return {k: tuple(v) if isinstance(v, list) else v for k, v in model.config.items() if not k.startswith("_")}

    return None if same_parameters(loaded, model) and settings(loaded) == settings(model) else "another model"


def damage(rng, files):
    """One of the things that happen to files: a description, and the damaged files."""
    name = rng.choice([name for name in files if not name.endswith(".safetensors")] * 2 + list(files))
    content, files = bytearray(files[name]), dict(files)
    kind = rng.choice(["bit", "bit", "byte", "byte", "header", "cut", "longer", "zeros", "deleted", "swapped", "empty"])
    position = rng.randrange(len(content))
    if kind == "bit":
        content[position] ^= 1 << rng.randrange(8)
    elif kind == "byte":
        content[position] = rng.choice([b for b in range(256) if b != content[position]])
    elif kind == "header":
        content[rng.randrange(min(200, len(content)))] ^= rng.randrange(1, 256)
    elif kind == "cut":
        del content[position:]
    elif kind == "longer":
        content += rng.randbytes(rng.randint(1, 50))
    elif kind == "zeros":
        length = rng.randint(1, 600)
        content[position : position + length] = bytes(len(content[position : position + length]))
    elif kind == "empty":
        content.clear()
    elif kind == "swapped":
        other = rng.choice([other for other in files if other != name])
        files[other], content = bytes(content), files[other]
    files[name] = bytes(content)
    if kind == "deleted":
        del files[name]
    return f"{kind} at {position} of {name}", files


@pytest.mark.parametrize("seed", range(8))
def test_twenty_five_random_corruptions_are_refused_or_change_nothing(whole, tmp_path, seed):
    rng = random.Random(seed)
    complaints = []
    with bounded():
        for _ in range(25):
            model, files = whole[rng.choice([0, 2, 3])]
            what, damaged = damage(rng, files)
            problem = complaint(write(tmp_path / "damaged", damaged), model)
            complaints += [(what, problem)] if problem else []
    assert complaints == []


def test_flipped_bits_in_a_shard_are_always_refused(whole, tmp_path):
    rng = random.Random(0)
    model, files = whole[0]
    for name in sorted(name for name in files if name.endswith(".safetensors"))[:2]:
        for position in [0, 7, 8, 9, len(files[name]) - 1, *rng.choices(range(len(files[name])), k=10)]:
            content = bytearray(files[name])
            content[position] ^= 1 << rng.randrange(8)
            write(tmp_path / "damaged", files | {name: bytes(content)})
            with pytest.raises(ValueError, match=rf"{name}: damaged \(its SHA-256 differs"), bounded():
                FluxTransformer2DModel.from_pretrained(tmp_path / "damaged")


@pytest.mark.parametrize("key", sorted(FluxTransformer2DModel(**SMALL).config.keys() - {"_use_default_values"}))
def test_a_damaged_name_in_the_config_is_refused(whole, folder, key):
    config = folder / "config.json"
    for damaged in ("~" + key[1:], key[:-1] + "~", "_" + key[1:]):
        config.write_bytes(whole[0][1]["config.json"].replace(f'"{key}"'.encode(), f'"{damaged}"'.encode()))
        assert complaint(folder, whole[0][0]) is None


def reseal(folder):
    """Make the checksums in the index those of the files, so that nothing but the structure can be found wrong."""
    index, config = (json.loads((folder / name).read_text()) for name in (INDEX, "config.json"))
    kept = {k: v for k, v in config.items() if not k.startswith("_") and k != "quantization_config"}
    index["metadata"]["config_sha256"] = hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()
    for file in index["metadata"]["sha256"]:
        if (folder / file).exists():
            index["metadata"]["sha256"][file] = hashlib.sha256((folder / file).read_bytes()).hexdigest()
    (folder / INDEX).write_text(json.dumps(index))


def shard_of(folder, name):
    return folder / json.loads((folder / INDEX).read_text())["weight_map"][name]


def refused(folder, match):
    reseal(folder)
    with bounded(), pytest.raises((ValueError, OSError), match=match) as info:
        FluxTransformer2DModel.from_pretrained(folder)
    assert "\n" not in str(info.value)


def change_tensors(folder, change, of=CODES):
    tensors = {name: tensor.clone() for name, tensor in load_file(shard_of(folder, of)).items()}
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, shard_of(folder, of))


def change_index(folder, change):
    index = json.loads((folder / INDEX).read_text())
    change(index)
    (folder / INDEX).write_text(json.dumps(index))


def test_resealing_alone_is_no_damage(whole, folder):
    reseal(folder)
    assert complaint(folder, whole[0][0]) is None
    change_tensors(folder, lambda tensors: None)
    reseal(folder)
    assert same_parameters(FluxTransformer2DModel.from_pretrained(folder), whole[0][0])


@pytest.mark.parametrize(
    ("name", "change"),
    [
        (CODES, lambda t: t.T),
        (CODES, lambda t: t[:-1]),
        (CODES, lambda t: t[:, :-1]),
        (CODES, lambda t: t[:0]),
        (CODES, lambda t: t[None]),
        (CODES, lambda t: t.repeat(1, 2)),
        (CODES, lambda t: t.view(torch.int8)),
        (CODES, lambda t: t.float()),
        (CODES, lambda t: t.bool()),
        (STEPS, lambda t: t[:-1]),
        (STEPS, lambda t: t[:1]),
        (STEPS, lambda t: t[:, 0]),
        (STEPS, lambda t: t.double()),
        (STEPS, lambda t: t.bfloat16()),
        (STEPS, lambda t: t.half()),
        (BIAS, lambda t: t[:-1]),
        (BIAS, lambda t: t[:0]),
        (BIAS, lambda t: t[:, None]),
        (BIAS, lambda t: t.double()),
        (BIAS, lambda t: t.to(torch.uint8)),
        (BIAS, lambda t: t.to(torch.complex64)),
        (BIAS, lambda t: t.to(torch.float8_e4m3fn)),
    ],
)
def test_tensors_of_a_wrong_shape_or_dtype_are_refused(folder, name, change):
    change_tensors(folder, lambda tensors: tensors.update({name: change(tensors[name])}), name)
    refused(folder, rf"{name} is \w+ \[.*\], expected \w+.* \[.*\]")


@pytest.mark.parametrize("dtype", ["U8", "I8", "F4", "F6_E2M3", "F8_E8M0", "F64", "I64", "Q4", "", None, 8])
def test_dtypes_that_a_header_claims_are_refused(folder, dtype):
    header, data = read_shard(shard_of(folder, BIAS))
    header[BIAS]["dtype"] = dtype
    write_shard(shard_of(folder, BIAS), header, data)
    refused(folder, "expected BF16 or F16 or F32|not a whole safetensors file")


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", [STEPS, BIAS, "proj_out.weight", "time_text_embed.timestep_embedder.linear_1.bias"])
def test_numbers_that_are_none_are_refused(folder, name, value):
    change_tensors(folder, lambda tensors: tensors[name].view(-1)[-1].fill_(value), name)
    refused(folder, f"{name} holds NaN or inf")


@pytest.mark.parametrize("value", [0.0, -0.0, -1e-3, -1e-45])
def test_step_sizes_that_are_not_positive_are_refused(folder, value):
    change_tensors(folder, lambda tensors: tensors[STEPS][1].fill_(value), STEPS)
    refused(folder, f"{STEPS} holds step sizes that are not positive")


@pytest.mark.parametrize("byte", IMPOSSIBLE)
def test_bytes_that_no_codes_give_are_refused_in_a_file(folder, byte):
    change_tensors(folder, lambda tensors: tensors[CODES].view(-1)[-1].fill_(byte))
    refused(folder, f"{CODES}: a byte holds no five ternary codes")


@pytest.mark.parametrize("w_bits", [0, 2, 3])
def test_padding_that_is_not_zero_is_refused_in_a_file(whole, tmp_path, w_bits):
    folder = write(tmp_path / "damaged", whole[w_bits][1])

    def change(tensors):
        if w_bits:
            tensors[CODES][-1, 1] |= 128  # of six codes the last byte holds three, or two
        else:
            tensors[CODES][-1] = as_bytes(reference_trits([0, 1, -1, 0, 1, -1, 0, 0, 0, 1]))

    change_tensors(folder, change)
    refused(folder, f"{CODES}: the padding is not zero")


def test_tensors_that_are_missing_or_too_many_are_refused(whole, folder):
    def again():
        return write(folder, whole[0][1])

    change_index(folder, lambda index: index["weight_map"].pop(CODES))
    refused(folder, f"{CODES} is missing in the index")
    change_tensors(again(), lambda tensors: tensors.pop(CODES))
    refused(folder, f"holds other tensors than the index says, such as {CODES}")
    shard = shard_of(again(), CODES)
    change_tensors(folder, lambda tensors: tensors.pop(CODES))
    change_index(folder, lambda index: index["weight_map"].pop(CODES))
    refused(folder, f"{CODES} is missing in the index")

    change_tensors(again(), lambda tensors: tensors.update(extra=torch.ones(1)))
    refused(folder, "holds other tensors than the index says, such as extra")
    change_index(again(), lambda index: index["weight_map"].update(extra=shard.name))
    refused(folder, "extra is not expected in the index")
    change_tensors(folder, lambda tensors: tensors.update(extra=torch.ones(1)))
    refused(folder, "extra is not expected in the index")
    # Dense weights beside the codes, or instead of them.
    dense = CODES.replace("weight_codes", "weight")
    change_tensors(again(), lambda tensors: tensors.update({dense: torch.ones(6, 6)}))
    change_index(folder, lambda index: index["weight_map"].update({dense: shard.name}))
    refused(folder, f"{dense} is not expected in the index")
    other = next(file for file in sorted(folder.glob("*.safetensors")) if file.name != shard.name)
    change_index(again(), lambda index: index["weight_map"].update({CODES: other.name}))
    refused(folder, f"holds other tensors than the index says, such as {CODES}")


@pytest.mark.parametrize(
    "change",
    [
        {"num_layers": 10**9},
        {"num_single_layers": 10**9},
        {"num_layers": -1},
        {"num_layers": "1"},
        {"num_single_layers": None},
        {"num_layers": 0},
        {"attention_head_dim": 10**6},
        {"attention_head_dim": 10**12},
        {"attention_head_dim": 10**30},
        {"attention_head_dim": 0},
        {"attention_head_dim": -6},
        {"attention_head_dim": "6"},
        {"attention_head_dim": None},
        {"attention_head_dim": 6.5},
        {"num_attention_heads": 10**9},
        {"in_channels": 10**12},
        {"in_channels": 2**63},
        {"out_channels": 10**15},
        {"joint_attention_dim": 10**12},
        {"pooled_projection_dim": [4]},
        {"patch_size": 10**6},
        {"w_bits": 1},
        {"w_bits": 2},
        {"w_bits": 8},
        {"w_bits": 9},
        {"w_bits": 16},
        {"w_bits": "0"},
        {"w_bits": None},
        {"lora_r": 4},
        {"lora_r": "x"},
        {"clip_init": "mean"},
        {"clip_init": []},
        {"weight_layerwise": True},
        {"quantize_modulation": False},
        {"guidance_embeds": True},
        {"packed": 2},
        {"packed": 0},
        {"packed": "1"},
        {"packed": None},
        {"_class_name": "AutoencoderKL"},
    ],
    ids=str,
)
def test_configs_that_describe_another_model_are_refused(folder, change):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    refused(folder, ".")


@pytest.mark.parametrize(
    "key", ["w_bits", "lora_r", "clip_init", "packed", "num_layers", "num_single_layers", "attention_head_dim"]
)
def test_configs_that_lack_an_entry_are_refused_unless_it_is_the_default(whole, folder, key):
    config = json.loads((folder / "config.json").read_text())
    del config[key]
    (folder / "config.json").write_text(json.dumps(config))
    reseal(folder)
    with bounded():
        assert complaint(folder, whole[0][0]) is None


def read_shard(file):
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def write_shard(file, header, data, length=None):
    encoded = json.dumps(header).encode()
    file.write_bytes((len(encoded) if length is None else length).to_bytes(8, "little") + encoded + data)


@pytest.mark.parametrize("length", [0, 1, 2**31 - 1, 2**32, 2**60, 2**63, 2**64 - 1])
def test_headers_of_an_absurd_length_are_refused(folder, length):
    file = shard_of(folder, CODES)
    write_shard(file, *read_shard(file), length=length)
    refused(folder, f"{file.name}: not a whole safetensors file")


@pytest.mark.parametrize(
    "change",
    [
        lambda header: header[CODES].update(data_offsets=[0, 2**62]),
        lambda header: header[CODES].update(data_offsets=[12, 0]),
        lambda header: header[CODES].update(data_offsets=[-12, 0]),
        lambda header: header[CODES].update(data_offsets=list(header[BIAS]["data_offsets"])),
        lambda header: header[CODES].update(data_offsets=[]),
        lambda header: header[CODES].update(shape=[2**62, 2**62]),
        lambda header: header[CODES].update(shape=[-6, -2]),
        lambda header: header[CODES].update(shape=[12]),
        lambda header: header[CODES].update(shape="6, 2"),
        lambda header: header.pop(CODES),
        lambda header: header.update({CODES: 3}),
        lambda header: header.clear(),
    ],
)
def test_headers_that_do_not_fit_their_data_are_refused(folder, change):
    header, data = read_shard(shard_of(folder, CODES))
    change(header)
    write_shard(shard_of(folder, CODES), header, data)
    refused(folder, "not a whole safetensors file|expected U8|holds other tensors")


@pytest.mark.parametrize(
    "file",
    [
        "../other.safetensors",
        "/other.safetensors",
        "sub/other.safetensors",
        "other.bin",
        "..",
        "",
        "other.safetensors\n",
    ],
)
def test_an_index_names_no_file_outside_its_folder(folder, file):
    shard = shard_of(folder, CODES)
    with contextlib.suppress(OSError):
        target = folder / file
        if target.parent == folder.parent:  # there to be found, with the checksum that the index wants
            shutil.copy(shard, target)

    def change(index):
        index["metadata"]["sha256"][file] = index["metadata"]["sha256"].pop(shard.name)
        index["weight_map"] = {n: file if where == shard.name else where for n, where in index["weight_map"].items()}

    change_index(folder, change)
    with bounded(), pytest.raises(ValueError, match="shards and checksums do not belong together") as info:
        FluxTransformer2DModel.from_pretrained(folder)
    assert "\n" not in str(info.value)


@pytest.mark.parametrize(
    "change",
    [
        lambda index: index["metadata"].pop("sha256"),
        lambda index: index["metadata"].pop("config_sha256"),
        lambda index: index["metadata"].pop("packed_format"),
        lambda index: index["metadata"].update(packed_format=2),
        lambda index: index["metadata"].update(packed_format="1"),
        lambda index: index["metadata"].update(packed_format=None),
        lambda index: index["metadata"].update(sha256=[]),
        lambda index: index["metadata"].update(sha256={}),
        lambda index: index["metadata"].update(sha256=dict.fromkeys(index["metadata"]["sha256"])),
        lambda index: index["metadata"].update(sha256=dict.fromkeys(index["metadata"]["sha256"], "0" * 64)),
        lambda index: index["metadata"].update(config_sha256=None),
        lambda index: index["metadata"]["sha256"].popitem(),
        lambda index: index["metadata"]["sha256"].update({"more.safetensors": "0" * 64}),
        lambda index: index.update(metadata=[]),
        lambda index: index.update(weight_map=[]),
        lambda index: index.update(weight_map={}),
        lambda index: index.update(weight_map=None),
        lambda index: index["weight_map"].update({CODES: None}),
        lambda index: index["weight_map"].update({CODES: ["x.safetensors"]}),
        lambda index: index["weight_map"].update({"transformer_blocks.1.norm1.linear.bias": index["weight_map"][BIAS]}),
        lambda index: index["weight_map"].update({"transformer_blocks.": index["weight_map"][BIAS]}),
        lambda index: index.clear(),
    ],
)
def test_an_index_that_is_none_is_refused(folder, change):
    change_index(folder, change)
    with bounded(), pytest.raises(ValueError) as info:
        FluxTransformer2DModel.from_pretrained(folder)
    assert "\n" not in str(info.value)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        *itertools.product([INDEX, "config.json"], ["", "null", "[]", "3", '"x"', "{", "\xff", "NaN"]),
        (INDEX, "[" * 100000),
        (INDEX, '{"a":' * 100000),
    ],
    ids=lambda value: value[:20],
)
def test_json_that_is_something_else_is_refused(folder, name, text):
    (folder / name).write_text(text, encoding="latin-1")
    with bounded(), pytest.raises((ValueError, OSError)) as info:
        FluxTransformer2DModel.from_pretrained(folder)
    assert "\n" not in str(info.value)


def test_whitespace_in_json_is_no_damage(whole, folder):
    for name in (INDEX, "config.json"):
        (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()), indent=7) + "\n\n")
    assert same_parameters(FluxTransformer2DModel.from_pretrained(folder), whole[0][0])


@pytest.mark.parametrize("directory", [False, True], ids=["missing", "a directory"])
def test_files_that_cannot_be_read_are_named(whole, tmp_path, directory):
    for name in whole[0][1]:
        folder = write(tmp_path / "damaged", whole[0][1])
        (folder / name).unlink()
        if directory:
            (folder / name).mkdir()
        with pytest.raises((ValueError, OSError), match=name) as info:
            FluxTransformer2DModel.from_pretrained(folder)
        assert "\n" not in str(info.value)


def test_no_checkpoint_in_another_format_takes_the_place_of_a_missing_index(whole, folder):
    (folder / INDEX).unlink()
    model = FluxTransformer2DModel(**SMALL)
    save_file(model.state_dict(), folder / "diffusion_pytorch_model.safetensors")
    with pytest.raises(ValueError, match="no index of a packed checkpoint"):
        FluxTransformer2DModel.from_pretrained(folder)


def test_layers_of_another_kind_are_not_packed():
    packed = PackedLinear(3, 2, w_bits=0)
    assert isinstance(packed, nn.Linear)
    assert "w_bits=0" in repr(packed)
    with pytest.raises(ValueError, match="w_bits=9 is not supported"):
        PackedLinear(3, 2, w_bits=9)
