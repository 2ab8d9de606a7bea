"""Every one-shot method at every bit width, on the same prompts, in one table.

    python -m utils.compare_oneshot --output output/oneshot_table                     # 1,200 prompts: one GPU
    python -m utils.compare_oneshot --parallel 4                                      # four cells at a time on each GPU
    python -m utils.compare_oneshot --w_bits 0 --methods calibrated --ablate          # what each ingredient gives
    python -m utils.compare_oneshot --w_bits 0 --methods --recipes alone velocity     # ways to train block by block

Each cell is a run.py and a test.py. It writes OUTPUT/METHOD_BITS/, OUTPUT/oneshot.json with every figure and the
table, OUTPUT/oneshot.md. What an interrupted call has finished is not done again.
"""

import utils.interrupt  # noqa: F401 (Ctrl-C is a line from here on)

import argparse
from collections.abc import Mapping
from pathlib import Path

from utils.folders import write_json, write_text
from utils.oneshot import INGREDIENTS, METHODS
from utils.processes import quantize_and_judge, spread
from utils.scenes import CATEGORIES
from utils.utils import ArgumentParser, get_logger, run_script

log = get_logger("oneshot")


def recipe(
    what: str, steps: int = 1000, power: str = "0.5", start: str = "mse", **more
) -> tuple[str, list[str]]:  # fmt: skip
    """A way to train block by block; `more` flags without their "block_"."""
    words = {"steps": steps, "loss_power": power, "start": start} | more
    flags = {name if name == "lookahead" else f"block_{name}": value for name, value in words.items()}
    return what, [str(word) for name, value in flags.items() for word in (f"--{name}", value) if word is not True]


RECIPES = {  # name: (what it is, flags of run.py)
    "alone": recipe("1,000 steps, no look ahead", lookahead=0),
    "next2": recipe("1,000 steps, 2 blocks ahead", lookahead=2),
    "next2_local": recipe("1,000 steps, 2 blocks ahead and the block's own outputs", lookahead=2, local_loss=1),
    "next2_weighted": recipe("1,000 steps, 2 blocks ahead, channels weighted", lookahead=2, weigh_channels=True),
    "alone_weighted": recipe("1,000 steps, no look ahead, channels weighted", lookahead=0, weigh_channels=True),
    "next4": recipe("1,000 steps, 4 blocks ahead", lookahead=4),
    "velocity": recipe("1,000 steps, to the velocity"),
    "velocity_local": recipe("1,000 steps, to the velocity, and the block's own outputs", local_loss=0.3),
    "velocity_quarter": recipe("1,000 steps, to the velocity, error^¼", power="0.25"),
    "velocity_tenth": recipe("1,000 steps, to the velocity, error^⅒", power="0.1"),
    "velocity_thawed": recipe("1,000 steps, to the velocity, codes free to the end", freeze_codes=0),
    "velocity_calibrated": recipe("1,000 steps, to the velocity, from calibrated codes", start="calibrated"),
    "velocity_twice": recipe("two rounds of 500 steps, to the velocity", 500, rounds=2),
    "velocity_300": recipe("300 steps, to the velocity", 300),
    "velocity_3000": recipe("3,000 steps, to the velocity", 3000),
    "velocity_slow": recipe("1,000 steps, to the velocity, rate 2.5e-4", learning_rate="2.5e-4"),
    "velocity_fast": recipe("1,000 steps, to the velocity, rate 1e-3", learning_rate="1e-3"),
}


def cell(what: tuple[str, int, list[str]], environment: Mapping[str, str], args: argparse.Namespace) -> dict:
    """The figures of run.py and test.py for (name, bit width, flags of run.py)."""
    name, w_bits, own = what
    log.info("%s", name)
    sizes = {"w_bits": w_bits, "num_images": args.num_images, "batch_size": args.batch_size}
    found = quantize_and_judge(args.output / name, args.model, [*own, *args.flags], environment, **sizes)
    return found | {"name": name}


def describe(result: dict) -> str:
    """What a line of the table is about."""
    recipe = RECIPES.get(result["name"].rpartition("_")[0])
    without = "".join(f" without {ingredient}" for ingredient in result["run"]["without"])
    return f"block-wise: {recipe[0]}" if recipe else result["run"]["method"] + without


def table(results: list[dict]) -> str:
    """Markdown: a line for each cell."""
    columns = ["bits", "NMSE", "PSNR dB", "scene score", "of teacher", *CATEGORIES, "MB", "seconds"]
    lines = [f"| method | {' | '.join(columns)} |", "|" + " --- |" * (len(columns) + 1)]
    for result in results:
        score, teacher = result["scene_score"], result["scene_score_teacher"]["mean"]
        cells = [describe(result), "1.58" if result["w_bits"] == 0 else str(result["w_bits"])]
        cells += [f"{result['nmse']:.4f}", f"{result['psnr']:.1f}"]
        cells += [f"{score['mean']:.3f}", f"{score['mean'] / teacher:.1%}"]
        cells += [f"{score.get(category, float('nan')):.3f}" for category in CATEGORIES]
        cells += [f"{result['disk_bytes'] / 1e6:.1f}", f"{result['run']['seconds']:.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def parse_args() -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("output/oneshot_table"))
    parser.add_argument("--model", default="assets/tiny-flux", help="the teacher")
    parser.add_argument("--methods", nargs="*", choices=METHODS, default=list(METHODS), metavar="METHOD")
    parser.add_argument("--recipes", nargs="*", choices=RECIPES, default=[], metavar="NAME",
                        help=f"ways to train block by block: {', '.join(RECIPES)}")  # fmt: skip
    parser.add_argument("--w_bits", nargs="+", type=int, default=[8, 4, 3, 2, 1, 0])
    parser.add_argument("--ablate", action="store_true", help="at 1.58 bits also leave out each of the ingredients")
    parser.add_argument("--num_images", type=int, default=1200)
    parser.add_argument("--calibration_prompts", type=int, default=64)
    parser.add_argument("--parallel", type=int, default=1, help="cells measured at a time on each GPU")
    parser.add_argument("--batch_size", type=int, default=120, help="pictures drawn at a time")
    parser.add_argument("--flags", nargs=argparse.REMAINDER, default=[], help="further flags of run.py, last")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    prompts = ["--calibration_prompts", str(args.calibration_prompts)]
    cells: list[tuple[str, int, list[str]]] = []
    for w_bits in args.w_bits:
        for method in args.methods:
            if method == "threshold" and w_bits:  # a ternary rule
                continue
            flags = ["--method", method, *prompts]
            cells.append((f"{method}_{w_bits}", w_bits, flags))
            if args.ablate and method == "calibrated" and w_bits == 0:
                cells += [(f"{method}_{w_bits}_without_{i}", w_bits, [*flags, "--without", i]) for i in INGREDIENTS]
        cells += [(f"{name}_{w_bits}", w_bits, ["--method", "blockwise", *RECIPES[name][1]]) for name in args.recipes]
    results = spread(lambda what, environment: cell(what, environment, args), cells, args.parallel)
    write_json(args.output / "oneshot.json", results)
    write_text(args.output / "oneshot.md", table(results))
    print(table(results))


if __name__ == "__main__":
    run_script(main)
