"""Every bad input has its own message, and leaves the caller's model, folders and disk as they were."""

from __future__ import annotations

import logging
import os
import resource
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, DatasetDict
from test_checkpoint import tokenizer
from tiny import batches, many, outputs, tiny
from torch import Tensor
from torch.nn.utils import parametrizations, prune
from transformers import PreTrainedModel

from optimum_stat import FisherConfig, STATConfig, STATPruner
from optimum_stat.families import check_finite, find_blocks, find_groups

TEXT = ["w5 w6 w7 w8 w9"] * 8


def state(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def refuse(
    message: str, data: Any, model: PreTrainedModel | None = None, error: type[Exception] = ValueError, **options: Any
) -> None:
    """`prune` raises `error` with `message`, and the model is as it was: weights, shapes, config, predictions."""
    model = tiny("bert") if model is None else model
    before, config, parameters = state(model), model.config.to_dict(), list(map(id, model.parameters()))
    columns = options.pop("text_columns", None)
    words = options.pop("tokenizer", None)
    pruner = STATPruner.from_pretrained(model, STATConfig(**{"keep": 0.6, **options}), tokenizer=words)
    with pytest.raises(error, match=message):
        pruner.prune(data, text_columns=columns)
    after = model.state_dict()
    assert all(torch.equal(after[name], value) or value.isnan().any() for name, value in before.items())
    assert after.keys() == before.keys()
    assert list(map(id, model.parameters())) == parameters
    assert model.config.to_dict() == config
    with pytest.raises(RuntimeError, match=r"no report yet: call prune\(dataset\) first"):
        _ = pruner.report


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": 0}, r"keep=0 asked; .* must lie in \(0, 1\]"),
        ({"keep": -0.5}, "keep=-0.5 asked"),
        ({"keep": "0.5"}, "keep=0.5 asked"),
        ({"structures": "heads"}, "structures='heads' asked; it must be a tuple of names"),
        ({"keep": 1.5}, "keep=1.5 asked"),
        ({"keep": float("nan")}, "keep=nan asked"),
        ({"budget": "seconds"}, "budget='seconds' asked; it must be one of 'params', 'macs'"),
        ({"round_to": 0}, "round_to=0 asked; it must be a whole number of at least 1"),
        ({"round_to": None}, "round_to=None asked; it must be a whole number of at least 1"),
        ({"batch_size": None}, "batch_size=None asked; it must be a whole number of at least 1"),
        ({"batch_size": -1}, "batch_size=-1 asked"),
        ({"seq_len": 2.5}, "seq_len=2.5 asked"),
        ({"num_tokens": 0}, "num_tokens=0 asked"),
        ({"max_examples": "many"}, "max_examples='many' asked"),
        ({"metric": "best"}, "metric='best' asked; it must be one of 'stream', 'fisher'"),
        ({"ridge": -1.0}, "ridge=-1.0 asked"),
        ({"ridge": 1.0}, "ridge=1.0 asked"),
    ],
)
def test_settings_that_no_run_could_honour(options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        STATConfig(**options)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, from inside its compiler
def test_models_with_adapters_and_compiled_ones():
    peft = pytest.importorskip("peft")
    dense = tiny("llama", "CausalLM")
    adapted = peft.get_peft_model(dense, peft.LoraConfig(target_modules=["q_proj"]))
    for model in (adapted, dense):  # the adapters are in both
        with pytest.raises(ValueError, match=r"has adapters .*: merge them first"):
            STATPruner.from_pretrained(model, STATConfig())
    STATPruner.from_pretrained(adapted.merge_and_unload(), STATConfig(keep=0.6)).prune(batches())
    with pytest.raises(ValueError, match="compiled model was passed: pass the one that was compiled"):
        STATPruner.from_pretrained(torch.compile(tiny("bert")), STATConfig())
    parts = tiny("bert"), tiny("llama")
    parts[0].base_model.encoder = torch.compile(parts[0].base_model.encoder)
    find_blocks(parts[1])[1].compile()
    for model in parts:
        with pytest.raises(ValueError, match="a part of the model, is compiled"):
            STATPruner.from_pretrained(model, STATConfig())


def test_weights_that_are_computed_from_others():
    for change in (parametrizations.weight_norm, partial(prune.identity, name="weight")):
        model = tiny("llama")
        change(find_groups(model)[1].consumer)
        with pytest.raises(ValueError, match=r"The weight of .*0\.mlp\.down_proj is computed from others"):
            STATPruner.from_pretrained(model)


def test_a_configuration_of_another_method():
    for config, name in ((FisherConfig(), "FisherConfig"), ({"keep": 0.5}, "dict")):
        with pytest.raises(TypeError, match=f"config is a {name}; a STATPruner takes a STATConfig"):
            STATPruner.from_pretrained(tiny("bert"), config)


def test_a_head_that_predicts_something_unknown():
    class Odd(type(tiny("bert", ""))):
        def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
            return {"scores": super().forward(*args, **kwargs).last_hidden_state}

    refuse("The model returns scores; what it predicts is sought in logits", many(), Odd(tiny("bert", "").config).eval())


def test_unknown_settings():
    with pytest.raises(ValueError, match="STATConfig has no field sparsity; it has keep, budget,"):
        STATConfig.from_dict({"sparsity": 0.5})


def test_a_family_that_is_not_known():
    from transformers import XLNetConfig, XLNetLMHeadModel

    model = XLNetLMHeadModel(XLNetConfig(vocab_size=9, d_model=8, d_inner=8, n_layer=1, n_head=2))
    with pytest.raises(ValueError, match=r"cannot prune 'xlnet' models .* It knows albert, apertus, .* whisper"):
        STATPruner.from_pretrained(model)


def test_what_is_no_model():
    with pytest.raises(ValueError, match=r"cannot prune None models \(Linear\)"):
        STATPruner.from_pretrained(torch.nn.Linear(2, 2))


@pytest.mark.parametrize("budget", ["params", "macs"])
@pytest.mark.parametrize("make", [STATConfig, STATConfig.paper])
def test_a_budget_that_no_plan_can_reach(budget: str, make: Callable[..., STATConfig]):
    model = tiny("bert")
    before = state(model)
    with pytest.raises(
        ValueError, match=rf"keep=0.01 of [\d,]+ {budget} asked, but one head and \d neurons? .* already make 0\.\d+"
    ):
        STATPruner.from_pretrained(model, make(keep=0.01, budget=budget)).prune(batches())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_least_that_is_named_can_be_asked_for():
    """The number in the message is the smallest keep that works."""
    with pytest.raises(ValueError, match="already make") as caught:
        STATPruner.from_pretrained(tiny("bert"), STATConfig(keep=0.01)).prune(batches())
    least = float(str(caught.value).split("already make ")[1].split()[0].rstrip("."))
    pruner = STATPruner.from_pretrained(tiny("bert"), STATConfig(keep=least + 1e-4))
    pruner.prune(batches())
    assert [group.kept for group in pruner.report.groups] == [1, 8, 1, 8]


DATA: dict[str, tuple[Any, str, type[Exception], dict[str, Any]]] = {
    "an empty list": ([], "dataset is empty: it has no rows", ValueError, {}),
    "an empty dataset": (Dataset.from_dict({"text": []}), "dataset is empty", ValueError, {"tokenizer": tokenizer()}),
    "empty strings": (["", " "], "no tokens to calibrate on: 2 rows read", ValueError, {"tokenizer": tokenizer()}),
    "only padding": (
        [{"input_ids": torch.ones(2, 4, dtype=torch.long), "attention_mask": torch.zeros(2, 4)}],
        "no tokens",
        ValueError,
        {},
    ),
    "all splits": (DatasetDict(train=Dataset.from_dict({"text": TEXT})), r"several splits: 'train'. Pass one", ValueError, {}),
    "wrong columns": (
        Dataset.from_dict({"label": [1, 2]}),
        r"No text column recognised. Columns: label \(int64\)",
        ValueError,
        {},
    ),
    "missing columns": (
        Dataset.from_dict({"text": TEXT}),
        r"text_columns=\('review',\) asked, but there is no column 'review'. Columns: text \(string\)",
        ValueError,
        {"text_columns": ["review"], "tokenizer": tokenizer()},
    ),
    "text without a tokenizer": (TEXT, "raw text and there is no tokenizer", ValueError, {}),
    "foreign ids": ([{"input_ids": [5, 66, 67]}], "Token id 67 found, but the model's vocabulary has 67 tokens", ValueError, {}),
    "negative ids": ([{"input_ids": [5, -1]}], "Token id -1 found", ValueError, {}),
    "too long a batch": (
        [{"input_ids": torch.full((1, 65), 5)}],
        "has 65 tokens, but the model takes at most 64",
        ValueError,
        {},
    ),
    "too long a wish": (
        TEXT,
        "seq_len=65 asked, but the model takes at most 64 tokens",
        ValueError,
        {"seq_len": 65, "tokenizer": tokenizer()},
    ),
    "one string": ("some text", "The dataset is a str, not a collection of examples", TypeError, {}),
    "a number": (3, "The dataset is a int, not a collection", TypeError, {}),
    "floats": ([{"input_ids": torch.rand(2, 3)}], "expected integers of one shape", ValueError, {}),
}


@pytest.mark.parametrize("case", DATA)
def test_data_that_cannot_be_used(case: str):
    data, message, error, options = DATA[case]
    refuse(message, data, error=error, **options)


def test_a_tokenizer_that_does_not_match():
    words = tokenizer()
    words.add_tokens([f"new{i}" for i in range(20)])
    refuse("Token id 7[0-9] found, but .* 67 tokens: the tokenizer does not match", ["new15 new16 " * 9], tokenizer=words)


@pytest.mark.parametrize("family", ["bert", "llama"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_broken_weights(family: str, value: float):
    model = tiny(family)
    name, weight = list(model.named_parameters())[7]
    with torch.no_grad():
        weight.view(-1)[3] = value
    refuse(f"{name} holds NaN or infinite values", batches(), model)


def test_weights_without_entries_are_not_broken():
    model = tiny("bert")
    model.nothing = torch.nn.Parameter(torch.empty(0))
    check_finite(model)


@pytest.mark.parametrize("metric", ["stream", "fisher"])
@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("0.heads", "enter 0.neurons|what block 0 gives"),
        ("0.neurons", "enter 1.heads|block 0 gives"),
        ("1.neurons", "block 1 gives"),
    ],
)
def test_activations_that_overflow(metric: str, where: str, message: str):
    """Finite weights, infinite results: the last block's too, which no later block would notice."""
    model = tiny("llama")
    group = next(group for group in find_groups(model) if group.name == where)
    with torch.no_grad():
        group.consumer.weight.fill_(3e38)
    refuse(f"(?i)({message}|gradient at .*) (is|are) NaN or infinite.*dtype", batches(), model, metric=metric)


def test_logits_that_overflow():
    model = tiny("llama")
    with torch.no_grad():
        model.lm_head.weight.fill_(3e38)
    refuse(r"gradient at 0\.heads is NaN or infinite", batches(), model, metric="fisher")


def test_few_tokens_are_warned_of_with_the_number(caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.WARNING, "optimum_stat"):
        pruner = STATPruner.from_pretrained(tiny("bert"), STATConfig(keep=0.6))
        pruner.prune(batches())
    widest = max(8 * group.kept if "heads" in group.name else group.kept for group in pruner.report.groups)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert f"48 calibration tokens for up to {widest} kept columns are {48 / widest:.1f} tokens each" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING, "optimum_stat"):
        STATPruner.from_pretrained(tiny("bert"), STATConfig(keep=0.6)).prune(many())
    assert caplog.text == ""


