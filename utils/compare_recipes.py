"""Train the same student by several recipes and put them in one table.

    python -m utils.compare_recipes --output output/recipes                  # on each GPU a recipe after the other
    python -m utils.compare_recipes --parallel 4 --recipes early97 published # four at a time on each GPU
    python -m utils.compare_recipes --recipes last --data_seeds 1 2 3        # three orders of the samples; mean
    python -m utils.compare_recipes --recipes last --w_bits 2 3 4            # at several bit widths
    python -m utils.compare_recipes --output output/recipes --max_steps 50 --num_final_images 12 --batch_size 4

Every cell (a recipe, at a bit width, with a seed) is one call of train.py, with the same teacher cache, steps, batch
size and held-out prompts; what an interrupted call has finished (OUTPUT/NAME/summary.json) is not trained again, and
with --save_steps it goes on within a cell, too. It writes OUTPUT/NAME/ (see train.py; NAME+2bit, NAME+seed1) and, anew
with every cell that is done, OUTPUT/recipes.json with every figure and the table, OUTPUT/recipes.md. With --parallel
the seconds per step are those of a shared machine.
"""

import utils.interrupt  # noqa: F401 (Ctrl-C is a line from here on)

import argparse
import itertools
import json
import math
import os
import statistics
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from utils.folders import write_json, write_text
from utils.processes import run_logged, spread, visible_gpus
from utils.scenes import CATEGORIES
from utils.utils import ArgumentParser, get_logger, run_script

log = get_logger("recipes")
PLAIN = (
    "--lora_r 0 --learning_rate 5e-4 --clip_learning_rate 5e-4 --ema_decay 0 --early_share 0.25 --loss_power 1 "
    "--freeze_codes 0 --feature_loss 0 --vote_codes 0 --visit_share 0"
).split()
EARLY, VERY_EARLY = ["--early_share", "0.9"], ["--early_share", "0.97"]
DEFAULTS = "frozen10_80_tenth"  # the recipe that train.py follows unless it is told otherwise
STEP_SHARES = "assets/steps/steps.json"  # of tiny-flux and its student
STARTS = {  # names that stand for a folder of run.py in a recipe: flags of run.py
    "ONESHOT": [],
    "BLOCKWISE": "--method blockwise --block_steps 300".split(),
}


def at(rate: str) -> list[str]:
    """Weights and step sizes at this learning rate."""
    return ["--learning_rate", rate, "--clip_learning_rate", rate]


def frozen(early: int, power: str, share: int, features: str = "0", rate: str = "5e-4") -> tuple[str, list[str]]:
    """A recipe in which the codes stay for the last `share` % of the steps."""
    name = f"full weights, lr {rate}, {early} % early, error^{power}, codes frozen for the last {share} %"
    flags = ["--early_share", str(early / 100), "--loss_power", power, "--freeze_codes", str(share / 100)]
    if features != "0":
        name += f", blocks' outputs × {features}"
    return name, [*PLAIN, *at(rate), *flags, "--feature_loss", features]


def by_shares(power: str) -> tuple[str, list[str]]:
    """A recipe with frozen codes in which denoising steps are trained on by the damage that they do."""
    _, flags = frozen(25, power, 10)
    flags = [word for pair in zip(flags[::2], flags[1::2], strict=True) if pair[0] != "--early_share" for word in pair]
    name = f"full weights, lr 5e-4, steps by their damage, error^{power}, codes frozen for the last 10 %"
    return name, [*flags, "--step_shares", STEP_SHARES]


def last(
    early: int = 90, power: str = "0.25", vote: str = "0", visit: str = "0", start: str | None = None
) -> tuple[str, list[str]]:  # fmt: skip
    """A recipe with frozen codes that differs in its last steps; from `start` at half the learning rate."""
    name, flags = frozen(early, power, 10)
    for share, what, flag in ((vote, "codes by majority of", "vote_codes"), (visit, "own states in", "visit_share")):
        name += f", {what} the last {float(share):.0%}" if float(share) else ""
        flags = [*flags, f"--{flag}", share]
    if start:
        name, flags = f"{name}, lr 2.5e-4 from {start.lower()}", [*flags, *at("2.5e-4"), "--start_from", start]
    return name, flags


@dataclass(frozen=True)
class Cell:
    """A recipe at a bit width, with the order of samples of a seed (None: train.py's own)."""

    recipe: str
    w_bits: int = 0
    seed: int | None = None

    @property
    def name(self) -> str:
        bits = f"+{self.w_bits}bit" if self.w_bits else ""
        return f"{self.recipe}{bits}" + ("" if self.seed is None else f"+seed{self.seed}")

    @property
    def what(self) -> str:
        bits = f", {self.w_bits} bits" if self.w_bits else ""
        return RECIPES[self.recipe][0] + bits + ("" if self.seed is None else f", seed {self.seed}")


