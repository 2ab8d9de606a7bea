"""Teach a quantized FLUX back what it lost: teacher cache, then quantization-aware training.

    python train.py --w_bits 0 --max_steps 500                                   # the embedded tiny-flux
    torchrun --nproc_per_node=2 train.py --w_bits 0 --max_steps 500              # two processes, CPU or GPU
    torchrun --nproc_per_node=8 train.py --input_model_filename black-forest-labs/FLUX.1-dev --bf16 True \\
        --gradient_checkpointing True --lora_r 32 --lora_alpha 32 --learning_rate 2e-4

The full-precision pipeline draws every training prompt once; what its transformer did at each step is cached. The
student, the same transformer with quantized linears, learns to predict the same velocities. What is trained:

    --train_weights True         the quantized weights (the default, unless there is a LoRA)
    --lora_r 32 --lora_alpha 1   a LoRA inside the quantizer
    --clip_learning_rate 1e-4    the step sizes α (0: frozen)
    --train_unquantized True     biases, norms, embedders

`--lora_r 32 --lora_alpha 1 --clip_init max --learning_rate 2e-5 --early_share 0.25 --loss_power 1 --freeze_codes 0` is
the recipe of the published port. `--early_share` is how much of the training goes to the first quarter of the denoising
steps, which decide the layout (of few steps all count alike), or `--step_shares` to each step; `--loss_power` below 1
makes hard samples count for less; for the last `--freeze_codes` of the steps the codes stay, and what is left is
trained for them; `--vote_codes` freezes each where it was most of the time, `--visit_share` has the student learn at
states of its own pictures; `--start_from FOLDER` starts from the codes that run.py found. It writes

    LOCAL_DIR/teacher_cache/MODEL-DIGEST/            trajectories, shared by all runs that ask the same of a teacher
    OUTPUT_DIR/eval/step_N/, step-N.png, steps.png   held-out prompts as the student draws them
    OUTPUT_DIR/metrics.jsonl, curves.png             what was measured on the way; tensorboard reads runs/
    OUTPUT_DIR/checkpoint-N/                         to go on from
    OUTPUT_DIR/summary.json                          settings, hardware, time and what was reached
    LOCAL_DIR/models/OUTPUT_MODEL_FILENAME           the student, for FluxTransformer2DModel.from_pretrained
                                                     (--pack True: a tenth of the size, for inference only)

Started again, it goes on from the last checkpoint in OUTPUT_DIR; another OUTPUT_DIR starts anew.
"""

import utils.interrupt  # noqa: F401 (Ctrl-C is a line from here on)

import hashlib
import importlib.util
import math
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path

import diffusers
import torch
import transformers
from accelerate import PartialState
from accelerate.utils import gather_object
from transformers.trainer_utils import get_last_checkpoint

from models.families import transformer_class
from models.quantized_model import is_quantized
from models.trained import BASE, Shards, describe_base, frozen_names
from models.utils_quant import FULL_PRECISION_BITS
from utils.checkpoints import (
    bits_name,
    check_shapes,
    is_packed,
    load_quantized_model,
    load_student,
    transformer_folder,
)
from utils.datautils import OnlineTeacher, TeacherCache, Trajectories, default_folder, fill_cache
from utils.folders import check_disks, check_target, locked, read_json, whole_folder, write_json
from utils.pipelines import early_share, sampling_settings
from utils.process_args import LARGE, process_args
from utils.prompts import pick_prompts
from utils.rates import choose_rates
from utils.sampling import native_size, with_transformer
from utils.teacher import Teacher, TeacherSettings, prompt_seeds
from utils.trainer import (
    ONLINE_WINDOW,
    STATE,
    FluxQATTrainer,
    check_fsdp,
    check_schedule,
    choose_parameters,
    compile_blocks,
    moment_bytes,
    quantized_layers,
    restore_metrics,
    restore_pictures,
    save_curves,
)
from utils.utils import device_name, from_root, get_logger, memory_named, pick_dtype, run_script
from utils.widen import width_of

