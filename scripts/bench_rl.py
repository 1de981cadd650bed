"""How fast is a GRPO step, against mlx-lm-lora 5.10.2, and a rollout, against mlx-lm's own?

    python scripts/bench_rl.py --peer-env ~/peer        # everything; needs an idle machine
    python scripts/bench_rl.py --parts growth profile   # some of it again; the rest stays
    python scripts/bench_rl.py --parts                  # only the page and the picture
    python scripts/bench_rl.py --quick --out /tmp/b.json

Each side is a process that does one step when it is asked to and sleeps in between, so that sides
take turns on an otherwise idle machine. The peer is installed with pip into an environment of its
own. Writes figures/bench_rl.json and .png, and the tables of docs/rl_engine.md.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import rl_report
import rl_setting as setting

from mlx_lora import cpu
from mlx_lora.runlog import commit, environment, version

ROOT = Path(__file__).resolve().parents[1]
WORKER, PROFILE = (Path(__file__).with_name(f"rl_{name}.py") for name in ("worker", "profile"))
PEER = "mlx-lm-lora==5.10.2"
PARTS = ("steps", "rollouts", "growth", "profile")
CASES = {  # bits, and the CPU path: what pip alone gives, or a system OpenBLAS in both
    "4bit_installed": (4, "numpy"),
    "4bit_equal_blas": (4, "openblas"),
    "float32_equal_blas": (32, "openblas"),
}
PROMPTS, GROUP, TOKENS, BETA = (8, 4), 8, 64, 0.04
ROWS = (8, 32, 64, 128)
WARMUPS, BLOCK = 2, 5
GROWTH = {
    "rows": [(prompts, TOKENS) for prompts in (2, 4, 8, 16)],
    "tokens": [(8, tokens) for tokens in (16, 32, 64, 128, 256)],
}


@dataclass(frozen=True)
class Bench:
    """What all parts need."""

    folder: Path  # with the models
    peer: Path  # its Python
    paths: Sequence[str]  # the CPU paths that this machine has
    quick: bool

    def cases(self) -> Iterator[tuple[str, int, str]]:
        for case, (bits, path) in CASES.items():
            if path in self.paths:
                yield case, bits, path

    @contextlib.contextmanager
    def side(self, job: str, path: str, **options: Any) -> Iterator["Side"]:
        """A worker, ready; ended when the block is."""
        python = self.peer if job.startswith("peer") else Path(sys.executable)
        command = [str(python), str(WORKER), job, str(self.folder), json.dumps(options)]
        with tempfile.TemporaryFile("w+") as errors:
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=surroundings(path),
            )
            try:
                yield Side(job, process, errors)
            finally:
                process.kill()
                process.wait()


def surroundings(path: str) -> dict[str, str]:
    """No run-time C++ compilation on either side: it costs seconds a kernel."""
    return os.environ | {"MLX_LORA_CPU": path, "MLX_DISABLE_COMPILE": "1"}


class Side:
    """One process of a comparison."""

    def __init__(self, job: str, process: "subprocess.Popen[str]", errors: Any) -> None:
        self.job, self.process, self.errors = job, process, errors
        self.about = self.answer()

    def answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.errors.seek(0)
            raise SystemExit(f"{self.job} ended:\n{self.errors.read()[-4000:]}")
        return json.loads(line)

    def ask(self, tokens: int, **request: Any) -> dict[str, Any]:
        """One piece of work, every completion of which has to have so many tokens."""
        assert self.process.stdin is not None
        print(json.dumps(request), file=self.process.stdin, flush=True)
        found = self.answer()
        if list(found["tokens"]) != [tokens, tokens]:
            raise SystemExit(f"{self.job} wrote {found['tokens']} tokens a row, not {tokens}")
        return found


def same_work(sides: dict[str, Side]) -> dict[str, Any]:
    """What the sides say of themselves, if they adapt the same layers and read the same prompts."""
    for key in ("trainable", "prompts"):
        values = {name: side.about[key] for name, side in sides.items()}
        if len(set(values.values())) != 1:
            raise SystemExit(f"the sides do not do the same work, {key}: {values}")
    return {name: side.about for name, side in sides.items()}


def steps(bench: Bench) -> dict[str, Any]:
    """Step times by case and shape: ours with and without KL to the reference, and the peer's."""
    found: dict[str, Any] = {}
    wanted = 2 if bench.quick else 12
    for case, bits, path in bench.cases():
        found[case] = {}
        for prompts in PROMPTS[:1] if bench.quick else PROMPTS:
            shape = {"bits": bits, "prompts": prompts, "group": GROUP, "tokens": TOKENS}
            with (
                bench.side("our_steps", path, beta=BETA, **shape) as ours,
                bench.side("our_steps", path, beta=0.0, **shape) as plain,
                bench.side("peer_steps", path, beta=BETA, **shape) as peer,
            ):
                sides = {"ours": ours, "ours_beta_0": plain, "peer": peer}
                row = found[case][f"{prompts}x{GROUP}"] = in_turns(sides, wanted, bench.quick)
                row["about"] = same_work(sides)
            print(case, f"{prompts}x{GROUP}", {n: row["seconds"][n] for n in sides}, flush=True)
    return found


