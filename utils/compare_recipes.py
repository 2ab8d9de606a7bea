"""Train the same student by several recipes and put them in one table.

    python -m utils.compare_recipes --output output/recipes                  # on each GPU a recipe after the other
    python -m utils.compare_recipes --parallel 4 --recipes early97 published # four at a time on each GPU
    python -m utils.compare_recipes --output output/recipes --max_steps 50 --num_final_images 12 --batch_size 4

Every recipe is one call of train.py, with the same teacher cache, steps, batch size and held-out prompts; what an
interrupted call has finished (OUTPUT/NAME/summary.json) is not trained again. It writes OUTPUT/NAME/ (see train.py),
OUTPUT/recipes.json with every figure, and the table, OUTPUT/recipes.md. With --parallel the seconds per step are those
of a shared machine.
"""

import utils.interrupt  # noqa: F401 (Ctrl-C is a line from here on)

import argparse
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path

import torch

from utils.folders import write_json, write_text
from utils.processes import run_logged, spread, visible_gpus
from utils.scenes import CATEGORIES
from utils.utils import get_logger, run_script

log = get_logger("recipes")
PLAIN = (
    "--lora_r 0 --learning_rate 5e-4 --clip_learning_rate 5e-4 --ema_decay 0 --early_share 0.25 --loss_power 1 "
    "--freeze_codes 0 --feature_loss 0"
).split()
EARLY, VERY_EARLY = ["--early_share", "0.9"], ["--early_share", "0.97"]
DEFAULTS = "frozen10_80_tenth"  # the recipe that train.py follows unless it is told otherwise
ONESHOT = "ONESHOT"  # stands for the folder of run.py's calibrated one-shot


def at(rate: str) -> list[str]:
    """Weights and step sizes at this learning rate."""
    return ["--learning_rate", rate, "--clip_learning_rate", rate]


def frozen(early: int, power: str, share: int, features: str = "0") -> tuple[str, list[str]]:
    """A recipe in which the codes stay for the last `share` % of the steps."""
    name = f"full weights, lr 5e-4, {early} % early, error^{power}, codes frozen for the last {share} %"
    flags = ["--early_share", str(early / 100), "--loss_power", power, "--freeze_codes", str(share / 100)]
    if features != "0":
        name += f", blocks' outputs × {features}"
    return name, [*PLAIN, *flags, "--feature_loss", features]


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
    "frozen10_80": frozen(80, "0.25", 10),
    "frozen10_70": frozen(70, "0.25", 10),
    "frozen10_80_tenth": frozen(80, "0.1", 10),
    "features": frozen(97, "0.25", 10, features="2"),
    "fast": ("full weights, lr 1e-3, 97 % early", [*PLAIN, *VERY_EARLY, *at("1e-3")]),
    "slow": ("full weights, lr 2.5e-4, 90 % early", [*PLAIN, *EARLY, *at("2.5e-4")]),
    "calibrated": (
        "full weights from the calibrated one-shot, lr 2.5e-4, 90 % early",
        [*PLAIN, *EARLY, *at("2.5e-4"), "--start_from", ONESHOT],
    ),
    "lora": (
        "LoRA r 32 inside, scaling 1, lr 5e-4, 97 % early",
        [*PLAIN, *VERY_EARLY, *"--lora_r 32 --lora_alpha 32".split()],
    ),
}


def call(folder: Path, args: argparse.Namespace, environment: Mapping[str, str], *flags, ranks: int = 1) -> None:
    """Run train.py with the shared flags and `flags`, its output in folder/log.txt; ValueError if it fails."""
    shared = {
        "input_model_filename": args.model,
        "local_dir": args.output.absolute(),
        "output_dir": folder.absolute(),
        "output_model_filename": folder.name,
        "w_bits": args.w_bits,
        "max_steps": args.max_steps,
        "per_device_train_batch_size": args.batch_size,
        "per_device_eval_batch_size": args.eval_batch_size,
        "num_train_prompts": args.num_train_prompts,
        "num_images": 12,
        "num_final_images": args.num_final_images,
        "eval_steps": max(1, args.max_steps // 4),
        "save_steps": args.max_steps,
        "save_total_limit": 1,
        "disable_tqdm": True,
        "pack": True,
        "torch_compile": torch.cuda.is_available(),
    }
    if torch.cuda.is_available():
        processes = args.parallel * len(visible_gpus())
        shared["dataloader_num_workers"] = max(1, min(8, (os.cpu_count() or 1) // processes))
    words = [word for name, value in shared.items() for word in (f"--{name}", value)]
    flags = [args.output.absolute() / "oneshot" if flag == ONESHOT else flag for flag in flags]
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
    run_logged([*launch, "train.py", *words, *flags, *args.flags], folder / "log.txt", environment)


def make_oneshot(environment: Mapping[str, str], args: argparse.Namespace) -> None:
    """What the recipes with --start_from start from, in OUTPUT/oneshot."""
    folder = args.output.absolute() / "oneshot"
    if not folder.exists():
        flags = ["--model_id", args.model, "--output_path", folder, "--w_bits", args.w_bits, "--num_images", 0]
        run_logged(["run.py", *flags], args.output / "oneshot.txt", environment)


def train(name: str, environment: Mapping[str, str], args: argparse.Namespace) -> dict:
    """The summary of train.py with one recipe."""
    started, summary = time.time(), args.output / name / "summary.json"
    if not summary.exists():
        call(args.output / name, args, environment, *RECIPES[name][1])
        log.info("%s: done in %.0f s", name, time.time() - started)
    return json.loads(summary.read_text())


def table(results: dict[str, dict]) -> str:
    """Markdown: a line for each recipe."""
    columns = ["NMSE", "scene score", "of teacher", *CATEGORIES, "PSNR dB", "s a step"]
    lines = [f"| recipe | {' | '.join(columns)} |", "|" + " --- |" * (len(columns) + 1)]
    for name, result in results.items():
        final = result["final"]
        score, teacher = final["eval_scene_score"], final["eval_scene_score_teacher"]
        cells = [f"{final['eval_nmse']:.5f}", f"{score:.3f}", f"{score / teacher:.1%}"]
        cells += [f"{final.get(f'eval_scene_{category}', float('nan')):.3f}" for category in CATEGORIES]
        cells += [f"{final['eval_psnr']:.1f}", f"{result['seconds_per_step']:.3f}"]
        lines.append(f"| {RECIPES[name][0]} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("output/recipes"))
    parser.add_argument("--model", default="assets/tiny-flux", help="the teacher")
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES), metavar="NAME",
                        help=f"default: all of {', '.join(RECIPES)}; train.py's own: {DEFAULTS}")  # fmt: skip
    parser.add_argument("--parallel", type=int, default=1, help="recipes trained at a time on each GPU")
    parser.add_argument("--w_bits", type=int, default=0)
    parser.add_argument("--max_steps", type=int, default=6000)
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
    if any(ONESHOT in RECIPES[name][1] for name in args.recipes):
        log.info("quantizing the model to start from")
        spread(lambda _, environment: make_oneshot(environment, args), [None], 1)
    summaries = spread(lambda name, environment: train(name, environment, args), args.recipes, args.parallel)
    results = dict(zip(args.recipes, summaries, strict=True))
    figures = {"parallel": args.parallel, "recipes": results}
    write_json(args.output / "recipes.json", figures)
    write_text(args.output / "recipes.md", table(results))
    print(table(results))


if __name__ == "__main__":
    run_script(main)
