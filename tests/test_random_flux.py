"""utils/random_flux.py: FLUX.1's shapes, and weights and activations as unkind as trained ones."""

import math

import pytest
import torch
import transformers
from diffusers import FluxPipeline
from torch import nn

from utils import random_flux
from utils.sampling import generate_images, load_pipeline, record_velocities

CPU = torch.device("cpu")


def kurtosis(x: torch.Tensor) -> torch.Tensor:
    """Of each row."""
    x = x - x.mean(-1, keepdim=True)
    return x.pow(4).mean(-1) / x.square().mean(-1).square()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The small pipeline."""
    folder = tmp_path_factory.mktemp("random") / "small"
    folder.mkdir()
    random_flux.write_transformer(folder, random_flux.skeleton("small"), 0, random_flux.SHARD_BYTES[True], CPU)
    random_flux.write_rest(folder, "small", 0, CPU)
    return folder


@pytest.fixture(scope="module")
def seen(folder):
    """What the linears of the small pipeline in bfloat16 get in 28 steps [rows, in], the velocities, the pictures."""
    pipe = load_pipeline(str(folder), torch.bfloat16)
    inputs: dict[str, list] = {}

    def watch(name):
        def keep(module, args, kwargs):
            x = args[0] if args else kwargs["x"]
            inputs.setdefault(name, []).append(x.float().reshape(-1, x.shape[-1]))

        return keep

    for name, module in pipe.transformer.named_modules():
        if isinstance(module, nn.Linear) and "blocks." in name:
            module.register_forward_pre_hook(watch(name), with_kwargs=True)
    with record_velocities(pipe.transformer) as calls:
        pictures = generate_images(pipe, ["a dog", "a red house in the snow"], num_inference_steps=28, batch_size=2)
    velocities = torch.stack([velocity for _, velocity in calls])
    return {name: torch.cat(parts) for name, parts in inputs.items()}, velocities, pictures


def test_the_numbers_are_students():
    """Variance 1, and the quantiles that stand in tables of the t distribution with 5 degrees of freedom."""
    drawn = random_flux.student_t((1_000_000,), torch.Generator().manual_seed(0))
    assert drawn.var().item() == pytest.approx(1, abs=0.02) and drawn.mean().abs() < 0.005
    for share, quantile in {0.75: 0.7267, 0.95: 2.0150, 0.975: 2.5706, 0.995: 4.0321, 0.9995: 6.8688}.items():
        below = (drawn < quantile * math.sqrt(3 / 5)).double().mean().item()
        assert 1 - below == pytest.approx(1 - share, rel=0.1, abs=0)


def test_weights_have_heavy_tails_and_some_larger_rows():
    model = random_flux.skeleton("flux-dev", (1, 1))
    name = "transformer_blocks.0.ff.net.0.proj.weight"
    shape = model.get_parameter(name).shape
    weight = random_flux.matrix(name, shape, torch.Generator().manual_seed(0)).float()
    assert 6 < kurtosis(weight).median() < 12 and kurtosis(weight).max() > 30  # a Gaussian's: 3
    norms = weight.norm(dim=1)  # 1, but for the rows' gain
    assert norms.median().item() == pytest.approx(1, abs=0.05)
    assert (norms > 2.5).double().mean().item() == pytest.approx(1 / 64, rel=0.3)


def test_a_few_channels_are_a_hundred_times_the_others(seen):
    inputs, *_ = seen
    for name, x in inputs.items():
        if name.endswith((".to_q", ".add_q_proj", ".proj_mlp", ".ff.net.0.proj", ".ff_context.net.0.proj")):
            size = x.square().mean(0).sqrt()
            assert 50 < size.max() / size.median() < 500, name
            assert size.argmax() in random_flux.massive_channels(x.shape[1]), name


def test_means_are_far_from_zero(seen):
    """In the median channel of each linear's input the mean is at least 0.7 standard deviations from zero."""
    inputs, *_ = seen
    distances = {}
    for name, x in inputs.items():
        if ".norm" not in name:
            alive = x.std(0) > 0  # units of GELU that never fire are there too
            distances[name] = (x.mean(0)[alive].abs() / x.std(0)[alive]).median().item()
    assert min(distances.values()) > 0.7 and max(distances.values()) > 4


def test_velocities_stay_finite_in_bfloat16_and_differ_from_token_to_token(seen):
    _, velocities, pictures = seen
    assert velocities.dtype == torch.bfloat16 and len(velocities) == 28
    assert velocities.isfinite().all() and pictures.isfinite().all()
    assert 0.2 < velocities.float().std() < 5
    tokens = velocities.float().std(2).mean()  # the same for all tokens, it would be no test of anything
    assert tokens > 0.1 and pictures.std() > 0.1


@pytest.mark.parametrize(("config", "guidance"), [("flux-dev", True), ("flux-schnell", False)])
def test_shapes_are_those_of_flux(config, guidance):
    """Parameters as published: 11.901 B in 19 and 38 blocks, CLIP-L's text model, T5-XXL's encoder, autoencoder."""
    model = random_flux.skeleton(config)
    assert sum(p.numel() for p in model.parameters()) == 11_901_408_320 - (not guidance) * (256 + 3072 + 2) * 3072
    assert model.config.guidance_embeds == guidance
    counts = [sum(p.numel() for p in part.parameters()) for part in random_flux.rest_skeletons(config).values()]
    assert counts == [123_060_480, 4_762_310_656, 83_819_683]


