"""utils/export_gguf.py: files that hold what the model holds, under Black Forest Labs' names."""

import resource
import tracemalloc
import types
from pathlib import Path
from types import SimpleNamespace

import diffusers
import pytest
import torch
from diffusers.loaders.single_file_utils import convert_flux_transformer_checkpoint_to_diffusers

from models.modeling_flux_quant import FluxTransformer2DModel
from models.packing import PackedLinear
from utils import scenes
from utils.metrics import psnr
from utils.sampling import generate_images, load_pipeline

gguf = pytest.importorskip("gguf")
from utils import export_gguf  # noqa: E402 (it needs gguf)

STUDENT = Path(__file__).parents[1] / "assets" / "tiny-flux-1.58bit"
SMALL = {
    "in_channels": 16, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 128, "num_attention_heads": 2,
    "joint_attention_dim": 32, "pooled_projection_dim": 32, "axes_dims_rope": (16, 56, 56), "w_bits": 0,
    "clip_init": "max",
}  # fmt: skip


@pytest.fixture
def export(start, capsys):
    """export(checkpoint, file, *flags) runs the script; the result has returncode and the last line of stderr."""

    def export(*argv):
        code = start(export_gguf.main, "export_gguf", *argv)
        return SimpleNamespace(returncode=code, error=(capsys.readouterr().err.strip().splitlines() or [""])[-1])

    return export


@pytest.fixture(scope="module", params=["TQ2_0", "TQ1_0"])
def exported(request, tmp_path_factory, start):
    """tiny-flux's student as a file, and how its ternary weights are stored."""
    file = tmp_path_factory.mktemp("gguf") / "student.gguf"
    assert start(export_gguf.main, "export_gguf", STUDENT, file, "--type", request.param) == 0
    assert [path.name for path in file.parent.iterdir()] == [file.name]
    return file, request.param


def read(file: Path) -> dict[str, torch.Tensor]:
    """All tensors of a file, decoded by the gguf package."""
    found = {}
    for tensor in gguf.GGUFReader(file).tensors:
        shape = [int(size) for size in reversed(tensor.shape)]
        found[tensor.name] = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).reshape(shape).copy())
    return found


def to_diffusers(tensors: dict[str, torch.Tensor], width: int) -> dict[str, torch.Tensor]:
    """diffusers' own conversion of the original checkpoint, which knows FLUX.1-dev's width only; nothing is left."""
    code = convert_flux_transformer_checkpoint_to_diffusers.__code__
    assert 3072 in code.co_consts
    code = code.replace(co_consts=tuple(width if const == 3072 else const for const in code.co_consts))
    left = dict(tensors)
    found = types.FunctionType(code, convert_flux_transformer_checkpoint_to_diffusers.__globals__)(left)
    assert not left
    return found


def make(folder: Path, pack: bool = True, **settings) -> FluxTransformer2DModel:
    torch.manual_seed(0)
    model = FluxTransformer2DModel(**SMALL | settings)
    (model.pack() if pack else model).save_pretrained(folder)
    return model


@pytest.mark.parametrize(("guidance", "count"), [(True, 780), (False, 776)], ids=["dev", "schnell"])
def test_names_and_shapes_are_those_of_the_original_checkpoint(guidance, count):
    """diffusers makes of them, at FLUX.1's own size, exactly the tensors of its own model."""
    with torch.device("meta"):
        model = FluxTransformer2DModel(guidance_embeds=guidance, w_bits=0, packed=1)
        stock = diffusers.FluxTransformer2DModel(guidance_embeds=guidance)
        tensors = {each.name: torch.empty(each.shape()) for each in export_gguf.originals(model, "TQ2_0")}
    assert len(tensors) == count and max(map(len, tensors)) < 64  # ggml's limit
    assert tensors["double_blocks.18.txt_attn.qkv.weight"].shape == (9216, 3072)
    assert tensors["single_blocks.37.linear1.weight"].shape == (21504, 3072)
    found = {name: tensor.shape for name, tensor in to_diffusers(tensors, 3072).items()}
    assert found == {name: parameter.shape for name, parameter in stock.named_parameters()}


