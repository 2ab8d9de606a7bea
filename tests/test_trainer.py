"""utils/trainer.py: what is trained, by which loss and steps, how it is judged, kept and stopped.

A random FLUX pipeline teaches a quantized copy of itself. References: a plain AdamW loop, stock diffusers pictures and
velocities, and formulas written out here.
"""

import importlib.util
import json
import math
import weakref
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import accelerate
import diffusers
import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from models import trained as trained_files
from models.modeling_flux_quant import FluxTransformer2DModel, QuantizeLinear
from models.utils_quant import quantize_codes
from utils import scenes, trainer
from utils.datautils import TeacherCache, Trajectories, fill_cache
from utils.folders import whole_folder
from utils.process_args import process_args
from utils.teacher import Teacher, TeacherSettings
from utils.trainer import FluxQATTrainer, choose_parameters, parameter_groups

SIZE, GUIDANCE, TRAIN_STEPS, EVAL_STEPS, EVAL_SEED = 64, 3.5, 3, 4, 70
FLAGS = """
--device cpu --bf16 False --early_share 0.8 --loss_power 1 --freeze_codes 0 --max_steps 2
--per_device_train_batch_size 2 --per_device_eval_batch_size 2 --learning_rate 1e-3
--lr_scheduler_type constant --warmup_steps 0 --eval_strategy no --eval_on_start False
--save_strategy no --logging_steps 1 --disable_tqdm True --report_to none
"""


# Moments in 8 or 4 bits: of matrices of 4,096 and more numbers, which the random pipeline's larger ones are.
EIGHT_BITS = {
    "adamw_torch_8bit": "torchao", "adamw_torch_4bit": "torchao", "adamw_bnb_8bit": "bitsandbytes",
    "lion_8bit": "bitsandbytes", "ademamix_8bit": "bitsandbytes", "rmsprop_bnb": "bitsandbytes",
}  # fmt: skip


