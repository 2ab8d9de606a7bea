"""What finer step sizes give without training, at how many bits a weight; which method survives heavy-tailed weights.

    python -m utils.compare_scales                                          # tiny-flux, on two cores: 20 minutes
    python -m utils.compare_scales --model output/tiny-flux-1024 --output output/scales-1024 --calibration_prompts 128
    python -m utils.make_random_flux --output output/small --config small --whole
    python -m utils.compare_scales --model output/small --output output/heavy --groups --columns \\
        --methods threshold mse calibrated blockwise                        # random weights with heavy tails

A row of a weight W [out, in] shares one step size α. Compared with that, at 1.58 bits:

    groups of G   one α for every G inputs of a row
    power         also one scale s for every input, Wx = (W diag(s)) (x/s): W diag(s) is rounded, and x/s comes from
                  whatever makes x, before it is rounded. s = rms(x)^p / rms(w)^q of an input's x and column w, with
                  the p of X_POWERS (AWQ, arXiv 2306.00978, there of mean |x|) and the q of W_POWERS that keep the
                  outputs best when weights are rounded by themselves; one s for all layers of the same input
    fitted        from there, 1/s by least squares on the layers' outputs: for `mse` once, the codes as they are; for
                  `calibrated` in turns with codes and step sizes

Each is rounded by `mse` (every weight by itself) or `calibrated` (utils/oneshot.py, by the same steps). Weights are
simulated: the levels, multiplied out, in diffusers' own transformer. Only weights are rounded, no activations.

Bits a weight: codes as on disk, 5 trits a byte, plus their scales at 16 bits each; at 32, as checkpoints have them,
beside it. Column scales are counted for every layer, though layers of the same input share theirs.

    RULE   finer scales earn their bytes where the velocity's NMSE is at most GAIN of what the same bits buy without
           them: that of a step size a row, on the line of log NMSE over bits from 1.58 to 2 bits (some layers at 2).
           They become an option where the best method's do; `mse` with column scales needs the prompts that
           `calibrated` needs, and counts for as little as `mse` where that is better with plain rows

Errors are of held-out prompts at the teacher's states, every so-manieth denoising step: ‖y − y_teacher‖²/‖y_teacher‖²
of the velocity and, behind each block of the quantized transformer, of all its tokens. There a few channels may hold
all the energy: "median channel" is the error over the variance, of the median channel.

It writes OUTPUT/scales.json after every cell, and goes on from it; OUTPUT/scales.png.
"""

import utils.interrupt  # noqa: F401 (Ctrl-C is a line from here on)

import argparse
import copy
import itertools
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import diffusers
import matplotlib
import torch
from torch import Tensor, nn

from models.families import transformer_class
from models.packing import disk_row_bytes
from models.utils_quant import ALPHA_FLOOR, init_clip_val, quantize_codes
from utils.blockwise import Settings, train_block
from utils.folders import locked, read_json, scratch_folder, write_json
from utils.oneshot import METHODS, SWEEPS, Statistics, Uncalibratable, best_target, collect, threshold_codes
from utils.pipelines import sampling_settings
from utils.prompts import pick_prompts
from utils.rates import default_rate
from utils.rounding import BLOCK, round_block, to_values
from utils.sampling import load_pipeline, native_size
from utils.utils import (
    DTYPES,
    ArgumentParser,
    check_counts,
    check_resolution,
    check_seed,
    device_name,
    from_root,
    get_logger,
    memory_named,
    pick_device,
    run_script,
)
from utils.walk import (
    CALIBRATION_SEED,
    CALL_TOKENS,
    CPU,
    USED_STEPS,
    Block,
    Work,
    block_names,
    record_calls,
    split_calls,
    stage_names,
    stored_tensors,
    student_parameters,
    walk,
)

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402 (the backend is to be chosen first)

