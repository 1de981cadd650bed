"""What an RL step will hold in memory, from config.json alone: no weights are read.

Sizes of parameters, adapter, optimizer and caches are exact: the model is built without evaluating
it, so that its arrays have shapes and no contents. What a step computes in between is a sum over
arrays of these shapes, with weights fitted to measured peaks of small models on each CPU path
(scripts/memory_plan.py fits them, and compares with what other shapes took); a GPU is taken for the
plain path. It is for the worst case, in which every completion is as long as it may be.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.tuner.lora import LoRALinear

from mlx_lora import cpu
from mlx_lora.adapter.attach import blocks, expand_keys, to_layers_of_ranks
from mlx_lora.adapter.spline_math import curve_parameters
from mlx_lora.blocks import Quantize
from mlx_lora.caches import GROWTH
from mlx_lora.cpu_attention import PROJECTIONS
from mlx_lora.cpu_block import GATED, STACKED_BYTES
from mlx_lora.cpu_layers import ACROSS_BYTES, MERGED_BYTES, merged_bytes
from mlx_lora.errors import ModelError
from mlx_lora.models import DEMO, DEMO_QUANTIZATION, in_dims, new_cache
from mlx_lora.optimizers import optimizer_of
from mlx_lora.rl.vocabulary import CHUNK_BYTES
from mlx_lora.schema import Stage

SHARE = 0.75  # of the machine's memory that a run may take; the rest is others'
ROOM = 256  # tokens that mlx-lm's own caches make room for at once
STACKED = {"self_attn": PROJECTIONS, "mlp": GATED}  # laid out anew for decoding on the fast path
PACKED = (nn.QuantizedLinear, nn.QuantizedEmbedding)
NAMES = {  # of sizes in config.json, by architecture
    "hidden": ("hidden_size", "n_embd", "d_model", "dim", "model_dim"),
    "heads": ("num_attention_heads", "n_head", "n_heads", "num_heads"),
    "kv_heads": ("num_key_value_heads", "n_kv_heads", "num_kv_heads"),
    "inner": ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size", "d_ff"),
    "vocabulary": ("vocab_size", "padded_vocab_size"),
}


@dataclass(frozen=True)
class Weights:
    """How many arrays of each size are there at once, fitted."""

    held: tuple[float, ...]  # of a block: hidden, inner, queries to values, scores, cache
    outside: float  # of hidden states, outside the blocks
    scoring: float  # of a chunk of logits, beside all that
    again: tuple[float, ...]  # of the one block that grad_checkpoint has at a time
    kept: tuple[float, float]  # of hidden states and of the cache, of each block, there
    scoring_again: float  # of a chunk of logits, there, beside 0.6 of what is kept
    decoding: tuple[float, ...]  # cache, the prompts' own, one layer's, logits, scores of prompts


FITTED = {
    "numpy": Weights(
        held=(0, 3.7, 4.4, 0.5, 3.0),
        outside=18.4,
        scoring=0.9,
        again=(0, 4.9, 5.2, 0, 15.1),
        kept=(6.5, 1.2),
        scoring_again=2.0,
        decoding=(0.91, 0.09, 1.62, 1.77, 3.09),
    ),
    "plain": Weights(
        held=(18.4, 11.1, 9.2, 2.2, 4.4),
        outside=14.7,
        scoring=2.9,
        again=(52.6, 18.6, 20.5, 1.6, 14.0),
        kept=(12.0, 0),
        scoring_again=3.0,
        decoding=(0.83, 0.37, 1.41, 3.27, 1.27),
    ),
}


def fitted() -> Weights:
    """Those of the path in use."""
    return FITTED["numpy" if cpu.fast() else "plain"]


def weighed(weights: Sequence[float], parts: Sequence[float]) -> float:
    return sum(w * part for w, part in zip(weights, parts, strict=True))


@dataclass(frozen=True)
class Sizes:
    """Widths of a model, per token, and bytes of a number."""

    layers: int
    hidden: int
    inner: int  # of all experts that a token meets
    heads: int
    attention: int  # of queries, keys and values together
    vocabulary: int
    number: int  # bytes


@dataclass(frozen=True)
class Cache:
    """Bytes of one row's cache."""

    per_token: tuple[tuple[int, float], ...]  # (bytes a token, tokens at most) of each layer
    fixed: int  # whatever the length
    plain: bool  # only keys and values: prompts are shared in learning

    def row(self, tokens: int) -> int:
        return self.fixed + int(sum(b * min(tokens, limit) for b, limit in self.per_token))


