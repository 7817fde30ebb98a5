"""The optimizers as their papers write them, in float64: what every step is compared with."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import numpy as np

Array = np.ndarray
Rule = Callable[[Array, Iterable[Array]], Array]


def adam(lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, max_unorm=0.0, bias_correction=True, coupled=False):
    """arXiv 1412.6980 algorithm 1; the decay of arXiv 1711.05101 algorithm 2, line 12."""

    def run(x: Array, gradients: Iterable[Array]) -> Array:
        m = v = np.zeros_like(x)
        for t, g in enumerate(gradients, 1):
            g = g + weight_decay * x if coupled else g
            m = betas[0] * m + (1 - betas[0]) * g
            v = betas[1] * v + (1 - betas[1]) * g * g
            c1, c2 = (1 - betas[0] ** t, 1 - betas[1] ** t) if bias_correction else (1, 1)
            update = (m / c1) / (np.sqrt(v / c2) + eps)
            x = x - lr * (0 if coupled else weight_decay) * x - lr * limited(update, x, max_unorm)
        return x

    return run


def lamb(max_unorm=1.0, adam_w_mode=True, **kwargs):
    """arXiv 1904.00962 algorithm 2, its ratio as a limit."""
    return adam(max_unorm=max_unorm, coupled=not adam_w_mode, **kwargs)


def lion(lr=1e-4, betas=(0.9, 0.99), weight_decay=0.0):
    """arXiv 2302.06675 program 1."""

    def run(x: Array, gradients: Iterable[Array]) -> Array:
        m = np.zeros_like(x)
        for g in gradients:
            update = np.sign(betas[0] * m + (1 - betas[0]) * g)
            m = betas[1] * m + (1 - betas[1]) * g
            x = x - lr * (update + weight_decay * x)
        return x

    return run


def sgd(lr, momentum, dampening=0.0, weight_decay=0.0, nesterov=False, max_unorm=0.0):
    """``torch.optim.SGD``'s documented algorithm."""

    def run(x: Array, gradients: Iterable[Array]) -> Array:
        b = None
        for g in gradients:
            g = g + weight_decay * x
            b = g if b is None else momentum * b + (1 - dampening) * g
            update = g + momentum * b if nesterov else b
            x = x - lr * limited(update, x, max_unorm)
        return x

    return run


def lars(lr, momentum, max_unorm=0.02, **kwargs):
    """arXiv 1708.03888, its ratio as a limit."""
    return sgd(lr, momentum, max_unorm=max_unorm, **kwargs)


def rmsprop(lr=1e-2, alpha=0.99, eps=1e-8, weight_decay=0.0):
    """Lecture 6.5 of *Neural Networks for Machine Learning*."""

    def run(x: Array, gradients: Iterable[Array]) -> Array:
        v = np.zeros_like(x)
        for g in gradients:
            g = g + weight_decay * x
            v = alpha * v + (1 - alpha) * g * g
            x = x - lr * g / (np.sqrt(v) + eps)
        return x

    return run


def adagrad(lr=1e-2, lr_decay=0.0, weight_decay=0.0, initial_accumulator_value=0.0, eps=1e-10):
    """JMLR 12 (2011), figure 1, diagonal."""

    def run(x: Array, gradients: Iterable[Array]) -> Array:
        v = np.full_like(x, initial_accumulator_value)
        for t, g in enumerate(gradients, 1):
            g = g + weight_decay * x
            v = v + g * g
            x = x - lr / (1 + (t - 1) * lr_decay) * g / (np.sqrt(v) + eps)
        return x

    return run


def ademamix(lr=1e-3, betas=(0.9, 0.999, 0.9999), alpha=5.0, t_alpha=None, t_beta3=None, eps=1e-8, weight_decay=1e-2):
    """arXiv 2409.03137 algorithm 1, schedules of its equations for alpha and beta3."""

    def run(x: Array, gradients: Iterable[Array]) -> Array:
        fast = slow = v = np.zeros_like(x)
        b1, b2, b3 = betas
        for t, g in enumerate(gradients, 1):
            a_t = min(t * alpha / t_alpha, alpha) if t_alpha else alpha
            b3_t = b3
            if t_beta3:
                below = (1 - t / t_beta3) * math.log(b3) + t / t_beta3 * math.log(b1)
                b3_t = min(math.exp(math.log(b1) * math.log(b3) / below), b3)
            fast = b1 * fast + (1 - b1) * g
            slow = b3_t * slow + (1 - b3_t) * g
            v = b2 * v + (1 - b2) * g * g
            update = (fast / (1 - b1**t) + a_t * slow) / (np.sqrt(v / (1 - b2**t)) + eps)
            x = x - lr * (update + weight_decay * x)
        return x

    return run


def limited(update: Array, x: Array, max_unorm: float) -> Array:
    """The update, scaled down where its norm exceeds ``max_unorm`` times that of ``x``."""
    limit, norm = max_unorm * np.linalg.norm(x), np.linalg.norm(update)
    return update * (limit / norm) if 0 < limit < norm else update
