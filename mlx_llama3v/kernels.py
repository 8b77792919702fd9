"""GELU and attention in the forms that suit the device: the one place where the tower differs between machines.

MLX's CPU back end computes exp and tanh one element at a time (10-22 ns each on the machines measured), and those took
more than a third of the encoding time. But `mx.compile` makes one C++ loop of a chain of products and sums, which the
compiler vectorizes: a ratio of polynomials in place of tanh, and 2^n times a polynomial in place of exp, cost a tenth.

None of it is for Metal or CUDA. There transcendentals are hardware instructions and the loops are bound by memory, and
the fused attention (head_dim 72 of so400m is among those that MLX's kernels cover) never writes the [P, P] scores.
"""

from __future__ import annotations

import math
from functools import partial

import mlx.core as mx

from mlx_llama3v.platform import device_name

# tanh(x) = x P(x^2) / Q(x^2) on [-7.9, 7.9], the constants of Eigen's `ptanh`, highest power first.
_TANH_BOUND = 7.90531110763549805
_TANH_P = (
    *(-2.76076847742355e-16, 2.00018790482477e-13, -8.60467152213735e-11, 5.12229709037114e-08),
    *(1.48572235717979e-05, 6.37261928875436e-04, 4.89352455891786e-03),
)
_TANH_Q = (1.19825839466702e-06, 1.18534705686654e-04, 2.26843463243900e-03, 4.89352518554385e-03)

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
    return _gelu_rational(x) if _on_cpu(x) else _gelu_sigmoid(x)


def attend(q: mx.array, k: mx.array, v: mx.array, scale: float, mask: mx.array | None = None) -> mx.array:
    """softmax(scale q k^T) v over [B, H, L, d]; `mask`, broadcast to [B, H, L, L], is True where a key may be read."""
    if not _on_cpu(q):
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=mask)
    step = max(1, _SCORES // (q.shape[0] * q.shape[2] * k.shape[2]))
    parts = [
        _attend_heads(q[:, n : n + step] * scale, k[:, n : n + step], v[:, n : n + step], mask)
        for n in range(0, q.shape[1], step)
    ]
    return parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=1)


def _attend_heads(q: mx.array, k: mx.array, v: mx.array, mask: mx.array | None) -> mx.array:
    scores = q @ k.swapaxes(-1, -2)
    if mask is not None:
        scores = mx.where(mask, scores, _MASKED)
    weights = _exp_below(scores, mx.max(scores, axis=-1, keepdims=True))
    return (weights @ v) / mx.sum(weights, axis=-1, keepdims=True)


def _on_cpu(x: mx.array) -> bool:
    return x.dtype == mx.float32 and device_name() == "cpu"


def _polynomial(x: mx.array, powers: tuple[float, ...]) -> mx.array:
    value = powers[0] * x
    for constant in powers[1:-1]:
        value = (value + constant) * x
    return value + powers[-1]


@partial(mx.compile, shapeless=True)
def _gelu_rational(x: mx.array) -> mx.array:
    z = mx.clip(x * (0.7978845608028654 + 0.035677408136300125 * x * x), -_TANH_BOUND, _TANH_BOUND)
    return 0.5 * x * (1 + z * _polynomial(z * z, _TANH_P) / _polynomial(z * z, _TANH_Q))


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
