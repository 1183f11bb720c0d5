"""The walk shows, block by block, exactly what one forward pass of the whole model computes, and leaves no trace."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny import ENCODERS, HIDDEN, SIZES, batches, takes_positions, tiny
from torch import Tensor, nn

from optimum_stat import halted
from optimum_stat.data import Batches
from optimum_stat.families import Group, find_blocks, find_groups, weight
from optimum_stat.halted import room_for
from optimum_stat.probes import on_consumer_input, quiet
from optimum_stat.slicing import consumer_columns, set_weight, slice_group
from optimum_stat.walk import BlockWalk

PADDINGS = {"none": {"lengths": (9,) * 5}, "right": {}, "left": {"left": True}}
SHARED = ("albert", "albert, two blocks")
FAMILIES = [
    (family, padding)
    for family in SIZES
    for padding in PADDINGS
    if family not in SHARED and (family, padding) != ("distilbert", "left")
]


def _data(model: nn.Module, items: list[dict[str, Tensor]]) -> Batches:
    if not takes_positions(model):
        items = [{name: value for name, value in item.items() if name != "position_ids"} for item in items]
    tokens = sum(int(item["attention_mask"].sum()) for item in items)
    return Batches(tuple(items), tokens, sum(len(item["input_ids"]) for item in items), 9, "", "test")


def _real(value: Tensor, mask: Tensor) -> Tensor:
    return value.reshape(-1, value.shape[-1])[mask.flatten() != 0]


@torch.no_grad()
def _seen(model: nn.Module, data: Batches, modules: list[nn.Module], what: str) -> list[list[Tensor]]:
    """Every batch's real "input" or "output" of each module in plain forward passes of the whole model."""
    seen: list[list[Tensor]] = [[] for _ in modules]

    def hook(at: int) -> Callable[..., None]:
        def keep(module: nn.Module, args: tuple[Tensor, ...], output: Any) -> None:
            seen[at].append(args[0] if what == "input" else output if isinstance(output, Tensor) else output[0])

        return keep

    handles = [module.register_forward_hook(hook(at)) for at, module in enumerate(modules)]
    for batch in data:
        model(**batch)
    for handle in handles:
        handle.remove()
    return [[_real(value, item["attention_mask"]) for value, item in zip(one, data, strict=True)] for one in seen]


def _walked(model: nn.Module, data: Batches) -> dict[str, list[Tensor]]:
    """What a walk through all blocks shows of each consumer's input."""
    groups = find_groups(model)
    seen: dict[str, list[Tensor]] = {group.name: [] for group in groups}
    with quiet(model):
        walk = BlockWalk(model, data)
        for index in walk.steps("Walking"):
            walk.run(index, [g for g in groups if g.block == index], lambda group, z: seen[group.name].append(z))
            walk.advance(index)
    return seen


def _gram(parts: list[Tensor]) -> Tensor:
    rows = torch.cat(parts).double()
    return rows.T @ rows


def _assert_clean(model: nn.Module) -> None:
    for name, module in model.named_modules():
        assert not module._forward_pre_hooks, name
        assert not module._forward_hooks, name
        assert "forward" not in module.__dict__, name