def test_what_the_file_holds_is_what_the_model_holds(exported):
    """Codes exactly, scales to fp16, the rest bit for bit, the last modulation's halves in diffusers' order again."""
    file, _ = exported
    student = FluxTransformer2DModel.from_pretrained(STUDENT)
    found = to_diffusers(read(file), student.inner_dim)
    for name, layer in student.named_modules():
        if isinstance(layer, PackedLinear):
            weight, wanted = found.pop(f"{name}.weight"), layer.dequantize()
            assert torch.equal(weight.sign(), wanted.sign()), name
            assert ((weight - wanted).abs() <= wanted.abs() * 2**-11).all(), name
    rest = {name: p for name, p in student.named_parameters() if not name.endswith(("weight_codes", "weight_clip_val"))}
    assert found.keys() == rest.keys()
    assert all(torch.equal(found[name], parameter) for name, parameter in rest.items())


def test_what_is_stored_how(exported):
    file, ternary = exported
    reader = gguf.GGUFReader(file)
    wanted = {"architecture": "flux", "quantization_version": 2, "file_type": {"TQ1_0": 36, "TQ2_0": 37}[ternary]}
    assert {name: reader.get_field(f"general.{name}").contents() for name in wanted} == wanted
    kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    blocks = {name for name in kinds if "_blocks." in name and name.endswith(".weight")}
    assert {name for name, kind in kinds.items() if kind == ternary} == blocks
    assert {kind for name, kind in kinds.items() if name not in blocks} == {"F32"}
    bits = {"TQ1_0": 1.6875, "TQ2_0": 2.0625}[ternary]
    assert all(8 * t.n_bytes == bits * t.n_elements for t in reader.tensors if t.name in blocks)


@pytest.mark.parametrize("exported", ["TQ2_0"], indirect=True)
def test_a_model_made_of_the_file_draws_the_same_pictures(exported):
    """As a student does whose scales are rounded to fp16: nothing else is lost. That itself costs little."""
    file, _ = exported
    pipe = load_pipeline("assets/tiny-flux", torch.float32)
    stock = diffusers.FluxTransformer2DModel.from_config(pipe.transformer.config)
    stock.load_state_dict(to_diffusers(read(file), stock.inner_dim))
    student, rounded = (FluxTransformer2DModel.from_pretrained(STUDENT) for _ in range(2))
    for layer in rounded.modules():
        if isinstance(layer, PackedLinear):
            layer.weight_clip_val.data = (layer.weight_clip_val / 1.5).half().float() * 1.5
    prompts = scenes.eval_prompts(4)
    pictures = []
    for pipe.transformer in (stock, rounded, student):
        pictures.append(generate_images(pipe, prompts, num_inference_steps=8, batch_size=4))
    assert pictures[0].std() > 0.05  # they show something
    assert psnr(pictures[0], pictures[1]) >= 90
    assert psnr(pictures[0], pictures[2]) >= 75


def test_what_diffusers_does_with_it(exported):
    """It knows the names but not yet the types, as the script says."""
    file, ternary = exported
    with pytest.raises(ValueError, match=rf"has a quantization type: {getattr(gguf.GGMLQuantizationType, ternary)!s}"):
        diffusers.models.model_loading_utils.load_gguf_checkpoint(file, return_tensors=True)


def test_one_step_size_a_matrix_and_unquantized_modulation(export, tmp_path):
    model = make(tmp_path / "model", quantize_modulation=False, weight_layerwise=True)
    file = tmp_path / "new" / "model.gguf"
    assert export(tmp_path / "model", file).returncode == 0
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(file).tensors}
    halves = {name for name, kind in kinds.items() if kind == "F16"}
    wanted = {"double_blocks.0.img_mod.lin", "double_blocks.0.txt_mod.lin", "single_blocks.0.modulation.lin"}
    assert halves == {f"{name}.weight" for name in wanted}
    found = to_diffusers(read(file), model.inner_dim)
    block = model.single_transformer_blocks[0]
    assert torch.equal(found["single_transformer_blocks.0.norm.linear.weight"], block.norm.linear.weight.half().float())
    mlp = block.proj_mlp.dequantize()
    torch.testing.assert_close(found["single_transformer_blocks.0.proj_mlp.weight"], mlp, rtol=2**-11, atol=0)


def test_what_is_not_packed_yet_and_a_whole_pipeline(export, tmp_path):
    model = make(tmp_path / "trainable", pack=False)
    model.pack().save_pretrained(tmp_path / "pipeline" / "transformer")
    for name in ("trainable", "pipeline"):
        assert export(tmp_path / name, tmp_path / f"{name}.gguf").returncode == 0
    assert (tmp_path / "trainable.gguf").read_bytes() == (tmp_path / "pipeline.gguf").read_bytes()


