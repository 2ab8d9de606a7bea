"""utils/rates.py: the default learning rate of a width, as a formula written out here."""

import math
from types import SimpleNamespace

import pytest

from utils import rates
from utils.process_args import process_args


def chosen(width: int, lora: bool = False, *flags) -> SimpleNamespace:
    """What --learning_rate, --clip_learning_rate and --rate_share come to."""
    _, _, args = process_args([*map(str, flags)])
    rates.choose_rates(args, lora, width)
    return args


@pytest.mark.parametrize(("rule", "exponent"), [("constant", 0), ("sqrt", 0.5), ("width", 1)])
def test_a_rate_falls_with_the_width_as_its_rule_says(rule, exponent, monkeypatch):
    monkeypatch.setattr(rates, "RULE", rule)
    for width in (256, 512, 3072):
        found = chosen(width)
        assert found.learning_rate == pytest.approx(5e-4 / (width / 256) ** exponent)
        assert found.clip_learning_rate == pytest.approx(5e-4 / (width / 256) ** 0.5)
        assert found.rate_share is None
        lora = chosen(width, True)
        assert lora.learning_rate == lora.clip_learning_rate == found.clip_learning_rate


@pytest.mark.parametrize("rule", ["constant", "sqrt", "width"])
def test_tiny_flux_has_the_rates_it_was_tuned_to(rule, monkeypatch):
    monkeypatch.setattr(rates, "RULE", rule)
    assert chosen(256).learning_rate == chosen(256).clip_learning_rate == 5e-4
    assert rates.default_rate(256, "lora") == 5e-4
    assert chosen(64).learning_rate == chosen(64).clip_learning_rate == 5e-4  # below, nothing is known


def test_a_share_of_the_step_size_can_be_the_rule(monkeypatch):
    monkeypatch.setattr(rates, "RULE", "alpha")
    assert chosen(1024).rate_share == rates.REFERENCE_SHARE
    assert chosen(1024, True).rate_share is None  # a LoRA's weights are no weights of the layer
    assert chosen(1024).learning_rate == 2.5e-4  # of what is not quantized
    assert "0.0025 of each layer's mean step size" in rates.told()


def test_what_is_given_counts_for_weights_and_step_sizes():
    found = chosen(3072, False, "--learning_rate", 2e-5)
    assert (found.learning_rate, found.clip_learning_rate) == (2e-5, None)  # None: the same, as published
    found = chosen(3072, False, "--clip_learning_rate", 0)
    assert found.clip_learning_rate == 0 and found.learning_rate == rates.default_rate(3072, "weights")


def test_help_tells_rule_and_evidence(capsys):
    with pytest.raises(SystemExit):
        process_args(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert f"rule {rates.RULE}: 0.0005 at 256" in text and rates.EVIDENCE in text


@pytest.mark.parametrize(
    ("flags", "message"),
    [(["--rate_share", "0"], "--rate_share must be above 0"), (["--rate_share", "1", "--lora_r", "2"], "--lora_r")],
)
def test_a_share_that_cannot_be_is_named(flags, message, capsys):
    with pytest.raises(SystemExit) as stop:
        process_args(flags)
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_an_optimum_is_the_vertex_and_at_the_last_rate_a_bound():
    points = {rate: math.exp(0.3 * math.log(rate / 3e-4) ** 2) for rate in (1e-4, 2e-4, 4e-4, 8e-4)}
    assert rates.optimum(points) == (pytest.approx(3e-4), pytest.approx(1.0), False)
    assert rates.optimum({1e-4: 0.3, 2e-4: 0.2, 4e-4: 0.1}) == (4e-4, 0.1, True)