log = get_logger("train")
FIRST_STEP = ("seconds_to_first_step", "seconds_of_first_step")  # of summary.json
OPTIMIZERS = {  # and the library that each needs, besides torch and transformers
    **dict.fromkeys(("adamw_torch_fused", "adamw_torch", "adafactor", "sgd", "adagrad", "rmsprop")),
    **dict.fromkeys(("adamw_torch_8bit", "adamw_torch_4bit"), "torchao"),
    **dict.fromkeys(
        (
            "adamw_bnb_8bit", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit", "lion_8bit", "lion_32bit",
            "paged_lion_8bit", "paged_lion_32bit", "ademamix", "ademamix_8bit", "paged_ademamix_8bit",
            "paged_ademamix_32bit", "rmsprop_bnb", "rmsprop_bnb_8bit", "rmsprop_bnb_32bit",
        ),
        "bitsandbytes",
    ),
}  # fmt: skip


def find_checkpoint(training_args) -> Path | None:
    """The checkpoint to go on from: the one named, else the last in OUTPUT_DIR, else none."""
    asked, folder = training_args.resume_from_checkpoint, Path(training_args.output_dir)
    if str(asked).lower() == "false":
        if folder.is_dir() and get_last_checkpoint(folder):
            raise ValueError(
                f"{folder} holds checkpoints of an earlier run: delete them or choose another --output_dir"
            )
        return None
    last = get_last_checkpoint(folder) if folder.is_dir() else None
    checkpoint = last if asked is None or str(asked).lower() == "true" else asked
    if checkpoint is None and asked is not None:
        raise ValueError(
            f"--resume_from_checkpoint {asked}: no checkpoint in {folder}; leave the flag out to start anew"
        )
    if checkpoint is None:
        return None
    if not any((Path(checkpoint) / name).is_file() for name in ("settings.json", "trainer_state.json")):
        raise ValueError(f"--resume_from_checkpoint {checkpoint}: no training checkpoint there; check the path")
    check_checkpoint(Path(checkpoint))
    return Path(checkpoint)


def check_checkpoint(checkpoint: Path) -> None:
    """ValueError, naming the damaged file and another checkpoint that is whole, unless everything is readable."""
    try:
        read_checkpoint(checkpoint)
    except ValueError as error:
        others = []
        found = checkpoint.parent.glob("checkpoint-*")
        for folder in sorted(found, key=lambda folder: (len(folder.name), folder.name), reverse=True):
            with suppress(ValueError):
                if folder != checkpoint:
                    read_checkpoint(folder)
                    others.append(folder.name)
        advice = f"{others[0]} is whole: --resume_from_checkpoint {checkpoint.parent / others[0]}" if others else (
            "no other checkpoint is whole: choose another --output_dir"
        )  # fmt: skip
        raise ValueError(f"{error}; {advice}") from None


def read_checkpoint(checkpoint: Path) -> dict:
    """trainer_state.json; ValueError, naming the file, if that or another file of the checkpoint is damaged."""
    read_json(checkpoint / "settings.json")
    state = read_json(checkpoint / "trainer_state.json")
    if not isinstance(state.get("global_step"), int) or not isinstance(state.get("log_history"), list):
        raise ValueError(f"{checkpoint / 'trainer_state.json'}: lacks global_step or log_history")
    for name in ("optimizer", "scheduler"):
        if name not in Shards(checkpoint, STATE).metadata:
            raise ValueError(f"{checkpoint / STATE}.safetensors: lacks the {name}")
    return state


def check_settings(checkpoint: Path, settings: dict) -> None:
    """ValueError, naming the setting, unless the checkpoint was trained with the same ones."""
    found = read_json(checkpoint / "settings.json")
    for name, wanted in settings.items():
        if found.get(name) != wanted:
            raise ValueError(
                f"{checkpoint}: trained with {name}={found.get(name)}, asked for {name}={wanted}; "
                "give the same settings, or another --output_dir to start anew"
            )


