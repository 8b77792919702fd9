"""Linear layers, GELU and attention in the forms that suit the device: where the tower differs between machines.

MLX's CPU back end computes exp and tanh one element at a time (10-22 ns each on the machines measured), and those took
more than a third of the encoding time. But `mx.compile` makes one C++ loop of a chain of products and sums, which the
compiler vectorizes, and powers of a polynomial in place of exp and tanh cost a twentieth. Three things keep such a loop
fast, read in MLX's sources and seen in the machine code: it is at most eleven operations deep, and a constant that lies
deeper comes in as an array (three times as slow), so polynomials stand in Estrin's order and GELU is two loops;
`shapeless` makes every broadcast an operation, so it is left out; and nothing is broadcast within, since a loop over
strides is not vectorized once its result takes the place of its operand.

None of it is for Metal or CUDA. There transcendentals are hardware instructions and the loops are bound by memory, the
bias is added by the matrix product's own kernel, and the fused attention (head_dim 72 of so400m is among those that
MLX's kernels cover) never writes the [P, P] scores.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import mlx.core as mx

from mlx_llama3v.platform import device_name

_MASKED = -1e9
_SCORES = 1 << 20  # attended to at a time: 4 MB stay in the caches, and glibc hands them out again without the kernel


def affine(x: mx.array, weight: mx.array, bias: mx.array) -> mx.array:
    """x W^T + b: x [..., I], weight [O, I], bias [O] -> [..., O].

    On CPU addmm would write the bias all over the result first and read it again in the product (a fifth longer).
    """
    return x @ weight.T + bias if _on_cpu(x) else mx.addmm(bias, x, weight.T)


def gelu_tanh(x: mx.array) -> mx.array:
    """GELU in its tanh form, of any shape, within 1e-6 of `nn.gelu_approx`, which takes a power and a tanh an element.

    On a GPU x sigmoid(2 z), which is the same and cancels nothing.
    """
    form: Any = _gelu_powers if _on_cpu(x) else _gelu_sigmoid
    made: mx.array = form(x)
    return made


def attend(q: mx.array, k: mx.array, v: mx.array, heads: int, mask: mx.array | None = None) -> mx.array:
    """Attention of q [B, Q, D] over k and v [B, K, D] -> [B, Q, D]; `mask` [B, K] is True where a key may be read."""
    B, Q, D = q.shape
    q, k, v = (x.reshape(B, -1, heads, D // heads).transpose(0, 2, 1, 3) for x in (q, k, v))
    scale = (D // heads) ** -0.5
    if _on_cpu(q):
        x = _attend_in_parts(q * scale, k, v, mask)
    else:
        keys = None if mask is None else mask[:, None, None, :]
        x = mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=keys)
    return x.transpose(0, 2, 1, 3).reshape(B, Q, D)


def _attend_in_parts(q: mx.array, k: mx.array, v: mx.array, mask: mx.array | None) -> mx.array:
    """softmax(q k^T) v over [B, H, L, d], so many heads at a time that their scores stay in the caches.

    On the way back, too, where the scores are computed again: else all are kept, and the gradient of each part would be
    an array of the whole, so that 28 slices took nine times as long as 7.
    """
    shape, heads = q.shape, q.shape[1]
    q, k, v = (x.reshape(-1, *x.shape[2:]) for x in (q, k, v))
    keys = None if mask is None else mx.repeat(mask, heads, axis=0)[..., None]
    step = max(1, _SCORES // (q.shape[1] * k.shape[1]))
    places = [slice(n, n + step) for n in range(0, len(q), step)]
    if len(places) == 1:
        return _attend_heads(q, k, v, keys).reshape(shape)

    def heads_of(at: slice) -> Callable[[mx.array, mx.array, mx.array], mx.array]:
        return lambda q, k, v: _attend_heads(q, k, v, None if keys is None else keys[at])

    @mx.custom_function
    def attended(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        parts: list[mx.array] = []
        for at in places:
            # One after the other: MLX would compute all scores first, then all of their exponentials.
            queries = mx.depends([q[at]], [parts[-1]])[0] if parts else q[at]
            parts.append(heads_of(at)(queries, k[at], v[at]))
        return mx.concatenate(parts)

    @attended.vjp
    def back(primals: list[mx.array], cotangent: mx.array, output: mx.array) -> tuple[mx.array, ...]:
        parts: list[list[mx.array]] = []
        for at in places:
            start = mx.depends([cotangent[at]], parts[-1])[0] if parts else cotangent[at]
            parts.append(mx.vjp(heads_of(at), [x[at] for x in primals], [start])[1])
        return tuple(mx.concatenate(list(gradients)) for gradients in zip(*parts, strict=True))

    found: Any = attended(q, k, v)
    return found.reshape(shape)  # type: ignore[no-any-return]


def _attend_heads(q: mx.array, k: mx.array, v: mx.array, keys: mx.array | None) -> mx.array:
    """A column of scores a query: MLX's CPU reductions are vectorized down columns only (5 times as fast for max)."""
    scores = k @ q.swapaxes(-1, -2)
    if keys is not None:
        scores = mx.where(keys, scores, _MASKED)
    top = mx.stop_gradient(mx.max(scores, axis=-2, keepdims=True))  # any would do: it cancels
    weights: Any = _decay(top - scores)
    return (weights.swapaxes(-1, -2) @ v) / mx.sum(weights, axis=-2)[..., None]


