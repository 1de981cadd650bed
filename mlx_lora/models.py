"""Load, quantize, tokenize, run: the one file that names mlx-lm's loading functions."""

import contextlib
import copy
import io
import json
import shutil
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_lora import cpu
from mlx_lora.errors import ModelError
from mlx_lora.types import Message, Prompt

DEMO = "demo"
DEMO_FOLDER = Path(__file__).parent / "assets" / "demo_model"
OFFLINE = "Without a network: `hf download {name} --local-dir DIR` where there is one; give DIR."
DEMO_QUANTIZATION = {"bits": 4, "group_size": 64, "mode": "affine"}
KEPT = (  # beginnings of what a model needs beside weights and config
    "tokenizer", "special_tokens", "added_tokens", "vocab", "merges", "chat_template",
    "generation_config.json",
)  # fmt: skip
CODE = (".py", ".model", ".tiktoken")  # and endings: its own classes, its tokenizer's tables


@dataclass(frozen=True)
class Loaded:
    """A model ready to run, and what is needed to say what it is."""

    model: nn.Module
    tokenizer: Any  # mlx-lm's TokenizerWrapper
    config: dict[str, Any]  # with the quantization in force
    name: str  # as the user wrote it
    folder: Path
    quantized_here: bool  # True: save the base beside the adapter, no other copy of it exists


def resolve(name: str) -> Path:
    """The folder of `demo`, of a local path, or of a hub id (downloaded on first use)."""
    if name == DEMO:
        return DEMO_FOLDER
    if (local := Path(name).expanduser()).exists():
        if not (local / "config.json").is_file():
            raise ModelError(
                f"{name} is no model folder: it has no config.json",
                "Give a folder with config.json, weights and a tokenizer, a hub id, or `demo`.",
            )
        return local
    if name.count("/") != 1 or name.startswith(("/", ".", "~")):
        raise ModelError(
            f"there is no model at {name}", "Give a model folder, a hub id (owner/name), or `demo`."
        )
    from mlx_lm.utils import _download

    try:
        with quiet():
            return Path(_download(name))
    except Exception as error:
        raise ModelError(
            f"{name} is neither a local folder nor could it be fetched: {error}",
            OFFLINE.format(name=name),
        ) from error


def load(
    name: str,
    *,
    quantize: Mapping[str, Any] | None = None,
    rebuild: Mapping[str, Any] | None = None,
    trust_remote_code: bool = False,
) -> Loaded:
    """Load a model, frozen. `quantize` = {bits, group_size, mode} applies to an unquantized one.

    One that is quantized already in another way is a ModelError. `rebuild` is how an adapter's base
    was quantized: it applies where the model is unquantized and nothing else is asked for.
    On a CPU everything is computed in float32: low precision there is both slow and wrong (a bf16
    quantized matmul is off by 3.6 %). Raises ModelError for anything that does not load.
    """
    from mlx_lm.utils import load_model, load_tokenizer

    cpu.settle()
    folder = resolve(name)
    asked = quantize
    quantize = quantize or rebuild or (DEMO_QUANTIZATION if name == DEMO else None)
    try:
        model, config = load_model(folder, trust_remote_code=trust_remote_code)
        tokenizer = load_tokenizer(folder, eos_token_ids=config.get("eos_token_id"))
    except Exception as error:
        raise ModelError(
            f"the model in {folder} does not load: {error}",
            "Are all its files complete? Try `python -m mlx_lm generate --model` on it.",
        ) from error
    refuse_ends(eos_ids(tokenizer), config, folder)
    if cpu.active():
        model.set_dtype(mx.float32)
    if asked:
        refuse_requantizing(asked, config, name)
    quantized_here = bool(quantize and quantize.get("bits")) and "quantization" not in config
    if quantized_here:
        model, config = quantized(model, config, **quantize)  # type: ignore[arg-type]
    model.freeze()
    model.eval()
    cpu.accelerate(model)
    mx.eval(model.parameters())
    return Loaded(model, tokenizer, config, name, folder, quantized_here)


def refuse_requantizing(asked: Mapping[str, Any], config: Mapping[str, Any], name: str) -> None:
    """ModelError where a model is quantized already, and not in the way that is asked for."""
    present = config.get("quantization")
    if present is None:
        return
    wanted = {**DEMO_QUANTIZATION, **{k: v for k, v in asked.items() if v is not None}}
    other = [k for k, v in wanted.items() if present.get(k, DEMO_QUANTIZATION[k]) != v]
    if other:
        said = ", ".join(f"{k} is {present.get(k)}, asked for {wanted[k]}" for k in other)
        raise ModelError(
            f"{name} is quantized already: {said}",
            "Leave quantization out, or give the unquantized model.",
        )


def refuse_ends(eos: Iterable[int], config: Mapping[str, Any], folder: Path) -> None:
    """ModelError where a text ends with a token that the model has no embedding for.

    Such an id reads and writes past the end of the table: MLX does not check it.
    """
    text: Mapping[str, Any] = config.get("text_config") or config
    size = text.get("vocab_size")
    beyond = sorted(i for i in eos if size is not None and i >= size)
    if beyond:
        raise ModelError(
            f"the model in {folder} ends texts with token {beyond[0]}, and has only {size} tokens",
            "Correct eos_token_id in config.json (and generation_config.json), or the tokenizer.",
        )