def run_settings(model_args, training_args, teacher: dict) -> dict:
    """What a resumed run must share with the interrupted one; `teacher` is the training trajectories' description."""
    names = ("lora_r", "lora_alpha", "clip_init", "quantize_modulation", "train_weights", "train_unquantized")
    settings = {"w_bits": model_args.w_bits[0]}
    settings |= {name: getattr(model_args, name) for name in (*names, "start_from")}
    names = ("learning_rate", "clip_learning_rate", "rate_share", "weight_decay", "ema_decay", "feature_loss")
    names += ("bf16", "fp16", "early_share", "step_shares", "loss_power", "freeze_codes", "seed", "data_seed")
    names += ("warmup_steps", "lr_scheduler_kwargs", "optim_args")
    names += ("max_grad_norm", "vote_codes", "visit_share", "adam_beta1", "adam_beta2", "adam_epsilon")
    settings |= {name: getattr(training_args, name) for name in names}
    settings |= {
        "optim": training_args.optim.value,
        "lr_scheduler_type": training_args.lr_scheduler_type.value,
        "global_batch_size": training_args.per_device_train_batch_size
        * training_args.gradient_accumulation_steps
        * training_args.world_size,
    }
    settings |= {f"teacher_{name}": value for name, value in teacher.items() if name not in ("prompts", "model")}
    settings["train_prompts"] = hashlib.sha256("\n".join(teacher["prompts"]).encode()).hexdigest()
    return settings


