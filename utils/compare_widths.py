"""Every method at several widths of the same model, and which learning rate each width wants.

    for w in 512 1024; do   # 0.93 on the evaluation prompts
        python -m utils.make_tiny_flux --width $w --examples 800000 --batch_size 256 --widened_steps 8000
    done
    python -m utils.compare_widths --models assets/tiny-flux output/tiny-flux-512 output/tiny-flux-1024 --parallel 6
    python -m utils.compare_widths --output output/widths                          # the plot of what is there

At each width: one-shot quantization (mse, calibrated), block-wise training at 5e-4 · sqrt(256/width), and end-to-end
training at five learning rates, a factor of two apart, around --middle · sqrt(256/width), halfway between the rules.
Budgets are short and the same at every width; the best rate of so few steps is above that of a whole training. A cell
is a train.py, or a run.py and a test.py.

OUTPUT/widths.json holds every figure and is all that the same command needs to go on from, here or elsewhere; cells of
the widest model come first. OUTPUT/widths.md: the table, the optimum of each width (of the NMSE, by a parabola through
the best rate and its neighbours, both logarithmic), and how far off each rule for the rate is that the first model's
optimum is carried over by:

    constant        the same rate
    sqrt, width     1/sqrt(width), 1/width
    alpha, rms      a share of the mean step size of the weights, of their root mean square. Of widened teachers both
                    fall by about 1/sqrt(width), since they start that way: these tell little beside "sqrt"

OUTPUT/widths.png: scene score of the teacher's, NMSE and optimum over the width.
"""

import utils.interrupt  # noqa: F401 (Ctrl-C is a line from here on)

import argparse
import json
import math
import os
import threading
import time
from collections.abc import Mapping
from pathlib import Path

import diffusers
import matplotlib
import torch

from models.modeling_flux_quant import FluxTransformer2DModel, QuantizeLinear
from utils.folders import read_json, write_json, write_text
from utils.processes import quantize_and_judge, run_logged, spread
from utils.rates import EXPONENTS, REFERENCE_RATE, optimum, scaled
from utils.utils import ArgumentParser, device_name, from_root, get_logger, pick_device, run_script
from utils.widen import width_of

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402 (the backend is to be chosen first)
from matplotlib.ticker import NullFormatter  # noqa: E402

log = get_logger("widths")
METHODS = ("mse", "calibrated", "blockwise")
FACTORS = (0.25, 0.5, 1, 2, 4)  # of the rate in the middle
BUDGET = (
    "max_steps", "batch_size", "num_train_prompts", "block_steps", "block_prompts", "num_images", "w_bits", "flags",
)  # fmt: skip
RULES = (*EXPONENTS, "alpha", "rms")


# -------------------------------------------------------------------------------------------------------- the cells


def model_facts(model: str) -> dict:
    """Name, parameters and, over all quantized weights, mean step size at 1.58 bits and root mean square."""
    config = diffusers.FluxTransformer2DModel.load_config(model, subfolder="transformer")
    transformer = FluxTransformer2DModel.from_pretrained(model, subfolder="transformer", w_bits=0)
    count, alpha, energy = 0, 0.0, 0.0
    for layer in transformer.modules():
        if isinstance(layer, QuantizeLinear):
            size = layer.weight.numel()
            count += size
            alpha += size * layer.weight_clip_val.mean().item()
            energy += layer.weight.float().square().sum().item()
    facts = {"width": width_of(config), "model": Path(model).name, "parameters": transformer.num_parameters()}
    return facts | {"alpha": alpha / count, "rms": math.sqrt(energy / count)}


def rate_cells(width: int, seeds: list[int], middle: float = 1e-3) -> list[dict]:
    """End-to-end training at each rate, around `middle` at width 256, and with each order of the samples."""
    rates = [middle * scaled("sqrt", width) / REFERENCE_RATE * factor for factor in FACTORS]
    return [
        {"width": width, "method": "trained", "rate": float(f"{rate:.4g}"), "seed": seed}
        for seed in seeds
        for rate in rates
    ]


def key_of(cell: dict) -> str:
    """A cell's name in widths.json."""
    words = [str(cell["width"]), cell["method"]]
    return "-".join(words + ([f"{cell['rate']:g}", str(cell["seed"])] if cell["method"] == "trained" else []))


