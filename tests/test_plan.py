"""utils/plan.py: which way of training is chosen, by sizes and memory written down here."""

import json
import re
from pathlib import Path

import diffusers
import pytest
import torch

from utils import plan
from utils.plan import Size, asked_rank, choose, needs, size_of
from utils.random_flux import skeleton

ROOT = Path(__file__).parents[1]
FLUX = Size(11_901_408_320, 242_050_112)
WEIGHTS = ["--optim", "adamw_torch_8bit"]
LORA = ["--lora_r", "32", "--lora_alpha", "32"]


@pytest.fixture(autouse=True)
def torchao(monkeypatch):
    """As if torchao were here, whether it is or not."""
    monkeypatch.setattr(plan.importlib.util, "find_spec", lambda name: name == "torchao")


def gib(*sizes: float) -> list[int]:
    return [int(size * 2**30) for size in sizes]


@pytest.mark.parametrize(
    ("memory", "batch", "flags", "chosen", "reason"),
    [
        ([80], 1, [], LORA, "a LoRA inside the quantizers; takes 28 GiB a GPU, all weights would take 117"),
        ([48], 4, [], LORA, "takes 34 GiB a GPU"),
        ([139.8], 1, [], WEIGHTS, "all weights, moments in 8 bits; takes 117 GiB"),
        ([80, 80], 1, [], [*WEIGHTS, "--fsdp", "full_shard"], "spread by FSDP2; takes 66 GiB"),
        ([80] * 8, 1, [], [*WEIGHTS, "--fsdp", "full_shard"], "8 × 80 GiB: all weights"),
        ([80, 80], 1, ["--lora_r", "16"], ["--lora_r", "16", "--lora_alpha", "16"], "inside the quantizers, DDP"),
        ([80, 80], 1, ["--lora_r=16"], ["--lora_r", "16", "--lora_alpha", "16"], "inside the quantizers, DDP"),
        ([80, 80], 1, ["--lora_r", "wide"], LORA, "inside the quantizers, DDP"),
        ([48, 48], 1, [], LORA, "DDP"),
        ([80], 1, ["--lora-r", "16"], ["--lora_r", "16", "--lora_alpha", "16"], "inside the quantizers"),
        ([80] * 4, 1, ["--optim=sgd", "--fsdp=1"], [*WEIGHTS, "--fsdp", "full_shard"], "all weights, --optim sgd"),
    ],
)
def test_what_fits_is_chosen_and_flags_override(memory, batch, flags, chosen, reason):
    found, said = choose(FLUX, gib(*memory), batch, flags)
    assert found == chosen and reason in said and "11.9 B parameters" in said


@pytest.mark.parametrize(
    ("memory", "batch", "flags", "message"),
    [
        ([24], 1, [], "on 1 × 24 GiB: training a LoRA takes 28 GiB a GPU at batch 1; run.py --method blockwise"),
        ([32], 4, [], "takes 34 GiB a GPU at batch 4; choose a smaller BATCH and a larger ACCUM"),
        ([80], 1, ["--lora_r", "0"], "all weights takes 117 GiB .* a LoRA takes 28: --lora_r 32"),
        ([], 1, [], "cannot be trained without a GPU; run.py --method blockwise"),
        ([24, 24], 1, ["--ema-decay", "0.99"], "training a LoRA takes 29 GiB a GPU"),
        ([48], 1, ["--feature_loss", "2"], "training a LoRA takes 50 GiB a GPU"),
        ([80, 80], 1, ["--fsdp", "full_shard", "--optim", "adamw_torch"], "all weights takes 100 GiB a GPU"),
    ],
)
def test_what_does_not_fit_says_what_does(memory, batch, flags, message):
    with pytest.raises(ValueError, match=message):
        choose(FLUX, gib(*memory), batch, flags)


def test_moments_in_8_bits_that_cannot_be_had_are_named(monkeypatch):
    monkeypatch.setattr(plan.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="8 bits need torchao, which is not installed: pip install torchao"):
        choose(FLUX, gib(80, 80), 1)
    assert choose(FLUX, gib(80), 1)[0] == LORA