def read_shares(file: Path, steps: int) -> list[float]:
    """Which share of the samples is of each denoising step, from what compare_steps wrote; ValueError on others."""
    rows = read_json(file).get("rows")
    rows = [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
    shares = [row["share"] for row in rows if "share" in row]
    if len(shares) != steps or not all(isinstance(share, float) and 0 < share < math.inf for share in shares):
        raise ValueError(
            f"{file}: expected a share above 0 of each of {steps} denoising steps, found {len(shares)}; "
            f"python -m utils.compare_steps --steps {steps} makes one"
        )
    return shares


def get_teacher(
    teacher: Teacher, model_args, data_args, training_args, device: torch.device
) -> tuple[Trajectories, Trajectories, int | None]:
    """Training and held-out trajectories, of a cache that is still to be filled or made while training, and the window
    to shuffle within.

    A held-out prompt's noise goes by its number, as in sanity.py and test.py; a training prompt's by the prompt, so
    that a list may be changed without all that follows being drawn again.
    """
    count = max(data_args.num_images, data_args.num_final_images or 0)
    held_out, source = pick_prompts(teacher.pipe, count, data_args.prompts)
    number = data_args.num_train_prompts
    prompts, train_source = pick_prompts(teacher.pipe, number, data_args.train_prompts, split="train")
    both = set(prompts) & set(held_out)
    if both:
        if training_args.should_log:
            log.info("%d training prompts are held-out prompts too and left out", len(both))
        prompts = [prompt for prompt in prompts if prompt not in both]
    if len(prompts) < training_args.world_size:
        raise ValueError(
            f"{len(prompts)} training prompts for {training_args.world_size} ranks: give at least one prompt for each"
        )
    if training_args.should_log:
        log.info("%d training prompts: %s; %d held out: %s", len(prompts), train_source, len(held_out), source)

    size = data_args.resolution or native_size(teacher.pipe)
    steps, guidance = sampling_settings(teacher.pipe, data_args.num_inference_steps, data_args.guidance_scale)
    if training_args.step_shares is not None:
        training_args.step_shares = read_shares(Path(training_args.step_shares), steps)
    elif training_args.early_share is None:
        training_args.early_share = early_share(steps)
    settings = TeacherSettings(size, steps, guidance)
    eval_asked = held_out, range(training_args.seed, training_args.seed + len(held_out))
    train_asked = prompts, prompt_seeds(prompts, training_args.seed)
    if data_args.teacher_cache == "off":
        train_data = OnlineTeacher(teacher, settings, *train_asked, ONLINE_WINDOW, device)
        return train_data, OnlineTeacher(teacher, settings, *eval_asked, len(held_out), device), ONLINE_WINDOW
    manifest = teacher.describe(settings)
    folder = data_args.teacher_cache or default_folder(Path(model_args.local_dir) / "teacher_cache", manifest)
    return *(TeacherCache(folder, manifest, *asked) for asked in (train_asked, eval_asked)), None


def summarize(trainer: FluxQATTrainer, seconds: float, steps: int, earlier: dict) -> dict:
    """Settings, machine, the time of `steps` steps (of none: what `earlier`, the last summary, says), evaluations.

    A step's time is the mean over those in which nothing is compiled, if there are any."""
    ordinary = steps - len(trainer.compiling)
    if ordinary > 0:
        seconds, steps = seconds - sum(trainer.compiling), ordinary
    device = trainer.args.device
    first_step = trainer.first_step or {name: earlier.get(name) for name in FIRST_STEP}
    evaluations = [line for line in trainer.state.log_history if "eval_nmse" in line]
    return {
        "settings": trainer.settings,
        "steps": trainer.state.global_step,
        "seconds_per_step": round(seconds / steps, 4) if steps else earlier.get("seconds_per_step"),
        **first_step,
        "trained_parameters": sum(p.numel() for p in trainer.trained()),
        "start": evaluations[0] if evaluations[0]["step"] == 0 else None,  # not with --eval_on_start False
        "final": evaluations[-1],
        "device": device_name(device),
        "world_size": trainer.args.world_size,
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "transformers": transformers.__version__,
    }


def settings_line(settings: dict) -> str:
    """What is trained and how, in a few words."""
    name = bits_name(settings["w_bits"])
    lora = f", LoRA r {settings['lora_r']} alpha {settings['lora_alpha']:g}" if settings["lora_r"] else ""
    return f"{name}{lora}, clip_init {settings['clip_init']}, learning rate {settings['learning_rate']:g}"


def print_summary(summary: dict) -> None:
    """What was reached, beside where it started."""
    names = {
        "nmse": "velocity NMSE", "nmse_early": "  early steps", "nmse_middle": "  middle steps",
        "nmse_late": "  late steps", "psnr": "PSNR dB", "scene_score": "scene score",
    }  # fmt: skip
    print(f"\n{'held-out prompts':<18}{'start':>10}{'trained':>10}")
    for name, title in names.items():
        if f"eval_{name}" in summary["final"]:
            found = ((summary[when] or {}).get(f"eval_{name}") for when in ("start", "final"))
            first, last = ("-" if value is None else f"{value:.5g}" for value in found)
            print(f"{title:<18}{first:>10}{last:>10}")
    if "eval_scene_score_teacher" in summary["final"]:
        print(f"{'  teacher':<18}{'':>10}{summary['final']['eval_scene_score_teacher']:>10.5g}")
    print(f"{summary['steps']} steps, {summary['seconds_per_step']} s each, without evaluations and checkpoints\n")


def disk_needs(config: dict, model_args, training_args, packed: bool | None) -> tuple[int, int]:
    """Bytes of a checkpoint and of the trained model, for a pipeline whose transformer has this config."""
    names = ("lora_r", "lora_alpha", "clip_init", "quantize_modulation")
    settings = {name: getattr(model_args, name) for name in names}
    with torch.device("meta"):
        student = transformer_class(config).from_config({**config, **settings, "w_bits": model_args.w_bits[0]})
    choose_parameters(student, model_args, training_args.clip_learning_rate, torch.bfloat16)
    trained = sum(p.numel() for p in student.parameters() if p.requires_grad)
    left = set(frozen_names(student))
    kept = sum(p.numel() for name, p in student.named_parameters() if name not in left)
    checkpoint = 4 * kept + moment_bytes(training_args.optim.value) * trained
    checkpoint += 4 * trained * bool(training_args.ema_decay)
    if training_args.vote_codes:
        checkpoint += 4 * sum(layer.weight.numel() for layer in quantized_layers(student))
    if is_packed(student, packed) and model_args.w_bits[0] < FULL_PRECISION_BITS:
        student.pack()
        result = sum(p.numel() * p.element_size() for p in student.parameters())
    else:
        result = 4 * student.num_parameters()
    return int(checkpoint), result


def count_steps(args, samples: int) -> tuple[int, int]:
    """Steps of the optimizer in an epoch of so many samples, and in the whole run."""
    whole = math.floor if args.dataloader_drop_last else math.ceil
    batches = whole(samples / args.per_device_train_batch_size / args.world_size)
    epoch = math.ceil(batches / args.gradient_accumulation_steps)
    return epoch, args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * epoch)


