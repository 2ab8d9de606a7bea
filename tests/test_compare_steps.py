"""utils/compare_steps.py against diffusers' own pipeline, which is handed another transformer on the way."""

import json
import math
import re
from types import SimpleNamespace

import pytest
import torch
from diffusers import FluxPipeline

from models.modeling_flux_quant import FluxTransformer2DModel
from train import read_shares
from utils import compare_steps, scenes
from utils.metrics import psnr
from utils.sampling import load_pipeline

STEPS, PICTURES = 4, 3


@pytest.fixture(scope="module")
def student_folder(pipeline_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("student")
    student = FluxTransformer2DModel.from_pretrained(pipeline_folder, subfolder="transformer", w_bits=0)
    student.pack().save_pretrained(folder)
    return folder


@pytest.fixture
def compare(start, pipeline_folder, student_folder, tmp_path):
    """compare("--more", …): exit status; writes to tmp_path."""

    def compare(*flags):
        words = ["--model", pipeline_folder, "--student", student_folder, "--output", tmp_path, "--device", "cpu"]
        sizes = ["--num_images", PICTURES, "--batch_size", 2, "--steps", STEPS]
        return start(compare_steps.main, "compare_steps.py", *words, *sizes, *flags)

    return compare


def drawn(folder, student, steps) -> torch.Tensor:
    """Pictures of which `student` takes these steps, by diffusers' pipeline with a callback between two steps."""
    pipe = FluxPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    parts = {False: pipe.transformer, True: student}
    pictures = []
    for number, prompt in enumerate(scenes.eval_prompts(PICTURES)):
        pipe.transformer = parts[0 in steps]

        def swap(pipe, step, timestep, kwargs):
            pipe.transformer = parts[step + 1 in steps]
            return {}

        generator = torch.Generator().manual_seed(42 + number)
        found = pipe(
            prompt, height=128, width=128, num_inference_steps=STEPS, guidance_scale=3.5, max_sequence_length=24,
            generator=generator, output_type="pt", callback_on_step_end=swap,
        )  # fmt: skip
        pictures.append(found.images[0])
    return torch.stack(pictures)


def test_each_step_is_taken_by_the_student_alone(compare, pipeline_folder, student_folder, capsys, tmp_path):
    assert compare() == 0
    rows = json.loads((tmp_path / "steps.json").read_text())["rows"]
    assert len(rows) == STEPS + 1 and "nmse" not in rows[-1]
    student = FluxTransformer2DModel.from_pretrained(student_folder)
    teachers = drawn(pipeline_folder, student, ())
    for row, steps in zip(rows, [*((k,) for k in range(STEPS)), range(STEPS)], strict=True):
        images = drawn(pipeline_folder, student, steps)
        errors = [(a - b).square().mean().sqrt().item() for a, b in zip(images, teachers, strict=True)]
        assert row["psnr"] == pytest.approx(psnr(images, teachers), abs=0.02)
        assert row["damage"] == pytest.approx(sum(errors) / PICTURES, rel=2e-3)
        assert row["others"] == sum(-20 * math.log10(error) < 25 for error in errors) / PICTURES
    shares = [row["share"] for row in rows[:-1]]
    assert shares == pytest.approx([row["damage"] / sum(r["damage"] for r in rows[:-1]) for row in rows[:-1]])
    said = capsys.readouterr().out.splitlines()
    assert said[-1] == f"to train by these shares: train.py --step_shares {tmp_path / 'steps.json'}"
    assert read_shares(tmp_path / "steps.json", STEPS) == shares
    assert (tmp_path / "steps.md").read_text().splitlines() == said[: STEPS + 3]
    assert (tmp_path / "steps.png").stat().st_size > 5_000


@pytest.mark.parametrize("folder", ["pipeline_folder", "klein_base_folder"])
def test_the_teacher_in_the_students_place_does_no_damage(folder, request):
    """Of klein's base in two calls a step, which guidance combines."""
    pipe = load_pipeline(str(request.getfixturevalue(folder)), torch.float32)
    settings = {"steps": 3, "guidance_scale": 4.0, "resolution": 96, "seed": 1, "batch_size": 2}
    args = SimpleNamespace(**settings, device=torch.device("cpu"), dtype=torch.float32)
    rows = compare_steps.measure(pipe, pipe.transformer, ["a red star", "a ring", "two hearts"], args)
    for row in rows:
        assert row["damage"] < 1e-5 and row["psnr"] > 90 and row["others"] == 0
    assert all(row["nmse"] < 1e-9 for row in rows[:-1])


@pytest.mark.parametrize(
    ("flags", "message", "code"),
    [
        (("--num_images", 0), "--num_images must be at least 1, got 0", 2),
        (("--resolution", 100), "--resolution must be a multiple of 16, got 100", 2),
        (("--student", "assets/tiny-flux-1.58bit"), "in_channels=64, but in_channels=16 in .*; name .* --model", 1),
        (("--student", "assets/tiny-flux/transformer"), "w_bits=16 is not quantized; give what", 1),
    ],
)
def test_what_cannot_be_compared_is_a_line(compare, flags, message, code, capsys):
    assert compare(*flags) == code
    assert re.search(message, capsys.readouterr().err.splitlines()[-1])
