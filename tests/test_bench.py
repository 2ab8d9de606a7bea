"""bench.py end to end on small transformers on the CPU, its rivals' numbers, and its errors."""

import json
import re
import statistics
import sys

import diffusers
import pytest
import torch
from diffusers import FluxTransformer2DModel as Diffusers

import bench
from models.modeling_flux_quant import FluxTransformer2DModel
from models.packing import PackedLinear
from utils import rivals
from utils.metrics import nmse

SMALL = {
    "in_channels": 16, "num_layers": 1, "num_single_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2,
    "joint_attention_dim": 32, "pooled_projection_dim": 32, "guidance_embeds": True, "axes_dims_rope": (4, 6, 6),
}  # fmt: skip
PER_BLOCK = {"double": 14, "single": 6}  # linears: q k v out, their twins, two feed-forwards and modulations; …


@pytest.fixture
def folder(tmp_path):
    """A transformer's config.json and nothing else."""
    (tmp_path / "model").mkdir()
    config = SMALL | {"_class_name": "FluxTransformer2DModel", "_diffusers_version": "0"}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    return tmp_path / "model"


def small_model(dtype=torch.float32):
    return rivals.random_packed(SMALL, dtype, torch.device("cpu"), seed=0)


def measured(tmp_path, *flags):
    bench.main(command(tmp_path, *flags))
    return figures(tmp_path, *flags)


def command(tmp_path, *flags):
    return ["--device", "cpu", "--rounds", "1", "--output", str(tmp_path / "out"), *map(str, flags)]


def figures(tmp_path, *flags):
    return json.loads((tmp_path / "out" / f"{bench.command_name(command(tmp_path, *flags))}.json").read_text())


def velocity(model, args, size):
    with torch.no_grad():
        return model(**bench.step_inputs(SMALL, size, args), return_dict=False)[0]


def test_a_model_of_random_codes_is_ternary_of_unit_gain_and_the_same_again():
    model, again = small_model(), small_model()
    packed = [m for m in model.modules() if isinstance(m, PackedLinear)]
    assert len(packed) == PER_BLOCK["double"] + 2 * PER_BLOCK["single"]
    assert not any(p.is_meta for p in model.parameters())
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    layer = max(packed, key=lambda m: m.weight_codes.numel())
    codes = layer.codes()
    assert set(codes.unique().tolist()) == {-1, 0, 1}
    assert (codes != 0).double().mean().item() == pytest.approx(rivals.NONZERO, abs=0.03)
    # Steps uniform on (1 ± 1/2)·α: E α² = 13/12, so the variance is 13/12 of 1/in.
    assert layer.dequantize().double().square().mean() * layer.in_features == pytest.approx(13 / 12, rel=0.1)


@pytest.mark.parametrize("kind", ["float32", "int8 codes, cast"])
def test_rivals_hold_the_same_numbers(kind):
    packed = small_model()
    rival = rivals.twin(packed, rivals.MAKERS[kind])
    reference = Diffusers(**SMALL)
    weights = {f"{n}.weight": m.dequantize() for n, m in packed.named_modules() if isinstance(m, PackedLinear)}
    others = {n: p for n, p in packed.named_parameters() if not n.endswith(("weight_codes", "weight_clip_val"))}
    reference.load_state_dict(weights | others)
    args = bench.parse_args(["--device", "cpu"])
    assert nmse(velocity(rival, args, 32), velocity(reference, args, 32)) < 1e-9


def test_fp8_rows_and_tokens(monkeypatch):
    def scaled_mm(a, b, scale_a, scale_b, bias, out_dtype, use_fast_accum):
        assert a.dtype == b.dtype == torch.float8_e4m3fn and a.is_contiguous() and b.T.is_contiguous()
        assert scale_a.shape == (a.shape[0], 1) and scale_b.shape == (1, b.shape[1])
        return ((a.double() * scale_a) @ (b.double() * scale_b) + bias.double()).to(out_dtype)

    monkeypatch.setattr(torch, "_scaled_mm", scaled_mm)
    torch.manual_seed(0)
    codes = torch.randint(-1, 2, (48, 64)).to(torch.int8)
    packed = PackedLinear.from_codes(codes, torch.rand(48, 1) + 0.1, torch.randn(48).bfloat16(), 0)
    x = torch.randn(2, 5, 64).bfloat16() * torch.tensor([1.0, 1e3, 1e-3, 0, 1]).bfloat16()[:, None]
    y = rivals.Fp8Linear(packed)(x)
    wanted = x.double() @ packed.dequantize().double().T + packed.bias.double()
    # e4m3 has three bits of mantissa: a relative rounding error of at most 2^-4, of 2^-4/√3 in the mean square.
    for token in range(5):
        assert nmse(y[:, token], wanted[:, token]) < 2**-8 / 3
    assert y.dtype == torch.bfloat16


