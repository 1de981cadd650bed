"""The house rules that no single file shows: who imports whom, and what is never used."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "mlx_lora"
FILES = sorted(PACKAGE.rglob("*.py"))
TREES = {f: ast.parse(f.read_text(encoding="utf-8"), str(f)) for f in FILES}

LAYERS = [  # each may import from its own row and from those above it
    ["errors"],
    ["types", "registry", "yamlfile", "platform"],
    ["blocks", "problems", "rewards"],
    ["schema", "conflicts", "config", "tasks"],
    [
        "cpu",
        "cpu_threads",
        "cpu_math",
        "cpu_layers",
        "cpu_attention",
        "cpu_block",
        "cpu_step",
        "cpu_pass",
        "cpu_head",
        "cpu_spline",
        "footprint",
        "models",
        "bases",
        "distributed",
        "data",
        "formats",
        "sources",
        "batches",
        "packing",
        "numerics",
        "recompute",
        "sampling",
        "caches",
        "decode",
        "generate",
        "adapter",
        "runlog",
        "progress",
        "tracking",
        "optimizers",
    ],
    ["check", "spectral"],
    ["rl", "sft"],
    ["ship"],
    [
        "memory",
        "curves",
        "exam",
        "prepare",
        "recorder",
        "guard",
        "contest",
        "unsupported",
        "lessons",
    ],
    ["report"],
    ["experiment", "stages", "testset"],
    [
        "doctor",
        "recipes",
        "listing",
        "plan",
        "show",
        "advise",
        "advise_trained",
        "cli",
        "cli_ship",
        "cli_spectral",
        "__init__",
        "__main__",
    ],
]
LEVEL = {unit: level for level, row in enumerate(LAYERS) for unit in row}
LIGHT = ["__init__", "__main__", "cli", "config", "registry", "errors"]
HEAVY = {"mlx_lm", "transformers", "matplotlib"}


def name_of(file: Path) -> str:
    """mlx_lora/rl/losses.py -> rl.losses; a folder's __init__.py is the folder."""
    parts = file.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)


MODULES = {name_of(f): tree for f, tree in TREES.items()}


def nodes(tree: ast.AST, *, at_import: bool) -> Iterator[ast.AST]:
    """All nodes below; `at_import`: only those that run when the file is imported."""
    for child in ast.iter_child_nodes(tree):
        if at_import and isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if at_import and isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
            continue
        yield child
        yield from nodes(child, at_import=at_import)


def imports(name: str, *, at_import: bool = False) -> set[str]:
    """What a module imports: our own as `rl.losses`, others by their full dotted name."""
    found = set()
    for node in nodes(MODULES[name], at_import=at_import):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{name}: write imports out in full (from mlx_lora.x import y)"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {ours(full) or full for full in found}


def ours(full: str) -> str | None:
    """mlx_lora.rl.losses.grpo -> rl.losses, the longest part that is a module of ours."""
    package, _, rest = full.partition(".")
    while package == "mlx_lora" and rest and rest not in MODULES:
        rest = rest.rpartition(".")[0]
    return (rest or "__init__") if package == "mlx_lora" else None


def calls() -> Iterator[tuple[str, ast.Call, str]]:
    """(file:line, call, dotted name of what is called) of every call in the package."""
    for file, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                where = f"{file.relative_to(ROOT)}:{node.lineno}"
                yield where, node, ast.unparse(node.func)


def test_there_is_something_to_test():
    assert {"errors", "registry", "tasks.countdown"} <= MODULES.keys()


def test_every_module_has_a_layer():
    missing = {name.split(".")[0] for name in MODULES} - LEVEL.keys()
    assert not missing, f"give {sorted(missing)} a row in LAYERS"


def test_imports_point_one_way():
    def level(name: str) -> int:
        return LEVEL.get(name.split(".")[0], 0)

    pairs = [(a, b) for a in MODULES for b in imports(a) & MODULES.keys() - {"__init__"}]
    upward = [f"{a} imports {b}, which is above it" for a, b in pairs if level(b) > level(a)]
    assert not upward


def test_no_import_circles():
    below = {name: imports(name, at_import=True) & MODULES.keys() for name in MODULES}
    while leaves := [name for name, wanted in below.items() if not wanted & below.keys() - {name}]:
        below = {name: wanted for name, wanted in below.items() if name not in leaves}
    assert not below, f"these import each other: {sorted(below)}"


@pytest.mark.parametrize("name", [name for name in LIGHT if name in MODULES])
def test_light_modules_load_nothing_heavy(name):
    seen, todo = set(), [name]
    while todo:
        current = todo.pop()
        seen.add(current)
        parents = {current.rpartition(".")[0]} & MODULES.keys()  # a folder's __init__ runs first
        wanted = imports(current, at_import=True) | parents
        loaded = {full for full in wanted - MODULES.keys() if full.split(".")[0] in HEAVY}
        assert not loaded, f"importing {name} loads {loaded}, through {current}"
        todo += wanted & MODULES.keys() - seen


def test_readme_shows_every_file():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    names = [f.name for f in FILES if f.name not in ("__init__.py", "__main__.py")]
    shown = re.findall(r"\w+\.py\b", readme)
    missing = sorted({name for name in names if shown.count(name) < names.count(name)})
    assert not missing, f"README's tree does not mention {missing}"


def test_names_say_what_is_inside():
    vague = {"utils", "util", "helpers", "common", "misc"}
    assert not [f for f in FILES if vague & {*f.relative_to(PACKAGE).with_suffix("").parts}]


def test_nothing_runs_text_as_code():
    forbidden = r"(builtins\.)?(eval|exec|compile|__import__)|os\.(system|popen)"
    unsafe = r"yaml\.((unsafe|full)_)?load(_all)?"  # a loader built on SafeLoader is called itself
    bad = [f"{at} {name}" for at, _, name in calls() if re.fullmatch(f"{forbidden}|{unsafe}", name)]
    for at, call, name in calls():
        given = {f"{k.arg}={ast.unparse(k.value)}" for k in call.keywords}
        bad += [f"{at} {name}({risk})" for risk in given & {"shell=True", "allow_pickle=True"}]
    for name in MODULES:
        risky = {full.split(".")[0] for full in imports(name)} & {"pickle", "dill", "marshal"}
        bad += [f"{name} imports {root}" for root in risky]
    assert not bad


def test_functions_fit_a_screen():
    functions = [
        (f"{file.relative_to(ROOT)}:{node.lineno} {node.name}", node.end_lineno - node.lineno + 1)
        for file, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno
    ]
    assert not [f"{where}: {lines} lines" for where, lines in functions if lines > 80]


def test_files_stay_readable():
    lines = {f.relative_to(ROOT): len(f.read_text(encoding="utf-8").splitlines()) for f in FILES}
    assert not {str(file): count for file, count in lines.items() if count > 400}
