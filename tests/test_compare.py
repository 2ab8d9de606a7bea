"""The tables and figures of the programs utils/compare_*.py, and the calls they are filled by."""

import json
import math
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import diffusers
import pytest
import torch

import run as script
import train
from utils import (
    compare_cache_speed,
    compare_oneshot,
    compare_recipes,
    compare_training_step,
    compare_widths,
    processes,
)
from utils.pipelines import early_share
from utils.process_args import process_args
from utils.processes import run_logged, spread
from utils.rates import choose_rates
from utils.scenes import CATEGORIES

ROOT = Path(__file__).parents[1]
FINAL = {"eval_nmse": 0.0125, "eval_psnr": 30.26, "eval_scene_score": 0.9, "eval_scene_score_teacher": 0.95}
FINAL |= {f"eval_scene_{category}": 0.1 * i for i, category in enumerate(CATEGORIES)}


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_recipes_become_a_table():
    summary = {"final": FINAL, "seconds_per_step": 0.0481}
    table = compare_recipes.table({compare_recipes.Cell(name): summary for name in ("uniform", "published")})
    head, rule, *rows = table.splitlines()
    assert len(rows) == 2
    assert all(len(cells(line)) == len(cells(head)) for line in (rule, *rows))
    row = dict(zip(cells(head), cells(rows[1]), strict=True))
    assert row["recipe"] == compare_recipes.RECIPES["published"][0]
    assert (row["NMSE"], row["PSNR dB"], row["s a step"]) == ("0.01250", "30.26", "0.048")
    assert (row["scene score"], row["of teacher"], row["color_attr"]) == ("0.900", "94.7%", "0.500")


def test_the_published_recipe_is_literal():
    flags = compare_recipes.RECIPES["published"][1]
    pairs = dict(zip(flags[::2], flags[1::2], strict=True))  # the last of a flag counts, as in argparse
    plain = {"--ema_decay": "0", "--early_share": "0.25", "--loss_power": "1", "--freeze_codes": "0"}
    plain |= dict.fromkeys(("--feature_loss", "--vote_codes", "--visit_share"), "0")
    assert {name: pairs.pop(name) for name in plain} == plain
    assert pairs.pop("--clip_learning_rate") == pairs["--learning_rate"]
    assert pairs == {"--lora_r": "32", "--lora_alpha": "1", "--clip_init": "max", "--learning_rate": "2e-5"}


@pytest.mark.parametrize("recipe", compare_recipes.RECIPES)
def test_train_py_takes_every_recipe(recipe):
    flags = compare_recipes.RECIPES[recipe][1]
    settings = {name: str(value) for part in process_args(flags) for name, value in vars(part).items()}
    for flag, value in dict(zip(flags[::2], flags[1::2], strict=True)).items():  # each is said in words it knows
        assert settings[flag.removeprefix("--")] in (value, str(float(value)) if value[0].isdigit() else value)
    assert "--step_shares" not in flags or len(train.read_shares(Path(compare_recipes.STEP_SHARES), 28)) == 28


def test_the_defaults_of_train_py_are_one_of_the_recipes():
    flags = compare_recipes.RECIPES[compare_recipes.DEFAULTS][1]

    def values(arguments):
        found = {name: value for part in process_args(arguments) for name, value in vars(part).items()}
        settings = SimpleNamespace(**found)
        choose_rates(settings, lora=False, width=256)
        found |= vars(settings)
        found["clip_learning_rate"] = found["clip_learning_rate"] or found["learning_rate"]  # what leaving it out means
        found["early_share"] = found["early_share"] or early_share(28)
        return {flag: found[flag.removeprefix("--")] for flag in flags[::2]}

    assert values(flags) == values([])


def test_a_recipe_that_is_done_is_not_trained_again(tmp_path, monkeypatch):
    summary = {"final": FINAL, "seconds_per_step": 0.1}
    (tmp_path / "uniform").mkdir()
    (tmp_path / "uniform" / "summary.json").write_text(json.dumps(summary))
    called = []
    monkeypatch.setattr(compare_recipes, "run_logged", lambda words, log, environment: called.append(words))
    monkeypatch.setattr(sys, "argv", ["compare_recipes", "--output", str(tmp_path), "--recipes", "uniform"])
    compare_recipes.main()
    assert [words[words.index("--do_train") + 1] for words in called] == ["False"]  # the teacher cache, nothing else
    assert json.loads((tmp_path / "recipes.json").read_text())["recipes"] == {"uniform": summary}


