"""The lookup by class name, and that what a family says of its blocks is so."""

import json

import diffusers
import pytest
import torch
from original_names import original_names
from tiny_models import CONFIGS, OURS, output, stock
from torch import nn

from models.families import load_transformer, transformer_class
from models.packing import PackedLinear

families = pytest.mark.parametrize("family", OURS)


@families
def test_the_class_is_found_by_name_config_and_model(family):
    kind = OURS[family]
    plain, ours = stock(family), kind(**CONFIGS[family])
    spread = type(f"FSDP{kind.__name__}", (kind,), {})  # as FSDP2 names the class that it gives a model
    for of in (
        kind.__name__, json.loads(plain.to_json_string()), plain, ours, spread(**CONFIGS[family]),
        torch.compile(plain), torch.compile(ours),
    ):  # fmt: skip
        assert transformer_class(of) is kind
    assert kind.family.name == family


@pytest.mark.parametrize("of", ["UNet2DModel", {"_class_name": "UNet2DModel"}, {}, nn.Linear(1, 1)])
def test_other_classes_are_named(of):
    name = "Linear" if isinstance(of, nn.Module) else "None" if of == {} else "UNet2DModel"
    match = f"^here: a {name} is not supported, only FluxTransformer2DModel and Flux2Transformer2DModel$"
    with pytest.raises(ValueError, match=match):
        transformer_class(of, "here")


@families
@pytest.mark.parametrize("packed", [False, True])
def test_a_folder_is_loaded_by_its_own_class(family, packed, tmp_path):
    model = OURS[family](**CONFIGS[family], w_bits=0).eval()
    (model.pack() if packed else model).save_pretrained(tmp_path / "transformer")
    again = load_transformer(tmp_path, subfolder="transformer", dtype=torch.float32, w_bits=0)
    assert type(again) is OURS[family] and again.config.packed == packed
    assert torch.equal(output(again), output(model))


def test_a_folder_that_holds_another_model_is_named(tmp_path):
    diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"^{tmp_path}: a AutoencoderKL is not supported, only "):
        load_transformer(tmp_path)
    with pytest.raises(OSError, match="config.json"):
        load_transformer(tmp_path / "nowhere")


def inputs_of(model, names):
    """What each of the linears of these names is given."""
    given, hooks = {}, []
    for name in names:
        see = lambda _, args, name=name: given.setdefault(name, args[0])  # noqa: E731
        hooks.append(model.get_submodule(name).register_forward_pre_hook(see))
    output(model)
    for hook in hooks:
        hook.remove()
    return given


@families
def test_what_a_group_of_linears_is_given_depends_on_the_groups_before_it_alone(family):
    model, layout = stock(family), OURS[family].family
    for block in (f"{name}.0" for name in layout.blocks):
        groups = [[f"{block}.{name}" for name in group] for group in layout.order]
        groups = [[name for name in group if name in layout.linears(model)] for group in groups]
        groups = [group for group in groups if group]
        names = [name for group in groups for name in group]
        assert sorted(names) == sorted(name for name in layout.linears(model) if name.startswith(f"{block}."))
        expected = inputs_of(model, names)
        for number in reversed(range(len(groups))):
            for name in groups[number]:
                model.get_submodule(name).weight.data.neg_()
            found = inputs_of(model, names)
            same = {name for name in names if torch.equal(found[name], expected[name])}
            assert same >= {name for group in groups[: number + 1] for name in group}
            assert number == len(groups) - 1 or not same.issuperset(groups[number + 1])
    first = inputs_of(model, [f"transformer_blocks.0.attn.to_{part}" for part in "qkv"])
    assert len({id(tensor) for tensor in first.values()}) == 1


@families
def test_blocks_called_as_the_family_says_make_what_the_model_makes(family):
    """As a walk from block to block does it, which is given no more than diffusers' own model."""
    model, layout = stock(family), OURS[family].family
    given, made = {}, {}

    def first(module, args, kwargs):
        given.update({name: kwargs[name] for name in ("hidden_states", "encoder_hidden_states", "image_rotary_emb")})

    hooks = [model.get_submodule(layout.block_names(model)[0]).register_forward_pre_hook(first, with_kwargs=True)]
    for blocks in layout.blocks.values():
        for module in blocks.made.values():
            keep = lambda _, args, result, module=module: made.setdefault(module, result)  # noqa: E731
            hooks.append(model.get_submodule(module).register_forward_hook(keep))
    last = []
    hooks.append(model.norm_out.register_forward_pre_hook(lambda module, args: last.append(args[0])))
    output(model)
    for hook in hooks:
        hook.remove()
    text, image = given.pop("encoder_hidden_states"), given.pop("hidden_states")
    with torch.no_grad():
        for name, blocks in layout.blocks.items():
            assert len(model.get_submodule(name)) == model.config[blocks.count]
            arguments = given | {argument: made[module] for argument, module in blocks.made.items()} | blocks.fixed
            for block in model.get_submodule(name):
                text, image = block(hidden_states=image, encoder_hidden_states=text, **arguments)
    torch.testing.assert_close(image, last[0])


@families
def test_the_linears_are_those_of_the_makers_blocks(family):
    """The makers call blocks by these names, and modulation by "mod"."""
    model, layout = stock(family), OURS[family].family
    original = original_names(model)
    inside = {n: t for n, t in original.items() if t.ndim == 2 and n.startswith(("double", "single"))}
    weights = sum(tensor.numel() for tensor in inside.values())
    modulation = sum(tensor.numel() for name, tensor in inside.items() if "mod" in name)
    assert sum(linear.weight.numel() for linear in layout.linears(model).values()) == weights
    assert sum(p.weight.numel() for p in layout.linears(model, False).values()) == weights - modulation
    packed = OURS[family](**CONFIGS[family], w_bits=0).pack()
    assert {n for n, m in packed.named_modules() if isinstance(m, PackedLinear)} == set(layout.linears(model))
