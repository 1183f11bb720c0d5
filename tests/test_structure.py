"""The record and its replay: a pruned model is the same in a fresh process, however it is loaded, and says what is wrong.

Fresh processes import torch and transformers, which takes seconds, so one process loads all models.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from made import CHANCE, FEW, METHODS, pruned, save
from safetensors.torch import load_file
from tiny import (
    ROWS,
    auto_of,
    batches,
    checkpoint_activations,
    data_of,
    outputs,
    tiny,
)
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification

from optimum_stat.families import find_groups
from optimum_stat.structure import describe, install, replay

EACH_FAMILY = pytest.mark.parametrize("family", ROWS)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every family cut by chance, and a few by a method."""
    root = tmp_path_factory.mktemp("saved")
    for family, method in IN_EVERY_RUN:
        save(family, method, root)
    return root


# What a fresh process does; this file cannot run there, because it imports the package.
LOOK = """
import json, sys
import torch, transformers
from pathlib import Path
from safetensors.torch import load_file
root = Path(sys.argv[1])
sys.path.insert(0, sys.argv[2])
from tiny import auto_of, data_of, outputs
torch.set_num_threads(1)

def look(model, family):
    wanted = load_file(root / f"{family}.safetensors")["outputs"]
    own = data_of(family.split(" by ")[0])[0]
    return torch.equal(outputs(model, own), wanted), type(model).__module__.split(".")[0]

found = {}
for family in json.loads(sys.argv[3]):
    auto = auto_of(family.split(" by ")[0])
    folder, again = root / family, root / "again" / family
"""
WITH_THE_PACKAGE = f"""
import optimum_stat
{LOOK}
    found[family] = look(auto.from_pretrained(folder), family)
print(json.dumps(found))
"""
WITHOUT_THE_PACKAGE = f"""
import sys

class NotInstalled:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "optimum_stat":
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, NotInstalled())
{LOOK}
    try:
        refused = look(auto.from_pretrained(folder), family)
    except RuntimeError as error:
        refused = str(error)
    model = auto.from_pretrained(folder, trust_remote_code=True)
    model.save_pretrained(again)
    base = transformers.AutoModel.from_pretrained(folder, trust_remote_code=True)
    saved_again = auto.from_pretrained(again, trust_remote_code=True)
    found[family] = {{
        "refused": refused,
        "loaded": look(model, family),
        "saved again": look(saved_again, family),
        "base": type(base).__module__.split(".")[0],
    }}
assert "optimum_stat" not in sys.modules
print(json.dumps(found))
"""


def in_fresh_process(code: str, root: Path, home: Path, names: list[str]) -> Any:
    """What it finds of the models of these names in `root`."""
    environ = {**os.environ, "HF_HOME": str(home)}
    command = [sys.executable, "-c", code, str(root), str(Path(__file__).parent), json.dumps(names)]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


IN_EVERY_RUN = [*((family, CHANCE) for family in ROWS), *zip(FEW, 2 * list(METHODS), strict=True)]
LONG = [pytest.mark.full, pytest.mark.timeout(900)]


def folders(method: str, saved: Path, tmp_path: Path) -> tuple[Path, list[str]]:
    """The folder and names of IN_EVERY_RUN, or of every family pruned by `method`."""
    root = saved
    if method != CHANCE:
        root = tmp_path
        for family in ROWS:
            save(family, method, root)
    names = sorted(path.stem for path in root.glob("*.safetensors"))
    assert len(names) == len(IN_EVERY_RUN if method == CHANCE else ROWS)
    return root, names


@pytest.mark.parametrize("method", [CHANCE, *(pytest.param(method, marks=LONG) for method in METHODS)])
def test_a_fresh_process_with_the_package_loads_every_family_bit_for_bit(method: str, saved: Path, tmp_path: Path):
    root, names = folders(method, saved, tmp_path)
    assert in_fresh_process(WITH_THE_PACKAGE, root, tmp_path, names) == {name: [True, "transformers"] for name in names}


@pytest.mark.parametrize(
    ("method", "every"),
    [(CHANCE, 3), *(pytest.param(method, 1, marks=LONG) for method in (CHANCE, *METHODS))],
)
def test_a_fresh_process_without_the_package_needs_remote_code_and_then_loads_bit_for_bit(
    method: str, every: int, saved: Path, tmp_path: Path
):
    root, names = folders(method, saved, tmp_path)
    names = names[::every]  # the loader is the package's own code, which loads them all in every run
    found = in_fresh_process(WITHOUT_THE_PACKAGE, root, tmp_path, names)
    assert list(found) == names
    for family, seen in found.items():
        assert "ignore_mismatched_sizes" in seen.pop("refused"), family
        remote = "transformers_modules"
        assert seen == {"loaded": [True, remote], "saved again": [True, remote], "base": remote}, family