def test_recipes_that_are_done_stand_in_the_table_when_another_fails(tmp_path, monkeypatch):
    def train(cell, environment, args):
        if cell.recipe == "slow":
            raise ValueError("train.py failed")
        return {"final": FINAL, "seconds_per_step": 0.1}

    monkeypatch.setattr(compare_recipes, "train", train)
    monkeypatch.setattr(compare_recipes, "run_logged", lambda *args: None)
    names = ["fast", "slow", "uniform"]
    monkeypatch.setattr(sys, "argv", ["compare_recipes", "--output", str(tmp_path), "--recipes", *names])
    with pytest.raises(ValueError, match="train.py failed"):
        compare_recipes.main()
    assert list(json.loads((tmp_path / "recipes.json").read_text())["recipes"]) == ["fast", "uniform"]
    assert len((tmp_path / "recipes.md").read_text().splitlines()) == 4


def test_all_gpus_fill_the_teacher_cache(tmp_path, monkeypatch):
    called = []
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    monkeypatch.setattr(compare_recipes, "run_logged", lambda words, log, environment: called.append(words))
    monkeypatch.setattr(compare_recipes, "train", lambda *args: {"final": FINAL, "seconds_per_step": 0.1})
    monkeypatch.setattr(sys, "argv", ["compare_recipes", "--output", str(tmp_path), "--recipes", "uniform"])
    compare_recipes.main()
    [words] = called
    assert words[:2] == ["-m", "torch.distributed.run"] and "--nproc_per_node=2" in words[: words.index("train.py")]


def test_a_recipe_that_starts_from_a_one_shot_gets_one(tmp_path, monkeypatch):
    called = []

    def run(words, log, environment):
        called.append([str(word) for word in words])
        if words[0] == "train.py" and "--start_from" in words:
            (tmp_path / "calibrated" / "summary.json").parent.mkdir()
            summary = json.dumps({"final": FINAL, "seconds_per_step": 0.1})
            (tmp_path / "calibrated" / "summary.json").write_text(summary)

    monkeypatch.setattr(compare_recipes, "run_logged", run)
    flags = ["--output", str(tmp_path), "--recipes", "calibrated"]
    monkeypatch.setattr(sys, "argv", ["compare_recipes", *flags])
    compare_recipes.main()
    cache, oneshot, training = called
    assert (cache[0], oneshot[0], training[0]) == ("train.py", "run.py", "train.py") and "--start_from" not in cache
    made = oneshot[oneshot.index("--output_path") + 1]
    assert training[training.index("--start_from") + 1] == made == str(tmp_path / "oneshot")
    assert oneshot[oneshot.index("--w_bits") + 1] == "0"


