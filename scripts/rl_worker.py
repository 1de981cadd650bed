"""A process of bench_rl.py: one side, which does one piece of work for each line on its stdin.

    python rl_worker.py JOB FOLDER OPTIONS

It answers with a line of JSON each, with the seconds that the piece took, and sleeps in between: so
that sides take turns on an idle machine. Of ours it imports nothing unless the job is ours: it runs
in the peer's environment too.
"""

import ctypes
import importlib
import importlib.metadata
import json
import os
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import rl_setting as setting

PACKAGES = ("mlx", "mlx-lm", "mlx-lm-lora", "mlx-lora", "numpy", "transformers")


class Talk:
    """Requests from stdin, answers to what was stdout; what the job itself prints is stderr's."""

    def __init__(self) -> None:
        self.out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)

    def asked(self) -> dict[str, Any]:
        """The next request. Without one the process ends."""
        line = sys.stdin.readline()
        if not line:
            os._exit(0)  # nothing of the run is wanted
        return json.loads(line)

    def say(self, answer: dict[str, Any]) -> None:
        print(json.dumps(answer), file=self.out, flush=True)


def about(model: Any, prompt_ids: list[list[int]]) -> dict[str, Any]:
    """What shows that both sides do the same work, and by which libraries."""
    from mlx.utils import tree_flatten

    return {
        "versions": {p: version(p) for p in PACKAGES if version(p)},
        "blas": loaded_blas(),
        "threads": os.environ.get("OPENBLAS_NUM_THREADS"),
        "trainable": sum(v.size for _, v in tree_flatten(model.trainable_parameters())),
        "prompts": zlib.crc32(json.dumps(prompt_ids).encode()),
    }


def resident(kind: str) -> int:
    """Bytes of memory that this process has (VmRSS), or had at most (VmHWM). 0 where unknown.

    MLX's own count would leave out what NumPy holds.
    """
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(kind)), 0)


def version(package: str) -> str | None:
    """Of an installed package."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def loaded_blas() -> list[str]:
    """File names of the BLAS libraries that this process has loaded, where the system says."""
    maps = Path("/proc/self/maps")
    lines = maps.read_text().split() if maps.exists() else []
    return sorted({Path(x).name for x in lines if "/" in x and "blas" in Path(x).name})


def our_steps(talk: Talk, folder: Path, o: dict[str, Any]) -> None:
    """`mlx-lora train`, whole: only its loop waits for the word before each step."""
    from mlx_lora import cpu, config, experiment  # isort: skip  before mlx
    import mlx.core as mx
    from rich.console import Console

    from mlx_lora.models import encode_prompt
    from mlx_lora.rl import grpo

    train, seen = grpo.train, {}

    def paced(loaded: Any, task: Any, e: Any, optimizer: Any, clock: Any, report: Any, **more: Any):
        def heard(step: int, metrics: dict[str, float], groups: Any = ()) -> None:
            seen.update(metrics)
            report(step, metrics, groups)

        ids = [list(encode_prompt(loaded.tokenizer, p)) for p in setting.prompts()]
        talk.say(about(loaded.model, ids) | {"path": cpu.mode()})
        steps = train(loaded, task, e, optimizer, clock, heard, **more)
        loaded_at = resident("VmRSS")
        while True:
            talk.asked()
            begin = time.perf_counter()
            yield next(steps)  # what the run does after a step is part of it
            mx.synchronize()
            seconds = time.perf_counter() - begin
            tokens = int(seen["completion_tokens_min"]), int(seen["completion_tokens_max"])
            talk.say(
                {"seconds": seconds, "tokens": tokens, "memory": resident("VmHWM") - loaded_at}
            )

    grpo.train = paced
    file = folder / f"run{os.getpid()}.json"  # JSON is YAML
    file.write_text(json.dumps(our_config(folder, o)))
    experiment.run(config.load(file), file.with_suffix(""), Console(file=sys.stderr))


def our_config(folder: Path, o: dict[str, Any]) -> dict[str, Any]:
    """The experiment file: what the peer's script says, in our keys."""
    rows = str(folder / setting.ROWS)
    return {
        "model": str(setting.model_folder(folder, o["bits"])),
        "method": "grpo",
        "task": {"python": f"{setting.__file__}:reward", "data": rows, "test_data": rows},
        "iters": 10_000,
        "batch_size": o["prompts"],
        "learning_rate": setting.RATE,
        "lora_parameters": {"rank": setting.RANK, "scale": setting.SCALE},
        "rollout": {"max_tokens": o["tokens"], "temperature": 1.0},
        "grpo": {
            "group_size": o["group"],
            "beta": o["beta"],
            "loss": "grpo",
            "advantage": "group_std",
        },
        "save_every": 10_000,
        "eval": {"n": 1},
    }


