"""Flags: the published command lines keep their meaning; whatever is wrong ends in one line and status 2."""

import os
import re
import shlex

import pytest
import torch
import transformers

from utils import process_args as module
from utils.process_args import process_args
from utils.utils import pick_dtype

PUBLISHED_SANITY = """
--local_dir "/tmp/flux/" --input_model_filename "black-forest-labs/FLUX.1-dev" --output_model_filename "flux-dev"
--do_train True --do_eval True --fp16 False --bf16 True --log_on_each_node False
--logging_dir /tmp/output/runs/current --num_train_epochs 1 --per_device_train_batch_size 4
--per_device_eval_batch_size 1 --gradient_accumulation_steps 1 --evaluation_strategy "steps" --eval_steps 100
--save_strategy "steps" --save_steps 400 --report_to "tensorboard" --save_total_limit 1 --learning_rate 2e-5
--weight_decay 0. --warmup_ratio 0. --lr_scheduler_type "cosine" --logging_steps 1 --tf32 False
--gradient_checkpointing False --qat True --w_bits 0
"""
PUBLISHED_README = (
    PUBLISHED_SANITY.replace("--do_eval True", "--do_eval False")
    .replace('--evaluation_strategy "steps"', '--evaluation_strategy "no"')
    .replace("--save_steps 400", "--save_steps 2000")
    .replace("--per_device_train_batch_size 4", "--per_device_train_batch_size 2")
)
PUBLISHED_TRAIN = (
    PUBLISHED_SANITY.replace("--eval_steps 100", "--eval_steps 500")
    .replace("--save_steps 400", "--save_steps 500")
    .replace("--save_total_limit 1", "--save_total_limit 5")
    .replace("--gradient_checkpointing False", "--gradient_checkpointing True")
    + '--ddp_find_unused_parameters True --optim "adamw_bnb_8bit"'
)


@pytest.fixture(autouse=True)
def tensorboard_folder(monkeypatch):
    """--logging_dir goes into the environment; this takes it out again."""
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", "before")


@pytest.mark.parametrize(
    "line", [PUBLISHED_SANITY, PUBLISHED_README, PUBLISHED_TRAIN], ids=["sanity", "readme", "train"]
)
def test_published_command_lines(line):
    model_args, data_args, training_args = process_args(shlex.split(line))

    assert model_args.local_dir == "/tmp/flux/"
    assert model_args.input_model_filename == "black-forest-labs/FLUX.1-dev"
    assert model_args.output_model_filename == "flux-dev"
    assert model_args.output_model_local_path == "/tmp/flux/models/flux-dev"
    assert model_args.w_bits == [0]
    assert training_args.qat is True
    assert training_args.do_train is True
    assert training_args.bf16 is True and training_args.fp16 is False and training_args.tf32 is False
    assert training_args.per_device_eval_batch_size == training_args.gradient_accumulation_steps == 1
    assert training_args.learning_rate == 2e-5 and training_args.weight_decay == 0.0
    assert training_args.lr_scheduler_type == "cosine"
    assert training_args.save_strategy == "steps" and training_args.logging_steps == 1
    assert list(training_args.report_to) == ["tensorboard"]
    assert training_args.num_train_epochs == 1 and training_args.log_on_each_node is False
    assert data_args.prompts is None and data_args.resolution is None


def test_what_the_published_command_lines_differ_in():
    sanity, readme, train = (
        process_args(shlex.split(line))[2] for line in (PUBLISHED_SANITY, PUBLISHED_README, PUBLISHED_TRAIN)
    )
    assert [args.do_eval for args in (sanity, readme, train)] == [True, False, True]
    assert [args.eval_strategy for args in (sanity, readme, train)] == ["steps", "no", "steps"]
    assert [args.eval_steps for args in (sanity, readme, train)] == [100, 100, 500]
    assert [args.save_steps for args in (sanity, readme, train)] == [400, 2000, 500]
    assert [args.save_total_limit for args in (sanity, readme, train)] == [1, 1, 5]
    assert [args.per_device_train_batch_size for args in (sanity, readme, train)] == [4, 2, 4]
    assert [args.gradient_checkpointing for args in (sanity, readme, train)] == [False, False, True]
    assert sanity.optim == "adamw_torch_fused" and train.optim == "adamw_bnb_8bit"
    assert train.ddp_find_unused_parameters is True