RECIPES = {  # name: (what it is, flags of train.py, none left to the defaults)
    "published": (
        "published port, literally: LoRA r 32 inside, scaling 1/32, α = max, lr 2e-5",
        [*PLAIN, *"--lora_r 32 --lora_alpha 1 --clip_init max".split(), *at("2e-5")],
    ),
    "uniform": ("full weights, lr 5e-4, all steps alike", PLAIN),
    "early75": ("full weights, lr 5e-4, 75 % early", [*PLAIN, "--early_share", "0.75"]),
    "early90": ("full weights, lr 5e-4, 90 % early", [*PLAIN, *EARLY]),
    "early97": ("full weights, lr 5e-4, 97 % early", [*PLAIN, *VERY_EARLY]),
    "quarter": ("full weights, lr 5e-4, 97 % early, error^¼", [*PLAIN, *VERY_EARLY, "--loss_power", "0.25"]),
    "frozen10": frozen(97, "0.25", 10),
    "frozen20": frozen(97, "0.25", 20),
    "frozen10_90": frozen(90, "0.25", 10),
    "frozen10_90_fast": frozen(90, "0.25", 10, rate="1e-3"),
    "frozen10_80": frozen(80, "0.25", 10),
    "frozen10_70": frozen(70, "0.25", 10),
    "frozen10_80_tenth": frozen(80, "0.1", 10),
    "frozen10_80_tenth_fast": frozen(80, "0.1", 10, rate="1e-3"),
    "by_shares": by_shares("0.25"),
    "by_shares_tenth": by_shares("0.1"),
    "voted": last(vote="0.05"),
    "visited": last(visit="0.3"),
    "last": last(vote="0.05", visit="0.3"),
    "last_80_tenth": last(80, "0.1", vote="0.05", visit="0.3"),
    "last_blockwise": last(vote="0.05", visit="0.3", start="BLOCKWISE"),
    "features": frozen(97, "0.25", 10, features="2"),
    "fast": ("full weights, lr 1e-3, 97 % early", [*PLAIN, *VERY_EARLY, *at("1e-3")]),
    "slow": ("full weights, lr 2.5e-4, 90 % early", [*PLAIN, *EARLY, *at("2.5e-4")]),
    "calibrated": (
        "full weights from the calibrated one-shot, lr 2.5e-4, 90 % early",
        [*PLAIN, *EARLY, *at("2.5e-4"), "--start_from", "ONESHOT"],
    ),
    "lora": (
        "LoRA r 32 inside, scaling 1, lr 5e-4, 97 % early",
        [*PLAIN, *VERY_EARLY, *"--lora_r 32 --lora_alpha 32".split()],
    ),
}


