"""The options of the commands. Those of a method's configuration are read from its source, not imported.

`optimum-cli` builds every parser at every start, and a configuration's module imports torch. The source also holds what
an import does not: the docstring under each field.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import command_values

PACKAGE = Path(__file__).parent
DEFAULT_METHOD = "stat"
READING = ("seq_len", "num_tokens", "max_examples", "batch_size", "seed")
SERVING = ("round_to", "serve_batch_size", "serve_seq_len", "serve_phase", "serve_compiled", "latency_table")
PLANNING = ("keep", "budget", "round_to", "seq_len", "num_tokens", "max_examples", "batch_size")


@dataclass(frozen=True)
class ConfigField:
    """One field of a configuration, as its source has it."""

    name: str
    annotation: str
    default: str
    doc: str

    @property
    def flag(self) -> str:
        """Its option."""
        return "--" + self.name.replace("_", "-")


def shared_fields() -> tuple[ConfigField, ...]:
    """The fields that every method has."""
    return _fields(_classes(PACKAGE / "config.py")["PruningConfig"])


def methods() -> dict[str, tuple[ConfigField, ...]]:
    """Method name -> the fields of its configuration that are its own."""
    found, shared = {}, _classes(PACKAGE / "trained_config.py")
    for path in sorted((PACKAGE / "methods").glob("*.py")):
        classes = {**shared, **_classes(path)}
        for node in classes.values():
            values = {a.target.id: a.value for a in node.body if isinstance(a, ast.AnnAssign) and isinstance(a.target, ast.Name)}
            name, config = values.get("method"), values.get("config_class")
            if isinstance(name, ast.Constant) and isinstance(config, ast.Name):
                found[str(name.value)] = _all_fields(classes[config.id], classes)
    return found


def _all_fields(node: ast.ClassDef, classes: Mapping[str, ast.ClassDef]) -> tuple[ConfigField, ...]:
    """A class's fields, after those of the classes that it extends (but for `PruningConfig`, which everybody has)."""
    above = [classes[base.id] for base in node.bases if isinstance(base, ast.Name) and base.id in classes]
    fields = {field.name: field for parent in above for field in _all_fields(parent, classes)}
    return tuple({**fields, **{field.name: field for field in _fields(node)}}.values())


def add_config_options(parser: argparse.ArgumentParser, without: Sequence[str] = ()) -> None:
    """One option for every field of every method's configuration; what is not given stays out of the result."""
    known = methods()
    group = parser.add_argument_group("how much to keep, and on how much data to decide it")
    group.add_argument("--method", choices=sorted(known), default=DEFAULT_METHOD, help="what chooses (default: %(default)s)")
    group.add_argument(
        "--paper",
        action="store_true",
        help="start from the method's published configuration instead of its best one, whose defaults are shown here",
    )
    shared, own = {field.name: field for field in shared_fields()}, dict[str, dict[str, ConfigField]]()
    for method, fields in known.items():
        for field in fields:
            own.setdefault(field.name, {})[method] = field
    for name, field in shared.items():
        others = "".join(f"; {method}: {theirs.default}" for method, theirs in own.pop(name, {}).items())
        if name not in without:
            _add_field(group, field, _help(dataclasses.replace(field, default=f"{field.default}{others}")))
    groups: dict[tuple[str, ...], Any] = {}
    for by_method in own.values():
        methods_of, field = tuple(by_method), next(iter(by_method.values()))
        if methods_of not in groups:
            groups[methods_of] = parser.add_argument_group(f"of method {' and '.join(methods_of)} only")
        texts = [(f"{method}: " if len(by_method) > 1 else "") + _help(each) for method, each in by_method.items()]
        _add_field(groups[methods_of], field, " ".join(texts))