def test_flux_has_three_shards_as_on_the_hub():
    model = random_flux.skeleton("flux-dev").to(torch.bfloat16)
    shards = list(random_flux.shards(model.named_parameters(), random_flux.SHARD_BYTES[False]))
    assert len(shards) == 3 and sum(map(len, shards)) == len(list(model.parameters()))


def test_the_small_pipeline_has_every_feature_of_the_large(folder):
    pipe = FluxPipeline.from_pretrained(folder, dtype=torch.bfloat16)
    config = pipe.transformer.config
    assert config.guidance_embeds and config.num_layers >= 2 and config.num_single_layers >= 2
    assert config.attention_head_dim == 128 and config.in_channels == 64 and config.axes_dims_rope == [16, 56, 56]
    assert (pipe.tokenizer.model_max_length, pipe.tokenizer_2.model_max_length) == (77, 32)
    assert isinstance(pipe.text_encoder_2, transformers.T5EncoderModel)
    assert all(p.dtype == torch.bfloat16 for p in pipe.text_encoder_2.parameters())
    for part in ("transformer", "text_encoder_2"):
        assert len(list((folder / part).glob("*-of-*.safetensors"))) > 1
        assert len(list((folder / part).glob("*.index.json"))) == 1
    widths = {m.in_features for n, m in pipe.transformer.named_modules() if isinstance(m, nn.Linear) and "blocks." in n}
    assert widths == {256, 1024, 1280}
    assert not any(p.is_meta for part in pipe.components.values() if isinstance(part, nn.Module)
                   for p in part.parameters())  # fmt: skip


def test_what_is_loaded_is_what_was_drawn(folder):
    """Nothing is missing, newly initialised or tied to something else."""
    pipe = FluxPipeline.from_pretrained(folder, dtype=torch.bfloat16)
    for part, skeleton in {"transformer": random_flux.skeleton("small"), **random_flux.rest_skeletons("small")}.items():
        model = getattr(pipe, part)
        found = dict(model.named_parameters())
        drawn = dict(random_flux.random_tensors(skeleton, 0, CPU))
        assert found.keys() == drawn.keys()
        for name, tensor in drawn.items():
            assert torch.equal(found[name], tensor), name


# --------------------------------------------------------------------------------------------------- FLUX.2-klein


def test_shapes_are_those_of_klein():
    """Counted by hand from its config.json: width 3072, SwiGLU of 9216, 5 and 20 blocks; Qwen3-4B's 4.02 B, tied."""
    width, hidden = 3072, 9216
    double = 8 * width**2 + 2 * 3 * width * hidden + 4 * 128
    single = width * (3 * width + 2 * hidden) + (width + hidden) * width + 2 * 128
    outside = (6 + 6 + 3) * width**2 + (128 + 7680 + 256 + width) * width + 2 * width**2 + width * 128
    model = random_flux.skeleton("flux2-klein-4b")
    assert sum(p.numel() for p in model.parameters()) == 5 * double + 20 * single + outside
    assert not model.config.guidance_embeds and not any(name.endswith("bias") for name, _ in model.named_parameters())
    rest = random_flux.rest_skeletons("flux2-klein-4b")
    layer = 2560 * (4096 + 2 * 1024) + 4096 * 2560 + 3 * 2560 * 9728 + 2 * 2560 + 2 * 128
    assert sum(p.numel() for p in rest["text_encoder"].parameters()) == 36 * layer + 151936 * 2560 + 2560
    assert rest["vae"].config.latent_channels == 32 and rest["vae"].bn.num_features == 128
    widths = {random_flux.CONFIGS[name]["joint_attention_dim"] // 3 for name in ("flux2-klein-4b", "small-klein")}
    assert widths == {random_flux.REST[name]["qwen3"]["hidden_size"] for name in ("flux2-klein-4b", "small-klein")}


def test_a_klein_of_a_few_mb_is_as_unkind_and_draws(klein_folder):
    """Massive channels, means far from zero, pictures that differ; what is loaded is what was drawn."""
    pipe = load_pipeline(str(klein_folder), torch.bfloat16)
    assert sum(file.stat().st_size for file in klein_folder.rglob("*.safetensors")) < 8e6
    inputs: dict[str, torch.Tensor] = {}
    for name, module in pipe.transformer.named_modules():
        if name.endswith((".to_q", ".add_q_proj", ".to_qkv_mlp_proj")):
            module.register_forward_pre_hook(lambda _, args, name=name: inputs.update({name: args[0].float()}))
    with record_velocities(pipe.transformer) as calls:
        pictures = generate_images(pipe, ["a dog", "a red house in the snow"], batch_size=2)
    velocities = torch.stack([velocity for _, velocity in calls])
    assert len(velocities) == 4 and velocities.isfinite().all() and 0.2 < velocities.float().std() < 5
    assert velocities.float().std(2).mean() > 0.1 and pictures.std() > 0.1
    assert (pictures[0] - pictures[1]).abs().mean() > 0.01
    for name, x in inputs.items():
        size = x.flatten(0, 1).square().mean(0).sqrt()
        assert size.argmax() in random_flux.massive_channels(x.shape[-1]), name
        assert size.max() > 10 * size.median(), name
    means = [(x.mean((0, 1)).abs() / x.std((0, 1))).median() for x in inputs.values()]
    assert max(means) > 0.5
    for part, skeleton in random_flux.rest_skeletons("small-klein").items():
        found = getattr(pipe, part).state_dict()
        for name, tensor in random_flux.random_tensors(skeleton, 0, CPU):
            assert torch.equal(found[name], tensor.to(found[name].dtype)), f"{part}.{name}"
    assert (pipe.vae.bn.running_mean != 0).all() and (pipe.vae.bn.running_var != 1).any()