def call(
    folder: Path, args: argparse.Namespace, environment: Mapping[str, str], *flags, w_bits: int = 0, ranks: int = 1
) -> None:  # fmt: skip
    """Run train.py with the shared flags and `flags`, its output in folder/log.txt; ValueError if it fails."""
    shared = {
        "input_model_filename": args.model,
        "local_dir": args.output.absolute(),
        "output_dir": folder.absolute(),
        "output_model_filename": folder.name,
        "w_bits": w_bits,
        "max_steps": args.max_steps,
        "per_device_train_batch_size": args.batch_size,
        "per_device_eval_batch_size": args.eval_batch_size,
        "num_train_prompts": args.num_train_prompts,
        "num_images": 12,
        "num_final_images": args.num_final_images,
        "eval_steps": max(1, args.max_steps // 4),
        "save_steps": args.save_steps or args.max_steps,
        "save_total_limit": 1,
        "disable_tqdm": True,
        "pack": True,
        "torch_compile": torch.cuda.is_available(),
    }
    if torch.cuda.is_available():
        processes = args.parallel * len(visible_gpus())
        shared["dataloader_num_workers"] = max(1, min(8, (os.cpu_count() or 1) // processes))
    words = [word for name, value in shared.items() for word in (f"--{name}", value)]
    flags = [start_folder(flag, w_bits, args) if flag in STARTS else flag for flag in flags]
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
    run_logged([*launch, "train.py", *words, *flags, *args.flags], folder / "log.txt", environment)


def start_folder(start: str, w_bits: int, args: argparse.Namespace) -> Path:
    """Where the pipeline lies that stands for `start` at a bit width."""
    return args.output.absolute() / (start.lower() + (f"+{w_bits}bit" if w_bits else ""))


def make_start(what: tuple[str, int], environment: Mapping[str, str], args: argparse.Namespace) -> None:
    """What recipes with --start_from start from at a bit width."""
    start, w_bits = what
    folder = start_folder(start, w_bits, args)
    if not (folder / "metrics.json").exists():  # an interrupted run has left the folder, and goes on there
        flags = ["--model_id", args.model, "--output_path", folder, "--w_bits", w_bits, "--num_images", 0]
        run_logged(["run.py", *flags, *STARTS[start]], args.output / f"{folder.name}.txt", environment)


def train(cell: Cell, environment: Mapping[str, str], args: argparse.Namespace) -> dict:
    """The summary of train.py with one recipe, bit width and seed."""
    started, summary = time.time(), args.output / cell.name / "summary.json"
    if not summary.exists():
        seed = [] if cell.seed is None else ["--data_seed", cell.seed]
        call(args.output / cell.name, args, environment, *RECIPES[cell.recipe][1], *seed, w_bits=cell.w_bits)
        log.info("%s: done in %.0f s", cell.name, time.time() - started)
    return json.loads(summary.read_text())


def figures(result: dict) -> list[float]:
    """A line of the table: of a summary, or of the mean of several."""
    final = result["final"]
    found = [final.get(f"eval_scene_{name}", math.nan) for name in (*CATEGORIES, "worst_of_teacher")]
    score, teacher = final["eval_scene_score"], final["eval_scene_score_teacher"]
    return [final["eval_nmse"], score, score / teacher, *found, final["eval_psnr"], result["seconds_per_step"]]


def table(results: dict[Cell, dict]) -> str:
    """Markdown: a line for each cell, and for each recipe and bit width with several seeds the mean and the spread
    (standard deviation) of them."""
    titles = ["NMSE", "scene score", "of teacher", *CATEGORIES, "worst category of teacher", "PSNR dB", "s a step"]
    formats = [".5f", ".3f", ".1%", *[".3f"] * len(CATEGORIES), ".1%", ".2f", ".3f"]
    lines = [f"| recipe | {' | '.join(titles)} |", "|" + " --- |" * (len(titles) + 1)]
    rows = {cell.what: figures(result) for cell, result in results.items()}
    for recipe, w_bits in dict.fromkeys((cell.recipe, cell.w_bits) for cell in results):
        found = [figures(r) for cell, r in results.items() if (cell.recipe, cell.w_bits) == (recipe, w_bits)]
        if len(found) > 1:
            what, columns = Cell(recipe, w_bits).what, list(zip(*found, strict=True))
            rows[f"{what}: mean of {len(found)} seeds"] = [statistics.mean(column) for column in columns]
            rows[f"{what}: spread"] = [statistics.stdev(column) for column in columns]
    for what, values in rows.items():
        lines.append(f"| {what} | {' | '.join(f'{v:{f}}' for v, f in zip(values, formats, strict=True))} |")
    return "\n".join(lines) + "\n"


def write_results(results: dict[Cell, dict], args: argparse.Namespace) -> None:
    """recipes.json and recipes.md; while other cells train, so that a call that is cut off leaves what is done."""
    by_name = {cell.name: summary for cell, summary in results.items()}
    write_json(args.output / "recipes.json", {"parallel": args.parallel, "recipes": by_name})
    write_text(args.output / "recipes.md", table(results))


def parse_args() -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("output/recipes"))
    parser.add_argument("--model", default="assets/tiny-flux", help="the teacher")
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES), metavar="NAME",
                        help=f"default: all of {', '.join(RECIPES)}; train.py's own: {DEFAULTS}")  # fmt: skip
    parser.add_argument("--parallel", type=int, default=1, help="recipes trained at a time on each GPU")
    parser.add_argument("--w_bits", nargs="+", type=int, default=[0])
    parser.add_argument("--data_seeds", nargs="+", type=int, default=[None], metavar="SEED",
                        help="of the order of the samples, each a training of its own")  # fmt: skip
    parser.add_argument("--max_steps", type=int, default=6000)
    parser.add_argument("--save_steps", type=int, help="steps between checkpoints; default: none on the way")
    parser.add_argument("--batch_size", type=int, default=256)
    parser.add_argument("--eval_batch_size", type=int, default=200)
    parser.add_argument("--num_train_prompts", type=int, default=64000)
    parser.add_argument("--num_final_images", type=int, default=1200)
    parser.add_argument("--flags", nargs=argparse.REMAINDER, default=[], help="further flags of train.py, last")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    log.info("filling the teacher cache")
    call(args.output / "teacher", args, {}, "--do_train", "False", ranks=max(1, len(visible_gpus())))
    cells = [Cell(*what) for what in itertools.product(args.recipes, args.w_bits, args.data_seeds)]
    starts = {(start, c.w_bits): None for c in cells for start in STARTS if start in RECIPES[c.recipe][1]}
    if starts:
        log.info("quantizing the model to start from")
        spread(lambda what, environment: make_start(what, environment, args), list(starts), args.parallel)
    found, lock = {}, threading.Lock()

    def one(cell: Cell, environment: Mapping[str, str]) -> None:
        summary = train(cell, environment, args)
        with lock:
            found[cell] = summary
            write_results({other: found[other] for other in cells if other in found}, args)

    spread(one, cells, args.parallel)
    print(table({cell: found[cell] for cell in cells}))


if __name__ == "__main__":
    run_script(main)