def in_turns(sides: dict[str, Side], wanted: int, quick: bool) -> dict[str, Any]:
    """So many steps of each side after its warm-ups, a block at a time."""
    for side in sides.values():
        for _ in range(1 if quick else WARMUPS):
            side.ask(TOKENS)
    taken: dict[str, list[dict[str, Any]]] = {name: [] for name in sides}
    while any(len(answers) < wanted for answers in taken.values()):
        for name, side in sides.items():
            block = min(BLOCK, wanted - len(taken[name]))
            taken[name] += [side.ask(TOKENS) for _ in range(block)]
    return {
        "seconds": {name: [a["seconds"] for a in answers] for name, answers in taken.items()},
        "peak_memory": {name: max(a["memory"] for a in taken[name]) for name in taken},
    }


def rollouts(bench: Bench) -> dict[str, Any]:
    """Seconds of a rollout by case and rows, of our generate and of mlx_lm.batch_generate.

    All prompts differ, and both sides have the adapter attached; at 64 rows also 8 prompts by 8,
    and all different without an adapter.
    """
    found: dict[str, Any] = {}
    for case, bits, path in bench.cases():
        found[case] = {}
        for adapter in (True, False):
            options = {"bits": bits, "tokens": TOKENS, "adapter": adapter}
            with (
                bench.side("our_rollouts", path, **options) as ours,
                bench.side("mlx_lm_rollouts", path, **options) as theirs,
            ):
                same_work({"ours": ours, "mlx_lm": theirs})
                for name, request in requests(adapter, bench.quick):
                    row = faced(ours, theirs, request, 1 if bench.quick else 7)
                    found[case][name] = row | request
                    print(case, name, row["seconds"], flush=True)
    return found


