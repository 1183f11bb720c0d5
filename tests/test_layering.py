"""The source, read as text: what may import what, and where model names may stand."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import optimum_stat
from optimum_stat import family_table, remote_code
from optimum_stat.family_table import FAMILIES

PACKAGE = Path(optimum_stat.__file__).parent
LAYERS = (
    {
        "linalg",
        "family_table",
        "few_values",
        "config",
        "autoload",
        "processes",
        "activations",
        "progress",
        "coherence",
        "hub",
        "folders",
        "locks",
    },
    {"experts", "offload", "elimination"},
    {"few_pairs"},
    {"anatomy", "journal"},
    {"blocks", "group"},
    {"head_dimensions"},
    {"families"},
    {"teacher_losses", "labels", "trained_config"},
    {
        "rows",
        "media",
        "media_reader",
        "media_ready",
        "recordings",
        "data",
        "probes",
        "gradients",
        "halted",
        "walk",
        "budget",
        "knapsack",
        "routers",
        "mixtures",
        "slicing",
        "stream",
        "timestamps",
        "trial",
        "narrowing",
        "trunk_costs",
        "parts",
        "structure",
        "latency",
        "latency_cache",
        "latency_timing",
        "memory",
        "timing",
        "speed",
        "currency",
        "block_passes",
        "block_state",
        "calls",
        "correction",
        "device_speed",
        "distillation",
        "semi_structured",
        "training",
        "training_arguments",
        "training_state",
        "training_run",
        "training_data",
        "training_sizes",
    },
    {
        "base_card",
        "sources",
        "loaded",
        "card",
        "plots",
        "recipe",
        "report",
        "remote_code",
        "publishing",
        "calibration",
        "checkpoint",
        "survey",
        "sweep",
        "sweep_report",
        "trunk",
    },
    {"pruner", "teachers"},
    {"trained"},
    {"methods"},
    {
        "commands",
        "command_base",
        "command_data",
        "command_options",
        "command_values",
        "command_plan",
        "command_prune",
        "command_push",
        "command_resume",
        "command_training",
        "comparison",
        "profiling",
        "page",
        "recipe_update",
        "family",
        "command_sweep",
        "dry_run",
        "inspection",
        "run_plan",
        "run_work",
        "evaluation",
        "evaluation_data",
        "evaluation_media",
        "evaluation_text",
        "evaluation_words",
        "scores",
        "squad",
    },
)
"""From the bottom up: a file imports from its own layer or from one below it; the lowest imports nothing of ours."""
FREE = {"__init__", "_wheel"}  # the lazy door to everything, and the one file that installation puts elsewhere
SOURCES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))
NAMES_OF_PARTS = {
    name
    for constant, value in vars(family_table).items()
    if constant[0].isupper() and constant.isupper() and not isinstance(value, dict)
    for name in re.findall(r"[\w.]+", str(value))
}
EVERYDAY = {
    "query",
    "key",
    "value",
    "dense",
    "dim",
    "experts",
    "q",
    "k",
    "v",
    "o",
    "head_dim",
    "num_attention_heads",
    "num_key_value_heads",
}
"""Words of other kinds, too: the last three are what every config calls them."""


def room(source: str) -> str:
    """Whose layer counts: the file's own name, or its folder's."""
    return source.partition("/")[0].removesuffix(".py")


def layer(name: str) -> int:
    found = [i for i, names in enumerate(LAYERS) if name in names]
    assert found, f"{name}.py stands in no layer of tests/test_layering.py: say where it belongs"
    return found[0]


def own_imports(source: str) -> Iterator[tuple[str, int]]:
    """(dotted name below the package, line) of everything of ours that `source` imports for use at run time."""
    tree = ast.parse((PACKAGE / source).read_text())
    for_types = {id(inner) for node in ast.walk(tree) if _type_checking(node) for inner in ast.walk(node)}
    folder = source.split("/")[:-1]
    for node in ast.walk(tree):
        if id(node) in for_types:
            continue
        if isinstance(node, ast.Import):
            yield from (
                (name.name.partition(".")[2], node.lineno) for name in node.names if name.name.startswith("optimum_stat.")
            )
        elif isinstance(node, ast.ImportFrom):
            yield from _imported_from(node, folder)


def _imported_from(node: ast.ImportFrom, folder: list[str]) -> Iterator[tuple[str, int]]:
    if node.level:
        start = folder[: len(folder) - node.level + 1]
        base = ".".join([*start, *([node.module] if node.module else [])])
    elif (node.module or "").split(".")[0] == "optimum_stat":
        base = (node.module or "").partition(".")[2]
    else:
        return
    for name in node.names:
        is_module = (PACKAGE / base.replace(".", "/") / f"{name.name}.py").exists()
        yield (f"{base}.{name.name}".strip(".") if is_module else base), node.lineno


def _type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def test_the_reader_of_imports_finds_them():
    found = {name for name, _ in own_imports("methods/stat.py")}
    assert {"budget", "card", "config", "methods.stat_published", "walk"} <= found
    assert {name for name, _ in own_imports("pruner.py")} >= {"checkpoint", "structure", "slicing"}
    assert "pruner" not in {name for name, _ in own_imports("checkpoint.py")}  # for types only
    assert {name for name, _ in own_imports("data.py")} == {"budget", "config", "labels", "processes", "rows"}


@pytest.mark.parametrize("source", [source for source in SOURCES if room(source) not in FREE])
def test_imports_point_downwards(source: str):
    own = layer(room(source))
    for name, line in own_imports(source):
        target = name.split(".")[0]
        if not target or (source == "autoload.py" and target == "structure"):
            continue  # the package itself; the hook that is imported once transformers is
        where = f"{source}:{line} imports {name}"
        assert own or target == room(source), f"{where}, but imports nothing of ours at the bottom"
        assert layer(target) <= own, f"{where}, against the arrows"


@pytest.mark.parametrize("source", [source for source in SOURCES if source.startswith("methods/") and "__init__" not in source])
def test_methods_do_not_know_each_other(source: str):
    own = Path(source).stem.partition("_")[0]
    for name, line in own_imports(source):
        if name.startswith("methods."):
            assert name.split(".")[1].partition("_")[0] == own, f"{source}:{line} imports {name}"


@pytest.mark.parametrize("source", [source for source in SOURCES if source != "family_table.py"])
def test_model_and_module_names_stand_in_the_table_only(source: str):
    tree = ast.parse((PACKAGE / source).read_text())
    bodies = [getattr(parent, "body", []) for parent in ast.walk(tree)]
    docstrings = {id(node.value) for body in bodies if isinstance(body, list) for node in body if isinstance(node, ast.Expr)}
    forbidden = (set(FAMILIES) | NAMES_OF_PARTS) - EVERYDAY
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            families = any(re.search(rf"\b{name}", node.value, re.I) for name in FAMILIES if name != "opt")
            named = node.value in forbidden or families
            assert not named, f"{source}:{node.lineno} names a model or one of its modules: {node.value!r}"


CORE = [source for source in SOURCES if room(source) not in {*FREE, *LAYERS[-1], *LAYERS[-2]}]


@pytest.mark.parametrize("source", CORE)
def test_the_core_does_not_know_a_method(source: str):
    assert not [name for name, _ in own_imports(source) if name.split(".")[0] == "methods"]


@pytest.mark.parametrize("source", SOURCES)
def test_files_are_short(source: str):
    assert len((PACKAGE / source).read_text().splitlines()) < 300


def test_importing_the_package_or_its_commands_imports_neither_torch_nor_transformers():
    code = "import sys, optimum_stat, optimum_stat.commands; print({'torch', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("set()\n", "")


def test_every_public_name_resolves():
    for name in optimum_stat.__all__:
        assert getattr(optimum_stat, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'Prunner'"):
        _ = optimum_stat.Prunner


def test_the_parts_of_the_remote_code_do_not_shadow_each_other():
    """They stand in one file there."""
    trees = [ast.parse((PACKAGE / part).read_text()) for part in remote_code.PARTS]
    names = [node.name for tree in trees for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    assigned = [target for tree in trees for node in tree.body if isinstance(node, ast.Assign) for target in node.targets]
    names += [name.id for target in assigned for name in ast.walk(target) if isinstance(name, ast.Name)]
    assert sorted(names) == sorted(set(names))
