"""Training block by block: against diffusers' own forward pass, plain formulas, and what the loaded result computes."""

import itertools
import math

import pytest
import torch
from diffusers import FluxPipeline
from diffusers import FluxTransformer2DModel as Full
from torch import nn

from models.modeling_flux_quant import FluxTransformer2DModel
from models.packing import PackedLinear, from_disk
from models.utils_quant import init_clip_val, quantize
from utils import blockwise
from utils.blockwise import Rows, Settings, Window, batches, quantized_copy, rate_at, train_block, used_steps
from utils.sampling import generate_images, record_velocities
from utils.walk import Work, first_inputs, make_block, stored_tensors, walk

CPU = torch.device("cpu")
PROMPTS = ["a red star", "two rings", "a moon", "a cross"]
SMALL = {"w_bits": 2, "steps": 10, "batch_size": 4, "micro_batch_size": 4, "learning_rate": 2e-3}


@pytest.fixture(scope="module")
def recorded(pipeline_folder):
    """Calls and velocities of four pictures, two at a time, three steps each."""
    pipe = FluxPipeline.from_pretrained(pipeline_folder)
    with record_velocities(pipe.transformer) as calls:
        generate_images(pipe, PROMPTS, num_inference_steps=3, batch_size=2)
    return [call for call, _ in calls], [velocity for _, velocity in calls]


@pytest.fixture
def teacher(pipeline_folder):
    return Full.from_pretrained(pipeline_folder, subfolder="transformer").requires_grad_(False)


@pytest.fixture
def first(recorded, teacher):
    """The first block as the walk hands it over."""
    return make_block(teacher, "transformer_blocks.0", first_inputs(teacher, recorded[0], CPU))


def window(block, teacher, settings, lookahead):
    """Over the first block and `lookahead` more (there are two blocks)."""
    trained = quantized_copy(block, settings.w_bits)
    after = list(teacher.single_transformer_blocks)[:lookahead]

    def head(image, temb):
        return teacher.proj_out(teacher.norm_out(image, temb))

    return Window(block.streams, [block.module, *after], [trained, *after], head if lookahead else None, settings)


# ------------------------------------------------------------------------------------------------------- the samples


@pytest.mark.parametrize(("steps", "share", "stride"), [(28, 0.8, 1), (28, 0.8, 4), (28, 0.25, 2), (4, 0.5, 1)])
def test_the_wanted_share_of_the_calls_is_early(steps, share, stride):
    quarter = steps // 4
    found = [step for batch in range(840) for step in used_steps(batch, steps, share, stride)]
    early = sum(step < quarter for step in found)
    assert early == 840 * quarter / stride
    assert early / len(found) == pytest.approx(share, abs=0.01)
    assert set(found) == set(range(steps))  # no step is left out


def test_rows_are_those_of_the_calls_one_after_the_other():
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(size, 3, 2, generator=generator) for size in (2, 1, 4)]
    whole, indices = torch.cat(tensors), torch.tensor([6, 0, 2, 3, 1, 2])
    for resident in (False, True):
        rows = Rows(tensors, CPU, resident)
        assert len(rows) == 7 and torch.equal(rows[indices], whole[indices])
        torch.testing.assert_close(rows.mean_square().double(), whole.double().square().mean())


def test_every_sample_comes_once_before_one_comes_again():
    drawn = torch.cat(list(itertools.islice(batches(10, 4, seed=1), 10)))
    assert all(sorted(drawn[start : start + 10].tolist()) == list(range(10)) for start in range(0, 40, 10))
    assert not torch.equal(drawn[:10], drawn[10:20])
    assert [len(batch) for batch in itertools.islice(batches(3, 8, seed=1), 2)] == [8, 8]  # more than there are