@pytest.mark.parametrize(("family", "padding"), FAMILIES)
def test_consumers_read_what_they_read_in_a_full_forward_pass(family: str, padding: str) -> None:
    model = tiny(family)
    data = _data(model, batches(**PADDINGS[padding]))
    walked = _walked(model, data)
    expected = _seen(model, data, [group.consumer for group in find_groups(model)], "input")
    for group, parts in zip(find_groups(model), expected, strict=True):
        torch.testing.assert_close(torch.cat(walked[group.name]), torch.cat(parts), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(_gram(walked[group.name]), _gram(parts), rtol=1e-6, atol=1e-6)
    _assert_clean(model)


@pytest.mark.parametrize(("family", "padding"), FAMILIES)
def test_hidden_states_advance_as_in_a_full_forward_pass(family: str, padding: str) -> None:
    model = tiny(family, use_cache=False)
    data = _data(model, batches(**PADDINGS[padding]))
    expected = _seen(model, data, list(find_blocks(model)), "output")
    with torch.no_grad():
        first = [_real(model(**b, output_hidden_states=True).hidden_states[0], b["attention_mask"]) for b in data]
    walk = BlockWalk(model, data)
    for parts in [first, *expected]:
        energy = (1 / torch.cat(parts).double().square().sum(1)).sum() / data.num_tokens
        assert walk.inverse_energy() == pytest.approx(float(energy), rel=1e-5)
        for batch, part in enumerate(parts):
            torch.testing.assert_close(_real(walk.hidden[batch], walk.masks[batch]), part, rtol=1e-6, atol=1e-6)
        if parts is not expected[-1]:
            walk.advance(0 if parts is first else 1)
    if family in ENCODERS and family != "modernbert":  # no final norm: this is what the model calls its last hidden state
        with torch.no_grad():
            last = [model(**b, output_hidden_states=True).hidden_states[-1] for b in data]
        for batch, value in enumerate(last):
            torch.testing.assert_close(_real(walk.hidden[batch], walk.masks[batch]), _real(value, walk.masks[batch]))


@pytest.mark.parametrize("family", SHARED)
def test_a_block_that_runs_more_than_once_is_walked_that_often(family: str) -> None:
    model = tiny(family, "")
    data = _data(model, batches())
    expected: dict[str, list[Tensor]] = {group.name: [] for group in find_groups(model)}
    with on_consumer_input(find_groups(model), lambda group, z: expected[group.name].append(z.detach())):
        for item in data:
            last = model(**item).last_hidden_state
    masks = [item["attention_mask"] for item in data for _ in range(2)]
    for name, parts in _walked(model, data).items():
        wanted = _gram([_real(value, mask) for value, mask in zip(expected[name], masks, strict=True)])
        torch.testing.assert_close(_gram(parts), wanted, rtol=1e-6, atol=1e-6)
    with quiet(model):
        walk = BlockWalk(model, data)
        for index in range(len(find_blocks(model))):
            walk.advance(index)
    torch.testing.assert_close(_real(walk.hidden[-1], walk.masks[-1]), _real(last, walk.masks[-1]), rtol=1e-6, atol=1e-6)


def test_a_model_that_changes_what_passes_between_its_blocks_is_refused() -> None:
    model = tiny("deberta-v2", conv_kernel_size=3, conv_act="gelu")  # its first block's output goes through a convolution
    with pytest.raises(ValueError, match="Block 1 of DebertaV2ForMaskedLM does not read what the block before it returns"):
        BlockWalk(model, _data(model, batches()))
    _assert_clean(model)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_masks_of_either_attention_are_passed_on(attention: str) -> None:
    model = tiny("qwen2", attn_implementation=attention)  # block 1 sees 6 tokens back, block 0 all
    data = _data(model, batches())
    grams = {name: _gram(parts) for name, parts in _walked(model, data).items()}
    other = tiny("qwen2", attn_implementation="sdpa" if attention == "eager" else "eager")
    expected = _seen(other, data, [group.consumer for group in find_groups(other)], "input")
    for gram, parts in zip(grams.values(), expected, strict=True):
        torch.testing.assert_close(gram, _gram(parts), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("family", SIZES)
def test_grams_depend_on_neither_batch_size_nor_padding(family: str) -> None:
    model = tiny(family)
    changes: list[dict[str, Any]] = [{"batch_size": 1}, {"batch_size": 2}, {"batch_size": 6}, {"extra": 5}]
    changes += [{"left": True, "extra": 2}] if takes_positions(model) else []
    expected = {name: _gram(parts) for name, parts in _walked(model, _data(model, batches())).items()}
    for change in changes:
        walked = _walked(model, _data(model, batches(**change)))
        for name, gram in expected.items():
            scale = float(gram.diagonal().max())
            torch.testing.assert_close(_gram(walked[name]), gram, rtol=1e-4, atol=1e-5 * scale, msg=f"{name} {change}")


@pytest.mark.parametrize("family", ["distilbert", "mistral"])
def test_one_run_shows_and_advances(family: str) -> None:
    model, seen = tiny(family, use_cache=False), []
    groups, data = find_groups(model), _data(model, batches())
    walk, other = BlockWalk(model, data), BlockWalk(model, data)
    walk.run(0, groups[:2], lambda group, z: seen.append((group.name, z)), advance=True)
    other.run(0, groups[:2], lambda group, z: seen.append((group.name, z)))
    for (name, shown), (again, expected) in zip(seen[:2], seen[2:], strict=True):
        assert name == again
        assert torch.equal(shown, expected)
    assert all(torch.equal(hidden, first) for hidden, first in zip(other.hidden, BlockWalk(model, data).hidden, strict=True))
    other.advance(0)
    assert all(torch.equal(a, b) for a, b in zip(walk.hidden, other.hidden, strict=True))


def test_a_hidden_state_that_is_not_finite_has_no_energy() -> None:
    model = tiny("bert")
    walk = BlockWalk(model, _data(model, batches()))
    walk.hidden[0][walk.masks[0] == 0] = torch.inf  # padding never counts
    assert 0 < walk.inverse_energy() < torch.inf
    walk.hidden[1][0, 0, 0] = torch.inf
    assert walk.inverse_energy() != walk.inverse_energy()


def test_short_batches_are_shown_together(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("bert")
    data = _data(model, batches((12, 9, 5, 12, 7, 3, 11), batch_size=1))  # 59 tokens
    monkeypatch.setattr("optimum_stat.walk.CHUNK", 20)
    walked = _walked(model, data)
    expected = _seen(model, data, [group.consumer for group in find_groups(model)], "input")
    for (name, shown), full in zip(walked.items(), expected, strict=True):
        assert [len(part) for part in shown] == [21, 24, 14], name
        torch.testing.assert_close(torch.cat(shown), torch.cat(full), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "opt"])
def test_a_changed_block_changes_what_comes_after_it(family: str) -> None:
    model = tiny(family, use_cache=False)
    data, groups = _data(model, batches()), find_groups(model)
    walk, seen = BlockWalk(model, data), {}
    slice_group(groups[0], torch.tensor([1]))  # heads
    slice_group(groups[1], torch.tensor([3, 7, 8]))  # neurons
    walk.advance(0)
    for group in groups[2:]:
        seen[group.name] = []
    walk.run(1, groups[2:], lambda group, z: seen[group.name].append(z))
    expected = _seen(model, data, [group.consumer for group in groups[2:]], "input")
    for shown, full in zip(seen.values(), expected, strict=True):
        torch.testing.assert_close(torch.cat(shown), torch.cat(full), rtol=1e-6, atol=1e-6)


def test_a_block_is_left_once_the_last_group_was_seen_and_can_be_run_again() -> None:
    model = tiny("bert")
    walk, groups, runs = BlockWalk(model, _data(model, batches())), find_groups(model), []
    handle = groups[1].consumer.register_forward_pre_hook(lambda *_: runs.append(1))
    first: list[Tensor] = []
    again: list[Tensor] = []
    walk.run(0, groups[:1], lambda group, z: first.append(z))
    walk.run(0, groups[:1], lambda group, z: again.append(z))
    assert not runs
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    walk.advance(0)
    assert len(runs) == len(walk.masks)
    handle.remove()
    _assert_clean(model)


def _cut(group: Group, keep: Tensor) -> None:
    slice_group(group, keep)
    set_weight(group.consumer, 1.5 * weight(group.consumer))  # what a correction does


def _corrected_walk(model: nn.Module, data: Batches, look: str) -> tuple[list[Tensor], Tensor, int]:
    """All blocks, each exact group cut once it has been seen: (what was shown, what the last block makes, runs of blocks)."""
    walk, shown, calls = BlockWalk(model, data), list[Tensor](), list[int]()
    for index in range(len(walk.blocks)):
        handle = walk.blocks[index].register_forward_pre_hook(lambda *_: calls.append(1))
        for group in [each for each in find_groups(model) if each.block == index and not each.inexact and each.experts is None]:
            keep = torch.arange(1, group.units)
            if look == "run":
                walk.run(index, [group], lambda _, z: shown.append(z))
            else:
                walk.halt(group, lambda _, z: shown.append(z), consumer_columns(group, keep))
            _cut(group, keep)
        walk.advance(index)
        handle.remove()
    hidden = [_real(value, mask) for value, mask in zip(walk.hidden, walk.masks, strict=True)]
    return shown, torch.cat(hidden), len(calls)


@pytest.mark.parametrize("family", [family for family in SIZES if family not in SHARED])
def test_a_block_that_waits_shows_and_makes_the_same_and_runs_once(family: str) -> None:
    models = [tiny(family, use_cache=False) for _ in range(2)]
    data = _data(models[0], batches())
    with quiet(models[0]), quiet(models[1]):
        anew, waited = (_corrected_walk(model, data, look) for model, look in zip(models, ("run", "halt"), strict=True))
    torch.testing.assert_close(waited[0], anew[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(waited[1], anew[1], rtol=1e-5, atol=1e-6)
    assert waited[2] == len(find_blocks(models[1])) * len(data), "each block once for each batch"
    assert anew[2] > waited[2]
    assert not any(group.consumer._forward_pre_hooks for group in find_groups(models[1]))


def test_blocks_do_not_wait_where_they_would_hold_too_much_or_run_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    model, again = tiny("bert"), tiny("bert")
    waited = _corrected_walk(model, _data(model, batches()), "halt")[2]
    monkeypatch.setattr(halted, "ROOM", 0)
    assert _corrected_walk(again, _data(again, batches()), "halt")[2] == 3 * waited
    heads, model = find_groups(again)[0], tiny("bert")
    out, columns = weight(heads.consumer).shape
    monkeypatch.setattr(halted, "ROOM", 4 * 10 * (columns + 6 * out))
    assert [room_for(model, heads, tokens, 7) for tokens in (10, 11)] == [True, False]
    model.set_attn_implementation("eager")
    assert not room_for(model, heads, 10, 7)
    monkeypatch.setattr(halted, "ROOM", 4 * 10 * (columns + 6 * out + heads.units * 7))
    assert [room_for(model, heads, 10, scores) for scores in (7, 8)] == [True, False]
    monkeypatch.undo()
    model = tiny("albert", use_cache=False)
    walk, shown = BlockWalk(model, _data(model, batches())), list[Tensor]()
    group = find_groups(model)[0]
    walk.halt(group, lambda _, z: shown.append(z), torch.arange(weight(group.consumer).shape[1]))
    assert sum(map(len, shown)) == 2 * int(sum(mask.sum() for mask in walk.masks if mask is not None))


def test_a_run_begins_anew_and_nothing_waits_after_an_error() -> None:
    model = tiny("llama", use_cache=False)
    walk, (heads, neurons, *_), shown = BlockWalk(model, _data(model, batches())), find_groups(model), list[Tensor]()
    columns = torch.arange(weight(neurons.consumer).shape[1])
    walk.halt(heads, lambda _, z: None, torch.arange(weight(heads.consumer).shape[1]))
    set_weight(heads.consumer, torch.zeros_like(weight(heads.consumer)))
    walk.halt(neurons, lambda _, z: shown.append(z), columns)
    set_weight(heads.producers[0].linear, torch.zeros_like(weight(heads.producers[0].linear)))
    walk.run(0, [neurons], lambda _, z: shown.append(z))
    torch.testing.assert_close(shown[0], shown[1])
    set_weight(neurons.producers[0].linear, torch.zeros_like(weight(neurons.producers[0].linear)))
    walk.halt(heads, lambda _, z: None, torch.arange(weight(heads.consumer).shape[1]))
    with pytest.raises(KeyError):
        walk.halt(neurons, lambda _, z: {}["of the visitor's"], columns)
    _assert_clean(model)
    walk.halt(neurons, lambda _, z: shown.append(z), columns)
    assert not shown[2].any(), "not what waited before the error"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_half_precision_is_shown_in_float32(dtype: torch.dtype) -> None:
    model = tiny("llama").to(dtype)
    shown = {z.dtype for parts in _walked(model, _data(model, batches())).values() for z in parts}
    assert shown == {torch.float64 if dtype == torch.float64 else torch.float32}


def test_nothing_stays_behind_after_an_exception() -> None:
    model = tiny("llama", use_cache=False)
    data = _data(model, batches())
    walk, groups = BlockWalk(model, data), find_groups(model)

    def fail(group: Group, z: Tensor) -> None:
        raise KeyError(group.name)

    with pytest.raises(KeyError, match=r"0\.heads"):
        walk.run(0, groups[:2], fail)
    _assert_clean(model)
    broken = {**data.items[0], "input_ids": torch.full_like(data.items[0]["input_ids"], 10_000)}
    with pytest.raises(IndexError):
        BlockWalk(model, _data(model, [broken]))
    _assert_clean(model)


def test_an_instances_own_forward_is_kept_and_used() -> None:
    model = tiny("gpt2", use_cache=False)  # accelerate wraps forwards this way
    block, calls = find_blocks(model)[0], []
    plain = block.forward

    def own(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return plain(*args, **kwargs)

    block.forward = own
    walk = BlockWalk(model, _data(model, batches()))
    assert block.__dict__["forward"] is own
    assert len(calls) == 1, "recording runs the first block once, to see what it returns"
    walk.advance(0)
    assert len(calls) == 1 + len(walk.masks)
    assert walk.hidden[0].shape[-1] == HIDDEN