def check_steps(checkpoint: Path, args, steps: int) -> None:
    """ValueError if the checkpoint is not one of a run of so many steps: it is beyond them, or its codes are frozen
    already, but are to be trained."""
    state = read_checkpoint(checkpoint)
    if steps < state["global_step"]:
        name = "max_steps" if args.max_steps > 0 else "num_train_epochs"
        asked = f"--{name} {getattr(args, name):g}"
        raise ValueError(f"{checkpoint}: is beyond {asked}; choose another --output_dir to start anew")
    before = state.get("max_steps", steps)
    frozen, wanted = (total - round(args.freeze_codes * total) for total in (before, steps))
    if frozen < state["global_step"] < wanted:
        raise ValueError(
            f"{checkpoint}: its codes are frozen since step {frozen} of {before}, and for {steps} steps they would be "
            "trained on; go on from an earlier checkpoint, or choose another --output_dir to start anew"
        )


def checkpoints_to_keep(args, samples: int, first_step: int, there: int) -> int:
    """How many more checkpoints than the `there` that are there will be on the disk at once, of a run that goes on from
    `first_step` on so many samples: all that are to come or, with a limit, one beyond it, for the oldest goes when the
    newest is whole."""
    best = args.save_strategy == "best"  # at evaluations then
    strategy, every = (args.eval_strategy, args.eval_steps) if best else (args.save_strategy, args.save_steps)
    if strategy == "no":
        return 0
    epoch, steps = count_steps(args, samples)
    if strategy == "epoch":
        every = epoch
    elif every < 1:
        every = math.ceil(every * steps)
    to_come, limit = math.ceil((steps - first_step) / every), args.save_total_limit or 0
    return max(0, min(to_come, max(1, limit + 1 - there)) if limit > 0 else to_come)


def check_room(config: dict, data, cache, output: Path, model_args, training_args, first_step: int) -> None:
    """ValueError unless cache, checkpoints and trained model can be written and there is room for all of them."""
    checkpoint, result = disk_needs(config, model_args, training_args, model_args.pack)
    folder = Path(training_args.output_dir)
    count = checkpoints_to_keep(training_args, len(data), first_step, len(list(folder.glob("checkpoint-*"))))
    needs = [(folder, count * checkpoint, "the checkpoints"), (output, result, "the trained model")]
    if cache is not None:
        needs.insert(0, (Path(cache.folder), cache.bytes_to_write(), "the teacher cache"))
    check_disks(needs)


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Within the block OUTPUT_DIR is this job's alone: the first rank takes the lock, then the others join."""
    state, error = PartialState(), None
    with ExitStack() as stack:
        if state.is_main_process:
            try:
                stack.enter_context(locked(folder))
            except ValueError as raised:
                error = raised
        if any(gather_object([error is not None])):
            raise error or SystemExit(1)
        if not state.is_main_process:
            stack.enter_context(locked(folder, join=True))
        yield


def advice(training_args, model_args) -> str:
    """Which flag to change where memory does not suffice for training."""
    if training_args.per_device_train_batch_size > 1:
        return "try a smaller --per_device_train_batch_size with a larger --gradient_accumulation_steps"
    if not training_args.checkpointed:
        return "try --gradient_checkpointing True"
    if model_args.lora_r == 0 and not training_args.fsdp:
        return "try --lora_r 32 --lora_alpha 32, or --fsdp full_shard on several GPUs"
    return "try a smaller --resolution, more GPUs, or run.py --method blockwise"


def saved_so_far() -> str:
    """What Ctrl-C leaves, in words."""
    words = [part for word in sys.argv for part in word.split("=", 1)]
    given = dict(zip(words, words[1:], strict=False))  # of a flag given twice, the last one counts
    folder = Path(given.get("--output_dir", "output"))
    last = get_last_checkpoint(folder) if folder.is_dir() else None
    return f"{last} is saved; the same command goes on from it" if last else "no checkpoint yet; what is cached is kept"