def needs(library: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(importlib.util.find_spec(library) is None, reason=f"needs {library}")


@pytest.fixture(scope="module")
def pipe(pipeline_folder) -> diffusers.FluxPipeline:
    pipe = diffusers.FluxPipeline.from_pretrained(pipeline_folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def data(pipeline_folder, tmp_path_factory) -> SimpleNamespace:
    """Teacher caches: three prompts of three steps to train on, three of four steps held out."""
    teacher = Teacher(str(pipeline_folder), torch.float32)

    def filled(prompts: list[str], steps: int, seed: int) -> TeacherCache:
        manifest = teacher.describe(TeacherSettings(SIZE, steps, GUIDANCE))
        cache = TeacherCache(tmp_path_factory.mktemp("cache"), manifest, prompts, range(seed, seed + len(prompts)))
        fill_cache(cache, teacher, 3, torch.device("cpu"))
        return cache

    return SimpleNamespace(
        train=filled(scenes.train_prompts(3), TRAIN_STEPS, 7),
        eval=filled(scenes.eval_prompts(3), EVAL_STEPS, EVAL_SEED),
    )


class Samples(Trajectories):
    """The samples of a teacher cache; remembers which were asked for and can spoil one of them."""

    def __init__(self, cache: Trajectories, poisoned: int | None = None, name: str = "velocity"):
        super().__init__(cache.description)
        self.cache, self.poisoned, self.name = cache, poisoned, name
        self.asked: list[int] = []

    def trajectory(self, index: int) -> dict[str, Tensor]:
        return self.cache.trajectory(index)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        self.asked.append(index)
        sample = super().__getitem__(index)
        if len(self.asked) - 1 == self.poisoned:
            sample[self.name] = sample[self.name] * float("nan")
        return sample


class Recorder(transformers.TrainerCallback):
    """The trained parameters by name at the start (index 0) and after every step; `at` is called before its steps."""

    def __init__(self, model):
        self.model, self.at = model, {}
        self.weights = [trained(model)]

    def on_step_begin(self, args, state, control, **kwargs):
        self.at.get(state.global_step + 1, lambda: None)()

    def on_step_end(self, args, state, control, **kwargs):
        self.weights.append(trained(self.model))


def trained(model) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.fixture
def make(pipe, pipeline_folder, data, tmp_path):
    """make("--w_bits", 2, …) is a trainer that writes to tmp_path / "out"; `recorder` remembers its weights."""

    def make(*flags, samples=None, checkpoint=None, settings=None):
        command = [*FLAGS.split(), "--output_dir", tmp_path / "out", *flags]
        model_args, _, args = process_args([str(part) for part in command])
        torch.manual_seed(0)  # of the LoRA
        student = load(checkpoint) if checkpoint else load_student(pipeline_folder, model_args)
        frozen_dtype = torch.bfloat16 if args.bf16 else torch.float32
        choose_parameters(student, model_args, args.clip_learning_rate, frozen_dtype)
        eval_pipe = diffusers.FluxPipeline(**{**pipe.components, "transformer": student})
        teacher = load(pipeline_folder / "transformer") if args.feature_loss or args.visit_share else None
        made = FluxQATTrainer(
            student, args, samples or data.train, data.eval, eval_pipe, settings or {}, num_images=2,
            num_final_images=3, teacher=teacher,
        )  # fmt: skip
        made.recorder = Recorder(student)
        made.add_callback(made.recorder)
        return made

    return make


def load(folder: Path, **settings) -> FluxTransformer2DModel:
    return FluxTransformer2DModel.from_pretrained(folder, **settings)


def load_student(pipeline_folder, model_args) -> FluxTransformer2DModel:
    lora = {"lora_r": model_args.lora_r, "lora_alpha": model_args.lora_alpha}
    return load(pipeline_folder, subfolder="transformer", w_bits=model_args.w_bits[0], **lora)


def by_kind(model) -> dict[str, set[str]]:
    """Names of the parameters, sorted by what the name alone tells: in the blocks, every matrix is quantized."""
    kinds = {"weight": set(), "alpha": set(), "lora": set(), "other": set()}
    for name, parameter in model.named_parameters():
        last = name.rpartition(".")[2]
        in_blocks = name.startswith(("transformer_blocks.", "single_transformer_blocks."))
        matrix = in_blocks and last == "weight" and parameter.ndim == 2
        special = {"weight_clip_val": "alpha", "lora_A": "lora", "lora_B": "lora"}
        kinds["weight" if matrix else special.get(last, "other")].add(name)
    return kinds


def batch_of(samples: Trajectories, numbers) -> dict[str, Tensor]:
    """Samples stacked by hand, float32, position ids once."""
    parts = [samples[number] for number in numbers]
    return {
        name: parts[0][name] if name.endswith("_ids") else torch.stack([part[name] for part in parts]).float()
        for name in parts[0]
    }


def distance(first: dict[str, Tensor], second: dict[str, Tensor]) -> float:
    assert first.keys() == second.keys()
    return sum((first[name].double() - second[name].double()).square().sum() for name in first).sqrt().item()


# ------------------------------------------------------------------------------------------------ what is trained


@pytest.mark.parametrize(
    ("flags", "kinds"),
    [
        ([], {"weight", "alpha", "other"}),
        (["--lora_r", 2], {"lora", "alpha", "other"}),
        (["--lora_r", 2, "--train_weights", True], {"weight", "lora", "alpha", "other"}),
        (["--train_unquantized", False], {"weight", "alpha"}),
        (["--clip_learning_rate", 0], {"weight", "other"}),
        (["--clip_learning_rate", 1e-5, "--train_weights", False, "--train_unquantized", False], {"alpha"}),
        (["--lora_r", 2, "--clip_learning_rate", 0, "--train_unquantized", False], {"lora"}),
        (["--train_weights", False, "--clip_learning_rate", 0], {"other"}),
    ],
)
def test_gradients_flow_to_exactly_what_the_flags_ask_for(flags, kinds, make, data):
    """In mixed precision, as on a GPU: what is trained is fp32, what is frozen bf16, but never α or LoRA."""
    made = make(*flags, "--bf16", True)
    names, parameters = by_kind(made.model), dict(made.model.named_parameters())
    with torch.no_grad():
        for name in names["lora"]:  # B starts at zero, and nothing would flow to A
            parameters[name].normal_(std=0.1)
    with made.accelerator.autocast():
        made.compute_loss(made.model, batch_of(data.train, range(4))).backward()

    expected = set().union(*(names[kind] for kind in kinds))
    assert {name for name, p in parameters.items() if p.grad is not None} == expected
    assert {name for name, p in parameters.items() if p.grad is not None and p.grad.any()} == expected
    fp32 = expected | names["alpha"] | names["lora"]
    assert {name for name, p in parameters.items() if p.dtype == torch.float32} == fp32
    assert {p.dtype for name, p in parameters.items() if name not in fp32} <= {torch.bfloat16}


def test_nothing_to_train_is_an_error(make):
    with pytest.raises(ValueError, match="nothing to train: allow --train_weights, --lora_r, --train_unquantized"):
        make("--train_weights", False, "--train_unquantized", False, "--clip_learning_rate", 0)


@pytest.mark.parametrize(("clip_learning_rate", "expected"), [(None, {}), (3e-5, {"lr": 3e-5})])
def test_every_trained_parameter_is_in_one_group_and_only_matrices_decay(clip_learning_rate, expected, make):
    model = make("--lora_r", 2, "--train_weights", True).model
    model.proj_out.bias.requires_grad_(False)
    groups = parameter_groups(model, 0.1, clip_learning_rate)
    grouped = [id(p) for group in groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    settings = {id(p): {k: v for k, v in group.items() if k != "params"} for group in groups for p in group["params"]}
    kinds = by_kind(model)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if name in kinds["alpha"]:
            assert settings[id(parameter)] == {"weight_decay": 0.0} | expected, name
        else:
            assert settings[id(parameter)] == {"weight_decay": 0.1 if parameter.ndim == 2 else 0.0}, name


def test_a_rate_can_be_a_share_of_each_layers_step_size(make):
    made = make("--rate_share", 0.01, "--weight_decay", 0.1)
    groups = {id(p): group for group in made.create_optimizer().param_groups for p in group["params"]}
    assert sorted(groups) == sorted(id(p) for p in made.trained())
    rates = set()
    for name, layer in made.model.named_modules():
        if isinstance(layer, QuantizeLinear):
            rates.add(groups[id(layer.weight)]["lr"])
            for parameter, decay in ((layer.weight, 0.1), (layer.weight_clip_val, 0.0)):
                group = groups[id(parameter)]
                assert group["lr"] == pytest.approx(0.01 * layer.weight_clip_val.mean().item()), name
                assert group["weight_decay"] == decay
    assert len(rates) > 1
    assert groups[id(made.model.proj_out.weight)]["lr"] == 1e-3


def test_the_order_of_the_samples_may_have_a_seed_of_its_own(make):
    usual, same, other = (list(make(*flags).sampler) for flags in ([], ["--data_seed", 42], ["--data_seed", 43]))
    assert usual == same != other


# -------------------------------------------------------------------------------------------------------- the loss


def random_batch() -> dict[str, Tensor]:
    """Two samples of numbers that no teacher made: 16 image and 5 text tokens."""
    torch.manual_seed(1)
    ids = torch.zeros(16, 3)
    ids[:, 1], ids[:, 2] = torch.arange(16) // 4, torch.arange(16) % 4
    return {
        "hidden_states": torch.randn(2, 16, 16), "encoder_hidden_states": torch.randn(2, 5, 32),
        "pooled_projections": torch.randn(2, 32), "timestep": torch.tensor([0.9, 0.2]), "img_ids": ids,
        "txt_ids": torch.zeros(5, 3), "guidance": torch.tensor([3.5, 1.0]), "velocity": torch.randn(2, 16, 16),
    }  # fmt: skip


@torch.no_grad()
def image_tokens_of_blocks(model, inputs) -> list[Tensor]:
    """What each block puts out for the image (the second of its outputs), float64."""
    kept = []
    hooks = [
        block.register_forward_hook(lambda module, args, output: kept.append(output[1].double()))
        for block in [*model.transformer_blocks, *model.single_transformer_blocks]
    ]
    model(**inputs)
    for hook in hooks:
        hook.remove()
    return kept


@pytest.mark.parametrize("weight", [0, 0.7])
def test_the_loss_is_the_mean_squared_error_of_the_velocity_and_of_the_blocks(weight, make, pipe):
    made, batch = make("--feature_loss", weight), random_batch()
    loss = made.compute_loss(made.model, batch)

    inputs = {name: tensor for name, tensor in batch.items() if name != "velocity"}
    with torch.no_grad():
        velocity = made.model(**inputs).sample
    expected = (velocity.double() - batch["velocity"].double()).square().mean()
    if weight:
        student, teacher = (image_tokens_of_blocks(model, inputs) for model in (made.model, pipe.transformer))
        assert len(student) == len(teacher) == 2
        errors = [(s - t).square().mean() / t.square().mean() for s, t in zip(student, teacher, strict=True)]
        expected += weight * sum(errors) / len(errors)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert loss.dtype == torch.float32


def test_the_weight_of_the_blocks_falls_to_nothing_over_the_steps(make):
    made, weights = make("--feature_loss", 0.8, "--max_steps", 4), []
    weigh = made.feature_weight
    made.feature_weight = lambda: weights.append(weigh()) or weights[-1]
    made.train()
    assert weights == pytest.approx([0.8, 0.6, 0.4, 0.2])


def test_gradient_checkpointing_changes_no_gradient(make):
    """Blocks are run again in the backward pass then, and so are the hooks that feature_loss reads."""
    gradients = []
    for checkpointing in (False, True):
        made = make("--feature_loss", 0.7)
        if checkpointing:
            made.model.enable_gradient_checkpointing()
        made.model.train()
        made.compute_loss(made.model, random_batch()).backward()
        gradients.append({name: p.grad for name, p in made.model.named_parameters()})
    zeros = {name: torch.zeros_like(gradient) for name, gradient in gradients[0].items()}
    assert distance(*gradients) < 1e-6 * distance(gradients[0], zeros)


def test_feature_loss_without_the_teacher_is_an_error(make):
    plain = make()
    plain.args.feature_loss = 0.5
    with pytest.raises(ValueError, match="feature_loss needs the teacher"):
        FluxQATTrainer(plain.model, plain.args, plain.train_dataset, plain.eval_dataset, plain.eval_pipe, {}, 1, 1)


# ------------------------------------------------------------------------------------------------------- the steps


@pytest.mark.parametrize("power", [0.5, 0.25])
def test_loss_power_is_applied_to_each_sample(power, make):
    made, batch = make("--loss_power", power), random_batch()
    loss = made.compute_loss(made.model, batch)
    with torch.no_grad():
        velocity = made.model(**{name: tensor for name, tensor in batch.items() if name != "velocity"}).sample
    errors = (velocity.double() - batch["velocity"].double()).square().flatten(1).mean(1)
    assert loss.item() == pytest.approx(sum(e.item() ** power for e in errors) / len(errors), rel=1e-5)


def test_a_sample_without_error_has_a_gradient_whatever_the_power(make):
    made, batch = make("--loss_power", 0.25), random_batch()
    with torch.no_grad():
        batch["velocity"] = made.model(**{n: t for n, t in batch.items() if n != "velocity"}).sample
    batch["velocity"][1:] += 1  # the first sample is met exactly
    made.compute_loss(made.model, batch).backward()
    assert all(p.grad.isfinite().all() for p in made.trained())
    assert any(p.grad.any() for p in made.trained())


def adamw_loop(model, samples: Trajectories, batches, size, learning_rate, clip_learning_rate, weight_decay, eps):
    """Quantization-aware training in its plainest form; the losses, and the gradient's norms before clipping.

    The mean over a batch is summed from parts of `size` samples: in fp32 another order is another gradient.
    """
    kinds = by_kind(model)
    parameters = {name: p.requires_grad_() for name, p in model.named_parameters()}
    alphas = [parameters.pop(name) for name in kinds["alpha"]]
    optimizer = torch.optim.AdamW(
        [
            {"params": alphas, "lr": clip_learning_rate, "weight_decay": 0.0},
            {"params": [p for p in parameters.values() if p.ndim == 2], "weight_decay": weight_decay},
            {"params": [p for p in parameters.values() if p.ndim == 1], "weight_decay": 0.0},
        ],
        lr=learning_rate,
        betas=(0.9, 0.95),
        eps=eps,
    )
    losses, norms = [], []
    for numbers in batches:
        losses.append(0.0)
        for start in range(0, len(numbers), size):
            part = numbers[start : start + size]
            inputs = batch_of(samples, part)
            target = inputs.pop("velocity")
            loss = (model(**inputs).sample - target).square().mean() * len(part) / len(numbers)
            loss.backward()
            losses[-1] += loss.item()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item())
        optimizer.step()
        optimizer.zero_grad()
    return losses, norms


@pytest.mark.parametrize(("batch", "accumulation"), [(4, 1), (2, 2), (1, 4)])
def test_training_is_a_plain_adamw_loop_whatever_the_accumulation(batch, accumulation, make, data, pipeline_folder):
    """Two epochs of nine samples in batches of four, four and one.

    ε is large because Adam divides by the size of the gradient: of one that nearly vanishes, it is noise that counts.
    """
    samples = Samples(data.train)
    made = make(
        "--per_device_train_batch_size", batch, "--gradient_accumulation_steps", accumulation, "--max_steps", 6,
        "--clip_learning_rate", 3e-4, "--weight_decay", 0.1, "--adam_epsilon", 1e-4, samples=samples,
    )  # fmt: skip
    made.train()
    assert len(samples.asked) == 18
    batches = [samples.asked[start : min(start + 4, end)] for end in (9, 18) for start in range(end - 9, end, 4)]
    assert [len(numbers) for numbers in batches] == [4, 4, 1] * 2

    reference = load(pipeline_folder, subfolder="transformer", w_bits=0)
    losses, norms = adamw_loop(reference, data.train, batches, batch, 1e-3, 3e-4, 0.1, 1e-4)
    lines = [line for line in made.state.log_history if "loss" in line]
    assert [line["loss"] for line in lines] == pytest.approx(losses, rel=1e-4)
    assert [line["grad_norm"] for line in lines] == pytest.approx(norms, rel=1e-4)
    start, end = made.recorder.weights[0], made.recorder.weights[-1]
    assert distance(trained(reference), end) < 1e-5 * distance(start, end)


def test_every_epoch_is_complete_and_in_another_order_with_prompts_and_steps_mixed(make, data):
    samples = Samples(data.train)
    make("--max_steps", 15, "--early_share", 0.25, samples=samples).train()  # five batches an epoch: 2, 2, 2, 2, 1
    epochs = [tuple(samples.asked[start : start + 9]) for start in (0, 9, 18)]
    assert len(samples.asked) == 27 and all(sorted(epoch) == list(range(9)) for epoch in epochs)
    assert len({*epochs, tuple(range(9))}) == 4
    for epoch in epochs:
        prompts, steps = zip(*(divmod(number, TRAIN_STEPS) for number in epoch), strict=True)
        for kind in (prompts, steps):  # neither prompt by prompt nor step by step
            assert sum(a != b for a, b in zip(kind, kind[1:], strict=False)) > 2


@pytest.mark.parametrize("flags", [["--w_bits", bits] for bits in (0, 1, 2, 3, 4, 8)] + [["--lora_r", 2]])
def test_every_bit_width_trains(flags, make):
    made = make(*flags)
    made.train()
    losses = [line["loss"] for line in made.state.log_history if "loss" in line]
    assert len(losses) == 2 and np.isfinite(losses).all()
    start, end = made.recorder.weights[0], made.recorder.weights[-1]
    assert not [name for name in start if torch.equal(start[name], end[name]) and "lora_A" not in name]
    # The first step moves B, which starts at zero; only from then on a gradient reaches A.
    assert not [name for name in start if "lora_A" in name and torch.equal(start[name], end[name])]


# --------------------------------------------------------------------------------------------------------- average


def average_by_hand(weights: list[dict[str, Tensor]], decay: float) -> list[dict[str, Tensor]]:
    """a_k = a_{k−1} + f·(w_k − a_{k−1}), f = max(1 − decay, 9/(10 + k)), in Python's own floats."""
    averages = [{name: tensor.double().numpy() for name, tensor in weights[0].items()}]
    for step, current in enumerate(weights[1:], start=1):
        fresh = max(1 - decay, 9 / (10 + step))
        last = averages[-1]
        averages.append({name: last[name] + fresh * (current[name].double().numpy() - last[name]) for name in last})
    return [{name: torch.from_numpy(array) for name, array in average.items()} for average in averages]


def test_the_average_is_what_is_saved_and_judged_and_training_does_not_notice(make, tmp_path, data):
    """With decay 0.3 the share of the newest weights is 9/11, 9/12, then 0.7."""
    plain = make("--max_steps", 4)
    plain.train()
    flags = ["--ema_decay", 0.3, "--save_strategy", "steps", "--save_steps", 1, "--save_total_limit", 4]
    made = make("--max_steps", 4, *flags, "--eval_strategy", "steps", "--eval_steps", 2)
    made.train()

    weights = made.recorder.weights
    for step, expected in enumerate(plain.recorder.weights):
        assert distance(weights[step], expected) == 0
    averages = average_by_hand(weights, 0.3)
    moved = distance(weights[0], weights[4])
    assert distance(averages[4], weights[4]) > 0.01 * moved
    names = list(weights[0])
    for step in range(1, 5):
        folder = tmp_path / "out" / f"checkpoint-{step}"
        saved = load_file(folder / "diffusion_pytorch_model.safetensors")
        assert distance({name: saved[name] for name in names}, averages[step]) < 1e-5 * moved
        state = load_file(folder / "training_state.safetensors")
        current = {name: state[f"weights.{i}"] for i, name in enumerate(names)}
        assert distance(current, weights[step]) == 0
        if step in (2, 4):
            logged = next(line for line in made.state.log_history if line["step"] == step and "eval_loss" in line)
            prompts = 2 if step == 2 else 3
            assert logged["eval_loss"] == pytest.approx(velocity_error(load(folder), data.eval, prompts), rel=1e-5)

    assert distance(trained(made.model), weights[4]) == 0
    made.evaluate()
    assert distance(trained(made.model), weights[4]) == 0
    with made.averaged_weights():
        assert distance(trained(made.model), averages[4]) < 1e-5 * moved
    assert distance(trained(made.model), weights[4]) == 0
    assert made.model.training


@torch.no_grad()
def velocity_error(model, samples: Trajectories, prompts: int) -> float:
    inputs = batch_of(samples, range(prompts * samples.steps))
    target = inputs.pop("velocity").double()
    return (model(**inputs).sample.double() - target).square().mean().item()


# ------------------------------------------------------------------------------------------------------ evaluation


def draw(pipe) -> np.ndarray:
    """Pictures [3, H, W, 3] of the held-out prompts, one by one, by diffusers' own pipeline."""
    return np.concatenate(
        [
            pipe(
                prompt, height=SIZE, width=SIZE, num_inference_steps=EVAL_STEPS, guidance_scale=GUIDANCE,
                max_sequence_length=24, generator=torch.Generator().manual_seed(EVAL_SEED + i), output_type="np",
            ).images
            for i, prompt in enumerate(scenes.eval_prompts(3))
        ]
    )  # fmt: skip


@pytest.fixture(scope="module")
def stock(pipe) -> SimpleNamespace:
    """The teacher as diffusers runs it: pictures, and (inputs, velocity) of every call, prompt by prompt."""
    calls = []
    hook = pipe.transformer.register_forward_hook(
        lambda module, args, kwargs, output: calls.append((kwargs, output[0])), with_kwargs=True
    )
    pictures = draw(pipe)
    hook.remove()
    return SimpleNamespace(pictures=pictures, calls=calls)


def test_a_best_metric_that_is_not_measured_is_named(make):
    made = make("--metric_for_best_model", "beauty")
    with pytest.raises(ValueError, match="--metric_for_best_model beauty: not measured here; choose one of loss, nmse"):
        made.evaluate()


@pytest.mark.parametrize(("step", "count"), [(1, 2), (2, 3)], ids=["on the way", "at the end"])
def test_evaluation_measures_velocity_and_pictures_against_stock_diffusers(step, count, make, pipe, stock, tmp_path):
    """Four steps in thirds are two, one and one."""
    made = make()
    made.state.global_step, made.state.max_steps = step, 2
    metrics = made.evaluate()

    error, energy = np.zeros((3, EVAL_STEPS)), np.zeros((3, EVAL_STEPS))
    elements = 0
    with torch.no_grad():
        for number, (inputs, velocity) in enumerate(stock.calls[: count * EVAL_STEPS]):
            difference = made.model(**inputs)[0].double() - velocity.double()
            where = divmod(number, EVAL_STEPS)
            error[where], energy[where] = difference.square().sum(), velocity.double().square().sum()
            elements += velocity.numel()
    assert metrics["eval_loss"] == pytest.approx(error.sum() / elements, rel=1e-4)
    assert metrics["eval_nmse"] == pytest.approx(error.sum() / energy.sum(), rel=1e-4)
    for third, steps in (("early", slice(0, 2)), ("middle", slice(2, 3)), ("late", slice(3, 4))):
        expected = error[:, steps].sum() / energy[:, steps].sum()
        assert metrics[f"eval_nmse_{third}"] == pytest.approx(expected, rel=1e-4)

    pictures = draw(diffusers.FluxPipeline(**{**pipe.components, "transformer": made.model}))
    errors = np.square(pictures.astype(np.float64) - stock.pictures)[:count].mean(axis=(1, 2, 3))
    assert metrics["eval_psnr"] == pytest.approx(np.mean(-10 * np.log10(errors)), rel=1e-4)
    for name, expected in (("teacher", stock.pictures), (f"step_{step}", pictures)):
        files = sorted((tmp_path / "out/eval" / name).iterdir())
        assert [file.name for file in files] == ["sample_000.png", "sample_001.png"]  # num_images of them are kept
        for file, picture in zip(files, expected, strict=False):
            assert abs(np.asarray(Image.open(file)).astype(float) - 255 * picture).max() <= 0.6
    assert json.loads((tmp_path / "out/metrics.jsonl").read_text()) == {"step": step} | metrics


# ------------------------------------------------------------------------------------------------------- stopping


KEEP = ["--max_steps", 4, "--save_strategy", "steps", "--save_steps", 1]
LAYER = "transformer_blocks.0.attn.to_q"


def spoil(made, how: str):
    """In place: NaN in one weight, or in one gradient from now on."""
    weight = made.model.get_submodule(LAYER).weight
    if "weight" in how:
        with torch.no_grad():
            weight[1, 2] = float("nan")
    else:
        weight.register_hook(lambda gradient: gradient * float("nan"))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("weight", rf"step 3: the loss is nan; first non-finite value in {LAYER};"),
        ("frozen weight", rf"step 3: the loss is nan; first non-finite value in {LAYER};"),
        ("gradient", rf"step 3: the gradient's norm is nan; first non-finite value in {LAYER}.weight;"),
        ("velocity", "step 3: the loss is nan; first non-finite value in the input velocity;"),
        ("hidden_states", "step 3: the loss is nan; first non-finite value in the input hidden_states;"),
    ],
)
def test_nan_stops_training_and_says_where_it_came_from(how, message, make, data, tmp_path):
    in_sample = how in ("velocity", "hidden_states")
    frozen = ["--lora_r", 2, "--bf16", True] if how == "frozen weight" else []
    made = make(*KEEP, *frozen, samples=Samples(data.train, poisoned=5 if in_sample else None, name=how))
    if not in_sample:
        made.recorder.at[3] = lambda: spoil(made, how)
    with pytest.raises(ValueError, match=message + r" .*--learning_rate; the last good checkpoint is .*checkpoint-2$"):
        made.train()
    kept = dict(load(tmp_path / "out/checkpoint-2").named_parameters())
    assert distance({name: kept[name] for name in made.recorder.weights[2]}, made.recorder.weights[2]) == 0
    assert not (tmp_path / "out/checkpoint-3").exists()


