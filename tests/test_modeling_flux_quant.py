"""FluxTransformer2DModel against diffusers' own; saving and loading; what must fail and how."""

import copy
import inspect
import json
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers.loaders import single_file_model, single_file_utils
from safetensors.torch import load_file, save_file
from torch import nn

from models.modeling_flux_quant import FluxTransformer2DModel, QuantizeLinear
from models.utils_quant import LoRAQuantizeLinear, init_clip_val

CONFIG = {
    "in_channels": 8,
    "num_layers": 2,
    "num_single_layers": 3,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 24,
    "pooled_projection_dim": 20,
    "axes_dims_rope": (4, 6, 6),
}
BLOCKS = ("transformer_blocks.", "single_transformer_blocks.")
WEIGHTS = "diffusion_pytorch_model.safetensors"


def randomized(model, seed=0):
    """Every parameter random, zero-initialised ones included."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if not name.endswith("weight_clip_val"):
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def inputs(guidance=True, seed=0, batch=2, image_tokens=6, text_tokens=5):
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=generator)

    return {
        "hidden_states": randn(batch, image_tokens, 8),
        "encoder_hidden_states": randn(batch, text_tokens, 24),
        "pooled_projections": randn(batch, 20),
        "timestep": torch.tensor([0.3, 0.9]),
        "guidance": torch.tensor([3.5, 1.0]) if guidance else None,
        "img_ids": torch.cartesian_prod(torch.zeros(1), torch.arange(2.0), torch.arange(3.0)),
        "txt_ids": torch.zeros(text_tokens, 3),
        "return_dict": False,
    }


def output(model, **kwargs):
    with torch.no_grad():
        return model(**inputs(model.config.guidance_embeds), **kwargs)[0]


@pytest.fixture(scope="module", params=[True, False], ids=["guidance", "no guidance"])
def teacher(request, tmp_path_factory):
    """diffusers' model, and the folder of its sharded checkpoint."""
    folder = tmp_path_factory.mktemp("plain")
    model = randomized(diffusers.FluxTransformer2DModel(**CONFIG, guidance_embeds=request.param))
    model.save_pretrained(folder, max_shard_size="100KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return model, folder


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The folder of a full-precision checkpoint in one file."""
    folder = tmp_path_factory.mktemp("plain")
    randomized(diffusers.FluxTransformer2DModel(**CONFIG, guidance_embeds=True)).save_pretrained(folder)
    return folder


@pytest.fixture
def ternary(plain, tmp_path):
    """The folder of a quantized checkpoint, a fresh one for each test to break."""
    FluxTransformer2DModel.from_pretrained(plain, w_bits=0).save_pretrained(tmp_path / "ternary")
    return tmp_path / "ternary"


def block_linears(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and n.startswith(BLOCKS)}


# Full precision


def test_full_precision_is_diffusers_model_bit_for_bit(teacher):
    reference, folder = teacher
    model, info = FluxTransformer2DModel.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    assert not any(isinstance(m, QuantizeLinear) for m in model.modules())
    assert torch.equal(output(model), output(reference))
    residuals = {
        "controlnet_block_samples": [torch.randn(2, 6, 32) for _ in range(2)],
        "controlnet_single_block_samples": [torch.randn(2, 6, 32) for _ in range(2)],
    }
    assert torch.equal(output(model, **residuals), output(reference, **residuals))
    assert not torch.equal(output(model, **residuals), output(model))


def gradients(model, checkpointing):
    model.enable_gradient_checkpointing() if checkpointing else model.disable_gradient_checkpointing()
    model.zero_grad()
    out = model.train()(**inputs(model.config.guidance_embeds))[0]
    out.square().sum().backward()
    return [out.detach()] + [p.grad for p in model.parameters()]


def test_full_precision_gradients_are_diffusers_with_and_without_checkpointing(teacher):
    reference, folder = teacher
    expected = gradients(reference, False)
    for checkpointing in (False, True):
        for model in (reference, FluxTransformer2DModel.from_pretrained(folder)):
            assert all(map(torch.equal, gradients(model, checkpointing), expected))


def test_quantized_gradients_with_and_without_checkpointing(plain):
    model = FluxTransformer2DModel.from_pretrained(plain, w_bits=0, lora_r=2)
    assert all(map(torch.equal, gradients(model, True), gradients(model, False)))


@pytest.mark.parametrize("lora_r", [0, 2])
def test_gradients_under_layerwise_casting_to_8_bit_floats(plain, lora_r):
    model = FluxTransformer2DModel.from_pretrained(plain, w_bits=0, lora_r=lora_r, dtype=torch.bfloat16).train()
    reference = copy.deepcopy(model)
    model.enable_layerwise_casting(torch.float8_e4m3fn, torch.bfloat16)
    stored = dict(model.named_parameters())
    assert stored["transformer_blocks.0.attn.to_q.weight"].dtype == torch.float8_e4m3fn
    for name, parameter in reference.named_parameters():
        parameter.data = stored[name].data.to(parameter.dtype)
    half = {k: v.bfloat16() if torch.is_tensor(v) and "ids" not in k else v for k, v in inputs().items()}
    for each in (reference, model):
        each(**half)[0].float().square().sum().backward()
    for name, parameter in reference.named_parameters():
        assert torch.equal(stored[name].grad, parameter.grad), name


# What is quantized


@pytest.mark.parametrize("modulation", [True, False])
@pytest.mark.parametrize("settings", [{"w_bits": 0}, {"w_bits": 4}, {"w_bits": 16, "lora_r": 2}])
def test_the_linears_inside_the_blocks_and_no_others(plain, tmp_path, settings, modulation):
    settings = settings | {"quantize_modulation": modulation}
    model = FluxTransformer2DModel.from_pretrained(plain, **settings)
    model.save_pretrained(tmp_path)
    for each in (model, FluxTransformer2DModel(**CONFIG, **settings), FluxTransformer2DModel.from_pretrained(tmp_path)):
        quantized = {n for n, m in each.named_modules() if isinstance(m, QuantizeLinear)}
        modulations = {n for n in block_linears(each) if ".norm" in n}
        assert len(modulations) == 2 * CONFIG["num_layers"] + CONFIG["num_single_layers"]
        assert quantized == set(block_linears(each)) - (set() if modulation else modulations)
        assert len(quantized) == 2 * 14 + 3 * 6 - (0 if modulation else 7)
        assert each.config.quantize_modulation == modulation


def test_step_sizes_start_from_the_weights(teacher):
    reference, folder = teacher
    for settings in ({"w_bits": 0}, {"w_bits": 3, "clip_init": "max"}, {"w_bits": 2, "weight_layerwise": True}):
        model, info = FluxTransformer2DModel.from_pretrained(folder, output_loading_info=True, **settings)
        assert not any(info.values())
        for name, linear in block_linears(model).items():
            weight = reference.get_submodule(name).weight
            expected = init_clip_val(
                weight, settings["w_bits"], settings.get("clip_init", "mse"), settings.get("weight_layerwise", False)
            )
            assert torch.equal(linear.weight_clip_val, expected)
            assert torch.equal(linear.weight, weight)
            assert linear.weight_clip_val.requires_grad


def test_output_is_that_of_diffusers_with_quantized_weights(teacher):
    reference, folder = teacher
    model = FluxTransformer2DModel.from_pretrained(folder, w_bits=0)
    rounded = diffusers.FluxTransformer2DModel.from_pretrained(folder)
    for name, linear in block_linears(model).items():
        rounded.get_submodule(name).weight.data = linear.quantized_weight().detach()
    assert torch.equal(output(model), output(rounded))
    assert not torch.equal(output(model), output(reference))


def test_loading_warns_of_nothing(plain, caplog):
    logger = diffusers.utils.logging.get_logger("diffusers")
    logger.addHandler(caplog.handler)
    model = FluxTransformer2DModel.from_pretrained(plain, w_bits=0, lora_r=2)
    logger.removeHandler(caplog.handler)
    assert not caplog.records
    assert not any(p.is_meta for p in model.parameters())
    assert all((layer.lora_B == 0).all() for layer in block_linears(model).values())
    assert 0.005 < torch.cat([layer.lora_A.flatten() for layer in block_linears(model).values()]).std() < 0.02


# Saving and loading


@pytest.mark.parametrize("lora_r", [0, 3])
@pytest.mark.parametrize("w_bits", [0, 1, 2, 3, 4, 5, 6, 7, 8, 16, 32])
def test_round_trip(plain, tmp_path, w_bits, lora_r):
    model = FluxTransformer2DModel.from_pretrained(
        plain, w_bits=w_bits, lora_r=lora_r, lora_alpha=2.0, weight_layerwise=w_bits % 2 == 1
    )
    randomized(model, seed=1)  # as if trained: LoRA and step sizes no longer those of the weights
    model.save_pretrained(tmp_path, max_shard_size="200KB")
    again, info = FluxTransformer2DModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert torch.equal(output(again), output(model))
    for key in ("w_bits", "lora_r", "lora_alpha", "clip_init", "weight_layerwise", "quantize_modulation"):
        assert again.config[key] == model.config[key]
    layers = [m for m in again.modules() if isinstance(m, QuantizeLinear)]
    assert all(layer.weight_layerwise == model.config.weight_layerwise for layer in layers)
    assert all(isinstance(layer, LoRAQuantizeLinear) == (lora_r > 0) for layer in layers)


def test_config_alone_rebuilds_the_model(plain):
    model = FluxTransformer2DModel.from_pretrained(plain, w_bits=2, lora_r=3)
    rebuilt = FluxTransformer2DModel.from_config(model.config)
    assert {n: p.shape for n, p in rebuilt.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}


def test_subfolder_variant_and_saving_over_the_own_folder(plain, tmp_path):
    model = FluxTransformer2DModel.from_pretrained(plain)  # its weights are mapped from the file that is overwritten
    model.save_pretrained(tmp_path / "transformer", variant="fp16")
    for w_bits in (0, 2):  # a full-precision checkpoint of ours is quantized like any other
        again = FluxTransformer2DModel.from_pretrained(
            str(tmp_path), subfolder="transformer", variant="fp16", w_bits=w_bits
        )
        assert again.config.w_bits == w_bits
    again.save_pretrained(tmp_path / "transformer", variant="fp16")
    loaded = FluxTransformer2DModel.from_pretrained(tmp_path, subfolder="transformer", variant="fp16", w_bits=2)
    assert torch.equal(output(loaded), output(again))


@pytest.mark.parametrize("lora_r", [0, 2])
def test_step_sizes_and_lora_stay_fp32(plain, tmp_path, lora_r):
    model = FluxTransformer2DModel.from_pretrained(plain, w_bits=0, lora_r=lora_r, torch_dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    loaded = FluxTransformer2DModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    cast = FluxTransformer2DModel.from_pretrained(plain, w_bits=0, lora_r=lora_r).to(torch.bfloat16)
    for each in (model, loaded, cast):
        assert each.dtype == torch.bfloat16
        for name, parameter in each.named_parameters():
            kept = name.endswith(("weight_clip_val", "lora_A", "lora_B"))
            assert parameter.dtype == (torch.float32 if kept else torch.bfloat16), name
        half = {k: v.bfloat16() if torch.is_tensor(v) else v for k, v in inputs().items()}
        assert each(**half)[0].dtype == torch.bfloat16


def test_pipelines_take_and_save_it(plain, ternary, tmp_path):
    parts = {"vae": None, "text_encoder": None, "tokenizer": None, "text_encoder_2": None, "tokenizer_2": None}
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    transformer = diffusers.FluxTransformer2DModel.from_pretrained(plain)
    diffusers.FluxPipeline(scheduler, transformer=transformer, **parts).save_pretrained(tmp_path / "base")
    model = FluxTransformer2DModel.from_pretrained(ternary)
    pipe = diffusers.FluxPipeline.from_pretrained(tmp_path / "base", transformer=model, **parts)
    assert pipe.transformer is model
    pipe.save_pretrained(tmp_path / "pipe")
    again = diffusers.FluxPipeline.from_pretrained(tmp_path / "pipe", **parts).transformer
    assert isinstance(again, FluxTransformer2DModel)
    assert torch.equal(output(again), output(model))


# One file


def original_names(model):
    """The tensors of a FluxTransformer2DModel under the names of FLUX.1's first code."""
    state, result = model.state_dict(), {}

    def move(new, *old):
        for kind in ("weight", "bias", "scale"):
            found = [state.pop(f"{name}.{'weight' if kind == 'scale' else kind}", None) for name in old]
            if found[0] is not None:
                result[f"{new}.scale" if ("_norm" in new) else f"{new}.{kind}"] = torch.cat(found)

    for new, old in {"time": "timestep", "vector": "text", "guidance": "guidance"}.items():
        move(f"{new}_in.in_layer", f"time_text_embed.{old}_embedder.linear_1")
        move(f"{new}_in.out_layer", f"time_text_embed.{old}_embedder.linear_2")
    move("img_in", "x_embedder")
    move("txt_in", "context_embedder")
    move("final_layer.linear", "proj_out")
    move("final_layer.adaLN_modulation.1", "norm_out.linear")
    for kind in ("weight", "bias"):  # shift and scale in the other order
        name = f"final_layer.adaLN_modulation.1.{kind}"
        result[name] = result[name].roll(len(result[name]) // 2, 0)
    for i in range(model.config.num_layers):
        for text in (False, True):
            old, new = f"transformer_blocks.{i}", f"double_blocks.{i}.{'txt' if text else 'img'}"
            ff, out = ("ff_context", "to_add_out") if text else ("ff", "to_out.0")
            move(f"{new}_mod.lin", f"{old}.norm1{'_context' if text else ''}.linear")
            names = ("add_q_proj", "add_k_proj", "add_v_proj") if text else ("to_q", "to_k", "to_v")
            move(f"{new}_attn.qkv", *(f"{old}.attn.{name}" for name in names))
            move(f"{new}_attn.norm.query_norm", f"{old}.attn.norm_{'added_' if text else ''}q")
            move(f"{new}_attn.norm.key_norm", f"{old}.attn.norm_{'added_' if text else ''}k")
            move(f"{new}_attn.proj", f"{old}.attn.{out}")
            move(f"{new}_mlp.0", f"{old}.{ff}.net.0.proj")
            move(f"{new}_mlp.2", f"{old}.{ff}.net.2")
    for i in range(model.config.num_single_layers):
        old, new = f"single_transformer_blocks.{i}", f"single_blocks.{i}"
        move(f"{new}.modulation.lin", f"{old}.norm.linear")
        move(f"{new}.linear1", *(f"{old}.{name}" for name in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")))
        move(f"{new}.linear2", f"{old}.proj_out")
        move(f"{new}.norm.query_norm", f"{old}.attn.norm_q")
        move(f"{new}.norm.key_norm", f"{old}.attn.norm_k")
    assert not state
    return result


@pytest.fixture
def narrow(monkeypatch):
    """diffusers' conversion of names for models of this width; it is written for FLUX.1's own."""
    entry = single_file_model.SINGLE_FILE_LOADABLE_CLASSES["FluxTransformer2DModel"]
    source = inspect.getsource(entry["checkpoint_mapping_fn"])
    assert source.count("inner_dim = 3072") == 1
    scope = dict(vars(single_file_utils))
    exec(source.replace("inner_dim = 3072", "inner_dim = 32"), scope)
    monkeypatch.setitem(entry, "checkpoint_mapping_fn", scope[entry["checkpoint_mapping_fn"].__name__])


@pytest.mark.parametrize("names", ["diffusers", "original"])
@pytest.mark.parametrize(
    "settings",
    [{}, {"w_bits": 0}, {"w_bits": 3, "clip_init": "max", "quantize_modulation": False}, {"w_bits": 2, "lora_r": 2}],
)
def test_a_single_file_is_quantized_as_a_folder_is(plain, tmp_path, narrow, names, settings):
    model = diffusers.FluxTransformer2DModel.from_pretrained(plain)
    tensors = original_names(model) if names == "original" else model.state_dict()
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, tmp_path / "one.safetensors")
    expected = FluxTransformer2DModel.from_pretrained(plain, **settings)
    for source in (str(tmp_path / "one.safetensors"), load_file(tmp_path / "one.safetensors")):
        loaded = FluxTransformer2DModel.from_single_file(source, config=str(plain), **settings)
        for key in ("w_bits", "lora_r", "clip_init", "quantize_modulation", "packed", "num_layers"):
            assert loaded.config[key] == expected.config[key]
        torch.testing.assert_close(output(loaded), output(expected))
        found = dict(loaded.named_parameters())
        for name, parameter in expected.named_parameters():
            assert found.pop(name).equal(parameter) or name.endswith("lora_A"), name
        assert not found
    loaded.save_pretrained(tmp_path / "folder")
    torch.testing.assert_close(output(FluxTransformer2DModel.from_pretrained(tmp_path / "folder")), output(loaded))


def test_files_that_hold_no_full_precision_flux(plain, ternary, tmp_path, narrow):
    model = diffusers.FluxTransformer2DModel.from_pretrained(plain)
    diffusers_names, original = model.state_dict(), original_names(model)
    diffusers_names.pop("proj_out.weight")
    original.pop("double_blocks.0.img_attn.proj.weight")
    quantized = FluxTransformer2DModel.from_pretrained(ternary)
    packed = FluxTransformer2DModel.from_pretrained(ternary).pack()
    for w_bits in (0, 16):
        for tensors in (diffusers_names, original, quantized.state_dict(), packed.state_dict(), {"x": torch.ones(1)}):
            file = tmp_path / "one.safetensors"
            save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, file)
            with pytest.raises(ValueError, match="one.safetensors: not a whole full-precision FLUX") as info:
                FluxTransformer2DModel.from_single_file(str(file), config=str(plain), w_bits=w_bits)
            assert "\n" not in str(info.value)
    for settings, message in (
        ({"w_bits": 9}, "w_bits=9 is not supported"),
        ({"packed": 1, "w_bits": 0}, "packed=1 is no setting to load a file with"),
        ({"w_bits": 0, "quantization_config": object()}, "quantization_config does not go with"),
    ):
        with pytest.raises(ValueError, match=message):
            FluxTransformer2DModel.from_single_file(str(file), config=str(plain), **settings)
    with pytest.raises(TypeError, match=r"from_single_file\(\) got an unexpected keyword argument 'w_bit'"):
        FluxTransformer2DModel.from_single_file(str(file), config=str(plain), w_bit=0)


# Errors: one line that names the thing


def refused(error, match, *args, **kwargs):
    with pytest.raises(error, match=match) as info:
        FluxTransformer2DModel.from_pretrained(*args, **kwargs)
    assert "\n" not in str(info.value)


@pytest.mark.parametrize("settings", [{"w_bits": 9}, {"w_bits": -1}, {"lora_r": -2}, {"clip_init": "mean"}])
def test_settings_that_do_not_exist(plain, settings):
    ((key, value),) = settings.items()
    refused(ValueError, f"{key}={value!r} is not supported: use ", plain, **settings)
    with pytest.raises(ValueError, match=f"{key}={value!r} is not supported: use "):
        FluxTransformer2DModel(**CONFIG, **settings)


@pytest.mark.parametrize(
    ("key", "value", "stored"),
    [("w_bits", 2, 0), ("w_bits", 16, 0), ("lora_r", 4, 0), ("quantize_modulation", False, True)],
)
def test_settings_that_contradict_the_checkpoint(ternary, key, value, stored):
    refused(ValueError, f"asked for {key}={value} but .* with {key}={stored}; leave {key} out", ternary, **{key: value})
    FluxTransformer2DModel.from_pretrained(ternary, **{key: stored})


def rewrite(folder, change):
    tensors = load_file(folder / WEIGHTS)
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


ALPHA = "single_transformer_blocks.0.proj_mlp.weight_clip_val"


def test_missing_tensor(ternary):
    rewrite(ternary, lambda tensors: tensors.pop(ALPHA))
    refused(ValueError, f"{ALPHA} is missing;", ternary)


def test_unexpected_tensors(ternary):
    rewrite(ternary, lambda tensors: tensors.update({"zz": torch.ones(1), "zzz": torch.ones(1)}))
    refused(ValueError, r"zz is not expected by a model with w_bits=0 \(and 1 more tensors\);", ternary)


def test_wrong_shape(ternary):
    rewrite(ternary, lambda tensors: tensors.update({ALPHA: torch.ones(3, 1)}))
    refused(ValueError, rf"{ALPHA} has shape \[3, 1\], expected \[128, 1\];", ternary)


def test_quantized_weights_under_a_full_precision_config(ternary):
    config = json.loads((ternary / "config.json").read_text())
    (ternary / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "w_bits"}))
    refused(ValueError, "weight_clip_val is not expected by a model with w_bits=16", ternary)


