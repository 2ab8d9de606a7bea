"""The tables and figures of the programs utils/compare_*.py, and the calls they are filled by."""

import json
import sys
import threading
import time
from types import SimpleNamespace

import pytest
import torch

import run as script
from utils import compare_oneshot, compare_recipes, compare_training_step
from utils.pipelines import early_share
from utils.process_args import process_args
from utils.processes import run_logged, spread
from utils.scenes import CATEGORIES

FINAL = {"eval_nmse": 0.0125, "eval_psnr": 30.26, "eval_scene_score": 0.9, "eval_scene_score_teacher": 0.95}
FINAL |= {f"eval_scene_{category}": 0.1 * i for i, category in enumerate(CATEGORIES)}


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_recipes_become_a_table():
    summary = {"final": FINAL, "seconds_per_step": 0.0481}
    head, rule, *rows = compare_recipes.table({"uniform": summary, "published": summary}).splitlines()
    assert len(rows) == 2
    assert all(len(cells(line)) == len(cells(head)) for line in (rule, *rows))
    row = dict(zip(cells(head), cells(rows[1]), strict=True))
    assert row["recipe"] == compare_recipes.RECIPES["published"][0]
    assert (row["NMSE"], row["PSNR dB"], row["s a step"]) == ("0.01250", "30.3", "0.048")
    assert (row["scene score"], row["of teacher"], row["color_attr"]) == ("0.900", "94.7%", "0.500")


def test_the_published_recipe_is_literal():
    flags = compare_recipes.RECIPES["published"][1]
    pairs = dict(zip(flags[::2], flags[1::2], strict=True))  # the last of a flag counts, as in argparse
    plain = {"--ema_decay": "0", "--early_share": "0.25", "--loss_power": "1", "--freeze_codes": "0"}
    plain["--feature_loss"] = "0"  # not all of these are the defaults
    assert {name: pairs.pop(name) for name in plain} == plain
    assert pairs.pop("--clip_learning_rate") == pairs["--learning_rate"]
    assert pairs == {"--lora_r": "32", "--lora_alpha": "1", "--clip_init": "max", "--learning_rate": "2e-5"}


def test_the_defaults_of_train_py_are_one_of_the_recipes():
    flags = compare_recipes.RECIPES[compare_recipes.DEFAULTS][1]

    def values(arguments):
        found = {name: value for part in process_args(arguments) for name, value in vars(part).items()}
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
    monkeypatch.setattr(compare_oneshot, "run_logged", lambda *args: pytest.fail("measured again"))
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
