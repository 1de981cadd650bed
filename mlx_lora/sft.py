"""Supervised fine-tuning: cross-entropy on texts. Also the warm start of RL. No trainer class.

Loss, order of the rows and meaning of the keys are mlx-lm's unless the `sft` block asks for more:
docs/sft.md. Left out on purpose: training without an adapter.
"""

import contextlib
import hashlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten, tree_map, tree_map_with_path

from mlx_lora import cpu, distributed
from mlx_lora.adapter.attach import blocks, lora_layers
from mlx_lora.adapter.schedules import (
    scale_as_array,
    scale_at,
    scale_of,
    schedules,
    set_scale,
)
from mlx_lora.adapter.spline import keep_up
from mlx_lora.batches import Row, batches, pack, pack_rows
from mlx_lora.cpu_head import layer_of
from mlx_lora.data import Text
from mlx_lora.models import Loaded, split_head, vocabulary_size
from mlx_lora.numerics import target_logps
from mlx_lora.optimizers import Metrics, Patience, copied, learning_rate, overwrite
from mlx_lora.packing import apart
from mlx_lora.recompute import recomputed, recomputing
from mlx_lora.rl.learner import gradient_health, module_norms
from mlx_lora.rl.learner import step as optimizer_step
from mlx_lora.rl.logprobs import learns_outside_blocks
from mlx_lora.rl.losses import masked_mean
from mlx_lora.rl.vocabulary import rows_of_a_chunk, score_tokens
from mlx_lora.runlog import Clock
from mlx_lora.schema import Stage

SUM = "accumulated"  # where the optimizer's state keeps the gradients of batches that did not move
NO_LIMIT = float("inf")
Norms = dict[str, float]  # of the gradient, by module


def train(
    loaded: Loaded,
    texts: Sequence[Text],
    experiment: Stage,
    optimizer: optim.Optimizer,
    clock: Clock,
    report: Callable[[int, Metrics], None],
    *,
    valid: Sequence[Text] = (),
    start: int = 0,
    history: Sequence[Metrics] = (),
    report_norms: Callable[[int, Norms], None] = lambda step, norms: None,
) -> Iterator[int]:
    """Run the steps from `start` to `iters`, one at each `next`, yielding the step just done.

    A step is a batch; every `grad_accumulation_steps`-th moves the weights, by the mean of their
    gradients. `report` gets its metrics. Everything random is a function of (seed, step); the scale
    schedule looks at the metrics of the step before. `history` holds those before `start`.
    """
    model, e = loaded.model, experiment
    valid = valid if e.val_batches else ()
    begin(model, optimizer, e)
    rows = itertools.islice(batches(texts, e, len(valid)), start, None)
    return steps(model, rows, e, optimizer, clock, report, valid, start, history, report_norms)


def begin(model: nn.Module, optimizer: optim.Optimizer, e: Stage) -> None:
    """Make room in the optimizer's state for all that it will hold; what is there stays."""
    optimizer.init(model.trainable_parameters())
    if e.grad_accumulation_steps > 1:
        known = dict(tree_flatten(optimizer.state.get(SUM, {})))  # of a resumed run
        optimizer.state[SUM] = tree_map_with_path(
            lambda name, x: known.get(name, mx.zeros_like(x)), model.trainable_parameters()
        )


