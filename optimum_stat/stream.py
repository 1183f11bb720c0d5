"""The residual stream and the blocks strung on it: which parameters a dimension consists of, and how either gets smaller."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .anatomy import at, attentions, is_linear
from .blocks import reads_tokens_alone
from .experts import set_aside
from .families import Group, applications_of, find_blocks, find_groups, weight
from .family_table import LAYER_INDEX, PER_HEAD
from .few_pairs import FewPairs
from .few_values import FewValues, OfFewValues

Axis = tuple[nn.Module, str, int]
"""(module, name of its parameter, which of the parameter's axes)."""


@dataclass(frozen=True, eq=False)
class Stream:
    """Where the dimensions of the residual stream lie."""

    width: int
    axes: tuple[Axis, ...]
    """Everything that a dimension consists of: what writes it, what reads it, norms, embeddings."""
    sites: tuple[tuple[Group, ...], ...]
    """What reads it, site after site in the order of the forward pass: linears side by side that read the same, each as a
    group whose units are the dimensions."""
    reader: nn.Module | None
    """What reads it after the last block; None: the model has no head, and gives it to its user."""
    tied: bool
    """Whether `reader` shares its weight with the embeddings."""


def find_stream(model: Any) -> Stream:
    """The residual stream of `model`.

    Within the blocks: the columns of producers, the rows and biases of consumers, and norms of the stream's width. Outside:
    embeddings of that width, or the linear that widens smaller ones; norms; and the first linear after the blocks, with what
    follows it up to an output that is tied to the embeddings.

    Raises:
        ValueError: a parameter that is as long as the stream is wide is none of these.
    """
    groups, blocks = find_groups(model), find_blocks(model)
    if groups[-1].stack:
        raise ValueError(f"{type(model).__name__} has several lists of blocks, and a residual stream for each.")
    width = int(weight(groups[0].consumer).shape[0])
    axes = [_inputs(producer.linear) for group in groups for producer in group.producers]
    axes += [axis for group in groups for axis in _outputs(group.consumer)]
    of_heads = {module for block in blocks for module in _of_heads(block)}
    axes += [axis for module in blocks.modules() if module not in of_heads for axis in _of_norm(module, {width})]
    before, after = _around(model, blocks)
    axes += [axis for module in before for axis in _made(module, width)]
    read, reader = _read(model, after, {width, model.config.hidden_size})
    axes += read
    _refuse_others(blocks, axes, width)
    tied = reader is not None and reader.weight is getattr(_embedding(model), "weight", None)
    return Stream(width, tuple(dict.fromkeys(axes)), tuple(_sites(groups)), reader, tied)


def check_stream(model: Any, narrows: bool) -> None:
    """Raise if the model has no one stream, or one that cannot have fewer dimensions, if that is asked."""
    stream = find_stream(model)
    if narrows and stream.reader is None:
        raise ValueError(
            f"'hidden' asked of a {type(model).__name__}, which has no head that reads its residual stream as it is: fewer "
            "dimensions would be another output. Prune the model with such a head, or leave 'hidden' out."
        )
    if narrows and not reads_tokens_alone(model):
        raise ValueError(
            f"'hidden' asked of a {type(model).__name__}: where its residual stream begins, in what reads images or sound, its "
            "dimensions cannot be cut. Leave 'hidden' out."
        )


@torch.no_grad()
def narrow(model: Any, keep: Tensor) -> None:
    """Keep only the dimensions `keep` of the residual stream, in place. Norms then normalise over what is left.

    Does nothing to what is as narrow already: while a model is built, its blocks are cut before there is a head on top.
    What was shared (an output tied to the embeddings) stays shared. `config.hidden_size` does not change: what families
    derive from it (widths of heads, scales of embeddings) stays what it was; the record has the new width.
    """
    stream = find_stream(model)
    if len(keep) == 0 or int(keep.max()) >= stream.width:
        raise ValueError(f"The residual stream has dimensions 0 to {stream.width - 1}; the plan keeps {keep.tolist()}.")
    new: dict[nn.Parameter, nn.Parameter] = {}
    for module, name, axis in stream.axes:
        old: nn.Parameter = getattr(module, name)
        value = new.get(old, old)
        if value.shape[axis] != len(keep):
            part = value.detach().index_select(axis, keep.to(old.device)).contiguous()
            new[old] = nn.Parameter(part, old.requires_grad)
    for module, name in dict.fromkeys((module, name) for module, name, _ in stream.axes):
        setattr(module, name, new.get(getattr(module, name), getattr(module, name)))
        _bring_along(module)


def shorten(model: Any, keep: list[int]) -> None:
    """Keep only the blocks `keep`, in their order, in place; the config then says so, layer by layer where it has lists.

    Raises:
        ValueError: there is no such block, the first is to go, or the model runs one block several times.
    """
    blocks, config = find_blocks(model), model.config
    if keep == list(range(len(blocks))):
        return
    if keep != sorted(set(keep)) or not keep or keep[0] != 0 or keep[-1] >= len(blocks):
        raise ValueError(f"The plan keeps the blocks {keep}; of the {len(blocks)}, the first must stay, in their old order.")
    if applications_of(model) > 1:
        raise ValueError(f"{type(model).__name__} runs each block several times: there are no layers to drop.")
    for name, value in vars(config).items():
        if isinstance(value, list) and len(value) == len(blocks):
            setattr(config, name, [value[index] for index in keep])
    own = [blocks[index] for index in keep]
    for index, block in enumerate(own):
        for module in block.modules():
            for name in LAYER_INDEX:
                if type(getattr(module, name, None)) is int:
                    setattr(module, name, index)
    blocks._modules = {str(index): block for index, block in enumerate(own)}  # a new dict: the old one may be put back
    config.num_hidden_layers = len(own)
    _name_stages(config)


def _name_stages(config: Any) -> None:
    """Of a backbone, the last of which is what other models read, as many as there are layers."""
    if hasattr(config, "stage_names"):
        count = config.num_hidden_layers
        config.stage_names = ["stem", *(f"stage{index + 1}" for index in range(count))]
        config._out_features, config._out_indices = [config.stage_names[-1]], [count]


def without_weights(model: Any, blocks: list[int], keep: Tensor | None = None) -> Any:
    """A copy on the meta device that keeps these blocks and dimensions (None: all)."""
    tensors = [*model.parameters(), *model.buffers(), *set_aside(model)]
    memo: dict[int, Any] = {id(each): torch.empty_like(each, device="meta") for each in tensors}
    memo |= {id(each): nn.Parameter(memo[id(each)], requires_grad=False) for each in (*model.parameters(), *set_aside(model))}
    small = copy.deepcopy(model, memo)
    shorten(small, blocks)
    if keep is not None:
        narrow(small, keep)
    return small


def _embedding(model: Any) -> nn.Module | None:
    """Of tokens; models of images and sound say that they have none, or give another module."""
    try:
        return model.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return None


def _inputs(linear: nn.Module) -> Axis:
    return linear, "weight", 1 if isinstance(linear, nn.Linear) else 0


def _outputs(linear: nn.Module) -> list[Axis]:
    """The rows of a linear, and its bias."""
    rows: list[Axis] = [(linear, "weight", 0 if isinstance(linear, nn.Linear) else 1)]
    return rows + ([(linear, "bias", 0)] if isinstance(linear.bias, Tensor) else [])


def _of_heads(block: nn.Module) -> Iterator[nn.Module | None]:
    """What holds vectors of a block's heads, whose length may be that of the stream."""
    for found in attentions(block):
        yield from (at(found.module, path.rpartition(".")[0]) for path in PER_HEAD)


def is_norm(module: nn.Module) -> bool:
    """Of the modules of a stream: whether it scales every dimension by itself."""
    return isinstance(module.weight, Tensor) and module.weight.dim() == 1


def _of_norm(module: nn.Module, widths: Collection[int]) -> list[Axis]:
    """The scale and the shift of a norm."""
    own = [] if is_linear(module) else module.named_parameters(recurse=False)
    return [(module, name, 0) for name, value in own if value.dim() == 1 and len(value) in widths]


def _around(model: Any, blocks: nn.ModuleList) -> tuple[list[nn.Module], list[nn.Module]]:
    """The modules outside the blocks: those that make the stream, or are its norms; and those of the head, in their order."""
    inside, base = set(blocks.modules()), getattr(model, "base_model", model)
    before: list[nn.Module] = []
    after: list[nn.Module] = []
    passed = False
    for module in base.modules():
        passed = passed or module is blocks
        if module not in inside:
            (after if passed and is_linear(module) else before).append(module)  # a pooler
    return before, after + [module for module in model.modules() if module not in inside and module not in set(base.modules())]


def _made(module: nn.Module, width: int) -> list[Axis]:
    """Of what stands before the blocks, or is a norm around them."""
    if isinstance(module, nn.Embedding):
        return [(module, "weight", 1)] if module.embedding_dim == width else []
    if not is_linear(module):
        return _of_norm(module, {width})
    out, read = weight(module).shape
    if out == read == width:
        raise ValueError(
            f"A square {type(module).__name__} stands before the blocks: where the residual stream begins is not clear."
        )
    return _outputs(module) if out == width else [_inputs(module)] if read == width else []


def _read(model: Any, after: list[nn.Module], widths: Collection[int]) -> tuple[list[Axis], nn.Module | None]:
    """Of the head on top; and the first linear of it, if there is one."""
    linears = [module for module in after if is_linear(module) and weight(module).shape[1] in widths]
    if not linears:
        return [], None
    first, output = linears[0], model.get_output_embeddings()
    if weight(first).shape[0] not in widths:
        return [_inputs(linear) for linear in linears], first
    # by the config: while a model is built, nothing is tied yet
    if not model.config.get_text_config().tie_word_embeddings or output not in linears:
        return [_inputs(first)], first
    if linears[1:] != [output]:
        raise ValueError(
            f"{type(model).__name__} has several heads, one of them tied to the embeddings: its stream has no one end."
        )
    norms = [axis for module in after for axis in _of_norm(module, widths)]
    return [_inputs(first), *_outputs(first), *norms, _inputs(output)], first


def _refuse_others(blocks: nn.ModuleList, axes: list[Axis], width: int) -> None:
    """A parameter of the blocks that has the stream's width and is not known."""
    known = {module for module, _, _ in axes} | {module for block in blocks for module in _of_heads(block)}
    for path, module in blocks.named_modules():
        for name, value in module.named_parameters(recurse=False):
            if width in value.shape and module not in known:
                raise ValueError(
                    f"{path}.{name} {list(value.shape)} has a side as long as the residual stream is wide, and it is not known "
                    "whether it belongs to it."
                )


def _sites(groups: list[Group]) -> Iterator[tuple[Group, ...]]:
    for group in groups:
        linears = [producer.linear for producer in group.producers if producer.tokens_only]
        yield tuple(
            Group(f"{group.name}.{i}", group.block, "hidden", (), linear, weight(linear).shape[1], group.stream)
            for i, linear in enumerate(linears)
        )


def _bring_along(module: nn.Module) -> None:
    """The integers that say how large a module's parameters are."""
    value: Any = module.weight
    if isinstance(module, (FewPairs, FewValues)):
        module.in_features = value.shape[1]
    elif isinstance(module, OfFewValues):
        module.out_features = value.shape[0]
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = value.shape
    elif isinstance(module, nn.Embedding):
        module.embedding_dim = value.shape[1]
    elif isinstance(module, nn.LayerNorm):
        module.normalized_shape = tuple(value.shape)
    elif value.dim() == 2:
        module.nx, module.nf = value.shape  # transformers' Conv1D