def test_nan_in_a_weight(plain, tmp_path):
    shutil.copytree(plain, tmp_path, dirs_exist_ok=True)
    rewrite(tmp_path, lambda tensors: tensors["transformer_blocks.1.attn.to_k.weight"].view(-1)[5].fill_(torch.nan))
    refused(ValueError, "^transformer_blocks.1.attn.to_k: the weight holds NaN or inf", tmp_path, w_bits=0)


def test_broken_shards(teacher, tmp_path):
    shutil.copytree(teacher[1], tmp_path, dirs_exist_ok=True)
    index = json.loads((tmp_path / f"{WEIGHTS}.index.json").read_text())
    lost = "transformer_blocks.1.attn.to_k.weight"
    shard = tmp_path / index["weight_map"][lost]
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    refused(OSError, shard.name, tmp_path, w_bits=0)
    shard.unlink()
    refused(OSError, shard.name, tmp_path, w_bits=0)
    shard.write_bytes(whole)
    save_file({name: t for name, t in load_file(shard).items() if name != lost}, shard)  # the index still promises it
    refused(ValueError, f"{lost} is missing", tmp_path, w_bits=0)


def test_folders_that_hold_something_else(plain, tmp_path):
    refused(OSError, "config.json", tmp_path)
    (tmp_path / "config.json").write_text((plain / "config.json").read_text())
    refused(OSError, WEIGHTS, tmp_path)
    torch.save({}, tmp_path / "diffusion_pytorch_model.bin")  # a pickle is not an alternative
    refused(OSError, WEIGHTS, tmp_path)
    (tmp_path / "config.json").write_text('{"_class_name": "AutoencoderKL"}')
    refused(ValueError, "describes a AutoencoderKL, expected a FluxTransformer2DModel", tmp_path)


