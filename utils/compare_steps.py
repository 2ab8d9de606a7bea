"""Which denoising step's error shows in the picture: what a student does at one step alone, the teacher at all others.

    python -m utils.compare_steps --output output/steps                # tiny-flux and its student, minutes on a laptop
    python -m utils.compare_steps --model black-forest-labs/FLUX.1-dev --student CHECKPOINT --num_images 16

The teacher draws each prompt. From its state before a step the student takes that step, and the teacher goes on to the
end; in the last row the student takes all steps. What differs from the teacher's picture is the damage of that step: a
small error where the layout is decided ends in another picture, a large one in the last steps in a little noise. It
writes, to OUTPUT/steps.json, steps.md and steps.png, for each step

    nmse       ‖v − v_teacher‖² / ‖v_teacher‖² of the velocity there
    psnr       of the pictures, mean in dB
    others     share of the pictures below 25 dB, most of which have another layout
    damage     root mean squared error of a picture, mean over the pictures
    share      the step's part of the damage of all single steps; train.py --step_shares OUTPUT/steps.json takes them
"""

import utils.interrupt  # noqa: F401 (Ctrl-C is a line from here on)

import argparse
from pathlib import Path

import diffusers
import matplotlib
import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn
from tqdm import tqdm

from utils.checkpoints import check_shapes, load_student, transformer_folder
from utils.folders import write_json, write_text
from utils.metrics import psnr
from utils.pipelines import family_of, sampling_settings, steps_taken
from utils.prompts import pick_prompts
from utils.sampling import (
    decode_latents,
    encode_prompts,
    initial_noise,
    load_pipeline,
    native_size,
    record_velocities,
    sample_latents,
)
from utils.utils import (
    DTYPES,
    ArgumentParser,
    check_counts,
    check_resolution,
    device_name,
    from_root,
    memory_named,
    pick_device,
    run_script,
)

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402 (the backend is to be chosen first)

OTHER_LAYOUT = 25.0  # dB


class Way:
    """One batch of the teacher's pictures: from any of its states on with whichever transformer."""

    def __init__(self, pipe: DiffusionPipeline, calls: list[tuple[dict, Tensor]], each: int, guidance: float | None):
        """calls: of the transformer, `each` a step, that are combined by `guidance`"""
        self.calls, self.each, self.guidance = calls, each, guidance
        self.changes = pipe.scheduler.sigmas.diff().tolist()
        self.steps = len(calls) // each

    def state(self, step: int) -> Tensor:
        """The teacher's latents [B, L, C] before `step`."""
        return self.calls[step * self.each][0]["hidden_states"]

    def velocity(self, transformer: nn.Module, step: int, latents: Tensor) -> Tensor:
        """What the scheduler is given at `step`, [B, L, C]."""
        calls = self.calls[step * self.each : (step + 1) * self.each]
        found = [transformer(**(given | {"hidden_states": latents, "return_dict": False}))[0] for given, _ in calls]
        return steps_taken(torch.stack(found), self.guidance)[0]

    def teachers(self, step: int) -> Tensor:
        """The velocity that the teacher had at its own state."""
        found = [velocity for _, velocity in self.calls[step * self.each : (step + 1) * self.each]]
        return steps_taken(torch.stack(found), self.guidance)[0]

    def step(self, latents: Tensor, velocity: Tensor, step: int) -> Tensor:
        """The latents after `step`, computed in fp32 as the scheduler does."""
        return (latents.float() + self.changes[step] * velocity.float()).to(latents.dtype)

    def on(self, transformer: nn.Module, step: int, latents: Tensor) -> Tensor:
        """Latents at the end of all steps, from those before `step`."""
        for later in range(step, self.steps):
            latents = self.step(latents, self.velocity(transformer, later, latents), later)
        return latents


@torch.no_grad()
def measure(pipe: DiffusionPipeline, student: nn.Module, prompts: list[str], args: argparse.Namespace) -> list[dict]:
    """A row for each step, and one for all of them, which has neither nmse nor share."""
    family, teacher = family_of(pipe), pipe.transformer
    each = family.calls_a_step(pipe, args.guidance_scale)
    text = encode_prompts(pipe, prompts, args.batch_size, args.device, args.guidance_scale)
    sizes = {"size": args.resolution, "num_inference_steps": args.steps, "guidance_scale": args.guidance_scale}
    errors, energies = torch.zeros(2, args.steps, dtype=torch.float64)
    pictures: list[list[Tensor]] = [[] for _ in range(args.steps + 1)]
    teachers = []
    with tqdm(total=len(prompts) * (args.steps + 1), unit="picture") as bar:
        for start in range(0, len(prompts), args.batch_size):
            part = slice(start, min(start + args.batch_size, len(prompts)))
            seeds = range(args.seed + part.start, args.seed + part.stop)
            noise = initial_noise(pipe, seeds, args.resolution, args.dtype)
            with record_velocities(teacher) as calls:
                latents = sample_latents(pipe, noise, **sizes, **{name: rows[part] for name, rows in text.items()})
            teachers.append(decode_latents(pipe, latents, args.resolution))
            way = Way(pipe, calls, each, args.guidance_scale if each == 2 else None)
            for step in range(way.steps):
                state, wanted = way.state(step), way.teachers(step)
                velocity = way.velocity(student, step, state)
                errors[step] += (velocity - wanted).double().square().sum().cpu()
                energies[step] += wanted.double().square().sum().cpu()
                latents = way.on(teacher, step + 1, way.step(state, velocity, step))
                pictures[step].append(decode_latents(pipe, latents, args.resolution))
                bar.update(len(latents))
            pictures[-1].append(decode_latents(pipe, way.on(student, 0, way.state(0)), args.resolution))
            bar.update(len(latents))
    rows = [figures(torch.cat(drawn), torch.cat(teachers)) for drawn in pictures]
    damage = sum(row["damage"] for row in rows[:-1])
    for row, error, energy in zip(rows, errors, energies, strict=False):
        row |= {"nmse": (error / energy).item(), "share": row["damage"] / damage if damage else 1 / args.steps}
    return rows