def test_nan_before_the_first_checkpoint_names_none(make, tmp_path):
    """Not even what a killed run left half written."""
    (tmp_path / "out/checkpoint-9.tmp").mkdir(parents=True)
    made = make()
    spoil(made, "weight")
    with pytest.raises(ValueError, match="step 1: the loss is nan; .*the last good checkpoint is none yet$"):
        made.train()


# ----------------------------------------------------------------------------------------------------- checkpoints


def test_checkpoints_hold_safetensors_and_json_only_and_the_last_ones_are_kept(make, tmp_path):
    settings = {"w_bits": 0, "seed": 42}
    made = make(*KEEP, "--save_total_limit", 2, settings=settings)
    made.train()
    assert sorted(path.name for path in (tmp_path / "out").glob("check*")) == ["checkpoint-3", "checkpoint-4"]
    for step in (3, 4):
        folder = tmp_path / "out" / f"checkpoint-{step}"
        assert sorted(file.name for file in folder.iterdir()) == [
            ".flux158.json", "config.json", "diffusion_pytorch_model.safetensors", "settings.json",
            "trainer_state.json", "training_state.safetensors",
        ]  # fmt: skip
        assert json.loads((folder / "settings.json").read_text()) == settings
        assert json.loads((folder / "trainer_state.json").read_text())["global_step"] == step
        model = load(folder)
        assert model.config.w_bits == 0
        assert distance(dict(model.named_parameters()), made.recorder.weights[step]) == 0