@dataclass(frozen=True)
class Foretold:
    """Bytes: what is always there, and the most that is there besides."""

    base: int
    copies: int  # dense ones, of the CPU's fast path
    adapter: int
    optimizer: int
    cache: int  # of all rows that decode together
    logits: int  # of these rows, float32
    rollout: int  # besides, while decoding: cache, logits and the rest
    learning: int  # besides, in scoring and its gradient
    evaluation: int  # besides, where held-out problems are decoded

    @property
    def peak(self) -> int:
        always, gradient = self.base + self.copies + self.adapter + self.optimizer, self.adapter
        return always + max(self.rollout, self.learning + gradient, self.evaluation)


def foretell(config: Mapping[str, Any], e: Stage, prompt: int) -> Foretold:
    """Memory of a run of RL with prompts of so many tokens, each completion at its longest.

    Raises ModelError where a model cannot be built from its config.
    """
    evolves = e.method == "es"
    e = alone(e, rollouts_of(e)) if evolves else e
    model = skeleton(config, e)
    kept, base, copies = cache_of(model), nbytes(model.parameters()), dense_copies(model)
    adapted(model, e)
    weights = model.trainable_parameters()
    optimizer = optimizer_of(e)
    optimizer.init(weights)
    sizes = sizes_of(config, model)
    decoding, w = decoding_arrays(sizes, kept, e, prompt), fitted()
    examined = decoding_arrays(sizes, kept, alone(e, e.eval.n), prompt)
    inside, logits = learning_arrays(sizes, kept, e, prompt)
    merged = merged_copies(model, sizes) if copies else 0
    learning = of_learning(sizes.layers, inside, logits, w, again=e.grad_checkpoint)
    return Foretold(
        base=base,
        copies=copies,
        adapter=nbytes(weights),
        optimizer=nbytes(optimizer.state),
        cache=int(decoding[0]),
        logits=int(decoding[3]),
        rollout=merged + int(weighed(w.decoding, decoding)) + evolves * noise_bytes(weights, e),
        learning=0 if evolves else learning,
        evaluation=merged + int(weighed(w.decoding, examined)),
    )


def rollouts_of(e: Stage) -> int:
    """Completions of a step."""
    if e.method == "es":
        return e.es.population * e.es.samples_per_generation
    return e.batch_size * e.grpo.group_size


def alone(e: Stage, rows: int) -> Stage:
    """The stage with so many completions at once, each with a prompt of its own."""
    grpo = e.grpo.model_copy(update={"group_size": 1})
    return e.model_copy(update={"batch_size": rows, "grpo": grpo})