def test_quantized_models():
    model = tiny("llama")
    model.config.quantization_config = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    with pytest.raises(ValueError, match=r"are quantized .* prune it, then quantize the pruned model"):
        STATPruner.from_pretrained(model)
    model = tiny("llama")
    model.is_quantized, model.quantization_method = True, "gptq"
    with pytest.raises(ValueError, match=r"are quantized \(gptq\)"):
        STATPruner.from_pretrained(model)


# ---- what happens to folders and to the disk


@pytest.fixture(scope="module")
def pruner() -> STATPruner:
    pruner = STATPruner.from_pretrained(tiny("llama"), STATConfig(keep=0.6))
    pruner.prune(batches())
    return pruner


def listing(folder: Path) -> dict[str, bytes | None]:
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


@pytest.fixture
def unharmed(pruner: STATPruner, tmp_path: Path) -> Iterator[Path]:
    """A folder with something in it; afterwards it and the model are as they were."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    (tmp_path / "file").write_text("a file")
    before, disk = outputs(pruner.model, batches()[0]), listing(tmp_path)
    yield tmp_path
    assert listing(tmp_path) == disk
    assert torch.equal(outputs(pruner.model, batches()[0]), before)
    assert "auto_map" not in pruner.model.config.to_dict()


@pytest.mark.parametrize("name", ["mine", "file", "mine/", "mine/../mine"])
def test_what_exists_is_not_overwritten(name: str, pruner: STATPruner, unharmed: Path):
    with pytest.raises(FileExistsError, match=r"exists and is not an empty folder; nothing was written\. Choose another place"):
        pruner.save_pretrained(unharmed / name)


def test_a_link_that_leads_nowhere(pruner: STATPruner, unharmed: Path):
    (unharmed / "loop").symlink_to("loop")
    with pytest.raises(FileExistsError, match=r"loop exists and is not an empty folder; nothing was written"):
        pruner.save_pretrained(unharmed / "loop")
    (unharmed / "loop").unlink()


def test_a_file_where_a_folder_should_be(pruner: STATPruner, unharmed: Path):
    with pytest.raises(OSError, match=r"Nothing was written to .*file/inside"):
        pruner.save_pretrained(unharmed / "file" / "inside")


def test_an_option_that_transformers_refuses(pruner: STATPruner, unharmed: Path):
    with pytest.raises(ValueError, match="huge"):
        pruner.save_pretrained(unharmed / "new" / "deep" / "pruned", max_shard_size="huge")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_no_permission(pruner: STATPruner, unharmed: Path):
    (unharmed / "mine").chmod(0o555)
    with pytest.raises(OSError, match="Permission denied"):
        pruner.save_pretrained(unharmed / "mine" / "pruned")
    (unharmed / "mine").chmod(0o755)


def test_where_nobody_can_write(pruner: STATPruner):
    if not Path("/proc/self").exists():
        pytest.skip("no /proc here")
    with pytest.raises(OSError, match="Nothing was written to /proc/pruned, and the model in memory is unharmed"):
        pruner.save_pretrained("/proc/pruned")


@pytest.mark.parametrize("limit", [0, 2_000, 30_000])
def test_a_full_disk(limit: int, pruner: STATPruner, unharmed: Path):
    """The kernel stops every file at `limit` bytes: at the first byte, in the config, or in the middle of the weights."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))  # Python ignores the signal that comes with it
    try:
        with pytest.raises(OSError, match=r"Nothing was written to .*, and the model in memory is unharmed: ") as caught:
            pruner.save_pretrained(unharmed / "new" / "pruned")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "Make room or choose another place" in str(caught.value)
    assert caught.value.__cause__ is not None
