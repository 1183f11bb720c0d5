"""What all commands share: they print a result, or one line that says what went wrong."""

from __future__ import annotations

import json
import logging
import math
import os
import re
import sys
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from datetime import timedelta
from pathlib import Path
from typing import Any, ClassVar, NoReturn, final

from optimum.commands.base import BaseOptimumCLICommand

from . import command_options

Result = tuple[str, dict[str, Any]]
LOGGER = logging.getLogger("optimum_stat")
MAIN = os.environ.get("RANK", "0") in ("", "0")  # of the processes that a launcher started
LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
PLAIN = (ValueError, OSError, RuntimeError, ImportError)  # whose messages speak for themselves


class WrongArguments(ValueError):
    """The command line cannot be meant like that: exit code 2."""


class Command(BaseOptimumCLICommand):
    """A command that prints a result, as text or JSON, or one line that says what is wrong."""

    args: Any
    parser: Any
    shared: ClassVar[bool] = False
    """Whether the processes that a launcher started share the work; else the main one does it, and the others nothing."""

    @abstractmethod
    def work(self) -> Result:
        """Do it; returns what to print, for people and as plain JSON values."""

    @final
    def run(self) -> None:
        """Exit codes: 0, 1 (it went wrong), 2 (wrong arguments), 130 (Ctrl-C)."""
        if not (MAIN or self.shared):
            return
        together = _parted() if self.shared else _alone()
        try:
            with redirect_stdout(sys.stderr), _messages(self.args.quiet or not MAIN, self.args.log_json), together:
                text, values = self.work()
        except KeyboardInterrupt:
            _fail(130, "interrupted")
        except Exception as error:
            if self.args.debug:
                raise
            _fail(2 if isinstance(error, WrongArguments) else 1, _line(error))
        if MAIN:
            _print(json.dumps(_finite(values), indent=2) if self.args.json else text)


def check_model(model: str) -> None:
    """Refuse what can only be a folder and is none, before any work."""
    model = model.rpartition("/")[0] if model.endswith(".gguf") else model
    looks_like_path = model != os.path.normpath(model) or model.count("/") > 1 or model.startswith(("/", ".", "~"))
    if looks_like_path and not Path(model).exists():
        raise FileNotFoundError(f"model {model} asked, but there is no such folder.")


def loading(args: Any) -> dict[str, Any]:
    """What goes to from_pretrained."""
    names = ("dtype", "device_map", "offload_folder", "revision", "subfolder", "gguf_file", "trust_remote_code")
    found = {name: getattr(args, name) for name in names if getattr(args, name)}
    try:
        max_memory = command_options.given_max_memory(args)
    except ValueError as error:
        raise WrongArguments(str(error)) from error
    if (max_memory or args.offload_folder) and not args.device_map:
        raise WrongArguments("--max-memory and --offload-folder go with --device-map, such as --device-map auto.")
    return {**found, **({"max_memory": max_memory} if max_memory else {})}


def device(args: Any) -> Any:
    """Where to move the model; None: where `--device-map` puts it."""
    import torch

    if args.device_map:
        return None
    asked = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from accelerate import PartialState

        from .processes import Processes

        Processes.launched(cpu=asked == "cpu")
        asked = str(PartialState().device) if asked == "cuda" else asked
    try:
        device = torch.device(asked)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {asked} asked, but it cannot be used: {error}") from error
    return device


@contextmanager
def _parted() -> Iterator[None]:
    """Leave the other processes properly, if a launcher started several and they were connected."""
    try:
        yield
    finally:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            import torch.distributed

            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()


@contextmanager
def _alone() -> Iterator[None]:
    """As if no launcher had started this process: the others do nothing, so they are not waited for."""
    before = {name: os.environ.pop(name) for name in LAUNCHED if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(before)


@contextmanager
def _messages(quiet: bool, as_json: bool) -> Iterator[None]:
    """Our notes and warnings on standard error, or none of them, nor progress bars; all as before afterwards."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_JsonFormatter() if as_json else _Formatter())
    before = LOGGER.level, LOGGER.propagate
    LOGGER.setLevel(logging.ERROR if quiet else logging.DEBUG if as_json else logging.INFO)
    LOGGER.propagate = False
    LOGGER.addHandler(handler)
    try:
        with _silenced() if quiet or as_json else nullcontext():
            yield
    finally:
        LOGGER.removeHandler(handler)
        LOGGER.setLevel(before[0])
        LOGGER.propagate = before[1]


@contextmanager
def _silenced() -> Iterator[None]:
    before = os.environ.get("TQDM_DISABLE")
    os.environ["TQDM_DISABLE"] = "1"  # tqdm reads it when imported; reading .gguf files shows a bar of its own
    import datasets
    from transformers.utils import logging as hf

    level, bars, more_bars = hf.get_verbosity(), hf.is_progress_bar_enabled(), datasets.are_progress_bars_disabled()
    hf.set_verbosity_error()
    hf.disable_progress_bar()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        os.environ.pop("TQDM_DISABLE")
        os.environ.update({} if before is None else {"TQDM_DISABLE": before})
        hf.set_verbosity(level)
        if bars:
            hf.enable_progress_bar()
        if not more_bars:
            datasets.enable_progress_bars()


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return f"{'note' if record.levelno <= logging.INFO else record.levelname.lower()}: {record.getMessage()}"


class _JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        own = {"level": record.levelname.lower(), "message": record.getMessage()}
        return json.dumps({"time": round(record.created, 3), **own, **getattr(record, "progress", {})})


def _line(error: Exception) -> str:
    text = " ".join(str(error).split())
    if text and isinstance(error, PLAIN):
        return text
    return f"{type(error).__name__}: {text} (--debug shows where)"


def _fail(code: int, line: str) -> NoReturn:
    if _is_first(line):
        print(f"error: {line}" if code != 130 else line, file=sys.stderr)
    raise SystemExit(code)


def _is_first(line: str) -> bool:
    """Whether no other of the processes that a launcher started has said so: its store can tell, if it outlives them."""
    if os.environ.get("WORLD_SIZE", "1") == "1" or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return True
    import torch.distributed

    from .processes import OF_MAIN

    said = re.sub(r"^Process \d+ of", "Process of", line.removeprefix(OF_MAIN))
    place, start = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])), os.environ.get("TORCHELASTIC_RESTART_COUNT")
    try:
        distributed: Any = torch.distributed
        store = distributed.TCPStore(*place, timeout=timedelta(seconds=10))
        return store.add(f"optimum-stat {start} {said}", 1) == 1
    except RuntimeError:
        return True


def _print(text: str) -> None:
    """The result, in the characters that standard output has."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    try:
        print(text.encode(encoding, "backslashreplace").decode(encoding), flush=True)
    except BrokenPipeError:  # nobody reads on, such as `| head`
        _silence(sys.stdout)
    except OSError as error:
        _silence(sys.stdout)
        _fail(1, f"All is done, but the result cannot be printed: {error}")


def _silence(stream: Any) -> None:
    """What Python still has for it goes nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _finite(value: Any) -> Any:
    """JSON has no NaN."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
