"""Run folders made by hand, quick and whole, and what a page must be."""

import json
import shutil
from html.parser import HTMLParser
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_lora.spectral.report import LoRAAnalyzer, to_json

LAYERS = [f"model.layers.{i}.self_attn.{kind}" for i in (0, 1) for kind in ("q_proj", "v_proj")]
CHECK = {
    "verdict": "pass", "reasons": ["logits are bitwise equal"], "expect": "same", "kl_mean": 0.0,
    "intervals": {"kl_mean": [0.0, 0.0]}, "perplexity_base": 2.0, "perplexity_adapted": 2.0,
    "gates": [{"name": "identity", "verdict": "pass", "sentence": "equal to the bit"}],
    "layers": [{"drift": 0.0}, {"drift": 0.1}],
    "samples": [{"prompt": "duck?", "base": "two", "adapted": "two"}],
}  # fmt: skip
SUMMARY = {
    "task": "countdown", "check": CHECK, "accuracy_before": 0.37, "accuracy_before_low": 0.33,
    "accuracy_before_high": 0.41, "accuracy_before_sampled": 0.4, "accuracy_after": 0.63,
    "accuracy_after_low": 0.58, "accuracy_after_high": 0.67, "accuracy_after_sampled": 0.5,
    "reasons_before": {"correct": 3, "wrong_value": 7}, "reasons_after": {"correct": 8},
    "kl_to_base_after": 0.1, "seconds": 12.0, "valid_loss": 2.5, "test_loss": 2.25,
    "best": {"step": 5, "metric": "accuracy", "value": 0.65},
    "stages": [{"name": "1_sft", "accuracy": 0.4, "accuracy_low": 0.3, "accuracy_high": 0.5},
               {"name": "2_grpo", "valid_loss": 2.5}],
}  # fmt: skip
TIMES = {
    "total": 10.0, "parts": 1,
    "rows": [{"name": "learn", "kind": "step", "seconds": 8.0, "count": 4, "p50": 2.0, "p95": 2.0},
             {"name": "unaccounted", "kind": "unaccounted", "seconds": 2.0, "count": 0}],
}  # fmt: skip
SAMPLE = {
    "step": 0, "prompt": "1 + 1?", "pick": "best", "completion": "two", "reward": 1.0,
    "reason": "correct", "truncated": False,
}  # fmt: skip
ALERT = {"step": 1, "name": "kl_runaway", "module": "", "message": "kl is 3", "action": "stop"}
LOOK = {"step": 1, "kappa_A": dict.fromkeys(LAYERS, 2.0), "kappa_B": dict.fromkeys(LAYERS, 3.0)}
LOOK |= {k: dict.fromkeys(LAYERS, 0.5) for k in ("rank_utilization", "frobenius_BA")}
PAIR = {"a": "one", "b": "two", "cosine": 0.25, "overlap_inputs": 0.5, "overlap_outputs": 0.125}
SHIPPED = {  # what merge, fuse, fuse --plan and repair leave beside their products
    "merge.json": {"method": "ties", "adapters": ["one", "two"], "weights": [0.5, 1.5],
                   "modules": 4, "rank": 6, "kept": 0.875, "pairs": [PAIR],
                   "notices": ["stranger"]},
    "fuse.json": {"adapter": "runs/a", "base": "demo", "dequantized": False, "bits": None,
                  "kept": 0.955, "noise": 0.5625, "kl_adapter": 0.0625, "notices": [],
                  "reasons": ["half of it is lost"],
                  "layers": [{"module": n, "kept": 0.7 + 0.1 * i} for i, n in enumerate(LAYERS)]},
    "fuse_plan.json": {"adapter": "runs/a", "base": "demo", "keep": 0.95, "noise_limit": 0.5,
                       "planned": {"kept": 0.99, "noise": 0.3, "bytes": 2_500_000},
                       "uniform": [{"bits": 4, "kept": 0.75, "noise": 2.5, "bytes": 1_500_000}],
                       "layers": [{"module": n, "bits": 5} for n in LAYERS]},
    "repair.json": {"adapter": "runs/a", "intruders_before": 5, "intruders_after": 1,
                    "looked_at": 35, "lambda": 0.75, "perplexity_base": 2.5,
                    "perplexity_before": 3.5, "perplexity_after": 2.75, "kl_base_before": 0.5,
                    "kl_base_after": 0.375, "notices": [],
                    "modules": [{"module": LAYERS[0], "before": 5, "after": 1, "moved": 0.175}]},
}  # fmt: skip
BLOCK = {"rank": 2, "scale": 3.5, "parameters": 300, "yaml": "lora_parameters: {rank: 2}"}
BESIDE = {  # what a stage, method es, advise and spectrum --compare leave
    "rejection_sampling.json": {"problems": 256, "sampled": 2000, "correct": 940, "distinct": 321,
                                "kept": 297},
    "weights.json": {"cut": 6, "outlying": [LAYERS[1]], "matrices": {
        n: {"rms_robust": 0.06, "peak": 4.5 + 80 * (i == 1)} for i, n in enumerate(LAYERS)}},
    "advice.json": {"kind": "after_training", "finding": "The adapter uses half of it",
                    "rank_now": 8, "predicted_rank_text": "3", "parameters_now": 400,
                    "idle_modules": [LAYERS[3]], "blocks": {"kind": BLOCK},
                    "modules": {n: {"predicted_rank": i} for i, n in enumerate(LAYERS)}},
    "compare.json": {"adapters": [{"name": "one", "rank": 8}, {"name": "two", "rank": 4}],
                     "pairs": [{**PAIR, "chance_inputs": 0.0625}], "only": [{"module": "x"}],
                     "notices": ["trained on other weights"]},
}  # fmt: skip
CONFIG = "model: demo\nmethod: grpo\nlora_parameters: {rank: 4, scale: 2.0}\n"