def test_a_checkpoint_that_cannot_be_written_whole_is_not_there(make, tmp_path, monkeypatch):
    def save_file(*args):
        raise OSError("No space left on device")

    made = make(*KEEP)
    made.recorder.at[3] = lambda: monkeypatch.setattr(trained_files, "save_file", save_file)
    with pytest.raises(ValueError, match="checkpoint-3: No space left on device; make room"):
        made.train()
    assert sorted(path.name for path in (tmp_path / "out").glob("check*")) == ["checkpoint-1", "checkpoint-2"]
    load(tmp_path / "out/checkpoint-2")


@pytest.mark.parametrize(
    "flags",
    [
        ["--optim", "adamw_torch_fused", "--ema_decay", 0.5],
        ["--optim", "adamw_torch", "--lora_r", 2, "--clip_learning_rate", 1e-4, "--bf16", True],
        ["--optim", "adafactor"],
        ["--optim", "sgd"],
        ["--optim", "adamw_torch", "--freeze_codes", 0.6],
        ["--optim", "adamw_torch", "--vote_codes", 0.5, "--freeze_codes", 0.1],
        ["--optim", "adamw_torch", "--visit_share", 0.8],
        *(pytest.param(["--optim", name], marks=needs(library)) for name, library in EIGHT_BITS.items()),
    ],
    ids=lambda flags: f"{flags[1]} {' '.join(str(flag) for flag in flags[2::2])}",
)
def test_a_resumed_run_ends_where_an_undisturbed_one_does(flags, make, data, tmp_path):
    """Resumed in the middle of the second epoch, learning rate still moving."""
    schedule = ["--max_steps", 12, "--lr_scheduler_type", "cosine", "--warmup_steps", 3]
    schedule += ["--save_strategy", "steps", "--save_steps", 7, "--save_total_limit", 9]
    whole, resumed = Samples(data.train), Samples(data.train)
    undisturbed = make(*flags, *schedule, samples=whole)
    undisturbed.train()
    checkpoint = tmp_path / "out/checkpoint-7"
    again = make(*flags, *schedule, samples=resumed, checkpoint=checkpoint)
    again.train(resume_from_checkpoint=str(checkpoint))

    if "--visit_share" not in flags:  # whose pictures ask for samples too
        assert resumed.asked == whole.asked[13:]  # the seventh batch was number two of the second epoch: 9 + 4 samples
    assert len(again.recorder.weights) == 1 + 5
    # A checkpoint holds weights that quantize to the frozen codes, not those that did when they were frozen.
    left_out = by_kind(again.model)["weight"] if "--freeze_codes" in flags else set()

    def kept(weights):
        return {name: weight for name, weight in weights.items() if name not in left_out}

    moved = distance(kept(undisturbed.recorder.weights[7]), kept(undisturbed.recorder.weights[12]))
    for step in range(8, 13):
        ours, theirs = undisturbed.recorder.weights[step], again.recorder.weights[step - 7]
        assert distance(kept(ours), kept(theirs)) < 1e-6 * moved
    with undisturbed.averaged_weights(), again.averaged_weights():
        assert distance(kept(trained(undisturbed.model)), kept(trained(again.model))) < 1e-6 * moved
        codes = all_codes(again.model)
        assert all(torch.equal(codes[name], found) for name, found in all_codes(undisturbed.model).items())


