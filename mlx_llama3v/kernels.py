"""GELU and attention in the forms that suit the device: the one place where the tower differs between machines.

MLX's CPU back end computes exp and tanh one element at a time (10-22 ns each on the machines measured), and those took
more than a third of the encoding time. But `mx.compile` makes one C++ loop of a chain of products and sums, which the
compiler vectorizes, and powers of a polynomial in place of exp and tanh cost a tenth.

None of it is for Metal or CUDA. There transcendentals are hardware instructions and the loops are bound by memory, and
the fused attention (head_dim 72 of so400m is among those that MLX's kernels cover) never writes the [P, P] scores.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import mlx.core as mx

from mlx_llama3v.platform import device_name

# e^-x = 1 / (e^(x/16))^16, and e^t by its Taylor series: within 2e-6 of the largest weight, which is 1. Where that
# series ends too early (x > 16) the weight is below 1e-6 and its relative error does not matter.
_SQUARINGS = 4
_EXP = tuple(1 / math.factorial(n) for n in range(6, -1, -1))
_MASKED = -1e9
_SCORES = 1 << 20  # attended to at a time: 4 MB stay in the caches, and glibc hands them out again without the kernel


def gelu_tanh(x: mx.array) -> mx.array:
    """GELU in its tanh form, of any shape, within 1e-6 of `nn.gelu_approx`, which takes a power and a tanh an element.

    On a GPU x sigmoid(2 z), which is the same and cancels nothing.
    """
    form: Any = _gelu_powers if _on_cpu(x) else _gelu_sigmoid
    made: mx.array = form(x)
    return made


def attend(q: mx.array, k: mx.array, v: mx.array, scale: float, mask: mx.array | None = None) -> mx.array:
    """softmax(scale q k^T) v over [B, H, L, d]; `mask`, broadcast to [B, H, L, L], is True where a key may be read."""
    if not _on_cpu(q):
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=mask)
    step = max(1, _SCORES // (q.shape[0] * q.shape[2] * k.shape[2]))
    parts: list[mx.array] = []
    for n in range(0, q.shape[1], step):
        heads = q[:, n : n + step] * scale
        if parts:  # one after the other: MLX would compute all scores first, then all of their exponentials
            heads = mx.depends([heads], [parts[-1]])[0]
        parts.append(_attend_heads(heads, k[:, n : n + step], v[:, n : n + step], mask))
    return parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=1)


def _attend_heads(q: mx.array, k: mx.array, v: mx.array, mask: mx.array | None) -> mx.array:
    """A column of scores a query: MLX's CPU reductions are vectorized down columns only (5 times as fast for max)."""
    scores = k @ q.swapaxes(-1, -2)
    if mask is not None:
        scores = mx.where(mask.swapaxes(-1, -2), scores, _MASKED)
    weights = _exp_below(scores, mx.max(scores, axis=-2, keepdims=True))
    return (weights.swapaxes(-1, -2) @ v) / mx.sum(weights, axis=-2)[..., None]


def _on_cpu(x: mx.array) -> bool:
    return x.dtype == mx.float32 and device_name() == "cpu"


def _polynomial(x: mx.array, powers: tuple[float, ...]) -> mx.array:
    value = powers[0] * x
    for constant in powers[1:-1]:
        value = (value + constant) * x
    return value + powers[-1]


@mx.custom_function
def _gelu_powers(x: mx.array) -> mx.array:
    """`_powers`, whose own gradient would be 0 times infinity where e^2|z| overflows."""
    return _powers(x)


@_gelu_powers.vjp
def _gelu_slope(x: mx.array, cotangent: mx.array, output: mx.array) -> mx.array:
    return mx.vjp(_gelu_sigmoid, [x], [cotangent])[1][0]


@partial(mx.compile, shapeless=True)
def _powers(x: mx.array) -> mx.array:
    """max(x, 0) - |x| / (1 + e^2|z|), which is x (1 + tanh z) / 2; where e^2|z| overflows, the second term is 0.

    The exponent is 8 t, and e^t its Taylor series to t^7 in Estrin's order: MLX fuses chains of ten operations or so,
    and every further loop is a pass through memory. Half the time of a ratio of polynomials for tanh, and nearer.
    """
    size = mx.abs(x)
    t = size * (0.19947114020071635 + 0.008919352034075031 * size * size)
    square = t * t
    low, high = 1 + t + square * (1 / 2 + t * (1 / 6)), 1 / 24 + t * (1 / 120) + square * (1 / 720 + t * (1 / 5040))
    power = low + square * square * high
    for _ in range(3):
        power = power * power
    return 0.5 * (x + size) - size / (1 + power)


@partial(mx.compile, shapeless=True)
def _gelu_sigmoid(x: mx.array) -> mx.array:
    return x * mx.sigmoid(x * (1.5957691216057308 + 0.07135481282 * x * x))


@partial(mx.compile, shapeless=True)
def _exp_below(x: mx.array, top: mx.array) -> mx.array:
    """e^(x - top) for x <= top."""
    value = _polynomial((top - x) * 2.0**-_SQUARINGS, _EXP)
    for _ in range(_SQUARINGS):
        value = value * value
    return 1 / value
