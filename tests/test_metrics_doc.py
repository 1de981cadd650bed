"""docs/metrics.md lists every key that is written or printed, and none that is not."""

import itertools
import json
import re
from collections.abc import Iterator
from dataclasses import asdict, fields, replace
from pathlib import Path

import pytest

from mlx_lora import config, experiment
from mlx_lora.adapter.weights import WeightStats
from mlx_lora.check.gates import gates
from mlx_lora.doctor import examine
from mlx_lora.plan import plan
from mlx_lora.progress import console
from mlx_lora.registry import options
from mlx_lora.report import page as report_page
from mlx_lora.report.compare import compare, states
from mlx_lora.rl.monitor import watchers
from mlx_lora.runlog import json_safe
from mlx_lora.spectral import metrics as spectral
from mlx_lora.spectral.alerts import alerts
from mlx_lora.spectral.dynamics import BY_MODULE
from mlx_lora.spectral.report import to_json
from mlx_lora.spectral.splines import SplineMetrics
from mlx_lora.spectral.weight_map import to_json as to_json_of_weights
from mlx_lora.types import Finding, Reward

PAGE = Path(__file__).parent.parent / "docs" / "metrics.md"
YAML = """
model: demo
method: grpo
task: countdown
iters: 2
batch_size: 2
lora_parameters: {type: spline}
grpo: {group_size: 2}
rollout: {max_tokens: 8}
eval: {n: 8, every: 1}
monitor: {every: 1, spectrum_every: 1}
"""
WHOLE = {"reasons", "reasons_before", "reasons_after"}  # what is below them has no row
WHOLE |= {"check", "environment", "init_measured", "rejection_sampling"}
WHOLE |= {"parts", "pass_at", "rule", "adapter_alerts"}
KINDS_OF_DOMINANCE = ("", "scaled_", "directional_", "activation_")
WHOLE |= {f"structural.{kind}per_layer_dominance" for kind in KINDS_OF_DOMINANCE}
WHOLE |= {"structural.per_layer_intruders"}
# keys below these are names of things
FAMILIES = {"reason": "CODE", "reward": "PART"}  # reason/correct is in the row of reason/CODE
NAMED = {"matrices": "MODULE", "adapters": "MODULE", "norms": "MODULE", "versions": "PACKAGE"}
NAMED |= {"structural.by_block": "BLOCK", "structural.by_kind": "KIND"}
NAMED |= dict.fromkeys(BY_MODULE, "MODULE") | {"ranks": "MODULE", "modules": "MODULE"}
NAMED |= {"answers": "QUESTION", "splines": "MODULE"}
Rows = dict[str, str]


def page() -> dict[str, Rows]:
    """Heading -> first cell without backticks -> the row's text."""
    found: dict[str, Rows] = {}
    heading = ""
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            heading = line.lstrip("# ")
            found[heading] = {}
        elif row := re.match(r"\| `([^`]+)` \|", line):
            assert row[1] not in found[heading], f"{row[1]} is twice under {heading}"
            found[heading][row[1]] = line
    return found


PAGES = page()


def documented(file: str) -> set[str]:
    """Keys under the heading that begins with this file or command."""
    (rows,) = [rows for heading, rows in PAGES.items() if heading.startswith(f"`{file}`")]
    return set(rows)


def paths(value: object, path: str = "") -> Iterator[str]:
    """a.b for nested mappings, a[] for lists."""
    if isinstance(value, dict) and value and path not in WHOLE:
        for key, inside in value.items():
            if not explains_a_null(key, value):
                family = key.partition("/")[0]
                step = f"{family}/{FAMILIES[family]}" if "/" in key else NAMED.get(path, key)
                yield from paths(inside, f"{path}.{step}" if path else step)
    elif isinstance(value, list):
        for inside in value or [None]:
            yield from paths(inside, f"{path}[]")
    else:
        yield path


def explains_a_null(key: str, owner: dict) -> bool:
    """loss_status beside a loss of null."""
    about = key.removesuffix("_status")
    return about != key and about in owner and not about.startswith("kappa")