def test_a_resumed_rank_keeps_to_the_order_of_its_epoch(make, data, tmp_path, monkeypatch):
    """As the second of two ranks: what skips its batches lies around what shares them out, too deep for accelerate to
    tell the sampler which epoch it is."""
    alone = accelerate.accelerator.prepare_data_loader
    two = {"num_processes": 2, "process_index": 1}
    monkeypatch.setattr(accelerate.accelerator, "prepare_data_loader", lambda *a, **k: alone(*a, **k | two))
    flags = ["--max_steps", 6, "--save_strategy", "steps", "--save_steps", 5]  # three batches an epoch
    whole, resumed = Samples(data.train), Samples(data.train)
    make(*flags, samples=whole).train()
    checkpoint = tmp_path / "out/checkpoint-5"
    make(*flags, samples=resumed, checkpoint=checkpoint).train(resume_from_checkpoint=str(checkpoint))
    assert len(whole.asked) == 2 * 3 * 2 and resumed.asked == whole.asked[10:]


def test_a_resumed_run_saves_as_its_own_flags_say(make, tmp_path):
    flags = ["--max_steps", 6, "--save_strategy", "steps", "--save_total_limit", 9]
    make(*flags, "--save_steps", 3).train()
    checkpoint = tmp_path / "out/checkpoint-3"
    made = make(*flags, "--save_steps", 1, checkpoint=checkpoint)
    made.train(resume_from_checkpoint=str(checkpoint))
    assert {int(path.name[11:]) for path in (tmp_path / "out").glob("checkpoint-*")} == {3, 4, 5, 6}