def lazy_layers(name: str) -> dict[str, Any]:
    """Linear layers by name of a model whose weights stay on disk until they are used."""
    from mlx_lm.utils import load_model

    folder = resolve(name)
    try:
        model, _ = load_model(folder, lazy=True)
    except Exception as error:
        raise ModelError(f"the model in {folder} does not load: {error}") from error
    return {n: m for n, m in model.named_modules() if "weight" in m}


def dense_weight(layer: Any, rows: Any = slice(None)) -> mx.array:
    """The weight [O, I] of a linear layer in float32, or some rows, unpacked where quantized."""
    part = layer.weight[rows]
    if "scales" not in layer:
        return part.astype(mx.float32)
    settings = {"group_size": layer.group_size, "bits": layer.bits, "mode": layer.mode}
    biases = layer.get("biases")
    packed = (layer.scales[rows], None if biases is None else biases[rows])
    return mx.dequantize(part, *packed, **settings).astype(mx.float32)


def in_dims(layer: Any) -> int:
    """Inputs I of a linear layer, or width of an embedding, packed or not."""
    width = layer.weight.shape[-1]
    return width * 32 // layer.bits if "scales" in layer else width


def quantized(
    model: nn.Module,
    config: dict[str, Any],
    *,
    bits: int,
    group_size: int = 64,
    mode: str = "affine",
) -> tuple[nn.Module, dict[str, Any]]:
    """The model with packed weights, and the config that says so. Raises when nothing packs."""
    from mlx_lm.utils import quantize_model

    try:
        with quiet():
            model, config = quantize_model(model, config, group_size, bits, mode=mode)
    except Exception as error:
        raise ModelError(
            f"cannot quantize to {bits} bits, groups of {group_size}: {error}"
        ) from error
    if not any("scales" in m for _, m in model.named_modules()):
        raise ModelError(
            f"no layer has a width that groups of {group_size} divide, nothing would be quantized",
            "Use group_size 32 or 64, or leave `quantize` out.",
        )
    return model, config


def save_base(loaded: Loaded, out: Path) -> None:
    """Write the base as a folder that stock mlx-lm loads with bitwise equal logits.

    An adapter that is attached stays out of it.
    """
    part = out.with_name(f".{out.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    save_model(base_weights(loaded.model), loaded.config, loaded.folder, part)
    part.rename(out)


def save_model(
    weights: dict[str, mx.array], config: Mapping[str, Any], source: Path, folder: Path
) -> None:
    """Weights and config as a model folder, with the tokenizer and the code of `source`."""
    from mlx_lm.utils import save_config

    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})
    save_config(dict(config), folder / "config.json")
    for file in sorted(source.iterdir()):
        if file.is_file() and (file.name.startswith(KEPT) or file.suffix in CODE):
            shutil.copy(file, folder / file.name)


def base_weights(model: nn.Module) -> dict[str, mx.array]:
    """Every weight of the base by the name it has without an adapter around it."""
    wrapped = {name for name, m in model.named_modules() if "lora_a" in m}
    found = {}
    for name, value in tree_flatten(model.parameters()):
        module, _, last = name.rpartition(".")
        if module in wrapped:
            continue  # the adapter's own
        place = unwrapped(module, wrapped)
        found[f"{place}.{last}" if place else last] = value
    return found


def unwrapped(module: str, wrapped: Container[str]) -> str:
    """The name that a module has without an adapter around it; `wrapped` are those with one."""
    outer, _, inner = module.rpartition(".")
    return outer if outer in wrapped and inner in ("linear", "embedding") else module


@contextlib.contextmanager
def quiet():
    """mlx-lm prints progress on stdout, which `--json` must keep clean."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield


@lru_cache(maxsize=8192)  # the template costs 1.5 ms, and the same prompts come again
def encode_prompt(tokenizer: Any, prompt: Prompt) -> tuple[int, ...]:
    """Token ids of a user turn or of a conversation, with the chat template where there is one.

    ModelError for a conversation that the tokenizer has no form for.
    """
    plain = isinstance(prompt, str)
    if getattr(tokenizer, "chat_template", None):
        turns: Sequence[Message] = (("user", prompt),) if isinstance(prompt, str) else prompt
        messages = [{"role": role, "content": content} for role, content in turns]
        try:
            ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True)
        except Exception as error:  # a template refuses in Jinja's words: roles, their order
            if plain:
                raise
            roles = ", ".join(role for role, _ in turns)
            raise ModelError(
                f"the model's chat template refuses messages of {roles}: {error}",
                "Leave `system` out, or put its text into the user's message.",
            ) from error
        return tuple(ids["input_ids"] if hasattr(ids, "keys") else ids)
    if isinstance(prompt, str):
        return tuple(tokenizer.encode(prompt))
    raise ModelError(
        "the tokenizer has no chat template, and a prompt has messages or a system prompt",
        "Give rows with `prompt` and leave `system` out, or use a model that was made for chat.",
    )


def eos_ids(tokenizer: Any) -> frozenset[int]:
    """Every token id that ends a text."""
    return frozenset(tokenizer.eos_token_ids)


def logits(model: nn.Module, ids_BT: mx.array) -> mx.array:
    """Logits [B, T, V] in float32 by one full forward, no cache."""
    return model(ids_BT).astype(mx.float32)


def vocabulary_size(model: nn.Module) -> int:
    """V of the logits, which may exceed the tokenizer's. Remembered on the model."""
    if "_vocabulary" not in model.__dict__:
        model.__dict__["_vocabulary"] = logits(model, mx.array([[0]])).shape[-1]
    return model.__dict__["_vocabulary"]