@pytest.mark.parametrize(("flags", "warmup"), [(["--warmup_ratio", "0."], 0), (["--warmup_ratio", "0.1"], 20), ([], 6)])
def test_warmup_ratio_reaches_the_schedule(flags, warmup):
    """Against the definition: a share of all steps, here 200."""
    assert process_args(flags)[2].get_warmup_steps(200) == warmup


def test_old_names_reach_transformers():
    """As the new names do, by transformers' own TrainingArguments."""
    new = transformers.TrainingArguments(output_dir="output", eval_strategy="epoch", use_cpu=True)
    assert process_args(["--evaluation_strategy", "epoch"])[2].eval_strategy is new.eval_strategy
    assert process_args(["--eval_strategy", "epoch"])[2].eval_strategy is new.eval_strategy

    process_args(["--logging_dir", "/tmp/runs"])
    assert os.environ["TENSORBOARD_LOGGING_DIR"] == "/tmp/runs"
    process_args(["--overwrite_output_dir", "True", "--contain_weight_clip_val", "True"])


def test_defaults_are_the_embedded_model():
    model_args, data_args, training_args = process_args([])
    assert model_args.input_model_filename == "assets/tiny-flux"
    assert model_args.w_bits == [0] and model_args.device is None
    assert (data_args.num_images, data_args.num_inference_steps) == (6, None)
    assert (data_args.guidance_scale, training_args.seed) == (None, 42)  # the pipeline decides


def test_names_that_every_script_takes():
    line = "--model m --num_inference_steps 3 --output_dir o --prompts p --dtype float16 --num_images 2 --seed 1"
    model_args, data_args, training_args = process_args(shlex.split(line + " --resolution 64 --device cpu"))
    assert (model_args.input_model_filename, model_args.device) == ("m", "cpu")
    assert (data_args.num_inference_steps, data_args.num_images, data_args.resolution) == (3, 2, 64)
    assert (data_args.prompts, training_args.output_dir, training_args.seed) == ("p", "o", 1)
    assert (training_args.bf16, training_args.fp16) == (False, True)
    assert pick_dtype(training_args, torch.device("cuda")) == torch.float16
    for line, cpu, cuda in (
        ("--dtype float32", torch.float32, torch.float32),
        ("--bf16 False", torch.float32, torch.float32),
        ("--bf16 True", torch.bfloat16, torch.bfloat16),
        ("--bf16 False --fp16 True", torch.float16, torch.float16),
        ("", torch.float32, torch.bfloat16),
    ):
        training_args = process_args(line.split())[2]
        assert [pick_dtype(training_args, torch.device(name)) for name in ("cpu", "cuda")] == [cpu, cuda], line


def test_flags_of_paretoq_are_accepted():
    line = "--train_data_local_path /tmp/train.jsonl --eval_data_local_path /tmp/eval.jsonl --model_max_length 2048"
    process_args(shlex.split(line + " --cache_dir /tmp/cache"))


def test_help_shows_what_a_script_uses_or_its_own_flags_first(capsys):
    with pytest.raises(SystemExit, match="0"):
        process_args(["--help"], "What it does.", ["w_bits", "seed"])
    text = capsys.readouterr().out
    assert "(default: 42)" in text and "(default: None)" not in text
    assert "What it does." in text and "--w_bits" in text and "--seed" in text and len(text.splitlines()) < 20
    assert "--learning_rate" not in text and "Accepted as well, without effect here: train.py's flags" in text
    with pytest.raises(SystemExit, match="0"):
        process_args(["--help"])
    text = capsys.readouterr().out
    for own in ("--w_bits", "--early_share", "--learning_rate", "--prompts"):
        assert text.index(f"  {own}") < text.index("  --torch_empty_cache_steps")
    assert not any(f"  --{name}" in text for name in module.NOT_HERE)