log = get_logger("scales")
COLUMNS = ("power", "fitted")
X_POWERS, W_POWERS = (0.0, -0.25, 0.25, 0.5, 1.0), (0, 1)
LEAST_RMS = 0.1  # of the mean one: of a channel that hardly fires on the calibration prompts, which may on others
LEAST_SCALE = 0.05  # fitted in a round: codes are found for weights divided by it
RIDGE = 1e-3  # of the mean diagonal of the fitted scales' equations, towards scales of 1
THRESHOLD = 0.05  # run.py's --threshold_ratio
GAIN = 0.8  # less is not worth another format of checkpoints and other kernels
REFERENCE_BITS = 2
SETTINGS = (
    "model", "calibration_prompts", "num_prompts", "steps", "stride", "guidance_scale", "resolution", "seed", "dtype",
    "block_steps", "block_batch_size", "block_learning_rate",
)  # fmt: skip


@dataclass(frozen=True)
class Scheme:
    """A way to quantize all linears of the blocks; `group`: inputs that share an α, 0: a row; `columns`: one of COLUMNS
    or none."""

    method: str
    w_bits: int = 0
    group: int = 0
    columns: str = ""

    @property
    def name(self) -> str:
        finer = f"groups of {self.group}" if self.group else f"rows, columns {self.columns}" if self.columns else "rows"
        return f"{self.method}, {finer}" + (f", {self.w_bits} bits" if self.w_bits else "")


def schemes(methods: list[str], groups: list[int], columns: list[str]) -> list[Scheme]:
    """All cells. Methods that look for step sizes of their own, threshold and blockwise, have rows alone."""
    found = []
    for method in methods:
        found.append(Scheme(method))
        if method in ("mse", "calibrated") and (groups or columns):
            found += [Scheme(method, group=group) for group in groups]
            found += [Scheme(method, columns=kind) for kind in columns]
            found.append(Scheme(method, REFERENCE_BITS))
    return found