def main() -> None:
    model_args, data_args, training_args = process_args()
    if len(model_args.w_bits) > 1:
        raise ValueError(f"--w_bits {' '.join(map(str, model_args.w_bits))}: train.py trains one bit width at a time")
    name = training_args.optim.value
    if name not in OPTIMIZERS:
        raise ValueError(f"--optim {name} is for other trainings; use one of {', '.join(OPTIMIZERS)}")
    library = OPTIMIZERS[name]
    lacking = library is not None and importlib.util.find_spec(library) is None
    if lacking and "bnb" in name:
        log.info("--optim %s needs bitsandbytes, which is not here: using adamw_torch_fused", name)
        training_args.optim = transformers.training_args.OptimizerNames.ADAMW_TORCH_FUSED
    elif lacking:
        raise ValueError(f"--optim {name} needs {library}, which is not here: pip install {library}, or choose another")
    device = training_args.device  # joins the other ranks
    if training_args.fp16 and device.type == "cpu":  # accelerate would train in fp32 without a word
        raise ValueError("--fp16 True needs a GPU; on a CPU train in float32 or with --bf16 True")
    if training_args.fsdp:
        check_fsdp(training_args, model_args.lora_r)
    if training_args.do_train:
        training_args.checkpointed = training_args.gradient_checkpointing
        less = advice(training_args, model_args)
        with alone(Path(training_args.output_dir)), memory_named("the models are loaded", less, device):
            train(model_args, data_args, training_args)
    else:
        source = Teacher(model_args.input_model_filename, pick_dtype(training_args, device))
        train_data, eval_data, _ = get_teacher(source, model_args, data_args, training_args, device)
        if isinstance(train_data, TeacherCache):
            fill(eval_data.joined(train_data), source, training_args)


def fill(cache: TeacherCache, source: Teacher, training_args) -> None:
    size, device = training_args.per_device_eval_batch_size, training_args.device
    smaller = "--per_device_eval_batch_size" if size > 1 else "--resolution"
    with memory_named(f"the teacher draws, {size} a batch", f"try a smaller {smaller}", device):
        fill_cache(cache, source, size, device, training_args.compile_blocks)