def test_the_embedded_model_is_found_from_anywhere(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    found = process_args([])[0].input_model_filename
    assert os.path.isdir(found) and found.endswith("assets/tiny-flux")
    (tmp_path / "assets" / "tiny-flux").mkdir(parents=True)  # one of the user's own goes first
    assert process_args([])[0].input_model_filename == "assets/tiny-flux"


@pytest.mark.parametrize("rank", ["0", "1"])
def test_of_several_ranks_the_first_speaks(rank, monkeypatch, capsys):
    monkeypatch.setenv("RANK", rank)
    with pytest.raises(SystemExit, match="2"):
        process_args(["--nonsense"])
    assert capsys.readouterr().err.count("\n") == (rank == "0")


def test_averaged_weights_go_without_frozen_codes_unless_asked():
    assert process_args([])[2].freeze_codes == 0.1
    assert process_args(["--ema_decay", "0.9"])[2].freeze_codes == 0
    assert process_args(["--ema_decay", "0.9", "--freeze_codes", "0"])[2].freeze_codes == 0


@pytest.mark.parametrize(("metric", "greater"), [("nmse", False), ("eval_nmse_late", False), ("psnr", True)])
def test_the_best_error_is_the_least(metric, greater):
    flags = ["--save_strategy", "best", "--metric_for_best_model", metric]
    assert process_args(flags)[2].greater_is_better is greater
    assert process_args([*flags, "--greater_is_better", str(not greater)])[2].greater_is_better is not greater


def test_several_bit_widths():
    assert process_args(["--w_bits", "8", "4", "2", "0"])[0].w_bits == [8, 4, 2, 0]
    assert process_args(["--w_bits", "8", "4", "--w_bits", "3"])[0].w_bits == [3]  # the last one counts
    assert process_args(["--w_bits", "16"])[0].w_bits == [16]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--w_bits", "9"], "w_bits=9 .* use 0 .*1 to 8.*16"),
        (["--w_bits", "4", "-1"], "w_bits=-1"),
        (["--w_bits", "1.58"], "--w_bits.*: invalid int value: '1.58'"),
        (["--w_bits"], "--w_bits.*: expected at least one argument"),
        (["--num_images", "0"], "--num_images must be at least 1, got 0"),
        (["--num_images", "many"], "--num_images.*: invalid int value"),
        (["--num_inference_steps", "0"], "--num_inference_steps must be at least 1, got 0"),
        (["--resolution", "-16"], "--resolution must be at least 16 and at most 8192, got -16"),
        (["--resolution", "65536"], "--resolution must be at least 16 and at most 8192, got 65536"),
        (["--resolution", "0"], "--resolution must be at least 16"),
        (["--resolution", "8"], "--resolution must be a multiple of 16, got 8"),
        (["--guidance_scale", "nan"], "--guidance_scale must be a finite number, got nan"),
        (["--seed", str(2**64)], "--seed must be at least 0 and at most 4294967295, got 18446744073709551616"),
        (["--seed", "-1"], "--seed must be at least 0"),
        (["--report_to", "wandb"], "--report_to wandb: no such package here; install wandb"),
        (["--dtype", "float32", "--bf16", "True"], "--dtype float32 contradicts --bf16 True"),
        (["--dtype", "float64"], "invalid choice: 'float64'"),
        (["--output_model_filename", "/home/x/flux"], "--output_model_filename '/home/x/flux': expected the name of"),
        (["--output_model_filename", ""], "--output_model_filename '': expected the name of one folder"),
        (["--output_model_filename", ".."], "--output_model_filename '..': expected the name of one folder"),
        (["--resolution", "100"], "--resolution must be a multiple of 16, got 100"),
        (["--early_share", "1"], "--early_share must be above 0 and below 1, got 1.0"),
        (["--early_share", "nan"], "--early_share must be above 0 and below 1, got nan"),
        (["--step_shares", "a.json", "--early_share", "0.5"], "--step_shares stands in place of --early_share: give"),
        (["--freeze_codes", "1"], "--freeze_codes must be at least 0 and below 1, got 1.0"),
        (["--freeze_codes", "0.1", "--ema_decay", "0.9"], "--freeze_codes cannot be combined with --ema_decay"),
        (["--loss_power", "0"], "--loss_power must be above 0 and at most 1, got 0.0"),
        (["--visit_share", "1.5"], "--visit_share must be 0 to 1, got 1.5"),
        (["--visit_share", "nan"], "--visit_share must be 0 to 1, got nan"),
        (["--visit_share", "0.2", "--teacher_cache", "off"], "--visit_share draws any training prompt again"),
        (["--pack", "True", "--w_bits", "16"], "--pack True is of codes, and --w_bits 16 has none: leave it out"),
        (["--vote_codes", "0.1", "--w_bits", "16"], "--vote_codes is of codes, and --w_bits 16 has none"),
        (["--vote_codes", "-1"], "--vote_codes must be 0 to 1, got -1.0"),
        (["--vote_codes", "0.1", "--freeze_codes", "0"], "it needs --freeze_codes above 0 and --lora_r 0"),
        (["--vote_codes", "0.1", "--lora_r", "2"], "it needs --freeze_codes above 0 and --lora_r 0"),
        (["--vote_codes", "0.95"], "--vote_codes and --freeze_codes are shares of all steps: together at most 1"),
        (["--rate_share", "nan"], "--rate_share must be above 0, got nan"),
        (["--loss_power", "nan"], "--loss_power must be above 0 and at most 1, got nan"),
        (["--device", "toaster"], "--device toaster is not available here: use one of .*cpu"),
        (["--device", "meta"], "--device meta is not available here"),
        (["--nonsense", "3"], "unknown arguments: --nonsense 3"),
        (["stray"], "unknown arguments: stray"),
        (["--w_b", "2"], "unknown arguments: --w_b 2"),  # 1_run_train.sh would not see what it is
        (["--qat", "perhaps"], "--qat.*perhaps"),
        (["--bf16", "True", "--fp16", "True"], "fp16.*bf16"),
        (["--evaluation_strategy", "sometimes"], "sometimes is not a valid IntervalStrategy"),
        (["--per_device_train_batch_size", "0"], "--per_device_train_batch_size must be at least 1, got 0"),
        (["--per_device_eval_batch_size", "0"], "--per_device_eval_batch_size must be at least 1, got 0"),
        (["--gradient_accumulation_steps", "0"], "--gradient_accumulation_steps must be at least 1, got 0"),
        (["--num_train_epochs", "0"], "--num_train_epochs must be above 0, got 0.0"),
        (["--save_steps", "0"], "--save_steps must be above 0, got 0.0; --save_strategy no does without"),
        (["--eval_steps", "-5"], "--eval_steps must be above 0, got -5.0; --eval_strategy no does without"),
        (["--clip_learning_rate", "-1"], "--clip_learning_rate must be a finite number of at least 0, got -1.0"),
        (["--learning_rate", "nan"], "--learning_rate must be a finite number of at least 0, got nan"),
        (["--data_seed", "-1"], "--data_seed must be at least 0"),
        (["--save_strategy", "best"], "--save_strategy best needs --metric_for_best_model, such as nmse"),
        (["--load_best_model_at_end", "True"], "--load_best_model_at_end has no use here: the last step .* best"),
        (["--save_only_model", "True"], "--save_only_model has no use here: checkpoints are there to go on from"),
        (["--save_on_each_node", "True"], "--save_on_each_node has no use here: all nodes see one disk"),
        (["--auto_find_batch_size", "True"], "--auto_find_batch_size has no use here: choose a --per_device_train_b"),
        (["--deepspeed", "zero.json"], "--deepspeed has no use here: use --fsdp full_shard"),
        (["--torch_compile_mode", "max-autotune"], "--torch_compile_mode has no use here: .* --torch_compile True"),
        (["--label_smoothing_factor", "0.1"], "--label_smoothing_factor has no use here: velocities are no classes"),
        (["--neftune_noise_alpha", "5"], "--neftune_noise_alpha has no use here: no token embeddings"),
        (["--push_to_hub", "True"], "--push_to_hub has no use here: upload the trained model's folder"),
    ],
)
def test_usage_errors(flags, message, capsys):
    with pytest.raises(SystemExit) as exit:
        process_args(flags)
    assert exit.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    assert re.search(message, error), error


def test_a_second_gpu_is_not_trained_on_by_its_number(monkeypatch, capsys):
    """Trainer would take the first; sanity.py takes it."""
    monkeypatch.setattr(module, "pick_device", lambda name=None: torch.device(name or "cuda"))
    with pytest.raises(SystemExit, match="2"):
        process_args(["--device", "cuda:1"])
    assert "--device cuda:1: training takes the first GPU, or one a rank" in capsys.readouterr().err
    assert process_args(["--device", "cuda:1"], used=["device"])[0].device == "cuda:1"
    assert process_args(["--device", "cuda:0"])[0].device == "cuda:0"


def test_a_gpu_for_each_process(monkeypatch, capsys):
    """Else accelerate would give one to two of them, which NCCL refuses in the first reduction."""
    monkeypatch.setattr(module, "pick_device", lambda name=None: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    with pytest.raises(SystemExit, match="2"):
        process_args([])
    assert "3 processes want a GPU each, and there are 2: start fewer" in capsys.readouterr().err
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    process_args([])


def test_a_device_that_is_not_there(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="2"):
        process_args(["--device", "cuda"])
    assert "--device cuda is not available here" in capsys.readouterr().err
