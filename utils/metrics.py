"""How close a student draws to its teacher: velocity NMSE, PSNR, SSIM and the scene score.

Each function takes tensors and returns plain numbers, so that scripts can print, log and compare them.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from huggingface_hub import try_to_load_from_cache
from torch import Tensor, nn
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure
from tqdm import tqdm

from utils import scenes

PSNR_CAP = 100.0  # dB; identical pictures would be infinitely good
CLIP = "openai/clip-vit-base-patch16"  # torchmetrics knows no smaller one


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


@torch.no_grad()
def velocity_nmse(
    transformer: nn.Module, teacher_calls: Sequence[tuple[dict, Tensor]], steps: int, device: torch.device,
    calls_a_step: int = 1,
) -> tuple[float, list[float]]:
    """NMSE of the velocity at the teacher's own states, over all of them and by denoising step, in float64.

    teacher_calls: what record_velocities kept of pictures of `steps` denoising steps, one batch after the other.
    device: the one that the transformer computes on, where an offloaded one need not be yet.
    """
    errors, energies = torch.zeros(2, steps, dtype=torch.float64)
    for number, (inputs, velocity) in enumerate(tqdm(teacher_calls, desc="velocity error", leave=False)):
        here = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in inputs.items()}
        prediction, target = transformer(**here)[0].cpu().double(), velocity.cpu().double()
        step = number // calls_a_step % steps
        errors[step] += (prediction - target).square().sum()
        energies[step] += target.square().sum()
    return (errors.sum() / energies.sum()).item(), (errors / energies).tolist()


def psnr(images: Tensor, reference: Tensor) -> float:
    """Mean over the pictures [N, 3, H, W] in 0…1 of the peak signal-to-noise ratio in dB, at most PSNR_CAP each.

    Raises ValueError if the shapes differ.
    """
    _check_shapes(images, reference)
    ratios = peak_signal_noise_ratio(images, reference, data_range=1.0, reduction="none", dim=(1, 2, 3))
    return ratios.clamp_max(PSNR_CAP).mean().item()


def ssim(images: Tensor, reference: Tensor) -> float:
    """Mean structural similarity (Gaussian window, σ 1.5) of the pictures [N, 3, H, W] in 0…1.

    Raises ValueError if the shapes differ.
    """
    _check_shapes(images, reference)
    return structural_similarity_index_measure(images, reference, data_range=1.0).item()


def scene_score(images: Tensor, prompts: Sequence[str]) -> dict[str, float]:
    """Share of pictures [N, 3, 128, 128] in 0…1 that fit their prompt (`scenes.grade`), by category.

    Besides a row for each category present: "mean", the mean of those rows, and "stderr", its standard error, unless
    there is a category of one picture, which tells nothing of the spread.
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
    known = {"stderr": math.sqrt(variance) / len(rows)} if all(len(row) > 1 for row in rows.values()) else {}
    return score | {"mean": sum(score.values()) / len(rows)} | known


def learned_scores(
    images: Tensor, reference: Tensor | None, prompts: Sequence[str], device: torch.device
) -> dict[str, float | str]:
    """LPIPS to the reference (AlexNet; lower is closer) and CLIP score of pictures [N, 3, H, W] in 0…1.

    Where weights are not on this machine (nothing is downloaded), or a package is missing, a sentence says so instead.
    """
    scores: dict[str, float | str] = {}
    if reference is not None:
        weights = Path(torch.hub.get_dir()) / "checkpoints"
        if not list(weights.glob("alexnet-*.pth")):
            scores["lpips"] = f"not measured: no AlexNet weights in {weights}"
        else:
            try:
                from torchmetrics.image import LearnedPerceptualImagePatchSimilarity

                metric = LearnedPerceptualImagePatchSimilarity("alex", normalize=True).to(device)
                for image, other in zip(images.split(8), reference.split(8), strict=True):
                    metric.update(image.to(device), other.to(device))
                scores["lpips"] = metric.compute().item()
            except (ImportError, RuntimeError, OSError) as error:
                scores["lpips"] = f"not measured: {error}"
    if not isinstance(try_to_load_from_cache(CLIP, "config.json"), str):
        return scores | {"clip_score": f"not measured: {CLIP} is not in the hub cache"}
    try:
        from torchmetrics.multimodal import CLIPScore

        metric = CLIPScore(CLIP).to(device)
        for start in range(0, len(images), 8):
            batch = (images[start : start + 8] * 255).round().to(torch.uint8)
            metric.update(batch.to(device), list(prompts[start : start + 8]))
        return scores | {"clip_score": metric.compute().item()}
    except (ImportError, RuntimeError, OSError, ValueError) as error:
        return scores | {"clip_score": f"not measured: {error}"}
