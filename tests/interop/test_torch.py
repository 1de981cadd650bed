"""Exported folders in torch: PEFT and transformers compute the logits that MLX computes."""

import json
import warnings

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import load_adapters

from mlx_lora import models
from mlx_lora.adapter import files
from mlx_lora.adapter.attach import lora_layers
from mlx_lora.ship.formats import FORMATS, Target
from mlx_lora.ship.trained import read
from tests.interop.bases import adapter, lively
from tests.tiny import COMMON, IDS

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

CLASSES = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3", "gemma": "Gemma"}
CLOSE = 1e-4
pytestmark = [
    pytest.mark.interop,
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # PEFT's, of transformers' next names
]


@pytest.fixture(autouse=True)
def gelu_of_transformers(monkeypatch):
    """Gemma's is the tanh form; mlx-lm computes the exact one, and differs by 6e-4 here."""
    monkeypatch.setattr(nn, "gelu", nn.gelu_approx)


def base_folder(loaded, folder):
    """The tiny model as transformers has it, weights copied from MLX."""
    name = CLASSES[loaded.name]
    known = {**COMMON, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
    known.pop("rope_theta")
    config = getattr(transformers, f"{name}Config")(**known)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    weights = {k: torch.tensor(np.array(v)) for k, v in tree_flatten(loaded.model.parameters())}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    model.tie_weights()
    model.save_pretrained(folder)
    return folder


def torch_logits(model) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor(IDS)).logits.numpy()


def mlx_logits(model) -> np.ndarray:
    return np.array(models.logits(model, mx.array(IDS)))


def close(theirs: np.ndarray, ours: np.ndarray, what: str) -> None:
    """Logits within CLOSE; how far apart they are is said."""
    found = np.abs(theirs - ours).max()
    print(f"{what}: logits to {found:.1e}")
    assert found < CLOSE, what


def exported(loaded, folder, to, tmp_path):
    """The folder that a format writes, with a base for torch beside it."""
    base, out = base_folder(loaded, tmp_path / "base"), tmp_path / to
    out.mkdir()
    FORMATS[to].write(read(folder), Target(loaded, out, str(base)))
    return base, out


def in_peft(base, out):
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    return peft.PeftModel.from_pretrained(model, out).eval()


@pytest.mark.parametrize("kind", ["one rank", "ranks", "dora"])
@pytest.mark.parametrize("architecture", CLASSES)
def test_peft_computes_our_logits(architecture, kind, tmp_path):
    loaded = lively(architecture)
    options = {"last_rank": 2} if kind == "ranks" else {"dora": kind == "dora"}
    folder = adapter(loaded, tmp_path / "adapter", **options)
    base, out = exported(loaded, folder, "peft", tmp_path)
    before = mlx_logits(loaded.model)
    model = in_peft(base, out)
    files.load(loaded.model, folder)
    ours = mlx_logits(loaded.model)
    assert np.abs(ours - before).max() > 0.5, "the adapter does something"
    close(torch_logits(model), ours, f"{architecture}, {kind} in PEFT")
    with model.disable_adapter():
        assert np.abs(torch_logits(model) - before).max() < CLOSE


def test_an_output_head_and_embeddings_of_their_own_are_adapted(tmp_path, monkeypatch):
    monkeypatch.setitem(COMMON, "tie_word_embeddings", False)
    loaded = lively("llama")
    folder = adapter(loaded, tmp_path / "adapter", outside=("lm_head", "embed_tokens"))
    base, out = exported(loaded, folder, "peft", tmp_path)
    assert not FORMATS["peft"].refusals(read(folder), loaded.config)
    files.load(loaded.model, folder)
    names = {n for n in lora_layers(loaded.model) if "layers" not in n}
    assert names == {"lm_head", "model.embed_tokens"}
    close(torch_logits(in_peft(base, out)), mlx_logits(loaded.model), "untied, both ends in PEFT")


@pytest.mark.parametrize(
    "options",
    [
        {"r": 4, "lora_alpha": 6},
        {"r": 4, "lora_alpha": 6, "use_rslora": True},
        {
            "r": 4,
            "lora_alpha": 6,
            "rank_pattern": {"down_proj": 2},
            "alpha_pattern": {"down_proj": 8, "q_proj": 1},
            "use_rslora": True,
        },
        {"r": 4, "lora_alpha": 6, "layers_to_transform": [0]},
        {"r": 4, "lora_alpha": 6, "use_dora": True},
    ],
    ids=["plain", "rslora", "patterns", "one layer", "dora"],
)
def test_what_peft_trained_is_imported(options, tmp_path):
    loaded = lively("qwen3")
    base = transformers.AutoModelForCausalLM.from_pretrained(base_folder(loaded, tmp_path / "base"))
    targets = ["q_proj", "v_proj", "down_proj"]
    model = peft.get_peft_model(base, peft.LoraConfig(target_modules=targets, **options))
    torch.manual_seed(0)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "lora_B" in name:
                value.normal_()
            elif "magnitude" in name:
                value.mul_(1 + 0.2 * torch.randn_like(value))
    wanted = torch_logits(model.eval())
    model.save_pretrained(tmp_path / "peft")
    out = tmp_path / "mlx"
    FORMATS["mlx"].write(read(tmp_path / "peft"), Target(loaded, out, "base"))
    files.load(loaded.model, out)
    close(mlx_logits(loaded.model), wanted, f"PEFT's {options} in MLX")
    if "use_dora" not in options:
        stock = load_adapters(lively("qwen3").model, str(out))
        assert np.abs(mlx_logits(stock) - wanted).max() < CLOSE


@pytest.mark.parametrize("architecture", CLASSES)
def test_one_folder_for_mlx_lm_peft_and_transformers(architecture, tmp_path):
    loaded = lively(architecture)
    folder = adapter(loaded, tmp_path / "adapter", last_rank=2)
    base, out = exported(loaded, folder, "universal", tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT names the keys that are mlx-lm's
        there = {
            "peft": torch_logits(in_peft(base, out)),
            "transformers": torch_logits(transformers.AutoModelForCausalLM.from_pretrained(out)),
        }
    there["mlx-lm"] = mlx_logits(load_adapters(lively(architecture).model, str(out)))
    files.load(loaded.model, folder)
    ours = mlx_logits(loaded.model)
    for name, logits in there.items():
        close(logits, ours, f"{architecture}, universal in {name}")
    assert json.loads((out / files.CONFIG).read_text())["peft_type"] == "LORA"
