"""The table: every family x every method that needs no training, and models cut by chance x what must hold of a pruned model.

A family is a row of `tiny.py`. Where something cannot hold, `CANNOT` says why, and the test proves it on the dense model. What
fresh processes load stands in `test_structure.py`, which starts one for all rows.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from made import CHANCE, FEW, METHODS, made, made_once
from test_slicing import masked
from tiny import DECODERS, MIXTURES, ROWS, SEQUENCES, accepted, data_of, outputs, predicted, tiny

from optimum_stat.experts import opened
from optimum_stat.families import FAMILIES, Group, find_blocks, find_groups, weight
from optimum_stat.slicing import consumer_columns, producer_rows

STATIC: dict[str, Any] = {"cache_implementation": "static", "disable_compile": True}


@dataclass(frozen=True)
class Build:
    """Makes copies of a model of the family that `method` has pruned; None: of the dense one."""

    family: str
    method: str | None = None

    def __call__(self, *, whole: bool = False) -> Any:
        """Another one; `whole`: with heads that are not divided."""
        return tiny(self.family) if self.method is None else made(self.family, self.method, whole=whole)


def sizes_differ_in_every_layer(build: Build, family: str, folder: Path) -> None:
    """No two blocks of a stack have as many heads, or as many neurons."""
    sizes: dict[tuple[int, str], dict[int, list[int]]] = {}
    for group in find_groups(build()):
        sizes.setdefault((group.stack, group.structure), {}).setdefault(group.block, []).append(group.units)
    for blocks in sizes.values():
        assert len({tuple(units) for units in blocks.values()}) == len(blocks) > 1


def equals_the_masked_dense_model(build: Build, family: str, folder: Path) -> None:
    """Its weights, put where they came from in the dense model, and what is gone reading as zero: the same predictions."""
    assert build.method is not None
    model, dense, plan = build(), tiny(family), made_once(family, build.method).plan
    paths = {module: path for path, module in dense.named_modules()}
    with torch.no_grad(), opened(model), opened(dense):
        for small, large in zip(find_groups(model), find_groups(dense), strict=True):
            # not the small one's own list: of a single head that is left, a norm is as wide as one that all heads share
            vectors = [getattr(model.get_submodule(paths[module]), name) for module, name in large.vectors]
            put_back(small, vectors, large, plan[large.name])
    for batch in data_of(family)[:2]:
        torch.testing.assert_close(masked(dense, plan, batch), outputs(model, batch), atol=5e-4, rtol=1e-3)


def put_back(small: Group, vectors: list[torch.Tensor], large: Group, keep: torch.Tensor) -> None:
    for own, other in zip(small.producers, large.producers, strict=True):
        out = len(weight(other.linear))
        rows = torch.cat([producer_rows(large, other, keep), torch.arange(out - other.fixed, out)]) if other.fixed < out else ...
        gone = torch.ones(out, dtype=torch.bool)
        gone[rows] = False
        if large.inexact:  # a norm over all heads: those that are gone do not count
            weight(other.linear)[gone] = 0
        weight(other.linear)[rows] = weight(own.linear)
        if other.linear.bias is not None:
            other.linear.bias[rows] = own.linear.bias
    weight(large.consumer)[:, consumer_columns(large, keep)] = weight(small.consumer)
    if large.consumer.bias is not None:
        large.consumer.bias.copy_(small.consumer.bias)
    for value, (module, name) in zip(vectors, large.vectors, strict=True):
        if large.inexact:  # its mean is over all heads' dimensions, of which fewer are left
            value = value * (small.units / large.units) ** 0.5
            module.variance_epsilon *= small.units / large.units
        shares = getattr(module, name).view(large.units, -1, *value.shape[1:])
        shares[keep] = value.view(small.units, *shares.shape[1:])


def per_layer_config_agrees(build: Build, family: str, folder: Path) -> None:
    """What the saved config says of each layer's cache, of which transformers plans static ones, is what the layer makes."""
    model, dense = build(), tiny(family)
    model.save_pretrained(folder)
    config = type(model.config).from_pretrained(folder)
    own = [group for group in find_groups(model) if group.structure == "heads"]
    cached = [group.units * group.query_heads if "falcon" in family else group.key_value_heads for group in own]
    layers = list(config.per_layer_config)
    assert [getattr(layer, "num_key_value_heads", None) or layer.num_attention_heads for layer in layers] == cached
    assert {layer.head_dim for layer in layers} == {group.width // group.query_heads for group in own}
    assert config.num_attention_heads == dense.config.num_attention_heads
    names = FAMILIES[family.split(",")[0]].per_layer_config
    assert names is not None
    if names[2]:
        neurons = [group.units for group in find_groups(model) if group.structure == "neurons"]
        assert [getattr(layer, names[2]) for layer in layers] == neurons
        assert getattr(config, names[2]) == getattr(dense.config, names[2])


def generates_with_a_dynamic_cache(build: Build, family: str, folder: Path) -> None:
    """What it generates without any."""
    check_cache(build(), family, {})


def generates_with_a_static_cache(build: Build, family: str, folder: Path) -> None:
    """The same."""
    check_cache(build(), family, STATIC)


def generates_with_a_static_cache_in_chunks(build: Build, family: str, folder: Path) -> None:
    """The same, where the cache is made beforehand and filled a few tokens at a time."""
    check_cache(build(), family, {**STATIC, "prefill_chunk_size": 4})


@torch.no_grad()
def check_cache(model: Any, family: str, cache: dict[str, Any]) -> None:
    model.config.use_cache = True
    prompt = {"input_ids": torch.arange(3, 14)[None], "attention_mask": torch.ones(1, 11, dtype=torch.long)}
    if family == "whisper":
        prompt = {"input_features": data_of(family)[0]["input_features"][:1]}
    asked = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "output_scores": True, "return_dict_in_generate": True}
    plain, cached = (model.generate(**prompt, **asked, **given) for given in ({"use_cache": False}, cache))
    assert torch.equal(cached.sequences, plain.sequences)
    assert all(torch.allclose(a, b, atol=1e-4, rtol=1e-4) for a, b in zip(cached.scores, plain.scores, strict=True))