def adapter(folder: Path, *, seed: int = 0, rank: int = 4, width: int = 24, names=LAYERS) -> Path:
    """A trained adapter, as files alone."""
    random = np.random.default_rng(seed).standard_normal
    tensors = {}
    for name in names:
        tensors[f"{name}.lora_a"] = mx.array(random((width, rank)), mx.float32)
        tensors[f"{name}.lora_b"] = mx.array(0.1 * random((rank, width)), mx.float32)
    folder.mkdir(parents=True, exist_ok=True)
    mx.save_safetensors(str(folder / "adapters.safetensors"), tensors)
    about = {"fine_tune_type": "lora", "lora_parameters": {"rank": rank, "scale": 2.0}}
    (folder / "adapter_config.json").write_text(json.dumps(about))
    return folder


def documents(folder: Path) -> dict:
    """What a finished run leaves, by file name, with a spectrum of `folder`/adapters."""
    spectrum = to_json(LoRAAnalyzer(adapter(folder / "adapters")).analyze())
    dominances = {name: 0.1 * i for i, name in enumerate(LAYERS)}
    spectrum["structural"]["scaled_per_layer_dominance"] = dominances
    spectrum["structural"]["scaled_max_dominance"] = max(dominances.values())
    action = "lower the scale"
    spectrum["alerts"] = [
        {"name": "loud", "module": n, "message": "m", "action": action} for n in LAYERS
    ]
    steps = [{"step": i, "reward": 0.1 * i, "kl": 0.01 * i, "loss": 0.0} for i in range(12)]
    return {
        "status.json": {"state": "finished", "detail": "", "step": 11},
        "summary.json": SUMMARY,
        "check.json": CHECK,
        "environment.json": {"python": "3.11", "versions": {"mlx": "1"}},
        "time_breakdown.json": TIMES,
        "eval_before.json": {"accuracy": 0.37, "accuracy_low": 0.33, "accuracy_high": 0.41},
        "spectrum.json": spectrum,
        "adapters/harmless.json": {"verdict": "pass", "bitwise_identical": True, "base": {}},
        "metrics.jsonl": steps,
        "samples.jsonl": [SAMPLE, {**SAMPLE, "step": 10, "completion": "three", "reward": 0.0}],
        "alerts.jsonl": [ALERT],
        "evals.jsonl": [{"step": 5, "accuracy": 0.5, "accuracy_low": 0.4, "accuracy_high": 0.6}],
        "spectra.jsonl": [LOOK, {**LOOK, "step": 9}],
        **SHIPPED,
        **BESIDE,
    }


def save(folder: Path, found: dict, config: str = CONFIG) -> Path:
    for name, document in found.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        rows = document if name.endswith(".jsonl") else [document]
        (folder / name).write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    (folder / "config.yaml").write_text(config)
    return folder


def changed(run: Path, folder: Path, **files) -> Path:
    """A copy of the run with other documents; None removes one."""
    shutil.copytree(run, folder)
    for name, document in files.items():
        if document is None:
            (folder / name).unlink()
        else:
            text = document if isinstance(document, str) else json.dumps(document)
            (folder / name).write_text(text)
    return folder


class Seen(HTMLParser):
    """A page as a browser takes it: tags, attributes, text; what is not closed is an error."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str | None]] = []
        self.text: list[str] = []
        self.feed(page)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag not in ("meta", "link", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data):
        self.text.append(data)

    def values(self, name: str) -> list[str]:
        return [value or "" for _, n, value in self.attributes if n == name]