def test_what_is_kept_beside_the_student_counts():
    """By hand: 4 bytes a trained parameter of averages, 8 of Adam's moments in fp32, 2 of the teacher's parameters."""
    plain, gib = needs(FLUX, 2, 1), 2**30
    averaged = needs(FLUX, 2, 1, ["--ema_decay=0.999"])
    assert averaged["lora"] - plain["lora"] == pytest.approx(4 * FLUX.lora / gib)
    assert averaged["weights"] - plain["weights"] == pytest.approx(4 * FLUX.parameters / 2 / gib)
    adam = needs(FLUX, 2, 1, ["--optim", "adamw_torch_fused"])
    assert adam["lora"] == plain["lora"]
    assert adam["weights"] - plain["weights"] == pytest.approx(6 * FLUX.parameters / 2 / gib)
    for flags in (["--feature_loss", "6"], ["--visit-share", "0.3"]):
        watched = needs(FLUX, 2, 1, flags)
        assert all(watched[way] - plain[way] == pytest.approx(2 * FLUX.parameters / gib) for way in plain)
    assert needs(FLUX, 2, 1, ["--feature_loss", "0", "--visit_share", "none", "--ema_decay", "0"]) == plain


def test_small_models_are_left_as_they_are():
    assert choose(Size(13_600_000, 1_000_000), [], 4)[0] == []


def test_the_size_comes_from_the_config_alone(tmp_path):
    """Parameters counted by hand, of one block of each kind."""
    settings = {"num_layers": 1, "num_single_layers": 1, "num_attention_heads": 2, "attention_head_dim": 16}
    settings |= {"joint_attention_dim": 32, "pooled_projection_dim": 32, "axes_dims_rope": (4, 6, 6)}
    model = diffusers.FluxTransformer2DModel(in_channels=16, **settings)
    model.save_config(tmp_path / "transformer")
    size = size_of(str(tmp_path))
    assert size.parameters == sum(p.numel() for p in model.parameters())
    linears = [m for n, m in model.named_modules() if "_blocks." in n and isinstance(m, torch.nn.Linear)]
    lora = sum(32 * (m.in_features + m.out_features) + m.out_features for m in linears)
    other = size.parameters - sum(m.weight.numel() for m in linears)
    assert size.lora == lora + other
    wider = size_of(str(tmp_path), asked_rank(["--w_bits", "2", "--lora_r", "96"]))
    assert wider == Size(size.parameters, size.lora + sum(64 * (m.in_features + m.out_features) for m in linears))
    assert needs(size, 1, 0)["lora"] == pytest.approx((2 * size.parameters + 16 * size.lora) / 2**30)


def test_all_weights_of_flux_2_klein_fit_one_card(tmp_path):
    """3.876 B parameters, of which 3.82 B are quantized, the shared modulation among them."""
    diffusers_model = skeleton("flux2-klein-4b")
    diffusers_model.save_config(tmp_path / "transformer")
    size = size_of(str(tmp_path))
    assert size.parameters == pytest.approx(3.876e9, rel=1e-3)
    matrices = {n: p.shape for n, p in diffusers_model.named_parameters() if "blocks." in n or "_modulation" in n}
    quantized = [shape for shape in matrices.values() if len(shape) == 2]
    rest = size.parameters - sum(rows * columns for rows, columns in quantized)
    assert size.lora == rest + sum(32 * (rows + columns) + rows for rows, columns in quantized)
    assert choose(size, gib(79.6), 1)[0] == WEIGHTS and choose(size, gib(40), 1)[0] == LORA
    assert needs(size, 1, 1)["weights"] < 62


def test_another_transformer_is_one_line(run, tmp_path):
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer/config.json").write_text('{"_class_name": "SD3Transformer2DModel"}')
    result = run("-m", "utils.plan", tmp_path, 1, 1)
    last = result.stderr.strip().splitlines()[-1]
    assert result.returncode == 1 and "SD3Transformer2DModel is not supported, only FluxTransformer2DModel and" in last


def test_the_program_prints_flags_and_reasons_apart(run, tmp_path):
    (tmp_path / "transformer").mkdir()
    config = {"_class_name": "FluxTransformer2DModel", "num_layers": 1, "num_single_layers": 1}
    (tmp_path / "transformer/config.json").write_text(json.dumps(config))
    result = run("-m", "utils.plan", tmp_path, 1, 1, "--w_bits", 2)
    assert result.returncode == 0 and result.stdout == "\n"
    assert re.search(r"^\[plan\] all weights: the model is small$", result.stderr, re.MULTILINE)
