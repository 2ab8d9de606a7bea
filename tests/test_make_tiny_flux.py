"""The recipe of tiny-flux in a few steps, its trainer against a plain loop, and the pipeline that is shipped."""

import argparse
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from torch import nn

from utils import make_tiny_flux as recipe
from utils import scenes
from utils.metrics import scene_score
from utils.sampling import generate_images
from utils.tokenizers import TEXT_LENGTH

ROOT = Path(__file__).parents[1]
SHIPPED = ROOT / "assets" / "tiny-flux"


# ----- the trainer


def settings(folder, **changes) -> argparse.Namespace:
    return argparse.Namespace(**{"work_dir": folder, "device": "cpu", "seed": 0, "save_every": 4} | changes)


def a_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(5, 3)


def a_loss(model: nn.Module):
    """Deterministic, so that runs compare."""
    x = torch.linspace(-1, 1, 20).view(4, 5)
    return lambda: (model(x) - x[:, :3].sin()).square().mean()


def test_fit_is_adamw_with_clipping_schedule_and_average(tmp_path):
    steps, peak = 12, 0.05
    model, reference = a_model(), a_model()
    recipe.fit("fit", model, a_loss(model), steps, peak, settings(tmp_path, save_every=100))

    optimizer = torch.optim.AdamW(reference.parameters(), betas=(0.9, 0.95), weight_decay=0.01)
    average = [p.detach().clone() for p in reference.parameters()]
    for i in range(steps):
        # warm-up over 2 steps, flat until 60 %, then linear to 2 %
        share = min((i + 1) / 2, 1 - 0.98 * max(0, i / steps - 0.6) / 0.4)
        optimizer.param_groups[0]["lr"] = peak * share
        optimizer.zero_grad()
        a_loss(reference)().backward()
        nn.utils.clip_grad_norm_(reference.parameters(), 1.0)
        optimizer.step()
        fresh = max(1 - 0.999, 9 / (10 + i))
        average = [a + fresh * (p.detach() - a) for a, p in zip(average, reference.parameters(), strict=True)]
    for p, a in zip(model.parameters(), average, strict=True):
        torch.testing.assert_close(p.detach(), a)


def test_fit_goes_on_where_it_was_interrupted(tmp_path):
    undisturbed = a_model()
    recipe.fit("a", undisturbed, a_loss(undisturbed), 10, 0.05, settings(tmp_path))

    model, calls = a_model(), []
    loss = a_loss(model)

    def until_the_seventh():
        calls.append(1)
        if len(calls) == 7:
            raise KeyboardInterrupt
        return loss()

    with pytest.raises(KeyboardInterrupt):
        recipe.fit("b", model, until_the_seventh, 10, 0.05, settings(tmp_path))
    resumed = a_model()
    loss, calls = a_loss(resumed), []
    recipe.fit("b", resumed, lambda: calls.append(1) or loss(), 10, 0.05, settings(tmp_path))
    assert len(calls) == 6  # the state of step 4 was there
    for p, q in zip(resumed.parameters(), undisturbed.parameters(), strict=True):
        torch.testing.assert_close(p, q)


def test_fit_stops_at_a_loss_that_is_not_finite(tmp_path):
    model = a_model()
    with pytest.raises(ValueError, match="bad.*nan at step 0"):
        recipe.fit("bad", model, lambda: model.weight.sum() * float("nan"), 3, 0.1, settings(tmp_path))


# ----- what the text encoders are taught


@pytest.mark.parametrize(
    ("prompt", "same"),
    [
        ("a star left of a ring", "a ring right of a star"),
        ("a star above a ring", "a ring below a star"),
        ("three moons", "exactly three crescents"),
    ],
)
def test_sentences_that_mean_the_same_have_the_same_answers(prompt, same):
    assert recipe.scene_answers(scenes.parse(prompt)) == recipe.scene_answers(scenes.parse(same))


@pytest.mark.parametrize(
    ("prompt", "other"),
    [
        ("a star left of a ring", "a star right of a ring"),
        ("a star left of a ring", "a star above a ring"),
        ("a star left of a ring", "a star and a ring"),
        ("a red star and a blue ring", "a blue star and a red ring"),
        ("two moons", "three moons"),
        ("a moon", "a red moon"),
        ("a moon", "a moon on dark paper"),
    ],
)
def test_sentences_that_differ_have_different_answers(prompt, other):
    assert recipe.scene_answers(scenes.parse(prompt)) != recipe.scene_answers(scenes.parse(other))