def test_refuses_what_would_go_wrong_silently(plain):
    refused(ValueError, "device_map='auto' is not supported: name one device", plain, device_map="auto")
    FluxTransformer2DModel.from_pretrained(plain).fuse_qkv_projections()
    with pytest.raises(ValueError, match="would drop the quantizers"):
        FluxTransformer2DModel.from_pretrained(plain, w_bits=0).fuse_qkv_projections()


# Adapters and memory


def test_a_peft_lora_on_top(plain):
    peft = pytest.importorskip("peft")
    model = FluxTransformer2DModel.from_pretrained(plain, w_bits=0)
    expected = output(model)
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "proj_mlp"], init_lora_weights=True))
    assert torch.equal(output(model), expected)
    assert isinstance(model.transformer_blocks[0].attn.to_q.base_layer, QuantizeLinear)


LOAD_AND_MEASURE = """
    import sys
    import torch
    from models.modeling_flux_quant import FluxTransformer2DModel

    def resident(key):
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith(key))

    before = resident("VmRSS")
    model = FluxTransformer2DModel.from_pretrained(sys.argv[1], w_bits=0, torch_dtype=torch.bfloat16)
    print(resident("VmHWM") - before, sum(p.numel() * p.element_size() for p in model.parameters()))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads peak memory from /proc")
def test_loading_needs_little_more_memory_than_the_model(tmp_path):
    """1.3 B parameters in bf16 shards. Peak of the resident set, mapped pages of the shards included."""
    with torch.device("meta"):
        model = diffusers.FluxTransformer2DModel(num_layers=2, num_single_layers=4, guidance_embeds=True)
    model.save_config(tmp_path)
    noise = torch.randn(2**26).mul_(0.02).bfloat16()
    shards, weight_map = {}, {}
    for name, parameter in model.named_parameters():  # a shard for every block, small ones for the rest
        shards.setdefault("-".join(name.split(".")[:2]) + ".safetensors", {})[name] = parameter
    for file, shard in shards.items():
        save_file({name: noise[: p.numel()].view(p.shape).clone() for name, p in shard.items()}, tmp_path / file)
        weight_map |= dict.fromkeys(shard, file)
    (tmp_path / f"{WEIGHTS}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    try:
        root = Path(__file__).parents[1]
        command = [sys.executable, "-c", textwrap.dedent(LOAD_AND_MEASURE), tmp_path]
        result = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    finally:
        shutil.rmtree(tmp_path)
    peak, size = map(int, result.stdout.split())
    assert size > 2.5e9
    assert peak < 1.15 * size
