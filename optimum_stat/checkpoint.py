"""Load a model to prune; save and push a pruned one so that anyone can load it."""

from __future__ import annotations

import errno
import json
import tempfile
import warnings
from contextlib import ExitStack, suppress
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from safetensors import SafetensorError
from torch import nn
from transformers import MODEL_FOR_CTC_MAPPING, AutoConfig, AutoProcessor, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from . import card, folders, loaded, remote_code
from .blocks import find_blocks, modalities
from .hub import Destination, impatient
from .offload import free_at_once, is_offloaded, reading_copies
from .processes import Processes
from .publishing import publish
from .recipe import make_recipe
from .sources import Source, located, source_of
from .structure import KEY, describe

if TYPE_CHECKING:
    from .pruner import Pruner

TASKS = {
    "audio-classification": "AutoModelForAudioClassification",
    "automatic-speech-recognition": "AutoModelForSpeechSeq2Seq",
    "feature-extraction": "AutoModel",
    "fill-mask": "AutoModelForMaskedLM",
    "image-classification": "AutoModelForImageClassification",
    "question-answering": "AutoModelForQuestionAnswering",
    "text-classification": "AutoModelForSequenceClassification",
    "text-generation": "AutoModelForCausalLM",
    "text2text-generation": "AutoModelForSeq2SeqLM",
    "token-classification": "AutoModelForTokenClassification",
    "zero-shot-image-classification": "AutoModelForZeroShotImageClassification",
}
CONFIG_ARGUMENTS = ("revision", "gguf_file", "trust_remote_code", "token", "cache_dir", "subfolder", "local_files_only")


def load(
    model_or_path: str | Path | PreTrainedModel,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    task: str | None = None,
    **kwargs: Any,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None, Source | None]:
    """(model, tokenizer, where it came from); `kwargs` go to `AutoModel....from_pretrained`."""
    if isinstance(model_or_path, nn.Module):
        if kwargs or task:
            names = ", ".join([*kwargs, *(["task"] if task else [])])
            raise TypeError(f"{names} asked for a model that is loaded already; load it with them, or pass its path.")
        _forget_gguf(model_or_path)
        if is_offloaded(model_or_path):
            free_at_once()
        return model_or_path, tokenizer, source_of(getattr(model_or_path, "name_or_path", ""), model_or_path)
    path, gguf = located(model_or_path)
    kwargs |= gguf
    shared = {name: kwargs[name] for name in CONFIG_ARGUMENTS if name in kwargs}
    with impatient(path), loaded.explained(path, shared):
        found = auto_class(path, task, shared).from_pretrained(path, **{**kwargs, "output_loading_info": True})
    model, info = found if isinstance(found, tuple) else (found, {})  # a class of the repo's own may not know the option
    loaded.refuse_incomplete(model, path, info)
    _forget_gguf(model)
    if is_offloaded(model):
        free_at_once()
    if tokenizer is None:
        with impatient(path):
            tokenizer = loaded.reader(path, shared, AutoTokenizer if modalities(model) == ("text",) else AutoProcessor)
    return model, tokenizer, source_of("/".join(filter(None, (path, kwargs.get("gguf_file")))), model, kwargs)


def save(pruner: Pruner[Any], folder: Path, **kwargs: Any) -> None:
    """Everything of a pruned model into a new or empty folder, where it appears at the end, as a whole.

    Of several processes the main one writes, and the others wait for it.
    """
    processes = Processes.launched()
    processes.as_main(lambda: _save(pruner, folder, **kwargs))
    processes.wait()


def _save(pruner: Pruner[Any], folder: Path, *, push_to_hub: bool = False, **kwargs: Any) -> None:
    if push_to_hub:  # transformers would push the weights alone, without what loads them
        raise ValueError("save_pretrained(push_to_hub=True) asked; push with push_to_hub(repo_id). Nothing was saved or pushed.")
    folder = folders.target(folder)
    folders.refuse_full(folder, "written")
    check_record(pruner.model)
    with folders.written_as_a_whole(folder) as half:
        write_repo(pruner, half, folder.name, **kwargs)


def push(pruner: Pruner[Any], repo_id: str, **options: Any) -> str:
    """Upload what `save` writes in one commit, from the main process; returns its address. options: those of `_push`.

    Raises:
        TypeError: an option that there is not. It may have been meant to keep the repo private.
    """
    known = [each.name for each in signature(_push).parameters.values() if each.kind is each.KEYWORD_ONLY]
    unknown = [name for name in options if name not in known]
    if unknown:
        raise TypeError(f"push_to_hub has no option {unknown[0]}; it has {', '.join(known)}. Nothing was pushed.")
    return Processes.launched().as_main(lambda: _push(pruner, repo_id, **options))


