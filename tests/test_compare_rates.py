"""utils/compare_rates.py: what is trained, what it is judged by, and the exponent that comes of curves made up here."""

import json
import math

import pytest
import torch

from models.modeling_flux_quant import FluxTransformer2DModel
from utils import compare_rates
from utils.random_flux import filled, stock_class

FLAGS = ["--widths", 128, "--blocks", 1, 1, "--steps", 2, "--seeds", 0, "--rank", 2, "--device", "cpu"]


@pytest.fixture(scope="module")
def teacher():
    with torch.device("meta"):
        model = stock_class("small")(**compare_rates.configuration(128, (1, 2)))
    return filled(model, 0, torch.device("cpu")).float().eval()


@pytest.fixture(scope="module")
def inputs(teacher):
    return compare_rates.random_inputs(teacher.config, 2, torch.Generator().manual_seed(0), torch.device("cpu"))


@pytest.mark.parametrize(
    ("what", "names"),
    [("lora", {"lora_A", "lora_B"}), ("step sizes", {"weight_clip_val"}), ("weights", {"weight", "bias"})],
)
def test_a_student_starts_as_the_quantized_teacher_and_trains_what_was_asked(what, names, teacher, inputs, tmp_path):
    student = compare_rates.student_of(teacher, what, rank=2)
    trained = {name.rpartition(".")[2] for name, p in student.named_parameters() if p.requires_grad}
    assert trained == names
    teacher.save_pretrained(tmp_path)
    loaded = FluxTransformer2DModel.from_pretrained(tmp_path, w_bits=0)
    with torch.no_grad():
        for given in inputs:
            torch.testing.assert_close(student(**given)[0], loaded(**given)[0])
    before = {name: p.detach().clone() for name, p in student.named_parameters()}
    with torch.no_grad():
        velocities = [teacher(**given)[0] for given in inputs]
    compare_rates.train(student, inputs, velocities, 1e-3, 2)
    moved = {name for name, p in student.named_parameters() if not torch.equal(p, before[name])}
    assert moved and {name.rpartition(".")[2] for name in moved} <= names


def test_the_error_is_that_of_all_inputs_together(teacher, inputs):
    with torch.no_grad():
        right = [teacher(**given)[0] for given in inputs]
        wanted = [right[0] + 1, right[1] * 3]
        found = compare_rates.nmse(teacher, inputs, wanted)
    assert compare_rates.nmse(teacher, inputs, right) == 0
    numerator = right[0].numel() + 4 * right[1].double().square().sum()
    assert found.item() == pytest.approx((numerator / sum(w.double().square().sum() for w in wanted)).item(), rel=1e-4)


def curves(exponent: float, what: str = "weights", widths=(256, 512, 1024)) -> list[dict]:
    """Parabolas around 1e-4 · (256/width)^exponent, each seed's 10 % higher than the one before."""
    cells = []
    for width in widths:
        for seed in (0, 1):
            best = 1e-4 * (256 / width) ** exponent * 1.1**seed
            found = {str(rate): math.exp(math.log(rate / best) ** 2) for rate in compare_rates.rates_of(what, width)}
            cells.append({"width": width, "what": what, "seed": seed, "start": 1.0, "nmse": found})
    return cells


@pytest.mark.parametrize("exponent", [0.5, 1.0, 1.5])
def test_the_exponent_of_the_width_is_found(exponent):
    (kind,) = compare_rates.judge(curves(exponent))
    assert kind["what"] == "weights" and kind["exponent"] == pytest.approx(exponent, abs=1e-3)
    for row in kind["optima"]:
        assert row["rate"] == pytest.approx(1e-4 * (256 / row["width"]) ** exponent * 1.1 ** row["seed"], rel=1e-3)
    assert f"1/width^{exponent:.2f}" in compare_rates.table([kind])


def test_a_best_rate_at_the_end_and_an_error_that_is_no_number_are_not_counted():
    cells = curves(1.0)
    for cell in cells:
        rates = list(cell["nmse"])
        cell["nmse"][rates[-1]] = None  # it diverged
        if cell["width"] == 1024:
            cell["nmse"][rates[0]] = 1e-3
    (kind,) = compare_rates.judge(cells)
    assert [row["bound"] for row in kind["optima"]] == [False] * 4 + [True] * 2
    assert kind["exponent"] == pytest.approx(1.0, abs=1e-3)
    assert "(the last one tried)" in compare_rates.table([kind])
    (alone,) = compare_rates.judge(curves(1.0, widths=(256,)))
    assert alone["exponent"] is None


def test_what_was_measured_is_not_measured_again(start, tmp_path, monkeypatch, capsys):
    command = ["compare_rates.py", "--output", tmp_path, *FLAGS]
    assert start(compare_rates.main, *command) == 0
    found = json.loads((tmp_path / "rates.json").read_text())
    assert list(found["cells"]) == [f"128, {what}, seed 0" for what in compare_rates.MIDDLE]
    for cell in found["cells"].values():
        assert len(cell["nmse"]) == len(compare_rates.FACTORS) and 0 < min(cell["nmse"].values()) < 2
    assert (tmp_path / "rates.png").stat().st_size > 10_000 and "128" in (tmp_path / "rates.md").read_text()
    monkeypatch.setattr(compare_rates, "measure", lambda *_: pytest.fail("measured again"))
    assert start(compare_rates.main, *command) == 0
    assert start(compare_rates.main, *command, "--steps", 3) == 1
    assert "asked for" in capsys.readouterr().err
    for flags, message in ((["--widths", 200], "multiple of 128"), (["--steps", 0], "must be at least 1")):
        assert start(compare_rates.main, *command, *flags) == 2
        assert message in capsys.readouterr().err