def bits_a_weight(shapes: list[tuple[int, int]], scheme: Scheme, scale_bits: int) -> float:
    """Of weights of these shapes (out, in), with scales of `scale_bits`."""
    total = 0
    for out, inputs in shapes:
        scales = out * (inputs // min(scheme.group or inputs, inputs)) + (inputs if scheme.columns else 0)
        total += out * 8 * disk_row_bytes(inputs, scheme.w_bits) + scales * scale_bits
    return total / sum(out * inputs for out, inputs in shapes)


# ----------------------------------------------------------------------------------------------------- finer step sizes
#
# Step sizes alpha [out, in/G]: of a row, each belongs to G inputs that lie together.


def step_sizes(weight: Tensor, w_bits: int, group: int) -> Tensor:
    """The error-minimal ones [out, in/group] of a weight [out, in]."""
    return init_clip_val(weight.reshape(-1, group), w_bits).view(len(weight), -1)


def nearest(weight: Tensor, alpha: Tensor, w_bits: int) -> Tensor:
    """The levels [out, in] closest to a weight [out, in]."""
    rows, steps = weight.reshape(alpha.numel(), -1), alpha.reshape(-1, 1)
    return to_values(quantize_codes(rows, steps, w_bits), steps, w_bits).view_as(weight)


def sweep(target: Tensor, base: Tensor, alpha: Tensor, w_bits: int, matrix: Tensor) -> Tensor:
    """Levels [out, in] by one pass over the columns, as in utils/rounding.py: `gptq` where base is the target and
    matrix R [in, in], `descend` where base holds levels and matrix is H."""
    size = target.shape[1] // alpha.shape[1]
    errors, found = target - base, torch.empty_like(target)
    for start in (start for first in range(0, target.shape[1], size) for start in range(first, first + size, BLOCK)):
        number = start // size
        here, own = slice(start, min(start + BLOCK, (number + 1) * size)), alpha[:, number : number + 1]
        found[:, here] = round_block(base[:, here], errors @ matrix[:, here], own, matrix[here, here], w_bits)
        errors[:, here] = target[:, here] - found[:, here]
    return found


def fit_alpha(target: Tensor, quantized: Tensor, alpha: Tensor, hessian: Tensor) -> tuple[Tensor, Tensor]:
    """New step sizes and the same codes at them: group after group the α that minimizes tr((target − Q) H (target −
    Q)ᵀ), the others as they are."""
    size, errors = target.shape[1] // alpha.shape[1], target - quantized
    fitted, found = alpha.clone(), quantized.clone()
    for number in range(alpha.shape[1]):
        here, own = slice(number * size, (number + 1) * size), alpha[:, number : number + 1]
        levels = quantized[:, here] / own
        norm = ((levels @ hessian[here, here]) * levels).sum(1, keepdim=True).clamp(min=1e-12)
        step = own + ((errors @ hessian[:, here]) * levels).sum(1, keepdim=True) / norm
        step = torch.where(step > ALPHA_FLOOR, step, own)
        fitted[:, number : number + 1], found[:, here] = step, levels * step
        errors[:, here] = target[:, here] - found[:, here]
    return fitted, found


def column_order(energies: Tensor, group: int) -> Tensor:
    """The columns in the order in which they are rounded: those of most energy [in] first, but groups in one piece."""
    grouped = energies.view(-1, group)
    within = grouped.argsort(1, descending=True) + torch.arange(len(grouped), device=energies.device)[:, None] * group
    return within[grouped.sum(1).argsort(descending=True)].flatten()


def calibrated(weight: Tensor, hessian: Tensor, cross: Tensor, w_bits: int, group: int, fitted: bool = False) -> Tensor:
    """What a weight [out, in] becomes by the first four steps of utils/oneshot.py with an α for every group; `fitted`:
    with a scale for every column, too. Raises Uncalibratable."""
    order = column_order(hessian.diagonal(), group)
    hessian, cross = hessian[order][:, order], cross[order][:, order]
    target, factor = best_target(weight[:, order], hessian, cross)
    alpha, columns = step_sizes(target, w_bits, group), torch.ones_like(target[0])
    quantized = sweep(target, target, alpha, w_bits, factor)
    for number in range(SWEEPS + 1):
        alpha, quantized = fit_alpha(target, quantized, alpha, hessian)
        if fitted:  # Q diag(u) for the target is Q for the target over u
            found = fit_columns(target, quantized, hessian)
            found = torch.where(found.abs() < LEAST_SCALE, LEAST_SCALE, found)
            target, hessian = target / found, hessian * found * found.unsqueeze(1)
            columns *= found
        if number < SWEEPS:
            quantized = sweep(target, quantized, alpha, w_bits, hessian)
    return (quantized * columns)[:, order.argsort()]


# -------------------------------------------------------------------------------------------------------- column scales


def power_scales(weight: Tensor, hessian: Tensor, w_bits: int) -> Tensor:
    """s [in] for a weight [out, in] whose inputs have the second moment H [in, in]; geometric mean 1."""
    inputs, columns = (
        rms.clamp(min=max(LEAST_RMS * rms.mean().item(), torch.finfo(rms.dtype).tiny))
        for rms in (hessian.diagonal().clamp(min=0).sqrt(), weight.square().mean(0).sqrt())
    )
    best, least = torch.ones_like(inputs), float("inf")
    for p, q in itertools.product(X_POWERS, W_POWERS):
        logs = p * inputs.log() - q * columns.log()
        scales = (logs - logs.mean()).exp()
        scaled = weight * scales
        lost = weight - nearest(scaled, step_sizes(scaled, w_bits, weight.shape[1]), w_bits) / scales
        error = ((lost @ hessian) * lost).sum().item()
        if error < least:
            best, least = scales, error
    return best


def fit_columns(target: Tensor, quantized: Tensor, hessian: Tensor) -> Tensor:
    """u [in] that minimizes, but for RIDGE, tr((target − Q diag(u)) H (target − Q diag(u))ᵀ).

    That is, ((QᵀQ) ∘ H) u = diag(Qᵀ target H).
    """
    matrix = (quantized.T @ quantized).mul_(hessian)
    wanted = (quantized * (target @ hessian)).sum(0)
    ridge = RIDGE * matrix.diagonal().mean()
    matrix.diagonal().add_(ridge)
    return torch.linalg.solve(matrix, wanted + ridge)


def second_moment(statistics: Statistics) -> Tensor:
    """H [in, in] of the student's inputs, about zero."""
    return (statistics.square / statistics.weight).addr_(statistics.mean, statistics.mean)


def scale_inputs(statistics: Statistics, scales: Tensor) -> None:
    """Make `statistics` those of x/s, in place."""
    for mean in (statistics.mean, statistics.teacher_mean):
        mean.div_(scales)
    for moment in (statistics.square, statistics.cross):
        moment.div_(scales).div_(scales.unsqueeze(1))


# --------------------------------------------------------------------------------------------------- layers and blocks


def round_matrix(
    weight: Tensor, statistics: Statistics | None, scheme: Scheme, has_bias: bool
) -> tuple[Tensor, Tensor | None]:
    """What a weight [out, in] becomes, in fp32, and what is to be added to the bias [out], if anything.

    The statistics are used up; mse and threshold need none but for column scales. Raises Uncalibratable.
    """
    group, w_bits = min(scheme.group or weight.shape[1], weight.shape[1]), scheme.w_bits
    if scheme.method == "threshold":
        return to_values(*threshold_codes(weight, THRESHOLD), w_bits), None
    if statistics is None:
        return nearest(weight, step_sizes(weight, w_bits, group), w_bits), None
    if not (statistics.mean.isfinite().all() and statistics.square.diagonal().isfinite().all()):
        raise Uncalibratable("its inputs' moments are not finite")
    centred, scales = scheme.method == "calibrated" and has_bias, torch.ones_like(weight[0])
    if scheme.columns:
        scales = power_scales(weight, second_moment(statistics), w_bits)
        scale_inputs(statistics, scales)
    weight = weight * scales
    mean, teacher_mean, hessian, cross = statistics.moments(centred)
    if scheme.method == "calibrated":
        quantized = calibrated(weight, hessian, cross, w_bits, group, scheme.columns == "fitted")
    else:
        quantized = nearest(weight, step_sizes(weight, w_bits, group), w_bits)
        if scheme.columns == "fitted":
            quantized = quantized * fit_columns(weight, quantized, hessian)
    shift = weight @ teacher_mean - quantized @ mean if centred else None
    return quantized / scales, shift


def round_block_of(block: Block, scheme: Scheme, weights: list[float]) -> dict[str, Tensor]:
    """All parameters of the quantized block under their full names, dense; its notes: who "fell_back" to mse."""
    linears = {name: layer for name, layer in block.module.named_modules() if isinstance(layer, nn.Linear)}
    dense = {f"{block.name}.{name}": parameter for name, parameter in block.module.named_parameters()}
    finished: dict[str, Tensor] = {}
    block.notes["fell_back"] = {}
    for group in block.order:
        names = [name for name in linears if name in group]
        if not names:
            continue
        looks = scheme.method == "calibrated" or scheme.columns
        found = collect(block, names, finished, weights) if looks else [([name], None) for name in names]
        while found:
            together, statistics = found.pop(0)
            layers = [linears[name] for name in together]
            weight = torch.cat([layer.weight for layer in layers]).float()
            try:
                made, shift = round_matrix(weight, statistics, scheme, layers[0].bias is not None)
            except Uncalibratable as problem:
                block.notes["fell_back"] |= {f"{block.name}.{name}": str(problem) for name in together}
                made, shift = round_matrix(weight, None, Scheme("mse", scheme.w_bits, scheme.group), False)
            shift = torch.zeros_like(made[:, 0]) if shift is None else shift
            rows = [layer.out_features for layer in layers]
            for name, layer, part, move in zip(together, layers, made.split(rows), shift.split(rows), strict=True):
                finished[f"{name}.weight"] = part.to(layer.weight.dtype)
                if layer.bias is not None:
                    finished[f"{name}.bias"] = (layer.bias.float() + move).to(layer.bias.dtype)
    return dense | {f"{block.name}.{name}": value for name, value in finished.items()}


def trained_block(block: Block, transformer: nn.Module, settings: Settings) -> dict[str, Tensor]:
    """As round_block_of for --method blockwise of run.py."""
    stored = train_block(block, transformer, settings)
    return {f"{block.name}.{n}": value for n, value in student_parameters(block, stored, settings.w_bits).items()}


# --------------------------------------------------------------------------------------------------------- the figures


class Errors:
    """Of outputs [..., C], summed up call after call."""

    def __init__(self):
        self.origin: Tensor | None = None

    def add(self, found: Tensor, target: Tensor) -> None:
        found, target = (tensor.flatten(0, -2).float() for tensor in (found, target))
        if self.origin is None:  # near the mean, so that nothing cancels
            self.origin = target.mean(0)
            self.error, self.energy, self.first, self.second = torch.zeros(4, target.shape[1], dtype=torch.float64)
            self.count = 0
        apart = target - self.origin
        for total, values in (
            (self.error, (found - target).square()), (self.energy, target.square()), (self.first, apart),
            (self.second, apart.square()),
        ):  # fmt: skip
            total += values.sum(0).cpu().double()
        self.count += len(target)

    def figures(self) -> dict[str, float]:
        """nmse: squared error over energy; median_channel: over a channel's variance, of the median channel."""
        spread = self.second - self.first.square() / self.count
        median = (self.error / spread).nanmedian()
        return {"nmse": (self.error.sum() / self.energy.sum()).item(), "median_channel": median.item()}


@torch.no_grad()
def output_errors(
    teacher: nn.Module, student: nn.Module, calls: list[dict], device: torch.device
) -> dict[str, dict[str, float]]:
    """Errors.figures of the student's "velocity" and of what comes out of each of its blocks, by the blocks' names."""
    names = block_names(teacher)
    errors, seen = {name: Errors() for name in (*names, "velocity")}, {}

    def see(module, args, output, name):
        seen[name] = torch.cat(output, 1) if isinstance(output, tuple) else output

    hooks = []
    for model in (teacher, student):
        model.to(device)
        hooks += [model.get_submodule(n).register_forward_hook(partial(see, name=n)) for n in names]
    try:
        for call in calls:
            inputs = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in call.items()}
            outputs = []
            for model in (teacher, student):
                velocity = model(**inputs)[0]
                outputs.append(seen | {"velocity": velocity})
            for name, kept in errors.items():
                kept.add(outputs[1][name], outputs[0][name])
    finally:
        for hook in hooks:
            hook.remove()
        for model in (teacher, student):
            model.to(CPU)
    return {name: kept.figures() for name, kept in errors.items()}


