"""Loading a pipeline and its errors, drawing, recording."""

import copy
import math
import shutil
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import numpy as np
import psutil
import pytest
import torch
from diffusers import FluxPipeline
from diffusers.models import attention_dispatch

from models.modeling_flux_quant import FluxTransformer2DModel
from utils import sampling
from utils.sampling import (
    check_offload,
    draw_in_less,
    drop_transformer,
    generate_images,
    load_pipeline,
    place,
    record_velocities,
    set_attention,
    stream_settings,
    unplace,
)

PROMPTS = ["a red star and a blue ring", "three hearts on grey paper", "a cross above a moon"]
SETTINGS = {"num_inference_steps": 3, "guidance_scale": 2.0}


@pytest.fixture(scope="module")
def pipe(pipeline_folder):
    return load_pipeline(str(pipeline_folder), torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_load_pipeline(dtype, pipeline_folder):
    pipe = load_pipeline(str(pipeline_folder), dtype)
    reference = FluxPipeline.from_pretrained(pipeline_folder)
    for part in ("transformer", "vae", "text_encoder", "text_encoder_2"):
        ours, theirs = getattr(pipe, part), getattr(reference, part)
        assert ours.dtype == dtype and ours.device.type == "cpu"
        for name, parameter in theirs.named_parameters():
            assert torch.equal(ours.get_parameter(name), parameter.to(dtype)), f"{part}.{name}"


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-64])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "model_index.json").unlink(), "no file named model_index.json"),
        (lambda f: truncate(f / "model_index.json"), "not a valid JSON"),
        (lambda f: shutil.rmtree(f / "vae"), "config.json"),
        (lambda f: shutil.rmtree(f / "tokenizer_2"), "no vocabulary in tokenizer_2"),
        (lambda f: (f / "tokenizer" / "tokenizer.json").unlink(), "no vocabulary in tokenizer"),
        (lambda f: truncate(f / "tokenizer" / "tokenizer.json"), ""),
        (lambda f: (f / "text_encoder" / "config.json").unlink(), ""),
        (lambda f: truncate(f / "text_encoder_2" / "model.safetensors"), "incomplete metadata"),
        (lambda f: truncate(f / "transformer" / "diffusion_pytorch_model.safetensors"), "diffusion_pytorch_model"),
        (lambda f: truncate(f / "vae" / "config.json"), "not a valid JSON"),
    ],
)
def test_damaged_folder(damage, message, pipeline_folder, tmp_path):
    folder = tmp_path / "damaged"
    shutil.copytree(pipeline_folder, folder)
    damage(folder)
    with pytest.raises(ValueError) as error:
        load_pipeline(str(folder), torch.float32)
    assert str(error.value).startswith(f"{folder}: cannot be loaded (")
    assert message in str(error.value)
    assert str(error.value).endswith("save or download it again")


def test_folder_of_another_pipeline(pipeline_folder, tmp_path):
    index = (pipeline_folder / "model_index.json").read_text()
    (tmp_path / "model_index.json").write_text(index.replace('"FluxPipeline"', '"StableDiffusionPipeline"'))
    message = f"^{tmp_path}: expected a FluxPipeline or a Flux2KleinPipeline, found a StableDiffusionPipeline; "
    with pytest.raises(ValueError, match=message):
        load_pipeline(str(tmp_path), torch.float32)


@pytest.mark.parametrize("name", ["nothing", "a/b/c", "../nothing", "/no/where", "owner/na me", "README"])
def test_neither_a_folder_nor_a_hub_id(name):
    with pytest.raises(ValueError, match=rf"^{name}: neither a folder nor a hub id \(owner/model\); check the path$"):
        load_pipeline(name, torch.float32)


