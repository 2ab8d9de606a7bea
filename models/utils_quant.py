"""Quantizers, step-size initialisation and the linear layers that train through them.

A weight matrix W [out, in] is replaced by a few levels times a step size α, one α per row (or one per matrix). ParetoQ
(arXiv 2502.02631) uses two families; both are

    q(w, α) = α · (round(clip(w/α, low, high)·n − s) + s) / n

    bits     class                      low, high        n         s     levels/α
    0        StretchedElasticQuant      ±0.99            1.5       0     0, ±2/3        ("1.58 bit": log2 3)
    1        LsqBinaryTernaryExtension                                   ±1             (α·sign(w))
    2        StretchedElasticQuant      ±0.99            2         1/2   ±1/4, ±3/4
    3 … 8    LsqBinaryTernaryExtension  −2^(b−1), Qp     1         0     −2^(b−1) … Qp = 2^(b−1) − 1
    ≥ 16     identity

Gradients are straight-through: round(x) counts as x plus a constant, so inside the clip range ∂q/∂w = 1 and
∂q/∂α = level − w/α; outside, ∂q/∂w = 0 and ∂q/∂α = level. (The published code differs at 1.58 bits, where it has ±1
for clipped weights and the outer levels are ±2/3.) Following LSQ (arXiv 1902.08153, section 2.2) the gradient of α is
multiplied by 1/√(numel·Qp), with Qp of the integer grid: 1 up to two bits.

One more difference from the published forward: at 1 bit an exact zero becomes +α, since one bit has no third level.
"""

import math
from collections import OrderedDict
from collections.abc import Callable
from typing import NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from models.lora_kernel import compose, few, takes_few, works_on

FULL_PRECISION_BITS = 16  # from here on there is no quantizer
ALPHA_FLOOR = 1e-5  # keeps w/α finite, as published
CLIP_INITS = ("mse", "max")


def check_bits(num_bits: int) -> int:
    """`num_bits` if there is a quantizer (or none needed) for it, else ValueError."""
    if isinstance(num_bits, int) and (0 <= num_bits <= 8 or num_bits >= FULL_PRECISION_BITS):
        return num_bits
    raise ValueError(
        f"w_bits={num_bits!r} is not supported: use 0 (1.58 bit, ternary), 1 to 8, or 16 and above (full precision)"
    )


def check_clip_init(method: str) -> str:
    """`method` if it is a known step-size initialisation, else ValueError."""
    if method in CLIP_INITS:
        return method
    raise ValueError(f"clip_init={method!r} is not supported: use one of {', '.join(CLIP_INITS)}")


# ---------------------------------------------------------------------------------------------------------------------
# Quantizers


def _grid(num_bits: int, stretched: bool) -> tuple[float, float, float, float, int]:
    """Clip range low, high; levels per unit n; shift s; Qp of the integer grid (see the table above)."""
    qp = 2 ** (num_bits - 1) - 1 if num_bits > 2 else 1
    if stretched and num_bits != 1:
        n, s = (1.5, 0.0) if num_bits == 0 else (2.0 ** (num_bits - 1), 0.5)
        return -0.99, 0.99, n, s, qp
    return -qp - (num_bits > 1), qp, 1.0, 0.0, qp