def measure(
    scheme: Scheme, teacher: nn.Module, calls: list[dict], held_out: list[dict], args: argparse.Namespace
) -> dict:
    """The figures of a cell: quantize along the calibration calls, compare on the held-out ones."""
    started, transformer = time.time(), copy.deepcopy(teacher)
    weights = [call["weight"] for call in calls]
    inputs = [{name: value for name, value in call.items() if name != "weight"} for call in calls]
    if scheme.method == "blockwise":
        settings = Settings(
            w_bits=scheme.w_bits, start="calibrated", steps=args.block_steps, batch_size=args.block_batch_size,
            micro_batch_size=args.block_micro_batch_size or args.block_batch_size,
            learning_rate=args.block_learning_rate or default_rate(transformer.inner_dim, "weights"), seed=args.seed,
        )  # fmt: skip
        treat = partial(trained_block, transformer=transformer, settings=settings)
    else:
        treat = partial(round_block_of, scheme=scheme, weights=weights)
    with scratch_folder(args.output) as folder:
        work = Work(folder / "blocks", asdict(scheme))
        walk(transformer, inputs, scheme.w_bits, treat, work, args.device)
        student = copy.deepcopy(teacher)
        student.load_state_dict(dict(stored_tensors(transformer, work)))
        fell_back = {}
        for name in stage_names(teacher):
            fell_back |= work.notes(name).get("fell_back", {})
    seconds, outputs = round(time.time() - started, 1), output_errors(teacher, student, held_out, args.device)
    own, made = (transformer_class(teacher).family.linears(model) for model in (teacher, student))
    lost = sum((made[n].weight.float() - own[n].weight.float()).square().sum().item() for n in own)
    shapes = [(layer.out_features, layer.in_features) for layer in own.values()]
    return asdict(scheme) | {
        "bits_16": bits_a_weight(shapes, scheme, 16), "bits_32": bits_a_weight(shapes, scheme, 32),
        "weight_error": lost / sum(layer.weight.float().square().sum().item() for layer in own.values()),
        "velocity_nmse": outputs["velocity"]["nmse"], "outputs": outputs, "fell_back": fell_back, "seconds": seconds,
    }  # fmt: skip


