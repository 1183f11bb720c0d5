"""Where each transformer family keeps its heads and neurons. The only file that knows model names.

To add a family, add one entry to `FAMILIES`: paths relative to one block, and the integers to rewrite when it shrinks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Family:
    """Paths, relative to one block, of the linears that make and use heads and neurons."""

    blocks: str  # the list of blocks, relative to the base model
    qkv: tuple[str, ...]  # three linears, or one that holds all three one after the other
    attention_out: str
    up: tuple[str, ...]  # every linear that makes neurons: (up,) or (gate, up)
    down: str
    head_counts: tuple[str, ...] = ()  # integer attributes that hold the number of query heads ...
    head_widths: tuple[str, ...] = ()  # ... or that number times the head's width
    norms: tuple[str, str] | None = None
    """What reads the residual stream before attention and before the MLP; None: their first linears do, the norms come after."""
    causal: bool = False
    per_layer_config: tuple[str, str, str] | None = None
    """The config's names for (query heads, key/value heads, neurons), where transformers accepts them layer by layer."""


_BERT = Family(
    blocks="encoder.layer",
    qkv=("attention.self.query", "attention.self.key", "attention.self.value"),
    attention_out="attention.output.dense",
    up=("intermediate.dense",),
    down="output.dense",
    head_counts=("attention.self.num_attention_heads",),
    head_widths=("attention.self.all_head_size",),
)
_LLAMA = Family(
    blocks="layers",
    qkv=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    attention_out="self_attn.o_proj",
    up=("mlp.gate_proj", "mlp.up_proj"),
    down="mlp.down_proj",
    norms=("input_layernorm", "post_attention_layernorm"),
    causal=True,
    per_layer_config=("num_attention_heads", "num_key_value_heads", "intermediate_size"),
)
FAMILIES: dict[str, Family] = {
    "bert": _BERT,
    "distilbert": Family(
        blocks="transformer.layer",
        qkv=("attention.q_lin", "attention.k_lin", "attention.v_lin"),
        attention_out="attention.out_lin",
        up=("ffn.lin1",),
        down="ffn.lin2",
        head_counts=("attention.n_heads",),
        head_widths=("attention.dim",),
    ),
    "electra": _BERT,
    "gpt2": Family(
        blocks="h",
        qkv=("attn.c_attn",),
        attention_out="attn.c_proj",
        up=("mlp.c_fc",),
        down="mlp.c_proj",
        head_counts=("attn.num_heads",),
        head_widths=("attn.split_size",),
        norms=("ln_1", "ln_2"),
        causal=True,
    ),
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "opt": replace(
        _LLAMA,
        blocks="decoder.layers",
        attention_out="self_attn.out_proj",
        up=("fc1",),
        down="fc2",
        head_counts=("self_attn.num_heads",),
        norms=("self_attn_layer_norm", "final_layer_norm"),
        per_layer_config=None,
    ),
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "roberta": _BERT,
}
TASK_OF_HEAD = {
    "CausalLM": "text-generation",
    "LMHeadModel": "text-generation",
    "MaskedLM": "fill-mask",
    "SequenceClassification": "text-classification",
    "TokenClassification": "token-classification",
    "QuestionAnswering": "question-answering",
}
"""What stands in the class name of a model with a head, and the Hub's name for what that head does."""


@dataclass(frozen=True, eq=False)
class Producer:
    """A linear whose output rows are `parts` stacked runs (3 for a fused query, key, value), each ordered by unit."""

    linear: nn.Module
    parts: int = 1


@dataclass(frozen=True, eq=False)
class Group:
    """Units that are kept or dropped together: rows of every producer, columns of the one consumer.

    For heads, a unit is one key/value head with all query heads that read it; for neurons, one hidden unit.
    """

    name: str  # "3.heads", "3.neurons"
    block: int
    structure: str  # "heads" | "neurons"
    producers: tuple[Producer, ...]
    consumer: nn.Module
    units: int
    stream: nn.Module
    """What reads the residual stream to which the consumer's output is added."""
    counts: tuple[tuple[nn.Module, str, int], ...] = ()  # (module, integer attribute, what one unit adds to it)
    query_heads: int = 1  # query heads in one unit

    @property
    def width(self) -> int:
        """Consumer columns per unit."""
        return int(weight(self.consumer).shape[1]) // self.units


def find_groups(model: Any) -> list[Group]:
    """Everything in `model` that can be pruned, in the order of the forward pass.

    Raises:
        ValueError: the family is not known, or the model is not built the way the family's entry says.
    """
    return [group for index, block in enumerate(find_blocks(model)) for group in groups_of_block(model, index, block)]


