"""Functions over a vocabulary, in float32, by the quickest way the device has."""

from typing import cast

import mlx.core as mx

from mlx_lora import cpu


def log_softmax(logits: mx.array) -> mx.array:
    """Log-probabilities over the last axis. Differentiable.

    >>> log_softmax(mx.array([[0.0, 0.0]])).exp().tolist()
    [[0.5, 0.5]]
    """
    if cpu.fast():
        from mlx_lora import cpu_layers

        return cast(mx.array, cpu_layers.log_softmax(logits))
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


def exp(x: mx.array) -> mx.array:
    """Element-wise exponential. Without gradient."""
    if cpu.fast():
        from mlx_lora import cpu_layers

        return cpu_layers.exp(x)
    return mx.exp(mx.stop_gradient(x))


def entropy(logps: mx.array) -> mx.array:
    """Entropy in nats over the last axis of log-probabilities. Without gradient.

    >>> round(entropy(mx.log(mx.array([0.5, 0.5]))).item(), 4)
    0.6931
    """
    still = mx.stop_gradient(logps)
    return -(exp(still) * still).sum(axis=-1)