# --------------------------------------------------------------------------------------------------------- the verdict


def same_bits(cells: dict[str, dict], cell: dict) -> float | None:
    """The NMSE that the cell's bits buy with a step size a row (see RULE), or None where that was not measured."""
    ends = [cells.get(Scheme(cell["method"], bits).name) for bits in (0, REFERENCE_BITS)]
    if None in ends:
        return None
    low, high = ends
    share = (cell["bits_16"] - low["bits_16"]) / (high["bits_16"] - low["bits_16"])
    share = min(max(share, 0.0), 1.0)
    return low["velocity_nmse"] ** (1 - share) * high["velocity_nmse"] ** share


def judge(cells: dict[str, dict]) -> dict[str, dict]:
    """{cell with finer scales: the NMSE of the same bits, the cell's over that, whether it earns its bytes}."""
    found = {}
    for name, cell in cells.items():
        rows = same_bits(cells, cell)
        if rows is not None and (cell["group"] or cell["columns"]):
            ratio = cell["velocity_nmse"] / rows
            found[name] = {"same_bits": rows, "ratio": ratio, "earns": ratio <= GAIN}
    return found


def table(cells: dict[str, dict], verdict: dict[str, dict]) -> str:
    """Markdown: bits and errors of every cell, then the error behind each block."""
    lines = ["| weights | bits, 16-bit scales | 32-bit | weight error | velocity NMSE | ÷ same bits, rows | earns |"]
    lines.append("|" + " --- |" * 7)
    for name, cell in cells.items():
        figures = [f"{cell[key]:.3f}" for key in ("bits_16", "bits_32", "weight_error")]
        figures.append(f"{cell['velocity_nmse']:.4g}")
        judged = verdict.get(name)
        told = [f"{judged['ratio']:.2f}", "yes" if judged["earns"] else "no"] if judged else ["", ""]
        lines.append(f"| {' | '.join([name, *figures, *told])} |")
    places = list(next(iter(cells.values()))["outputs"])
    short = [place.replace("transformer_blocks", "double").replace("single_double", "single") for place in places]
    for title, key in (("NMSE", "nmse"), ("median channel", "median_channel")):
        lines += ["", f"| {title} behind | {' | '.join(short)} |", "|" + " --- |" * (len(short) + 1)]
        for name, cell in cells.items():
            figures = [f"{cell['outputs'][place][key]:.3g}" for place in places]
            lines.append(f"| {' | '.join([name, *figures])} |")
    return "\n".join(lines) + "\n"