def peer_steps(talk: Talk, folder: Path, o: dict[str, Any]) -> None:
    """The peer's own loop on its own objects: only its batches wait for the word.

    Its command line cannot set the sampler, and gives every prompt a chat template.
    """
    import mlx.core as mx
    import mlx.optimizers as optim
    import numpy as np

    peer = importlib.import_module("mlx_lm_lora.trainer.grpo_trainer")
    utils = importlib.import_module("mlx_lm_lora.utils")
    path = str(setting.model_folder(folder, o["bits"]))
    np.random.seed(0)
    mx.random.seed(0)
    lora = {"rank": setting.RANK, "scale": setting.SCALE, "dropout": 0.0, "num_layers": -1}
    model, tokenizer, file = utils.from_pretrained(
        path, new_adapter_path=str(folder / f"peer{os.getpid()}"), lora_config=lora
    )
    reference, _ = utils.load(path)
    texts = setting.prompts()
    dataset = [(tokenizer.encode(text), [0], text, "") for text in texts]
    talk.say(about(model, [list(row[0]) for row in dataset]))
    seen: dict[str, Any] = {}
    loaded_at = resident("VmRSS")

    class Callback:
        def on_train_loss_report(self, info: dict[str, Any]) -> None:
            seen.update(info)

    def paced(**options: Any) -> Iterator[Any]:
        for batch in peer.iterate_grpo_batches(**options):
            talk.asked()
            begin = time.perf_counter()
            yield batch  # the loop evaluates everything before it wants the next batch
            mx.synchronize()
            seconds = time.perf_counter() - begin
            tokens = [int(seen[f"train_{k}_generated_tokens"]) for k in ("min", "max")]
            talk.say(
                {"seconds": seconds, "tokens": tokens, "memory": resident("VmHWM") - loaded_at}
            )

    peer.train_grpo(
        model,
        reference,
        tokenizer,
        optim.Adam(learning_rate=setting.RATE),
        dataset,
        reward_funcs=[setting.reward],
        args=peer.GRPOTrainingArgs(
            batch_size=o["prompts"],
            group_size=o["group"],
            iters=10_000,
            steps_per_report=1,
            steps_per_save=10**9,
            adapter_file=str(file),
            beta=o["beta"],
            max_completion_length=o["tokens"],
            temperature=1.0,
            top_p=1.0,
            top_k=0,
        ),
        iterate_batches=paced,
        training_callback=Callback(),
        end_answer_token="",
    )


def texts_of(ask: dict[str, Any]) -> list[str]:
    """A prompt for each row: all different, or `group` rows of each."""
    texts = setting.prompts()
    return [texts[row // ask["group"]] for row in range(ask["rows"])]


def our_rollouts(talk: Talk, folder: Path, o: dict[str, Any]) -> None:
    """generate(), as a training step calls it: with the log-probability of every token."""
    from mlx_lora import cpu, models  # isort: skip  before mlx
    import mlx.core as mx

    from mlx_lora.adapter.attach import attach
    from mlx_lora.generate import generate
    from mlx_lora.models import encode_prompt

    loaded = models.load(str(setting.model_folder(folder, o["bits"])))
    if o["adapter"]:
        attach(loaded.model, rank=setting.RANK, scale=setting.SCALE)
    ids = [list(encode_prompt(loaded.tokenizer, p)) for p in setting.prompts()]
    talk.say(about(loaded.model, ids) | {"path": cpu.mode()})
    step = 0
    while ask := talk.asked():
        texts, group, step = texts_of(ask), ask["group"], step + 1
        begin = time.perf_counter()
        found = generate(
            loaded,
            texts[::group],
            purpose="bench",
            group=group,
            max_tokens=o["tokens"],
            step=step,
        )
        mx.synchronize()
        seconds = time.perf_counter() - begin
        lengths = [len(r.ids) for rows in found for r in rows]
        talk.say({"seconds": seconds, "tokens": [min(lengths), max(lengths)], "rows": len(lengths)})


def mlx_lm_rollouts(talk: Talk, folder: Path, o: dict[str, Any]) -> None:
    """mlx_lm.batch_generate; it is not asked for log-probabilities, which it copies one by one."""
    import mlx.core as mx
    from mlx_lm import batch_generate, load
    from mlx_lm.sample_utils import make_sampler
    from mlx_lm.tuner.utils import linear_to_lora_layers

    model, tokenizer = load(str(setting.model_folder(folder, o["bits"])))[:2]
    model.freeze()
    if o["adapter"]:
        lora = {"rank": setting.RANK, "scale": setting.SCALE, "dropout": 0.0}
        linear_to_lora_layers(model, -1, lora)
    model.eval()
    mx.eval(model.parameters())
    talk.say(about(model, [tokenizer.encode(p) for p in setting.prompts()]))
    sampler = make_sampler(temp=1.0)
    while ask := talk.asked():
        ids = [tokenizer.encode(text) for text in texts_of(ask)]
        widths = {} if ask["usual"] else {"completion_batch_size": ask["rows"]}
        begin = time.perf_counter()
        found: Any = batch_generate(
            model,
            tokenizer,
            ids,
            max_tokens=o["tokens"],
            sampler=sampler,
            return_token_ids=True,
            **widths,
        )
        mx.synchronize()
        seconds = time.perf_counter() - begin
        lengths = [len(row) for row in found.token_ids]
        talk.say({"seconds": seconds, "tokens": [min(lengths), max(lengths)], "rows": len(lengths)})


JOBS: dict[str, Callable[[Talk, Path, dict[str, Any]], None]] = {
    "our_steps": our_steps,
    "peer_steps": peer_steps,
    "our_rollouts": our_rollouts,
    "mlx_lm_rollouts": mlx_lm_rollouts,
}


def main() -> None:
    job, folder, options = sys.argv[1:]
    if not job.startswith("our") and os.environ.get("MLX_LORA_CPU") == "openblas":
        ctypes.CDLL("libopenblas.so.0", mode=ctypes.RTLD_GLOBAL)  # before MLX, as the package does
    JOBS[job](Talk(), Path(folder), json.loads(options))


if __name__ == "__main__":
    main()