def _widen(tensor: Tensor) -> Tensor:
    """At least fp32: in bf16 w/α has 8 significant bits, and weights near a threshold would round to the wrong side."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()  # promote_types() takes no 8-bit floats


def _levels(x: Tensor, num_bits: int, stretched: bool) -> Tensor:
    """q/α for x = w/α, in the place of x: on a CPU most of the time goes into fresh memory."""
    if num_bits == 1:
        return torch.where(x >= 0, 1.0, -1.0).to(x.dtype)
    low, high, n, s, _ = _grid(num_bits, stretched)
    x.clamp_(low, high)
    if n != 1:
        x.mul_(n)
    if s:
        return x.sub_(s).round_().add_(s).div_(n)
    return x.round_() if n == 1 else x.round_().div_(n)


def code_grid(num_bits: int) -> tuple[float, float]:
    """n and s of level = (c + s)/n for the signed integer codes c: −1 0 1 at 0 bits, else −2^(b−1) … 2^(b−1) − 1."""
    return (0.5, 0.5) if num_bits == 1 else _grid(num_bits, stretched=num_bits in (0, 2))[2:4]


@torch.no_grad()
def quantize_codes(weight: Tensor, alpha: Tensor, num_bits: int) -> Tensor:
    """The codes (int8, see code_grid) that `quantize` gives a weight [out, in]; alpha [out, 1] or a single element."""
    n, s = code_grid(num_bits)
    step = _widen(alpha).clamp(min=ALPHA_FLOOR)
    return (_levels(_widen(weight) / step, num_bits, num_bits in (0, 2)) * n - s).round().to(torch.int8)


def _quantize_forward(ctx, weight: Tensor, alpha: Tensor, num_bits: int, layerwise: bool, stretched: bool) -> Tensor:
    ctx.num_bits, ctx.stretched = check_bits(num_bits), stretched
    if num_bits >= FULL_PRECISION_BITS:
        return weight.view_as(weight)
    shape = (1,) if layerwise else (weight.shape[0], 1)
    if alpha.numel() != math.prod(shape) or (not layerwise and alpha.shape != shape):
        raise ValueError(
            f"step size of shape {list(alpha.shape)} for a weight of shape {list(weight.shape)}: expected "
            f"{'one element, since layerwise=True' if layerwise else list(shape)}"
        )
    ctx.save_for_backward(weight, alpha)
    step = _widen(alpha).clamp(min=ALPHA_FLOOR)
    # Neither a product in place nor a .to() that does nothing may be the last to touch the output: torch.compile (seen
    # with torch 2.11) would take it for a constant, and all gradients of the weight would be zero.
    quantized = _levels(_widen(weight) / step, num_bits, stretched) * step
    return quantized if quantized.dtype == weight.dtype else quantized.to(weight.dtype)


def _quantize_backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
    if ctx.num_bits >= FULL_PRECISION_BITS:
        return grad, None, None, None
    weight, alpha = ctx.saved_tensors
    low, high, _, _, qp = _grid(ctx.num_bits, ctx.stretched)
    x = _widen(weight) / _widen(alpha).clamp(min=ALPHA_FLOOR)
    clipped = x.clamp(low, high)
    inside = clipped == x
    slope = _levels(clipped, ctx.num_bits, ctx.stretched)
    if ctx.num_bits != 1:  # sign() has no round() to look through: its slope in α is the level everywhere
        slope.sub_(torch.where(inside, x, 0))
    # The floor passes the gradient through, so that a step size that fell below it can come back.
    grad_alpha = slope.mul_(grad).sum_to_size(alpha.shape) / math.sqrt(weight.numel() * qp)
    return torch.where(inside, grad, 0), grad_alpha.to(alpha.dtype), None, None


class LsqBinaryTernaryExtension(torch.autograd.Function):
    """LSQ on the signed integer grid; α·sign(w) at 1 bit.

    apply(weight [out, in], alpha, num_bits, layerwise) -> [out, in] in the weight's dtype. alpha is [out, 1], or with
    `layerwise` a single element of any shape; its gradient has its shape. Arithmetic is in fp32 or wider. Backward
    keeps the weight and α only. ValueError on unsupported bits or a step size of another shape.
    """

    @staticmethod
    def forward(ctx, input, alpha, num_bits, layerwise):
        return _quantize_forward(ctx, input, alpha, num_bits, layerwise, stretched=False)

    @staticmethod
    def backward(ctx, grad_output):
        return _quantize_backward(ctx, grad_output)


class StretchedElasticQuant(torch.autograd.Function):
    """ParetoQ's grid for 0 (ternary) and 2 bits: levels evenly spaced and symmetric about zero.

    Arguments, result and errors are those of LsqBinaryTernaryExtension.
    """

    @staticmethod
    def forward(ctx, input, alpha, num_bits, layerwise):
        return _quantize_forward(ctx, input, alpha, num_bits, layerwise, stretched=True)

    @staticmethod
    def backward(ctx, grad_output):
        return _quantize_backward(ctx, grad_output)


def quantize(weight: Tensor, alpha: Tensor | None, num_bits: int, layerwise: bool = False) -> Tensor:
    """The weight [out, in] as `num_bits` of it are kept: picks the quantizer that ParetoQ uses at this bit width.

    alpha: step sizes [out, 1], or a single element with `layerwise`; unused from 16 bits on, where the weight itself
    comes back. Differentiable in weight and alpha. ValueError on unsupported bits or a step size of another shape.
    """
    if check_bits(num_bits) >= FULL_PRECISION_BITS:
        return weight
    quantizer = StretchedElasticQuant if num_bits in (0, 2) else LsqBinaryTernaryExtension
    return quantizer.apply(weight, alpha, num_bits, layerwise)


# ---------------------------------------------------------------------------------------------------------------------
# Step-size initialisation
#
# With the codes c of the weights fixed, Σ(w − αc)² is least at α = Σwc/Σc², where (Σwc)²/Σc² of the energy Σw² is
# captured. Both searches below look for the codes that capture the most.

_CHUNK = 2**20  # weights worked on at a time: bounds the memory of a search by some tens of MB


def _two_level_optimum(rows: Tensor, inner: float, outer: float) -> Tensor:
    """Error-minimal α [rows, 1] for the levels ±inner·α, ±outer·α; exact.

    Only the k largest |w| get the outer level for some k, so sorting and prefix sums give the error for every k.
    """
    prefix = rows.abs().sort(dim=1, descending=True).values.cumsum(dim=1)
    k = torch.arange(1, rows.shape[1] + 1, device=rows.device, dtype=rows.dtype)
    dot = inner * prefix[:, -1:] + (outer - inner) * prefix
    norm = inner**2 * rows.shape[1] + (outer**2 - inner**2) * k
    best = (dot**2 / norm).argmax(dim=1, keepdim=True)
    return (dot / norm).gather(1, best)


def _integer_grid_optimum(rows: Tensor, low: int, high: int) -> Tensor:
    """Error-minimal α [rows, 1] for the levels low·α … high·α; rows must have max|w| = 1 (or be all zero).

    Geometric scan, then a finer one around its best. The scan starts between two bounds of the optimum: from 2/high on
    nothing is clipped and α/2 does at least as well; below (1 − √E)/|low|, clipping the largest weight alone costs more
    than the error E of α = 1/high; and no α = Σwc/Σc² is below mean|w|/|low|. One step of the scan moves the largest
    code by an eighth: measured against the exact optimum on rows of 8 to 1,536 weights, the error is within 0.4 %.
    """

    def project(step):
        codes = (rows / step).round_().clamp_(low, high)
        dot, norm = (rows * codes).sum(1, keepdim=True), codes.square().sum(1, keepdim=True).clamp(min=1)
        return dot / norm, dot**2 / norm

    error = rows.square().sum(1, keepdim=True) - project(1 / high)[1]
    start = torch.maximum(rows.abs().mean(1, keepdim=True), 1 - error.clamp(min=0).sqrt()) / -low
    stop = torch.full_like(start, 2 / high)
    coarse = math.ceil((stop / start).log().max().item() * -low * 8)
    for points in (coarse, 16):
        spacing = (stop / start) ** (1 / (points - 1))
        best, captured, center = start, torch.zeros_like(start), start
        for i in range(points):
            step = start * spacing**i
            candidate, energy = project(step)
            better = energy > captured
            best, center = torch.where(better, candidate, best), torch.where(better, step, center)
            captured = torch.where(better, energy, captured)
        start, stop = center / spacing, center * spacing
    return best


@torch.no_grad()
def init_clip_val(weight: Tensor, num_bits: int, method: str = "mse", layerwise: bool = False) -> Tensor:
    """Step sizes to start from, [out, 1] for a weight [out, in] or [1, 1] with `layerwise`; fp32 (fp64 if that is).

    method "mse": least squared error; exact up to 2 bits, above to within 0.5 % of the least error.
    method "max": ParetoQ's start: max|w| at 0 and 2 bits, mean|w| at 1 bit (which is also optimal), max|w|/Qp above.
    Runs on the weight's device and in row chunks; with `layerwise` it needs a few fp32 copies of the matrix.
    ValueError on unsupported bits or method, and if the weight holds NaN or inf.
    """
    if check_bits(num_bits) >= FULL_PRECISION_BITS:
        raise ValueError(f"w_bits={num_bits} is full precision and has no step size")
    check_clip_init(method)
    rows = weight.reshape(1, -1) if layerwise else weight
    dtype = torch.promote_types(weight.dtype, torch.float32)
    lowest, highest = rows.aminmax(dim=1, keepdim=True)  # unlike a norm in fp32, without an fp32 copy of the matrix
    peak = torch.maximum(-lowest, highest).to(dtype)
    if not peak.isfinite().all():
        raise ValueError("the weight holds NaN or inf")

    if num_bits == 1:
        alpha = torch.linalg.vector_norm(rows, 1, dim=1, keepdim=True, dtype=dtype) / rows.shape[1]
    elif method == "max":
        alpha = peak if num_bits in (0, 2) else peak / _grid(num_bits, stretched=False)[1]
    else:
        alpha = torch.empty_like(peak)
        size = max(1, _CHUNK // rows.shape[1])
        for chunk, top, out in zip(rows.split(size), peak.split(size), alpha.split(size), strict=True):
            scale = top.clamp(min=torch.finfo(dtype).tiny)  # unit rows: squares can neither overflow nor vanish
            chunk = chunk.to(dtype) / scale
            if num_bits == 0:
                out.copy_(_two_level_optimum(chunk, 0, 2 / 3) * scale)
            elif num_bits == 2:
                out.copy_(_two_level_optimum(chunk, 1 / 4, 3 / 4) * scale)
            else:
                out.copy_(_integer_grid_optimum(chunk, *_grid(num_bits, stretched=False)[:2]) * scale)
    return alpha.clamp(min=ALPHA_FLOOR)


# ---------------------------------------------------------------------------------------------------------------------
# Layers


def refuse_writing(*_) -> NoReturn:
    raise ValueError(
        "the weight of a quantized layer is computed from its codes and cannot be written to or trained: "
        "leave adapters unmerged, or change the weight before it is quantized"
    )


class ComputedWeight(torch.Tensor):
    """What a quantized layer multiplies with, [out, in], computed whenever it is read; views of it likewise.

    Shape, dtype and device cost nothing, and autograd keeps no values. ValueError on writing to it and on asking for
    its gradient, since both would be lost.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, like: Tensor, device: torch.device, compute: Callable[[], Tensor]):
        """like: a tensor on the meta device of the same shape and dtype; compute: gives the values, on `device`."""
        weight = torch.Tensor._make_wrapper_subclass(cls, like.shape, like.stride(), dtype=like.dtype, device=device)
        weight.like, weight.compute = like, compute
        return weight

    @classmethod
    def __torch_dispatch__(cls, op, types, args=(), kwargs=None):
        schema, kwargs = op._schema, kwargs or {}
        given = dict(zip((argument.name for argument in schema.arguments), args, strict=False)) | kwargs
        for argument in schema.arguments:
            if argument.alias_info and argument.alias_info.is_write and isinstance(given.get(argument.name), cls):
                refuse_writing()

        def apply(of: Callable[["ComputedWeight"], Tensor]):
            return op(*tree_map_only(cls, of, args), **tree_map_only(cls, of, kwargs))

        def computed():
            return apply(lambda weight: weight.compute())

        if schema.is_mutable or not any(result.alias_info for result in schema.returns):
            return computed()
        views = apply(lambda weight: weight.like)
        device = next(value.device for value in given.values() if isinstance(value, cls))
        if isinstance(views, Tensor):
            return cls(views, device, computed)
        return [cls(view, device, lambda i=i: computed()[i]) for i, view in enumerate(views)]

    def __deepcopy__(self, memo) -> Tensor:
        return self.clone()

    def __repr__(self, **_) -> str:
        return f"{type(self).__name__}({self.clone()})"

    __setitem__ = requires_grad_ = refuse_writing
    data = property(lambda self: self, refuse_writing)
    requires_grad = property(lambda self: False, refuse_writing)


