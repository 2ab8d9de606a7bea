"""What torch.compile keeps in registers: its choice, and on a GPU the kernels that it writes."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch._inductor import config
from torch._inductor.choices import InductorChoices
from torch._inductor.utils import run_and_get_code
from torch._inductor.virtualized import V

from models import kernels
from utils.cuda_graph import compile_options
from utils.inductor import WholeRows

DEVICE = torch.device("cuda")


@pytest.mark.parametrize(
    "numbers, whole",
    [(128, "torch's"), (1024, "torch's"), (1025, True), (15360, True), (16384, True), (16385, False)],
)
def test_rows_that_fit_are_kept_whole_where_that_is_asked_for(numbers, whole, monkeypatch):
    monkeypatch.setattr(InductorChoices, "should_use_persistent_reduction", staticmethod(lambda *_: "torch's"))
    features = SimpleNamespace(reduction_numel=numbers)
    graph = SimpleNamespace(sizevars=SimpleNamespace(statically_known_leq=lambda left, right: left <= right))
    choose = WholeRows.should_use_persistent_reduction
    with V.set_graph_handler(graph):
        assert choose(features, False) == choose(features, True) == "torch's"
        with config.patch(split_reductions=False):
            assert choose(features, False) == whole and choose(features, True) == "torch's"


def test_a_cpu_is_compiled_for_as_torch_does():
    assert compile_options(torch.device("cpu")) is None


def normalized(x, scale, shift):
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


def activated(x):
    return kernels.gelu(x)


def joined(attention, x):
    return torch.cat([attention, kernels.gelu(x)], -1)


@pytest.mark.gpu
@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.int8, kernels.FP8], ids=["int8", "e4m3"])
@pytest.mark.parametrize(
    "make, shapes",
    [(normalized, [(200, 3072), (3072,), (3072,)]), (activated, [(200, 12288)]), (joined, [(200, 3072), (200, 12288)])],
    ids=["LayerNorm", "GELU", "concatenated"],
)
def test_from_tokens_to_their_eight_bits_is_one_kernel_that_reads_them_once(make, shapes, dtype):
    torch.manual_seed(0)
    given = [torch.randn(shape, device=DEVICE, dtype=torch.bfloat16) for shape in shapes]
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda *parts: kernels.quantize_tokens(make(*parts), dtype),
        fullgraph=True, dynamic=False, options=compile_options(DEVICE),
    )  # fmt: skip
    (q, scale), [code] = run_and_get_code(compiled, *given)
    assert code.count(".run(") == 1 and "persistent_reduction(" in code
    expected = make(*(part.double() for part in given))
    largest = expected.abs().amax(-1, keepdim=True)
    torch.testing.assert_close(scale.double(), largest / (127 if dtype == torch.int8 else 448), rtol=1e-2, atol=0)
    bound = largest / 127 if dtype == torch.int8 else expected.abs() / 16 + largest / 448 / 1024
    assert ((q.double() * scale.double() - expected).abs() <= bound + largest * 2e-2).all()
    error = (q.double() * scale.double() - expected).norm() / expected.norm()
    assert error < (0.015 if dtype == torch.int8 else 0.03)