def test_a_scale_too_large_for_fp16_leaves_steps_out_and_is_kept_with_the_checkpoint(make, tmp_path):
    flags = ["--fp16", True, "--max_steps", 12, "--save_strategy", "steps", "--save_steps", 4]

    def scaled(checkpoint=None):
        made = make(*flags, checkpoint=checkpoint)
        made.accelerator.native_amp = True  # as on a GPU
        made.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24)
        return made

    made, scales = scaled(), []
    made.recorder.at = {step: lambda: scales.append(made.accelerator.scaler.get_scale()) for step in range(1, 13)}
    made.train()
    scales.append(made.accelerator.scaler.get_scale())
    fell = [after < before for before, after in pairwise(scales)]
    stayed = [distance(before, after) == 0 for before, after in pairwise(made.recorder.weights)]
    assert stayed == fell and 0 < sum(fell) < 12
    checkpoint = tmp_path / "out/checkpoint-8"
    again = scaled(checkpoint)
    again.recorder.at[9] = lambda: scales.append(again.accelerator.scaler.get_scale())
    again.train(resume_from_checkpoint=str(checkpoint))
    assert scales[-1] == scales[8]


@pytest.mark.parametrize(
    ("flags", "ranks", "lora_r", "message"),
    [
        ([], 2, 0, "accelerate spreads weights over GPUs, not over a cpu: leave it out"),
        ([], 1, 0, "several processes, and this is one: leave it out"),
        (["--optim", "adafactor"], 2, 0, "--optim adafactor cannot be spread by --fsdp: use adamw_torch_8bit or"),
        ([], 2, 4, "of a LoRA that is little: leave out --fsdp or --lora_r"),
        (["--visit_share", "0.5"], 2, 0, "--visit_share is for weights that are whole on every GPU"),
        (["--vote_codes", "0.5"], 2, 0, "--vote_codes is for weights that are whole on every GPU"),
        (["--fsdp_config", '{"version": 1}'], 2, 0, "version 1 keeps flat copies of the weights; use version 2"),
        (["--fsdp", "full_shard offload"], 2, 0, "weights stay on the GPUs here; leave out offload"),
        (["--fsdp_config", '{"activation_checkpointing": true}'], 2, 0, "checkpointed by --gradient_checkpointing T"),
    ],
)
def test_what_fsdp2_cannot_spread_is_refused(flags, ranks, lora_r, message, tmp_path):
    if "--fsdp_config" in flags:
        (tmp_path / "fsdp.json").write_text(flags[1])
        flags = ["--fsdp_config", str(tmp_path / "fsdp.json")]
    _, _, args = process_args(["--device", "cpu", "--fsdp", "full_shard", *flags])
    names = ("fsdp_config", "optim", "visit_share", "vote_codes")
    told = SimpleNamespace(**{name: getattr(args, name) for name in names}, world_size=ranks)
    told.device = torch.device("cpu" if "cpu" in message else "cuda")
    with pytest.raises(ValueError, match=message):
        trainer.check_fsdp(told, lora_r)