def test_answers_fit_the_probes():
    _, answers, _ = recipe.make_examples(2000, seed=1)
    assert (answers >= 0).all()
    assert (answers < torch.tensor(list(recipe.PROBES.values()))).all()


def test_training_prompts_are_no_evaluation_prompts():
    prompts, _, _ = recipe.make_examples(2000, seed=2)
    assert not set(prompts) & set(scenes.eval_prompts())


# ----- the whole recipe


@pytest.fixture
def make(run, tmp_path):
    """make(flags) runs the recipe in a few steps, from tmp_path/work to tmp_path/out/tiny."""
    small = "--examples 80 --autoencoder_pictures 8 --autoencoder_batch_size 2 --batch_size 4 --save_every 1"
    steps = "--text_steps 3 --autoencoder_steps 2 --flow_steps 2 --guidance_steps 2 --eval_prompts 2"
    folders = ("--work_dir", tmp_path / "work", "--output", tmp_path / "out" / "tiny")
    command = ("-m", "utils.make_tiny_flux", *folders, "--device", "cpu", *small.split(), *steps.split())
    return lambda *flags: run(*command, *flags)


def test_a_few_steps_make_a_pipeline_that_stock_diffusers_loads(make, run, tmp_path):
    first = make("--until", "autoencoder")
    assert first.returncode == 0, first.stderr
    assert "text: done" in first.stdout and "autoencoder: done" in first.stdout
    assert not (tmp_path / "out").exists()

    second = make()
    assert second.returncode == 0, second.stderr
    assert "text: done" not in second.stdout and "autoencoder: done" not in second.stdout
    assert "flow: done" in second.stdout and "guidance: done" in second.stdout
    for name in ("text", "autoencoder", "flow", "guidance"):  # save_every is 1: a state was written on the way
        assert (tmp_path / "work" / f"{name}.safetensors").is_file()
    folder = tmp_path / "out" / "tiny"
    assert [p.name for p in folder.parent.iterdir()] == ["tiny"]

    script = tmp_path / "draw.py"
    script.write_text(
        "import sys; from diffusers import FluxPipeline; p = FluxPipeline.from_pretrained(sys.argv[1]);"
        "p('a star', height=128, width=128, num_inference_steps=1, max_sequence_length=24).images[0].save(sys.argv[2])"
    )
    picture = tmp_path / "star.png"
    drawn = run(script, folder, picture)
    assert drawn.returncode == 0, drawn.stderr
    assert picture.stat().st_size > 0
    figures = json.loads((folder / "metrics.json").read_text())
    assert set(scenes.CATEGORIES) >= set(figures["scene_score"]["3.5"]) - {"mean", "stderr"}
    assert "tiny-flux" in (folder / "README.md").read_text()


@pytest.fixture
def narrow(tmp_path) -> Path:
    """The shipped pipeline with a random transformer of 32 channels: quick on a CPU."""
    torch.manual_seed(0)
    shapes = {"num_layers": 1, "num_single_layers": 1, "num_attention_heads": 2, "attention_head_dim": 16}
    config = json.loads((SHIPPED / "transformer" / "config.json").read_text()) | shapes
    transformer = FluxTransformer2DModel.from_config(config | {"axes_dims_rope": (4, 6, 6)})
    folder = tmp_path / "narrow"
    shutil.copytree(SHIPPED, folder, ignore=shutil.ignore_patterns("diffusion_pytorch_model.safetensors"))
    shutil.copytree(SHIPPED / "vae", folder / "vae", dirs_exist_ok=True)
    transformer.save_pretrained(folder / "transformer")
    return folder


def test_a_wider_one_is_made_from_a_narrow_one_and_keeps_what_it_draws(make, narrow, tmp_path):
    """Of three steps at no learning rate: the same function, in more channels."""
    steps = ("--widened_steps", 3, "--widened_rate", 0, "--save_every", 2)
    result = make("--width", 64, "--narrow", narrow, *steps)
    assert result.returncode == 0, result.stderr
    assert "widened: done" in result.stdout and "text: done" not in result.stdout
    assert (tmp_path / "work" / "widened.safetensors").is_file()  # to go on from
    folder = tmp_path / "out" / "tiny"
    config = json.loads((folder / "transformer" / "config.json").read_text())
    assert (config["num_attention_heads"], config["attention_head_dim"]) == (4, 16)
    training = json.loads((folder / "metrics.json").read_text())["training"]
    for loss in ("loss", "unseen_loss"):
        assert training[f"{loss}_as_widened"] == pytest.approx(training[f"{loss}_as_trained"], rel=1e-2)
    assert training["unseen_loss_as_widened"] != training["loss_as_widened"]  # of other scenes
    assert training["copies_differ"] < 0.01
    card = (folder / "README.md").read_text()
    assert re.search(r"--width 64 --examples \d+ --batch_size \d+ --widened_steps 3 --widened_rate 0\.0\n", card)
    assert f"Widened from {narrow} to 64 channels" in card
    prompts, pictures = scenes.eval_prompts(2), []
    for source in (narrow, folder):
        pictures.append(generate_images(FluxPipeline.from_pretrained(source), prompts, num_inference_steps=4).float())
    first, second = pictures
    assert (first - second).square().mean() < 2e-3 < first.var()  # weights and sums are rounded to bfloat16