def requests(adapter: bool, quick: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    """Names and sizes of the batches that are written with, or without, an adapter."""
    if not adapter:
        yield "64 without adapter", {"rows": 64, "group": 1}
        return
    for rows in (8, 64) if quick else ROWS:
        yield str(rows), {"rows": rows, "group": 1}
    yield "64 in groups of 8", {"rows": 64, "group": 8}


def faced(ours: Side, theirs: Side, request: dict[str, Any], repeats: int) -> dict[str, Any]:
    """Both sides in turn, mlx-lm's at the width that is quicker for it: its own, or all rows."""
    ours.ask(TOKENS, **request)
    widths = {
        usual: theirs.ask(TOKENS, usual=usual, **request)["seconds"] for usual in (True, False)
    }
    usual = min(widths, key=lambda u: widths[u])
    taken: dict[str, list[float]] = {"ours": [], "mlx_lm": []}
    for _ in range(repeats):
        taken["ours"].append(ours.ask(TOKENS, **request)["seconds"])
        taken["mlx_lm"].append(theirs.ask(TOKENS, usual=usual, **request)["seconds"])
    named = {"its own": widths[True], "all rows": widths[False]}
    return {"seconds": taken, "mlx_lm_width": "its own" if usual else "all rows", "tried": named}


def growth(bench: Bench) -> dict[str, Any]:
    """Our step times by rows and by tokens, on each CPU path."""
    found: dict[str, Any] = {}
    for path in bench.paths:
        found[path] = {"rows": {}, "tokens": {}}
        for kind, points in GROWTH.items():
            for prompts, tokens in points[::2] if bench.quick else points:
                shape = {"bits": 4, "prompts": prompts, "group": GROUP, "tokens": tokens}
                with bench.side("our_steps", path, beta=BETA, **shape) as side:
                    for _ in range(1 if bench.quick else WARMUPS):
                        side.ask(tokens)
                    answers = [side.ask(tokens) for _ in range(2 if bench.quick else 10)]
                at = prompts * GROUP if kind == "rows" else tokens
                found[path][kind][str(at)] = {
                    "seconds": [a["seconds"] for a in answers],
                    "peak_memory": max(a["memory"] for a in answers),
                }
                print(path, kind, at, found[path][kind][str(at)]["seconds"], flush=True)
    return found


def profile(bench: Bench) -> dict[str, Any]:
    """Where the time of our step goes, on each CPU path."""
    found: dict[str, Any] = {}
    shape = {"bits": 4, "prompts": 8, "group": GROUP, "tokens": TOKENS, "beta": BETA}
    options = shape | {"repeats": 1 if bench.quick else 9}
    for path in bench.paths:
        command = [sys.executable, str(PROFILE), str(bench.folder), json.dumps(options)]
        done = subprocess.run(command, env=surroundings(path), capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(done.stderr[-4000:])
        found[path] = json.loads(done.stdout.splitlines()[-1])
    return found


def peer_python(folder: Path) -> Path:
    """The Python of an environment with the peer, and with our versions of mlx and mlx-lm."""
    python = folder / "bin" / "python"
    if ROOT in folder.resolve().parents:
        raise SystemExit(f"{folder} is inside this repository: give another --peer-env")
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    mlx = "mlx[cpu]" if sys.platform.startswith("linux") else "mlx"
    wanted = [PEER, f"{mlx}=={version('mlx')}", f"mlx-lm=={version('mlx-lm')}"]
    subprocess.run([str(python), "-m", "pip", "install", "-q", *wanted], check=True)
    return python


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=PARTS)
    parser.add_argument("--out", type=Path, default=ROOT / "figures/bench_rl.json")
    parser.add_argument("--quick", action="store_true", help="2 steps: to try the script")
    default = Path(tempfile.gettempdir()) / "mlx_lora_peer"
    parser.add_argument("--peer-env", type=Path, default=default, help="made once, then kept")
    args = parser.parse_args()
    if args.quick and args.out.resolve().parent == ROOT / "figures":
        parser.error("--quick measures nothing worth keeping: give another --out")
    found = json.loads(args.out.read_text()) if args.out.exists() else {}
    found["question"] = (__doc__ or "").splitlines()[0]
    paths = ("openblas", "numpy") if cpu.mode() == "openblas" else ("numpy",)
    with tempfile.TemporaryDirectory() as folder:
        found["setting"] = setting.save(Path(folder)) | {"tokens": TOKENS, "beta": BETA}
        peer = peer_python(args.peer_env) if "steps" in args.parts else Path()
        bench = Bench(Path(folder), peer, paths, args.quick)
        for part in args.parts:
            work = {"steps": steps, "rollouts": rollouts, "growth": growth, "profile": profile}
            found[part] = work[part](bench)
            about = {"commit": commit(), "threads": os.environ.get("OPENBLAS_NUM_THREADS")}
            found.setdefault("of_part", {})[part] = about | {"load": os.getloadavg()[0]}
            found["environment"] = environment(blas=cpu.mode())
            write(found, args.out)  # a part is kept whatever becomes of the next
    write(found, args.out)
    if args.out.resolve().parent == ROOT / "figures":
        rl_report.fill(ROOT / "docs/rl_engine.md", found)


def write(found: dict[str, Any], out: Path) -> None:
    found |= rl_report.summed_up(found)
    out.write_text(json.dumps(found, indent=1) + "\n")
    rl_report.draw(found, out.with_suffix(".png"))


if __name__ == "__main__":
    main()