class ReadOnlyWeight(nn.Module):
    """Gives a linear layer a `weight` that is its dequantize(dtype), of the dtype and device of weight_like()."""

    @property
    def weight(self) -> Tensor:
        dtype, device = self.weight_like()
        like = torch.empty(self.out_features, self.in_features, dtype=dtype, device="meta")
        weight = ComputedWeight(like, device, lambda: self.dequantize(dtype))
        weight.layer = self
        return weight

    def __setattr__(self, name: str, value) -> None:
        if name != "weight":
            super().__setattr__(name, value)
        elif getattr(value, "layer", None) is not self:  # PEFT gives a layer back its own
            refuse_writing()


class Mark(dict):
    """A quantized layer's entry in the metadata of a state dict: reading it in a layer of another kind is an error.

    nn.Module asks it for what concerns the layer, whether or not the names are checked (`strict`).
    """

    def get(self, key, default=None):
        raise ValueError(
            f"{self['name']} is quantized (w_bits={self['w_bits']}): an ordinary layer cannot load what its state dict "
            "holds; load it into this package's model of the same class, made with the same settings"
        )

    def __deepcopy__(self, memo) -> "Mark":
        return Mark(self)

    def __reduce__(self):
        return OrderedDict, (list(self.items()),)  # files need not know this class


