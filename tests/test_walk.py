"""Walking from block to block: both streams against diffusers' own forward pass, what is kept, what is refused."""

import copy

import pytest
import torch
from diffusers import Flux2KleinPipeline, FluxPipeline
from diffusers import FluxTransformer2DModel as Full
from diffusers.hooks.group_offloading import _is_group_offload_enabled
from torch import nn

from models.modeling_flux2_quant import Flux2Transformer2DModel
from models.modeling_flux_quant import FluxTransformer2DModel
from models.packing import store_codes
from models.utils_quant import init_clip_val, quantize_codes
from utils import walk as walking
from utils.sampling import generate_images, record_inputs
from utils.walk import Work, record_calls, split_calls, stored_tensors, walk

BITS = 2


@pytest.fixture(scope="module")
def recorded(pipeline_folder):
    """Four calls of two pictures each."""
    pipe = FluxPipeline.from_pretrained(pipeline_folder)
    with record_inputs(pipe.transformer, lambda number: True) as calls:
        generate_images(pipe, ["a red star", "two rings", "a moon", "a cross"], num_inference_steps=2, batch_size=2)
    return calls


@pytest.fixture
def teacher(pipeline_folder):
    return Full.from_pretrained(pipeline_folder, subfolder="transformer")


def rounded(block):
    """Every linear of the block at its error-minimal step size."""
    tensors = {f"{block.name}.{name}": p for name, p in block.module.named_parameters()}
    for name, layer in block.module.named_modules():
        if isinstance(layer, nn.Linear):
            weight = tensors.pop(f"{block.name}.{name}.weight")
            alpha = init_clip_val(weight, BITS)
            tensors[f"{block.name}.{name}.weight_codes"] = store_codes(quantize_codes(weight, alpha, BITS), BITS)
            tensors[f"{block.name}.{name}.weight_clip_val"] = alpha
    block.notes["seen"] = len(block.streams)
    return tensors


def seen(inputs):
    """A copy: on a CPU a block's inputs are the stream's own tensors, which its outputs will take the place of."""
    return {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}


class Killed(Exception):
    pass


def test_each_stream_is_what_the_blocks_before_make_of_the_calls(recorded, teacher, pipeline_folder, tmp_path):
    """Against forward hooks on diffusers' model and on the quantized one, at the last block."""
    wanted = {}
    student = FluxTransformer2DModel.from_pretrained(pipeline_folder, subfolder="transformer", w_bits=BITS)
    for name, model in (("teacher", teacher), ("student", student)):
        wanted[name] = []
        hook = model.single_transformer_blocks[-1].register_forward_pre_hook(
            lambda module, args, kwargs, kept=wanted[name]: kept.append(kwargs), with_kwargs=True
        )
        with torch.no_grad():
            for call in recorded:
                model(**call)
        hook.remove()
    found = {}

    def treat(block):
        found[block.name] = [
            (seen(block.teacher_inputs(i)), seen(block.student_inputs(i))) for i in range(len(block.streams))
        ]
        return rounded(block)

    walk(teacher, recorded, BITS, treat, Work(tmp_path / "work", {}))
    assert list(found) == ["transformer_blocks.0", "single_transformer_blocks.0"]
    for i, pair in enumerate(found["single_transformer_blocks.0"]):
        for name, inputs in zip(("teacher", "student"), pair, strict=True):
            assert inputs.keys() == wanted[name][i].keys()
            for key in walking.HIDDEN:
                torch.testing.assert_close(inputs[key], wanted[name][i][key], atol=1e-5, rtol=1e-5)
            assert torch.equal(inputs["temb"], wanted[name][i]["temb"])
    assert not torch.equal(pair[0]["hidden_states"], pair[1]["hidden_states"])
    assert all(p.is_meta for block in teacher.transformer_blocks for p in block.parameters())


@pytest.fixture(scope="module")
def klein(klein_base_folder):
    """A transformer of FLUX.2 and four calls of it, with the prompt and with none in turns."""
    pipe = Flux2KleinPipeline.from_pretrained(klein_base_folder, dtype=torch.float32)
    with record_inputs(pipe.transformer, lambda number: True) as calls:
        generate_images(pipe, ["a red star", "two rings"], num_inference_steps=2, guidance_scale=3.0, batch_size=2)
    assert len(calls) == 4
    return pipe.transformer, calls