def test_resident_and_disk_bytes_follow_from_the_bits():
    model = small_model(torch.bfloat16)
    resident = disk = 0
    for name, parameter in model.named_parameters():
        if name.endswith("weight_codes"):
            layer = model.get_submodule(name.removesuffix(".weight_codes"))
            resident += layer.out_features * layer.in_features // 4
            disk += layer.out_features * -(-layer.in_features // 5)
        else:
            resident += parameter.numel() * parameter.element_size()
            disk += parameter.numel() * parameter.element_size()
    assert rivals.model_bytes(model) == (resident, disk)


@pytest.mark.parametrize(
    ("place", "flags", "what"),
    [
        ("random_packed", (), "while the random transformer is made"),
        ("bench_layers", ("--layers", "--no_steps"), "while layers are measured"),
        ("bench_load", ("--load", "--no_steps"), "while a packed checkpoint is loaded"),
        ("twin", ("--resolution", 32), None),  # a rival's, of full precision
    ],
)
def test_out_of_memory_says_what_was_done_and_which_flag_to_change(
    place, flags, what, folder, start, monkeypatch, capsys, tmp_path
):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(bench, place, full)
    words = command(tmp_path, "--config", folder, "--text_tokens", 7, *flags)
    assert start(bench.main, "bench.py", *words) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    begun = f"error: out of memory {what}" if what else "error: float32, eager: out of memory"
    assert re.match(rf"bench\.py: {begun} \(peak [\d.]+ GiB of host memory\): try a smaller --resolution", line), line


def test_bench_measures_every_rival(folder, tmp_path, capsys):
    found = measured(tmp_path, "--config", folder, "--resolution", 32, 48, "--layers", "--load", "--text_tokens", 7)
    printed = capsys.readouterr().out
    name = "device_cpu_rounds_1_model_resolution_32_48_layers_load_text_tokens_7"
    assert (tmp_path / "out" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == [f"{name}.json", f"{name}.png"]
    assert found["seed"] == 42 and found["device"] and found["versions"]["torch"] == torch.__version__
    assert found["command"].startswith("python bench.py --device cpu") and found["text_tokens"] == 7

    rows = {(row["resolution"], row["rival"]): row for row in found["steps"]}
    names = ["float32, eager", "int8 codes, cast, eager", "ours exact, eager", "ours fast, eager"]
    assert {(size, name) for size in (32, 48) for name in names} == {key for key, row in rows.items() if "ms" in row}
    for row in rows.values():
        assert row["rival"] in printed
        if "ms" not in row:
            assert row["problem"] in ("not installed", "needs a GPU with fp8 (sm_89 or newer)")
            continue
        assert len(row["runs_ms"]) == rivals.RUNS and min(row["runs_ms"]) > 0
        assert row["ms"] == pytest.approx(statistics.median(row["runs_ms"]))
        anchor = rows[row["resolution"], "float32, eager"]
        assert row["ratio"] == pytest.approx(row["ms"] / anchor["ms"])
        assert row["peak_bytes"] is None and row["resident_bytes"] > 0

    # Every error against the reference it names, computed anew.
    packed = rivals.random_packed(SMALL, torch.float32, torch.device("cpu"), found["seed"])
    full = rivals.twin(packed, rivals.MAKERS["float32"])
    args = bench.parse_args(["--device", "cpu", "--text_tokens", "7"])
    for size in (32, 48):
        exact = velocity(packed.set_inference_mode("exact"), args, size)
        fast = velocity(packed.set_inference_mode("fast"), args, size)
        row = rows[size, "ours fast, eager"]
        wanted = ((fast - exact).double().norm() / exact.double().norm()).item()
        assert row["error_against"] == "ours exact, eager" and wanted > 1e-3
        assert row["relative_error"] == pytest.approx(wanted, rel=1e-3)
        row, wanted = rows[size, "ours exact, eager"], nmse(exact, velocity(full, args, size)) ** 0.5
        assert row["error_against"] == "float32, eager"
        assert row["relative_error"] == pytest.approx(wanted, abs=1e-6) and wanted < 1e-4

    shapes = {(row["n"], row["k"]): row["count"] for row in found["layers"] if "ms" in row}
    wide = 32  # of the residual stream: 2 heads of 16
    assert shapes == {
        (6 * wide, wide): 2, (wide, wide): 8 + 2 * 3, (4 * wide, wide): 2 + 2, (wide, 4 * wide): 2, (3 * wide, wide): 2,
        (wide, 5 * wide): 2,
    }  # fmt: skip
    for row in found["layers"]:
        if "ms" in row:
            assert row["tflops"] == pytest.approx(2 * row["m"] * row["n"] * row["k"] / row["ms"] / 1e9)
            assert row["m"] in ((1, 512) if row["modulation"] else (4 + 7, 9 + 7))
    assert max(row["of_ceiling"] for row in found["layers"] if row["rival"] == "float32") == 1
    assert {row["rival"] for row in found["layers"] if "ms" in row} == {
        "float32", "bfloat16", "int8 codes, cast", "ours exact", "ours fast"
    }  # fmt: skip

    disk = rows[32, "ours exact, eager"]["disk_bytes"]
    assert set(found["load"]["decoded_gb_per_second"]) == {"cpu"} and found["load"]["decoded_gb_per_second"]["cpu"] > 0
    assert found["load"]["seconds"] > 0 and found["load"]["bytes"] > disk  # the headers and the index besides
    assert found["load"]["seconds_to_first_step"] > 0


def test_ours_are_compiled_in_our_way_and_the_others_in_it_only_if_asked(monkeypatch):
    monkeypatch.setattr(bench, "compile_options", lambda device: {"ours": True})
    plain = {"fullgraph": True, "dynamic": False}
    for flags, ours, others in (
        ([], {"ours": True}, None),
        (["--cpp_wrapper"], {"cpp_wrapper": True, "ours": True}, {"cpp_wrapper": True}),
        (["--same_options"], {"ours": True}, {"ours": True}),
    ):
        args = bench.parse_args(["--device", "cpu", "--compile", *flags])
        assert bench.compile_settings(args, ours=True) == plain | {"options": ours}
        assert bench.compile_settings(args, ours=False) == plain | {"options": others}


def test_some_rivals_with_several_pictures(folder, tmp_path):
    flags = ("--config", folder, "--resolution", 32, "--batch_size", 3, "--rivals", "fast", "cast")
    found = measured(tmp_path, *flags)
    assert found["batch_size"] == 3
    names = ["float32, eager", "int8 codes, cast, eager", "ours fast, eager"]
    assert [row["rival"] for row in found["steps"]] == names and all(row["ms"] > 0 for row in found["steps"])
    args = bench.parse_args(["--device", "cpu", "--batch_size", "3"])
    model, inputs = small_model(), bench.step_inputs(SMALL, 32, args)
    alone = {name: part if name.endswith("ids") else part[1:2] for name, part in inputs.items()}
    with torch.no_grad():
        together, one = (model(**given, return_dict=False)[0] for given in (inputs, alone))
    assert together.shape == (3, 4, SMALL["in_channels"])
    torch.testing.assert_close(together[1:2], one, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("flags, expected", [([], None), (["--cpp_wrapper"], {"cpp_wrapper": True})])
def test_compiled_rivals_beside_eager_ones(folder, tmp_path, monkeypatch, flags, expected):
    graphs, options_seen = [], []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def compile_module(self, compile_module=torch.nn.Module.compile, **settings):  # with no C++ compiler at work
        options_seen.append(settings.pop("options", None))
        compile_module(self, backend=backend, **settings)

    monkeypatch.setattr(torch.nn.Module, "compile", compile_module)
    found = measured(tmp_path, "--config", folder, "--resolution", 32, "--compile", *flags)
    assert options_seen and all(options == expected for options in options_seen)
    assert found["compile_options"] == {"ours": expected, "others": expected}
    rows = {row["rival"]: row for row in found["steps"] if "ms" in row}
    assert set(rows) == {
        "float32, eager", "float32, compiled", "int8 codes, cast, eager", "int8 codes, cast, compiled",
        "ours exact, eager", "ours exact, compiled", "ours fast, eager", "ours fast, compiled",
    }  # fmt: skip
    assert rows["float32, compiled"]["ratio"] == 1
    assert rows["ours exact, compiled"]["relative_error"] < 1e-4
    fast = [rows[f"ours fast, {way}"]["relative_error"] for way in ("eager", "compiled")]
    assert fast[0] == pytest.approx(fast[1], rel=0.05)
    # diffusers' model: the double blocks, the first single block, and the others, whose input has other strides. Ours:
    # double blocks and single blocks in each mode, and what is around them.
    assert len(graphs) == 2 * 3 + 2 * 2 + 3


def test_graphs_are_compared_with_graphs():
    args = bench.parse_args(["--device", "cpu", "--dtype", "bfloat16", "--compile"])
    args.device = torch.device("cuda")
    rivals = {rival.name: rival for rival in bench.step_rivals(args)}
    for name, anchor in {
        "bfloat16, graph": "bfloat16, graph", "ours fast, graph": "bfloat16, graph",
        "ours fast, compiled": "bfloat16, compiled", "bfloat16, eager": "bfloat16, compiled",
    }.items():  # fmt: skip
        assert bench.anchor_of(rivals[name], list(rivals.values())).name == anchor


def test_only_the_ways_that_are_asked_for():
    flags = ["--device", "cpu", "--compile", "--ways", "compiled", "--rivals", "ours fast"]
    found = bench.step_rivals(bench.parse_args(flags))
    assert [rival.name for rival in found] == ["float32, compiled", "ours fast, compiled"]


def test_rivals_share_the_memory_of_a_gpu_if_they_fit(monkeypatch):
    packed = small_model(torch.bfloat16)
    args = bench.parse_args(["--device", "cpu", "--dtype", "bfloat16"])
    args.device = torch.device("cuda")  # of which nothing but its free memory is asked
    weights = sum(m.in_features * m.out_features for m in packed.modules() if isinstance(m, PackedLinear))
    kinds = ["bfloat16", "int8 codes, cast", "ours"]
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (4 * weights, 0))  # 2 and 1 bytes a weight: 3
    assert bench.groups_that_fit(packed, kinds, args) == [kinds]
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (3 * weights, 0))
    assert bench.groups_that_fit(packed, kinds, args) == [["bfloat16", "int8 codes, cast"], ["bfloat16", "ours"]]


def test_where_memory_is_short_the_anchor_is_repeated(folder, tmp_path, monkeypatch):
    groups = [["float32", "int8 codes, cast"], ["float32", "ours"]]
    monkeypatch.setattr(bench, "groups_that_fit", lambda packed, kinds, args: groups)
    found = measured(tmp_path, "--config", folder, "--resolution", 32)
    rows = {row["rival"]: row for row in found["steps"]}
    assert len(rows["float32, eager"]["runs_ms"]) == 2 * rivals.RUNS
    assert len(rows["ours fast, eager"]["runs_ms"]) == rivals.RUNS
    assert all(rows[f"ours {mode}, eager"]["ratio"] > 0 for mode in ("exact", "fast"))


def test_a_rival_that_fails_is_a_row_and_one_of_ours_an_error(folder, tmp_path, monkeypatch):
    def fails(layer):
        raise RuntimeError("no\n  luck")

    monkeypatch.setitem(rivals.MAKERS, "int8 codes, cast", fails)
    found = measured(tmp_path, "--config", folder, "--resolution", 32)
    rows = {row["rival"]: row for row in found["steps"]}
    assert rows["int8 codes, cast, eager"]["problem"] == "RuntimeError: no luck" and rows["ours fast, eager"]["ms"] > 0

    monkeypatch.setattr(FluxTransformer2DModel, "set_inference_mode", lambda self, mode: fails(None))
    with pytest.raises(ValueError, match="^ours exact, eager: RuntimeError: no luck$"):
        measured(tmp_path, "--config", folder, "--resolution", 32)
    rows = {row["rival"]: row for row in figures(tmp_path, "--config", folder, "--resolution", 32)["steps"]}
    assert rows["float32, eager"]["ms"] > 0


def test_a_pipeline_names_its_own_sizes(pipeline_folder):
    config, text_tokens, sizes, kind = bench.read_config(str(pipeline_folder))
    assert config["num_single_layers"] == 1 and not any(key.startswith("_") for key in config)
    assert sizes == [128]
    config, text_tokens, sizes, kind = bench.read_config("tiny-flux")
    assert config["num_single_layers"] == 6 and (text_tokens, sizes) == (24, [128])


@pytest.mark.parametrize(
    ("name", "parameters", "tokens"),
    [("flux-dev", 11.901e9, 512), ("flux-schnell", 11.891e9, 256), ("flux2-klein-4b", 3.876e9, 512)],
)
def test_architectures_have_the_published_size(name, parameters, tokens):
    config, text_tokens, sizes, kind = bench.read_config(name)
    with torch.device("meta"):
        model = getattr(diffusers, kind.__name__)(**config)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(parameters, abs=1e6)
    assert text_tokens == tokens and sizes == [1024, 512]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--config", "nowhere"], "--config nowhere: use one of flux-dev, flux-schnell, flux2-klein-4b, tiny-flux"),
        (["--resolution", "1000"], "--resolution must be a multiple of 16, got 1000"),
        (["--resolution", "512", "0"], "--resolution must be at least 16 and at most 8192, got 0"),
        (["--resolution", "65536"], "--resolution must be at least 16 and at most 8192, got 65536"),
        (["--seed", str(2**64)], "--seed must be at least 0 and at most 4294967295"),
        (["--rounds", "0"], "--rounds must be at least 1, got 0"),
        (["--text_tokens", "0"], "--text_tokens must be at least 1, got 0"),
        (["--device", "abacus"], "--device abacus is not available here"),
        (["--attention", "brisk"], "--attention brisk: `backend='brisk'` must be one of"),
        (["--attention", "_native_npu"], "--attention _native_npu: NPU Attention backend '_native_npu' is not usable"),
        (["--mode", "brisk"], "argument --mode: invalid choice: 'brisk'"),
        (["--no_steps"], "--no_steps leaves nothing to measure"),
        (["--device", "cpu", "--cpp_wrapper"], "--cpp_wrapper is a way to compile: add --compile"),
        (["--device", "cpu", "--ways", "compiled"], "--ways compiled needs --compile"),
        (["--device", "cpu", "--compile", "--ways", "graph"], "--ways graph needs a GPU and --compile"),
    ],
)
def test_usage_errors_are_one_line(flags, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench.py"])
    with pytest.raises(SystemExit) as stopped:
        bench.main(flags)
    written = capsys.readouterr().err
    assert stopped.value.code == 2 and written.startswith(f"bench.py: error: {message}") and written.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there(capsys):
    with pytest.raises(SystemExit):
        bench.main(["--device", "cuda"])
    assert "--device cuda is not available here: use one of" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ('{"_class_name": "UNet2DModel"}', "describes a UNet2DModel, expected a FluxTransformer2DModel"),
        ('{"_class_name": "FluxTransformer2DModel", "flavour": 1}', "describes no transformer"),
    ],
)
def test_a_config_that_is_none(text, message, tmp_path, capsys):
    (tmp_path / "config.json").write_text(text)
    try:
        bench.main(["--config", str(tmp_path), "--device", "cpu", "--output", str(tmp_path / "out")])
        problem = "none"
    except ValueError as error:
        problem = str(error)
    except SystemExit:
        problem = capsys.readouterr().err
    assert "--config " in problem and message in problem and problem.strip().count("\n") == 0


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("out of\n luck", "RuntimeError: out of luck"),
        ("a job\n\nName=k\nTraceback (most recent call last):\n  File x\nfp64\n", "RuntimeError: a job Name=k fp64"),
        ("no\n\nSet TORCHDYNAMO_VERBOSE=1 for the internal stack trace", "RuntimeError: no"),
        ("x" * 1000, "RuntimeError: " + "x" * 226),
        ("", "RuntimeError: "),
    ],
)
def test_what_went_wrong_is_told_by_its_cause(message, expected):
    assert rivals.one_line(RuntimeError(message)) == expected


