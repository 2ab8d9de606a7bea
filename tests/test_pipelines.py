"""utils/pipelines.py: a FLUX.2-klein pipeline is drawn with, cached, trained and quantized as diffusers calls it.

References: diffusers' own Flux2KleinPipeline, called by itself and watched by hooks; formulas in plain torch.
"""

import json
import shutil
from contextlib import nullcontext

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline

import bench
import run as run_script
import sanity
import test as test_script
import train
from models.modeling_flux2_quant import Flux2Transformer2DModel
from models.packing import PackedLinear
from utils.blockwise import used_steps
from utils.cuda_graph import compile_steps
from utils.datautils import ShuffledSamples, TeacherCache, collate, fill_cache, split_batch
from utils.last_steps import VisitedStates
from utils.pipelines import FAMILIES, Flux2Klein, early_share, family_of, sampling_settings, steps_taken
from utils.random_flux import REST, skeleton
from utils.sampling import generate_images, initial_noise, load_pipeline, place, record_inputs, with_transformer
from utils.teacher import Teacher, TeacherSettings, prompt_seeds
from utils.trainer import record_features

CPU = torch.device("cpu")
GPU = torch.device("cuda")
PROMPTS = ["a red star and a blue ring", "three hearts on grey paper"]
GUIDANCE, STEPS = 1.7, 3


@pytest.fixture(params=["distilled", "base"])
def folder(request, klein_folder, klein_base_folder):
    return klein_folder if request.param == "distilled" else klein_base_folder


def is_base(folder) -> bool:
    return not json.loads((folder / "model_index.json").read_text())["is_distilled"]


def stock(folder, dtype=torch.float32) -> Flux2KleinPipeline:
    pipe = Flux2KleinPipeline.from_pretrained(folder, dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def drawn_by_diffusers(pipe, prompt, seed, **settings):
    """One picture as the pipeline itself makes it."""
    return pipe(
        prompt=prompt, height=96, width=96, max_sequence_length=32, output_type="pt",
        generator=torch.Generator().manual_seed(seed), **settings,
    ).images[0]  # fmt: skip


# ----------------------------------------------------------------------------------------------------------- drawing


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pictures_are_those_of_diffusers(folder, dtype):
    """To the last bit; batches to rounding."""
    pipe, reference = load_pipeline(str(folder), dtype), stock(folder, dtype)
    settings = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE}
    images = generate_images(pipe, PROMPTS, seed=5, **settings)
    assert images.shape == (2, 3, 96, 96) and images.dtype == torch.float32
    for i, prompt in enumerate(PROMPTS):
        assert torch.equal(images[i], drawn_by_diffusers(reference, prompt, 5 + i, **settings).float())
    if dtype == torch.float32:
        batched = generate_images(pipe, PROMPTS, seed=5, batch_size=2, **settings)
        torch.testing.assert_close(batched, images, atol=1e-3, rtol=0)


def test_what_a_picture_depends_on(klein_base_folder):
    pipe = load_pipeline(str(klein_base_folder), torch.float32)

    def draw(prompt=PROMPTS[0], seed=5, guidance_scale=GUIDANCE):
        return generate_images(pipe, [prompt], seed, num_inference_steps=2, guidance_scale=guidance_scale)

    first = draw()
    for other in (draw(PROMPTS[1]), draw(seed=6), draw(guidance_scale=3.0)):
        assert (first - other).abs().max() > 1e-3


def test_the_batch_norms_statistics_are_in_the_pictures(klein_folder):
    pipe = load_pipeline(str(klein_folder), torch.float32)
    first = generate_images(pipe, PROMPTS[:1], num_inference_steps=1)
    for statistic in (pipe.vae.bn.running_mean, pipe.vae.bn.running_var):
        kept = statistic.clone()
        statistic += 1
        assert (generate_images(pipe, PROMPTS[:1], num_inference_steps=1) - first).abs().max() > 1e-3
        statistic.copy_(kept)