@torch.no_grad()
def compiles_in_one_graph(build: Build, family: str, folder: Path) -> None:
    """By torch.compile."""
    torch._dynamo.reset()
    model, inputs = build(), accepted(build(), data_of(family)[0])
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(predicted(compiled(**inputs)), predicted(model(**inputs)), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def exports(build: Build, family: str, folder: Path) -> None:
    """By torch.export."""
    model = build()
    for module in model.modules():  # an encoder-decoder's two sides have configs of their own; caches cannot be exported
        if getattr(getattr(module, "config", None), "use_cache", None):
            module.config.use_cache = False
    inputs = accepted(model, data_of(family)[0])
    exported = torch.export.export(model, (), inputs, strict=False).module()
    torch.testing.assert_close(predicted(exported(**inputs)), predicted(model(**inputs)), atol=1e-4, rtol=1e-4)


def runs_in_half_precision(build: Build, family: str, folder: Path) -> None:
    """Loaded in bfloat16, it is the model in memory in bfloat16, bit for bit, and close to what it was."""
    model = build()
    model.save_pretrained(folder)
    loaded = type(model).from_pretrained(folder, dtype=torch.bfloat16)
    assert torch.bfloat16 in {parameter.dtype for parameter in loaded.parameters()}
    exact = outputs(model, data_of(family)[0])
    for own, other in zip(model.parameters(), loaded.parameters(), strict=True):
        own.data = own.data.to(other.dtype)  # not .bfloat16(), which rounds the rotary frequencies too
    found = outputs(loaded, data_of(family)[0])
    assert torch.equal(found, outputs(model, data_of(family)[0]))
    assert torch.corrcoef(torch.stack([found, exact]))[0, 1] > 0.9


def every_attention_agrees(build: Build, family: str, folder: Path) -> None:
    """Eager and sdpa."""
    model = build()
    model.save_pretrained(folder)
    kind, found = type(model), []
    for attention in ("eager", "sdpa"):  # some families choose their modules by it
        model = kind.from_pretrained(folder, attn_implementation=attention)
        assert model.config._attn_implementation == attention
        found.append(outputs(model, data_of(family)[0]))
    torch.testing.assert_close(found[0], found[1], atol=2e-4, rtol=1e-4)


def takes_adapters(build: Build, family: str, folder: Path) -> None:
    """LoRA on everything that was cut: trained, saved, loaded, merged, saved and loaded again."""
    from peft import LoraConfig, PeftModel, get_peft_model

    base = build(whole=True)  # adapters of divided heads stay adapters: tests/test_values.py
    base.save_pretrained(folder / "base")
    names = {module: name.rpartition(".")[2] for name, module in base.named_modules()}
    # peft takes the linears of a dense block beside experts for some of theirs
    groups = [group for group in find_groups(base) if family not in MIXTURES or group.structure == "heads"]
    linears = [*(producer.linear for group in groups for producer in group.producers), *(group.consumer for group in groups)]
    chosen = [names[linear] for linear in linears]
    load = type(base).from_pretrained
    fan_in = {"fan_in_fan_out": True} if family == "gpt2" else {}
    adapted = get_peft_model(load(folder / "base"), LoraConfig(r=2, target_modules=sorted({*chosen}), **fan_in))
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):  # the first step moves B alone
        predicted(adapted(**accepted(base, data_of(family)[0]))).abs().mean().backward()  # squares: constant where normalised
        optimizer.step()
    trained = outputs(adapted, data_of(family)[0])
    assert not torch.equal(trained, outputs(load(folder / "base"), data_of(family)[0]))
    adapted.save_pretrained(folder / "adapter")
    loaded = PeftModel.from_pretrained(load(folder / "base"), folder / "adapter")
    assert torch.equal(outputs(loaded, data_of(family)[0]), trained)
    merged = loaded.merge_and_unload()
    torch.testing.assert_close(outputs(merged, data_of(family)[0]), trained, atol=1e-3, rtol=1e-3)
    merged.save_pretrained(folder / "merged")
    again, wanted = load(folder / "merged").state_dict(), merged.state_dict()
    assert all(torch.equal(again[name], value) for name, value in wanted.items())