def test_a_file_is_not_a_hub_id(pipeline_folder, monkeypatch):
    monkeypatch.chdir(pipeline_folder)
    for name in ("model_index.json", "vae/config.json"):
        with pytest.raises(ValueError, match="neither a folder nor a hub id"):
            load_pipeline(name, torch.float32)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub on this machine that answers every request with hub["status"] and, as huggingface.co does, hub["code"]."""
    answer = {"status": 500, "code": None, "requests": []}

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self):
            answer["requests"].append(self.path)
            self.send_response(answer["status"])
            if answer["code"]:
                self.send_header("X-Error-Code", answer["code"])
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_GET = do_HEAD

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    address = f"http://127.0.0.1:{server.server_port}"
    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # between the hub client's attempts
    answer["server"] = server
    yield answer
    server.shutdown()
    server.server_close()


@pytest.mark.filterwarnings("ignore:.*local_dir_use_symlinks")  # diffusers' business
@pytest.mark.parametrize(
    ("status", "code", "message"),
    [
        (403, "GatedRepo", "access is gated; .* https://huggingface.co/owner/model, then run `hf auth login`"),
        (401, "GatedRepo", "access is gated; .* https://huggingface.co/owner/model, then run `hf auth login`"),
        (401, "RepoNotFound", "no such model on the hub or it is private; check the name, or run `hf auth login`"),
        (404, "RepoNotFound", "no such model on the hub or it is private"),
        (404, "EntryNotFound", "not as a diffusers pipeline; give one, such as black-forest-labs/FLUX.1-dev"),
        (403, None, "the hub answers 403; renew your token with `hf auth login`, or try later"),
        (503, None, "the hub answers 503; .* try later"),
    ],
)
def test_what_the_hub_refuses(status, code, message, hub):
    """Through the real clients of diffusers and huggingface_hub, whose wrapping of errors differs between versions."""
    hub.update(status=status, code=code)
    with pytest.raises(ValueError, match=f"^owner/model: .*{message}") as error:
        load_pipeline("owner/model", torch.float32)
    assert "/owner/model/resolve/main/model_index.json" in hub["requests"]
    assert "\n" not in str(error.value)


@pytest.mark.filterwarnings("ignore:.*local_dir_use_symlinks")
@pytest.mark.parametrize("reason", ["no network", "offline"])
def test_no_hub(reason, hub, monkeypatch):
    if reason == "offline":
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    else:
        hub["server"].shutdown()
        hub["server"].server_close()
    with pytest.raises(ValueError, match="^owner/model: .* the hub cannot be reached; check the network$"):
        load_pipeline("owner/model", torch.float32)
    assert not hub["requests"]


@pytest.mark.filterwarnings("ignore:.*local_dir_use_symlinks")
def test_an_incomplete_download_is_not_blamed_on_the_network(hub, pipeline_folder, tmp_path, monkeypatch):
    """What an interrupted download leaves in the cache: the index and a part of the rest."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    repository = tmp_path / "cache" / "models--owner--model"
    snapshot = repository / "snapshots" / ("0" * 40)
    shutil.copytree(pipeline_folder, snapshot)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    assert load_pipeline("owner/model", torch.float32).transformer is not None  # from the cache, without network

    truncate(snapshot / "text_encoder" / "model.safetensors")
    with pytest.raises(ValueError, match="^owner/model: cannot be loaded .* download it again$"):
        load_pipeline("owner/model", torch.float32)


def test_images_are_those_of_diffusers(pipe, pipeline_folder):
    images = generate_images(pipe, PROMPTS, seed=5, **SETTINGS)
    assert images.shape == (3, 3, 128, 128) and images.dtype == torch.float32
    assert 0 <= images.min() < images.max() <= 1
    stock = FluxPipeline.from_pretrained(pipeline_folder)
    stock.set_progress_bar_config(disable=True)
    for i, prompt in enumerate(PROMPTS):
        generator = torch.Generator().manual_seed(5 + i)
        picture = stock(
            prompt, height=128, width=128, max_sequence_length=24, generator=generator, output_type="np", **SETTINGS
        ).images[0]
        np.testing.assert_allclose(images[i].permute(1, 2, 0), picture, atol=1e-5)


def test_a_picture_depends_on_its_prompt_and_seed_only(pipe):
    images = generate_images(pipe, PROMPTS, seed=5, **SETTINGS)
    assert torch.equal(generate_images(pipe, PROMPTS[:1], seed=5, **SETTINGS), images[:1])
    assert torch.equal(generate_images(pipe, PROMPTS[1:], seed=6, **SETTINGS), images[1:])
    for batch_size in (2, 3, 8):
        batched = generate_images(pipe, PROMPTS, seed=5, batch_size=batch_size, **SETTINGS)
        torch.testing.assert_close(batched, images, atol=1e-4, rtol=0)
    torch.manual_seed(123)
    assert torch.equal(generate_images(pipe, PROMPTS, seed=5, **SETTINGS), images)
    assert not torch.allclose(generate_images(pipe, PROMPTS, seed=6, **SETTINGS), images, atol=1e-2)
    assert not torch.allclose(generate_images(pipe, PROMPTS[::-1], seed=5, **SETTINGS)[0], images[0], atol=1e-3)