def test_the_rate_rises_and_falls_to_nothing():
    rates = [rate_at(step, 100) for step in range(100)]
    assert rates[0] == pytest.approx(0.2) and rates[4] == pytest.approx(0.5 * (1 + math.cos(0.04 * math.pi)))
    assert rates[50] == pytest.approx(0.5) and rates[99] < 1e-3 and rates[4:] == sorted(rates[4:], reverse=True)
    assert rate_at(0, 1) == 1


# --------------------------------------------------------------------------------------------------------- the window


def test_where_the_window_ends_the_transformer_the_velocity_is_the_target(recorded, teacher, first):
    calls, velocities = recorded
    found = window(first, teacher, Settings(**SMALL), lookahead=1)
    assert found.energy.keys() == {"2.image"}  # no text: nothing comes of it any more
    wanted = torch.cat(velocities)
    torch.testing.assert_close(found.rows["2.image"][torch.arange(12)], wanted, atol=1e-5, rtol=1e-4)

    # the student's errors are those of the whole transformer with the first block quantized
    student = Full.from_config(teacher.config)
    student.load_state_dict(teacher.state_dict())
    for layer in student.transformer_blocks[0].modules():
        if isinstance(layer, nn.Linear):
            layer.weight.data = quantize(layer.weight.data, init_clip_val(layer.weight.data, 2), 2)
    with torch.no_grad():
        made = torch.cat([student(**call)[0] for call in calls]).double()
        errors = found.errors(found.fetch(torch.arange(12)))["2.image"]
    expected = (made - wanted.double()).square().mean((1, 2)) / wanted.double().square().mean()
    torch.testing.assert_close(errors.double(), expected, atol=1e-6, rtol=1e-3)
    assert found.judge() == pytest.approx(expected.mean().item(), rel=1e-3)


def test_elsewhere_the_hidden_states_are(recorded, teacher, first):
    """Those that a forward hook sees behind the block, of image and text; the loss is the sum of both means."""
    kept = []
    hook = teacher.transformer_blocks[0].register_forward_hook(lambda module, args, output: kept.append(output))
    with torch.no_grad():
        for call in recorded[0]:
            teacher(**call)
    hook.remove()
    found = window(first, teacher, Settings(**SMALL, loss_power=0.5), lookahead=0)
    every = torch.arange(12)
    for name, tokens in zip(("1.text", "1.image"), zip(*kept, strict=True), strict=True):
        torch.testing.assert_close(found.rows[name][every], torch.cat(tokens), atol=1e-5, rtol=1e-4)
    batch = found.fetch(every)
    with torch.no_grad():
        loss, errors = found.loss(batch), found.errors(batch)
    assert errors.keys() == {"1.text", "1.image"}
    assert loss.item() == pytest.approx(sum(error.sqrt().mean().item() for error in errors.values()), rel=1e-5)


def test_a_local_loss_is_added_at_its_weight(teacher, first):
    settings = Settings(**SMALL, loss_power=1, local_loss=0.25)
    near, far = (window(first, teacher, Settings(**SMALL, loss_power=1), lookahead) for lookahead in (0, 1))
    both = window(first, teacher, settings, lookahead=1)
    with torch.no_grad():
        losses = [w.loss(w.fetch(torch.arange(6))).item() for w in (near, far, both)]
    assert losses[2] == pytest.approx(0.25 * losses[0] + losses[1], rel=1e-5)


def trained_parameters(block, teacher, **settings):
    found = window(block, teacher, Settings(**SMALL | settings), lookahead=1)
    found.train(seed=3)
    return dict(found.trained.named_parameters())


def test_micro_batches_and_checkpointing_change_nothing(teacher, first):
    """Nothing but rounding: a few steps at a small rate, since a code that flips would tell."""
    small = {"steps": 2, "learning_rate": 1e-6, "freeze_codes": 0}
    expected = trained_parameters(first, teacher, **small)
    for other in ({"micro_batch_size": 2}, {"checkpointing": True}):
        for name, parameter in trained_parameters(first, teacher, **small, **other).items():
            torch.testing.assert_close(parameter, expected[name], atol=2e-6, rtol=0)