def plot(cells: dict[str, dict], file: Path) -> None:
    """NMSE of the velocity over bits, and the error behind each block of those with rows."""
    figure, (over_bits, over_blocks) = pyplot.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    methods = list(dict.fromkeys(cell["method"] for cell in cells.values()))
    for name, cell in cells.items():
        color = f"C{methods.index(cell['method'])}"
        finer = f"g{cell['group']}" if cell["group"] else cell["columns"] or f"{cell['w_bits'] or 1.58} bits"
        kind = "group" if cell["group"] else "columns" if cell["columns"] else "rows"
        marker, offset, side = {
            "group": ("s", (4, 4), "left"), "columns": ("^", (6, -3), "left"), "rows": ("o", (0, -13), "right"),
        }[kind]  # fmt: skip
        place = (cell["bits_16"], cell["velocity_nmse"])
        over_bits.plot(*place, marker, color=color)
        over_bits.annotate(finer, place, offset, textcoords="offset points", ha=side, fontsize="small")
        if not cell["group"] and not cell["columns"]:
            error = [figures["median_channel"] for figures in cell["outputs"].values()]
            over_blocks.plot(error, "o--" if cell["w_bits"] else "o-", color=color, label=name)
    for method in methods:
        rows = [c for c in (cells.get(Scheme(method, bits).name) for bits in (0, REFERENCE_BITS)) if c]
        line = [[cell[key] for cell in rows] for key in ("bits_16", "velocity_nmse")]
        over_bits.plot(*line, "-", color=f"C{methods.index(method)}", linewidth=1, label=f"{method}, a row's α")
    over_bits.margins(x=0.12)
    over_bits.set(title="velocity NMSE", xlabel="bits a weight, scales at 16 bits", yscale="log")
    over_blocks.set(title="error of the median channel behind each block, last: velocity", xlabel="block", yscale="log")
    for axis in (over_bits, over_blocks):
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small")
    figure.savefig(file, dpi=110)
    pyplot.close(figure)