def test_seeds_and_bit_widths_are_trainings_of_their_own(tmp_path, monkeypatch):
    """Each from a start of its bit width, with the mean of the seeds in the table."""
    called = []

    def run(words, log, environment):
        words = [str(word) for word in words]
        called.append(words)
        if words[0] == "run.py":
            script.parse_args(words[1:])
        elif "--do_train" not in words:
            process_args(words[1:])
            folder = Path(words[words.index("--output_dir") + 1])
            folder.mkdir()
            nmse = 0.02 if folder.name.endswith("1") else 0.04
            worst = {"eval_scene_worst_of_teacher": 0.96}
            summary = {"final": FINAL | worst | {"eval_nmse": nmse}, "seconds_per_step": 0.1}
            (folder / "summary.json").write_text(json.dumps(summary))

    monkeypatch.setattr(compare_recipes, "run_logged", run)
    flags = ["--output", str(tmp_path), "--recipes", "last_blockwise", "--w_bits", "0", "2", "--data_seeds", "1", "2"]
    monkeypatch.setattr(sys, "argv", ["compare_recipes", *flags])
    compare_recipes.main()
    starts = [words for words in called if words[0] == "run.py"]
    assert all(words[words.index("--method") + 1] == "blockwise" for words in starts) and len(starts) == 2
    trained = [words for words in called if words[0] == "train.py" and "--do_train" not in words]
    for words in trained:
        given = {flag: words[len(words) - 1 - words[::-1].index(flag) + 1] for flag in words if flag.startswith("--")}
        bits, seed = given["--w_bits"], given["--data_seed"]
        suffix = "" if bits == "0" else f"+{bits}bit"
        assert given["--output_dir"] == str(tmp_path / f"last_blockwise{suffix}+seed{seed}")
        assert given["--start_from"] == str(tmp_path / f"blockwise{suffix}")
        assert (given["--vote_codes"], given["--visit_share"]) == ("0.05", "0.3")
    assert len(trained) == 4 and len(json.loads((tmp_path / "recipes.json").read_text())["recipes"]) == 4
    head, _, *rows = (tmp_path / "recipes.md").read_text().splitlines()
    rows = [dict(zip(cells(head), cells(row), strict=True)) for row in rows]
    [mean] = [row for row in rows if "mean of 2 seeds" in row["recipe"] and "2 bits" not in row["recipe"]]
    assert (mean["NMSE"], mean["worst category of teacher"]) == ("0.03000", "96.0%")
    assert len([row for row in rows if row["recipe"].endswith("spread") and row["NMSE"] == "0.01414"]) == 2


def test_oneshot_figures_become_a_table(tmp_path, monkeypatch):
    """An interrupted comparison goes on: what is measured already is read, nothing is run."""
    score = dict.fromkeys(CATEGORIES, 0.5) | {"mean": 0.5, "stderr": 0.01}
    figures = {"w_bits": 0, "nmse": 0.25, "psnr": 19.96, "scene_score": score, "disk_bytes": 5_200_000}
    figures["scene_score_teacher"] = score | {"mean": 0.8}
    for name, without in (("mse_0", []), ("calibrated_0", []), ("calibrated_0_without_bias", ["bias"])):
        (tmp_path / name / "test").mkdir(parents=True)
        (tmp_path / name / "pipeline").mkdir()
        (tmp_path / name / "test" / "metrics.json").write_text(json.dumps(figures))
        run = {"method": name.split("_")[0], "without": without, "seconds": 61.2}
        (tmp_path / name / "pipeline" / "metrics.json").write_text(json.dumps(run))
    monkeypatch.setattr(processes, "run_logged", lambda *args: pytest.fail("measured again"))
    monkeypatch.setattr(compare_oneshot, "INGREDIENTS", ("bias",))
    flags = ["--output", str(tmp_path), "--w_bits", "0", "--methods", "mse", "calibrated", "--ablate"]
    monkeypatch.setattr(sys, "argv", ["compare_oneshot", *flags])
    compare_oneshot.main()
    head, _, *rows = (tmp_path / "oneshot.md").read_text().splitlines()
    assert [cells(row)[0] for row in rows] == ["mse", "calibrated", "calibrated without bias"]
    row = dict(zip(cells(head), cells(rows[0]), strict=True))
    assert (row["bits"], row["of teacher"], row["MB"], row["seconds"]) == ("1.58", "62.5%", "5.2", "61")
    assert len(json.loads((tmp_path / "oneshot.json").read_text())) == 3


def test_every_way_to_train_block_by_block_is_one_that_run_knows():
    for name, (_, flags) in compare_oneshot.RECIPES.items():
        args = script.parse_args(["--method", "blockwise", *flags])
        assert args.method == "blockwise" and args.block_steps, name
        told = compare_oneshot.describe({"name": f"{name}_0", "run": {"without": []}})
        assert told == f"block-wise: {compare_oneshot.RECIPES[name][0]}"


def test_a_failed_call_is_one_line_that_names_the_log(tmp_path):
    with pytest.raises(ValueError, match=rf"^train\.py failed, see {tmp_path}/log\.txt: .*w_bits=9 is not supported"):
        run_logged(["train.py", "--w_bits", 9], tmp_path / "log.txt")


