"""y = x·Wᵀ + b from packed codes: Triton kernels on a GPU, the same in plain torch wherever Triton is missing.

W[n, k] = α[n]·(c[n, k] + s)/n_grid for integer codes c (utils_quant.code_grid), a few bits each, laid out in planes
(packing.py). Two ways to multiply:

    exact   W unpacked into a scratch matrix in the dtype of x, then F.linear: the numbers of the dequantized layer up
            to the order of the sum.
    fast    every token of x in 8 bits (e4m3 from compute capability 8.9, else int8), x ≈ q·scale; the codes as the
            integers g with W = α·g·grid_step in 8 bits, which hold them exactly; an 8-bit product on the tensor cores
            (torch._scaled_mm, torch._int_mm) and the scales in its epilogue. Only x is rounded: 2.7 % of its norm in
            e4m3 and 0.8 % in int8 if it is Gaussian.

Up to SMALL tokens (modulation has one a picture) a scratch matrix would cost more than the product: on a GPU
`_few_tokens` (ternary codes: `_few_tokens_ternary`) reads the codes once and multiplies in fp32, in either mode. A
scratch matrix lives inside one call; the caching allocator, or the pool of a CUDA graph, gives the same memory to the
next. Layers so small that unpacking would cost more than the product stay unpacked on a CPU (`kept`).
torch.compile takes the launches of the kernels into its graph, as it does with plain torch; only where a gradient is
wanted, a layer is an op of its own.

Between the layers, fast mode has a shorter GELU (`gelu`) and queries and keys made by one kernel (`norm_rotate`);
exact mode has them where its blocks are compiled.
"""

import math
from collections.abc import Iterator, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.utils_quant import code_grid

try:
    import triton
    import triton.language as tl

    INTERPRETED = triton.knobs.runtime.interpret  # TRITON_INTERPRET=1: the kernels work on a CPU too
except ImportError:
    triton, INTERPRETED = None, False

MODES = ("exact", "fast")
PLANES = {0: (2,), 1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1), 8: (8,)}  # widths in bits
KEPT = 2**19  # weights of a layer up to which it stays unpacked on a CPU: 2 MB in fp32
SMALL = 16  # tokens up to which codes are multiplied without a scratch matrix
FP8 = torch.float8_e4m3fn
FP8_BITS = 4  # codes up to so many bits are exact in e4m3: integers to 16
GELU_SCALE = -2 * math.sqrt(2 / math.pi) * math.log2(math.e)  # of u = √(2/π)·(x + 0.044715·x³) in 2^(−2u·log2 e)
_CPU_ROWS = 1024  # of a product on a CPU: a few MB of cache
_CHUNK = 2**20  # codes worked on at a time: bounds the memory of packing and unpacking, and fits a cache
_CHUNK_ON_GPU = 2**24  # where a few launches are to be enough for a layer


