"""What is left of each block of a pruned model, from its config alone."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from transformers import MODEL_MAPPING, AutoConfig, AutoModel

from .blocks import find_stacks
from .budget import Lengths, model_cost
from .calls import stack_tokens
from .families import find_groups
from .hub import impatient
from .probes import quiet
from .remote_code import auto_class
from .routers import find_mixtures
from .sources import located
from .structure import EXPERTS_LEFT, HIDDEN, KEY, PAIRS, VALUES, describe

PER_LAYER = "per_layer_config"

DIVIDED = {VALUES: "values of each key/value head", PAIRS: "pairs that each has lost"}


@dataclass(frozen=True)
class Sizes:
    """What `sizes` found: the records of both models, and the parameters of their blocks."""

    model: str
    pruned: dict[str, Any]
    dense: dict[str, Any]
    block_params: tuple[int, int]
    """Pruned, dense."""
    heads: tuple[str, ...]
    """The groups whose sizes the records have, in their order."""
    neurons: tuple[str, ...]
    experts: tuple[str, ...]
    """Those of `neurons` that some experts have."""

    def to_dict(self) -> dict[str, Any]:
        """Everything, as plain JSON values."""
        return {
            "model": self.model,
            "pruned": self.pruned,
            "dense": self.dense,
            "block_params": {"pruned": self.block_params[0], "dense": self.block_params[1]},
        }

    def __str__(self) -> str:
        more = "".join(f"  {text}" for name, text in DIVIDED.items() if name in self.pruned)
        lines = [f"{'block':<12}{'heads':>14}{'key/value heads':>18}{'neurons':>18}{more}"]
        rows: dict[tuple[int, str], list[str]] = {}
        for at, column, text in self._entries():
            rows.setdefault(at, [""] * 4)[column] = text
        for (block, place), row in sorted(rows.items()):
            lines.append(f"{f'{block} {place}':<12}{row[0]:>14}{row[1]:>18}{row[2]:>18}{row[3]}".rstrip())
        if HIDDEN in self.pruned:
            lines.append(f"{self.pruned[HIDDEN]:,} dimensions are left of the residual stream")
        pruned, dense = self.block_params
        return "\n".join([*lines, f"{pruned:,} of {dense:,} parameters in the blocks ({pruned / dense:.1%})"])

    def _entries(self) -> Iterator[tuple[tuple[int, str], int, str]]:
        """(block and, of the second of a kind in it, place; column; what stands there)."""
        for index, name in enumerate(self.heads):
            yield _row(name, "heads"), 0, self._kept("heads", index)
            yield _row(name, "heads"), 1, self._kept("key_value_heads", index)
            yield _row(name, "heads"), 3, "".join(f"  {self._of_each_head(own, index)}" for own in DIVIDED if own in self.pruned)
        for index, name in enumerate(self.neurons):
            yield _row(name, "neurons"), 2, self._kept("neurons", index)
        for index, name in enumerate(self.experts):
            yield _row(name, "neurons"), 3, f"  in each of {self._kept(EXPERTS_LEFT, index)} experts"

    def _of_each_head(self, name: str, index: int) -> str:
        own = self.pruned[name][index]
        if own is None:
            text = "all" if name == VALUES else "none"
        else:
            text = ", ".join(str(each if name == VALUES else len(each)) for each in own)
        return f"{text:<{len(DIVIDED[name])}}"

    def _kept(self, name: str, index: int) -> str:
        return f"{self.pruned[name][index]:,} of {self.dense[name][index]:,}"


def sizes(model: str, revision: str | None = None, *, trust_remote_code: bool = False) -> Sizes:
    """The record of a pruned model, beside the sizes it had. Builds both on the meta device; reads no weights."""
    config = config_of(model, revision, trust_remote_code=trust_remote_code)
    if getattr(config, KEY, None) is None:
        raise ValueError(
            f"config.json of {model} has no {KEY}: it was not pruned by optimum-stat. --dry-run shows what could be."
        )
    before: Any = copy.deepcopy(config)
    for part in (before, *(getattr(before, name) for name in before.sub_configs)):
        setattr(part, KEY, None)
    if before.is_heterogeneous:
        setattr(before, PER_LAYER, None)
    pruned, dense = (from_config_alone(each, trust_remote_code=trust_remote_code) for each in (config, before))
    params = tuple(model_cost(each, "params", 1) for each in (pruned, dense))
    groups, mixtures = find_groups(pruned), find_mixtures(pruned)
    names = [tuple(group.name for group in groups if group.structure == structure) for structure in ("heads", "neurons")]
    experts = tuple(mixture.name for mixture in mixtures)
    return Sizes(model, describe(pruned), describe(dense), (params[0], params[1]), names[0], names[1], experts)


def config_of(model: str, revision: str | None, *, trust_remote_code: bool = False) -> Any:
    """Of a Hub id, a folder or a GGUF file."""
    place, gguf = located(model)
    with impatient(place):
        return AutoConfig.from_pretrained(place, revision=revision, trust_remote_code=trust_remote_code, **gguf)


def from_config_alone(config: Any, *, trust_remote_code: bool = False) -> Any:
    """The model that `config` describes, without a head, or with that of its class where no Auto class knows its base, or of the
    repo's own code where that may run."""
    own = getattr(transformers, (getattr(config, "architectures", None) or [""])[0], None)
    of_repo = auto_class(config) if trust_remote_code else None
    with torch.device("meta"):
        if of_repo is not None:
            return getattr(transformers, of_repo).from_config(config, trust_remote_code=True)
        return AutoModel.from_config(config) if own is None or type(config) in MODEL_MAPPING else own(config)


def lengths_of(model: Any, seq_len: int) -> Lengths:
    """Tokens of an example in each list of blocks, of a model on the meta device: an image has as many as its size makes.

    All else has `seq_len`; beside images, at most as many as there are positions for.
    """
    stacks = find_stacks(model)
    images = [stack.config for stack in stacks if not stack.mask and getattr(stack.config, "image_size", None)]
    if len(images) != 1 or len(images) + sum(bool(stack.mask) for stack in stacks) < len(stacks):
        return seq_len
    size = images[0].image_size
    height, width = (size, size) if isinstance(size, int) else size
    inputs = {"pixel_values": torch.empty(1, images[0].num_channels, height, width, dtype=model.dtype, device="meta")}
    for stack in stacks:
        if stack.mask:
            most = getattr(stack.config, "max_position_embeddings", None) or seq_len
            inputs["input_ids"] = torch.zeros(1, min(seq_len, most), dtype=torch.long, device="meta")
    with quiet(model):
        counts = stack_tokens(model, inputs)
    return counts[0] if len(counts) == 1 else tuple(counts)


def _row(name: str, usual: str) -> tuple[int, str]:
    block, _, place = name.partition(".")
    return int(block), "" if place == usual else place