def steps(
    model: nn.Module,
    rows: Iterator[list[Row]],
    e: Stage,
    optimizer: optim.Optimizer,
    clock: Clock,
    report: Callable[[int, Metrics], None],
    valid: Sequence[Text],
    start: int,
    history: Sequence[Metrics],
    report_norms: Callable[[int, Norms], None],
) -> Iterator[int]:
    """What `train` returns."""
    schedule = e.scale_schedule and schedules.bind(e.scale_schedule.name, e.scale_schedule.options)
    patience, before = Patience(e, history), history[-1] if history else None
    parts = e.grad_accumulation_steps
    metrics: Metrics = {}
    with scale_as_array(model):
        learn, move = compiled_parts(model, optimizer, e)
        if valid and start == 0:
            with clock.measure("validate"):
                metrics["valid_loss_before"] = mean_over(model, valid, e, e.val_batches)[0]
        for step in range(start, e.iters):
            optimizer.learning_rate = learning_rate(e, step // parts)
            if schedule:
                configured = e.lora_parameters.effective_scale
                set_scale(model, scale_at(schedule, configured, e.iters, step, before))
            moves = (step + 1) % parts == 0
            looks = moves and (step + 1) // parts % e.monitor.every == 0
            with clock.measure("learn", kind="step"), in_training(model):
                read = next(rows)
                mx.random.seed(dropout_seed(e.seed, step, distributed.rank()))
                loss, tokens, grads = shared(model, learn, read, e)
                norm, grads = move(grads, moves)
                mx.eval(model.trainable_parameters(), optimizer.state, norm, grads)
                moved = grads if looks else {}
                del grads
            metrics |= {"loss": loss, "tokens_trained": tokens}
            metrics |= {"learning_rate": float(optimizer.learning_rate), "scale": scale_of(model)}
            if moves:
                taken = float(np.isfinite(float(norm)))
                metrics |= {"grad_norm": float(norm), "update_taken": taken}
            if looks:
                norms = module_norms(moved)
                report_norms(step, norms)
                metrics |= gradient_health(norms)
            if valid and ((step + 1) % e.steps_per_eval == 0 or step + 1 == e.iters):
                with clock.measure("validate"):
                    metrics["valid_loss"] = mean_over(model, valid, e, e.val_batches)[0]
            texts = (text.ids for row in read for text in row)
            keep_up(model, texts, e.lora_parameters.calibrate, step + 1)
            report(step, metrics)
            patience.saw(step, metrics)
            before, metrics = metrics, {}
            yield step


def shared(
    model: nn.Module, learn: Callable[..., tuple[mx.array, Any]], rows: Sequence[Row], e: Stage
) -> tuple[float, int, Any]:
    """Loss, tokens and gradients of a batch: of this machine's rows, and of the others'."""
    own = distributed.mine(rows)
    loss, tokens, grads = mx.array(0.0), 0.0, tree_map(mx.zeros_like, model.trainable_parameters())
    if own:
        batch = as_arrays(own, e)
        loss, grads = learn(*batch)
        evaluate(grads)
        tokens = float(batch[3].sum())
    if distributed.size() > 1:
        counts = distributed.everybody(tokens)
        share = tokens / max(sum(counts), 1.0)
        said = tree_map(lambda x: share * x, {"loss": loss, "grads": grads})
        said = distributed.summed(said)
        loss, grads, tokens = said["loss"], said["grads"], sum(counts)
    return float(loss), int(tokens), grads


def as_arrays(rows: Sequence[Row], e: Stage) -> tuple[mx.array, ...]:
    if e.sft.packing:
        return pack_rows(rows)
    return pack([text for row in rows for text in row], limit=e.padding_limit)


def compiled_parts(
    model: nn.Module, optimizer: optim.Optimizer, e: Stage
) -> tuple[Callable[..., tuple[mx.array, Any]], Callable[..., tuple[mx.array, Any]]]:
    """A batch -> its loss and gradients; (these, do they move) -> their norm and what moved.

    What does not move the weights is added to what came before it.
    """
    split_head(model)  # tried on real numbers, which tracing has none of
    vocabulary_size(model)
    optimizer.init(model.trainable_parameters())
    state: list[Any] = [model.state, optimizer.state, mx.random.state, *remembered(model)]
    limit, parts = e.sft.max_grad_norm or NO_LIMIT, e.grad_accumulation_steps
    ratio = e.lora_parameters.lora_plus_ratio

    @partial(mx.compile, inputs=state, outputs=state)
    def learn(*batch: mx.array) -> tuple[mx.array, Any]:
        with recomputing(blocks(model), on=e.grad_checkpoint, at_once=cpu.active()):
            return nn.value_and_grad(model, mean_loss)(model, *batch)

    @partial(mx.compile, inputs=state, outputs=state)
    def move(grads: Any, moves: bool) -> tuple[mx.array, Any]:
        if parts > 1:
            grads = tree_map(mx.add, grads, optimizer.state[SUM])
        if not moves:
            overwrite(optimizer.state[SUM], grads)
            return mx.array(0.0), {}
        if parts > 1:
            grads = tree_map(lambda g: g / parts, grads)
        norm = step_if_finite(model, optimizer, grads, limit, ratio)
        if parts > 1:
            overwrite(optimizer.state[SUM], tree_map(mx.zeros_like, grads))
        return norm, grads

    return learn, move


def evaluate(grads: Any) -> None:
    """On a CPU from the last layer to the first, one by one: what each kept is let go in between.

    A GPU computes a step as one piece.
    """
    _, arrays = zip(*tree_flatten(grads), strict=True)
    for part in reversed(arrays) if cpu.active() else [arrays]:
        mx.eval(part)


def remembered(model: nn.Module) -> list[dict[str, mx.array]]:
    """The starts that weight decay pulls to, which may be the arrays that training begins with.

    Handed to the compiled step, because it may not hold one of its inputs as a constant.
    """
    kept = (vars(layer).get("_start") for layer in lora_layers(model).values())
    return [start for start in kept if start]


def step_if_finite(
    model: nn.Module, optimizer: optim.Optimizer, grads: Any, max_norm: float, lora_plus: float
) -> mx.array:
    """Clip and update; where the gradient is not finite all stays as it was. Returns its norm.

    Looks at no value, so that it can be compiled.
    """
    clipped, norm = optim.clip_grad_norm(grads, max_norm)
    weights, state = copied(model.trainable_parameters()), copied(optimizer.state)
    optimizer_step(model, optimizer, clipped, lora_plus)
    good = mx.isfinite(norm)

    def chosen(after: mx.array, before: mx.array) -> mx.array:
        return mx.where(good, after, before)

    model.update(tree_map(chosen, model.trainable_parameters(), weights))
    overwrite(optimizer.state, tree_map(chosen, optimizer.state, state))
    return norm


def mean_loss(
    model: nn.Module,
    ids_BT: mx.array,
    at_BS: mx.array,
    targets_BS: mx.array,
    mask_BS: mx.array,
    segments_BT: mx.array | None = None,
) -> mx.array:
    """Mean cross-entropy in nats over the tokens that count; only they meet the vocabulary."""
    split = split_head(model)
    more = {} if segments_BT is None else {"cache": apart(model, segments_BT)}
    hidden_BTD, (rows, width) = split.body(ids_BT, **more), ids_BT.shape
    places_BS = at_BS + width * mx.arange(rows)[:, None]
    hidden_BSD = hidden_BTD.reshape(rows * width, -1)[places_BS]
    chunked = at_BS.size > rows_of_a_chunk(vocabulary_size(model)) and split.body is not model
    scored = in_chunks if chunked else at_once
    return -masked_mean(scored(model, split.head, hidden_BSD, targets_BS), mask_BS)


def at_once(model: nn.Module, head: Any, hidden_BSD: mx.array, targets_BS: mx.array) -> mx.array:
    """Log-probabilities [B, S] of the targets, in nats."""
    return target_logps(head(hidden_BSD).astype(mx.float32), targets_BS)


def in_chunks(model: nn.Module, head: Any, hidden_BSD: mx.array, targets_BS: mx.array) -> mx.array:
    """The same, with the logits of a few tokens in memory at a time."""
    size = vocabulary_size(model)
    hidden_ND, targets_N = hidden_BSD.reshape(-1, hidden_BSD.shape[-1]), targets_BS.reshape(-1)
    if cpu.active() and not learns_outside_blocks(model):
        layer = layer_of(model)
        logps_N, _ = score_tokens(head, hidden_ND, targets_N, 1.0, size, layer=layer)
        return logps_N.reshape(targets_BS.shape)

    def scored(hidden_ND: mx.array, targets_N: mx.array) -> mx.array:
        return at_once(model, head, hidden_ND, targets_N)

    rows, found = rows_of_a_chunk(size), []
    for begin in range(0, len(targets_N), rows):
        part = slice(begin, begin + rows)
        chunk = hidden_ND[part], targets_N[part]
        found.append(recomputed(model, scored, *chunk, at_once=cpu.active()))
    return mx.concatenate(found).reshape(targets_BS.shape)


def mean_over(model: nn.Module, texts: Sequence[Text], e: Stage, batches: int) -> tuple[float, int]:
    """Mean cross-entropy per token of the first so many batches in nats, and the tokens.

    -1: of all texts. Each of several machines reads its part.
    """
    count = len(texts) if batches == -1 else batches * e.batch_size
    found = [(0.0, 0.0)]
    for begin in distributed.mine(range(0, min(count, len(texts)), e.batch_size)):
        batch = pack(texts[begin : min(begin + e.batch_size, count)], limit=e.padding_limit)
        counted = float(batch[3].sum())
        found.append((float(mean_loss(model, *batch)) * counted, counted))
    said = distributed.everybody([sum(column) for column in zip(*found, strict=True)])
    total, tokens = (sum(column) for column in zip(*said, strict=True))
    return total / max(tokens, 1.0), int(tokens)


@contextlib.contextmanager
def in_training(model: nn.Module) -> Iterator[None]:
    """Inside, dropout is on. Outside it is off: whoever looks at the model sees it whole."""
    model.train()
    try:
        yield
    finally:
        model.eval()


def dropout_seed(seed: int, step: int, rank: int = 0) -> int:
    """What MLX's global stream, which dropout reads, is seeded with before a step."""
    place = f"sft/{seed}/{step}" + f"/{rank}" * (rank > 0)
    digest = hashlib.blake2s(place.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big")