def noise_bytes(weights: Any, e: Stage) -> int:
    """Of a population's directions, and of its members' own B."""
    b = sum(4 * x.size for name, x in tree_flatten(weights) if name.endswith("lora_b"))
    return b * (e.es.population + e.es.population // (2 if e.es.antithetic else 1))


def nbytes(tree: Any) -> int:
    return sum(x.nbytes for _, x in tree_flatten(tree) if isinstance(x, mx.array))


def rounded_up(count: int, to: int) -> int:
    return -(-count // to) * to


def inner_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The language model's part, where a config has several."""
    return {**config, **config.get("text_config", {})}


def skeleton(config: Mapping[str, Any], e: Stage) -> nn.Module:
    """The model packed as it will be, its arrays never evaluated."""
    from mlx_lm.utils import _get_classes

    try:
        kind, arguments = _get_classes(config=dict(config))
        model = kind(arguments.from_dict(dict(config)))
    except Exception as error:
        raise ModelError(f"no model can be built from its config.json: {error}") from error
    named = inner_config(config).get("torch_dtype") or inner_config(config).get("dtype")
    model.set_dtype(mx.float32 if cpu.active() else getattr(mx, str(named), mx.bfloat16))
    ours = e.quantize.model_dump() if e.quantize else DEMO_QUANTIZATION if e.model == DEMO else None
    asked = config.get("quantization") or ours
    if not asked:
        return model

    def packs(path: str, module: Any) -> bool | dict[str, Any]:
        group_size = asked["group_size"]
        fits = hasattr(module, "to_quantized") and module.weight.shape[-1] % group_size == 0
        return asked.get(path, fits) if fits else False

    wanted = {k: asked[k] for k in ("group_size", "bits", "mode") if k in asked}
    nn.quantize(model, **wanted, class_predicate=packs)
    return model


def adapted(model: nn.Module, e: Stage) -> None:
    """Give it the adapter's layers."""
    asked, depth = e.lora_parameters, len(blocks(model))
    model.freeze()
    parameters = {
        "rank": asked.rank,
        "scale": asked.effective_scale,
        "dropout": 0.0,
        "keys": expand_keys(model, asked.keys),
        **curve_parameters(asked.model_dump()),
    }
    count = e.num_layers if 0 < e.num_layers <= depth else depth
    pattern, dora = asked.rank_pattern, e.fine_tune_type == "dora"
    to_layers_of_ranks(model, count, parameters, pattern, dora=dora)


def cache_of(model: nn.Module) -> Cache:
    """What a row's cache takes, from the shapes that a forward of a few tokens would give."""
    from mlx_lm.models.cache import CacheList, KVCache, RotatingKVCache

    layers = new_cache(model)
    try:
        model(mx.zeros((1, 4), mx.int32), cache=layers)
    except Exception as error:
        raise ModelError(f"the sizes of its caches cannot be told here: {error}") from error
    whole = [c for x in layers for c in (x.caches if isinstance(x, CacheList) else (x,))]
    growing, fixed = [], 0
    for layer in whole:
        keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
        if isinstance(keys, mx.array) and isinstance(values, mx.array):
            limit = layer.max_size if isinstance(layer, RotatingKVCache) else math.inf
            growing.append(((keys.nbytes + values.nbytes) // keys.shape[2], limit))
        else:
            fixed += nbytes(vars(layer))
    plain = all(type(layer) is KVCache for layer in layers)
    return Cache(tuple(growing), fixed, plain)


def dense_copies(model: nn.Module) -> int:
    """Bytes that `cpu.accelerate` will add: none where they would be too large, or on a GPU."""
    if not cpu.fast():
        return 0
    named = dict(model.named_modules())
    separate = any(name.endswith("lm_head") for name in named)
    found = [m for m in named.values() if type(m) in PACKED]
    whole = [4 * m.weight.size * 32 // m.bits for m in found]
    if sum(whole) > cpu.MEMORY_SHARE * cpu.memory_bytes():
        return 0
    tables = [isinstance(m, nn.QuantizedEmbedding) and separate for m in found]
    return sum(size for size, unused in zip(whole, tables, strict=True) if not unused)


def sizes_of(config: Mapping[str, Any], model: nn.Module) -> Sizes:
    """Widths by the names that architectures give them."""
    text = inner_config(config)

    def size(name: str, default: int) -> int:
        values = (text.get(key) for key in NAMES[name])
        return next((v for v in values if isinstance(v, int)), default)

    hidden, heads = size("hidden", 1024), size("heads", 16)
    head = text.get("head_dim") or hidden // heads
    inner, met = size("inner", 4 * hidden), text.get("num_experts_per_tok") or 0
    if met:
        inner = met * (text.get("moe_intermediate_size") or inner)
    return Sizes(
        layers=len(blocks(model)),
        hidden=hidden,
        inner=inner,
        heads=heads,
        attention=(heads + 2 * size("kv_heads", heads)) * head,
        vocabulary=size("vocabulary", 32_000),
        number=4 if cpu.active() else 2,
    )


def merged_copies(model: nn.Module, sizes: Sizes) -> int:
    """Bytes of matrices that the CPU's fast path merges and lays out while rows decode."""
    found = merged_bytes([m for m in model.modules() if isinstance(m, LoRALinear)])
    parts = [m for block in blocks(model) for m in linears_in(block)]
    stacked = sum(4 * in_dims(m) * m.weight.shape[0] for m in parts)
    sought = found, stacked, 4 * sizes.vocabulary * sizes.hidden
    limits = MERGED_BYTES, STACKED_BYTES, ACROSS_BYTES
    return sum(size for size, limit in zip(sought, limits, strict=True) if size <= limit)


def linears_in(block: Any) -> list[Any]:
    """The frozen linear layers that decoding lays out anew."""
    found = [block[p][n] for p in STACKED if p in block for n in STACKED[p] if n in block[p]]
    return [getattr(layer, "linear", layer) for layer in found]


def decoding_arrays(sizes: Sizes, kept: Cache, e: Stage, prompt: int) -> tuple[float, ...]:
    """Bytes of the arrays that decoding is made of, in the order of Weights.decoding."""
    rows = min(e.rollout.width, e.batch_size * e.grpo.group_size)
    prompts = -(-rows // e.grpo.group_size)
    cache = rows * kept.row(prompt + rounded_up(e.rollout.max_tokens, GROWTH))
    own = prompts * kept.row(rounded_up(prompt, ROOM))
    scores = sizes.heads * prompts * prompt**2 * sizes.number
    return cache, own, cache / sizes.layers, rows * sizes.vocabulary * 4, scores


def learning_arrays(
    sizes: Sizes, kept: Cache, e: Stage, prompt: int
) -> tuple[tuple[float, ...], int]:
    """Bytes of the arrays of a block, in the order of Weights.held, and of a chunk of logits."""
    share = e.grpo.minibatches * e.grad_accumulation_steps
    rows, length = -(-e.batch_size * e.grpo.group_size // share), e.rollout.max_tokens
    prompts = min(rows, e.batch_size)
    if kept.plain:
        tokens = prompts * prompt + rows * (length - 1)
        scores = prompts * prompt**2 + rows * (length - 1) * (prompt + length - 1)
    else:
        tokens, scores = rows * (prompt + length), rows * (prompt + length) ** 2
    widths = (sizes.hidden, sizes.inner, sizes.attention)
    cached = rows * kept.row(prompt + length) / sizes.layers
    chunk = CHUNK_BYTES["cpu" if cpu.active() else "gpu"]
    n = sizes.number
    inside = (*(tokens * width * n for width in widths), sizes.heads * scores * n, cached)
    return inside, min(rows * length * sizes.vocabulary * 4, chunk)


def of_learning(
    layers: int, inside: tuple[float, ...], logits: int, w: Weights, *, again: bool
) -> int:
    """Bytes besides the weights in scoring and its gradient, of one micro-batch."""
    if not again:
        return int(layers * weighed(w.held, inside) + w.outside * inside[0] + w.scoring * logits)
    between = layers * weighed(w.kept, (inside[0], inside[4]))
    return int(max(between + weighed(w.again, inside), 0.6 * between + w.scoring_again * logits))


def memory_of_machine() -> int:
    """Bytes that MLX may use."""
    if cpu.active():
        return cpu.memory_bytes()
    return int(mx.device_info().get("max_recommended_working_set_size", cpu.memory_bytes()))


def told(config: Mapping[str, Any], e: Stage, prompt: int) -> dict[str, Any]:
    """What `train --dry-run` says of it: MB by part, whether they fit, and what would help."""
    found, machine = foretell(config, e, prompt), memory_of_machine()
    parts = {f"memory_{name}_mb": round(size / 1e6, 1) for name, size in asdict(found).items()}
    fits = found.peak <= SHARE * machine
    return {
        **parts,
        "memory_peak_mb": round(found.peak / 1e6, 1),
        "memory_machine_mb": round(machine / 1e6),
        "memory_fits": fits,
        "memory_advice": [] if fits else advice(config, e, prompt),
    }


def advice(config: Mapping[str, Any], e: Stage, prompt: int) -> list[str]:
    """Changes that make the peak smaller, with the peak that each leads to alone."""
    rows, now = rollouts_of(e), foretell(config, e, prompt).peak
    width = min(e.rollout.width, rows) // 2
    halved = e.es.model_copy(update={"population": e.es.population // 4 * 2})
    tries = {
        f"es.population: {halved.population}": {"es": halved},
        "grad_checkpoint: true": {"grad_checkpoint": True},
        f"grad_accumulation_steps: {e.grad_accumulation_steps * 4}": {
            "grad_accumulation_steps": e.grad_accumulation_steps * 4
        },
        f"rollout.width: {width}": {"rollout": e.rollout.model_copy(update={"width": width})},
        "quantize: {bits: 4}": {"quantize": Quantize()},
        "optimizer: sgd": {"optimizer": "sgd"},
    }
    found = []
    for key, changed in tries.items():
        peak = foretell(config, e.model_copy(update=changed), prompt).peak if width else now
        if peak < 0.95 * now:
            found.append(f"{key} would take {peak / 1e6:,.0f} MB")
    return found or ["a smaller model, fewer or shorter completions, or fewer num_layers"]