def test_codes_stay_for_the_last_part_and_the_rest_does_not(teacher, first):
    before = quantized_copy(first, 2)
    after = trained_parameters(first, teacher, freeze_codes=1.0)
    for name, parameter in before.named_parameters():
        assert torch.equal(parameter, after[name]) == name.endswith("weight") * ("norm_" not in name), name


def test_training_lowers_the_error(teacher, first):
    found = window(first, teacher, Settings(**SMALL | {"steps": 60}), lookahead=1)
    before = found.judge()
    found.train(seed=0)
    assert found.judge() < 0.3 * before


def test_pictures_of_two_sizes_are_refused(recorded, teacher, first):
    first.streams.rest[1] = first.streams.rest[1] | {"image_rotary_emb": tuple(torch.zeros(2, 4, 4))}
    with pytest.raises(ValueError, match="all pictures of one size"):
        window(first, teacher, Settings(**SMALL), lookahead=1)


def test_a_channel_weighs_what_its_error_does_to_the_velocity(recorded, teacher):
    """Against diffusers' own backward pass from the same directions to what the first block puts out."""
    calls = recorded[0][:2]
    found = blockwise.channel_weights(teacher, calls, CPU, seed=5)
    generator, kept, squares = torch.Generator().manual_seed(5), [], ([], [])

    def leaves(module, args, output):
        kept[:] = [tensor.detach().requires_grad_(True) for tensor in output]
        return tuple(kept)

    hook = teacher.transformer_blocks[0].register_forward_hook(leaves)
    for call in calls:
        velocity = teacher(**call)[0]
        velocity.backward(torch.randn(velocity.shape, generator=generator))
        for square, leaf in zip(squares, kept, strict=True):
            square.append(leaf.grad.double().square().flatten(0, 1).mean(0))
    hook.remove()
    for kind, square in zip(("text", "image"), squares, strict=True):
        torch.testing.assert_close(found["transformer_blocks.0"][kind].double(), sum(square) / 2, atol=0, rtol=1e-3)
    last = found["single_transformer_blocks.0"]
    assert not last["text"].any() and last["image"].all()


def test_weighted_channels_are_weighed_against_each_other_and_text_against_image(teacher, first):
    settings, generator = Settings(**SMALL, loss_power=1), torch.Generator().manual_seed(0)
    weights = {kind: torch.rand(32, generator=generator) for kind in ("text", "image")}
    trained = quantized_copy(first, 2)
    found = Window(first.streams, [first.module], [trained], None, settings, weights)
    batch = found.fetch(torch.arange(12))
    with torch.no_grad():
        loss = found.loss(batch).item()
        inputs = {"hidden_states": batch["in.image"], "encoder_hidden_states": batch["in.text"], "temb": batch["temb"]}
        made = dict(zip(("text", "image"), trained(**inputs, **found.rest), strict=True))
    squares = {kind: (made[kind] - batch[f"1.{kind}"]).double().square() * weights[kind] for kind in made}
    expected = sum(square.mean() for square in squares.values()) / weights["image"].double().mean()
    assert loss == pytest.approx((expected / batch["1.image"].double().square().mean()).item(), rel=1e-4)


# ---------------------------------------------------------------------------------------------------------- the walk


def go(teacher, calls, folder, settings, stop_at=None):
    """Walk through both blocks; the tensors of the result."""
    work = Work(folder, {})

    def treat(block):
        if block.name == stop_at:
            raise KeyboardInterrupt
        return train_block(block, teacher, settings)

    walk(teacher, calls, settings.w_bits, treat, work, CPU)
    return dict(stored_tensors(teacher, work)), work


