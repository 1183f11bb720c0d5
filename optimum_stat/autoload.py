"""Pruned models load in every program that uses transformers, without importing transformers before the program does.

`install()` is what `import optimum_stat` calls. `turn_on()` makes every start of Python import optimum_stat, through a
`.pth` file; for that reason the top of this module imports only what Python has loaded by then anyway.
"""

from __future__ import annotations

import os
import sys

TYPE_CHECKING = False  # as typing has it, without the time to import typing
if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec
    from pathlib import Path
    from types import ModuleType
    from typing import Any

HOOKED = "transformers.modeling_utils"
SWITCH = "OPTIMUM_STAT_AUTOLOAD"
PTH_NAME = "optimum_stat.pth"
# Python reads such a file line by line. The line has to do nothing, and to say nothing, once the package is gone.
PTH_TEXT = (
    f"import os; os.environ.get('{SWITCH}') == '0' or exec('try:\\n    import optimum_stat\\nexcept ImportError:\\n    pass')\n"
)


def install() -> None:
    """Let `PreTrainedModel` replay recorded prunings: now if transformers is loaded, else as soon as it is."""
    if HOOKED in sys.modules:
        _install_structure()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def turn_on() -> str:
    """Make every start of Python in this environment call `install()`; returns the new `status()`.

    Writes `optimum_stat.pth` beside the installed package and lists it in the package's RECORD, so that uninstalling
    (and hence upgrading) removes it. Errors: RuntimeError if optimum-stat is not installed, or is where Python reads no
    `.pth` files, or a file cannot be written.
    """
    record, pth = _files()
    _list_in_record(record, pth)  # first, so that at no time a file exists that uninstalling would leave behind
    try:
        _replace(pth, PTH_TEXT.encode())
    except RuntimeError:
        _drop_from_record(record)
        raise
    return status()


def turn_off() -> str:
    """Undo `turn_on()`; returns the new `status()`. Errors: as `turn_on()`."""
    record, pth = _files()
    try:
        pth.unlink(missing_ok=True)
    except OSError as error:
        raise _unwritable(pth, error) from error
    _drop_from_record(record)
    return status()


def status() -> str:
    """One line, "on: ..." or "off: ...", that says what happens at the start of Python in this environment."""
    try:
        _, pth = _files()
    except RuntimeError as error:
        return f"off: {error}"
    if not pth.is_file():
        return "off: pruned models load in programs that import optimum_stat"
    if os.environ.get(SWITCH) == "0":
        return f"off: {SWITCH}=0 is set; without it {pth} would be at work"
    return f"on: pruned models load in every program of this environment, through {pth}"


class _Finder:
    """Has the other finders find `transformers.modeling_utils`, and `_Loader` load it."""

    def __init__(self) -> None:
        self.asking = False

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != HOOKED or self.asking:
            return None
        import importlib.util

        self.asking = True
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self.asking = False
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, self)  # type: ignore[assignment]
        return spec


class _Loader:
    """Runs the module with its own loader, which it leaves in its place, then installs the hook."""

    def __init__(self, loader: Any, finder: _Finder) -> None:
        self.loader = loader
        self.finder = finder

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        module: ModuleType | None = self.loader.create_module(spec)
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self.loader
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        self.loader.exec_module(module)
        if self.finder in sys.meta_path:
            sys.meta_path.remove(self.finder)
        try:
            _install_or_defer(module)
        except Exception as error:  # whatever it is, transformers has to stay usable
            import warnings

            message = f"optimum-stat could not be hooked into transformers, so pruned models will not load: {error!r}"
            warnings.warn(message, RuntimeWarning, stacklevel=2)


def _install_or_defer(module: Any) -> None:
    """Install at once; or at the first model that is built, if a half-imported module of ours imports transformers."""
    ours = [loaded for name, loaded in list(sys.modules.items()) if name.startswith("optimum_stat.")]
    if not any(getattr(loaded.__spec__, "_initializing", False) for loaded in ours):
        _install_structure()
        return
    model_class = module.PreTrainedModel
    original = model_class.post_init

    def post_init(self: Any) -> None:
        model_class.post_init = original
        _install_structure()
        model_class.post_init(self)

    post_init._optimum_stat = True  # type: ignore[attr-defined]
    model_class.post_init = post_init


def _install_structure() -> None:
    from optimum_stat import structure

    structure.install()


def _files() -> tuple[Path, Path]:
    """The installed package's RECORD, and where the `.pth` file belongs. Errors: RuntimeError, see `turn_on`."""
    from importlib.metadata import PackageNotFoundError, distribution
    from pathlib import Path

    try:
        listed = distribution("optimum-stat").files or []
    except PackageNotFoundError:
        source = Path(__file__).parent
        raise RuntimeError(
            f"optimum-stat is not installed in {sys.prefix}, it runs from {source}: install it with pip, "
            "or import optimum_stat in your program"
        ) from None
    records = [file for file in listed if file.name == "RECORD" and file.parent.name.endswith(".dist-info")]
    if not records:
        raise RuntimeError(
            "optimum-stat was installed without a RECORD of its files, so nothing would remove "
            f"{PTH_NAME} with it: install it with pip, or import optimum_stat in your program"
        )
    record = Path(str(records[0].locate())).resolve()
    folder = record.parent.parent
    if folder not in _folders_with_pth():
        raise RuntimeError(
            f"optimum-stat is installed in {folder}, where Python does not read .pth files (installed with --target, "
            "or found through PYTHONPATH?): install it into an environment, or import optimum_stat in your program"
        )
    return record, folder / PTH_NAME


def _folders_with_pth() -> set[Path]:
    import site
    import sysconfig
    from pathlib import Path

    folders = [*site.getsitepackages(), sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    if site.ENABLE_USER_SITE:
        folders.append(site.getusersitepackages())
    return {Path(folder).resolve() for folder in folders}


def _list_in_record(record: Path, pth: Path) -> None:
    """Add the file's line; its columns are path, sha256 (URL-safe base64 without padding) and size in bytes."""
    import base64
    import hashlib

    content = PTH_TEXT.encode()
    digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
    kept = _other_lines(record)
    end = b"\r\n" if kept.endswith(b"\r\n") else b"\n"
    start = b"" if kept.endswith(b"\n") or not kept else end
    _replace(record, kept + start + f"{pth.name},sha256={digest},{len(content)}".encode() + end)


def _drop_from_record(record: Path) -> None:
    _replace(record, _other_lines(record))


def _other_lines(record: Path) -> bytes:
    lines = record.read_bytes().splitlines(keepends=True)
    return b"".join(line for line in lines if not line.startswith(f"{PTH_NAME},".encode()))


def _replace(path: Path, content: bytes) -> None:
    """Write beside, then rename: installers hard-link files into several environments, this must change one."""
    if path.is_file() and path.read_bytes() == content:
        return
    beside = path.with_name(path.name + ".tmp")
    try:
        beside.write_bytes(content)
        beside.replace(path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise _unwritable(path, error) from error


def _unwritable(path: Path, error: OSError) -> RuntimeError:
    return RuntimeError(
        f"{path} cannot be written or removed ({error.strerror}): run this as the owner of the environment, "
        "or import optimum_stat in your program"
    )
