"""What FLUX.2's transformer has of its own; the rest is tested in test_quantized_model.py and test_packing.py."""

import copy
from math import ceil

import pytest
import torch
from diffusers.models.transformers.transformer_flux2 import (
    Flux2AttnProcessor,
    Flux2KVAttnProcessor,
    Flux2KVParallelSelfAttnProcessor,
    Flux2ParallelSelfAttnProcessor,
)
from tiny_models import CONFIGS, inputs, norm_rotate, output, stock

from models import attention, kernels, modeling_flux2_quant
from models.modeling_flux2_quant import (
    Flux2Transformer2DModel,
    FusedFlux2AttnProcessor,
    FusedFlux2ParallelAttnProcessor,
)
from models.packing import PackedLinear

GPU = torch.device("cuda")
KLEIN_4B = {  # as FLUX.2-klein-4B's config.json has it
    "patch_size": 1, "in_channels": 128, "num_layers": 5, "num_single_layers": 20, "attention_head_dim": 128,
    "num_attention_heads": 24, "joint_attention_dim": 7680, "timestep_guidance_channels": 256, "mlp_ratio": 3.0,
    "axes_dims_rope": (32, 32, 32, 32), "rope_theta": 2000, "eps": 1e-6, "guidance_embeds": False,
}  # fmt: skip


def test_klein_4b_takes_less_than_a_gigabyte_on_disk():
    width = 3072
    double = 2 * (4 + 6 + 3) * width**2  # of each stream q, k, v, out; both halves of SwiGLU, and what comes after
    single = (3 + 6 + 1 + 3) * width**2
    modulation = (6 + 6 + 3) * width**2
    with torch.device("meta"):
        model = Flux2Transformer2DModel(**KLEIN_4B, w_bits=0)
    family, weights = model.family, sum(p.numel() for n, p in model.named_parameters() if "clip_val" not in n)
    linears = family.linears(model)
    assert weights == 3_875_544_576
    assert sum(linear.weight.numel() for linear in linears.values()) == 5 * double + 20 * single + modulation
    assert sum(p.weight.numel() for n, p in linears.items() if family.is_modulation(n)) == modulation == 141_557_760
    assert not any(linear.bias is not None for linear in linears.values())
    codes = sum(linear.out_features * ceil(linear.in_features / 5) for linear in linears.values())
    step_sizes = sum(linear.out_features for linear in linears.values())
    rest = weights - 5 * double - 20 * single - modulation
    assert codes + 4 * step_sizes + 2 * rest < 0.88e9 < 2 * weights / 8.7


def test_with_a_guidance_embedding_it_is_diffusers_model_too(tmp_path):
    reference = stock("FLUX.2", guidance=True)  # as FLUX.2-dev has it
    reference.save_pretrained(tmp_path)
    assert torch.equal(output(Flux2Transformer2DModel.from_pretrained(tmp_path)), output(reference))


@pytest.fixture(scope="module")
def packed():
    """A packed ternary model of random weights; not to be changed."""
    torch.manual_seed(0)
    return Flux2Transformer2DModel(**CONFIGS["FLUX.2"], guidance_embeds=False, w_bits=0).eval().pack()


@pytest.fixture
def fused(monkeypatch):
    """Fast mode's attention as on a GPU, where there is none: what its kernel does, in plain torch."""
    monkeypatch.setattr(attention, "can_rotate", lambda *_: not torch.is_grad_enabled())
    for module in (attention, modeling_flux2_quant):
        monkeypatch.setattr(module, "norm_rotate", norm_rotate)


def test_fast_mode_has_attention_processors_of_its_own_unless_there_are_others(packed):
    model = copy.deepcopy(packed)
    double, single = (blocks[0].attn for blocks in (model.transformer_blocks, model.single_transformer_blocks))
    other, another = (blocks[1].attn for blocks in (model.transformer_blocks, model.single_transformer_blocks))
    other.set_processor(Flux2KVAttnProcessor())
    another.set_processor(Flux2KVParallelSelfAttnProcessor())
    single.processor._attention_backend = "native"
    for mode, kinds in (
        ("fast", (FusedFlux2AttnProcessor, FusedFlux2ParallelAttnProcessor)),
        ("exact", (Flux2AttnProcessor, Flux2ParallelSelfAttnProcessor)),
    ):
        model.set_inference_mode(mode)
        assert (type(double.processor), type(single.processor)) == kinds
        assert single.processor._attention_backend == "native"
        assert (type(other.processor), type(another.processor)) == (
            Flux2KVAttnProcessor, Flux2KVParallelSelfAttnProcessor,
        )  # fmt: skip


def test_fast_mode_hardly_changes_the_velocity(packed, fused):
    model = copy.deepcopy(packed)
    exact, alone = output(model), copy.deepcopy(model).set_inference_mode("fast")
    for name, kind in (("transformer", Flux2AttnProcessor), ("single_transformer", Flux2ParallelSelfAttnProcessor)):
        for block in getattr(alone, f"{name}_blocks"):
            block.attn.set_processor(kind())
    fast = output(model.set_inference_mode("fast"))
    assert 0 < (fast - exact).square().sum() < 1e-3 * exact.square().sum()
    torch.testing.assert_close(fast, output(alone))  # joined or not