def test_size(pipe):
    assert generate_images(pipe, PROMPTS[:1], size=64, **SETTINGS).shape == (1, 3, 64, 64)


def manual_sampling(pipe, prompt, seed, steps, guidance):
    """Rectified flow by hand: z ← z + (σ' − σ)·v with FLUX's shifted σ; the states z, σ, v [1, L, C] of every step."""
    embeds, pooled, txt_ids = pipe.encode_prompt(prompt, None, max_sequence_length=24)
    side, channels = 128 // 8, pipe.vae.config.latent_channels
    noise = torch.randn(1, channels, side, side, generator=torch.Generator().manual_seed(seed))
    patches = noise.unfold(2, 2, 2).unfold(3, 2, 2)  # [1, C, rows, columns, 2, 2], packed into one token a patch
    z = patches.permute(0, 2, 3, 1, 4, 5).reshape(1, (side // 2) ** 2, channels * 4)
    rows, columns = torch.meshgrid(torch.arange(side // 2.0), torch.arange(side // 2.0), indexing="ij")
    img_ids = torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).flatten(0, 1)
    mu = 0.5 + (1.15 - 0.5) * (z.shape[1] - 256) / (4096 - 256)
    uniform = [1 - i * (1 - 1 / steps) / (steps - 1) for i in range(steps)]
    sigmas = [math.exp(mu) / (math.exp(mu) + 1 / t - 1) for t in uniform] + [0.0]
    states = []
    for sigma, following in zip(sigmas, sigmas[1:], strict=False):
        velocity = pipe.transformer(
            hidden_states=z, timestep=torch.tensor([sigma]), guidance=torch.tensor([guidance]),
            encoder_hidden_states=embeds, pooled_projections=pooled, txt_ids=txt_ids, img_ids=img_ids,
        ).sample  # fmt: skip
        states.append((z, sigma, velocity))
        z = z + (following - sigma) * velocity
    return states


@torch.no_grad()
def test_recorded_velocities_are_those_of_a_loop_by_hand(pipe):
    with record_velocities(pipe.transformer) as calls:
        generate_images(pipe, PROMPTS[:2], seed=9, num_inference_steps=4, guidance_scale=2.5)
    assert len(calls) == 2 * 4
    for i, prompt in enumerate(PROMPTS[:2]):
        states = manual_sampling(pipe, prompt, seed=9 + i, steps=4, guidance=2.5)
        for (inputs, velocity), (z, sigma, expected) in zip(calls[4 * i : 4 * i + 4], states, strict=True):
            torch.testing.assert_close(inputs["hidden_states"], z, atol=1e-4, rtol=0)
            assert inputs["timestep"].tolist() == pytest.approx([sigma], abs=1e-5)
            torch.testing.assert_close(velocity, expected, atol=1e-4, rtol=0)
            again = pipe.transformer(**inputs)[0]  # nothing that is kept was changed later
            torch.testing.assert_close(again, velocity, atol=1e-6, rtol=0)


def test_recording_ends_with_the_block(pipe):
    with pytest.raises(KeyError), record_velocities(pipe.transformer) as calls:
        raise KeyError
    generate_images(pipe, PROMPTS[:1], **SETTINGS)
    assert calls == []


@pytest.mark.parametrize("offload", ["model", "sequential"])
def test_offloading_needs_a_gpu(offload):
    with pytest.raises(ValueError, match="needs a GPU"):
        check_offload(offload, torch.device("cpu"))


def test_an_offload_that_does_not_exist():
    with pytest.raises(ValueError, match="model, sequential"):
        check_offload("disk", torch.device("cpu"))


@pytest.mark.parametrize(
    ("offload", "device", "advice"),
    [
        (None, "cuda", "try --offload or a smaller --batch_size"),
        ("model", "cuda", "try --offload sequential or a smaller --batch_size"),
        ("sequential", "cuda", "try a smaller --batch_size"),
        (None, "cpu", "try a smaller --batch_size"),
    ],
)
def test_what_draws_in_less_memory(offload, device, advice):
    assert draw_in_less(offload, torch.device(device), "--batch_size") == advice


def test_a_streamed_pipeline_draws_the_same(pipe, pipeline_folder):
    # group offloading works from the CPU to the CPU too; the hooks are the same
    streamed, cpu = load_pipeline(str(pipeline_folder), torch.float32), torch.device("cpu")
    expected = generate_images(pipe, PROMPTS, **SETTINGS)
    place(streamed, cpu, "sequential")
    assert torch.equal(generate_images(streamed, PROMPTS, **SETTINGS), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("offload", [None, "model", "sequential"])
@pytest.mark.parametrize("large", [False, True])
def test_an_offloaded_pipeline_draws_the_same(offload, large, pipeline_folder, monkeypatch):
    if large:  # as if the transformer did not fit
        monkeypatch.setattr(sampling, "_device_bytes", lambda device: 1000)
    device = torch.device("cuda")
    expected = generate_images(load_pipeline(str(pipeline_folder), torch.float32).to(device), PROMPTS, **SETTINGS)
    pipe = load_pipeline(str(pipeline_folder), torch.float32)
    for _ in range(2):  # as test.py does, with another transformer in the same place
        place(pipe, device, offload)
        torch.testing.assert_close(generate_images(pipe, PROMPTS, **SETTINGS), expected, rtol=0, atol=2e-3)
        transformer = FluxTransformer2DModel.from_pretrained(pipeline_folder, subfolder="transformer")
        drop_transformer(pipe)
        pipe.register_modules(transformer=transformer)


@pytest.mark.parametrize("offload", [None, "sequential"])
def test_what_was_placed_is_taken_back(offload, pipe, pipeline_folder):
    placed, cpu = load_pipeline(str(pipeline_folder), torch.float32), torch.device("cpu")
    place(placed, cpu, offload)
    unplace(placed)
    parts = [part for part in placed.components.values() if isinstance(part, torch.nn.Module)]
    assert not any(sampling._is_group_offload_enabled(part) for part in parts)
    assert torch.equal(generate_images(placed, PROMPTS, **SETTINGS), generate_images(pipe, PROMPTS, **SETTINGS))


def test_one_model_computes_attention_by_another_backend(pipe, monkeypatch):
    def backend(*_, **__):
        raise ZeroDivisionError

    name = attention_dispatch.AttentionBackendName._NATIVE_MATH
    expected = generate_images(pipe, PROMPTS[:1], **SETTINGS)
    other = copy.deepcopy(pipe.transformer)
    set_attention("_native_math", other)
    teacher = pipe.transformer
    try:
        pipe.transformer = other
        torch.testing.assert_close(generate_images(pipe, PROMPTS[:1], **SETTINGS), expected, rtol=1e-3, atol=1e-3)
        monkeypatch.setitem(attention_dispatch._AttentionBackendRegistry._backends, name, backend)
        with pytest.raises(ZeroDivisionError):
            generate_images(pipe, PROMPTS[:1], **SETTINGS)
    finally:
        pipe.transformer = teacher
    assert torch.equal(generate_images(pipe, PROMPTS[:1], **SETTINGS), expected)


@pytest.mark.parametrize(("name", "advice"), [("_native_npu", "install `torch_npu`"), ("fastest", "must be one of")])
def test_a_backend_of_attention_that_is_not_there_is_one_line(name, advice, pipe, capfd):
    for model in (None, copy.deepcopy(pipe.transformer)):
        with pytest.raises(ValueError, match=f"--attention {name}: .*{advice}") as info:
            set_attention(name, model)
        assert "\n" not in str(info.value)
    assert "experimental" not in capfd.readouterr().err


def test_what_streams_is_pinned_once_where_the_host_has_room(monkeypatch):
    part = torch.nn.Linear(64, 64, bias=False)
    memory = SimpleNamespace(available=2 * 4 * 64**2)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    assert stream_settings(part, torch.device("cpu")) == {}
    assert stream_settings(part, torch.device("cuda")) == {"use_stream": True, "low_cpu_mem_usage": False}
    memory.available -= 1
    assert stream_settings(part, torch.device("cuda")) == {"use_stream": True, "low_cpu_mem_usage": True}