def test_what_modulates_all_blocks_is_treated_first_and_the_student_is_modulated_by_it(
    klein, klein_base_folder, tmp_path
):
    """Against forward hooks on diffusers' model and on the quantized one, at every block: tokens and modulation."""
    teacher, calls = copy.deepcopy(klein[0]), klein[1]
    student = Flux2Transformer2DModel.from_pretrained(klein_base_folder, subfolder="transformer", w_bits=BITS)
    lists = ("transformer_blocks", "single_transformer_blocks")
    names = [f"{kind}.{i}" for kind in lists for i in range(len(getattr(teacher, kind)))]
    wanted: dict[tuple, list] = {}

    def keep(key):
        return lambda module, args, kwargs: wanted.setdefault(key, []).append(kwargs)

    for kind, model in (("teacher", copy.deepcopy(teacher)), ("student", student)):
        for name in names:
            model.get_submodule(name).register_forward_pre_hook(keep((kind, name)), with_kwargs=True)
        with torch.no_grad():
            for call in calls:
                model(**call)
    found = {}

    def treat(block):
        pairs = [(seen(block.teacher_inputs(i)), seen(block.student_inputs(i))) for i in range(len(block.streams))]
        found[block.name] = pairs
        return rounded(block)

    work = Work(tmp_path / "work", {})
    walk(teacher, calls, BITS, treat, work)
    modulation = ("double_stream_modulation_img", "double_stream_modulation_txt", "single_stream_modulation")
    assert list(found) == [*modulation, *names]
    for name in names:
        for i, pair in enumerate(found[name]):
            for kind, inputs in zip(("teacher", "student"), pair, strict=True):
                expected = wanted[kind, name][i]
                vectors = [key for key in expected if key.startswith("temb_mod")]
                assert len(vectors) == 2 - name.startswith("single")
                for key in vectors:
                    torch.testing.assert_close(inputs[key], expected[key], atol=1e-5, rtol=1e-5)
                tokens, text = expected["hidden_states"], inputs["encoder_hidden_states"]
                if expected["encoder_hidden_states"] is None:  # a single block's come in one
                    expected = {"encoder_hidden_states": tokens[:, : text.shape[1]]}
                    expected["hidden_states"] = tokens[:, text.shape[1] :]
                for key in walking.HIDDEN:
                    torch.testing.assert_close(inputs[key], expected[key], atol=1e-3, rtol=1e-4)
    assert not torch.equal(pair[0]["temb_mod"], pair[1]["temb_mod"])

    stored = dict(stored_tensors(teacher, work))
    packed = Flux2Transformer2DModel.from_pretrained(klein_base_folder, subfolder="transformer", w_bits=BITS).pack()
    assert stored.keys() == dict(packed.named_parameters()).keys()


def test_only_one_block_is_there_at_a_time_whoever_holds_its_parameters(recorded, teacher, tmp_path, monkeypatch):
    """Each block comes once, and not before the one before it has given its memory back: here this test holds it."""
    blocks = {name: teacher.get_submodule(name) for name in walking.block_names(teacher)}
    held = {name: list(block.parameters()) for name, block in blocks.items()}
    sizes = {name: sum(p.numel() for p in parameters) for name, parameters in held.items()}
    came = []

    def watched(name, to):
        return lambda where: came.append((name, str(where))) or to(where)

    for name, block in blocks.items():
        monkeypatch.setattr(block, "to", watched(name, block.to))

    def treat(block):
        place = list(blocks).index(block.name)
        left = {name: sum(p.numel() for p in parameters) for name, parameters in held.items()}
        assert left == {name: 0 if i < place else sizes[name] for i, name in enumerate(blocks)}
        return rounded(block)

    walk(teacher, recorded, BITS, treat, Work(tmp_path / "work", {}))
    assert came == [(name, where) for name in blocks for where in ("cpu", "meta")]
    assert not any(p.numel() for parameters in held.values() for p in parameters)


def test_what_is_stored_is_the_whole_packed_transformer(recorded, teacher, pipeline_folder, tmp_path):
    student = FluxTransformer2DModel.from_pretrained(pipeline_folder, subfolder="transformer", w_bits=BITS).pack()
    work = Work(tmp_path / "work", {})
    walk(teacher, recorded[:1], BITS, rounded, work)
    stored = dict(stored_tensors(teacher, work))
    assert stored.keys() == {name for name, _ in student.named_parameters()}
    assert all(torch.equal(stored[name], parameter) for name, parameter in student.named_parameters())


def test_a_walk_that_was_killed_goes_on_where_it_was(recorded, teacher, pipeline_folder, tmp_path):
    """The second block sees the same inputs, and the first is not treated again."""
    inputs = {}

    def treat(block):
        inputs.setdefault(block.name, []).append([seen(block.student_inputs(i)) for i in range(len(block.streams))])
        if block.name.startswith("single") and len(inputs[block.name]) == 1:
            raise Killed
        return rounded(block)

    with pytest.raises(Killed):
        walk(teacher, recorded, BITS, treat, Work(tmp_path / "work", {"model": "mine"}))
    work = Work(tmp_path / "work", {"model": "mine"})
    again = Full.from_pretrained(pipeline_folder, subfolder="transformer")
    walk(again, recorded, BITS, treat, work)
    assert len(inputs["transformer_blocks.0"]) == 1
    before, after = inputs["single_transformer_blocks.0"]
    for a, b in zip(before, after, strict=True):
        assert all(torch.equal(a[name], b[name]) for name in walking.HIDDEN)
    assert work.notes("transformer_blocks.0") == {"seen": 4}
    assert not list(work.folder.glob("*.tmp"))