def test_the_package_s_own_class_is_saved_without_a_loader_that_is_not_there(saved: Path, tmp_path: Path):
    auto_of("bert").from_pretrained(saved / "bert").save_pretrained(tmp_path / "again")
    assert "auto_map" not in json.loads((tmp_path / "again" / "config.json").read_text())
    again = auto_of("bert").from_pretrained(tmp_path / "again")
    assert torch.equal(outputs(again, data_of("bert")[0]), load_file(saved / "bert.safetensors")["outputs"])


@EACH_FAMILY
def test_the_record_says_what_the_model_is(family: str):
    model = pruned(family)
    record, groups = model.config.stat_pruning, find_groups(model)
    assert record["format"] == 1
    heads = [group for group in groups if group.structure == "heads"]
    assert record["neurons"] == [group.units for group in groups if group.structure == "neurons"]
    assert record["key_value_heads"] == [1 if group.shares_key_value else group.units for group in heads]
    assert record["heads"] == [group.units * group.query_heads for group in heads]
    assert record == json.loads(json.dumps(record)) == describe(model)


def shapes(model: Any) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


@EACH_FAMILY
def test_every_way_to_build_a_model_builds_it_small(family: str, saved: Path):
    model = pruned(family)
    config = AutoConfig.from_pretrained(saved / family)
    built = [auto_of(family).from_config(copy.deepcopy(config)), type(model)(copy.deepcopy(config))]
    with torch.device("meta"):
        built.append(type(model)(copy.deepcopy(config)))
    assert all(shapes(each) == shapes(model) for each in built)
    base = AutoModel.from_pretrained(saved / family)
    inner = {name: value for name, value in model.base_model.state_dict().items() if not name.startswith(("pooler", "lm_head"))}
    assert all(torch.equal(base.state_dict()[name], value) for name, value in inner.items())
    # one classification head warns about nothing, but has other names; that of another shares names with the masked language
    # model's, whose tied output makes it narrow; some families have none
    if family not in ("distilbert", "modernbert") and type(config) in AutoModelForSequenceClassification._model_mapping:
        head = AutoModelForSequenceClassification.from_pretrained(saved / family)
        assert describe(head) == describe(model)


@EACH_FAMILY
def test_replaying_twice_does_nothing(family: str):
    model = pruned(family)
    before = dict(model.named_parameters())
    replay(model)
    install()
    assert all(value is before[name] for name, value in model.named_parameters())


def test_a_dense_model_is_not_touched():
    model = tiny("bert")
    replay(model)
    assert describe(model)["heads"] == [4, 4]


@EACH_FAMILY
def test_deepcopy_and_torch_save(family: str, tmp_path: Path):
    model = pruned(family)
    wanted = outputs(model, data_of(family)[0])
    others = [copy.deepcopy(model)]
    if "wav2vec2" not in family:  # parametrized: torch does not save the dense model either
        torch.save(model, tmp_path / "model.pt")
        others.append(torch.load(tmp_path / "model.pt", weights_only=False))
    for other in others:
        assert torch.equal(outputs(other, data_of(family)[0]), wanted)


def test_training_with_gradient_checkpointing_equals_training_without():
    gradients = []
    for checkpointed in (False, True):
        model = pruned("llama").train()
        if checkpointed:
            checkpoint_activations(model)
        model(**batches()[0], labels=batches()[0]["input_ids"]).loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


def set_record(name: str, value: object) -> Callable[[dict[str, Any]], None]:
    return lambda config: config["stat_pruning"].update({name: value})


NEURONS = r"records {} units for 1\.neurons; the dense model has 44, so it must lie between 1 and 44"
EDITS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "newer format": (set_record("format", 2), "has format 2; this optimum-stat reads format 1"),
    "format as text": (set_record("format", "1"), "has format '1'; this optimum-stat reads format 1"),
    "no format": (lambda config: config["stat_pruning"].pop("format"), "has format None"),
    "not a mapping": (lambda config: config.update(stat_pruning=[1, 2]), r"has format \[1, 2\]"),
    "an unknown name": (set_record("routers", [4, 4]), "holds routers, which format 1 does not have"),
    "experts where there are none": (set_record("experts", [4, 4]), "records .4, 4. experts; .* has room for no experts"),
    "too many neurons": (set_record("neurons", [8, 45]), NEURONS.format(45)),
    "no neuron": (set_record("neurons", [8, 0]), NEURONS.format(0)),
    "negative": (set_record("neurons", [8, -8]), NEURONS.format(-8)),
    "sizes as text": (set_record("neurons", ["8", "8"]), r"a list of whole numbers for 'neurons'; it holds \['8', '8'\]"),
    "sizes as truth values": (set_record("neurons", [True, 8]), "a list of whole numbers for 'neurons'"),
    "fractions": (set_record("heads", [2.0, 2]), "a list of whole numbers for 'heads'"),
    "one number for all": (set_record("neurons", 8), "a list of whole numbers for 'neurons'; it holds 8"),
    "nothing": (lambda config: config["stat_pruning"].pop("neurons"), "for 'neurons'; it holds None"),
    "too few blocks": (set_record("neurons", [8]), "records neurons for 1 blocks, but the model has 2"),
    "values of another model": (
        set_record("values", [[1]]),
        r"records values as \[\[1\]\]; it must be a list, one entry",
    ),
    "too many values": (set_record("values", [None, [99]]), r"records \[99\] values for 1\.heads; it must be a list of \d whole"),
    "values as text": (set_record("values", [None, "8"]), "records '8' values for"),
    "too many heads": (set_record("key_value_heads", [5, 1]), r"records 5 units for 0\.heads; the dense model has"),
    "heads that contradict": (
        set_record("heads", [1, 7]),
        r"records \[1, 7\] query heads; its key/value heads and the model make",
    ),
    "fewer layers": (
        lambda config: config.update(num_hidden_layers=1),
        r"for 2 blocks, but the model has 1|in the range \[0, 1\)",
    ),
    "more layers": (
        lambda config: config.update(num_hidden_layers=3),
        "for 2 blocks, but the model has 3. Was num_hidden_layers",
    ),
}


