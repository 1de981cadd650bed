"""Functions over a vocabulary, in float32, by the quickest way the device has."""

from typing import cast

import mlx.core as mx

from mlx_lora import cpu

BELOW = 1 - 1e-6  # of a distribution function's last value: the highest aim


def log_softmax(logits: mx.array) -> mx.array:
    """Log-probabilities over the last axis. Differentiable.

    >>> log_softmax(mx.array([[0.0, 0.0]])).exp().tolist()
    [[0.5, 0.5]]
    """
    if cpu.fast():
        from mlx_lora import cpu_layers

        return cast(mx.array, cpu_layers.log_softmax(logits))
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


def target_logps(logits_BSV: mx.array, targets_BS: mx.array) -> mx.array:
    """Log-probabilities [B, S] of the targets. Differentiable; nothing else is as large as logits.

    >>> target_logps(mx.zeros((1, 1, 2)), mx.array([[1]])).exp().tolist()
    [[0.5]]
    """
    at_BS1 = mx.stop_gradient(targets_BS)[..., None]  # a checkpoint asks for all gradients
    if cpu.fast():
        return mx.take_along_axis(log_softmax(logits_BSV), at_BS1, axis=-1)[..., 0]
    chosen_BS = mx.take_along_axis(logits_BSV, at_BS1, axis=-1)[..., 0]
    return chosen_BS - mx.logsumexp(logits_BSV, axis=-1)


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


def drawn(logits_BV: mx.array, uniform_B: mx.array) -> tuple[mx.array, mx.array]:
    """Ids [B] drawn by the inverse of the distribution function, and their log-probabilities [B].

    The last value of that function is 1 up to rounding; the aim stays below it, so that it never
    lands on an impossible token.

    >>> [x.tolist() for x in drawn(mx.log(mx.array([[0.5, 0.5]])), mx.array([0.75]))][0]
    [1]
    """
    if cpu.fast():
        from mlx_lora import cpu_layers

        return cpu_layers.drawn(logits_BV, uniform_B)
    logps_BV = log_softmax(logits_BV)
    cdf_BV = mx.cumsum(mx.exp(logps_BV), axis=-1)
    ids_B = mx.sum(cdf_BV <= uniform_B[:, None] * cdf_BV[:, -1:] * BELOW, axis=-1)
    return ids_B, mx.take_along_axis(logps_BV, ids_B[:, None], axis=-1)[:, 0]


def token_scores(logits_NV: mx.array, targets_N: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    """Log-probabilities [N] of the targets, entropies [N] in nats, and d logp / d logits [N, V].

    One exponential serves all three. Without gradient.

    >>> logps_N, entropy_N, slopes_NV = token_scores(mx.zeros((1, 2)), mx.array([1]))
    >>> round(logps_N.item(), 4), round(entropy_N.item(), 4), slopes_NV.tolist()
    (-0.6931, 0.6931, [[-0.5, 0.5]])
    """
    if cpu.fast():
        from mlx_lora import cpu_layers

        return cpu_layers.token_scores(logits_NV, targets_N)
    still_NV, at_N1 = mx.stop_gradient(logits_NV), targets_N[:, None]
    total_N = mx.logsumexp(still_NV, axis=-1)
    p_NV = mx.softmax(still_NV, axis=-1)
    logps_N = mx.take_along_axis(still_NV, at_N1, axis=-1)[:, 0] - total_N
    mean_N = (p_NV[:, None, :] @ still_NV[:, :, None])[:, 0, 0]
    slopes_NV = mx.put_along_axis(-p_NV, at_N1, 1 - mx.exp(logps_N)[:, None], axis=-1)
    return logps_N, total_N - mean_N, slopes_NV