def test_the_script_ends_in_one_line(run, tmp_path):
    result = run("bench.py", "--config", "nowhere", "--output", tmp_path / "out")
    assert result.returncode == 2 and result.stderr.strip().splitlines()[-1].startswith("bench.py: error: --config")
    assert not (tmp_path / "out").exists()


def test_each_command_has_a_file_of_its_own():
    """Those of README, whose later ones once replaced the figures of the first; the output folder does not count."""
    commands = {
        "--config tiny-flux --device cpu": "tiny-flux_device_cpu",
        "--model tiny-flux --device cpu --output_dir a/b": "tiny-flux_device_cpu",
        "--config flux-dev --resolution 1024 512 --cpp_wrapper": "flux-dev_resolution_1024_512_cpp_wrapper",
        "--config flux-dev --layers --load --no_steps --output=x": "flux-dev_layers_load_no_steps",
        "--config flux-dev --device cpu --layers --no_steps": "flux-dev_device_cpu_layers_no_steps",
        "--config=../my/model": "model",
        "": "bench",
    }
    for words, name in commands.items():
        assert bench.command_name(words.split()) == name
    long = [bench.command_name(["--mode", "x" * 300, last]) for last in ("a", "b")]
    assert max(map(len, long)) <= 150 and long[0] != long[1]


def test_names_that_every_script_takes():
    line = "--model flux-dev --output_dir o --dtype float16 --seed 1 --resolution 64 --device cpu"
    args = bench.parse_args(line.split())
    assert (args.config, str(args.output), args.dtype, args.seed) == ("flux-dev", "o", torch.float16, 1)
    args = bench.parse_args("--config flux-dev --output o --device cpu".split())
    assert (args.config, str(args.output)) == ("flux-dev", "o")