def test_the_result_draws_as_well_as_the_last_block_says(recorded, teacher, pipeline_folder, tmp_path):
    """Packed, saved and loaded, its velocities have the very error that training ended with."""
    calls, velocities = recorded
    tensors, work = go(teacher, calls, tmp_path / "work", Settings(**SMALL))
    student = FluxTransformer2DModel.from_pretrained(pipeline_folder, subfolder="transformer", w_bits=2)
    before = {name: parameter.detach().clone() for name, parameter in student.named_parameters()}
    student.pack()
    own = dict(student.named_parameters())
    for name, tensor in tensors.items():
        stem, _, kind = name.rpartition(".")
        layer = student.get_submodule(stem)
        on_disk = kind == "weight_codes"
        own.pop(name).data.copy_(from_disk(tensor, 2, layer.in_features) if on_disk else tensor)
    assert not own
    with torch.no_grad():
        made = torch.cat([student(**call)[0] for call in calls]).double()
    wanted = torch.cat(velocities).double()
    error = ((made - wanted).square().mean((1, 2)) / wanted.square().mean()).mean().item()
    assert work.notes("single_transformer_blocks.0")["error"] == pytest.approx(error, rel=1e-3)
    trained = {n.rpartition(".")[2] for n, p in student.named_parameters() if n in before and not p.equal(before[n])}
    assert trained == {"weight", "bias", "weight_clip_val"}  # "weight": the norms'
    notes = {name: found for block in ("transformer_blocks.0", "single_transformer_blocks.0")
             for name, found in work.notes(block)["layers"].items()}  # fmt: skip
    for name, layer in student.named_modules():
        if isinstance(layer, PackedLinear):
            weight = before[f"{name}.weight"]
            expected = [(weight - layer.dequantize()).square().sum().item(), weight.square().sum().item()]
            assert notes.pop(name) == pytest.approx(expected, rel=1e-4)
    assert not notes


def test_an_interrupted_walk_ends_where_another_does(recorded, pipeline_folder, tmp_path):
    def fresh():
        return Full.from_pretrained(pipeline_folder, subfolder="transformer").requires_grad_(False)

    settings = Settings(**SMALL | {"steps": 4})
    with pytest.raises(KeyboardInterrupt):
        go(fresh(), recorded[0], tmp_path / "one", settings, stop_at="single_transformer_blocks.0")
    found, _ = go(fresh(), recorded[0], tmp_path / "one", settings, stop_at="transformer_blocks.0")  # not again
    expected, _ = go(fresh(), recorded[0], tmp_path / "two", settings)
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def test_calibrated_codes_are_a_start(teacher, first, monkeypatch):
    """Without a step of training they are what comes out; calibrate_block's own work is tested with it."""
    made = blockwise.calibrate_block(first, [1.0] * len(first.streams), 2)
    monkeypatch.setattr(Window, "train", lambda self, seed: None)
    found = train_block(first, teacher, Settings(**SMALL, start="calibrated"))
    for name, tensor in made.items():
        torch.testing.assert_close(found[name].float(), tensor.float(), atol=1e-6, rtol=1e-6)


def test_a_rate_that_is_too_high_is_named(recorded, teacher, first, monkeypatch):
    def spoil(self, seed):
        self.trained.attn.to_q.weight.data[0, 0] = float("nan")

    monkeypatch.setattr(Window, "train", spoil)
    with pytest.raises(ValueError, match=r"^transformer_blocks\.0\.attn\.to_q: not finite .* --block_learning_rate"):
        train_block(first, teacher, Settings(**SMALL))


def test_the_device_holds_a_block_and_those_after_it(teacher, first, monkeypatch):
    """As seen from the calls of .to(): what comes for the window goes back to the CPU with it."""
    moves = []
    for name in ("norm_out", "proj_out", "single_transformer_blocks.0"):
        module = teacher.get_submodule(name)
        monkeypatch.setattr(module, "to", lambda where, name=name, module=module: moves.append((name, where)) or module)
    monkeypatch.setattr(Window, "train", lambda self, seed: None)
    train_block(first, teacher, Settings(**SMALL, lookahead=1))
    names = ["single_transformer_blocks.0", "norm_out", "proj_out"]
    assert moves == [(name, CPU) for name in names * 2]