def groups_of_block(model: Any, index: int, block: nn.Module) -> list[Group]:
    """Heads and neurons of one block, which is block `index` of `model` or a copy of it."""
    family = family_of(model)
    if not getattr(model.config, "do_layer_norm_before", True):
        family = replace(family, norms=None)
    return [_heads(family, index, block, head_dim(model.config)), _neurons(family, index, block)]


def find_blocks(model: Any) -> nn.ModuleList:
    """The transformer blocks of `model`, whatever head sits on top."""
    family = family_of(model)
    base = getattr(model, "base_model", model)
    try:
        blocks = base.get_submodule(family.blocks)
        assert isinstance(blocks, nn.ModuleList)
        return blocks
    except AttributeError:
        raise ValueError(
            f"{type(model).__name__} has no blocks at {family.blocks!r}, where {model.config.model_type!r} models keep "
            f"them; it has {', '.join(name for name, _ in base.named_children())}."
        ) from None


def family_of(model: Any) -> Family:
    """The family's entry, found by `config.model_type`."""
    config = getattr(model, "config", None)
    kind = getattr(config, "model_type", None)
    if kind not in FAMILIES:
        raise ValueError(
            f"optimum-stat cannot prune {kind!r} models ({type(model).__name__}) yet; it knows {', '.join(FAMILIES)}. "
            f"If the model is built like one of these, add an entry to FAMILIES in {__name__}."
        )
    return FAMILIES[kind]


def task_of(model: Any) -> str:
    """The Hub's name for what the model's head does; "feature-extraction" if it has none."""
    return task_of_class(type(model).__name__)


def task_of_class(name: str) -> str:
    """The same, from the name of the model's class."""
    return next((task for head, task in TASK_OF_HEAD.items() if head in name), "feature-extraction")


def is_causal(model: Any) -> bool:
    """Whether tokens see only what stands before them."""
    return family_of(model).causal or bool(getattr(model.config, "is_decoder", False))


def sliding_window(config: Any, block: int) -> int | None:
    """How many tokens back the attention of one block sees at most; None if there is no limit."""
    types = getattr(config, "layer_types", None)
    local = types[block] == "sliding_attention" if types else getattr(config, "use_sliding_window", True)
    return getattr(config, "sliding_window", None) if local else None


def head_dim(config: Any) -> int:
    """The width of one head. Pruning never changes it, so the dense model's config tells it."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def weight(linear: nn.Module) -> Tensor:
    """[out, in] view of a linear's weight; GPT-2's Conv1D stores it transposed."""
    value = linear.weight
    assert isinstance(value, Tensor)
    return value if isinstance(linear, nn.Linear) else value.T


def _heads(family: Family, index: int, block: nn.Module, head_width: int) -> Group:
    linears = [block.get_submodule(path) for path in family.qkv]
    parts = 3 if len(linears) == 1 else 1
    consumer = block.get_submodule(family.attention_out)
    units = weight(linears[-1]).shape[0] // head_width // parts  # the value's rows tell the number of key/value heads
    query_heads = weight(consumer).shape[1] // head_width // units
    counts = _counts(block, family.head_counts, query_heads) + _counts(block, family.head_widths, query_heads * head_width)
    producers = tuple(Producer(linear, parts) for linear in linears)
    stream = block.get_submodule(family.norms[0]) if family.norms else linears[0]
    return Group(f"{index}.heads", index, "heads", producers, consumer, units, stream, counts, query_heads)


def _neurons(family: Family, index: int, block: nn.Module) -> Group:
    consumer = block.get_submodule(family.down)
    producers = tuple(Producer(block.get_submodule(path)) for path in family.up)
    stream = block.get_submodule(family.norms[1]) if family.norms else producers[0].linear
    return Group(f"{index}.neurons", index, "neurons", producers, consumer, weight(consumer).shape[1], stream)


def _counts(block: nn.Module, paths: Sequence[str], per_unit: int) -> tuple[tuple[nn.Module, str, int], ...]:
    split = [path.rpartition(".") for path in paths]
    return tuple((block.get_submodule(parent), name, per_unit) for parent, _, name in split)


def check_finite(model: nn.Module) -> None:
    """Raise if a weight is NaN or infinite, naming it."""
    for name, parameter in model.named_parameters():
        if parameter.device.type != "meta" and not torch.isfinite(parameter).all():
            raise ValueError(f"{name} holds NaN or infinite values; a model with broken weights cannot be pruned.")