@pytest.mark.parametrize(("blocks", "roundings"), [("transformer_blocks", 8), ("single_transformer_blocks", 2)])
def test_tokens_of_one_input_are_rounded_once(packed, fused, blocks, roundings, monkeypatch):
    """A double block's 12 linears have eight inputs; a single block's two have one each, and nothing to be joined."""
    calls, rotated = [], []
    quantize, rotate = kernels.quantize_tokens, modeling_flux2_quant.norm_rotate
    monkeypatch.setattr(kernels, "quantize_tokens", lambda *args: calls.append(args) or quantize(*args))
    for module in (attention, modeling_flux2_quant):
        monkeypatch.setattr(module, "norm_rotate", lambda *args: rotated.append(args) or rotate(*args))
    model = copy.deepcopy(packed).set_inference_mode("fast")
    block = getattr(model, blocks)[0]
    seen = []
    block.register_forward_pre_hook(lambda *_: calls.clear())
    block.register_forward_hook(lambda *_: seen.append(len(calls)))
    output(model)
    assert seen == [roundings]
    assert len(rotated) == len(model.transformer_blocks) + len(model.single_transformer_blocks)


def test_blocks_of_a_kind_compile_whole_and_share_their_code(packed, fused):
    model = copy.deepcopy(packed).set_inference_mode("fast")
    expected = [output(model, seed=seed) for seed in range(2)]
    torch._dynamo.reset()
    try:
        model.compile_repeated_blocks(fullgraph=True, dynamic=False, backend="eager")
        before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        for seed, velocity in enumerate(expected):
            torch.testing.assert_close(output(model, seed=seed), velocity)
        # Beside the blocks: rotary embeddings of text and of image, time, modulation of both kinds, the last norm.
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] - before == 2 + 2 + 1 + 2 + 1
    finally:
        torch._dynamo.reset()


@pytest.mark.gpu
@torch.no_grad()
def test_its_modes_on_a_gpu_eager_and_compiled(monkeypatch):
    torch.manual_seed(0)
    config = CONFIGS["FLUX.2"] | {"attention_head_dim": 64, "num_attention_heads": 4, "axes_dims_rope": (16,) * 4}
    model = Flux2Transformer2DModel(**config, guidance_embeds=False, w_bits=0).eval().pack()
    given = inputs(model.config, torch.bfloat16, text_tokens=40)
    given = {name: part.to(GPU) if torch.is_tensor(part) else part for name, part in given.items()}
    model = torch.nn.Module.to(model, GPU, torch.bfloat16)
    exact = model(**given)[0].double()
    model.set_inference_mode("fast")
    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.RMSNorm, "forward", lambda *_: pytest.fail("diffusers' own attention was called"))
        found = [model(**given)[0]]
    torch._dynamo.reset()
    model.compile_repeated_blocks(fullgraph=True, dynamic=False)
    found.append(model(**given)[0])
    for velocity in found:
        assert 0 < (velocity - exact).square().sum() < 1e-2 * exact.square().sum()


@pytest.mark.parametrize("level", ["leaf_level", "block_level"])
def test_it_is_offloaded_by_diffusers(packed, fused, level):
    model = copy.deepcopy(packed).set_inference_mode("fast")
    expected, here = output(model), torch.device("cpu")
    blocks = {"num_blocks_per_group": 1} if level == "block_level" else {}
    model.enable_group_offload(here, here, level, **blocks)
    for _ in range(2):
        torch.testing.assert_close(output(model), expected)


def test_reference_pictures_are_seen_as_by_diffusers(packed):
    """FLUX.2 edits pictures that stand as further tokens beside the one that it draws; keys and values are kept."""
    plain = stock("FLUX.2", guidance=False)
    for name, module in packed.named_modules():
        if isinstance(module, PackedLinear):
            plain.get_submodule(name).weight.data = module.dequantize()
        elif getattr(module, "weight", None) is not None:
            plain.get_submodule(name).weight.data = module.weight.data
    given, seen = inputs(packed.config), []
    given |= {"num_ref_tokens": 2, "kv_cache_mode": "extract"}
    for model in (plain, copy.deepcopy(packed)):
        for blocks, kind in ((model.transformer_blocks, Flux2KVAttnProcessor),
                             (model.single_transformer_blocks, Flux2KVParallelSelfAttnProcessor)):  # fmt: skip
            for block in blocks:
                block.attn.set_processor(kind())
        with torch.no_grad():
            first, cache = model(**given)
            rest = {"hidden_states": given["hidden_states"][:, 2:], "img_ids": given["img_ids"][2:]}
            again = model(**given | rest | {"kv_cache_mode": "cached", "kv_cache": cache, "num_ref_tokens": 0})[0]
        seen.append(torch.cat([first, again], 1))
    torch.testing.assert_close(seen[1], seen[0])
