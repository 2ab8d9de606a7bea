"""Which learning rate a width gets, of the rate that tiny-flux's 256 channels were tuned to.

    rate(width) = 5e-4 · (256 / width)^e        narrower ones get no more: nothing is known below 256

RULE says what holds for weights: AdamW moves every weight by about the rate at each step, whatever its gradient. That
is a share of the weight that grows with √width, since weights fall with it ("sqrt": e = 1/2, the same share at every
width; "alpha" takes the share of each layer's own step size); and a change of the output, to which the inputs add up
all in one direction, that grows with the width ("width": e = 1, μP's rule for hidden matrices under Adam, arXiv
2203.03466). On random weights of 256 to 1,024 channels `python -m utils.compare_rates` found e = 1.1 for weights, 0.8
for a LoRA inside the quantizer and 1.0 for step sizes. The latter two get e = 1/2, the same share at every width: at
3,072 channels less than those exponents would give. On tiny-flux widened to 512 and 1,024 channels `python -m
utils.compare_widths` found e = 0.9 for weights.
"""

import math

REFERENCE_WIDTH, REFERENCE_RATE = 256, 5e-4
REFERENCE_SHARE = 2.5e-3  # that rate over the mean step size of tiny-flux at 1.58 bits, 0.198
EXPONENTS = {"constant": 0.0, "sqrt": 0.5, "width": 1.0}
RULES = (*EXPONENTS, "alpha")
RULE = "width"  # for weights
EVIDENCE = "random and trained weights of 256 to 1,024 channels (STUDY.md 9)"  # as --help tells it


def scaled(rule: str, width: int) -> float:
    """The rate at `width` by a rule that goes by the width alone."""
    return REFERENCE_RATE * min(1, REFERENCE_WIDTH / width) ** EXPONENTS[rule]


def default_rate(width: int, kind: str) -> float:
    """The learning rate of a transformer of `width` channels: of its "weights", a "lora", or "step sizes"."""
    return scaled(RULE if kind == "weights" and RULE in EXPONENTS else "sqrt", width)


def told() -> str:
    """What --learning_rate is by default, for --help."""
    if RULE == "alpha":
        return f"{REFERENCE_SHARE:g} of each layer's mean step size; evidence: {EVIDENCE}"
    rates = ", ".join(f"{default_rate(width, 'weights'):.2g} at {width:,}" for width in (256, 1024, 3072))
    lora = f"of a LoRA inside the quantizer {default_rate(3072, 'lora'):.2g} at 3,072"
    return f"by the transformer's width, rule {RULE}: {rates} channels, {lora}; evidence: {EVIDENCE}"


def choose_rates(args, lora: bool, width: int) -> None:
    """Fill in what of args.learning_rate, args.clip_learning_rate and args.rate_share was not given.

    `lora`: weights are frozen, and a LoRA inside the quantizer is trained. A learning rate that was given is that of
    the step sizes too, as published.
    """
    if args.learning_rate is not None:
        return
    args.learning_rate = default_rate(width, "lora" if lora else "weights")
    if args.clip_learning_rate is None:
        args.clip_learning_rate = default_rate(width, "step sizes")
    if RULE == "alpha" and not lora and args.rate_share is None:
        args.rate_share = REFERENCE_SHARE


def optimum(points: dict[float, float]) -> tuple[float, float, bool]:
    """The rate of the least NMSE, that NMSE, and whether it is a bound only, at the end of the rates {rate: NMSE}.

    The vertex of the parabola through the best point and its neighbours, of log NMSE over log rate.
    """
    rates = sorted(points)
    best = min(range(len(rates)), key=lambda i: points[rates[i]])
    if best in (0, len(rates) - 1):
        return rates[best], points[rates[best]], True
    x = [math.log(rates[best + i]) for i in (-1, 0, 1)]
    y = [math.log(points[rates[best + i]]) for i in (-1, 0, 1)]
    left, right = (y[1] - y[0]) / (x[1] - x[0]), (y[2] - y[1]) / (x[2] - x[1])
    bend = (right - left) / (x[2] - x[0])
    if bend <= 0:  # three equal values
        return rates[best], points[rates[best]], False
    vertex = (x[0] + x[1]) / 2 - left / (2 * bend)
    value = y[0] + left * (vertex - x[0]) + bend * (vertex - x[0]) * (vertex - x[1])
    return math.exp(vertex), math.exp(value), False