@pytest.mark.parametrize(
    ("pictures", "batches", "offloaded"), [(None, [2, 1], False), (1.5, [1, 1, 1], False), (0.5, [1, 1, 1], True)]
)
def test_recorded_calls_are_those_of_drawing(pipeline_folder, monkeypatch, pictures, batches, offloaded):
    """Whatever there is room for beside the weights: all that is wanted, one picture, or not even one."""
    pipe, prompts = FluxPipeline.from_pretrained(pipeline_folder), ["a red star", "two rings", "a moon"]
    with record_inputs(pipe.transformer, lambda number: number % 4 in (1, 3)) as wanted:
        generate_images(pipe, prompts, 7, num_inference_steps=4, guidance_scale=2.0, size=64)
    if pictures is not None:
        tokens, width = (64 // 16) ** 2 + wanted[0]["encoder_hidden_states"].shape[1], pipe.transformer.inner_dim
        picture = tokens * width * 4 * walking.ACTIVATIONS
        room = sum(p.nbytes for p in pipe.transformer.parameters()) + pictures * picture
        monkeypatch.setattr(walking, "_free_memory", lambda device, limit: room / 0.9)
    sizes, hooked = [], []

    def see(module, args, output):
        sizes.append(len(output))
        hooked.append(_is_group_offload_enabled(pipe.transformer))

    hook = pipe.transformer.x_embedder.register_forward_hook(see)
    calls = record_calls(
        pipe, prompts, (1, 3), seed=7, size=64, num_inference_steps=4, guidance_scale=2.0, batch_size=2,
        device=torch.device("cpu"),
    )  # fmt: skip
    hook.remove()
    assert sizes[::4] == batches and set(hooked) == {offloaded}
    assert not _is_group_offload_enabled(pipe.transformer) and not pipe.transformer._forward_pre_hooks
    sigmas = pipe.scheduler.sigmas
    expected = [(sigmas[step] - sigmas[step + 1]).item() * 4 for step in (1, 3)]
    assert [call["weight"] for call in calls] == pytest.approx(expected * len(batches))
    by_step = [sorted(part, key=lambda call: -call["timestep"].item()) for part in (split_calls(calls, 1), wanted)]
    for a, b in zip(*by_step, strict=True):
        assert a.keys() == b.keys() | {"weight"}
        for name, value in b.items():
            if isinstance(value, torch.Tensor):
                torch.testing.assert_close(a[name], value, atol=1e-5, rtol=1e-5)


def test_a_fingerprint_is_that_of_the_weights(teacher):
    before = walking.fingerprint(teacher)
    assert before == walking.fingerprint(teacher)
    with torch.no_grad():
        teacher.transformer_blocks[0].ff.net[2].bias[3] += 1e-3
    assert walking.fingerprint(teacher) != before


def test_calls_come_back_as_they_were_kept(recorded, tmp_path):
    """A text embedding that stands in several calls is written, and comes back, once."""
    work = Work(tmp_path / "work", {})
    assert work.calls() is None
    work.keep_calls(recorded)
    found = Work(tmp_path / "work", {}).calls()
    assert len(found) == len(recorded)
    for a, b in zip(found, recorded, strict=True):
        assert a.keys() == b.keys()
        for name, value in b.items():
            assert torch.equal(a[name], value) if isinstance(value, torch.Tensor) else a[name] == value
    assert found[0]["encoder_hidden_states"] is found[1]["encoder_hidden_states"]


def test_calls_are_cut_into_samples(recorded, teacher):
    tokens = sum(recorded[0][name].shape[1] for name in walking.HIDDEN)
    assert split_calls(recorded, 2 * tokens) == recorded
    single = split_calls(recorded, 2 * tokens - 1)
    assert len(single) == 8 and single[0]["encoder_hidden_states"] is single[2]["encoder_hidden_states"]
    with torch.no_grad():
        whole = torch.cat([teacher(**call)[0] for call in recorded])
        parts = torch.cat([teacher(**call)[0] for call in single])
    torch.testing.assert_close(parts, whole, atol=1e-5, rtol=1e-5)


def test_a_folder_of_other_settings_is_refused_by_name(tmp_path):
    Work(tmp_path / "work", {"w_bits": 0, "prompts": ["a", "b"]})
    Work(tmp_path / "work", {"w_bits": 0, "prompts": ["a", "b"]})
    with pytest.raises(ValueError, match=r"work: begun with w_bits=0, now w_bits=2; delete it"):
        Work(tmp_path / "work", {"w_bits": 2, "prompts": ["a", "b"]})
    with pytest.raises(ValueError, match="begun with steps=null, now steps=4"):
        Work(tmp_path / "work", {"w_bits": 0, "prompts": ["a", "b"], "steps": 4})


@pytest.mark.parametrize("name", ["calls", "transformer_blocks.0"])
def test_a_damaged_file_is_named(name, tmp_path):
    work = Work(tmp_path / "work", {})
    (work.folder / f"{name}.safetensors").write_bytes(b"not this")
    with pytest.raises(ValueError, match=f"{name}.safetensors: damaged .* delete it, and it is made again"):
        work.calls() if name == "calls" else work.block(name)