def _push(
    pruner: Pruner[Any],
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    commit_message: str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    max_shard_size: int | str | None = None,
    variant: str | None = None,
) -> str:
    check_record(pruner.model)
    to = Destination.checked(repo_id, private=private, token=token)
    form = {"max_shard_size": max_shard_size, "variant": variant}
    with ExitStack() as stack:
        try:  # before the repo is made, which would be left empty
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            write_repo(pruner, folder, to.repo_id, **{key: value for key, value in form.items() if value is not None})
        except (OSError, SafetensorError) as error:
            raise OSError(
                getattr(error, "errno", None) or errno.EIO,
                f"Nothing was pushed to {to.repo_id}, and the model in memory is unharmed: what is to be pushed could not be "
                f"written to the folder for temporary files: {error}. Make room, or set TMPDIR to a folder that has it.",
            ) from error
        try:
            return publish(folder, to, commit_message, revision, create_pr)
        except ConnectionError as error:
            raise ConnectionError(f"{error} Try again, or keep it with save_pretrained(folder).") from error


def write_repo(pruner: Pruner[Any], folder: Path, name: str, **kwargs: Any) -> None:
    """Weights, config, tokenizer, recipe, remote-code loader and card; `name` is what the card calls it."""
    config = pruner.model.config
    before = getattr(config, "auto_map", None)
    config.auto_map = dict(before or {}) if remote_code.own_auto_class(pruner.model) else remote_code.write(pruner.model, folder)
    try:
        with warnings.catch_warnings(), reading_copies(pruner.model):
            warnings.filterwarnings("ignore", "Attempting to save a model with offloaded modules")  # a shard at a time: it fits
            pruner.model.save_pretrained(folder, **{**shard_size(pruner.model), **kwargs})
    finally:
        del config.auto_map
        if before is not None:
            config.auto_map = before
    for weights in folder.glob("*.safetensors"):  # safetensors 0.8 keeps all other users out of these, whatever the umask says
        with suppress(PermissionError):  # some network disks have no modes to change
            weights.chmod((folder / "config.json").stat().st_mode)
    if pruner.tokenizer is not None:
        pruner.tokenizer.save_pretrained(folder)
    recipe = make_recipe(pruner)
    (folder / folders.RECIPE).write_text(json.dumps(recipe, indent=2) + "\n")
    card.write(folder, recipe, name, pruner.paper)


def shard_size(model: PreTrainedModel) -> dict[str, int]:
    """Of an offloaded model shards no larger than a block, or the largest weight: each has to be in memory to be written."""
    if not is_offloaded(model):
        return {}
    blocks = [sum(p.numel() * p.element_size() for p in block.parameters()) for block in find_blocks(model)]
    return {"max_shard_size": max(max(blocks), *(p.numel() * p.element_size() for p in model.parameters()))}


def check_record(model: PreTrainedModel) -> None:
    """Refuse to write what would not load: build the model from its config on the meta device and compare every shape."""
    if getattr(model.config, KEY, None) is None:
        raise ValueError("This model has not been pruned: call prune(dataset) first.")
    try:
        sizes: Any = describe(model)
    except ValueError:  # its layers do not fit together any more, so no groups are found
        sizes = None
    if getattr(model.config, KEY) != sizes:
        raise ValueError("The model was changed after pruning: its sizes are not those of its record. Prune it anew.")
    with torch.device("meta"):
        rebuilt = type(model)(type(model.config).from_dict(model.config.to_dict()))
    wanted = {name: tuple(value.shape) for name, value in rebuilt.state_dict().items()}
    found = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    wrong = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
    if wrong:
        name = wrong[0]
        raise ValueError(
            f"{len(wrong)} weights would not load again, {name} first: {found.get(name)} in the model, {wanted.get(name)} "
            "built from its config. Did something else than optimum-stat change the model's shape?"
        )


def auto_class(path: str, task: str | None, shared: dict[str, Any]) -> Any:
    """The class that `config.architectures` names, or the Auto class of `task`, or of code of the repo's own that may run."""
    if task is not None:
        if task not in TASKS:
            raise ValueError(f"task={task!r} asked; known are {', '.join(TASKS)}.")
        if task == "automatic-speech-recognition" and type(AutoConfig.from_pretrained(path, **shared)) in MODEL_FOR_CTC_MAPPING:
            return transformers.AutoModelForCTC
        return getattr(transformers, TASKS[task])
    if shared.get("gguf_file"):
        return transformers.AutoModelForCausalLM
    config = AutoConfig.from_pretrained(path, **shared)
    architectures = config.architectures
    own = remote_code.auto_class(config) if shared.get("trust_remote_code") else None
    if own is not None:
        return getattr(transformers, own)
    if not architectures:
        raise ValueError(f"config.json of {path} names no architecture; say what it is with task=: {', '.join(TASKS)}.")
    known = getattr(transformers, architectures[0], None)
    if known is None:
        raise ValueError(
            f"config.json of {path} names {architectures[0]}, which transformers {transformers.__version__} does not have; "
            f"say what to load with task=: {', '.join(TASKS)}."
        )
    return known


def _forget_gguf(model: Any) -> None:
    """transformers has dequantized the weights of a GGUF file, but still calls the model quantized and refuses to save it."""
    method: Any = getattr(model, "quantization_method", None)
    if getattr(method, "value", method) != "gguf":
        return
    model.is_quantized = False
    for name in ("hf_quantizer", "quantization_method"):
        model.__dict__.pop(name, None)
    del model.config.quantization_config
