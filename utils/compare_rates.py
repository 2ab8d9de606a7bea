"""Which learning rate a width wants, found on random weights: at any width, without a teacher to train.

    python -m utils.compare_rates --output output/rates                                  # 45 minutes on two cores
    python -m utils.compare_rates --output output/rates --widths 256 512 1024 2048 3072  # FLUX.1-dev's width: a GPU's

A few blocks with the heavy-tailed weights of utils/random_flux.py are the teacher; the same at 1.58 bits learn its
velocities of random inputs for a few steps, at rates a factor of two apart: their weights, biases and norms, or a LoRA
inside the quantizer, or the step sizes alone (--what). AdamW, a quarter of the steps to warm up, then a cosine. Judged
is the velocity NMSE on inputs that were not trained on.

OUTPUT/rates.json holds every figure and is all that the same command needs to go on from; further --widths are added.
OUTPUT/rates.md: of each width and seed the best rate, the vertex of a parabola through the best and its neighbours
(both logarithmic), and e of rate ∝ 1/widthᵉ, by least squares over all of them. OUTPUT/rates.png: the curves.

It shows what a width's arithmetic asks for. It does not show what trained weights do, nor long trainings, whose best
rate is another: compare_widths.py does, at widths that can be trained.
"""

import utils.interrupt  # noqa: F401 (Ctrl-C is a line from here on)

import argparse
import math
import statistics
from pathlib import Path

import matplotlib
import torch
from torch import Tensor, nn

from models.modeling_flux_quant import FluxTransformer2DModel, QuantizeLinear
from utils.folders import read_json, write_json, write_text
from utils.pipelines import Flux1
from utils.random_flux import CONFIGS, filled, stock_class
from utils.rates import optimum
from utils.utils import ArgumentParser, device_name, get_logger, pick_device, run_script

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402 (the backend is to be chosen first)

log = get_logger("rates")
HEAD = CONFIGS["small"]["attention_head_dim"]
SIDE, TEXT_TOKENS = 6, 16  # tokens of an input: SIDE² of the image
TRAINED, HELD_OUT = 16, 8  # inputs
MIDDLE = {"weights": 1e-4, "lora": 1e-3, "step sizes": 3e-3}  # of the rates, at width 256
FACTORS = (1 / 8, 1 / 4, 1 / 2, 1, 2, 4)  # of MIDDLE · 256/width
SETTINGS = ("blocks", "steps", "rank")


