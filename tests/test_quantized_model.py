"""Quantized transformers of each family against diffusers' own; saving and loading; what must fail and how.

What does not depend on the family is tested on FLUX.1's alone.
"""

import copy
import inspect
import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers.loaders import single_file_model, single_file_utils
from original_names import original_names
from safetensors.torch import load_file, save_file
from tiny_models import CONFIG, CONFIGS, OURS, STOCK, inputs, output, randomized, stock
from torch import nn

from models.families import load_transformer, transformer_class
from models.modeling_flux_quant import FluxTransformer2DModel, QuantizeLinear
from models.trained import describe_base, save_trained
from models.utils_quant import LoRAQuantizeLinear, init_clip_val

WEIGHTS = "diffusion_pytorch_model.safetensors"
LORA = {"FLUX.1": ["to_q", "proj_mlp"], "FLUX.2": ["to_q", "to_qkv_mlp_proj"]}
both = pytest.mark.parametrize("plain", ["FLUX.1", "FLUX.2"], indirect=True)


@pytest.fixture(
    scope="module",
    params=[("FLUX.1", True), ("FLUX.1", False), ("FLUX.2", False)],
    ids=["FLUX.1 with guidance", "FLUX.1", "FLUX.2"],
)
def teacher(request, tmp_path_factory):
    """diffusers' model, and the folder of its sharded checkpoint."""
    folder = tmp_path_factory.mktemp("plain")
    model = stock(*request.param)
    model.save_pretrained(folder, max_shard_size="100KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return model, folder


@pytest.fixture(scope="module")
def plain(request, tmp_path_factory):
    """The folder of a full-precision checkpoint in one file; of FLUX.1 unless a test asks for both."""
    folder = tmp_path_factory.mktemp("plain")
    stock(getattr(request, "param", "FLUX.1")).save_pretrained(folder)
    return folder


@pytest.fixture
def ternary(plain, tmp_path):
    """The folder of a quantized checkpoint, a fresh one for each test to break."""
    load_transformer(plain, w_bits=0).save_pretrained(tmp_path / "ternary")
    return tmp_path / "ternary"


def expected_linears(model, modulation=True):
    """The names of the linears that are to be quantized, found by the families' own layout."""
    inside = {n for n, m in model.named_modules() if isinstance(m, nn.Linear) and "transformer_blocks." in n}
    if "pooled_projection_dim" in model.config:
        modulations = {n for n in inside if ".norm" in n}
        assert len(modulations) == 2 * 2 + 3 and len(inside) == 2 * 14 + 3 * 6
    else:
        streams = ("double_stream_modulation_img", "double_stream_modulation_txt", "single_stream_modulation")
        modulations = {f"{stream}.linear" for stream in streams}
        assert len(inside) == 2 * 12 + 3 * 2
    return inside | modulations if modulation else inside - modulations


def quantized_linears(model):
    return {name: model.get_submodule(name) for name in expected_linears(model)}


# Full precision


def test_full_precision_is_diffusers_model_bit_for_bit(teacher):
    reference, folder = teacher
    model, info = load_transformer(folder, output_loading_info=True)
    assert type(model) is transformer_class(reference) and isinstance(model, type(reference))
    assert not any(info.values())
    assert not any(isinstance(m, QuantizeLinear) for m in model.modules())
    assert torch.equal(output(model), output(reference))


def gradients(model, checkpointing):
    model.enable_gradient_checkpointing() if checkpointing else model.disable_gradient_checkpointing()
    model.zero_grad()
    out = model.train()(**inputs(model.config))[0]
    out.square().sum().backward()
    return [out.detach()] + [p.grad for p in model.parameters()]


def test_full_precision_gradients_are_diffusers_with_and_without_checkpointing(teacher):
    reference, folder = teacher
    expected = gradients(reference, False)
    for checkpointing in (False, True):
        for model in (reference, load_transformer(folder)):
            assert all(map(torch.equal, gradients(model, checkpointing), expected))


@both
def test_quantized_gradients_with_and_without_checkpointing(plain):
    model = load_transformer(plain, w_bits=0, lora_r=2)
    assert all(map(torch.equal, gradients(model, True), gradients(model, False)))


@both
@pytest.mark.parametrize("lora_r", [0, 2])
def test_gradients_under_layerwise_casting_to_8_bit_floats(plain, lora_r):
    model = load_transformer(plain, w_bits=0, lora_r=lora_r, dtype=torch.bfloat16).train()
    reference = copy.deepcopy(model)
    model.enable_layerwise_casting(torch.float8_e4m3fn, torch.bfloat16)
    stored = dict(model.named_parameters())
    assert stored["transformer_blocks.0.attn.to_q.weight"].dtype == torch.float8_e4m3fn
    for name, parameter in reference.named_parameters():
        parameter.data = stored[name].data.to(parameter.dtype)
    for each in (reference, model):
        each(**inputs(model.config, torch.bfloat16))[0].float().square().sum().backward()
    for name, parameter in reference.named_parameters():
        assert torch.equal(stored[name].grad, parameter.grad), name


# What is quantized


@both
@pytest.mark.parametrize("modulation", [True, False])
@pytest.mark.parametrize("settings", [{"w_bits": 0}, {"w_bits": 4}, {"w_bits": 16, "lora_r": 2}])
def test_the_linears_that_were_asked_for_and_no_others(plain, tmp_path, settings, modulation):
    settings = settings | {"quantize_modulation": modulation}
    model = load_transformer(plain, **settings)
    model.save_pretrained(tmp_path)
    built = type(model)(**stock_config(plain), **settings)
    for each in (model, built, load_transformer(tmp_path)):
        quantized = {n for n, m in each.named_modules() if isinstance(m, QuantizeLinear)}
        assert quantized == expected_linears(each, modulation)
        assert each.config.quantize_modulation == modulation


def stock_config(folder):
    return {key: value for key, value in json.loads((folder / "config.json").read_text()).items() if key[0] != "_"}


def test_step_sizes_start_from_the_weights(teacher):
    reference, folder = teacher
    for settings in ({"w_bits": 0}, {"w_bits": 3, "clip_init": "max"}, {"w_bits": 2, "weight_layerwise": True}):
        model, info = load_transformer(folder, output_loading_info=True, **settings)
        assert not any(info.values())
        for name, linear in quantized_linears(model).items():
            weight = reference.get_submodule(name).weight
            expected = init_clip_val(
                weight, settings["w_bits"], settings.get("clip_init", "mse"), settings.get("weight_layerwise", False)
            )
            assert torch.equal(linear.weight_clip_val, expected)
            assert torch.equal(linear.weight, weight)
            assert linear.weight_clip_val.requires_grad


def test_output_is_that_of_diffusers_with_quantized_weights(teacher):
    reference, folder = teacher
    model = load_transformer(folder, w_bits=0)
    rounded = type(reference).from_pretrained(folder)
    for name, linear in quantized_linears(model).items():
        rounded.get_submodule(name).weight.data = linear.quantized_weight().detach()
    assert torch.equal(output(model), output(rounded))
    assert not torch.equal(output(model), output(reference))


@both
def test_loading_warns_of_nothing(plain, caplog):
    logger = diffusers.utils.logging.get_logger("diffusers")
    logger.addHandler(caplog.handler)
    model = load_transformer(plain, w_bits=0, lora_r=2)
    logger.removeHandler(caplog.handler)
    assert not caplog.records
    assert not any(p.is_meta for p in model.parameters())
    assert all((layer.lora_B == 0).all() for layer in quantized_linears(model).values())
    assert 0.005 < torch.cat([layer.lora_A.flatten() for layer in quantized_linears(model).values()]).std() < 0.02


# Saving and loading


@pytest.mark.parametrize(
    ("plain", "w_bits", "lora_r"),
    [
        *(("FLUX.1", w_bits, lora_r) for w_bits in (*range(9), 16, 32) for lora_r in (0, 3)),
        *(("FLUX.2", w_bits, lora_r) for w_bits, lora_r in ((0, 0), (0, 3), (3, 0), (16, 3))),
    ],
    indirect=["plain"],
)
def test_round_trip(plain, tmp_path, w_bits, lora_r):
    model = load_transformer(plain, w_bits=w_bits, lora_r=lora_r, lora_alpha=2.0, weight_layerwise=w_bits % 2 == 1)
    randomized(model, seed=1)  # as if trained: LoRA and step sizes no longer those of the weights
    model.save_pretrained(tmp_path, max_shard_size="200KB")
    again, info = load_transformer(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert torch.equal(output(again), output(model))
    for key in ("w_bits", "lora_r", "lora_alpha", "clip_init", "weight_layerwise", "quantize_modulation"):
        assert again.config[key] == model.config[key]
    layers = [m for m in again.modules() if isinstance(m, QuantizeLinear)]
    assert all(layer.weight_layerwise == model.config.weight_layerwise for layer in layers)
    assert all(isinstance(layer, LoRAQuantizeLinear) == (lora_r > 0) for layer in layers)


@both
def test_config_alone_rebuilds_the_model(plain):
    model = load_transformer(plain, w_bits=2, lora_r=3)
    rebuilt = type(model).from_config(model.config)
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


@both
@pytest.mark.parametrize("lora_r", [0, 2])
def test_step_sizes_and_lora_stay_fp32(plain, tmp_path, lora_r):
    model = load_transformer(plain, w_bits=0, lora_r=lora_r, torch_dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    loaded = load_transformer(tmp_path, torch_dtype=torch.bfloat16)
    cast = load_transformer(plain, w_bits=0, lora_r=lora_r).to(torch.bfloat16)
    for each in (model, loaded, cast):
        assert each.dtype == torch.bfloat16
        for name, parameter in each.named_parameters():
            kept = name.endswith(("weight_clip_val", "lora_A", "lora_B"))
            assert parameter.dtype == (torch.float32 if kept else torch.bfloat16), name
        assert output(each, torch.bfloat16).dtype == torch.bfloat16


@both
@pytest.mark.parametrize("start", [False, True])
def test_what_was_trained_and_a_base_make_the_model_again(plain, tmp_path, start):
    shutil.copytree(plain, tmp_path / "base/transformer")
    model = load_transformer(plain, w_bits=0, lora_r=2, lora_alpha=8.0).requires_grad_(False)
    if start:
        load_transformer(plain, w_bits=0, clip_init="max").pack().save_pretrained(tmp_path / "packed")
        model.start_from(load_transformer(tmp_path / "packed"))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.requires_grad_().data.normal_(std=0.1)
    folder = tmp_path / "trained"
    folder.mkdir()
    save_trained(model, folder, describe_base(model, str(tmp_path / "base"), str(tmp_path / "packed") * start or None))
    assert {file.name for file in folder.iterdir()} == {"base.json", "config.json", "trained.safetensors"}
    again = load_transformer(folder)
    assert type(again) is type(model)
    assert torch.equal(output(again), output(model.eval()))


# One file


@pytest.fixture
def narrow(monkeypatch):
    """diffusers' conversion of names for models of this width; it is written for FLUX.1's own."""
    entry = single_file_model.SINGLE_FILE_LOADABLE_CLASSES["FluxTransformer2DModel"]
    source = inspect.getsource(entry["checkpoint_mapping_fn"])
    assert source.count("inner_dim = 3072") == 1
    scope = dict(vars(single_file_utils))
    exec(source.replace("inner_dim = 3072", "inner_dim = 32"), scope)
    monkeypatch.setitem(entry, "checkpoint_mapping_fn", scope[entry["checkpoint_mapping_fn"].__name__])


@both
@pytest.mark.parametrize("names", ["diffusers", "original"])
@pytest.mark.parametrize(
    "settings",
    [{}, {"w_bits": 0}, {"w_bits": 3, "clip_init": "max", "quantize_modulation": False}, {"w_bits": 2, "lora_r": 2}],
)
def test_a_single_file_is_quantized_as_a_folder_is(plain, tmp_path, narrow, names, settings):
    expected = load_transformer(plain, **settings)
    kind, model = type(expected), STOCK[expected.family.name].from_pretrained(plain)
    tensors = original_names(model) if names == "original" else model.state_dict()
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, tmp_path / "one.safetensors")
    for source in (str(tmp_path / "one.safetensors"), load_file(tmp_path / "one.safetensors")):
        loaded = kind.from_single_file(source, config=str(plain), **settings)
        for key in ("w_bits", "lora_r", "clip_init", "quantize_modulation", "packed", "num_layers"):
            assert loaded.config[key] == expected.config[key]
        torch.testing.assert_close(output(loaded), output(expected))
        found = dict(loaded.named_parameters())
        for name, parameter in expected.named_parameters():
            assert found.pop(name).equal(parameter) or name.endswith("lora_A"), name
        assert not found
    loaded.save_pretrained(tmp_path / "folder")
    torch.testing.assert_close(output(kind.from_pretrained(tmp_path / "folder")), output(loaded))


@both
def test_files_that_hold_no_full_precision_flux(plain, ternary, tmp_path, narrow):
    quantized, packed = load_transformer(ternary), load_transformer(ternary).pack()
    kind, family = type(quantized), quantized.family.name
    model, (others,) = STOCK[family].from_pretrained(plain), map(stock, CONFIGS.keys() - {family})
    diffusers_names, original = model.state_dict(), original_names(model)
    diffusers_names.pop("proj_out.weight")
    original.pop("double_blocks.0.img_attn.proj.weight")
    for w_bits in (0, 16):
        for tensors in (
            diffusers_names, original, quantized.state_dict(), packed.state_dict(), others.state_dict(),
            original_names(others), {"x": torch.ones(1)},
        ):  # fmt: skip
            file = tmp_path / "one.safetensors"
            save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, file)
            with pytest.raises(ValueError, match=f"one.safetensors: no full-precision {family} transf") as info:
                kind.from_single_file(str(file), config=str(plain), w_bits=w_bits)
            assert "\n" not in str(info.value)
    for settings, message in (
        ({"w_bits": 9}, "w_bits=9 is not supported"),
        ({"packed": 1, "w_bits": 0}, "packed=1 is no setting to load a file with"),
        ({"w_bits": 0, "quantization_config": object()}, "quantization_config does not go with"),
    ):
        with pytest.raises(ValueError, match=message):
            kind.from_single_file(str(file), config=str(plain), **settings)
    with pytest.raises(TypeError, match=r"from_single_file\(\) got an unexpected keyword argument 'w_bit'"):
        kind.from_single_file(str(file), config=str(plain), w_bit=0)


# Errors: one line that names the thing


def refused(error, match, *args, kind=FluxTransformer2DModel, **kwargs):
    with pytest.raises(error, match=match) as info:
        kind.from_pretrained(*args, **kwargs)
    assert "\n" not in str(info.value)


@pytest.mark.parametrize("kind", OURS.values())
def test_arguments_are_those_of_diffusers_and_the_settings(kind):
    with pytest.raises(TypeError, match="unexpected keyword argument 'w_bit'"):
        kind(**CONFIG, w_bit=0)
    with torch.device("meta"):
        model = kind(8, w_bits=0)  # in their order, too
    assert (model.config.patch_size, model.config.w_bits) == (8, 0)


@pytest.mark.parametrize("settings", [{"w_bits": 9}, {"w_bits": -1}, {"lora_r": -2}, {"clip_init": "mean"}])
def test_settings_that_do_not_exist(plain, settings):
    ((key, value),) = settings.items()
    refused(ValueError, f"{key}={value!r} is not supported: use ", plain, **settings)
    with pytest.raises(ValueError, match=f"{key}={value!r} is not supported: use "):
        FluxTransformer2DModel(**CONFIGS["FLUX.1"], **settings)


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
    kind = transformer_class(teacher[0])
    index = json.loads((tmp_path / f"{WEIGHTS}.index.json").read_text())
    lost = "transformer_blocks.1.attn.to_k.weight"
    shard = tmp_path / index["weight_map"][lost]
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    refused(OSError, shard.name, tmp_path, w_bits=0, kind=kind)
    shard.unlink()
    refused(OSError, shard.name, tmp_path, w_bits=0, kind=kind)
    shard.write_bytes(whole)
    save_file({name: t for name, t in load_file(shard).items() if name != lost}, shard)  # the index still promises it
    refused(ValueError, f"{lost} is missing", tmp_path, w_bits=0, kind=kind)


def test_folders_that_hold_something_else(plain, tmp_path):
    refused(OSError, "config.json", tmp_path)
    (tmp_path / "config.json").write_text((plain / "config.json").read_text())
    refused(OSError, WEIGHTS, tmp_path)
    torch.save({}, tmp_path / "diffusion_pytorch_model.bin")  # a pickle is not an alternative
    refused(OSError, WEIGHTS, tmp_path)
    (tmp_path / "config.json").write_text('{"_class_name": "AutoencoderKL"}')
    refused(ValueError, "describes a AutoencoderKL, expected a FluxTransformer2DModel", tmp_path)


@both
@pytest.mark.parametrize("kind", ["full precision", "trainable", "packed"])
def test_a_folder_of_one_family_is_refused_by_the_other_ones_class(plain, tmp_path, kind):
    folder = plain
    if kind != "full precision":
        model, folder = load_transformer(plain, w_bits=0), tmp_path
        (model.pack() if kind == "packed" else model).save_pretrained(folder)
    (other,) = set(OURS.values()) - {type(load_transformer(folder))}
    name = json.loads((folder / "config.json").read_text())["_class_name"]
    with pytest.raises(ValueError, match=f": config.json describes a {name}, expected a {other.__name__}; ") as info:
        other.from_pretrained(folder)
    assert "\n" not in str(info.value)


def test_refuses_what_would_go_wrong_silently(plain):
    refused(ValueError, "device_map='auto' is not supported: name one device", plain, device_map="auto")
    FluxTransformer2DModel.from_pretrained(plain).fuse_qkv_projections()
    with pytest.raises(ValueError, match="would drop the quantizers"):
        FluxTransformer2DModel.from_pretrained(plain, w_bits=0).fuse_qkv_projections()


# Adapters and memory


@both
def test_a_peft_lora_on_top(plain):
    peft = pytest.importorskip("peft")
    model = load_transformer(plain, w_bits=0)
    expected = output(model)
    model.add_adapter(peft.LoraConfig(r=2, target_modules=LORA[model.family.name], init_lora_weights=True))
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
    """0.18 B parameters in bf16 shards. Peak of the resident set, mapped pages of the shards included."""
    with torch.device("meta"):
        model = diffusers.FluxTransformer2DModel(num_layers=1, num_single_layers=2, num_attention_heads=12)
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
        # What is freed goes back at once, or the peak would depend on what malloc has kept.
        malloc = {"MALLOC_MMAP_THRESHOLD_": "1000000", "MALLOC_ARENA_MAX": "1"}
        environment = os.environ | malloc
        result = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=True)
    finally:
        shutil.rmtree(tmp_path)
    peak, size = map(int, result.stdout.split())
    assert size > 0.3e9
    assert peak < 1.15 * size


@pytest.mark.parametrize("family", OURS)
def test_a_compiled_packed_model_leaves_few_operations_to_be_launched_one_by_one(family):
    model = OURS[family](**CONFIGS[family], guidance_embeds=family == "FLUX.1", w_bits=0)
    model = randomized(model).pack()
    expected = output(model)
    torch._dynamo.reset()
    try:
        model.compile_repeated_blocks(fullgraph=True, dynamic=False, backend="eager")
        torch.testing.assert_close(output(model), expected)
        given = inputs(model.config)
        with torch.no_grad(), torch.profiler.profile() as profile:
            model(**given)
    finally:
        torch._dynamo.reset()
    alone = [event.name for event in profile.events() if event.cpu_parent is None and event.name.startswith("aten::")]
    # Both embedders, the last projection, scaled times, positions or their embeddings joined, tokens joined.
    assert 0 < len(alone) <= 10, alone