def pad_right(rows: Sequence[Sequence[int]], filler: int = 0) -> tuple[mx.array, mx.array]:
    """Rows of token ids as ids [B, T] and their mask [B, T] (1.0 on real tokens)."""
    width = max(map(len, rows))
    ids = mx.array([list(r) + [filler] * (width - len(r)) for r in rows])
    mask = mx.array([[1.0] * len(r) + [0.0] * (width - len(r)) for r in rows])
    return ids, mask


def read_json(path: Path) -> Any:
    """A JSON file as data."""
    return json.loads(path.read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Split:
    """A model as body and output head: only the positions that matter meet the vocabulary."""

    body: Any  # (ids [B, T], cache=None) -> hidden [B, T, D]
    head: Any  # hidden [..., D] -> logits [..., V]


def split_head(model: nn.Module) -> Split:
    """Body and head where head(body(x)) is exactly the model; else the whole model and nothing.

    The head is the model itself with its body's answer given, so that whatever scales or caps the
    logits is part of it. The split is tried on a few tokens and believed only if it agrees. The
    answer is remembered on the model.
    """
    if "_split" not in model.__dict__:
        found = (_try_split(model, path) for path in _bodies(model))
        whole = Split(model, lambda logits: logits)
        model.__dict__["_split"] = next((split for split in found if split), whole)
    return model.__dict__["_split"]


def _bodies(model: nn.Module) -> list[str]:
    """Paths of modules that may be all but the head: where embeddings are, and the usual names."""
    modules, kinds = dict(model.named_modules()), (nn.Embedding, nn.QuantizedEmbedding)
    owners = {name.rpartition(".")[0] for name, m in modules.items() if isinstance(m, kinds)}
    usual = [name for name in ("model", "language_model.model") if name in modules]
    return [*sorted(owners - {""}, key=lambda n: (n.count("."), n)), *usual]


def _try_split(model: nn.Module, path: str) -> Split | None:
    body: Any = model
    for name in path.split("."):
        body = getattr(body, name)
    probe = mx.array([[1, 2, 3]])
    head = _head_of(model, path)
    try:
        split, whole = head(body(probe, cache=new_cache(model))), model(probe)
        same = split.shape == whole.shape and mx.allclose(split, whole, rtol=1e-3, atol=1e-4).item()
    except Exception:  # any signature we do not know: the whole model is always right
        return None
    return Split(body, head) if same else None


class _Given:
    """Stands for a model's body, and answers with hidden states that are there already."""

    def __init__(self, body: Any, hidden_1ND: mx.array) -> None:
        self.body, self.hidden_1ND = body, hidden_1ND

    def __call__(self, *_: Any, **__: Any) -> mx.array:
        return self.hidden_1ND

    def __getattr__(self, name: str) -> Any:
        return getattr(self.body, name)


def _head_of(model: nn.Module, path: str) -> Any:
    """hidden [..., D] -> logits [..., V]: what the model does with what its body returned."""
    first, _, rest = path.partition(".")

    def given(module: Any, name: str, rest: str, hidden_1ND: mx.array) -> Any:
        shell = copy.copy(module)  # the module's own parts under it are shared
        inner = module[name]
        next_name, _, others = rest.partition(".")
        part = given(inner, next_name, others, hidden_1ND) if rest else _Given(inner, hidden_1ND)
        dict.__setitem__(shell, name, part)
        return shell

    def head(hidden: mx.array) -> mx.array:
        count = hidden.size // hidden.shape[-1]
        shell = given(model, first, rest, hidden.reshape(1, count, -1))
        logits = shell(mx.zeros((1, count), mx.int32))
        return logits.reshape(*hidden.shape[:-1], -1)

    return head


def new_cache(model: nn.Module) -> list[Any]:
    """An empty prompt cache of the kind the model wants."""
    from mlx_lm.models.cache import make_prompt_cache

    return make_prompt_cache(model)


def plain_cache(model: nn.Module) -> bool:
    """True where every layer keeps ordinary keys and values, which fork and pad freely."""
    from mlx_lm.models.cache import KVCache

    return all(type(c) is KVCache for c in new_cache(model))
