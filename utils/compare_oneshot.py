"""Every one-shot method at every bit width, on the same prompts, in one table.

    python -m utils.compare_oneshot --output output/oneshot_table                     # 1,200 prompts: one GPU
    python -m utils.compare_oneshot --parallel 4                                      # four cells at a time on each GPU
    python -m utils.compare_oneshot --w_bits 0 --methods calibrated --ablate          # what each ingredient gives

Each cell is a run.py and a test.py. It writes OUTPUT/METHOD_BITS/, OUTPUT/oneshot.json with every figure and the
table, OUTPUT/oneshot.md. What an interrupted call has finished is not done again.
"""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path

from utils.oneshot import INGREDIENTS, METHODS
from utils.processes import run_logged, spread
from utils.scenes import CATEGORIES
from utils.utils import get_logger, run_script

log = get_logger("oneshot")


def cell(what: tuple[str, int, str | None], environment: Mapping[str, str], args: argparse.Namespace) -> dict:
    """The figures of run.py and test.py for (method, bit width, ingredient to leave out or None)."""
    method, w_bits, without = what
    name = f"{method}_{w_bits}" + (f"_without_{without}" if without else "")
    folder = args.output / name
    figures = folder / "test" / "metrics.json"
    if not figures.exists():
        log.info("%s", name)
        pipeline = folder / "pipeline"
        flags = ["--model_id", args.model, "--output_path", pipeline.absolute(), "--num_images", 0]
        flags += ["--calibration_prompts", args.calibration_prompts, "--batch_size", args.batch_size]
        if not pipeline.exists():
            flags += ["--without", without] if without else []
            run_logged(["run.py", *flags, "--method", method, "--w_bits", w_bits], folder / "log.txt", environment)
        flags = ["--model", args.model, "--num_images", args.num_images, "--batch_size", args.batch_size]
        flags += ["--output_dir", (folder / "test").absolute()]
        run_logged(["test.py", pipeline.absolute(), w_bits, *flags], folder / "log.txt", environment)
    return json.loads(figures.read_text()) | {"run": json.loads((folder / "pipeline/metrics.json").read_text())}


def table(results: list[dict]) -> str:
    """Markdown: a line for each cell."""
    columns = ["bits", "NMSE", "PSNR dB", "scene score", "of teacher", *CATEGORIES, "MB", "seconds"]
    lines = [f"| method | {' | '.join(columns)} |", "|" + " --- |" * (len(columns) + 1)]
    for result in results:
        score, teacher = result["scene_score"], result["scene_score_teacher"]["mean"]
        without = "".join(f" without {ingredient}" for ingredient in result["run"]["without"])
        cells = [result["run"]["method"] + without, "1.58" if result["w_bits"] == 0 else str(result["w_bits"])]
        cells += [f"{result['nmse']:.4f}", f"{result['psnr']:.1f}"]
        cells += [f"{score['mean']:.3f}", f"{score['mean'] / teacher:.1%}"]
        cells += [f"{score.get(category, float('nan')):.3f}" for category in CATEGORIES]
        cells += [f"{result['disk_bytes'] / 1e6:.1f}", f"{result['run']['seconds']:.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("output/oneshot_table"))
    parser.add_argument("--model", default="assets/tiny-flux", help="the teacher")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD")
    parser.add_argument("--w_bits", nargs="+", type=int, default=[8, 4, 3, 2, 1, 0])
    parser.add_argument("--ablate", action="store_true", help="at 1.58 bits also leave out each of the ingredients")
    parser.add_argument("--num_images", type=int, default=1200)
    parser.add_argument("--calibration_prompts", type=int, default=64)
    parser.add_argument("--parallel", type=int, default=1, help="cells measured at a time on each GPU")
    parser.add_argument("--batch_size", type=int, default=120, help="pictures drawn at a time")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    cells: list[tuple[str, int, str | None]] = []
    for w_bits in args.w_bits:
        for method in args.methods:
            if method == "threshold" and w_bits:  # a ternary rule
                continue
            cells.append((method, w_bits, None))
            if args.ablate and method == "calibrated" and w_bits == 0:
                cells += [(method, w_bits, ingredient) for ingredient in INGREDIENTS]
    results = spread(lambda what, environment: cell(what, environment, args), cells, args.parallel)
    (args.output / "oneshot.json").write_text(json.dumps(results, indent=2) + "\n")
    (args.output / "oneshot.md").write_text(table(results))
    print(table(results))


if __name__ == "__main__":
    run_script(main)
