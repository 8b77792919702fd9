"""The time of matrix products alone, at given shapes, with the BLAS that MLX has here: no model is faster.

Used by encode.py and train_step.py.
"""

from __future__ import annotations

import time
from collections.abc import Callable

Product = tuple[int, int, tuple[int, int, int]]  # how often, in groups of, (rows, inner, columns)


def flops(products: list[Product], attention: bool = True) -> float:
    """Floating-point operations; without `attention`, of products with weights only, those that are not in groups."""
    counted = [product for product in products if attention or product[1] == 1]
    return sum(2.0 * n * groups * a * b * c for n, groups, (a, b, c) in counted)


def ceiling(products: list[Product], clock: Callable[[], float] = time.perf_counter) -> Callable[[], float]:
    """Seconds of all of them; each shape is timed once and multiplied."""
    import mlx.core as mx

    from mlx_llama3v.platform import default_dtype, device_name

    # A GPU is asked for several products at a time: waiting for one would take as long as it does. Attention, which is
    # one kernel there that never writes its scores, counts as if at the rate of all other products.
    gpu = device_name() != "cpu"
    times, fused = (8, flops(products) / flops(products, attention=False)) if gpu else (1, 1.0)
    operands = []
    for count, groups, (a, b, c) in products:
        if gpu and groups > 1:
            continue
        x, w = mx.random.normal((times, groups, a, b)), mx.random.normal((c, b))
        if groups > 1:
            w = mx.random.normal((groups, c, b))
        else:
            x = x[:, 0]
        x, w = x.astype(default_dtype()), w.astype(default_dtype())
        parts = [x[n] for n in range(times)]
        mx.eval(parts, w)
        operands.append((count, parts, w))

    def run() -> float:
        total = 0.0
        for count, parts, w in operands:
            start = clock()
            mx.eval([x @ mx.swapaxes(w, -1, -2) for x in parts])
            total += count / times * (clock() - start)
        return total * fused

    return run