KEPT = r"records kept_heads as .*; for this model it must list which of the heads 0 to 3 each block keeps"
EDITS_OF_KEPT_HEADS: dict[str, tuple[str, Callable[[dict[str, Any]], Any], str]] = {
    "not there": ("bloom", lambda config: config["stat_pruning"].pop("kept_heads"), KEPT),
    "one block short": ("bloom", lambda config: config["stat_pruning"]["kept_heads"].pop(), KEPT),
    "one head short": ("bloom", lambda config: config["stat_pruning"]["kept_heads"][0].pop(), KEPT),
    "twice the same": ("bloom", set_record("kept_heads", [[0] * 4] * 2), KEPT),
    "no such head": ("bloom", set_record("kept_heads", [[4], [4]]), KEPT),
    "as text": ("bloom", set_record("kept_heads", [["0"], ["1"]]), KEPT),
    "where none is needed": ("bert", set_record("kept_heads", [[0], [0]]), "for this model it must not be there"),
    "another number of shared heads": (
        "llama, one key head",
        set_record("key_value_heads", [2, 1]),
        r"records \[2, 1\] key/value heads; the model has \[1, 1\]",
    ),
}


@pytest.mark.parametrize("edit", EDITS_OF_KEPT_HEADS)
def test_heads_that_cannot_be_told_apart_are_refused_with_the_reason(edit: str, saved: Path, tmp_path: Path):
    family, change, message = EDITS_OF_KEPT_HEADS[edit]
    folder = shutil.copytree(saved / family, tmp_path / "edited")
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        auto_of(family).from_pretrained(folder)


@pytest.mark.parametrize("family", ["bert", "llama"])
@pytest.mark.parametrize("edit", EDITS)
def test_an_edited_config_is_refused_with_the_reason(family: str, edit: str, saved: Path, tmp_path: Path):
    change, message = EDITS[edit]
    folder = shutil.copytree(saved / family, tmp_path / "edited")
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        auto_of(family).from_pretrained(folder)


def test_smaller_sizes_than_the_weights_are_refused(saved: Path, tmp_path: Path):
    folder = shutil.copytree(saved / "bert", tmp_path / "edited")
    config = json.loads((folder / "config.json").read_text())
    config["stat_pruning"]["neurons"] = [1, 1]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        auto_of("bert").from_pretrained(folder)


@pytest.mark.parametrize(("name", "message"), [("config.json", "not a valid JSON"), ("model.safetensors", "incomplete metadata")])
def test_truncated_files_are_refused(name: str, message: str, saved: Path, tmp_path: Path):
    folder = shutil.copytree(saved / "bert", tmp_path / "cut")
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(Exception, match=message) as caught:
        auto_of("bert").from_pretrained(folder)
    assert type(caught.value).__name__ in ("OSError", "SafetensorError")


def test_missing_weights_are_named(saved: Path, tmp_path: Path):
    folder = shutil.copytree(saved / "bert", tmp_path / "bare")
    (folder / "model.safetensors").unlink()
    with pytest.raises(OSError, match=r"no file named model\.safetensors"):
        auto_of("bert").from_pretrained(folder)


def test_a_record_in_a_family_that_we_do_not_know_is_refused():
    config = transformers.MambaConfig(hidden_size=8, num_hidden_layers=1, vocab_size=9)
    config.stat_pruning = {"format": 1, "heads": [1], "key_value_heads": [1], "neurons": [1]}
    with pytest.raises(ValueError, match="cannot prune 'mamba' models"):
        transformers.MambaModel(config)