class QuantizedLayer(nn.Module):
    """What trained and packed layers have in common.

    The parameters and buffers named in `_fp32_parameters` stay in fp32 whatever the module is cast to. Its state dict
    is one for layers quantized with as many bits: ValueError on another.
    """

    _fp32_parameters: tuple[str, ...] = ()

    def _apply(self, fn, recurse=True):
        # .to(), .half() and the like end here. Rounding α to bf16 would move every threshold of its row.
        own = (*self.named_parameters(recurse=False), *self.named_buffers(recurse=False))
        kept = [tensor for name, tensor in own if name in self._fp32_parameters]
        kept += [p.grad for p in kept if p.grad is not None]

        def move_only(tensor):
            moved = fn(tensor)
            if moved.dtype != tensor.dtype and any(tensor is k for k in kept):
                return tensor.to(moved.device)
            return moved

        return super()._apply(move_only, recurse)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if hasattr(destination, "_metadata") and self.is_quantized():
            destination._metadata[prefix[:-1]] = Mark(name=prefix[:-1] or "a layer", w_bits=self.w_bits)

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *args):
        metadata, name = dict(local_metadata), prefix[:-1] or type(self).__name__
        if (found := metadata.get("w_bits", self.w_bits)) != self.w_bits:
            raise ValueError(f"{name}: quantized with w_bits={found}, this layer has w_bits={self.w_bits}")
        super()._load_from_state_dict(state_dict, prefix, metadata, *args)

    def is_quantized(self) -> bool:
        """Whether it multiplies with anything other than the weight in its state dict."""
        return True