def row_chunks(rows: int, in_features: int, device: torch.device | None = None) -> Iterator[slice]:
    """Slices of the rows of a matrix, as many elements as fit a CPU's cache each, or more where `device` is no CPU.

    All rows for torch.compile, which fuses the steps.
    """
    elements = _CHUNK if device is None or device.type == "cpu" else _CHUNK_ON_GPU
    size = max(1, rows if torch.compiler.is_compiling() else elements // in_features)
    for start in range(0, rows, size):
        yield slice(start, min(start + size, rows))


# ---------------------------------------------------------------------------------------------------------- in Triton

# Fractions are constants of a kernel: torch.compile passes a float as fp64, and all that it meets is computed so.

if triton is not None:

    @triton.jit
    def _unpack(
        codes, alpha, out, count, columns, in_features, alpha_stride, SHIFT: tl.constexpr, FACTOR: tl.constexpr,
        WIDTH: tl.constexpr, SCALED: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        """out[n, k] = (c + SHIFT)·FACTOR, times α[n] if SCALED, in out's dtype; `count` bytes, `columns` a row."""
        at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        row, column = at // columns, at % columns
        byte = tl.load(codes + at, mask=at < count, other=0).to(tl.int32)
        if SCALED:
            step = tl.load(alpha + row * alpha_stride, mask=at < count, other=0)
        for i in tl.static_range(8 // WIDTH):
            field = (byte >> (i * WIDTH)) & ((1 << WIDTH) - 1)
            value = ((field ^ (1 << (WIDTH - 1))) - (1 << (WIDTH - 1)) + SHIFT) * FACTOR
            if SCALED:
                value *= step
            k = i * columns + column
            value = value.to(out.dtype.element_ty)
            tl.store(out + row.to(tl.int64) * in_features + k, value, mask=(at < count) & (k < in_features))

    @triton.jit
    def _eight_bits(word, place: tl.constexpr, BITS: tl.constexpr, IS_FP8: tl.constexpr):
        """Code number `place` of each of the four bytes of a word as one of the integers of the fast mode."""
        WIDTH: tl.constexpr = 1 if BITS == 1 else 4 if BITS == 4 else 2
        MASK: tl.constexpr = 0x01010101 * ((1 << WIDTH) - 1)
        ODD: tl.constexpr = BITS == 1 or BITS == 2
        SIGN: tl.constexpr = 1 << WIDTH if ODD else 1 << (WIDTH - 1)
        field = (word >> (place * WIDTH)) & MASK
        if IS_FP8:  # 1 is 0x38, 3 is 0x44, the sign is bit 7
            if BITS == 0:
                value = (field & 0x01010101) * 0x38 | (field & 0x02020202) << 6
            elif BITS == 1:
                value = 0x38383838 | field << 7
            else:
                value = (0x38383838 + ((field ^ (field >> 1)) & 0x01010101) * 0x0C) | (field & 0x02020202) << 6
        else:
            if ODD:
                field = field * 2 + 0x01010101
            value = field | (field & (0x01010101 * SIGN)) * (256 // SIGN - 2)
        return value

    @triton.jit
    def _unpack_words(codes, out, count, columns, BITS: tl.constexpr, IS_FP8: tl.constexpr, BLOCK: tl.constexpr):
        """The integers of the fast mode, four bytes at a time: of `count` words in all, `columns` a row of codes."""
        FIELDS: tl.constexpr = 8 if BITS == 1 else 2 if BITS == 4 else 4
        at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        row, column = at // columns, at % columns
        words, out_words = codes.to(tl.pointer_type(tl.int32)), out.to(tl.pointer_type(tl.int32))
        word = tl.load(words + at, mask=at < count, other=0)
        for i in tl.static_range(FIELDS):
            value = _eight_bits(word, i, BITS, IS_FP8)
            tl.store(out_words + (row * FIELDS + i) * columns + column, value, mask=at < count)

    @triton.jit
    def _unpack_siblings(
        codes, codes_1, codes_2, codes_3, alpha, alpha_1, alpha_2, alpha_3, bias, bias_1, bias_2, bias_3,
        out, all_alpha, all_bias, rows, rows_1, rows_2, rows_3, columns, alpha_stride,
        BITS: tl.constexpr, IS_FP8: tl.constexpr, BIASED: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        """The same for up to four layers, one below the other, and their step sizes and biases.

        The grid ends with the last layer; whatever is given for those that are missing is not read. What is stored to
        is computed without a branch: torch.compile follows it back to find what a kernel writes to.
        """
        FIELDS: tl.constexpr = 8 if BITS == 1 else 2 if BITS == 4 else 4
        at = tl.program_id(0)
        end = tl.cdiv(rows * columns, BLOCK)
        end_1 = end + tl.cdiv(rows_1 * columns, BLOCK)
        end_2 = end_1 + tl.cdiv(rows_2 * columns, BLOCK)
        beyond, beyond_1, beyond_2 = (at >= end).to(tl.int32), (at >= end_1).to(tl.int32), (at >= end_2).to(tl.int32)
        if at < end:
            words = codes
        elif at < end_1:
            words, alpha, bias = codes_1, alpha_1, bias_1
        elif at < end_2:
            words, alpha, bias = codes_2, alpha_2, bias_2
        else:
            words, alpha, bias = codes_3, alpha_3, bias_3
        at -= beyond * end + beyond_1 * (end_1 - end) + beyond_2 * (end_2 - end_1)
        first = beyond * rows + beyond_1 * rows_1 + beyond_2 * rows_2
        count = rows + beyond * (rows_1 - rows) + beyond_1 * (rows_2 - rows_1) + beyond_2 * (rows_3 - rows_2)
        at = at * BLOCK + tl.arange(0, BLOCK)
        row, column = at // columns, at % columns
        out_words = out.to(tl.pointer_type(tl.int32))
        word = tl.load(words.to(tl.pointer_type(tl.int32)) + at, mask=row < count, other=0)
        for i in tl.static_range(FIELDS):
            value = _eight_bits(word, i, BITS, IS_FP8)
            tl.store(out_words + ((first + row) * FIELDS + i) * columns + column, value, mask=row < count)
        once = (row < count) & (column == 0)
        tl.store(all_alpha + first + row, tl.load(alpha + row * alpha_stride, mask=once), mask=once)
        if BIASED:
            b = tl.load(bias + row, mask=once).to(all_bias.dtype.element_ty)
            tl.store(all_bias + first + row, b, mask=once)

    @triton.jit
    def _few_tokens(
        codes, x, alpha, bias, out, rows, columns, in_features, alpha_stride, SHIFT: tl.constexpr,
        FACTOR: tl.constexpr, WIDTH: tl.constexpr, BIASED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    ):  # fmt: skip
        """out[m, n] = Σ_k x[m, k]·W[n, k] + bias[n] in fp32, W rounded to x's dtype; one m and ROWS rows a program."""
        n, m = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1)
        dtype = x.dtype.element_ty
        step = tl.load(alpha + n * alpha_stride, mask=n < rows, other=0)
        total = tl.zeros([ROWS, COLUMNS], tl.float32)
        for start in range(0, columns, COLUMNS):
            column = start + tl.arange(0, COLUMNS)
            inside = (n < rows)[:, None] & (column < columns)[None, :]
            byte = tl.load(codes + n.to(tl.int64)[:, None] * columns + column[None, :], mask=inside, other=0)
            byte = byte.to(tl.int32)
            for i in tl.static_range(8 // WIDTH):
                k = i * columns + column
                x_i = tl.load(x + m * in_features + k, mask=(column < columns) & (k < in_features), other=0)
                field = (byte >> (i * WIDTH)) & ((1 << WIDTH) - 1)
                level = ((field ^ (1 << (WIDTH - 1))) - (1 << (WIDTH - 1)) + SHIFT) * FACTOR
                total += (level * step[:, None]).to(dtype).to(tl.float32) * x_i.to(tl.float32)[None, :]
        y = tl.sum(total, 1)
        if BIASED:
            y += tl.load(bias + n, mask=n < rows, other=0).to(tl.float32)
        tl.store(out + m * rows + n, y.to(dtype), mask=n < rows)

    @triton.jit
    def _few_tokens_ternary(
        codes, x, alpha, bias, out, rows, FACTOR: tl.constexpr, ALPHA_STRIDE: tl.constexpr, COLUMNS: tl.constexpr,
        BIASED: tl.constexpr, ROWS: tl.constexpr, WORDS: tl.constexpr, WIDTH: tl.constexpr,
    ):  # fmt: skip
        """The same for ternary codes, x of 16 bits, COLUMNS a multiple of 4·WORDS, WIDTH a power of 2 not below it.

        What bounds it are instructions, some three a code. A byte of codes, their sign bits flipped, is put into the
        uppermost bits of the mantissa of 1. With all of it but field i masked out, the number reads
        1 + (c + 2)/unit for unit = 4^(4 − i). The sum of x times it is multiplied by unit, and x·(unit + 2) taken off
        at the end: with products 4 to 256 times too large, it loses up to eight bits. x is loaded in the shape of the
        codes: in another shape it would have another layout in registers and go through shared memory, with two
        barriers for every load. Codes are on their way while those before them are worked on. A number of rows that is
        no multiple of ROWS reads the first rows again.
        """
        n, m = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1)
        dtype = x.dtype.element_ty
        at = tl.arange(0, WORDS)[None, :]
        code_at = codes.to(tl.pointer_type(tl.int32)) + (n % rows).to(tl.int64)[:, None] * (COLUMNS // 4) + at
        four_at = x.to(tl.pointer_type(tl.int64)) + m * COLUMNS + tl.zeros([ROWS, 1], tl.int32) + at
        ahead = tl.load(code_at)
        step = tl.load(alpha + n * ALPHA_STRIDE, mask=n < rows, other=0)
        if BIASED:
            b = tl.load(bias + n, mask=n < rows, other=0).to(tl.float32)
        column = tl.arange(0, WIDTH)
        offset = tl.zeros([WIDTH], tl.float32)
        for i in tl.static_range(4):
            x_i = tl.load(x + (4 * m + i) * COLUMNS + column, mask=column < COLUMNS, other=0)
            offset += x_i.to(tl.float32) * ((256 >> 2 * i) + 2)
        total = tl.zeros([ROWS, WORDS], tl.float32)
        for start in range(0, COLUMNS // 4, WORDS):
            word = ahead ^ -0x55555556
            ahead = tl.load(code_at + (start + WORDS) % (COLUMNS // 4))  # at the end the first ones, for nothing
            for i in tl.static_range(4):
                four = tl.load(four_at + start + i * (COLUMNS // 4))
                lifted_sum = tl.zeros([ROWS, WORDS], tl.float32)
                for j in tl.static_range(4):
                    if dtype == tl.bfloat16:  # the upper half of an fp32
                        two = (four >> (32 * (j // 2))).to(tl.int32)
                        x_j = (two << 16 if j % 2 == 0 else two & -0x10000).to(tl.float32, bitcast=True)
                    else:
                        x_j = (four >> (16 * j)).to(tl.int16).to(dtype, bitcast=True).to(tl.float32)
                    mantissa = (word << (15 - 8 * j) if j < 2 else word >> (8 * j - 15)) | 0x3F800000
                    lifted = mantissa & (0x3F800000 | 0x18000 << 2 * i)
                    lifted_sum += lifted.to(tl.float32, bitcast=True) * x_j
                total += lifted_sum * (256 >> 2 * i)
        y = (tl.sum(total, 1) - tl.sum(offset, 0)) * (step * FACTOR).to(dtype).to(tl.float32)
        if BIASED:
            y += b
        tl.store(out + m * rows + n, y.to(dtype), mask=n < rows)

    @triton.jit
    def _norm_rotate(
        text_query, text_key, query, key, text_query_weight, text_key_weight, query_weight, key_weight, cos, sin, out,
        text_tokens, tokens, heads, EPS: tl.constexpr, text_batch, text_row, image_batch, image_row,
        HEADS: tl.constexpr, WIDTH: tl.constexpr,
    ):  # fmt: skip
        """The query or the key of one token a program: all heads normalized and rotated, in fp32.

        WIDTH is a power of 2, HEADS ≥ heads one.
        """
        batch, at = tl.program_id(0).to(tl.int64) // tokens, tl.program_id(0) % tokens
        if tl.program_id(1) == 0:
            text, image, text_weight, image_weight = text_query, query, text_query_weight, query_weight
        else:
            text, image, text_weight, image_weight = text_key, key, text_key_weight, key_weight
        if at < text_tokens:
            source, weight = text + batch * text_batch + at.to(tl.int64) * text_row, text_weight
        else:
            source, weight = image + batch * image_batch + (at - text_tokens).to(tl.int64) * image_row, image_weight
        row = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
        head, place = tl.arange(0, HEADS)[:, None], tl.arange(0, WIDTH)
        x = tl.load(source + head * WIDTH + place[None, :], mask=head < heads, other=0).to(tl.float32)
        x *= tl.rsqrt(tl.sum(x * x, 1) / WIDTH + EPS)[:, None] * tl.load(weight + place).to(tl.float32)[None, :]
        even, odd = tl.split(tl.reshape(x, (HEADS, WIDTH // 2, 2)))
        even_cos, odd_cos = tl.split(tl.reshape(tl.load(cos + at * WIDTH + place), (WIDTH // 2, 2)))
        even_sin, odd_sin = tl.split(tl.reshape(tl.load(sin + at * WIDTH + place), (WIDTH // 2, 2)))
        turned_even = even * even_cos[None, :] - odd * even_sin[None, :]
        turned_odd = odd * odd_cos[None, :] + even * odd_sin[None, :]
        x = tl.reshape(tl.join(turned_even, turned_odd), (HEADS, WIDTH)).to(out.dtype.element_ty)
        tl.store(out + (row * heads + head) * WIDTH + place[None, :], x, mask=head < heads)


def _triton_works_on(tensor: Tensor) -> bool:
    """Whether Triton's kernels can take this tensor: on a GPU, or anywhere in its interpreter."""
    return triton is not None and (tensor.is_cuda or INTERPRETED)


def in_triton(codes: Tensor, w_bits: int) -> bool:
    """Whether the kernels can work on these codes."""
    return _triton_works_on(codes) and len(PLANES[w_bits]) == 1


def _launch(kernel, grid: tuple[int, ...], first: Tensor, *arguments, **options) -> None:
    """kernel[grid](first, …) on the device of `first`."""
    if torch.compiler.is_compiling():  # which sees to the device itself
        kernel[grid](first, *arguments, **options)
        return
    with torch.cuda.device_of(first):
        kernel[grid](first, *arguments, **options)


def _in_words(tensor: Tensor, size: int) -> bool:
    """Whether a contiguous tensor may be read in words of `size` bytes.

    Dynamo cannot ask. What a graph computes lies in words, as parameters do; only a slice that begins between two
    words and goes straight from a graph's arguments into a layer would not.
    """
    return torch.compiler.is_compiling() or tensor.storage_offset() * tensor.element_size() % size == 0


# ---------------------------------------------------------------------------------------------------------- unpacking


def unpack_codes(packed: Tensor, w_bits: int, in_features: int) -> Tensor:
    """Bytes [rows, row_bytes] back to signed codes [rows, in_features] (int8)."""
    codes, shift = None, 0
    sizes = [-(-in_features // (8 // width)) for width in PLANES[w_bits]]
    for width, plane in zip(PLANES[w_bits], packed.split(sizes, 1), strict=True):
        shifts = torch.arange(0, 8, width, dtype=torch.uint8, device=packed.device)
        fields = (plane[:, None] >> shifts[:, None]).bitwise_and_(2**width - 1).view(len(plane), -1)[:, :in_features]
        codes = fields if codes is None else codes.bitwise_or_(fields.bitwise_left_shift_(shift))
        shift += width
    if shift == 8:
        return codes.view(torch.int8)
    return codes.bitwise_xor_(2 ** (shift - 1)).view(torch.int8).sub_(2 ** (shift - 1))  # extends the sign


def _dequantize(codes: Tensor, alpha: Tensor, w_bits: int, in_features: int, dtype: torch.dtype) -> Tensor:
    n, s = code_grid(w_bits)
    weight = torch.empty(len(codes), in_features, dtype=dtype, device=codes.device)
    if in_triton(codes, w_bits):
        _launch_unpack(codes, alpha, weight, w_bits, s, 1 / n, scaled=True)
        return weight
    steps = alpha.expand(len(codes), 1)
    for rows in row_chunks(*weight.shape, codes.device):
        levels = unpack_codes(codes[rows], w_bits, in_features).float().add_(s).div_(n)
        weight[rows] = levels.mul_(steps[rows])
    return weight


def integers(codes: Tensor, w_bits: int, in_features: int, dtype: torch.dtype) -> Tensor:
    """The g of W = α·g·grid_step(w_bits), [rows, in_features], as int8 or as e4m3: c, or 2c + 1 at 1 and 2 bits."""
    odd = code_grid(w_bits)[1] != 0
    if not in_triton(codes, w_bits):
        values = unpack_codes(codes, w_bits, in_features)
        values = values.mul_(2).add_(1) if odd else values
        return values if dtype == torch.int8 else values.bfloat16().to(dtype)  # Triton casts no int8 to e4m3
    if w_bits == 8:
        return codes.view(torch.int8)
    out = torch.empty(len(codes), in_features, dtype=dtype, device=codes.device)
    if _unpacks_in_words(codes, w_bits, in_features, dtype):
        count, block = codes.numel() // 4, 1024
        grid = (-(-count // block),)
        _launch(_unpack_words, grid, codes, out, count, codes.shape[1] // 4, w_bits, dtype == FP8, block)
    else:
        shift, factor = (0.5, 2.0) if odd else (0.0, 1.0)
        _launch_unpack(codes, codes, out, w_bits, shift, factor, scaled=False)
    return out


def _unpacks_in_words(codes: Tensor, w_bits: int, in_features: int, dtype: torch.dtype) -> bool:
    """Whether the integers of these codes can be made four bytes at a time."""
    known = w_bits in (0, 1, 2) or (w_bits == 4 and dtype == torch.int8)
    whole = codes.shape[1] % 4 == 0 and codes.shape[1] * (8 // PLANES[w_bits][0]) == in_features
    return known and whole and in_triton(codes, w_bits) and _in_words(codes, 4)


def _can_unpack_together(layers: Sequence[nn.Module], dtype: torch.dtype) -> bool:
    """Whether one kernel can write the integers of all these layers."""
    alike = len({(layer.w_bits, layer.in_features, layer.bias is None, layer.weight_layerwise) for layer in layers})
    words = [_unpacks_in_words(layer.weight_codes, layer.w_bits, layer.in_features, dtype) for layer in layers]
    return 1 < len(layers) <= 4 and alike == 1 and all(words)


def _unpacked_together(
    layers: Sequence[nn.Module], dtype: torch.dtype, bias_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The integers [out, in], step sizes [out, 1] (fp32) and biases [out] of two to four layers, by one kernel."""
    first, rows = layers[0], [layer.out_features for layer in layers]
    weight = torch.empty(sum(rows), first.in_features, dtype=dtype, device=first.weight_codes.device)
    alpha = first.weight_clip_val.new_empty(sum(rows), 1)
    bias = None if first.bias is None else first.bias.new_empty(sum(rows), dtype=bias_dtype)
    columns, block = first.weight_codes.shape[1] // 4, 1024
    grid = (sum(-(-count * columns // block) for count in rows),)
    four = [layers[min(place, len(layers) - 1)] for place in range(4)]
    alphas = [layer.weight_clip_val for layer in four]
    _launch(
        _unpack_siblings, grid, *(layer.weight_codes for layer in four), *alphas,
        *(alphas if bias is None else [layer.bias for layer in four]), weight, alpha, alpha if bias is None else bias,
        *(layer.out_features for layer in four), columns, int(first.weight_clip_val.numel() > 1), first.w_bits,
        dtype == FP8, bias is not None, block,
    )  # fmt: skip
    return weight, alpha, bias


def _launch_unpack(codes, alpha, out, w_bits: int, shift: float, factor: float, scaled: bool) -> None:
    block = 1024
    _launch(
        _unpack, (-(-codes.numel() // block),), codes, alpha, out, codes.numel(), codes.shape[1], out.shape[1],
        int(alpha.numel() > 1), shift, factor, PLANES[w_bits][0], scaled, block,
    )  # fmt: skip


def kept(layer: nn.Module, dtype: torch.dtype) -> Tensor | None:
    """The weight [out, in] of a small PackedLinear on a CPU, unpacked once and not at every call; of others None.

    In int8 it is the layer's `integers`, in another dtype its dequantized weight. It is made anew once codes or step
    sizes are written to or lie elsewhere; writing through their `.data` goes unnoticed, as it does in autograd.
    """
    codes, alpha = layer._parameters["weight_codes"], layer._parameters["weight_clip_val"]
    if torch.compiler.is_compiling() or codes.is_inference() or layer.out_features * layer.in_features > KEPT:
        return None
    state = dtype, codes.data_ptr(), codes._version, alpha.data_ptr(), alpha._version
    if layer.kept is not None and layer.kept[0] == state:
        return layer.kept[1]
    if codes.device.type != "cpu" or in_triton(codes, layer.w_bits):
        return None
    unpack = integers if dtype == torch.int8 else partial(_dequantize, alpha=alpha)
    weight = unpack(codes, w_bits=layer.w_bits, in_features=layer.in_features, dtype=dtype)
    layer.kept = state, weight, codes.detach(), alpha.detach()  # no other tensor gets their addresses
    return weight


# -------------------------------------------------------------------------------------------------------------- exact


@torch.library.custom_op("flux158::dequantize", mutates_args=())
def dequantize(codes: Tensor, alpha: Tensor, w_bits: int, in_features: int, dtype: torch.dtype) -> Tensor:
    """The weight [out, in_features] of codes [out, row_bytes] (uint8) and step sizes [out, 1] or [1, 1] (fp32)."""
    return _dequantize(codes, alpha, w_bits, in_features, dtype)


@dequantize.register_fake
def _(codes, alpha, w_bits, in_features, dtype):
    return codes.new_empty(len(codes), in_features, dtype=dtype)


def wants_gradient(x: Tensor, *biases: Tensor | None) -> bool:
    """Whether a gradient may be asked of what a layer makes of x with one of these biases."""
    return torch.is_grad_enabled() and any(part is not None and part.requires_grad for part in (x, *biases))


def exact_linear(x: Tensor, codes: Tensor, alpha: Tensor, bias: Tensor | None, w_bits: int) -> Tensor:
    """F.linear(x [..., in], dequantized weight, bias [out]) -> [..., out] in x's dtype, up to the order of the sum.

    codes [out, row_bytes] (uint8), alpha [out, 1] or [1, 1] (fp32). Differentiable in x and bias.
    """
    return (exact_op if wants_gradient(x, bias) else _exact)(x, codes, alpha, bias, w_bits)


def _exact(x: Tensor, codes: Tensor, alpha: Tensor, bias: Tensor | None, w_bits: int) -> Tensor:
    tokens = x.numel() // x.shape[-1]
    if not in_triton(codes, w_bits) or not 0 < tokens <= SMALL:
        return F.linear(x, _dequantize(codes, alpha, w_bits, x.shape[-1], x.dtype), bias)
    (n, s), x, rows, columns = code_grid(w_bits), x.contiguous(), len(codes), codes.shape[1]
    out = x.new_empty(*x.shape[:-1], rows)
    stride, biased = int(alpha.numel() > 1), bias is not None
    bias = bias if biased else x
    in_words = 4 * columns == x.shape[-1] and _in_words(codes, 4) and _in_words(x, 8)
    words = min(64, columns // 4 & -(columns // 4))  # a power of 2 that divides those of a row
    if w_bits == 0 and x.element_size() == 2 and columns % 4 == 0 and words >= 4 and in_words:
        _launch(
            _few_tokens_ternary, (-(-rows // 16), tokens), codes, x, alpha, bias, out, rows, 1 / n, stride, columns,
            biased, 16, words, 1 << (columns - 1).bit_length(),
        )  # fmt: skip
    else:
        _launch(
            _few_tokens, (-(-rows // 16), tokens), codes, x, alpha, bias, out, rows, columns, x.shape[-1], stride,
            s, 1 / n, PLANES[w_bits][0], biased, 16, 256,
        )  # fmt: skip
    return out


@torch.library.custom_op("flux158::exact_linear", mutates_args=())
def exact_op(x: Tensor, codes: Tensor, alpha: Tensor, bias: Tensor | None, w_bits: int) -> Tensor:
    """exact_linear as an op that for its gradient keeps the codes alone."""
    return _exact(x, codes, alpha, bias, w_bits)


@exact_op.register_fake
def _(x, codes, alpha, bias, w_bits):
    return x.new_empty(*x.shape[:-1], len(codes))


def _save_codes(ctx, inputs, output) -> None:
    x, codes, alpha, _, ctx.w_bits = inputs
    ctx.in_features = x.shape[-1]
    ctx.save_for_backward(codes, alpha)


def _exact_backward(ctx, grad: Tensor):
    codes, alpha = ctx.saved_tensors
    grad_x = grad @ dequantize(codes, alpha, ctx.w_bits, ctx.in_features, grad.dtype)
    grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0) if ctx.needs_input_grad[3] else None
    return grad_x, None, None, grad_bias, None


exact_op.register_autograd(_exact_backward, setup_context=_save_codes)

# --------------------------------------------------------------------------------------------------------------- fast


@torch.compiler.assume_constant_result
def _has_fp8(device: torch.device) -> bool:
    """Whether the tensor cores of this device multiply e4m3 by rows of scales."""
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 9)


def token_dtype(x: Tensor, out_features: int, w_bits: int) -> torch.dtype | None:
    """What fast mode quantizes the tokens x [..., in] to for this layer; None where exact mode serves as well.

    On CUDA that is up to SMALL tokens, and shapes that the 8-bit products do not take; also every other device but CPU.
    """
    if x.device.type == "cpu":
        return torch.int8 if x.numel() else None
    if x.device.type != "cuda" or x.numel() <= SMALL * x.shape[-1] or x.shape[-1] % 16 or out_features % 16:
        return None
    return FP8 if w_bits <= FP8_BITS and _has_fp8(x.device) else torch.int8


def quantize_tokens(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x [..., in] as q [..., in] in int8 or e4m3 and scale [..., 1] (fp32), x ≈ q·scale; max|q| is 127 or 448."""
    scale = x.abs().amax(-1, keepdim=True).float().clamp(min=1e-30) / (448 if dtype == FP8 else 127)
    q = x * scale.reciprocal()  # a division a token, not one a number
    return (q if dtype == FP8 else q.round_()).to(dtype), scale


def gelu(x: Tensor) -> Tensor:
    """F.gelu(x, approximate="tanh"), compiled into fewer instructions than a tanh takes.

    (1 + tanh(u))/2 is 1/(1 + exp(−2u)). On a GPU it is instructions that bound the kernel from GELU to 8 bits.
    """
    if not torch.compiler.is_compiling() or wants_gradient(x):  # 2^… overflows, where its slope is no number
        return F.gelu(x, approximate="tanh")
    wide = x.float()
    return (wide / (1 + torch.exp2(wide * (wide * wide * (0.044715 * GELU_SCALE) + GELU_SCALE)))).to(x.dtype)


def grid_step(w_bits: int) -> float:
    """The step of the grid that `integers` counts in, for α = 1."""
    n, s = code_grid(w_bits)
    return 1 / n if s == 0 else s / n


def fast_linear(x: Tensor, dtype: torch.dtype, layers: Sequence[nn.Module]) -> Sequence[Tensor]:
    """[F.linear(x in 8 bits, dequantized weight, bias) for each of the PackedLinear layers], in x's dtype.

    Tokens x [..., in] are quantized to `dtype`, int8 or e4m3, once for all layers, which are multiplied as one if one
    kernel can unpack them. In e4m3 the products are rounded to bf16.
    """
    q, scale = quantize_tokens(x, dtype)
    q, scale = q.reshape(-1, x.shape[-1]).contiguous(), scale.reshape(-1, 1)
    if not _can_unpack_together(layers, dtype):
        return [_fast(q, scale, layer, x.dtype).view(*x.shape[:-1], layer.out_features) for layer in layers]
    rows = [layer.out_features for layer in layers]
    scale = (scale * grid_step(layers[0].w_bits)).contiguous()
    out = _product(q, scale, *_unpacked_together(layers, dtype, x.dtype), x.dtype)
    return out.view(*x.shape[:-1], sum(rows)).split(rows, -1)


def _fast(q: Tensor, scale: Tensor, layer: nn.Module, dtype: torch.dtype) -> Tensor:
    """q·scale·Wᵀ + bias -> [tokens, out] in `dtype`; q [tokens, in] (int8 or e4m3, contiguous), scale [tokens, 1]."""
    codes, w_bits, in_features = layer.weight_codes, layer.w_bits, layer.in_features
    scale = (scale * grid_step(w_bits)).contiguous()
    alpha = layer.weight_clip_val.expand(layer.out_features, 1).contiguous()
    bias = None if layer.bias is None else layer.bias.to(dtype)
    if q.is_cuda or torch.compiler.is_compiling():
        return _product(q, scale, integers(codes, w_bits, in_features, q.dtype), alpha, bias, dtype)
    out, weight = torch.empty(len(q), layer.out_features, dtype=dtype), kept(layer, torch.int8)
    for rows in (slice(start, start + _CPU_ROWS) for start in range(0, layer.out_features, _CPU_ROWS)):
        part = integers(codes[rows], w_bits, in_features, torch.int8) if weight is None else weight[rows]
        _int8_product(q, scale, part, alpha[rows], None if bias is None else bias[rows], out[:, rows])
    return out


def _product(
    q: Tensor, scale: Tensor, weight: Tensor, alpha: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """q·gᵀ·scale·α + bias -> [tokens, out] in `dtype`, g the `integers` [out, in] in `weight`.

    q [tokens, in] in int8 or e4m3, scale [tokens, 1] (fp32; quantize_tokens' times grid_step), both contiguous, alpha
    [out, 1] (fp32), bias [out] in `dtype`.
    """
    if q.dtype != FP8:
        out = torch.empty(len(q), len(weight), dtype=dtype, device=q.device)
        _int8_product(q, scale, weight, alpha, bias, out)
        return out
    inside = bias is not None and dtype == torch.bfloat16
    out = torch._scaled_mm(
        q, weight.t(), scale_a=scale, scale_b=alpha.view(1, -1), bias=bias if inside else None,
        out_dtype=torch.bfloat16, use_fast_accum=True,
    ).to(dtype)  # fmt: skip
    return out if bias is None or inside else out + bias


def _int8_product(q: Tensor, scale: Tensor, weight: Tensor, alpha: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """The same in int8, written to `out` [tokens, out]."""
    product = torch._int_mm(q, weight.t()) * alpha.view(1, -1)
    if bias is None:
        torch.mul(product, scale, out=out)
    else:
        torch.addcmul(bias.float(), product, scale, out=out)


# ---------------------------------------------------------------------------------------------------------- attention


def can_rotate(tokens: Tensor, width: int, norm: nn.RMSNorm) -> bool:
    """Whether norm_rotate can take heads of this width, made of `tokens`, to be normalized by `norm`.

    No where the norm's weight is elsewhere: sequential offloading brings it only when the norm itself is called.
    """
    simple = norm.weight is not None and norm.eps is not None and width & (width - 1) == 0
    here = simple and norm.weight.device == tokens.device
    return here and _triton_works_on(tokens) and not torch.is_grad_enabled()


def norm_rotate(
    text: Sequence[tuple[Tensor, nn.RMSNorm]] | None,
    image: Sequence[tuple[Tensor, nn.RMSNorm]],
    rotary: tuple[Tensor, Tensor],
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Query and key as attention takes them: each head normalized, text before image, rotated; in one kernel.

    text, image: query and key x [batch, tokens, heads, width] (see can_rotate), each with its norm, all of one eps.
    rotary: cosines and sines [all tokens, width] (fp32). -> query and key [batch, all tokens, heads, width] in dtype,
    rounded once. x[2i] and x[2i + 1] are the coordinates that are turned (RoPE, arXiv 2104.09864; as diffusers'
    apply_rotary_emb does). The kernels that torch.compile makes of it took 7.6 of the 97 ms of a FLUX.1-dev step at
    1024 pixels on an H100.
    """
    (text_pair, text_norms), (pair, norms) = (zip(*part, strict=True) for part in (text or image, image))
    text_pair, pair = _strided_alike(*text_pair), _strided_alike(*pair)
    weights = [norm.weight for norm in (*text_norms, *norms)]
    batch, count, heads, width = pair[0].shape
    text_count = text_pair[0].shape[1] if text else 0
    tokens = text_count + count
    out = pair[0].new_empty(2, batch, tokens, heads, width, dtype=dtype)
    cos, sin = (part.contiguous() for part in rotary)
    _launch(
        _norm_rotate, (batch * tokens, 2), *text_pair, *pair, *weights, cos, sin, out, text_count, tokens, heads,
        norms[0].eps, *text_pair[0].stride()[:2], *pair[0].stride()[:2], 1 << (heads - 1).bit_length(), width,
        num_warps=8,  # with four, heads of 128 go through shared memory: 61 µs a block of FLUX.1-dev on an H200
    )  # fmt: skip
    return out[0], out[1]


def _strided_alike(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """The two [batch, tokens, heads, width] with the same strides, the heads of a token one after the other."""
    if query.stride() == key.stride() and query.stride()[2:] == (query.shape[3], 1):
        return query, key
    return query.contiguous(), key.contiguous()
