"""How close a student draws to its teacher: velocity NMSE, PSNR and the scene score.

Each function takes tensors and returns plain numbers, so that scripts can print, log and compare them.
"""

import math
from collections.abc import Sequence

from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio

from utils import scenes

PSNR_CAP = 100.0  # dB; identical pictures would be infinitely good


def _check_shapes(first: Tensor, second: Tensor) -> None:
    """ValueError unless they are equal; torch would broadcast."""
    if first.shape != second.shape:
        raise ValueError(f"expected two tensors of one shape, got {list(first.shape)} and {list(second.shape)}")


def nmse(prediction: Tensor, target: Tensor) -> float:
    """Normalized mean squared error ‖prediction − target‖² / ‖target‖² over all elements, computed in float64.

    Raises ValueError if the shapes differ.
    """
    _check_shapes(prediction, target)
    prediction, target = prediction.double(), target.double()
    return ((prediction - target).square().sum() / target.square().sum()).item()


def psnr(images: Tensor, reference: Tensor) -> float:
    """Mean over the pictures [N, 3, H, W] in 0…1 of the peak signal-to-noise ratio in dB, at most PSNR_CAP each.

    Raises ValueError if the shapes differ.
    """
    _check_shapes(images, reference)
    ratios = peak_signal_noise_ratio(images, reference, data_range=1.0, reduction="none", dim=(1, 2, 3))
    return ratios.clamp_max(PSNR_CAP).mean().item()


def scene_score(images: Tensor, prompts: Sequence[str]) -> dict[str, float]:
    """Share of pictures [N, 3, 128, 128] in 0…1 that fit their prompt (`scenes.grade`), by category.

    Besides a row for each category present: "mean", the mean of those rows, and "stderr", its standard error.
    Raises ValueError for a prompt that is no scene, pictures of another size or number, and no prompts at all.
    """
    if not prompts:
        raise ValueError("scene_score: no prompts")
    verdicts: dict[str, list[bool]] = {}
    for prompt, verdict in zip(prompts, scenes.grade(images, prompts).tolist(), strict=True):
        verdicts.setdefault(scenes.parse(prompt).category, []).append(verdict)
    rows = {name: verdicts[name] for name in scenes.CATEGORIES if name in verdicts}
    score = {name: sum(row) / len(row) for name, row in rows.items()}
    variance = sum(score[name] * (1 - score[name]) / len(rows[name]) for name in rows)
    return score | {"mean": sum(score.values()) / len(rows), "stderr": math.sqrt(variance) / len(rows)}