class QuantizeLinear(QuantizedLayer, nn.Linear):
    """nn.Linear whose weight goes through `quantize` on every forward pass.

    x [..., in] -> [..., out], computed in the autocast dtype, else in x's. The step sizes `weight_clip_val` ([out, 1],
    or [1, 1] with `weight_layerwise`) start from the weight by `clip_init` and stay fp32 whatever the module is cast
    to; `w_bits` of 16 and above has none and is nn.Linear. ValueError on unsupported `w_bits` or `clip_init`.
    `weight` is the one that is trained. While a PEFT layer holds this one it shows what is multiplied with, read-only:
    adapters measure it, and merging one into the trained weight would round it away.
    """

    _fp32_parameters = ("weight_clip_val", "frozen_clip_val")

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device=None,
        dtype=None,
        *,
        w_bits: int = 16,
        weight_layerwise: bool = False,
        clip_init: str = "mse",
    ):
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self.w_bits = check_bits(w_bits)
        self.weight_layerwise = weight_layerwise
        self.clip_init = check_clip_init(clip_init)
        self.reset_quantizer()

    @classmethod
    def from_linear(cls, linear: nn.Linear, name: str = "", **settings) -> "QuantizeLinear":
        """A quantized layer that shares the parameters of `linear`; `settings` are the keywords of the constructor.

        On the meta device the added parameters are meta too and are to be loaded. ValueError, opening with `name`, if
        the weight holds NaN or inf.
        """
        bias = linear.bias is not None
        layer = cls(linear.in_features, linear.out_features, bias, device="meta", **settings)
        layer.weight, layer.bias = linear.weight, linear.bias
        layer.reset_quantizer(name)
        return layer.train(linear.training)

    def reset_quantizer(self, name: str = "") -> None:
        """Make anew, on the weight's device, the parameters that quantization adds to nn.Linear's."""
        self._buffers.pop("frozen_clip_val", None)
        self.reset_clip_val(name)

    @property
    def frozen(self) -> Tensor | None:
        """The step sizes [out, 1] at which the codes were frozen, None while they are free."""
        return self._buffers.get("frozen_clip_val")

    @torch.no_grad()
    def freeze_codes(self, alpha: Tensor | None = None) -> None:
        """Keep the codes as they are now, or as they are at step sizes `alpha`, whatever becomes of the step sizes.

        They are found again from the weight, which gets a gradient of zero from here on and is to stay as it is: kept
        beside it, FLUX.1-dev's would be another 12 GB.
        """
        if self.w_bits < FULL_PRECISION_BITS:
            alpha = self.weight_clip_val.detach().clone() if alpha is None else alpha
            self.register_buffer("frozen_clip_val", alpha, persistent=False)

    @torch.no_grad()
    def reset_clip_val(self, name: str = "") -> None:
        """Make `weight_clip_val` anew from effective_weight(); ValueError, opening with `name`, on NaN or inf there."""
        self.register_parameter("weight_clip_val", None)
        if self.w_bits >= FULL_PRECISION_BITS:
            return
        if self.latent_weight().is_meta:
            shape = (1, 1) if self.weight_layerwise else (self.out_features, 1)
            alpha = torch.empty(shape, dtype=torch.float32, device="meta")
        else:
            try:
                alpha = init_clip_val(self.effective_weight(), self.w_bits, self.clip_init, self.weight_layerwise)
            except ValueError as error:
                raise ValueError(f"{name or type(self).__name__}: {error}") from None
        self.weight_clip_val = nn.Parameter(alpha.float())

    def is_quantized(self) -> bool:
        return self.w_bits < FULL_PRECISION_BITS

    def latent_weight(self) -> Tensor:
        """The trained weight, [out, in]."""
        return self.weight

    def effective_weight(self) -> Tensor:
        """What goes into the quantizer, [out, in]."""
        return self.latent_weight()

    def code_source(self) -> tuple[Tensor, Tensor]:
        """A matrix [out, in] and step sizes of which quantize_codes makes the codes of this layer."""
        return self.effective_weight(), self.weight_clip_val if self.frozen is None else self.frozen

    def quantized_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """What comes out of the quantizer and is multiplied with, [out, in]; fp32 or as the weight, or in `dtype`."""
        weight = self._quantized_weight()
        return weight if dtype is None else weight.to(dtype)

    def _quantized_weight(self) -> Tensor:
        if self.frozen is not None:
            with torch.no_grad():
                step = self.frozen.clamp(min=ALPHA_FLOOR)
                levels = _levels(_widen(self.effective_weight()) / step, self.w_bits, self.w_bits in (0, 2))
            # DDP waits for a gradient of every parameter.
            nothing = sum(0 * p[0, 0] for p in self.parameters(recurse=False) if p.ndim == 2 and p.requires_grad)
            return levels * self.weight_clip_val.clamp(min=ALPHA_FLOOR) + nothing
        return quantize(self.effective_weight(), self.weight_clip_val, self.w_bits, self.weight_layerwise)

    def forward(self, input: Tensor) -> Tensor:
        kind = input.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else input.dtype
        return self._multiply(input.to(dtype), None if self.bias is None else self.bias.to(dtype))

    def _multiply(self, input: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(input, self.quantized_weight(input.dtype), bias)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, w_bits={self.w_bits}"


class LoRAQuantizeLinear(QuantizeLinear):
    """QuantizeLinear with a low-rank update inside the quantizer: quantize(weight + lora_alpha/r · lora_A @ lora_B).

    lora_A [out, r] starts at 0.01·N(0, 1), lora_B [r, in] at zero; both stay fp32. `lora_r=0` means none. ValueError on
    a negative or fractional rank. (Gradients are not multiplied by mean(α), as EfficientDM has it, arXiv 2310.03270:
    AdamW divides by their size again.)
    """

    _fp32_parameters = ("weight_clip_val", "frozen_clip_val", "lora_A", "lora_B")

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device=None,
        dtype=None,
        *,
        lora_r: int = 32,
        lora_alpha: float = 1.0,
        **quantizer,
    ):
        # Set first: the parent's constructor ends in reset_quantizer(), which reads them.
        self.lora_r = check_lora_r(lora_r)
        self.scaling = lora_alpha / lora_r if lora_r else 0.0
        super().__init__(in_features, out_features, bias, device, dtype, **quantizer)

    def reset_quantizer(self, name: str = "") -> None:
        self.register_parameter("lora_A", None)
        self.register_parameter("lora_B", None)
        super().reset_quantizer(name)  # from the weight alone: the new LoRA is zero
        if self.lora_r:
            fp32 = {"dtype": torch.float32, "device": self.latent_weight().device}
            self.lora_A = nn.Parameter(0.01 * torch.randn(self.out_features, self.lora_r, **fp32))
            self.lora_B = nn.Parameter(torch.zeros(self.lora_r, self.in_features, **fp32))

    def is_quantized(self) -> bool:
        return super().is_quantized() or self.lora_A is not None

    def effective_weight(self) -> Tensor:
        if self.lora_A is None:
            return self.latent_weight()
        # Autocast would round the product to bf16: training would then see other codes than the saved weights give.
        with torch.autocast(self.lora_A.device.type, enabled=False):
            update = self.scaling * (self.lora_A @ self.lora_B)
        return self.latent_weight() + update

    def _fused(self) -> bool:
        quantized = self.lora_A is not None and self.w_bits < FULL_PRECISION_BITS
        return quantized and works_on(self.latent_weight(), self.lora_r)

    def code_source(self) -> tuple[Tensor, Tensor]:
        # What the kernel makes: A @ B of another kernel may put a weight on a threshold's other side.
        return (self.quantized_weight(), self.weight_clip_val) if self._fused() else super().code_source()

    def quantized_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        return compose(*self._composed(), dtype or torch.float32) if self._fused() else super().quantized_weight(dtype)

    def _composed(self) -> tuple:
        """What compose() and few() make the weight of."""
        low, high, n, s, qp = _grid(self.w_bits, stretched=self.w_bits in (0, 2))
        return (
            self.latent_weight(), self.lora_A, self.lora_B, self.weight_clip_val, self.frozen, self.scaling,
            [float(low), float(high), n, s], self.w_bits == 1, ALPHA_FLOOR, self.in_features * self.out_features * qp,
        )  # fmt: skip

    def _multiply(self, input: Tensor, bias: Tensor | None) -> Tensor:
        if not (self._fused() and takes_few(input, self.latent_weight(), self.lora_r)):
            return super()._multiply(input, bias)
        out = few(input.reshape(-1, self.in_features), *self._composed()).view(*input.shape[:-1], self.out_features)
        return (out if bias is None else out + bias).to(input.dtype)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, lora_r={self.lora_r}"