def test_memory_holds_one_tensor_at_a_time(tmp_path):
    """Of what is written; the model's codes are in memory all the time."""
    peaks, sizes = [], []
    for blocks in (1, 8):
        model = make(tmp_path / str(blocks), num_single_layers=blocks)
        tracemalloc.start()
        sizes.append(export_gguf.write(model, tmp_path / f"{blocks}.gguf", "TQ2_0"))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0] < sizes[1] - sizes[0]


@pytest.mark.parametrize(
    ("settings", "flags", "status", "message"),
    [
        ({"w_bits": 4}, (), 1, "model: 4 bit; TQ2_0 holds ternary codes: export one of 1.58 bits"),
        ({"w_bits": 1}, ("--type", "TQ1_0"), 1, "model: 1 bit; TQ1_0 holds ternary codes"),
        ({"num_attention_heads": 3}, (), 1, "model: its rows of 384 weights are no whole blocks of TQ2_0; only models"),
        ({"w_bits": 16}, (), 1, "model: w_bits=16 is not quantized"),
        (None, (), 1, "model: neither a transformer nor a pipeline"),
        ({}, ("--type", "Q4_0"), 2, "invalid choice: 'Q4_0'"),
    ],
    ids=["4 bits", "1 bit", "odd width", "full precision", "nothing", "another type"],
)
def test_what_cannot_be_exported(settings, flags, status, message, export, tmp_path):
    if settings is not None:
        make(tmp_path / "model", pack=settings.get("w_bits") != 16, **settings)
    result = export(tmp_path / "model", tmp_path / "out" / "model.gguf", *flags)
    assert result.returncode == status and message in result.error
    assert not (tmp_path / "out").exists()


def test_a_transformer_of_another_family(export, tmp_path):
    (tmp_path / "config.json").write_text('{"_class_name": "Flux2Transformer2DModel", "w_bits": 0, "packed": 1}')
    result = export(tmp_path, tmp_path / "model.gguf")
    message = f"{tmp_path}: a Flux2Transformer2DModel; only FLUX.1's FluxTransformer2DModel can be exported"
    assert result.returncode == 1 and message in result.error


def test_what_is_there_stays(export, tmp_path, monkeypatch):
    """Also if it came while the file was being written."""
    file = tmp_path / "mine.gguf"
    file.write_text("mine")
    assert export(STUDENT, tmp_path / "mine.txt").returncode == 2
    result = export(STUDENT, file)
    assert result.returncode == 1 and f"{file}: exists; move it or choose another name" in result.error
    calls = []
    checked = export_gguf.check_new
    monkeypatch.setattr(export_gguf, "check_new", lambda file: checked(file) if calls else calls.append(file))
    result = export(STUDENT, file)
    assert result.returncode == 1 and f"{file}: exists" in result.error
    assert file.read_text() == "mine" and list(tmp_path.iterdir()) == [file]


def test_a_scale_beyond_fp16(export, tmp_path):
    model = make(tmp_path / "model")
    model.transformer_blocks[0].attn.to_k.weight_clip_val.data[3] = 1e6
    model.save_pretrained(tmp_path / "model")
    result = export(tmp_path / "model", tmp_path / "model.gguf")
    message = "double_blocks.0.img_attn.qkv.weight: 6.67e+05 is beyond fp16, which TQ2_0 needs"
    assert result.returncode == 1 and message in result.error
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_disk_that_is_full(export, tmp_path, monkeypatch):
    """Noticed before anything is written, and if it fills up on the way."""
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
        result = export(STUDENT, tmp_path / "model.gguf")
    assert result.returncode == 1 and "the model takes 0.0058 GB but only 0.0000 GB are free" in result.error
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, hard))
    try:
        result = export(STUDENT, tmp_path / "model.gguf")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert result.returncode == 1 and f"{tmp_path / 'model.gguf'}: cannot be written" in result.error
    assert list(tmp_path.iterdir()) == []


def test_an_interruption_leaves_nothing(export, tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", stop)
    result = export(STUDENT, tmp_path / "model.gguf")
    assert result.returncode == 130 and "nothing unfinished is left" in result.error
    assert list(tmp_path.iterdir()) == []
