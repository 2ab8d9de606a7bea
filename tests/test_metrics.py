"""Metrics against their formulas in plain Python and float64."""

import math
import random

import pytest
import torch

from utils import scenes
from utils.metrics import PSNR_CAP, nmse, psnr, scene_score, velocity_nmse


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rand(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nmse_is_its_formula(dtype):
    prediction, target = randn(3, 5, 7).to(dtype), randn(3, 5, 7, seed=1).to(dtype)
    pairs = list(zip(prediction.flatten().tolist(), target.flatten().tolist(), strict=True))
    expected = math.fsum((p - t) ** 2 for p, t in pairs) / math.fsum(t**2 for _, t in pairs)
    assert nmse(prediction, target) == pytest.approx(expected, rel=1e-12)


def test_nmse_of_special_predictions():
    target = randn(2, 100)
    assert nmse(target, target) == 0
    assert nmse(torch.zeros_like(target), target) == 1
    assert nmse(1.1 * target.double(), target) == pytest.approx(0.01, rel=1e-6)


def test_nmse_keeps_small_errors_of_many_large_numbers():
    """In float32 the sums would lose them."""
    target = torch.full((300_000,), 1000.0)
    assert nmse(target + 1, target) == pytest.approx(1e-6, rel=1e-9)


def test_velocities_are_compared_on_the_device_that_computes():
    """Not where the weights of an offloaded transformer rest: here on no device at all."""

    class Half(torch.nn.Linear):
        def forward(self, hidden_states):
            assert hidden_states.device.type == "cpu"
            return (hidden_states / 2,)

    calls = [({"hidden_states": 2 * x}, y) for x, y in (randn(2, 2, 3, 4, seed=seed) for seed in range(4))]
    total, by_step = velocity_nmse(Half(4, 4, device="meta"), calls, 2, torch.device("cpu"))
    for step in range(2):
        x = torch.cat([given["hidden_states"] / 2 for given, _ in calls[step::2]])
        y = torch.cat([velocity for _, velocity in calls[step::2]])
        assert by_step[step] == pytest.approx(nmse(x, y), rel=1e-6)
    assert min(by_step) < total < max(by_step)


def test_psnr_is_its_formula():
    images, reference = rand(4, 3, 6, 5), rand(4, 3, 6, 5, seed=1)
    ratios = []
    for image, other in zip(images, reference, strict=True):
        errors = [(a - b) ** 2 for a, b in zip(image.flatten().tolist(), other.flatten().tolist(), strict=True)]
        ratios.append(-10 * math.log10(math.fsum(errors) / len(errors)))
    assert psnr(images, reference) == pytest.approx(sum(ratios) / 4, rel=1e-5)


def test_psnr_of_identical_pictures_is_capped_one_by_one():
    images = rand(2, 3, 8, 8) / 2
    assert psnr(images, images) == PSNR_CAP
    other = images.clone()
    other[1] += 0.1  # 20 dB, in one picture of two
    assert psnr(other, images) == pytest.approx((PSNR_CAP + 20) / 2, rel=1e-4)


@pytest.mark.parametrize("metric", [nmse, psnr])
def test_shapes_must_agree(metric):
    """Broadcasting would turn a mistake into a plausible number."""
    with pytest.raises(ValueError, match=r"one shape, got \[2, 3, 4, 4\] and \[1, 3, 4, 4\]"):
        metric(rand(2, 3, 4, 4), rand(1, 3, 4, 4))


def mixture() -> tuple[list[str], torch.Tensor, list[bool]]:
    """Eight prompts of every category; some pictures are right, the others show a prompt of another category."""
    rng = random.Random(3)
    prompts, shown, right = [], [], []
    wrong = {  # a picture of the second never fits a prompt of the first: it shows another number of things
        "single_object": "a red star and a blue ring", "two_object": "three hearts", "counting": None,
        "colors": "a red star and a blue ring", "position": "four moons", "color_attr": "a green square",
    }  # fmt: skip
    for category in scenes.CATEGORIES:
        for index in range(8):
            prompt = scenes.sample_prompt(category, rng)
            other = wrong[category]
            if category == "counting":
                other = "one star" if len(scenes.parse(prompt).things) > 1 else "two stars"
            fits = index < 1 + scenes.CATEGORIES.index(category)  # 1 of 8 in the first category … 6 of 8 in the last
            prompts.append(prompt)
            shown.append(prompt if fits else other)
            right.append(fits)
    return prompts, scenes.render(shown, range(len(shown))), right


def test_scene_score_counts():
    prompts, images, right = mixture()
    order = list(range(len(prompts)))
    random.Random(0).shuffle(order)
    score = scene_score(images[order], [prompts[i] for i in order])

    expected = {name: (1 + i) / 8 for i, name in enumerate(scenes.CATEGORIES)}
    assert {name: score[name] for name in scenes.CATEGORIES} == expected
    assert sum(right) / len(right) == pytest.approx(score["mean"])
    variances = [p * (1 - p) / 8 for p in expected.values()]
    assert score["stderr"] == pytest.approx(math.sqrt(sum(variances)) / 6)
    assert list(score) == [*scenes.CATEGORIES, "mean", "stderr"]


def test_mean_is_over_categories_not_pictures():
    prompts = ["a star", "a red ring", "a red ring", "a red ring"]
    score = scene_score(scenes.render(["two stars", *prompts[1:]], range(4)), prompts)
    assert score == {"single_object": 0, "colors": 1, "mean": 0.5}  # of one picture each, no spread is known


def test_bad_input():
    images = scenes.render(["a star"], [0])
    with pytest.raises(ValueError, match="not a scene of this world: 'a dog'"):
        scene_score(images, ["a dog"])
    with pytest.raises(ValueError, match=r"expected pictures \[B, 3, 128, 128\], got \[1, 3, 64, 64\]"):
        scene_score(images[:, :, :64, :64], ["a star"])
    with pytest.raises(ValueError):
        scene_score(images, ["a star", "a ring"])
    with pytest.raises(ValueError, match="no prompts"):
        scene_score(images[:0], [])
