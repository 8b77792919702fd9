"""The functions that take the time on a CPU, for its back end alone.

MLX computes exp, erf and sigmoid on a CPU with scalar loops of about 10 ns an element: in a small model that is
three quarters of a training step. Polynomials that the compiler vectorises take a fifth of it, to within 1e-6
(tests/test_fast.py). On a GPU MLX's own are the fast ones, and these
are not used: `on_cpu` decides.
"""

from __future__ import annotations

import math
from typing import Any

import mlx.core as mx

from mlx_llama3v.platform import device_name

# tanh(x) = x P(x^2) / Q(x^2) on [-7.9, 7.9] and erf(x) on [-4, 4]: the constants of Eigen, highest power first.
_TANH_BOUND = 7.90531110763549805
_TANH_P = (
    *(-2.76076847742355e-16, 2.00018790482477e-13, -8.60467152213735e-11, 5.12229709037114e-08),
    *(1.48572235717979e-05, 6.37261928875436e-04, 4.89352455891786e-03),
)
_TANH_Q = (1.19825839466702e-06, 1.18534705686654e-04, 2.26843463243900e-03, 4.89352518554385e-03)
_ERF_BOUND = 4.0
_ERF_P = (
    *(-2.72614225801306e-10, 2.77068142495902e-08, -2.10102402082508e-06, -5.69250639462346e-05),
    *(-7.34990630326855e-04, -2.95459980854025e-03, -1.60960333262415e-02),
)
_ERF_Q = (
    *(-1.45660718464996e-05, -2.13374055278905e-04, -1.68282697438203e-03, -7.37332916720468e-03),
    -1.42647390514189e-02,
)
# 2^f for f in [-0.5, 0.5], Cephes.
_EXP2 = (
    *(1.535336188319500e-4, 1.339887440266574e-3, 9.618437357674640e-3, 5.550332471162809e-2),
    *(2.402264791363012e-1, 6.931472028550421e-1, 1.0),
)


def on_cpu(x: mx.array) -> bool:
    """Whether `x` is what these functions are for."""
    return x.dtype == mx.float32 and device_name() == "cpu"


def _polynomial(x: mx.array, constants: tuple[float, ...]) -> mx.array:
    value = constants[0] * x + constants[1]
    for constant in constants[2:]:
        value = value * x + constant
    return value


def _ratio(x: mx.array, bound: float, above: tuple[float, ...], below: tuple[float, ...]) -> mx.array:
    x = mx.clip(x, -bound, bound)
    return x * _polynomial(x * x, above) / _polynomial(x * x, below)


def _sigmoid(x: mx.array) -> mx.array:
    return 0.5 + 0.5 * _ratio(0.5 * x, _TANH_BOUND, _TANH_P, _TANH_Q)


def _normal(x: mx.array) -> mx.array:
    """Distribution function of the normal distribution."""
    return 0.5 + 0.5 * _ratio(math.sqrt(0.5) * x, _ERF_BOUND, _ERF_P, _ERF_Q)


def _exp(x: mx.array) -> mx.array:
    """exp(x) for x <= 0, and 0 from where it leaves float32's normal range (denormals are slow)."""
    power = mx.maximum(x, -87.0) * (1 / math.log(2))
    whole = mx.round(power)
    exponent = (whole.astype(mx.int32) + 127) << 23  # the bits of 2 ^ whole
    return mx.where(x < -87.0, 0.0, _polynomial(power - whole, _EXP2) * exponent.view(mx.float32))


@mx.compile
def exp_negative(x: mx.array) -> mx.array:
    """exp(x) for x <= 0."""
    return _exp(x)


@mx.custom_function
def gelu(x: mx.array) -> mx.array:
    """`nn.gelu`: x times the normal distribution function, with the error function itself."""
    return _gelu(x)


@mx.compile
def _gelu(x: mx.array) -> mx.array:
    return x * _normal(x)


@mx.compile
def _gelu_gradient(x: mx.array, ahead: mx.array) -> mx.array:
    return ahead * (_normal(x) + x * (math.sqrt(0.5 / math.pi) * _exp(-0.5 * x * x)))


@gelu.vjp
def _(x: mx.array, ahead: mx.array, _: mx.array) -> mx.array:
    return _gelu_gradient(x, ahead)


@mx.custom_function
def swiglu(gate: mx.array, x: mx.array) -> mx.array:
    """Llama's activation: silu(gate) * x."""
    return _swiglu(gate, x)


@mx.compile
def _swiglu(gate: mx.array, x: mx.array) -> mx.array:
    return gate * _sigmoid(gate) * x


@mx.compile
def _swiglu_gradient(gate: mx.array, x: mx.array, ahead: mx.array) -> tuple[mx.array, mx.array]:
    sigmoid = _sigmoid(gate)
    silu = gate * sigmoid
    return ahead * x * (sigmoid + silu * (1 - sigmoid)), ahead * silu


@swiglu.vjp
def _(primals: Any, ahead: mx.array, _: mx.array) -> tuple[mx.array, mx.array]:
    gate, x = primals
    return _swiglu_gradient(gate, x, ahead)


@mx.custom_function
def softmax(x: mx.array) -> mx.array:
    """Softmax over the last axis."""
    shares = exp_negative(x - mx.max(x, axis=-1, keepdims=True))
    return shares / shares.sum(axis=-1, keepdims=True)


@softmax.vjp
def _(_: mx.array, ahead: mx.array, shares: mx.array) -> mx.array:
    return shares * (ahead - (ahead * shares).sum(axis=-1, keepdims=True))


def attention(q: mx.array, k: mx.array, v: mx.array, *, scale: float, mask: mx.array | str | None = None) -> mx.array:
    """As `mx.fast.scaled_dot_product_attention`: q [B, H, L, d], k and v [B, K, M, d] -> [B, H, L, d].

    `mask`: "causal", bool (True: look) or added to the scores, broadcast to [B, H, L, M], or None.
    """
    B, H, L, _ = q.shape
    K, M = k.shape[1:3]
    q = (q * scale).reshape(B, K, H // K, L, -1)
    scores: mx.array = q @ mx.swapaxes(k[:, :, None], -1, -2)
    if isinstance(mask, str):
        mask = mx.tri(L, M, M - L, dtype=mx.bool_)
    elif mask is not None and mask.ndim == 4 and mask.shape[1] > 1:
        mask = mask.reshape(mask.shape[0], K, H // K, *mask.shape[2:])
    elif mask is not None and mask.ndim == 4:
        mask = mask[:, :, None]
    if mask is not None:
        scores = mx.where(mask, scores, -1e9) if mask.dtype == mx.bool_ else scores + mask
    return mx.matmul(softmax(scores), v[:, :, None]).reshape(B, H, L, -1)