def given_config(args: argparse.Namespace) -> dict[str, Any]:
    """The configuration's fields that the user gave. Raises KeyError, which says so, if the method has no such field."""
    known = methods()
    shared = {field.name: field for field in shared_fields()}
    own = {field.name: field for fields in known.values() for field in fields if field.name not in shared}
    everything = shared | own
    given = {name: value for name, value in vars(args).items() if name in everything}
    wrong = sorted(given.keys() & own.keys() - {field.name for field in known[args.method]})
    if wrong:
        having = [method for method, fields in known.items() if wrong[0] in {field.name for field in fields}]
        raise KeyError(f"{own[wrong[0]].flag} is no option of method {args.method}, but of {' and '.join(having)}.")
    return given


def add_reading_options(parser: argparse.ArgumentParser) -> None:
    """The shared fields that say how data is read; all of it by default."""
    group = parser.add_argument_group("how much of the data")
    for field in shared_fields():
        if field.name in READING:
            whole = dataclasses.replace(field, default="all") if field.name == "num_tokens" else field
            _add_field(group, whole, _help(whole))


def add_planning_options(parser: argparse.ArgumentParser) -> None:
    """What a run's size depends on: the shared fields, and the metric of the default method."""
    group = parser.add_argument_group("how much to keep, and on how much data to decide it")
    for field in (*shared_fields(), *methods()[DEFAULT_METHOD]):
        if field.name in (*PLANNING, "metric"):
            _add_field(group, field, _help(field))


def add_serving_options(parser: argparse.ArgumentParser) -> None:
    """The shared fields that a table of latencies depends on."""
    group = parser.add_argument_group("whose time")
    for field in shared_fields():
        if field.name in SERVING:
            own = dataclasses.replace(field, doc="Tokens of each of them; while decoding, those in the cache.", default="128")
            own = own if field.name == "serve_seq_len" else field
            _add_field(group, own, _help(own))


def given(args: argparse.Namespace, names: Collection[str]) -> dict[str, Any]:
    """What the user gave of the options of these names."""
    return {name: value for name, value in vars(args).items() if name in names}


def add_data_options(parser: argparse.ArgumentParser, split_help: str) -> None:
    """Which text to read."""
    group = parser.add_argument_group("data")
    group.add_argument(
        "-d",
        "--dataset",
        help="a dataset on the Hub, a folder of data, or a file: .txt (one row a line), .jsonl, .json, .csv, .parquet "
        "(default: a public-domain text that ships with the package; your own data is better)",
    )
    group.add_argument("--dataset-config", metavar="NAME", help="the dataset's configuration, such as sst2 of nyu-mll/glue")
    group.add_argument("--split", help=split_help)
    group.add_argument(
        "--text-columns",
        nargs="+",
        metavar="COLUMN",
        help="the column with the text, or two for pairs (default: found by name, such as text, or premise and hypothesis); "
        "all up to the next option is taken, so OUTPUT or MODEL comes first",
    )
    group.add_argument("--label-column", metavar="COLUMN", help="the column with the labels (default: found by name)")
    group.add_argument("--streaming", action="store_true", help="read rows as needed instead of downloading the whole dataset")


def add_training_options(parser: argparse.ArgumentParser) -> None:
    """What the methods that train take besides."""
    group = parser.add_argument_group("training, for methods that train")
    group.add_argument(
        "--training-args",
        nargs="+",
        metavar="NAME=VALUE",
        help="fields of transformers.TrainingArguments, such as num_train_epochs=3 learning_rate=5e-5 output_dir=checkpoints; "
        "all up to the next option is taken, so OUTPUT comes first",
    )
    group.add_argument("--eval-split", metavar="SPLIT", help="the part of the dataset to evaluate on (default: none)")
    group.add_argument("--teacher", help="a model to distill from (default: the dense model itself)")


def add_resume_option(parser: argparse.ArgumentParser) -> None:
    """For runs that somebody has stopped."""
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on where the same command was stopped: what it had finished, block by block, is in OUTPUT.resume; "
        "methods that train go on from the last checkpoint in output_dir",
    )