def test_what_guidance_adds_is_the_guided_velocity_less_that_at_guidance_one(narrow):
    """Against diffusers, a picture at a time; of the empty prompt a guidance-distilled model knows nothing."""
    transformer = FluxTransformer2DModel.from_pretrained(narrow / "transformer")
    torch.manual_seed(0)
    noised, embeds, pooled = torch.randn(3, 64, 64), torch.randn(3, TEXT_LENGTH, 128), torch.randn(3, 128)
    timestep, scale = torch.tensor([0.2, 0.5, 0.9]), torch.tensor([1.0, 2.0, 5.0])
    ids = {"img_ids": torch.randn(64, 3), "txt_ids": torch.zeros(TEXT_LENGTH, 3)}
    found = recipe.guidance_adds(transformer, SimpleNamespace(ids=ids), noised, timestep, embeds, pooled, scale)

    def stock(i: int, guidance: float) -> torch.Tensor:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            return transformer(
                noised[i : i + 1], embeds[i : i + 1], pooled[i : i + 1], timestep[i : i + 1],
                guidance=torch.tensor([guidance]), **ids,
            ).sample[0].float()  # fmt: skip

    assert found[0].abs().max() == 0
    for i in (1, 2):
        expected = stock(i, scale[i].item()) - stock(i, 1.0)
        assert (found[i] - expected).norm() < 0.05 * expected.norm()


def test_a_width_that_cannot_be_is_named_at_once(make):
    result = make("--width", 300)
    assert result.returncode == 1 and "--width 300: no multiple of 256" in result.stderr.splitlines()[-1]
    with pytest.raises(SystemExit) as stop:
        recipe.parse_args(["--width", "512", "--until", "flow"])
    assert stop.value.code == 2


def test_a_device_that_is_not_there_is_a_usage_error(make):
    result = make("--device", "tpu")
    assert result.returncode == 2 and "tpu" in result.stderr.splitlines()[-1]


# ----- the shipped pipeline


def test_shipped_pipeline_is_small_and_holds_no_pickle():
    files = [path for path in SHIPPED.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 45e6
    assert {path.suffix for path in files} <= {".json", ".safetensors", ".md"}


def test_shipped_pipeline_has_flux_devs_architecture():
    """FLUX.1-dev's settings, as in its published configs, wherever they are not sizes."""
    config = {part: json.loads((SHIPPED / part / "config.json").read_text()) for part in ("transformer", "vae")}
    assert config["transformer"]["guidance_embeds"] is True
    assert config["transformer"]["in_channels"] == 4 * config["vae"]["latent_channels"] == 64
    assert len(config["transformer"]["axes_dims_rope"]) == 3
    assert config["transformer"]["num_layers"] > 0 and config["transformer"]["num_single_layers"] > 0
    assert len(config["vae"]["block_out_channels"]) == 4  # 8x
    scheduler = json.loads((SHIPPED / "scheduler" / "scheduler_config.json").read_text())
    assert scheduler["_class_name"] == "FlowMatchEulerDiscreteScheduler"
    expected = {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15, "base_image_seq_len": 256}
    assert {key: scheduler[key] for key in expected} == expected


def test_shipped_pipeline_follows_its_prompts():
    """24 of the 1,200 prompts of the model card: within five standard errors of its mean score."""
    card = json.loads((SHIPPED / "metrics.json").read_text())["scene_score"]["3.5"]["mean"]
    pipe = FluxPipeline.from_pretrained(SHIPPED)
    prompts = scenes.eval_prompts(24)
    score = scene_score(generate_images(pipe, prompts, batch_size=12), prompts)
    assert abs(score["mean"] - card) <= 5 * score["stderr"] + 0.05
    assert score["mean"] >= 0.8