Proof = Callable[[str, Any, Path], None]
"""Given a family, a property and an empty folder, fails unless the property cannot hold of the dense model either."""


def refuses(message: str) -> Proof:
    """It is the dense model that cannot do it."""

    def prove(family: str, holds: Any, folder: Path) -> None:
        with pytest.raises(Exception, match=message):
            holds(Build(family), family, folder)

    return prove


def one_block(family: str, holds: Any, folder: Path) -> None:
    assert len(find_blocks(tiny(family))) == 1 < tiny(family).config.num_hidden_layers


def no_cache(family: str, holds: Any, folder: Path) -> None:
    assert not tiny(family).can_generate()


def two_stacks(family: str, holds: Any, folder: Path) -> None:
    assert len(find_blocks(tiny(family))) > tiny(family).config.num_hidden_layers


GENERATING = (*DECODERS, *SEQUENCES)
SILENT = tuple(family for family in ROWS if family not in GENERATING)
BOTH_SIDES = tuple(family for family in SEQUENCES if family not in MIXTURES)
EAGER = ("bloom", "deberta", "deberta-v2", "deberta-v2, shared", "gemma2", "gpt_oss", "mpnet")
NO_GENERATE = "has no attribute 'generate'"
NO_SDPA = "does not support an attention implementation through"
MUTE = dict.fromkeys(SILENT, ("no language model", refuses(NO_GENERATE)))
GROWS = ("its biases are as long as what was read so far", refuses("must match the size of tensor"))
CANNOT: dict[Any, dict[str, tuple[str, Proof]]] = {
    sizes_differ_in_every_layer: {"albert": ("one block is all layers", one_block)},
    per_layer_config_agrees: {
        **dict.fromkeys(SILENT, ("there is no cache to plan", no_cache)),
        **dict.fromkeys(BOTH_SIDES, ("encoder and decoder share one config, with one list of layers", two_stacks)),
    },
    generates_with_a_dynamic_cache: MUTE,
    generates_with_a_static_cache: {
        **MUTE,
        "falcon, biased": GROWS,
    },
    generates_with_a_static_cache_in_chunks: {
        **MUTE,
        "falcon, biased": GROWS,
        "falcon, one key head": ("transformers plans one for as many keys as queries", refuses("must have same slice shapes")),
        "whisper": (
            "its generate has an argument of its own in that place",
            refuses("multiple values for keyword argument 'position_ids'"),
        ),
    },
    runs_in_half_precision: {"deberta": ("transformers loads some biases in single precision", refuses("the same dtype"))},
    every_attention_agrees: {
        **dict.fromkeys(EAGER, ("transformers has eager attention alone", refuses(NO_SDPA))),
        "falcon, biased": ("transformers' two disagree about the biases", refuses("not close")),
    },
}
"""Property -> family -> (why it cannot hold of it, what proves that of the dense model)."""
if tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 21):
    UNPACKED = {"bloom": ("transformers < 5.21 wants masks of two dimensions for ALiBi", refuses("too many values to unpack"))}
    CANNOT[generates_with_a_static_cache] |= UNPACKED
    CANNOT[generates_with_a_static_cache_in_chunks] |= UNPACKED
    CANNOT[every_attention_agrees]["gemma2"] = "transformers < 5.21 leaves the soft cap out of sdpa", refuses("not close")


