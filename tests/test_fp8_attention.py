"""Attention in 8 bits: against float64, where it is chosen, and inside of blocks."""

import pytest
import torch
from tiny_models import CONFIGS, OURS, inputs, norm_rotate, output

from models import attention, fp8_attention, modeling_flux2_quant, modeling_flux_quant
from models.kernels import FP8
from utils.sampling import set_attention

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
HOPPER = GPU and torch.version.hip is None and torch.cuda.get_device_capability() == (9, 0)


def reference(query, key, value):
    """softmax(query keyᵀ / √width) value in float64, all [batch, tokens, heads, width]."""
    scores = torch.einsum("bqhw,bkhw->bhqk", query.double(), key.double()) / query.shape[-1] ** 0.5
    return torch.einsum("bhqk,bkhw->bqhw", scores.softmax(-1), value.double())


def off(found, expected) -> float:
    return ((found.double() - expected).norm() / expected.norm()).item()


def heads(tokens: int, count: int = 3, width: int = 32, batch: int = 2):
    """Query, key and value; the first two of a root mean square of one, as normalized heads are."""
    query, key, value = torch.randn(3, batch, tokens, count, width, generator=torch.Generator().manual_seed(tokens))
    return query, key, value


@pytest.mark.parametrize("tokens", [1, 7, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_attention_of_rounded_numbers(tokens, dtype):
    query, key, value = heads(tokens)
    query, key, value = query.to(FP8), key.to(FP8), value.to(dtype)
    found = fp8_attention.fp8_attention(query, key, value)
    assert found.dtype == dtype and found.shape == value.shape
    step = value.abs().amax((1, 3), keepdim=True).double() / 448
    rounded = (value.double() / step).float().to(FP8).double() * step
    # What is left: probabilities of four significant bits each, and bf16 at the end.
    assert off(found, reference(query, key, rounded)) < (2**-8 if tokens == 1 else 0.03)
    assert 1e-4 < off(found, reference(query, key, value)) < 0.06


def test_heads_have_steps_of_their_own_and_nothing_overflows():
    query, key, value = heads(40)
    expected = fp8_attention.fp8_attention(query.to(FP8), key.to(FP8), value)
    huge = value * torch.tensor([1.0, 1e30, 1e-20])[:, None]
    found = fp8_attention.fp8_attention(query.to(FP8), key.to(FP8), huge)
    assert torch.equal(found[:, :, 0], expected[:, :, 0])
    assert off(found[:, :, 1:], reference(query.to(FP8), key.to(FP8), huge)[:, :, 1:]) < 0.06
    assert off(found[:, :, 2], reference(query.to(FP8), key.to(FP8), huge)[:, :, 2]) < 0.06
    assert not fp8_attention.fp8_attention(query.to(FP8), key.to(FP8), torch.zeros_like(value)).any()


def test_scores_of_any_size_give_finite_numbers():
    query, key, value = heads(40)
    found = fp8_attention.fp8_attention((query * 100).to(FP8), (key * 100).to(FP8), value)
    assert found.isfinite().all()
    assert off(found, reference((query * 100).to(FP8), (key * 100).to(FP8), value)) < 0.06


def test_the_compiler_knows_what_comes_out():
    query, key, value = (x.to(FP8) for x in heads(5))
    operands = query, key, value, torch.ones(2, 3)
    torch.library.opcheck(fp8_attention.attention_op, operands, test_utils="test_faketensor")


@pytest.fixture
def hopper(monkeypatch):
    """As if there were such a GPU and the kernel's package."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(fp8_attention.importlib.util, "find_spec", lambda name: name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("is_available", lambda: False), "compute capability 9.0 .H100, H200.; there is none"),
        (("get_device_capability", lambda *_: (8, 9)), "compute capability 9.0 .H100, H200.; this one has 8.9"),
        (("find_spec", lambda name: None), "its kernel is missing: pip install fa3-fwd"),
        (("modes", ["exact"]), " is fast mode's: add --mode fast"),
        (("width", 24), "wants heads of a multiple of 16, at most 256; the model's have 24"),
        (("width", 512), "wants heads of a multiple of 16, at most 256; the model's have 512"),
    ],
)
def test_where_it_cannot_be_had_is_one_line(change, message, hopper, monkeypatch):
    name, value = change
    model, given = torch.nn.Linear(1, 1), {}
    model.config = type("Config", (), {"attention_head_dim": 128})
    if name == "modes":
        given["modes"] = value
    elif name == "width":
        model.config.attention_head_dim = value
    else:
        monkeypatch.setattr(fp8_attention.importlib.util if name == "find_spec" else torch.cuda, name, value)
    with pytest.raises(ValueError, match=f"--attention fp8.*{message}") as info:
        set_attention("fp8", model, **given)
    assert "\n" not in str(info.value)


@pytest.fixture(params=CONFIGS)
def fast(request, monkeypatch):
    """A packed ternary model in fast mode, on a CPU with attention as on a GPU."""
    monkeypatch.setattr(attention, "can_rotate", lambda *_: not torch.is_grad_enabled())
    for module in (attention, modeling_flux2_quant):
        monkeypatch.setattr(module, "norm_rotate", norm_rotate)
    torch.manual_seed(0)
    model = OURS[request.param](**CONFIGS[request.param], guidance_embeds=True, w_bits=0)
    return model.eval().pack().set_inference_mode("fast")


@pytest.fixture
def calls(monkeypatch):
    """The queries of every call."""
    seen, compute = [], attention.fp8_attention
    monkeypatch.setattr(attention, "fp8_attention", lambda q, k, v: seen.append(q) or compute(q, k, v))
    return seen


def test_fast_mode_takes_it_in_every_block_and_exact_mode_in_none(fast, hopper, calls):
    blocks = len(fast.transformer_blocks) + len(fast.single_transformer_blocks)
    expected = output(fast)
    exact = output(fast.set_inference_mode("exact"))
    assert not calls
    set_attention("fp8", fast)
    assert torch.equal(output(fast), exact) and not calls
    found = output(fast.set_inference_mode("fast"))
    assert len(calls) == blocks and {call.dtype for call in calls} == {FP8}
    assert 0 < off(found, expected.double()) < 0.05
    set_attention("native", fast)  # another that is chosen since
    torch.testing.assert_close(output(fast), expected)
    assert len(calls) == blocks


def test_blocks_compile_whole(fast, hopper, monkeypatch):
    set_attention("fp8", fast)
    monkeypatch.undo()  # what compiles asks for the GPU, too
    monkeypatch.setattr(attention, "can_rotate", lambda *_: True)
    for module in (attention, modeling_flux2_quant):
        monkeypatch.setattr(module, "norm_rotate", norm_rotate)
    graphs = []

    def backend(module, _):
        graphs.append([node.target for node in module.graph.nodes])
        return module

    expected = output(fast)
    torch._dynamo.reset()
    fast.compile_repeated_blocks(fullgraph=True, backend=backend)
    torch.testing.assert_close(output(fast), expected)
    calls = [graph.count(torch.ops.flux158.fp8_attention.default) for graph in graphs]
    assert sorted(filter(None, calls)) == [1, 1]  # of the two kinds of blocks


@pytest.fixture
def processor():
    found = modeling_flux_quant.FusedFluxAttnProcessor()
    found.attention_in_fp8 = True
    return found


def test_queries_are_rounded_in_fast_mode_alone_and_by_none_of_diffusers_backends(processor):
    tokens = torch.zeros(1)
    assert processor.query_dtype(tokens, None) == FP8
    processor.mode = "exact"
    assert processor.query_dtype(tokens, None) == torch.float32
    processor.mode, processor._attention_backend = "fast", "native"
    assert processor.query_dtype(tokens, None) == torch.float32
    assert modeling_flux_quant.FusedFluxAttnProcessor().query_dtype(tokens, None) == torch.float32


def test_what_it_cannot_compute_is_an_error_and_not_another_attention(processor, fast, hopper):
    tokens = torch.zeros(1)
    with pytest.raises(ValueError, match="knows neither masks"):
        processor.query_dtype(tokens, tokens)
    processor._parallel_config = object()
    with pytest.raises(ValueError, match="nor context parallelism"):
        processor.query_dtype(tokens, None)
    set_attention("fp8", fast)
    output(fast)
    with pytest.raises(ValueError, match="and no gradient"):
        fast(**inputs(fast.config))
    fast.single_transformer_blocks[0].attn.norm_k.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="whose norms nothing hooks"):
        output(fast)


@pytest.mark.gpu
@pytest.mark.skipif(not HOPPER, reason="the kernel is Hopper's")
@pytest.mark.parametrize(("tokens", "width"), [(77, 64), (1536, 128), (4608, 128)])
def test_the_kernel_computes_what_stands_here_in_plain_torch(tokens, width):
    pytest.importorskip("fa3_fwd_interface")
    query, key, value = heads(tokens, 4, width, 1)
    value[..., ::32] *= 20
    query, key = query.to(FP8), key.to(FP8)
    expected = fp8_attention.fp8_attention(query, key, value)
    found = fp8_attention.fp8_attention(*(x.to(DEVICE) for x in (query, key, value))).cpu()
    if tokens < 100:  # one block of keys; of several, the largest score so far divides, so that others are rounded
        assert off(found, expected.double()) < 0.02
    right = reference(query, key, value)
    assert off(found, right) < 1.1 * off(expected, right) < 0.06
    wide = torch.cat([value] * 3, 2).to(DEVICE)[:, :, 4:8]  # as it comes out of a product of several layers
    assert torch.equal(fp8_attention.fp8_attention(query.to(DEVICE), key.to(DEVICE), wide).cpu(), found)
