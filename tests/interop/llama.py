"""llama.cpp through whichever of its Python packages is installed: greedy tokens of token ids."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tests.interop.gguf_base import END

CONTEXT = 256
Spoken = tuple[int, float]  # a token and its log-probability


def greedy(
    base: Path, prompts: Sequence[Sequence[int]], count: int, adapter: Path | None, strength: float
) -> list[list[Spoken]]:
    """`count` greedy tokens after each prompt, all in float32, the KV cache too."""
    return BACKENDS[backend()](base, prompts, count, adapter, strength)


def backend() -> str | None:
    return next((name for name in BACKENDS if importlib.util.find_spec(name)), None)


def likeliest(logits_V: np.ndarray) -> Spoken:
    """The likeliest token but the end, and its log-probability among all."""
    logits = np.array(logits_V, np.float64)
    total = logits.max() + np.log(np.exp(logits - logits.max()).sum())
    logits[END] = -np.inf
    token = int(logits.argmax())
    return token, float(logits[token] - total)


def with_llama_cpp(base, prompts, count, adapter, strength) -> list[list[Spoken]]:
    from llama_cpp import GGML_TYPE_F32, Llama

    lora = {"lora_path": str(adapter), "lora_scale": strength} if adapter else {}
    kv = {"type_k": GGML_TYPE_F32, "type_v": GGML_TYPE_F32}
    common = {"n_ctx": CONTEXT, "n_gpu_layers": 0, "n_threads": 1, "verbose": False}
    model = Llama(str(base), logits_all=True, **common, **kv, **lora)

    def continued(prompt: Sequence[int]) -> list[Spoken]:
        found: list[Spoken] = []
        model.reset()
        model.eval(list(prompt))
        while len(found) < count:
            found.append(likeliest(model.scores[model.n_tokens - 1]))
            model.eval([found[-1][0]])
        return found

    return [continued(prompt) for prompt in prompts]


def with_xllamacpp(base, prompts, count, adapter, strength) -> list[list[Spoken]]:
    import xllamacpp as x

    about: Any = x.CommonParams()
    about.model.path = str(base)
    about.n_ctx, about.n_parallel, about.n_gpu_layers = CONTEXT, 1, 0
    about.cache_type_k = about.cache_type_v = x.ggml_type.GGML_TYPE_F32
    about.flash_attn_type = x.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    about.warmup, about.verbosity = False, -1
    about.cpuparams.n_threads = about.cpuparams_batch.n_threads = 1
    if adapter:
        about.lora_adapters = [x.CommonAdapterLoraInfo(str(adapter), strength)]
    server = x.Server(about)

    def continued(prompt: Sequence[int]) -> list[Spoken]:
        asked = {"prompt": list(prompt), "n_predict": count, "temperature": 0, "top_k": 1}
        asked |= {"logprobs": 1, "cache_prompt": False, "ignore_eos": True, "stream": False}
        answer = server.handle_completions(asked)
        told = answer["choices"][0]["logprobs"]["content"]
        return [(token["id"], token["logprob"]) for token in told]

    return [continued(prompt) for prompt in prompts]


BACKENDS = {"llama_cpp": with_llama_cpp, "xllamacpp": with_xllamacpp}
