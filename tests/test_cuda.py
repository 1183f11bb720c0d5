"""Every method on a GPU; what those that do not train give there, beside the CPU. Skipped where there is none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import dispatch_model
from test_methods import RECIPES, TRAINED, WITHOUT_TRAINING
from tiny import data_of, outputs, plenty, tiny
from transformers import PreTrainedModel

from optimum_stat import STATConfig, STATPruner
from optimum_stat.latency_timing import measure_table
from optimum_stat.linalg import add_to_gram, product, symmetrize
from optimum_stat.timing import Setting

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    # torch says so of the thread of a process's first backward pass, and makes the context that it misses
    pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS:UserWarning"),
]
CUDA = torch.device("cuda")
STRUCTURES = {
    "llama": [("heads", "neurons", "values"), ("neurons", "pairs", "values"), ("heads", "neurons", "layers", "hidden")],
    "bert": [("heads", "neurons", "values"), ("hidden",)],
    "mixtral": [("heads", "neurons", "experts")],
}


def prune(recipe: str, model: PreTrainedModel, family: str, **asked: Any) -> Any:
    method, config = RECIPES[recipe]
    pruner = method.from_pretrained(model, config(**{"keep": 0.6, **asked}))
    pruner.prune(plenty(family))
    return pruner


def on_cuda(model: PreTrainedModel) -> bool:
    return all(each.device.type == "cuda" for each in (*model.parameters(), *model.buffers()))


def kept(pruner: Any) -> dict[str, int]:
    return {group.name: group.kept for group in pruner.report.groups}


def close(one: PreTrainedModel, other: PreTrainedModel, family: str) -> None:
    batch = data_of(family)[0]
    here, there = outputs(one.cpu(), batch), outputs(other.cpu(), batch)
    torch.testing.assert_close(here, there, rtol=0, atol=2e-3 * float(there.abs().max()))


@pytest.mark.parametrize("family", ["bert", "llama", "gpt2"])
@pytest.mark.parametrize("recipe", WITHOUT_TRAINING)
def test_the_same_model_as_on_the_cpu(recipe: str, family: str) -> None:
    here, there = prune(recipe, tiny(family), family), prune(recipe, tiny(family).to(CUDA), family)
    assert on_cuda(there.model)
    assert kept(here) == kept(there)
    close(there.model, here.model, family)


@pytest.mark.parametrize("family", ["bert", "llama"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_saved_from_a_gpu_and_loaded_anywhere(recipe: str, family: str, tmp_path: Path) -> None:
    pruner = prune(recipe, tiny(family).to(CUDA), family)
    assert on_cuda(pruner.model)
    assert pruner.report.reached <= 0.6
    pruner.save_pretrained(tmp_path)
    batch = data_of(family)[0]
    for device in ("cpu", "cuda"):
        loaded = type(pruner.model).from_pretrained(tmp_path, device_map=device)
        assert {each.device.type for each in loaded.parameters()} == {device}
        close(loaded, pruner.model, family)
        assert torch.isfinite(outputs(loaded, batch)).all()


@pytest.mark.parametrize("recipe", TRAINED)
def test_a_model_that_was_not_moved_there(recipe: str) -> None:
    pruner = prune(recipe, tiny("bert"), "bert")
    assert len({each.device for each in pruner.model.parameters()}) == 1


@pytest.mark.parametrize(("family", "structures"), [(family, each) for family, all_ in STRUCTURES.items() for each in all_])
def test_all_structures(family: str, structures: tuple[str, ...]) -> None:
    here = prune("stat-fisher", tiny(family), family, structures=structures, keep=0.8)
    there = prune("stat-fisher", tiny(family).to(CUDA), family, structures=structures, keep=0.8)
    assert on_cuda(there.model)
    assert kept(here) == kept(there)
    close(there.model, here.model, family)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("recipe", WITHOUT_TRAINING)
def test_half_precision(recipe: str, dtype: torch.dtype) -> None:
    model = tiny("llama").to(CUDA, dtype)
    before = outputs(model, {name: value.to(CUDA) for name, value in data_of("llama")[0].items()})
    pruner = prune(recipe, model, "llama")
    after = outputs(pruner.model, {name: value.to(CUDA) for name, value in data_of("llama")[0].items()})
    assert {each.dtype for each in pruner.model.parameters()} == {dtype}
    assert torch.isfinite(after).all()
    assert float((after - before).float().norm() / before.float().norm()) < 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_products_on_tensor_cores_keep_the_digits_of_single_precision(dtype: torch.dtype) -> None:
    """Whatever the numbers in them; of all in bfloat16 at once, products would be off by about 1e-4."""
    generator = torch.Generator().manual_seed(0)
    rows, other = (torch.randn(3000, 400, generator=generator).exp() for _ in range(2))
    rows = rows.to(dtype).float()
    gram = torch.zeros(400, 400, dtype=torch.float64, device=CUDA)
    add_to_gram(gram, rows.to(CUDA))
    for found, left, right in (
        (symmetrize(gram), rows.T, rows),
        (product(rows.to(CUDA).T, other.to(CUDA)), rows.T, other),
        (product(other.to(CUDA).T, rows.to(CUDA)), other.T, rows),
    ):
        exact = left.double() @ right.double()
        assert float((found.cpu().double() - exact).norm() / exact.norm()) < 1e-5


def test_numbers_that_are_not_finite_stay_so_on_tensor_cores() -> None:
    rows = torch.ones(300, 300, device=CUDA)
    rows[7, 3] = torch.nan
    gram = torch.zeros(300, 300, dtype=torch.float64, device=CUDA)
    add_to_gram(gram, rows)
    assert torch.isnan(symmetrize(gram).diagonal()).nonzero().flatten().tolist() == [3]


def test_distilled() -> None:
    pruner = prune("stat-fisher", tiny("llama").to(CUDA), "llama", distill_epochs=2)
    assert on_cuda(pruner.model)


def test_measured_milliseconds() -> None:
    """Of blocks large enough that their kernels take longer than it takes to start them."""
    model = tiny("llama", hidden_size=512, intermediate_size=8192).to(CUDA)
    asked = {"budget": "latency", "serve_batch_size": 16, "serve_seq_len": 512, "keep": 0.9}
    pruner = prune("fisher", model, "llama", tune=False, **asked)
    assert pruner.report.latency.predicted <= 0.9 * pruner.report.latency.dense
    assert pruner.currency.table.setting.device == f"cuda ({torch.cuda.get_device_name()})"


def test_measured_milliseconds_of_decoding() -> None:
    model = tiny("llama").to(CUDA)
    found = measure_table(model, 8, Setting.of(model, "decode", 2, 16))
    assert found.total > 0


def test_a_family_of_sizes() -> None:
    pruners = [STATPruner.from_pretrained(tiny("bert").to(device), STATConfig()) for device in ("cpu", "cuda")]
    families = [pruner.sweep(plenty("bert"), [0.8, 0.6]) for pruner in pruners]
    assert [kept(here) for here in families[0]] == [kept(there) for there in families[1]]


@pytest.mark.parametrize("recipe", ["stat-fisher", "fisher", "surgeon"])
def test_blocks_that_wait_on_the_cpu(recipe: str) -> None:
    model = tiny("llama")
    places = dict.fromkeys([f"model.layers.{i}" for i in range(1, model.config.num_hidden_layers)], "cpu")
    places |= dict.fromkeys(["model.layers.0", "model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"], 0)
    away = prune(recipe, dispatch_model(model, places, main_device=0), "llama")
    assert kept(away) == kept(prune(recipe, tiny("llama").to(CUDA), "llama"))