def test_work_is_spread_over_the_gpus(monkeypatch):
    """Each slot of each GPU at most once at a time, the results in order."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("os.cpu_count", lambda: 32)
    running, most, lock = {"2": 0, "5": 0}, {"2": 0, "5": 0}, threading.Lock()

    def work(item, environment):
        assert environment["OMP_NUM_THREADS"] == "8"  # four slots share the 32 cores
        gpu = environment["CUDA_VISIBLE_DEVICES"]
        with lock:
            running[gpu] += 1
            most[gpu] = max(most[gpu], running[gpu])
        time.sleep(0.05)
        with lock:
            running[gpu] -= 1
        return item * 10

    assert spread(work, range(12), 2) == [item * 10 for item in range(12)]
    assert most == {"2": 2, "5": 2}
    assert spread(lambda item, environment: environment["OMP_NUM_THREADS"], "a", 2) == ["32"]  # nothing beside it


def test_without_a_gpu_work_is_given_threads_alone(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")  # who says how many is obeyed
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    threads = {"OMP_NUM_THREADS": "3"}
    assert spread(lambda item, environment: (item, environment), "ab", 1) == [("a", threads), ("b", threads)]


def test_a_training_step_is_timed_for_both(start, tmp_path):
    flags = ["--config", "small", "--resolution", 64, "--batch_sizes", 1, 2, "--steps", 1, "--warmup", 1, "--eager"]
    command = ["compare_training_step.py", "--output", tmp_path, *flags, "--device", "cpu"]
    assert start(compare_training_step.main, *command) == 0
    report = json.loads((tmp_path / "training_step.json").read_text())
    rows = {(row["name"], row["batch_size"]): row for row in report["rows"]}
    assert rows.keys() == {("plain", 1), ("plain", 2), ("quantized", 1), ("quantized", 2)}
    for size in (1, 2):
        plain, quantized = rows["plain", size], rows["quantized", size]
        assert plain["ratio"] == 1 and quantized["ratio"] == quantized["seconds"] / plain["seconds"]


def test_both_training_steps_train_a_lora_on_the_same_linears():
    args = SimpleNamespace(lora_r=4, seed=0, device=torch.device("cpu"))
    config = compare_training_step.CONFIGS["small"]
    ours, theirs = (make(config, args) for make in (compare_training_step.quantized, compare_training_step.plain))
    matrices = {name.removesuffix(".lora_A") for name, p in ours.named_parameters() if name.endswith("lora_A")}
    adapted = {name.partition(".lora_A")[0] for name, p in theirs.named_parameters() if "lora_A" in name}
    assert matrices == adapted
    trained = {name for name, p in ours.named_parameters() if p.requires_grad}
    assert not any(name.endswith(".weight") and name.removesuffix(".weight") in matrices for name in trained)


def test_the_teacher_cache_is_timed_beside_the_pipeline_and_ends_in_the_same_latents(
    start, pipeline_folder, monkeypatch, tmp_path
):
    """By a clock that moves by a second at every step of the transformer, which takes both as many."""
    clock, forward = [0.0], diffusers.FluxTransformer2DModel.forward

    def counted(self, *args, **kwargs):
        clock[0] += 1
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(diffusers.FluxTransformer2DModel, "forward", counted)
    monkeypatch.setattr(compare_cache_speed.time, "perf_counter", lambda: clock[0])
    flags = "--images 4 --batch_size 2 --num_inference_steps 3 --resolution 64 --eager --device cpu --count 7200"
    command = ["compare_cache_speed.py", "--output", tmp_path, "--model", pipeline_folder, *flags.split()]
    assert start(compare_cache_speed.main, *command) == 0
    report = json.loads((tmp_path / "cache_speed.json").read_text())
    assert report["pipeline_seconds_per_prompt"] == report["seconds_per_prompt"] == 2 * 3 / 4 and report["ratio"] == 1
    assert report["once_seconds"] == 2 * 2  # two runs of two steps, by which the cache finds out how long it will take
    assert report["gpu_hours"] == pytest.approx((7200 * 1.5 + 4) / 3600)
    assert report["nmse"] < 1e-10
    assert [file.name for file in tmp_path.iterdir()] == ["cache_speed.json"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--images", 3, "--batch_size", 2], "--images 3: must be a multiple of --batch_size 2"),
        (["--count", 0], "--count must be at least 1, got 0"),
        (["--resolution", 100], "--resolution must be a multiple of 16, got 100"),
    ],
)
def test_cache_speed_refuses_what_makes_no_sense(flags, message, start, capsys, tmp_path):
    assert start(compare_cache_speed.main, "compare_cache_speed.py", "--output", tmp_path / "none", *flags) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "none").exists()


def test_memory_that_runs_out_is_a_line(start, pipeline_folder, monkeypatch, capsys, tmp_path):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(compare_cache_speed, "time_pipeline", full)
    command = ["compare_cache_speed.py", "--output", tmp_path, "--model", pipeline_folder, "--device", "cpu"]
    assert start(compare_cache_speed.main, *command) == 1
    assert "out of memory while pictures are drawn (peak " in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------- widths


def rate_of(power: float, width: int) -> float:
    return 8e-4 * (256 / width) ** power


def measured(power: float, seeds=(42,)) -> dict:
    """widths.json of models whose NMSE is least at a rate that falls with the width to this power."""
    data, rest = {"models": {}, "cells": {}}, {"psnr": 25.0, "score": 0.8, "teacher": 0.9, "seconds": 1}
    for width in (256, 512, 1024):
        data["models"][str(width)] = {"width": width, "alpha": 0.2 * (256 / width) ** 0.5, "rms": 0.1}
        for cell in compare_widths.rate_cells(width, list(seeds)):
            shift = math.log(cell["rate"] / rate_of(power, width)) - 0.1 * (cell["seed"] - 42)
            data["cells"][compare_widths.key_of(cell)] = cell | rest | {"nmse": 0.05 * math.exp(0.3 * shift**2)}
        for method, nmse in (("mse", 0.9), ("blockwise", 0.1)):
            cell = {"width": width, "method": method, "rate": 1e-4, "seed": 0, "nmse": nmse}
            data["cells"][compare_widths.key_of(cell)] = cell | rest
    return data


@pytest.mark.parametrize(("power", "winners"), [(0, {"constant", "rms"}), (0.5, {"sqrt", "alpha"}), (1, {"width"})])
def test_the_rule_that_holds_is_found(power, winners):
    verdict = compare_widths.judge(measured(power))
    for width, best in verdict["optima"].items():
        assert best["rate"] == pytest.approx(rate_of(power, width), rel=1e-3) and not best["bound"]
        assert best["nmse"] == pytest.approx(0.05, rel=1e-3)
    off = {rule: found["off"] for rule, found in verdict["rules"].items()}
    assert {rule for rule, value in off.items() if value < 1e-2} == winners
    if power == 1:  # by hand: the root of the mean of (log2 2)² and (log2 4)², of half of that
        assert off["constant"] == pytest.approx(math.sqrt((1 + 4) / 2), abs=1e-2)
        assert off["sqrt"] == pytest.approx(math.sqrt((1 + 4) / 2) / 2, abs=1e-2)
        assert verdict["rules"]["constant"]["loss"] > verdict["rules"]["sqrt"]["loss"] > 0


def test_between_two_rates_the_error_is_interpolated():
    points = {1e-4: 0.4, 4e-4: 0.1}
    assert compare_widths.between(points, 2e-4) == pytest.approx(0.2)
    assert (compare_widths.between(points, 1e-5), compare_widths.between(points, 1)) == (0.4, 0.1)


def test_seeds_are_averaged_and_their_spread_is_told():
    verdict = compare_widths.judge(measured(0.5, seeds=(41, 43)))
    best = verdict["optima"][512]
    assert best["rate"] == pytest.approx(rate_of(0.5, 512), rel=1e-3)
    low, high = best["of_each_seed"]
    assert high / low == pytest.approx(math.exp(0.2), rel=1e-3)


def test_the_plot_and_the_table_are_made_of_what_is_there(start, tmp_path):
    data = measured(0.5) | {"settings": {}}
    del data["cells"]["1024-blockwise"]  # not measured yet
    (tmp_path / "widths.json").write_text(json.dumps(data))
    assert start(compare_widths.main, "compare_widths.py", "--output", tmp_path) == 0
    lines = (tmp_path / "widths.md").read_text().splitlines()
    rows = [cells(line) for line in lines if line.startswith("| 256 | trained")]
    assert len(rows) == 5 and rows[0][:4] == ["256", "trained", "0.00025", "42"] and rows[0][7] == "88.9%"
    ranked = [cells(line)[0] for line in lines[lines.index("") :] if cells(line)[0] in compare_widths.RULES]
    ranked.remove("width")  # the head of the table of optima
    assert set(ranked[:2]) == {"sqrt", "alpha"} and len(ranked) == 5
    assert (tmp_path / "widths.png").stat().st_size > 10_000


def test_cells_are_measured_once_and_kept_as_they_come(tmp_path, monkeypatch):
    called = []

    def run(words, log, environment):
        words = [str(word) for word in words]
        called.append(words)
        if words[0] == "train.py":
            process_args(words[1:])  # flags that there are
            folder = Path(words[words.index("--output_dir") + 1])
            if "--do_train" not in words:
                folder.mkdir()
                (folder / "summary.json").write_text(json.dumps({"final": FINAL, "seconds_per_step": 0.1}))
        elif words[0] == "run.py":
            args = script.parse_args(words[1:])
            args.output_path.mkdir(parents=True)
            (args.output_path / "metrics.json").write_text(json.dumps({"seconds": 5}))
            if args.method == "mse":
                raise ValueError("run.py failed")
        else:
            figures = {"nmse": 0.1, "psnr": 20.0, "scene_score": {"mean": 0.4}, "scene_score_teacher": {"mean": 0.8}}
            folder = Path(words[words.index("--output_dir") + 1])
            folder.mkdir()
            (folder / "metrics.json").write_text(json.dumps(figures))

    for module in (compare_widths, processes):
        monkeypatch.setattr(module, "run_logged", run)
    facts = {"width": 256, "alpha": 0.2, "rms": 0.1}

    def model_facts(model):
        assert threading.current_thread() is threading.main_thread()  # models that threads load get mixed up
        return facts

    monkeypatch.setattr(compare_widths, "model_facts", model_facts)
    command = ["compare_widths", "--output", str(tmp_path), "--models", "assets/tiny-flux", "--num_images", "24"]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(ValueError, match="run.py failed"):
        compare_widths.main()
    data = json.loads((tmp_path / "widths.json").read_text())
    assert len(data["cells"]) == 7 and data["models"] == {"256": facts}  # all but mse
    assert data["cells"]["256-blockwise"]["score"] == 0.4
    assert data["cells"]["256-trained-0.0005-42"]["nmse"] == FINAL["eval_nmse"]
    rates = [words[words.index("--learning_rate") + 1] for words in called if "--learning_rate" in words]
    assert [float(rate) for rate in rates] == [2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3]

    elsewhere = tmp_path / "elsewhere"  # another machine: nothing but widths.json
    elsewhere.mkdir()
    (elsewhere / "widths.json").write_text(json.dumps(data))
    called.clear()
    command[2] = str(elsewhere)
    monkeypatch.setattr(sys, "argv", [*command, "--minutes", "0"])
    compare_widths.main()  # nothing is begun
    assert not called
    monkeypatch.setattr(sys, "argv", [*command, "--max_steps", "7"])
    with pytest.raises(ValueError, match="widths.json: measured with max_steps=600, asked for max_steps=7"):
        compare_widths.main()


def test_what_a_rule_by_the_weights_goes_by():
    facts = compare_widths.model_facts(str(ROOT / "assets/tiny-flux"))
    assert facts["width"] == 256 and facts["parameters"] > 13e6
    assert 0.11 < facts["rms"] < 0.12 and 0.19 < facts["alpha"] < 0.21