def train_words(model: str, folder: Path, args: argparse.Namespace) -> list[object]:
    """train.py with the flags that all cells of a model share."""
    flags = {
        "input_model_filename": model, "local_dir": args.output.absolute() / "trained", "w_bits": args.w_bits,
        "output_dir": folder.absolute(), "output_model_filename": folder.name, "max_steps": args.max_steps,
        "per_device_train_batch_size": args.batch_size, "per_device_eval_batch_size": args.drawn_at_a_time,
        "num_train_prompts": args.num_train_prompts, "num_images": min(12, args.num_images),
        "num_final_images": args.num_images, "eval_strategy": "no", "eval_on_start": False, "save_strategy": "no",
        "disable_tqdm": True, "pack": True,
    }  # fmt: skip
    if torch.cuda.is_available():
        flags["dataloader_num_workers"] = max(1, min(8, (os.cpu_count() or 1) // args.parallel))
    return ["train.py", *(word for name, value in flags.items() for word in (f"--{name}", value))]


def measure(cell: dict, model: str, environment: Mapping[str, str], args: argparse.Namespace) -> dict:
    """NMSE, PSNR in dB, scene score of student and teacher and seconds of one cell."""
    folder, started = args.output / key_of(cell), time.time()
    if cell["method"] != "trained":
        flags = ["--method", cell["method"]]
        if cell["method"] == "blockwise":
            flags += ["--block_steps", args.block_steps, "--block_batch_size", args.batch_size]
            flags += ["--calibration_prompts", args.block_prompts, "--block_learning_rate", cell["rate"]]
            flags += ["--no-block_compile"]  # it takes longer than the few steps, which are a CUDA graph anyway
        sizes = {"w_bits": args.w_bits, "num_images": args.num_images, "batch_size": args.drawn_at_a_time}
        found = quantize_and_judge(folder, model, flags, environment, **sizes)
        figures = {name: found[name] for name in ("nmse", "psnr")}
        figures |= {"score": found["scene_score"]["mean"], "teacher": found["scene_score_teacher"]["mean"]}
        return figures | {"seconds": found["run"]["seconds"]}
    summary = folder / "summary.json"
    if not summary.exists():
        words = [*train_words(model, folder, args), "--learning_rate", cell["rate"], "--data_seed", cell["seed"]]
        if torch.cuda.is_available() and cell["width"] >= 512:  # below, compiling takes longer than all steps
            words += ["--torch_compile", True]
        run_logged([*words, *args.flags], folder / "log.txt", environment)
    found = json.loads(summary.read_text())
    names = {"nmse": "nmse", "psnr": "psnr", "score": "scene_score", "teacher": "scene_score_teacher"}
    figures = {name: found["final"][f"eval_{source}"] for name, source in names.items()}
    return figures | {"seconds": round(time.time() - started, 1), "seconds_per_step": found["seconds_per_step"]}


class Results:
    """OUTPUT/widths.json: what was measured, by cell; written anew with every cell."""

    def __init__(self, args: argparse.Namespace):
        self.file, self.lock = args.output / "widths.json", threading.Lock()
        settings = {name: getattr(args, name) for name in BUDGET}
        versions = {"torch": torch.__version__, "diffusers": diffusers.__version__}
        self.data = {"settings": settings, "device": device_name(pick_device()), **versions, "models": {}, "cells": {}}
        if self.file.exists():
            self.data = read_json(self.file)
            found = self.data["settings"]
            for name, wanted in settings.items():
                if args.models and found.get(name) != wanted:
                    raise ValueError(
                        f"{self.file}: measured with {name}={found.get(name)}, asked for {name}={wanted}; give the "
                        "same, or another --output"
                    )

    def add(self, part: str, name: str, figures: dict) -> None:
        with self.lock:
            self.data[part][name] = figures
            write_json(self.file, self.data)


def fill(models: dict[int, str], results: Results, args: argparse.Namespace) -> None:
    """Measure what is missing; after args.minutes no cell is begun any more."""
    end = time.time() + 60 * args.minutes
    cells = []
    for width in sorted(models, reverse=True):
        cells += rate_cells(width, args.seeds, args.middle)
        rate = float(f"{scaled('sqrt', width):.4g}")
        cells += [{"width": width, "method": method, "rate": rate, "seed": 0} for method in reversed(METHODS)]
    cells = [cell for cell in cells if key_of(cell) not in results.data["cells"]]

    # one after the other: threads that load models find each other's weights on the device "meta"
    for width in models:
        if str(width) not in results.data["models"]:
            results.add("models", str(width), model_facts(models[width]))

    def prepare(width: int, environment: Mapping[str, str]) -> None:
        """The teacher's trajectories, so that no cell waits for another's."""
        words = [*train_words(models[width], args.output / f"{width}-teacher", args), "--do_train", False]
        run_logged(words, args.output / f"{width}-teacher" / "log.txt", environment)

    def one(cell: dict, environment: Mapping[str, str]) -> None:
        if time.time() < end:
            log.info("%s", key_of(cell))
            figures = measure(cell, models[cell["width"]], environment, args)
            results.add("cells", key_of(cell), cell | figures)

    trained = {cell["width"] for cell in cells if cell["method"] == "trained"}
    spread(prepare, [width for width in models if width in trained], args.parallel)
    spread(one, cells, args.parallel)
    left = [key_of(cell) for cell in cells if key_of(cell) not in results.data["cells"]]
    if left:
        log.info("left for another call: %s", ", ".join(left))


# ------------------------------------------------------------------------------------------------------- the verdict


def between(points: dict[float, float], rate: float) -> float:
    """The NMSE at `rate`, from straight lines between the points, both logarithmic; beyond them that of the end."""
    rates = sorted(points)
    rate = min(max(rate, rates[0]), rates[-1])
    for low, high in zip(rates, rates[1:], strict=False):
        if rate <= high:
            share = math.log(rate / low) / math.log(high / low)
            return points[low] ** (1 - share) * points[high] ** share
    return points[rates[-1]]


def ladder(cells: list[dict], width: int, seed: int | None = None) -> dict[float, float]:
    """{rate: NMSE} of a width, the geometric mean over the seeds or of one of them."""
    values: dict[float, list[float]] = {}
    for cell in cells:
        if cell["method"] == "trained" and cell["width"] == width and seed in (None, cell["seed"]):
            values.setdefault(cell["rate"], []).append(math.log(cell["nmse"]))
    return {rate: math.exp(sum(logs) / len(logs)) for rate, logs in values.items()}


def judge(data: dict) -> dict:
    """The optimum of each width and what the rules make of the first one: {"optima": …, "rules": …}.

    A rule's "off" is the root mean square, over the other widths, of the factor between its rate and the optimum, in
    powers of two; "loss" how much larger the NMSE at its rate is than the least that was measured, on average.
    """
    cells = list(data["cells"].values())
    optima, ladders = {}, {}
    for width in sorted({cell["width"] for cell in cells if cell["method"] == "trained"}):
        points = ladder(cells, width)
        if len(points) < 3:
            continue
        rate, nmse, bound = optimum(points)
        seeds = sorted({c["seed"] for c in cells if c["method"] == "trained" and c["width"] == width})
        each = [optimum(ladder(cells, width, seed))[0] for seed in seeds]
        optima[width] = {"rate": rate, "nmse": nmse, "bound": bound, "of_each_seed": each}
        ladders[width] = points
    if len(optima) < 2:
        return {"optima": optima, "rules": {}}
    first, *others = optima
    facts = {width: data["models"][str(width)] for width in optima}
    rules = {}
    for rule in RULES:
        rates = {}
        for width in others:
            ratio = (first / width) ** EXPONENTS[rule] if rule in EXPONENTS else facts[width][rule] / facts[first][rule]
            rates[width] = optima[first]["rate"] * ratio
        off = [math.log2(rates[width] / optima[width]["rate"]) for width in others]
        loss = [between(ladders[width], rates[width]) / min(ladders[width].values()) - 1 for width in others]
        rules[rule] = {
            "rates": rates, "off": math.sqrt(sum(o * o for o in off) / len(off)), "loss": sum(loss) / len(loss),
        }  # fmt: skip
    return {"optima": optima, "rules": rules}


def table(data: dict, verdict: dict) -> str:
    """Markdown: every cell, the optima, the rules from the best on."""
    lines = ["| width | method | rate | seed | NMSE | PSNR dB | scene score | of teacher | seconds |"]
    lines.append("|" + " --- |" * 9)
    order = {name: i for i, name in enumerate((*METHODS, "trained"))}
    for cell in sorted(data["cells"].values(), key=lambda c: (c["width"], order[c["method"]], c["seed"], c["rate"])):
        trained = cell["method"] == "trained"
        rate = f"{cell['rate']:.3g}" if cell["method"] in ("trained", "blockwise") else ""
        cells = [cell["width"], cell["method"], rate, cell["seed"] if trained else "", f"{cell['nmse']:.4f}"]
        cells += [f"{cell['psnr']:.1f}", f"{cell['score']:.3f}", f"{cell['score'] / cell['teacher']:.1%}"]
        lines.append(f"| {' | '.join(map(str, [*cells, round(cell['seconds'])]))} |")
    lines += ["", "| width | best rate | NMSE there | best rate of each seed |", "|" + " --- |" * 4]
    for width, best in verdict["optima"].items():
        bound = " (the last one tried)" if best["bound"] else ""
        each = ", ".join(f"{rate:.2g}" for rate in best["of_each_seed"])
        lines.append(f"| {width} | {best['rate']:.2g}{bound} | {best['nmse']:.4f} | {each} |")
    lines += ["", "| rule | off, powers of two | NMSE above the least | rates |", "|" + " --- |" * 4]
    for rule, found in sorted(verdict["rules"].items(), key=lambda item: item[1]["off"]):
        rates = ", ".join(f"{rate:.2g} at {width}" for width, rate in found["rates"].items())
        lines.append(f"| {rule} | {found['off']:.2f} | {found['loss']:.1%} | {rates} |")
    return "\n".join(lines) + "\n"


def best_cells(data: dict) -> dict[str, dict[int, dict]]:
    """{method: {width: its cell}}, of end-to-end training the one with the least NMSE."""
    found: dict[str, dict[int, dict]] = {}
    for cell in data["cells"].values():
        row = found.setdefault(cell["method"], {})
        if cell["width"] not in row or cell["nmse"] < row[cell["width"]]["nmse"]:
            row[cell["width"]] = cell
    return {method: dict(sorted(row.items())) for method, row in found.items()}


def plot(data: dict, verdict: dict, file: Path) -> None:
    """Scene score of the teacher's, NMSE, NMSE over the rate, and the optimum with the rules."""
    figure, (score, error, rates, best) = pyplot.subplots(1, 4, figsize=(17, 3.8), layout="constrained")
    for method, row in best_cells(data).items():
        share = [100 * cell["score"] / cell["teacher"] for cell in row.values()]
        score.plot(list(row), share, marker="o", label=method)
        error.plot(list(row), [cell["nmse"] for cell in row.values()], marker="o", label=method)
    for width, found in verdict["optima"].items():
        points = dict(sorted(ladder(list(data["cells"].values()), width).items()))
        line = rates.plot(list(points), list(points.values()), marker="o", label=f"width {width}")[0]
        rates.plot(found["rate"], found["nmse"], marker="*", markersize=12, color=line.get_color())
    optima = {width: found["rate"] for width, found in verdict["optima"].items()}
    best.plot(list(optima), list(optima.values()), "k*", markersize=12, label="measured")
    for rule, found in verdict["rules"].items():
        line = {min(optima): optima[min(optima)]} | found["rates"]
        best.plot(list(line), list(line.values()), linewidth=1, label=rule)
    score.set(title="scene score, % of the teacher's", xlabel="width", xscale="log")
    error.set(title="velocity NMSE", xlabel="width", xscale="log", yscale="log")
    rates.set(title="NMSE of end-to-end training", xlabel="learning rate", xscale="log", yscale="log")
    best.set(title="best learning rate", xlabel="width", xscale="log", yscale="log")
    widths = sorted({cell["width"] for cell in data["cells"].values()})
    for axis in (score, error, rates, best):
        axis.grid(alpha=0.3)
        axis.xaxis.set_minor_formatter(NullFormatter())
        if axis is not rates:
            axis.set_xticks(widths, labels=widths)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize="small")
    figure.savefig(file, dpi=110)
    pyplot.close(figure)


def parse_args() -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("output/widths"))
    parser.add_argument("--models", nargs="*", default=[], help="the teachers, pipelines of one width each; none: only "
                        "table and plot of what is in OUTPUT/widths.json")  # fmt: skip
    parser.add_argument("--parallel", type=int, default=1, help="cells measured at a time on each GPU")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no cell after so many; default: all")
    parser.add_argument("--seeds", nargs="+", type=int, default=[42], help="orders of the samples to train in")
    parser.add_argument("--middle", type=float, default=1e-3, help="of the learning rates, at width 256")
    parser.add_argument("--w_bits", type=int, default=0)
    parser.add_argument("--max_steps", type=int, default=600, help="of end-to-end training")
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--num_train_prompts", type=int, default=4096)
    parser.add_argument("--block_steps", type=int, default=100, help="of each block")
    parser.add_argument("--block_prompts", type=int, default=1024, help="training prompts of block-wise training")
    parser.add_argument("--num_images", type=int, default=480, help="held-out prompts to judge by")
    parser.add_argument("--drawn_at_a_time", type=int, default=160, help="pictures")
    parser.add_argument("--flags", nargs=argparse.REMAINDER, default=[], help="further flags of train.py, last")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    models: dict[int, str] = {}
    for model in args.models:
        folder = str(Path(from_root(model)).resolve())
        width = width_of(diffusers.FluxTransformer2DModel.load_config(folder, subfolder="transformer"))
        if width in models:
            raise ValueError(f"--models: {models[width]} and {folder} both have width {width}; give one of them")
        models[width] = folder
    if not models and not (args.output / "widths.json").exists():
        raise ValueError(f"{args.output / 'widths.json'}: not there; give --models to measure")
    args.output.mkdir(parents=True, exist_ok=True)
    results = Results(args)
    if models:
        fill(models, results, args)
    verdict = judge(results.data)
    write_json(args.output / "widths.json", results.data | {"verdict": verdict})
    write_text(args.output / "widths.md", table(results.data, verdict))
    plot(results.data, verdict, args.output / "widths.png")
    print(table(results.data, verdict))


if __name__ == "__main__":
    run_script(main)