def test_a_streamed_pipeline_draws_the_same(klein_folder):
    streamed = load_pipeline(str(klein_folder), torch.float32)
    expected = generate_images(streamed, PROMPTS, num_inference_steps=2)
    place(streamed, CPU, "sequential")
    assert torch.equal(generate_images(streamed, PROMPTS, num_inference_steps=2), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("offload", [None, "model", "sequential"])
def test_an_offloaded_pipeline_draws_the_same(offload, klein_base_folder):
    settings = {"num_inference_steps": 2, "guidance_scale": GUIDANCE}
    expected = generate_images(load_pipeline(str(klein_base_folder), torch.float32).to(GPU), PROMPTS, **settings)
    pipe = load_pipeline(str(klein_base_folder), torch.float32)
    place(pipe, GPU, offload)
    torch.testing.assert_close(generate_images(pipe, PROMPTS, **settings), expected, rtol=0, atol=5e-3)


@pytest.mark.gpu
def test_steps_as_cuda_graphs_draw_the_same(klein_base_folder):
    """One graph for both calls of a step, whose texts differ."""
    pipe = load_pipeline(str(klein_base_folder), torch.float32).to(GPU)
    settings = {"num_inference_steps": 3, "guidance_scale": GUIDANCE}
    expected = generate_images(pipe, PROMPTS, **settings)
    compile_steps(pipe.transformer)
    torch.testing.assert_close(generate_images(pipe, PROMPTS, **settings), expected, rtol=0, atol=1e-2)


def test_another_transformer_leaves_the_rest_as_it_is(folder):
    pipe = load_pipeline(str(folder), torch.float32)
    student = Flux2Transformer2DModel.from_pretrained(folder, subfolder="transformer")
    other = with_transformer(pipe, student)
    assert other.transformer is student and pipe.transformer is not student and other.vae is pipe.vae
    assert other.config.is_distilled == pipe.config.is_distilled
    settings = {"num_inference_steps": 1, "guidance_scale": GUIDANCE}
    assert torch.equal(generate_images(other, PROMPTS[:1], **settings), generate_images(pipe, PROMPTS[:1], **settings))


def test_steps_and_guidance_are_the_pipelines_unless_asked_for(
    pipeline_folder, klein_folder, klein_base_folder, caplog
):
    pipes = [load_pipeline(str(folder), torch.float32) for folder in (pipeline_folder, klein_folder, klein_base_folder)]
    assert [sampling_settings(pipe, None, None) for pipe in pipes] == [(28, 3.5), (4, 1.0), (50, 4.0)]
    assert [sampling_settings(pipe, 7, 0.0) for pipe in pipes] == [(7, 0.0)] * 3
    assert not caplog.messages
    assert [sampling_settings(pipe, 7, 2.5) for pipe in pipes] == [(7, 2.5), (7, 1.0), (7, 2.5)]
    assert caplog.messages == ["guidance 2.5 has no effect: this model is distilled to draw without"]
    assert [family_of(pipe).calls_a_step(pipe, 4.0) for pipe in pipes] == [1, 1, 2]
    assert family_of(pipes[2]).calls_a_step(pipes[2], 1.0) == 1
    assert [early_share(steps) for steps in (28, 50, 8, 4, 1)] == [0.8, 0.8, 0.8, 0.25, 0.25]


def test_schnell_takes_few_steps_no_guidance_and_less_text(pipeline_folder, caplog):
    """Told by its scheduler: the transformer need not be loaded."""
    pipe = load_pipeline(str(pipeline_folder), torch.float32, transformer=None)
    assert sampling_settings(pipe, None, None) == (28, 3.5)
    settings = REST["flux-schnell"]["scheduler"]
    pipe.register_modules(scheduler=FlowMatchEulerDiscreteScheduler(**settings))
    assert sampling_settings(pipe, None, None) == (4, 1.0) and sampling_settings(pipe, 6, None) == (6, 1.0)
    assert not caplog.messages
    assert sampling_settings(pipe, None, 3.5) == (4, 1.0)
    assert caplog.messages == ["guidance 3.5 has no effect: this model is distilled to draw without"]
    pipe.tokenizer_2.model_max_length = 512
    assert family_of(pipe).text_length(pipe) == 256


@pytest.mark.parametrize("kind", ["Flux2Pipeline", "Flux2KleinInpaintPipeline", "FluxImg2ImgPipeline", None])
def test_another_pipeline_is_one_line(kind, klein_folder, tmp_path, start, capsys):
    shutil.copytree(klein_folder, tmp_path / "other")
    file = tmp_path / "other/model_index.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"_class_name": kind}))
    expected = f"other: expected a FluxPipeline or a Flux2KleinPipeline, found a {kind}; "
    for script, words in (
        (sanity, ("sanity.py", "--output_dir", tmp_path / "a")),
        (train, ("train.py", "--output_dir", tmp_path / "b", "--local_dir", tmp_path)),
        (run_script, ("run.py", "--output_dir", tmp_path / "c", "--method", "mse", "--num_images", 0)),
    ):
        assert start(script.main, *words, "--model", tmp_path / "other", "--device", "cpu") == 1
        written = capsys.readouterr().err.strip().splitlines()
        assert expected in written[-1], written[-1]
        assert not (tmp_path / "c").exists() or not any((tmp_path / "c").glob("[!.]*"))


# ------------------------------------------------------------------------------------------------------ the teacher


def watched(pipe, seeds, **settings) -> tuple[list[dict], list[torch.Tensor], list[torch.Tensor]]:
    """Calls of the stock pipeline's transformer on CPU-drawn noise, their velocities, the latents after every step."""
    calls, velocities, states = [], [], []

    def watch(module, args, kwargs, output):
        calls.append(kwargs)
        velocities.append(output[0])

    hook = pipe.transformer.register_forward_hook(watch, with_kwargs=True)
    noise = torch.cat([torch.randn(1, 128, 6, 6, generator=torch.Generator().manual_seed(seed)) for seed in seeds])

    def keep(pipe, step, timestep, found):
        states.append(found["latents"])
        return {}

    pipe(
        prompt=PROMPTS, height=96, width=96, latents=noise.to(pipe.transformer.dtype), max_sequence_length=32,
        output_type="latent", callback_on_step_end=keep, num_inference_steps=STEPS, guidance_scale=GUIDANCE,
    )  # fmt: skip
    hook.remove()
    return calls, velocities, states


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_samples_are_the_calls_of_the_stock_pipeline(folder, dtype, tmp_path):
    """All that its transformer was given and put out, both calls of a guided step; what is rebuilt is its latents."""
    teacher = Teacher(str(folder), dtype)
    manifest = teacher.describe(TeacherSettings(96, STEPS, GUIDANCE))
    seeds, each = prompt_seeds(PROMPTS, 1), 1 if teacher.pipe.config.is_distilled else 2
    cache = TeacherCache(tmp_path, manifest, PROMPTS, seeds)
    fill_cache(cache, teacher, 2, CPU)
    assert teacher.pipe.text_encoder is None and teacher.pipe.transformer is None
    assert (cache.calls, cache.steps, len(cache)) == (each, each * STEPS, 2 * each * STEPS)
    sizes = [cache.file(i).stat().st_size for i in range(2)]
    assert all(abs(size - cache.bytes_to_write() / 2) <= 1024 for size in sizes) or cache.bytes_to_write() == 0

    expected = torch.float32 if dtype == torch.float32 else torch.bfloat16
    pipe = stock(folder, dtype)
    noise = initial_noise(pipe, seeds, 96, dtype)
    if dtype == torch.bfloat16:
        return check_bfloat16(cache, expected)
    calls, velocities, states = watched(pipe, seeds)
    assert len(calls) == each * STEPS
    for number in range(2):
        torch.testing.assert_close(cache.trajectory(number)["noise"], noise[number], rtol=0, atol=0)
        for call, (inputs, velocity) in enumerate(zip(calls, velocities, strict=True)):
            sample = cache[number * each * STEPS + call]
            found, target = split_batch(sample)
            assert sorted(found) == sorted(name for name, value in inputs.items() if isinstance(value, torch.Tensor))
            for name, value in found.items():
                wanted = inputs[name][number]
                assert value.dtype == wanted.dtype and value.shape == wanted.shape
                torch.testing.assert_close(value, wanted, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(target, velocity[number], rtol=1e-4, atol=1e-4)
        final = cache.last_latents(cache.trajectory(number))
        torch.testing.assert_close(final, states[-1][number], rtol=1e-4, atol=1e-4)


def check_bfloat16(cache, dtype) -> None:
    """The transformer puts out the velocity of a sample again, to the bit: its inputs are rounded as they were."""
    transformer = stock(cache.manifest["model"], dtype).transformer
    for number in range(cache.steps):
        pair = [cache[number], cache[cache.steps + number]]  # as they were drawn, both at a time
        inputs, velocity = split_batch(collate(pair))
        with torch.no_grad():
            assert torch.equal(transformer(**inputs, return_dict=False)[0], velocity)


def test_guided_velocities_are_combined_as_the_pipeline_does():
    velocities = torch.randn(6, 5, 4, generator=torch.Generator().manual_seed(0))
    assert steps_taken(velocities, None) is velocities
    for dtype in (torch.float32, torch.bfloat16):
        given = velocities.to(dtype)
        for step, found in enumerate(steps_taken(given, 3.3)):
            prompted, empty = given[2 * step], given[2 * step + 1]
            assert torch.equal(found, empty + 3.3 * (prompted - empty))


def test_a_manifest_tells_families_and_guidance_apart(klein_folder, klein_base_folder, pipeline_folder):
    settings = TeacherSettings(96, STEPS, GUIDANCE)
    distilled, base = (Teacher(str(f), torch.float32).describe(settings) for f in (klein_folder, klein_base_folder))
    assert (distilled["guidance_scale"], distilled["calls_a_step"]) == (None, 1)
    assert (base["guidance_scale"], base["calls_a_step"], base["negative_shape"]) == (GUIDANCE, 2, [32, 192])
    assert distilled["pipeline"] == base["pipeline"] == "Flux2KleinPipeline" and distilled["weights"] == base["weights"]
    flux = Teacher(str(pipeline_folder), torch.float32).describe(settings)
    assert not {"pipeline", "calls_a_step", "negative_shape"} & flux.keys()  # older caches stay good
    assert set(FAMILIES) == {"FluxPipeline", "Flux2KleinPipeline"}


def test_a_text_in_every_other_call_is_kept_once(klein_base_folder):
    pipe = load_pipeline(str(klein_base_folder), torch.float32)
    with record_inputs(pipe.transformer, lambda call: True) as calls:
        generate_images(pipe, PROMPTS[:1], num_inference_steps=3, guidance_scale=GUIDANCE)
    texts = [call["encoder_hidden_states"] for call in calls]
    assert len(texts) == 6 and len({id(text) for text in texts}) == 2
    assert all(text is texts[i % 2] for i, text in enumerate(texts)) and not torch.equal(texts[0], texts[1])


# -------------------------------------------------------------------------------------------------------- the scripts


def packed_folder(start, model, target, *flags) -> None:
    words = ("run.py", "--model", model, "--output_dir", target, "--num_images", 0, "--device", "cpu", *flags)
    assert start(run_script.main, *words) == 0


def velocity_error(start, checkpoint, target, *flags) -> dict:
    words = ("test.py", checkpoint, "--num_images", 2, "--output_dir", target, "--device", "cpu", *flags)
    assert start(test_script.main, *words) == 0
    return json.loads((target / "metrics.json").read_text())


def test_every_way_without_training(start, folder, tmp_path):
    """What run.py writes loads in diffusers, holds codes in all that was asked for, and the better ways are better."""
    steps = ("--steps", STEPS) if is_base(folder) else ()
    ways = {
        "mse": (),
        "calibrated": ("--calibration_prompts", 4),
        "blockwise": (
            "--calibration_prompts", 4, "--block_steps", 2, "--block_batch_size", 4, "--batch_size", 4,
            "--lookahead", 1,
        ),
    }  # fmt: skip
    if is_base(folder):
        del ways["blockwise"]
    errors = {}
    for method, flags in ways.items():
        packed_folder(start, folder, tmp_path / method, "--method", method, *flags, *steps)
        pipe = Flux2KleinPipeline.from_pretrained(tmp_path / method)
        layers = [name for name, layer in pipe.transformer.named_modules() if isinstance(layer, PackedLinear)]
        assert len(layers) == 2 * 12 + 3 * 2 + 3 and pipe.config.is_distilled == (not steps)
        found = json.loads((tmp_path / method / "metrics.json").read_text())
        assert {kind: row["layers"] for kind, row in found["layers"].items()} == {"norm": 3, "attn": 22, "ff": 8}
        metrics = velocity_error(start, tmp_path / method, tmp_path / "test", *steps)
        errors[method] = metrics["nmse"]
        assert metrics["steps"] == (STEPS if steps else 4) and len(metrics["nmse_by_step"]) == metrics["steps"]
    assert max(errors[method] for method in ways if method != "mse") < errors["mse"] / 3


def test_large_transformers_are_trained_block_by_block_on_fewer_samples(klein_folder):
    """At 512 pixels, too, where a small one gets thousands; of four steps all are used, and alike."""
    pipe = load_pipeline(str(klein_folder), torch.float32)
    for transformer, wanted in ((pipe.transformer, (4096, 1, 8)), (skeleton("flux2-klein-4b"), (256, 1, 2))):
        pipe.register_modules(transformer=transformer)
        args = run_script.parse_args("--method blockwise --resolution 512 --device cpu".split())
        run_script.choose_sizes(args, pipe)
        assert (args.calibration_prompts, args.calibration_stride, args.lookahead) == wanted
        assert (args.steps, args.guidance_scale, args.block_early_share) == (4, 1.0, 0.25)
    assert [used_steps(batch, 4, 0.25, 1) for batch in range(2)] == [[0, 1, 2, 3]] * 2


def test_training_takes_the_error_under_a_third(start, folder, tmp_path):
    steps = ("--num_inference_steps", STEPS, "--guidance_scale", GUIDANCE) if is_base(folder) else ()
    words = (
        "train.py", "--model", folder, "--local_dir", tmp_path, "--output_dir", tmp_path / "run", "--num_train_prompts",
        16, "--num_images", 2, "--per_device_train_batch_size", 8, "--learning_rate", 2e-3, "--save_strategy", "no",
        "--output_model_filename", "student", "--pack", "True", "--max_steps", 25, "--eval_steps", 25, "--device",
        "cpu", "--report_to", "none", *steps,
    )  # fmt: skip
    assert start(train.main, *words) == 0
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["final"]["eval_nmse"] < summary["start"]["eval_nmse"] / 3
    assert summary["final"]["eval_psnr"] > summary["start"]["eval_psnr"]
    assert summary["settings"]["early_share"] == 0.25
    metrics = velocity_error(start, tmp_path / "models/student", tmp_path / "test", "--model", folder, *steps)
    assert metrics["nmse"] == pytest.approx(summary["final"]["eval_nmse"], rel=1e-2)


def test_visited_states_of_a_guided_teacher_are_those_of_guided_pictures(klein_base_folder, tmp_path):
    """A student that is the teacher visits the teacher's own states, in both calls of every step."""
    teacher = Teacher(str(klein_base_folder), torch.float32)
    manifest, seeds = teacher.describe(TeacherSettings(96, STEPS, GUIDANCE)), prompt_seeds(PROMPTS, 1)
    cache = TeacherCache(tmp_path, manifest, PROMPTS, seeds)
    fill_cache(cache, teacher, 2, CPU)
    transformer = load_pipeline(str(klein_base_folder), torch.float32).transformer
    visited = VisitedStates(cache, ShuffledSamples(2, cache.steps, seed=0), seed=0, rank=0, size=2)
    visited.generator = torch.Generator().manual_seed(0)
    numbers = torch.randint(2, (2,), generator=torch.Generator().manual_seed(0)).tolist()
    drawn = visited.drawn = visited.draw(transformer, transformer, CPU, (nullcontext, nullcontext))
    for row, number in enumerate(numbers):
        for call in range(cache.steps):
            inputs, velocity = split_batch(cache[number * cache.steps + call])
            torch.testing.assert_close(drawn["velocity"][call, row], velocity, rtol=1e-3, atol=1e-3)
            torch.testing.assert_close(drawn["hidden_states"][call, row], inputs["hidden_states"], rtol=1e-3, atol=1e-3)
            torch.testing.assert_close(drawn["timestep"][call], inputs["timestep"])
            text = inputs["encoder_hidden_states"]
            torch.testing.assert_close(drawn["encoder_hidden_states"][call % 2, row], text)
    batch = visited.batch(0, transformer, transformer, CPU, (nullcontext, nullcontext))
    inputs, velocity = split_batch(batch)
    with torch.no_grad():
        torch.testing.assert_close(transformer(**inputs, return_dict=False)[0], velocity, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_features_are_the_image_tokens_of_every_block(klein_folder):
    """Those that the next block is given, text before image in the single ones; of the last, what norm_out is given."""
    transformer = load_pipeline(str(klein_folder), torch.float32).transformer
    features, given = record_features(transformer), []

    def keep(module, args, kwargs):
        given.append(args[0] if args else kwargs["hidden_states"])

    blocks = [*transformer.transformer_blocks, *transformer.single_transformer_blocks]
    for module in (*blocks[1:], transformer.norm_out):
        module.register_forward_pre_hook(keep, with_kwargs=True)
    generator = torch.Generator().manual_seed(0)
    transformer(
        hidden_states=torch.randn(2, 9, 128, generator=generator), timestep=torch.tensor([0.5, 0.25]),
        encoder_hidden_states=torch.randn(2, 5, 192, generator=generator), img_ids=Flux2Klein.image_ids(3, None),
        txt_ids=Flux2Klein.text_ids(5, None),
    )  # fmt: skip
    assert len(features) == len(blocks) == len(given)
    for i, tokens in enumerate(given):
        assert torch.equal(features[i], tokens[:, -9:])


def test_sanity_draws_it(start, klein_base_folder, tmp_path):
    words = ("sanity.py", "--model", klein_base_folder, "--w_bits", 8, "--num_images", 1, "--num_inference_steps", 2)
    assert start(sanity.main, *words, "--device", "cpu", "--output_dir", tmp_path, "--pack", "True") == 0
    full, eight = json.loads((tmp_path / "samples/metrics.json").read_text())["rows"]
    assert eight["nmse"] < 0.01 and eight["packed_bytes"] < full["packed_bytes"] / 1.5
    saved = sum(file.stat().st_size for file in (tmp_path / "cache/bits_8").glob("*.safetensors"))
    assert saved == pytest.approx(eight["packed_bytes"], rel=0.25)  # what is not quantized is float32 there


def test_bench_times_a_step(start, klein_folder, tmp_path):
    words = ("bench.py", "--config", klein_folder, "--device", "cpu", "--rounds", 1, "--output", tmp_path, "--layers")
    assert start(bench.main, *words) == 0
    [file] = tmp_path.glob("*.json")
    found = json.loads(file.read_text())
    rows = {row["rival"]: row for row in found["steps"] if "ms" in row}
    assert found["text_tokens"] == 32 and found["resolution"] == [96]
    assert {"float32, eager", "int8 codes, cast, eager", "ours exact, eager", "ours fast, eager"} <= rows.keys()
    assert rows["ours exact, eager"]["relative_error"] < 1e-5 and rows["ours fast, eager"]["relative_error"] < 0.05
    modulation = {(row["n"], row["k"]) for row in found["layers"] if row.get("modulation")}
    assert modulation == {(6 * 128, 128), (3 * 128, 128)}


def test_benchmark_pictures_know_their_text_encoder(start, klein_folder, tmp_path):
    packed_folder(start, klein_folder, tmp_path / "packed", "--method", "mse")
    (tmp_path / "prompts.txt").write_text("a dog\n")
    words = ("test.py", tmp_path / "packed", "--prompt_list", tmp_path / "prompts.txt", "--samples_per_prompt", 1)
    assert start(test_script.main, *words, "--output_dir", tmp_path / "test", "--device", "cpu") == 0
    manifest = json.loads((tmp_path / "test/geneval/packed/manifest.json").read_text())
    assert len(manifest["text_encoders"]) == 1 and manifest["steps"] == 4


def test_a_checkpoint_of_the_other_family_names_its_flag(start, klein_folder, pipeline_folder, tmp_path, capsys):
    packed_folder(start, klein_folder, tmp_path / "packed", "--method", "mse")
    words = ("test.py", tmp_path / "packed", "--model", pipeline_folder, "--output_dir", tmp_path / "test")
    assert start(test_script.main, *words, "--device", "cpu") == 1
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert "Flux2Transformer2DModel" in last and "name the checkpoint's teacher with --model" in last