def test_blocks_are_spread_one_after_the_other(pipe):
    """No whole weight is alive when the next block is spread: all of them and all shares do not fit one GPU."""
    model = FluxTransformer2DModel.from_config(pipe.transformer.config, w_bits=0)
    blocks = [*model.transformer_blocks, *model.single_transformer_blocks]
    whole = [[weakref.ref(parameter) for parameter in block.parameters()] for block in blocks]
    alive = []
    spread = trainer.fully_shard

    def noting(block, **settings) -> None:
        alive.append([any(each() is not None for each in refs) for refs in whole])
        spread(block, **settings)

    plugin = SimpleNamespace(reshard_after_forward=True)
    accelerator = SimpleNamespace(
        state=SimpleNamespace(fsdp_plugin=plugin), gradient_state=SimpleNamespace(plugin_kwargs={}),
        device=torch.device("cpu"),
    )  # fmt: skip
    torch.distributed.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(trainer, "fully_shard", noting)
            trainer.prepare_fsdp(accelerator, model)
        shares = [(p.to_local().numel(), -(-len(p) // 2) * p[0].numel()) for b in blocks for p in b.parameters()]
    finally:
        torch.distributed.destroy_process_group()
    assert alive == [[i >= k for i in range(len(blocks))] for k in range(len(blocks))]
    assert not any(each() is not None for refs in whole for each in refs)
    assert all(own == half for own, half in shares)


# ---------------------------------------------------------------------------------------------------- frozen codes


def all_codes(model) -> dict[str, Tensor]:
    return {
        name: quantize_codes(layer.quantized_weight(), layer.weight_clip_val, layer.w_bits)
        for name, layer in model.named_modules()
        if isinstance(layer, QuantizeLinear)
    }


@pytest.mark.parametrize(
    "flags",
    [["--w_bits", 0], ["--w_bits", 1], ["--w_bits", 4], ["--lora_r", 2, "--lora_alpha", 2]],
    ids=lambda flags: f"{flags[0]} {flags[1]}",
)
def test_frozen_codes_stay_while_the_rest_is_trained(flags, make, tmp_path):
    schedule = ["--max_steps", 4, "--learning_rate", 0.02, *flags]
    free, frozen = make(*schedule), make(*schedule, "--freeze_codes", 0.5)
    codes = {}
    for made in (free, frozen):
        made.recorder.at = {
            step: lambda made=made, step=step: codes.update({step: all_codes(made.model)}) for step in (3, 4)
        }
        made.train()
        assert all(torch.equal(codes[3][name], found) for name, found in codes[4].items()) == (made is frozen)
    wanted = codes[3]
    kinds = by_kind(frozen.model)
    for name, parameter in frozen.recorder.weights[2].items():
        if name.endswith("weight_clip_val") or name.startswith("proj_out."):
            assert not torch.equal(parameter, frozen.recorder.weights[4][name])
        elif name in kinds["weight"] | kinds["lora"]:  # codes are found from them; no momentum moves them on
            assert torch.equal(parameter, frozen.recorder.weights[4][name])
    (tmp_path / "saved").mkdir()
    frozen.save_transformer(tmp_path / "saved")
    packed = load(tmp_path / "saved").pack()
    for name, layer in frozen.model.named_modules():
        if isinstance(layer, QuantizeLinear):
            assert torch.equal(packed.get_submodule(name).codes(), wanted[name])
            torch.testing.assert_close(packed.get_submodule(name).dequantize(), layer.quantized_weight())


def test_frozen_codes_give_the_step_sizes_their_whole_gradient():
    layer = QuantizeLinear(24, 8, w_bits=0)
    layer.freeze_codes()
    levels, slope = quantize_codes(layer.weight, layer.weight_clip_val, 0) * 2 / 3, torch.randn(8, 24)
    (slope * layer.quantized_weight()).sum().backward()
    torch.testing.assert_close(layer.weight_clip_val.grad, (slope * levels).sum(1, keepdim=True))
    assert not layer.weight.grad.any()


def test_frozen_codes_have_a_schedule_of_their_own(make):
    made = make("--max_steps", 10, "--lr_scheduler_type", "linear", "--warmup_steps", 0.2, "--freeze_codes", 0.4)
    made.train()
    rates = [line["learning_rate"] for line in made.state.log_history if "learning_rate" in line]
    assert rates == pytest.approx([0, 5e-4, 1e-3, 7.5e-4, 5e-4, 2.5e-4, 0, 1e-3, 2 / 3e3, 1 / 3e3])


def test_warm_up_takes_the_same_share_of_both_schedules(make):
    """However it is given: three steps of twelve, and one of the last four."""
    for warmup in (3, 0.25):
        made = make("--lr_scheduler_type", "linear", "--warmup_steps", warmup, "--freeze_codes", 1 / 3)
        made.create_optimizer()
        made.create_scheduler(12)
        factors = [made.lr_scheduler.lr_lambdas[0](step) for step in range(8, 12)]
        assert factors == pytest.approx([0, 1, 2 / 3, 1 / 3])


def test_a_least_rate_is_that_of_both_schedules(make):
    flags = ["--lr_scheduler_type", "cosine_with_min_lr", "--lr_scheduler_kwargs", '{"min_lr": 1e-5}']
    made = make("--max_steps", 20, *flags, "--learning_rate", 4e-5, "--freeze_codes", 0.5)
    made.train()
    rates = [line["learning_rate"] for line in made.state.log_history if "learning_rate" in line]
    cosine = [1e-5 + 3e-5 * (1 + math.cos(math.pi * step / 10)) / 2 for step in range(10)]
    assert rates == pytest.approx(2 * cosine)


def test_a_schedule_that_cannot_run_twice_is_named(make):
    made = make("--lr_scheduler_type", "reduce_lr_on_plateau", "--eval_strategy", "steps", "--freeze_codes", 0.5)
    with pytest.raises(
        ValueError, match="--lr_scheduler_type reduce_lr_on_plateau cannot run twice: choose another, or --freeze"
    ):
        made.create_optimizer_and_scheduler(4)


# -------------------------------------------------------------------------------------------------- the last steps


def test_codes_are_frozen_where_they_were_most_of_the_time(make):
    """Against the codes of every step, counted here."""
    made = make("--max_steps", 10, "--learning_rate", 0.02, "--vote_codes", 0.5, "--freeze_codes", 0.2)
    seen = {}
    for step in range(1, 11):
        made.recorder.at[step] = lambda step=step: seen.update({step - 1: all_codes(made.model)})  # after step - 1
    made.train()
    changed = 0
    for name, codes in all_codes(made.model).items():
        votes = torch.stack([seen[step][name] for step in range(4, 9)]).float()  # the last five of the eight
        wanted = votes.mean(0).round().to(torch.int8)
        assert torch.equal(codes, wanted), name
        changed += (wanted != seen[8][name]).sum().item() if name in seen[8] else 0
    assert any(not torch.equal(seen[8][name], seen[7][name]) for name in seen[8])  # codes did flip
    assert not made.votes.sums


def test_a_code_between_two_others_is_not_frozen_where_it_never_was():
    """The mean of -1 and 1 is 0; two neighbours give the one that was there more often."""
    layer = QuantizeLinear(4, 1, w_bits=0, bias=False)
    votes = trainer.Votes()
    with torch.no_grad():
        layer.weight_clip_val.fill_(1.0)
        for weight in ([0.9, 0.9, -0.9, 0.1], [0.9, 0.1, -0.9, 0.1], [0.1, 0.1, -0.9, -0.9]):
            layer.weight.copy_(torch.tensor([weight]))
            votes.count({"layer": layer})
        assert votes.decide({"layer": layer}) == 2 / 4
    assert quantize_codes(layer.weight, layer.weight_clip_val, 0).tolist() == [[1, 0, -1, 0]]
    assert layer.weight[0, 2].item() == pytest.approx(-0.9) and layer.weight_clip_val.item() == 1.0


def test_visited_states_are_those_of_the_students_own_pictures(make, data):
    """Against a loop over diffusers' scheduler, by the student, and the teacher at its states."""
    made = make("--visit_share", 1)
    with torch.no_grad():
        for parameter in made.model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))  # another than the teacher
    student, teacher, device = made.model, made.teacher, torch.device("cpu")
    batch = made.visited.batch(0, student, teacher, device, (made.accelerator.autocast, made.teacher_autocast))
    drawn = made.visited.drawn
    assert batch.keys() == batch_of(data.train, [0]).keys()

    generator = torch.Generator().manual_seed(42 + 1_000_003)
    for row, number in enumerate(torch.randint(3, (2,), generator=generator).tolist()):
        trajectory = data.train.trajectory(number)
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_config(made.eval_pipe.scheduler.config)
        scheduler.set_timesteps(sigmas=trajectory["sigmas"][:-1].tolist(), mu=0.0)
        scheduler.sigmas, scheduler.timesteps = trajectory["sigmas"], trajectory["timesteps"]
        latents = trajectory["noise"].float()[None]
        for step, timestep in enumerate(trajectory["timesteps"]):
            inputs = batch_of(data.train, [number * TRAIN_STEPS])
            inputs |= {"hidden_states": latents, "timestep": timestep[None] / 1000}
            del inputs["velocity"]
            with torch.no_grad():
                torch.testing.assert_close(drawn["hidden_states"][step, row], latents[0], rtol=1e-4, atol=1e-4)
                wanted, moved = (model(**inputs).sample for model in (teacher, student))
            torch.testing.assert_close(drawn["velocity"][step, row], wanted[0], rtol=1e-4, atol=1e-4)
            latents = scheduler.step(moved, timestep, latents).prev_sample
    assert distance({"z": drawn["hidden_states"][2, 0]}, {"z": data.train[2]["hidden_states"].float()}) > 1e-3

    # every sample of the batch is one of those drawn, with its own timestep, velocity and conditions
    for i in range(2):
        places = [
            (step, row)
            for step in range(TRAIN_STEPS)
            for row in range(2)
            if torch.equal(batch["hidden_states"][i], drawn["hidden_states"][step, row])
        ]
        [(step, row)] = places
        assert torch.equal(batch["velocity"][i], drawn["velocity"][step, row])
        assert batch["timestep"][i] == drawn["timestep"][step]
        assert torch.equal(batch["encoder_hidden_states"][i], drawn["encoder_hidden_states"][0, row])


def test_states_are_visited_at_the_end_and_drawn_anew_every_so_often(make, monkeypatch):
    made, drawn, losses = make("--max_steps", 10, "--visit_share", 0.7), {}, []
    draw, loss = made.visited.draw, made.compute_loss
    monkeypatch.setattr(made.visited, "draw", lambda *args: drawn.setdefault(made.state.global_step, draw(*args)))
    monkeypatch.setattr(made, "compute_loss", lambda model, inputs, **_: losses.append(inputs) or loss(model, inputs))
    made.train()
    assert list(drawn) == [3, 6, 9]  # three steps a picture
    for step in range(3, 10):
        there = drawn[step - step % 3]["hidden_states"].flatten(0, 1)
        assert all(any(torch.equal(z, state) for state in there) for z in losses[step]["hidden_states"])


def test_visiting_without_the_teacher_is_an_error(make):
    plain = make()
    plain.args.visit_share = 0.5
    with pytest.raises(ValueError, match="visit_share needs the teacher"):
        FluxQATTrainer(
            plain.model, plain.args, plain.train_dataset, plain.eval_dataset, plain.eval_pipe, {}, num_images=1,
            num_final_images=1,
        )  # fmt: skip


# -------------------------------------------------------------------------------------------------------- pictures


def fill(folder: Path, color: tuple[int, int, int], count: int) -> None:
    folder.mkdir(parents=True)
    for i in range(count):
        Image.new("RGB", (64, 48), (color[0], color[1], 10 * i)).save(folder / f"sample_{i:03d}.png")


def test_the_strip_has_a_row_for_the_teacher_and_every_snapshot_in_the_order_of_steps(tmp_path):
    """Cells of 64x48 pixels, four apart, are found from the lower right corner; step 3 has too few pictures."""
    for name, color, count in (
        ("step_10", (30, 0), 3), ("teacher", (10, 5), 3), ("step_2", (20, 7), 4), ("step_3", (90, 90), 1)
    ):  # fmt: skip
        fill(tmp_path / name, color, count)
    trainer.save_strip(tmp_path, ["one", "two", "three"])
    for name, colors in (("steps.png", [(10, 5), (20, 7), (30, 0)]), ("step-10.png", [(10, 5), (30, 0)])):
        strip = np.asarray(Image.open(tmp_path / name).convert("RGB"))
        top, left = strip.shape[0] - len(colors) * 52, strip.shape[1] - 3 * 68
        assert 10 < top < 100 and 10 < left < 100  # prompts above, names to the left
        for row, color in enumerate(colors):
            for column in range(3):
                cell = strip[top + 52 * row :, left + 68 * column :][:48, :64]
                assert (cell == (*color, 10 * column)).all()


def test_pictures_of_an_earlier_run_do_not_stay(tmp_path):
    """Those after the checkpoint's step, and all of them if the prompts are others; the user's are left alone."""

    def left(step, prompts) -> set[str]:
        trainer.restore_pictures(tmp_path, step, prompts)
        return {path.name for path in tmp_path.iterdir()} - {"prompts.json"}

    def draw():
        for step in (0, 2, 10):
            (tmp_path / f"step_{step}").mkdir(exist_ok=True)
            (tmp_path / f"step-{step}.png").touch()
        (tmp_path / "step_by_step").mkdir(exist_ok=True)

    draw()
    assert left(-1, ["a"]) == {"step_by_step"}
    draw()
    assert left(2, ["a"]) == {"step_by_step", "step_0", "step-0.png", "step_2", "step-2.png"}
    draw()
    assert left(2, ["b"]) == {"step_by_step"}


def test_checkpoints_of_the_lowest_steps_go_first_whenever_they_were_written(tmp_path):
    for step in (10, 2, 9):
        with whole_folder(tmp_path / f"checkpoint-{step}") as part:
            (part / "config.json").touch()
    (tmp_path / "checkpoint-1").mkdir()
    (tmp_path / "checkpoint-1/mine.txt").touch()
    trainer.rotate(tmp_path, 2, 10)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-1", "checkpoint-10", "checkpoint-9"]
    trainer.rotate(tmp_path, None, 10)
    assert len(list(tmp_path.iterdir())) == 3


def test_what_a_run_left_that_went_on_from_an_earlier_checkpoint_goes_before_its_new_ones(tmp_path):
    for step in (2, 3, 9, 10):
        with whole_folder(tmp_path / f"checkpoint-{step}") as part:
            (part / "config.json").touch()
    trainer.rotate(tmp_path, 2, 3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-2", "checkpoint-3"]


@pytest.mark.parametrize("scored", [True, False])
def test_curves_show_what_metrics_jsonl_holds(scored, tmp_path, monkeypatch):
    """As with --eval_on_start False: the first line is of training."""
    lines = [{"step": step, "loss": 1 / step} for step in (1, 2, 3, 4)]
    for step in (2, 4):
        line = {"step": step, "eval_nmse": 0.1 * step, "eval_psnr": 20 + step}
        line |= {f"eval_nmse_{third}": step + i for i, third in enumerate(("early", "middle", "late"))}
        if scored:
            line |= {"eval_scene_score": 0.2 * step, "eval_scene_score_teacher": 0.9}
        lines.append(line)
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    figures = []
    monkeypatch.setattr(trainer.pyplot, "close", figures.append)
    trainer.save_curves(tmp_path)
    monkeypatch.undo()
    trainer.pyplot.close(figures[0])

    assert Image.open(tmp_path / "curves.png").size == (462 * (3 + scored), 352)  # 4.2 x 3.2 inches at 110 dpi
    drawn = [[[tuple(point) for point in line.get_xydata()] for line in axis.get_lines()] for axis in figures[0].axes]
    expected = [
        [[(1, 1.0), (2, 1 / 2), (3, 1 / 3), (4, 1 / 4)]],
        [[(2, 0.2), (4, 0.4)], [(2, 2), (4, 4)], [(2, 3), (4, 5)], [(2, 4), (4, 6)]],
        [[(2, 22), (4, 24)]],
    ]
    if scored:  # and the teacher's as a level line, from edge to edge
        expected.append([[(2, 0.4), (4, 0.8)], [(0, 0.9), (1, 0.9)]])
    assert drawn == expected


def test_curves_of_a_run_without_evaluation_are_drawn_too(tmp_path):
    trainer.save_curves(tmp_path)
    assert Image.open(tmp_path / "curves.png").size == (462 * 3, 352)