def configuration(width: int, blocks: tuple[int, int]) -> dict:
    """Of a FluxTransformer2DModel of so many channels, double and single blocks."""
    counts = dict(zip(("num_layers", "num_single_layers"), blocks, strict=True))
    return CONFIGS["small"] | counts | {"num_attention_heads": width // HEAD}


def random_inputs(config: dict, count: int, generator: torch.Generator, device: torch.device) -> list[dict]:
    """Inputs of one picture each: noise for latents and texts, at any time."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(1, *shape, generator=generator).to(device)

    ids = {"img_ids": Flux1.image_ids(SIDE, torch.float32), "txt_ids": Flux1.text_ids(TEXT_TOKENS, torch.float32)}
    fixed = {name: value.to(device) for name, value in ids.items()} | {"return_dict": False}
    return [
        fixed
        | {
            "hidden_states": normal(SIDE**2, config["in_channels"]),
            "encoder_hidden_states": normal(TEXT_TOKENS, config["joint_attention_dim"]),
            "pooled_projections": normal(config["pooled_projection_dim"]),
            "timestep": torch.rand(1, generator=generator).to(device),
            "guidance": torch.full((1,), 3.5, device=device),
        }
        for _ in range(count)
    ]


def student_of(teacher: nn.Module, what: str, rank: int) -> FluxTransformer2DModel:
    """The teacher at 1.58 bits, of which `what` wants gradients."""
    student = FluxTransformer2DModel(**teacher.config, w_bits=0, lora_r=rank * (what == "lora"), lora_alpha=rank)
    student.load_state_dict(teacher.state_dict(), strict=False)
    for layer in student.modules():
        if isinstance(layer, QuantizeLinear):
            layer.reset_quantizer()
    for name, parameter in student.named_parameters():
        last = name.rpartition(".")[2]
        kind = {"weight_clip_val": "step sizes", "lora_A": "lora", "lora_B": "lora"}.get(last, "weights")
        parameter.requires_grad_(kind == what)
    return student.to(teacher.device).train()


def nmse(model: nn.Module, inputs: list[dict], velocities: list[Tensor]) -> Tensor:
    """‖v − v_teacher‖² / ‖v_teacher‖² over all inputs."""
    error = sum((model(**given)[0] - wanted).square().sum() for given, wanted in zip(inputs, velocities, strict=True))
    return error / sum(wanted.square().sum() for wanted in velocities)


def train(student: nn.Module, inputs: list[dict], velocities: list[Tensor], rate: float, steps: int) -> None:
    """One input a step, in turns."""
    optimizer = torch.optim.AdamW([p for p in student.parameters() if p.requires_grad], lr=rate, weight_decay=0.0)

    def share(step: int) -> float:
        return min(1.0, 4 * (step + 1) / steps) * 0.5 * (1 + math.cos(math.pi * step / steps))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, share)
    for step in range(steps):
        at = step % len(inputs)
        nmse(student, inputs[at : at + 1], velocities[at : at + 1]).backward()
        nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()


def rates_of(what: str, width: int) -> list[float]:
    """The learning rates to try: FACTORS of one that falls with 1/width, so that the best lies among them."""
    return [float(f"{MIDDLE[what] * 256 / width * factor:.4g}") for factor in FACTORS]


def key_of(width: int, what: str, seed: int) -> str:
    """A cell's name in rates.json."""
    return f"{width}, {what}, seed {seed}"


def measure(width: int, what: str, seed: int, args: argparse.Namespace, device: torch.device) -> dict:
    """NMSE of the student as it starts and, by rate, as it ends."""
    config = configuration(width, tuple(args.blocks))
    with torch.device("meta"):
        teacher = stock_class("small")(**config)
    teacher = filled(teacher, seed, device).float().requires_grad_(False).eval()
    generator = torch.Generator().manual_seed(seed)
    trained, held_out = (random_inputs(config, count, generator, device) for count in (TRAINED, HELD_OUT))
    right, held_right = ([teacher(**given)[0] for given in part] for part in (trained, held_out))
    found: dict[str, float] = {}
    for rate in rates_of(what, width):
        torch.manual_seed(seed)  # the LoRA's start
        student = student_of(teacher, what, args.rank)
        with torch.no_grad():
            start = nmse(student, held_out, held_right).item()
        train(student, trained, right, rate, args.steps)
        with torch.no_grad():
            found[str(rate)] = nmse(student, held_out, held_right).item()
    return {"width": width, "what": what, "seed": seed, "start": start, "nmse": found}


def judge(cells: list[dict]) -> list[dict]:
    """Of each of --what: the best rate by width and seed, and the exponent of the width, over widths that have one.

    A best rate at an end of those tried is no optimum: it is named and not counted.
    """
    verdict = []
    for what in MIDDLE:
        rows = []
        for cell in (cell for cell in cells if cell["what"] == what):
            points = {float(rate): value for rate, value in cell["nmse"].items() if value is not None}
            rate, value, bound = optimum(points)
            rows.append({"width": cell["width"], "seed": cell["seed"], "rate": rate, "nmse": value, "bound": bound})
        counted = [(math.log(row["width"]), math.log(row["rate"])) for row in rows if not row["bound"]]
        exponent = None
        if len({x for x, _ in counted}) > 1:
            exponent = -statistics.linear_regression(*zip(*counted, strict=True)).slope
        if rows:
            verdict.append({"what": what, "exponent": exponent, "optima": sorted(rows, key=lambda row: row["width"])})
    return verdict


def table(verdict: list[dict]) -> str:
    """Markdown: the optima, and below each kind its exponent."""
    lines = ["| trained | width | best rate of each seed | NMSE there |", "| --- " * 4 + "|"]
    for kind in verdict:
        for width in dict.fromkeys(row["width"] for row in kind["optima"]):
            rows = [row for row in kind["optima"] if row["width"] == width]
            rates = ", ".join(f"{row['rate']:.2g}" + " (the last one tried)" * row["bound"] for row in rows)
            values = ", ".join(f"{row['nmse']:.3f}" for row in rows)
            lines.append(f"| {kind['what']} | {width} | {rates} | {values} |")
        if kind["exponent"] is not None:
            lines.append(f"| {kind['what']} | all | ∝ 1/width^{kind['exponent']:.2f} | |")
    return "\n".join(lines) + "\n"


def plot(cells: list[dict], verdict: list[dict], file: Path) -> None:
    """NMSE over the rate, a curve for each width and seed; the optima as stars."""
    size = {"figsize": (5.5 * len(verdict), 3.8), "layout": "constrained", "squeeze": False}
    figure, axes = pyplot.subplots(1, len(verdict), **size)
    colors = {width: f"C{i}" for i, width in enumerate(sorted({cell["width"] for cell in cells}))}
    for axis, kind in zip(axes[0], verdict, strict=True):
        for cell in (cell for cell in cells if cell["what"] == kind["what"]):
            points = {float(rate): value for rate, value in cell["nmse"].items() if value is not None}
            axis.plot(list(points), list(points.values()), color=colors[cell["width"]], alpha=0.7)
        for width, color in colors.items():
            rows = [row for row in kind["optima"] if row["width"] == width and not row["bound"]]
            at = [row["rate"] for row in rows], [row["nmse"] for row in rows]
            axis.plot(*at, "*", markersize=11, color=color, label=f"width {width}")
        power = "" if kind["exponent"] is None else f": best rate ∝ 1/width^{kind['exponent']:.2f}"
        axis.set(title=kind["what"] + power, xlabel="learning rate", ylabel="velocity NMSE", xscale="log", yscale="log")
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small")
    figure.savefig(file, dpi=110)
    pyplot.close(figure)


def parse_args() -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("output/rates"))
    parser.add_argument("--widths", type=int, nargs="+", default=[256, 512, 1024], help=f"multiples of {HEAD}")
    parser.add_argument("--what", nargs="+", choices=MIDDLE, default=list(MIDDLE), help="is trained, one at a time")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="of weights, inputs and LoRA")
    parser.add_argument("--blocks", type=int, nargs=2, metavar=("DOUBLE", "SINGLE"), default=[2, 3])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rank", type=int, default=32, help="of the LoRA")
    parser.add_argument("--device", help="default: cuda if there, else mps, else cpu")
    args = parser.parse_args()
    if wrong := [width for width in args.widths if width < HEAD or width % HEAD]:
        parser.error(f"--widths {wrong[0]}: must be a multiple of {HEAD}, the width of a head")
    if min(args.steps, args.rank, *args.blocks) < 1:
        parser.error("--steps, --rank and --blocks must be at least 1")
    return args


def main() -> None:
    args = parse_args()
    device = pick_device(args.device)
    file, settings = args.output / "rates.json", {name: getattr(args, name) for name in SETTINGS}
    data = {"settings": settings, "device": device_name(device), "torch": torch.__version__, "cells": {}}
    if file.exists():
        data = read_json(file)
        if data["settings"] != settings:
            raise ValueError(f"{file}: measured with {data['settings']}, asked for {settings}; give another --output")
    args.output.mkdir(parents=True, exist_ok=True)
    for width in args.widths:
        for what in args.what:
            for seed in args.seeds:
                key = key_of(width, what, seed)
                if key not in data["cells"]:
                    data["cells"][key] = measure(width, what, seed, args, device)
                    write_json(file, data)
                log.info("%s: %s", key, data["cells"][key]["nmse"])
    cells = list(data["cells"].values())
    verdict = judge(cells)
    write_json(file, data | {"verdict": verdict})
    write_text(args.output / "rates.md", table(verdict))
    plot(cells, verdict, args.output / "rates.png")
    print(table(verdict))


if __name__ == "__main__":
    run_script(main)