# ---------------------------------------------------------------------------------------------------------- the program


def check_groups(teacher: nn.Module, groups: list[int]) -> None:
    """ValueError, naming a layer, unless all rows can be cut into groups of these sizes."""
    for name, layer in transformer_class(teacher).family.linears(teacher).items():
        for group in groups:
            if layer.in_features > group and layer.in_features % group:
                raise ValueError(f"--groups {group}: {name} has {layer.in_features} inputs, no multiple of it")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="assets/tiny-flux", help="the teacher: a full-precision pipeline")
    parser.add_argument("--output", type=Path, default=Path("output/scales"))
    parser.add_argument("--methods", nargs="+", choices=(*METHODS, "blockwise"), default=["mse", "calibrated"],
                        metavar="METHOD", help="threshold and blockwise: a step size a row alone")  # fmt: skip
    parser.add_argument("--groups", nargs="*", type=int, default=[64, 128, 256], help="inputs that share a step size")
    parser.add_argument("--columns", nargs="*", choices=COLUMNS, default=list(COLUMNS), help="scales of the inputs")
    parser.add_argument("--calibration_prompts", type=int, default=32, help="training prompts")
    parser.add_argument("--num_prompts", type=int, default=32, help="held-out prompts to judge by")
    parser.add_argument("--num_inference_steps", dest="steps", type=int, help="default: the family's")
    parser.add_argument("--stride", type=int, help=f"take every so-manieth step; default: {USED_STEPS} of them")
    parser.add_argument("--guidance_scale", type=float, help="default: the family's")
    parser.add_argument("--resolution", type=int, help="pixels a side; default: what the autoencoder was made for")
    parser.add_argument("--batch_size", type=int, default=32, help="pictures drawn at a time")
    parser.add_argument("--block_steps", type=int, default=300, help="of each block, with blockwise")
    parser.add_argument("--block_batch_size", type=int, default=32)
    parser.add_argument("--block_micro_batch_size", type=int, help="on the device at a time; default: the batch")
    parser.add_argument("--block_learning_rate", type=float, help="default: by the transformer's width, as run.py's")
    parser.add_argument("--dtype", choices=DTYPES, help="default: bfloat16 on CUDA, else float32")
    parser.add_argument("--device", help="default: cuda if there, else mps, else cpu")
    parser.add_argument("--seed", type=int, default=42, help="of the held-out pictures' noise")
    args = parser.parse_args(argv)
    try:
        args.device = pick_device(args.device)
        check_counts(args, "calibration_prompts", "num_prompts", "steps", "stride", "batch_size", "block_steps")
        check_counts(args, "block_batch_size", "block_micro_batch_size")
        check_resolution(args.resolution)
        check_seed(args.seed)
        if args.block_learning_rate is not None and args.block_learning_rate <= 0:
            raise ValueError(f"--block_learning_rate must be above 0, got {args.block_learning_rate}")
        if any(group < 1 for group in args.groups):
            raise ValueError(f"--groups must be at least 1, got {min(args.groups)}")
    except ValueError as error:
        parser.error(str(error))
    args.dtype = args.dtype or ("bfloat16" if args.device.type == "cuda" else "float32")
    return args