def _on_cpu(x: mx.array) -> bool:
    return x.dtype == mx.float32 and device_name() == "cpu"


@mx.custom_function
def _decay(t: mx.array) -> mx.array:
    """e^-t for t >= 0, within 1e-6 (of the largest weight, which is 1), as 1 / (e^(t/8))^8.

    e^(t/8) by its Taylor series, which ends too early from t = 8 on; there the weight is below 4e-4 and the error is
    2.5e-7 at most, as everywhere.
    """
    return _decay_powers(t)


@_decay.vjp
def _decay_slope(t: mx.array, cotangent: mx.array, output: mx.array) -> mx.array:
    return -cotangent * output


@mx.compile
def _decay_powers(t: mx.array) -> mx.array:
    t = 0.125 * t
    square = t * t
    low, high = (1 + t) + square * (1 / 2 + t * (1 / 6)), 1 / 24 + t * (1 / 120) + square * (1 / 720)
    power = low + square * square * high
    for _ in range(3):
        power = power * power
    return 1 / power


@mx.custom_function
def _gelu_powers(x: mx.array) -> mx.array:
    """max(x, 0) - |x| / (1 + e^2|z|), which is x (1 + tanh z) / 2; where e^2|z| overflows, the second term is 0.

    Its own gradient would be 0 times infinity there.
    """
    return _gelu_end(x, _gelu_power(x))


@_gelu_powers.vjp
def _gelu_slope(x: mx.array, cotangent: mx.array, output: mx.array) -> mx.array:
    return mx.vjp(_gelu_sigmoid, [x], [cotangent])[1][0]


@mx.compile
def _gelu_power(x: mx.array) -> mx.array:
    """e^(|z|/4), by its Taylor series to the seventh power."""
    size = mx.abs(x)
    t = size * (0.19947114020071635 + 0.008919352034075031 * (size * size))
    square = t * t
    low, high = (1 + t) + square * (1 / 2 + t * (1 / 6)), 1 / 24 + t * (1 / 120) + square * (1 / 720 + t * (1 / 5040))
    return low + square * square * high


@mx.compile
def _gelu_end(x: mx.array, power: mx.array) -> mx.array:
    size = mx.abs(x)
    for _ in range(3):
        power = power * power
    return 0.5 * (x + size) - size / (1 + power)


@partial(mx.compile, shapeless=True)
def _gelu_sigmoid(x: mx.array) -> mx.array:
    return x * mx.sigmoid(x * (1.5957691216057308 + 0.07135481282 * x * x))