def check_lora_r(lora_r: int) -> int:
    """`lora_r` if it is a rank (0: no LoRA), else ValueError."""
    if isinstance(lora_r, int) and lora_r >= 0:
        return lora_r
    raise ValueError(f"lora_r={lora_r!r} is not supported: use 0 (no LoRA) or a positive rank")


# ---------------------------------------------------------------------------------------------------------------------
# In the hands of PEFT


class _Held(ReadOnlyWeight):
    """Over the class of a layer while a PEFT layer holds it."""

    def weight_like(self) -> tuple[torch.dtype, torch.device]:
        return self.latent_weight().dtype, self.latent_weight().device

    def latent_weight(self) -> Tensor:
        return self._parameters["weight"]

    @torch.no_grad()
    def dequantize(self, dtype: torch.dtype) -> Tensor:
        return self.quantized_weight().to(dtype)


class HeldQuantizeLinear(_Held, QuantizeLinear):
    pass


class HeldLoRAQuantizeLinear(_Held, LoRAQuantizeLinear):
    pass


_HELD = {QuantizeLinear: HeldQuantizeLinear, LoRAQuantizeLinear: HeldLoRAQuantizeLinear}
_FREE = {held: free for free, held in _HELD.items()}


def _hold(module: nn.Module, name: str, child: nn.Module) -> None:
    """Called by torch for every module that becomes part of another: PEFT's layers call the one inside base_layer."""
    classes = _HELD if name == "base_layer" else _FREE
    if type(child) in classes and child.is_quantized():
        child.__class__ = classes[type(child)]


nn.modules.module.register_module_module_registration_hook(_hold)
