"""What can be wrong with a model that is loaded: errors in clear words, weights that are missing, broken tokenizers."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers.utils.hub import cached_file
from transformers.utils.peft_utils import find_adapter_config_file

from .blocks import find_blocks
from .offload import is_offloaded

logger = logging.getLogger(__name__)

OF_READERS = (
    *("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json", "processor_config.json"),
    *("vocab.txt", "vocab.json", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model"),
)
"""A tokenizer or processor has one of these at least."""
IN_ORDER = tuple(name + end for name in ("model.safetensors", "pytorch_model.bin") for end in ("", ".index.json"))
"""What transformers takes weights from: the first of these that is there."""
FOUND_BY = ("revision", "token", "cache_dir", "subfolder", "local_files_only")


@contextmanager
def explained(path: str, asked: Mapping[str, Any]) -> Iterator[None]:
    """Name the model in errors that do not, and what is no model but an adapter for one. asked: as for from_pretrained.

    Raises:
        OSError: the weights' files are damaged.
        ValueError: it is an adapter.
    """
    try:
        yield
    except SafetensorError as error:
        raise OSError(
            f"The weights of {path} cannot be read: {error}. Their file is damaged, or not all of it is there."
        ) from error
    except (OSError, ValueError, LookupError, TypeError) as error:
        damaged = _damaged_index(path, asked)
        if damaged is not None:
            raise OSError(f"The weights of {path} cannot be read: {damaged} is damaged, or not all of it is there.") from error
        if isinstance(error, (LookupError, TypeError)) or not _is_adapter(path, asked):
            raise
        raise ValueError(
            f"{path} has adapters for another model, and no weights of its own: merge them first, merge_and_unload() does, and "
            "save the result."
        ) from error


def refuse_incomplete(model: Any, path: str, info: Mapping[str, Any]) -> None:
    """Raise if weights of the blocks were not there to be loaded; warn of others, such as those of a new head.

    info: what from_pretrained says with `output_loading_info`.

    Raises:
        ValueError: weights of blocks were made at random, or nothing at all was loaded.
    """
    if any(parameter.is_meta for parameter in model.parameters()) and not is_offloaded(model):
        raise ValueError(f"The weights of {path} were not loaded: device_map='meta' leaves them out. Ask for another one.")
    random = sorted({*info.get("missing_keys", ()), *(name for name, *_ in info.get("mismatched_keys", ()))})
    if not random:
        return
    blocks = set[int]()
    with suppress(ValueError):  # of a family that is not known: those who prune say so
        blocks.update(map(id, find_blocks(model)))
    inside = tuple(f"{name}." for name, module in model.named_modules() if id(module) in blocks)
    lost = [name for name in random if name.startswith(inside)]
    if lost:
        raise ValueError(
            f"{path} lacks {len(lost)} weights of the blocks of a {type(model).__name__}, or has them in other sizes, {lost[0]} "
            "first: transformers would make them at random. Is all of it there, and is it of this class?"
        )
    logger.warning("%s lacks %s: made at random, and what is computed with them means nothing.", path, ", ".join(random))


def reader(path: str, asked: Mapping[str, Any], auto: Any) -> Any:
    """The tokenizer or processor beside a model; None if there is none, or, with a warning that says why, it cannot be read."""
    try:
        return auto.from_pretrained(path, **asked)
    except ImportError:  # says what to install
        raise
    except Exception as error:  # the library of fast tokenizers raises nothing more special
        if asked.get("gguf_file") or any(_is_there(path, name, asked) for name in OF_READERS):
            reason = " ".join(str(error).split())
            logger.warning("the tokenizer or processor of %s cannot be read, so there is none: %s", path, reason)
        return None  # tokenized data needs none


def _damaged_index(path: str, asked: Mapping[str, Any]) -> str | None:
    """The index of shards that lies here and is none; transformers says of it what Python does."""
    for name in IN_ORDER:
        found = None
        with suppress(OSError, ValueError):  # no such repo, or none of it in the cache
            found = cached_file(
                path, name, **{**_found_by(asked), "local_files_only": True}, _raise_exceptions_for_missing_entries=False
            )
        if found is None:
            continue
        if not name.endswith(".json"):
            return None
        try:
            return None if json.loads(Path(found).read_text("utf-8"))["weight_map"] else name
        except (ValueError, LookupError, TypeError):
            return name
    return None


def _is_adapter(path: str, asked: Mapping[str, Any]) -> bool:
    with suppress(OSError):  # no such repo, which the error at hand says
        return find_adapter_config_file(path, **_found_by(asked)) is not None
    return False


def _is_there(path: str, name: str, asked: Mapping[str, Any]) -> bool:
    try:
        return cached_file(path, name, **_found_by(asked), _raise_exceptions_for_missing_entries=False) is not None
    except OSError:  # the Hub does not answer
        return True


def _found_by(asked: Mapping[str, Any]) -> dict[str, Any]:
    return {name: asked[name] for name in FOUND_BY if asked.get(name) is not None}