def figures(images: Tensor, teachers: Tensor) -> dict:
    """psnr, others and damage of pictures [N, 3, H, W]."""
    each = [psnr(a[None], b[None]) for a, b in zip(images, teachers, strict=True)]
    damage = (images - teachers).double().square().mean((1, 2, 3)).sqrt().mean().item()
    others = sum(value < OTHER_LAYOUT for value in each) / len(each)
    return {"psnr": sum(each) / len(each), "others": others, "damage": damage}


def table(rows: list[dict]) -> str:
    """Markdown."""
    lines = ["| step | NMSE | PSNR dB | other pictures | damage | share |", "|" + " --- |" * 6]
    for step, row in enumerate(rows):
        alone = "nmse" in row
        cells = [str(step) if alone else "all", f"{row['nmse']:.4f}" if alone else "", f"{row['psnr']:.1f}"]
        cells += [f"{row['others']:.1%}", f"{row['damage']:.4f}", f"{row['share']:.3f}" if alone else ""]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def plot(rows: list[dict], file: Path) -> None:
    """NMSE and damage by step."""
    figure, (error, damage) = pyplot.subplots(1, 2, figsize=(10, 3.2), layout="constrained")
    for axis, name, title in ((error, "nmse", "velocity NMSE"), (damage, "damage", "damage to the picture (RMSE)")):
        axis.bar(range(len(rows) - 1), [row[name] for row in rows[:-1]])
        axis.set(title=title, xlabel="denoising step")
    figure.savefig(file, dpi=110)
    pyplot.close(figure)


def parse_args() -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("output/steps"))
    parser.add_argument("--model", default="assets/tiny-flux", help="the teacher")
    parser.add_argument("--student", type=Path, help="its quantized transformer; default: assets/tiny-flux-1.58bit")
    parser.add_argument("--num_images", type=int, default=48, help="held-out prompts")
    parser.add_argument("--steps", "--num_inference_steps", type=int, help="default: the pipeline's")
    parser.add_argument("--guidance_scale", type=float, help="default: the pipeline's")
    parser.add_argument("--resolution", type=int, help="default: the pipeline's")
    parser.add_argument("--batch_size", type=int, default=16, help="pictures at a time")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--dtype", choices=DTYPES, help="default: bfloat16 on a GPU, else float32")
    parser.add_argument("--device", help="default: cuda if there, else mps, else cpu")
    args = parser.parse_args()
    try:
        check_counts(args, "num_images", "steps", "batch_size")
        check_resolution(args.resolution)
        args.device = pick_device(args.device)
    except ValueError as error:
        parser.error(str(error))
    args.dtype = getattr(torch, args.dtype or ("bfloat16" if args.device.type == "cuda" else "float32"))
    args.student = args.student or Path(from_root("assets/tiny-flux-1.58bit"))
    return args


def main() -> None:
    args = parse_args()
    with memory_named("pictures are drawn", "try a smaller --batch_size or --resolution", args.device):
        student = load_student(transformer_folder(args.student), args.dtype).to(args.device)
        pipe = load_pipeline(str(from_root(args.model)), args.dtype).to(args.device)
        check_shapes(args.student, student.config, args.model, pipe.transformer, "--model")
        args.resolution = args.resolution or native_size(pipe)
        args.steps, args.guidance_scale = sampling_settings(pipe, args.steps, args.guidance_scale)
        prompts, source = pick_prompts(pipe, args.num_images)
        rows = measure(pipe, student, prompts, args)
    settings = {name: getattr(args, name) for name in ("model", "steps", "guidance_scale", "resolution", "seed")}
    settings |= {"student": str(args.student), "dtype": str(args.dtype), "prompts": len(prompts), "source": source}
    versions = {"device": device_name(args.device), "torch": torch.__version__, "diffusers": diffusers.__version__}
    args.output.mkdir(parents=True, exist_ok=True)
    write_json(args.output / "steps.json", {"settings": settings, **versions, "rows": rows})
    write_text(args.output / "steps.md", table(rows))
    plot(rows, args.output / "steps.png")
    print(table(rows))
    print(f"to train by these shares: train.py --step_shares {args.output / 'steps.json'}")


if __name__ == "__main__":
    run_script(main)