def given_training(args: argparse.Namespace) -> list[str]:
    """The options that the user gave of `add_training_options`."""
    names = ("training_args", "eval_split", "teacher")
    return ["--" + name.replace("_", "-") for name in names if getattr(args, name)]


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """How to load a model."""
    group = parser.add_argument_group("loading")
    group.add_argument("--task", help="what the model is for, if its config does not say: text-classification, fill-mask, ...")
    group.add_argument("--dtype", help="float32, bfloat16, float16 (default: as the weights are stored)")
    group.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: cuda if there is one, else cpu)")
    group.add_argument("--device-map", help="as in transformers, such as auto; instead of --device")
    add_placing_options(group)
    group.add_argument("--offload-folder", metavar="FOLDER", help="for weights that are left on the disk; as in transformers")
    group.add_argument("--revision", help="branch, tag or commit of the model's repo")
    group.add_argument("--subfolder", metavar="NAME", help="load what is in this folder of the model's folder or repo")
    group.add_argument("--gguf-file", metavar="NAME", help="load this file of the model's folder or repo")
    group.add_argument("--trust-remote-code", action="store_true", help="run the Python code that the repos of models hold")


def add_placing_options(parser: Any) -> None:
    """Where the weights lie."""
    parser.add_argument(
        "--max-memory",
        nargs="+",
        metavar="DEVICE=SIZE",
        help="as in transformers, such as cpu=8GiB 0=20GiB: what does not fit is offloaded, to the CPU or the disk; "
        "all up to the next option is taken, so OUTPUT or MODEL comes first",
    )


def given_max_memory(args: argparse.Namespace) -> dict[int | str, int | str] | None:
    """`--max-memory`, in the words of transformers. Raises ValueError if a part of it has no size."""
    if not args.max_memory:
        return None
    pairs = [part.partition("=") for part in args.max_memory]
    wrong = next((name for name, _, size in pairs if not name or not size), None)
    if wrong is not None:
        raise ValueError(f"--max-memory {' '.join(args.max_memory)} asked; it takes DEVICE=SIZE, such as cpu=8GiB 0=20GiB.")
    return {int(name) if name.isdigit() else name: int(size) if size.isdigit() else size for name, _, size in pairs}


def add_output_options(parser: argparse.ArgumentParser) -> None:
    """What to print."""
    group = parser.add_argument_group("output")
    group.add_argument("--json", action="store_true", help="print one JSON object, and nothing else, on standard output")
    group.add_argument(
        "--log-json", action="store_true", help="notes, warnings and progress as JSON, an object a line, on standard error"
    )
    group.add_argument("--quiet", action="store_true", help="no progress bars, notes and warnings")
    group.add_argument("--debug", action="store_true", help="show where an error came from")


def _classes(path: Path) -> dict[str, ast.ClassDef]:
    return {node.name: node for node in ast.parse(path.read_text("utf-8")).body if isinstance(node, ast.ClassDef)}


def _fields(node: ast.ClassDef) -> tuple[ConfigField, ...]:
    fields = []
    for item, after in zip(node.body, [*node.body[1:], None], strict=True):
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name) and item.value is not None:
            if ast.unparse(item.annotation).startswith("ClassVar"):
                continue
            text = after.value.value if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) else ""
            default = ast.unparse(item.value).strip("'")
            fields.append(ConfigField(item.target.id, ast.unparse(item.annotation), default, " ".join(str(text).split())))
    return tuple(fields)


def _help(field: ConfigField) -> str:
    default = ast.literal_eval(field.default) if field.annotation.startswith("tuple") else field.default
    shown = ",".join(default) if isinstance(default, tuple) else default.lower() if default == "None" else default
    return f"{field.doc} (default: {shown})"


def _add_field(group: Any, field: ConfigField, text: str) -> None:
    about: dict[str, Any] = {"default": argparse.SUPPRESS, "help": text.replace("%", "%%")}
    if field.annotation == "bool":
        group.add_argument(field.flag, action=argparse.BooleanOptionalAction, **about)
    elif field.annotation.startswith("tuple"):
        group.add_argument(field.flag, type=command_values.names, metavar="NAME,...", **about)
    else:
        kinds = {"float": float, "int": int, "int | None": command_values.number, "float | None": command_values.real}
        group.add_argument(field.flag, type=kinds.get(field.annotation, str), **about)