@dataclass(frozen=True)
class Row:
    """Of what a property must hold, and of what in every run of the tests."""

    holds: Any
    in_every_run: tuple[str, ...] = ROWS
    """Families cut by chance; a few are pruned by one method each besides, where a method's turn costs little."""
    methods: tuple[str, ...] = (CHANCE, *METHODS)


COSTLY = ("bloom", "phi3")  # whose attention needs help
TABLE = (
    Row(sizes_differ_in_every_layer, methods=tuple(METHODS)),
    Row(equals_the_masked_dense_model, methods=tuple(METHODS)),
    Row(per_layer_config_agrees),
    Row(generates_with_a_dynamic_cache),
    Row(generates_with_a_static_cache),
    Row(generates_with_a_static_cache_in_chunks),
    Row(compiles_in_one_graph, in_every_run=COSTLY),
    Row(exports, in_every_run=COSTLY),
    Row(runs_in_half_precision),
    Row(every_attention_agrees),
    Row(takes_adapters, in_every_run=COSTLY),
)


def cells() -> list[Any]:
    """(property, family, method), marked "full" but for a few; once where the dense model is to show that it cannot be."""
    found, turns = [], {family: tuple(METHODS)[i % len(METHODS)] for i, family in enumerate(FEW)}
    for family, method in itertools.product(ROWS, (CHANCE, *METHODS)):
        for row in TABLE:
            able = family not in CANNOT.get(row.holds, {})
            if method not in row.methods[: None if able else 1]:
                continue
            in_turn = row.in_every_run is ROWS and turns.get(family) == method
            always = family in row.in_every_run if method == CHANCE or not able else in_turn
            name, marks = row.holds.__name__, [] if always else pytest.mark.full
            found.append(pytest.param(row.holds, family, method, marks=marks, id=f"{name}-{family}-{method}"))
    return found


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # of one family's activation function
@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`:UserWarning")  # in one family's encoder
# peft asks transformers by the old name; ours does not
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize(("holds", "family", "method"), cells())
def test_table(holds: Any, family: str, method: str, tmp_path: Path):
    if family in CANNOT.get(holds, {}):
        _, prove = CANNOT[holds][family]
        prove(family, holds, tmp_path)
        return
    holds(Build(family, method), family, tmp_path)