def train(model_args, data_args, training_args) -> None:
    checkpoint = find_checkpoint(training_args)
    device, main_process = training_args.device, training_args.process_index == 0  # not one a node
    folder, output = Path(training_args.output_dir), Path(model_args.output_model_local_path)
    owner = str(folder.resolve())
    check_target(output, owner)
    first_step = 0 if checkpoint is None else read_checkpoint(checkpoint)["global_step"]

    # 1. The teacher: its trajectories, cached or to be made on the way.
    source = Teacher(model_args.input_model_filename, pick_dtype(training_args, device))
    if is_quantized(source.config):
        raise ValueError(f"{model_args.input_model_filename}: already quantized; the teacher must be full precision")
    choose_rates(training_args, bool(model_args.lora_r) and not model_args.train_weights, width_of(source.config))
    check_schedule(training_args)
    start = start_folder = None
    if model_args.start_from is not None and (checkpoint is None or (checkpoint / BASE).is_file()):
        start_folder = transformer_folder(Path(from_root(model_args.start_from)))
    if start_folder is not None and checkpoint is None:
        start = load_student(start_folder, torch.float32, w_bits=model_args.w_bits[0])
        check_shapes(start_folder, start.config, model_args.input_model_filename, source, "--input_model_filename")
    train_data, eval_data, window = get_teacher(source, model_args, data_args, training_args, device)
    settings = run_settings(model_args, training_args, train_data.description) | {"shuffle_window": window}
    if checkpoint is not None:
        check_settings(checkpoint, settings)
        check_steps(checkpoint, training_args, count_steps(training_args, len(train_data))[1])
    if window is None:
        cache = eval_data.joined(train_data)
        check_room(source.config, train_data, cache, output, model_args, training_args, first_step)
        fill(cache, source, training_args)
    else:  # the teacher lives in this process and draws for it alone
        check_room(source.config, train_data, None, output, model_args, training_args, first_step)
        training_args.dataloader_num_workers, training_args.dataloader_persistent_workers = 0, False

    # 2. The student. Unless the teacher is needed on the way, nothing of its pipeline is there but the autoencoder.
    watched = bool(training_args.feature_loss or training_args.visit_share)
    if watched:
        source.load("transformer", device=device)
    pipe, teacher = source.pipe, source.pipe.transformer if watched else None
    torch.manual_seed(training_args.seed)  # of the LoRA's start
    # A whole checkpoint holds what was trained in fp32; the pipeline's own weights are no finer than its dtype.
    dtype = pick_dtype(training_args, device)
    load_dtype = torch.float32 if checkpoint is not None and not (checkpoint / BASE).is_file() else dtype
    frozen_dtype = torch.float32 if training_args.fsdp else dtype  # FSDP2 spreads parameters of one dtype
    with memory_named("the student is loaded", advice(training_args, model_args), device):
        student = load_quantized_model(model_args, training_args, checkpoint, model_args.w_bits[0], load_dtype)
        choose_parameters(student, model_args, training_args.clip_learning_rate, frozen_dtype)
        if start is not None:  # now that what is trained is in fp32
            student.start_from(start)
        student.to(device)
    del start
    base = describe_base(student, model_args.input_model_filename, start_folder)
    if training_args.gradient_checkpointing or getattr(training_args, "activation_checkpointing", False):
        student.enable_gradient_checkpointing()  # diffusers' own; Trainer would look for transformers'
        training_args.gradient_checkpointing = training_args.activation_checkpointing = False
    compiled = training_args.compile_blocks
    if compiled is None:
        compiled = device.type == "cuda" and student.num_parameters() >= LARGE
    if compiled:
        compile_blocks(student, spread=bool(training_args.fsdp))
        if teacher is not None:
            compile_blocks(teacher)
    eval_pipe = with_transformer(pipe, student)
    eval_pipe.vae.to(device)
    packed = model_args.w_bits[0] < FULL_PRECISION_BITS and is_packed(student, model_args.pack)

    # 3. Training.
    torch.backends.cuda.enable_cudnn_sdp(False)  # its backward fails for tiny-flux's shapes (torch 2.11, H100)
    with memory_named("training is set up", advice(training_args, model_args), device):
        trainer = FluxQATTrainer(
            student, training_args, train_data, eval_data, eval_pipe, settings,
            num_images=min(data_args.num_images, len(eval_data.prompts)),
            num_final_images=min(data_args.num_final_images or data_args.num_images, len(eval_data.prompts)),
            window=window, teacher=teacher, base=base,
        )  # fmt: skip
    if main_process:
        trained = sum(p.numel() for p in trainer.trained())
        log.info(
            "%s: training %s of %s parameters", settings_line(settings), f"{trained:,}", f"{student.num_parameters():,}"
        )
        if checkpoint is not None:
            log.info("going on from %s (another --output_dir starts anew)", checkpoint)
        restore_metrics(folder, checkpoint)
        restore_pictures(folder / "eval", first_step if checkpoint else -1, eval_data.prompts[: data_args.num_images])
    if checkpoint is not None:
        training_args.eval_on_start = False
    with memory_named(trainer.what_is_done, advice(training_args, model_args), device):
        result = trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        seconds = result.metrics["train_runtime"] - trainer.aside
        history = trainer.state.log_history
        if not any(line.get("step") == result.global_step and "eval_nmse" in line for line in history):
            trainer.evaluate()
        # 4. The result.
        with trainer.averaged_weights(), whole_folder(output, owner) if main_process else nullcontext() as partial:
            trainer.save_result(partial, packed=packed, dtype=dtype)
    if main_process:
        earlier = read_json(folder / "summary.json") if (folder / "summary.json").is_file() else {}
        summary = summarize(trainer, seconds, result.global_step - first_step, earlier)
        write_json(folder / "summary.json", summary)
        save_curves(folder)
        print_summary(summary)
        log.info("pictures: %s; curves: %s", *(folder / name for name in ("eval/steps.png", "curves.png")))
        log.info("student: %s", output)


if __name__ == "__main__":
    run_script(main, saved_so_far)
