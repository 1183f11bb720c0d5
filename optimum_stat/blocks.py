"""Where a model keeps its blocks: one list of them for each residual stream, and what is known of the tokens in it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from .anatomy import attentions, inventory_of_model
from .family_table import FAMILIES, Family

TOKENS, OF_DECODER = "attention_mask", "decoder_attention_mask"
KEY = "stat_pruning"  # of the record that a pruned model's config has


@dataclass(frozen=True, eq=False)
class Stack:
    """A list of blocks along one residual stream: a decoder, an encoder, the tower of one kind of input."""

    path: str
    blocks: nn.ModuleList
    config: Any
    """Of the model that it belongs to, or of a part that has one of its own."""
    mask: str
    """The input [examples, length] that says which tokens are real; "": all are, as with pixels and waveforms."""


def find_stacks(model: Any) -> list[Stack]:
    """The lists of blocks of `model`, whatever head sits on top; the encoder before the decoder that reads what it returns.

    Raises:
        ValueError: the model is not built of blocks with attention whose parts have known names; says what was found.
    """
    refused = family_of(model).refused
    if refused and getattr(model.config, refused[0], None):
        raise unknown(model, f"config.{refused[0]} is set, and {refused[1]}")
    found: dict[str, nn.ModuleList] = {}
    base = getattr(model, "base_model", model)
    for name, module in base.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) and not any(name.startswith(f"{outer}.") for outer in found):
            found |= {name: module} if any(attentions(module[0])) else {}
    if not found:
        raise unknown(model, inventory_of_model(base))
    return [_stack(model, base, path, blocks, position) for position, (path, blocks) in enumerate(found.items())]


def find_blocks(model: Any) -> nn.ModuleList:
    """The transformer blocks of all stacks, one after the other. One that runs several times stands here once."""
    stacks = find_stacks(model)
    return stacks[0].blocks if len(stacks) == 1 else nn.ModuleList(block for stack in stacks for block in stack.blocks)


def _stack(model: Any, base: Any, path: str, blocks: nn.ModuleList, position: int) -> Stack:
    """Its config and its kind of input are those of the innermost module around it that has some."""
    parts = path.split(".")
    around = [model, base, *(base.get_submodule(".".join(parts[:depth])) for depth in range(1, len(parts)))]
    config = next(config for module in reversed(around) if (config := getattr(module, "config", None)) is not None)
    reads = next((name for module in reversed(around) if (name := getattr(module, "main_input_name", None))), "input_ids")
    mask = OF_DECODER if position and getattr(model.config, "is_encoder_decoder", False) else TOKENS
    return Stack(path, blocks, config, mask if reads == "input_ids" else "")


def family_of(model: Any) -> Family:
    """What is known about the model's family beyond names and shapes: nothing, for one that nobody listed."""
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if not isinstance(kind, str):
        raise ValueError(
            f"optimum-stat cannot prune {kind!r} models ({type(model).__name__}): it has no config with a model_type."
        )
    return FAMILIES.get(kind, Family())


def is_encoder_decoder(model: Any) -> bool:
    """Whether the last of several stacks reads what the first returns."""
    return bool(getattr(model.config, "is_encoder_decoder", False)) and len(find_stacks(model)) > 1


def modalities(model: Any) -> tuple[str, ...]:
    """What the model reads: "text", "image", "audio"."""
    own = getattr(model, "input_modalities", "text")
    return (own,) if isinstance(own, str) else tuple(own)


def reads_tokens_alone(model: Any) -> bool:
    """Whether one list of blocks reads token ids, and the model nothing else."""
    stacks = find_stacks(model)
    return len(stacks) == 1 and stacks[0].mask == TOKENS


def mask_of_output(model: Any) -> str:
    """The input that says for which tokens the model predicts something: that of its last stack, if it reads another's."""
    stacks = find_stacks(model)
    return stacks[-1].mask if len(stacks) == 1 or is_encoder_decoder(model) else ""


def applications_of(model: Any) -> int:
    """How often a forward pass runs each block, one application after the other: more than once where layers share one."""
    blocks = getattr(model.config, "num_hidden_groups", None)
    if blocks is None:
        return 1
    layers = model.config.num_hidden_layers
    if getattr(model.config, "inner_group_num", 1) != 1 or layers % blocks:
        raise unknown(
            model, "its layers share several blocks in turn, and only blocks that run one after the other are supported"
        )
    return int(layers // blocks)


def is_causal(model: Any) -> bool:
    """Whether the tokens of the last stack see only what stands before them."""
    return stack_is_causal(model, find_stacks(model)[-1])


def lacks_padding(model: Any) -> bool:
    """Whether it is a decoder that classifies an example by its last token, and does not know what follows that."""
    reads_last = type(model).__name__.endswith("ForSequenceClassification") and reads_tokens_alone(model) and is_causal(model)
    return reads_last and getattr(model.config.get_text_config(), "pad_token_id", None) is None


def stack_is_causal(model: Any, stack: Stack) -> bool:
    """The same, of one stack."""
    known = family_of(model).causal
    if isinstance(known, str):
        known = known in stack.path.split(".")
    if known is None:
        known = bool(getattr(next(attentions(stack.blocks[0])).module, "is_causal", False))
    own = stack.config if stack.config is not model.config or not getattr(model.config, "is_encoder_decoder", False) else None
    return known or bool(getattr(own, "is_decoder", False))


def sliding_window(config: Any, block: int) -> int | None:
    """How many tokens the attention of one block sees at most, back from each with itself; None if there is no limit."""
    types = getattr(config, "layer_types", None)
    local = types[block] == "sliding_attention" if types else getattr(config, "use_sliding_window", True)
    return getattr(config, "sliding_window", None) if local else None


def width_of_head(config: Any) -> int:
    """The width of one head. Pruning never changes it, so the dense model's config tells it."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def unknown(model: Any, why: str) -> ValueError:
    """What to raise for a model that cannot be pruned."""
    kind = model.config.model_type
    return ValueError(
        f"optimum-stat cannot prune {kind!r} models ({type(model).__name__}): {why}. It knows {', '.join(FAMILIES)}, and models "
        f"whose parts have the same names; how to add others stands in {Family.__module__}."
    )