def emitted(document: object) -> set[str]:
    return set(paths(document))


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run of two steps whose rewards alternate, so that every group has signal."""
    folder = tmp_path_factory.mktemp("run")
    turn = itertools.count()
    with pytest.MonkeyPatch.context() as patch:
        real = experiment.load_task

        def alternating(*args):
            def reward(sample, text):
                return Reward(float(next(turn) % 2), "correct", {"task": 1.0})

            return replace(real(*args), reward=reward)

        patch.setattr(experiment, "load_task", alternating)
        experiment.run(config.from_text(YAML), folder, console(quiet=True))
    return folder


STAGES = """
model: demo
task: countdown
batch_size: 2
rollout: {max_tokens: 8}
eval: {n: 8}
monitor: {every: 1}
stages:
- {method: sft, iters: 1, data: ROWS, test: true}
- {method: sft, iters: 1, rejection_sampling: {problems: 8, samples: 4}}
- method: grpo
  iters: 1
  grpo: {group_size: 2, epochs: 2, dynamic_sampling: 1, overlong_buffer: 4}
"""


EVOLVED = """
model: demo
method: es
task: countdown
init: activations
lora_parameters: {rank: 1, scale: 2.0}
iters: 2
es: {population: 6, samples_per_generation: 16, perturb_scale: 0.15}
rollout: {max_tokens: 12, temperature: 1.0}
eval: {n: 8}
monitor: {every: 1}
"""


@pytest.fixture(scope="module")
def evolved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("evolved")
    experiment.run(config.from_text(EVOLVED), folder, console(quiet=True))
    return folder


@pytest.fixture(scope="module")
def stages(tmp_path_factory) -> config.Experiment:
    """Three of them: on rows, on rejection samples, and GRPO."""
    rows = tmp_path_factory.mktemp("rows")
    for name in ("train", "valid", "test"):
        (rows / f"{name}.jsonl").write_text(2 * '{"text": "A duck has two legs."}\n')
    return config.from_text(STAGES.replace("ROWS", str(rows)))


@pytest.fixture(scope="module")
def staged(stages, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("staged")
    experiment.run(stages, folder, console(quiet=True))
    return folder


def read(path: Path) -> list[dict]:
    """The lines of a .jsonl file, or the one document of a .json file."""
    text = path.read_text(encoding="utf-8")
    return [json.loads(x) for x in (text.splitlines() if path.suffix == ".jsonl" else [text])]


FILES = (
    "metrics.jsonl", "samples.jsonl", "gradients.jsonl", "evals.jsonl", "check.json",
    "spectra.jsonl", "summary.json", "time_breakdown.json", "status.json", "environment.json",
    "held_out.json",
)  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_a_file_holds_the_documented_keys(run, staged, evolved, name):
    stages = [f"stages/{stage}/metrics.jsonl" for stage in ("1_sft", "3_grpo")]
    more = {"metrics.jsonl": stages, "summary.json": ["summary.json"]}
    more["evals.jsonl"] = ["stages/1_sft/evals.jsonl"]
    files = [run / name, *(staged / other for other in more.get(name, []))]
    files += [evolved / name] if name == "metrics.jsonl" else []
    found = set().union(*(emitted(document) for file in files for document in read(file)))
    if name == "summary.json":
        found = {key for key in found if not key.startswith("stages[].")} | {"stages"}
        (one,) = [entry for entry in read(staged / name)[0]["stages"] if "test_loss" in entry]
        # of a single stage: as in `stages`; of a test alone
        found |= {k for k in one if "_loss" in k or k.startswith("test_")}
        found |= {"rejection_sampling", "adapter"}
    assert found == documented(name)


def test_the_stages_of_a_summary_hold_the_documented_keys(staged):
    (summary,) = read(staged / "summary.json")
    entries = [emitted(entry) for entry in summary["stages"]]
    assert set().union(*entries) == documented("stages` of `summary.json")


@pytest.mark.parametrize("name", ["rejection_sampling.json", "rejection_sampling.jsonl"])
def test_rejection_samples_hold_the_documented_keys(staged, name):
    for line in read(staged / "stages" / "2_sft" / name):
        assert emitted(line) == documented(name)


def test_an_evaluation_holds_the_documented_keys(run):
    (document,) = read(run / "eval_before.json")
    assert emitted(document | {"task": "countdown"}) == documented("eval_before.json")


def test_a_spectrum_holds_the_documented_keys(run):
    def blank(record):
        return record(**{f.name: None for f in fields(record)})

    module = replace(blank(spectral.LoRAAdapterMetrics), singular_values=(1.0,))
    groups = {"0": blank(spectral.Group)}
    full = spectral.LoRAReport(
        {"q_proj": module},
        replace(blank(spectral.LoRAStructuralMetrics), by_block=groups, by_kind=groups),
        blank(spectral.LoRADynamicsMetrics),
        [Finding("name", "q_proj", "message", "action")],
        splines={"q_proj": replace(blank(SplineMetrics), knots=(1.0,), values=(1.0,))},
    )
    assert emitted(to_json(full)) == documented("spectrum.json")
    (document,) = read(run / "spectrum.json")
    assert emitted(document) - {"dynamics", "alerts[]"} <= documented("spectrum.json")


def test_the_weights_hold_the_documented_keys():
    stats = {"q_proj": WeightStats((2, 3), 1.0, 1.0, 0.7, 2.0, 3.0, 3.0, 0.0)}
    assert emitted(json_safe(to_json_of_weights(stats))) == documented("weights.json")


def test_a_report_prints_the_documented_keys(run):
    printed = report_page.of(run).to_json() | {
        "out": "",
        "problems": [],
        "missing": [{"part": 1, "why": 1}],
    }
    assert emitted(printed) == documented("report --json")
    assert (run / report_page.FILE).is_file()


def test_a_comparison_holds_the_documented_keys(run):
    found = json.loads(json.dumps(compare(states(run)).to_json()))
    found |= {"only": [{"module": "", "adapters": []}], "misfits": [{"module": "", "sizes": []}]}
    assert emitted(found) == documented("compare.json")


def test_an_alert_holds_the_documented_keys():
    finding = asdict(Finding("name", "", "message", "action"))
    assert emitted({"step": 0, **finding}) == documented("alerts.jsonl")


def test_the_plan_and_the_doctor_print_the_documented_keys(stages):
    quiet = console(quiet=True)
    planned = emitted(plan(config.from_text(YAML), quiet)) | emitted(plan(stages, quiet))
    planned |= emitted(plan(config.from_text(EVOLVED), quiet))
    planned = {key.removeprefix("stages[].") for key in planned} | {"stages"}
    assert planned == documented("train --dry-run --json")
    assert emitted(examine()) == documented("doctor --json")


TABLES = {"Gates of the check": [gates], "Alerts": [watchers, alerts]}


@pytest.mark.parametrize("heading", TABLES)
def test_thresholds_are_those_of_the_functions(heading):
    rows = PAGES[heading]
    known = {name: options(table[name]) for table in TABLES[heading] for name in table}
    assert rows.keys() == known.keys()
    for name, thresholds in known.items():
        wanted = {f"`{option}` {value:g}" for option, value in thresholds.items()}
        assert set(re.findall(r"`\w+` [0-9.e-]+\b", rows[name])) == wanted, name


def test_the_page_on_the_check_names_every_threshold():
    text = (PAGE.parent / "check.md").read_text(encoding="utf-8")
    rows, name = {}, ""
    for row in re.findall(r"(?m)^\| (?:`(\w+)` )?\| (.*) \|$", text.partition("## Gates")[2]):
        name = row[0] or name  # a row without a name goes on with the gate above it
        rows[name] = [*rows.get(name, []), *re.findall(r"[0-9.]+\b", row[1])]
    for name in gates:
        for option, value in options(gates[name]).items():
            assert f"{value:g}" in rows[name], f"{name}: {option}"


def test_every_row_has_all_its_columns():
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    width = 0
    for before, line in itertools.pairwise(["", *lines]):
        if line.startswith("|"):
            width = line.count("|") if not before.startswith("|") else width
            assert line.count("|") == width, line