def begin(args: argparse.Namespace) -> dict:
    """What is in OUTPUT/scales.json, or a new one; ValueError if it was measured with other settings."""
    file, settings = args.output / "scales.json", {name: getattr(args, name) for name in SETTINGS}
    if not file.exists():
        rule = f"finer scales earn their bytes at an NMSE of at most {GAIN} of that of the same bits with rows"
        versions = {"torch": torch.__version__, "diffusers": diffusers.__version__}
        return {"settings": settings, "device": device_name(args.device), **versions, "rule": rule, "cells": {}}
    data = read_json(file)
    for name, wanted in settings.items():
        if data["settings"].get(name) != wanted:
            found = data["settings"].get(name)
            raise ValueError(f"{file}: measured with {name}={found}, asked for {wanted}; take another --output")
    return data


def compare(args: argparse.Namespace) -> None:
    pipe = load_pipeline(from_root(args.model), getattr(torch, args.dtype))
    check_groups(pipe.transformer, args.groups)
    args.resolution = args.resolution or native_size(pipe)
    args.steps, args.guidance_scale = sampling_settings(pipe, args.steps, args.guidance_scale)
    args.stride = args.stride or max(1, round(args.steps / USED_STEPS))
    data, file = begin(args), args.output / "scales.json"
    wanted = [s for s in schemes(args.methods, args.groups, args.columns) if s.name not in data["cells"]]
    calls = {}
    for split, count, seed in (
        ("train", args.calibration_prompts, CALIBRATION_SEED), ("eval", args.num_prompts, args.seed)
    ):  # fmt: skip
        prompts, source = pick_prompts(pipe, count, split=split)
        log.info("%d %s", len(prompts), source)
        recorded = record_calls(
            pipe, prompts, range(0, args.steps, args.stride), seed=seed, size=args.resolution,
            num_inference_steps=args.steps, guidance_scale=args.guidance_scale, batch_size=args.batch_size,
            device=args.device,
        ) if wanted else []  # fmt: skip
        calls[split] = split_calls(recorded, CALL_TOKENS)
    for call in calls["eval"]:
        del call["weight"]
    for scheme in wanted:
        log.info("%s", scheme.name)
        data["cells"][scheme.name] = measure(scheme, pipe.transformer, calls["train"], calls["eval"], args)
        write_json(file, data)
    verdict = judge(data["cells"])
    write_json(file, data | {"verdict": verdict})
    plot(data["cells"], args.output / "scales.png")
    print(table(data["cells"], verdict))


def main() -> None:
    args = parse_args()
    advice = "try a smaller --batch_size, --block_micro_batch_size or --resolution"
    with locked(args.output), memory_named("weights are quantized and compared", advice, args.device):
        compare(args)


if __name__ == "__main__":
    run_script(main, "what is measured is in scales.json; the same command goes on")
