"""What pip puts on a disk and takes off again, with real wheels in real environments, without the network."""

from __future__ import annotations

import ast
import os
import re
import resource
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

import optimum_stat

ROOT = Path(__file__).parents[1]
CLI = "from optimum.commands.optimum_cli import main; main()"
REGISTERED = "optimum/commands/register/register_stat.py"


def call(*command: str | Path, cwd: Path | None = None) -> str:
    environ = {**os.environ, "PYTHONPATH": "", "PIP_NO_INDEX": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    done = subprocess.run(command, cwd=cwd, env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@dataclass(frozen=True)
class Environment:
    """A virtual environment, as empty as possible."""

    folder: Path

    @property
    def site(self) -> Path:
        return next(self.folder.glob("lib/python*/site-packages"))

    def python(self, code: str, *arguments: str) -> str:
        return call(self.folder / "bin" / "python", "-c", code, *arguments, cwd=self.folder)

    def pip(self, *arguments: str | Path) -> str:
        return call(self.folder / "bin" / "python", "-m", "pip", *arguments, cwd=self.folder)

    def files(self) -> set[str]:
        """Files and folders; but not what Python caches."""
        paths = (path.relative_to(self.folder) for path in self.folder.rglob("*"))
        return {str(path) for path in paths if "__pycache__" not in path.parts}


@pytest.fixture
def environment(tmp_path: Path) -> Environment:
    """With links to all that is installed beside us, but without us."""
    venv.create(tmp_path / "env", symlinks=True)
    made = Environment(tmp_path / "env")
    link_all_but_ours(Path(sysconfig.get_path("purelib")), made.site, shared=["optimum", "commands"])
    return made


def link_all_but_ours(installed: Path, folder: Path, shared: list[str]) -> None:
    """The folders in `shared`, one inside the other, are real: in any environment they are optimum's and ours."""
    for path in installed.iterdir():
        if path.name in shared[:1]:
            (folder / path.name).mkdir()
            link_all_but_ours(path, folder / path.name, shared[1:])
        elif "optimum_stat" not in path.name and path.name != "register":
            (folder / path.name).symlink_to(path)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the source tree, since building and installing from it may leave files in it."""
    ignored = shutil.ignore_patterns(".git", ".venv", ".*_cache", ".hypothesis", "__pycache__", "build", "dist")
    return shutil.copytree(ROOT, tmp_path_factory.mktemp("source") / "optimum-stat", ignore=ignored, symlinks=True)


def build_wheel(source: Path, folder: Path) -> Path:
    options = ("--no-build-isolation", "--no-deps", "--quiet", "--wheel-dir", folder)
    call(sys.executable, "-m", "pip", "wheel", *options, source)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(source, tmp_path_factory.mktemp("wheel"))


class TestWheel:
    def test_holds_the_package_and_one_file_for_optimum_cli(self, wheel: Path, source: Path):
        names = set(zipfile.ZipFile(wheel).namelist())
        package = {path.relative_to(source) for path in (source / "optimum_stat").rglob("*") if path.is_file()}
        expected = {str(path) for path in package if path.parts[1] != "_wheel" and path.suffix != ".pyc"}
        assert {name for name in names if ".dist-info/" not in name} == expected | {REGISTERED}
        assert "optimum_stat/py.typed" in names
        assert not [name for name in names if name.endswith((".pth", ".start"))]

    def test_metadata(self, wheel: Path):
        with zipfile.ZipFile(wheel) as archive:
            info = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
            metadata = archive.read(info).decode()
            assert info.replace("METADATA", "licenses/LICENSE") in archive.namelist()
        assert f"\nVersion: {optimum_stat.__version__}\n" in metadata
        assert "\nRequires-Python: >=3.10\n" in metadata

    def test_the_source_distribution_builds_the_same_wheel(self, wheel: Path, source: Path, tmp_path: Path):
        call(sys.executable, "-m", "hatchling", "build", "--target", "sdist", "--directory", tmp_path, cwd=source)
        again = build_wheel(next(tmp_path.glob("*.tar.gz")), tmp_path)
        assert sorted(zipfile.ZipFile(again).namelist()) == sorted(zipfile.ZipFile(wheel).namelist())


class TestInstallation:
    @pytest.mark.parametrize("editable", [False, True], ids=["wheel", "editable"])
    def test_optimum_cli_gains_a_command_and_uninstalling_leaves_nothing(
        self, environment: Environment, source: Path, wheel: Path, editable: bool
    ):
        what = ("--no-build-isolation", "--editable", source) if editable else (wheel,)
        before = environment.files()
        assert not offers_stat(environment)

        environment.pip("install", "--no-deps", *what)
        imported = environment.python("import optimum_stat; print(optimum_stat.__file__)")
        assert imported.startswith(str(source if editable else environment.site))
        assert offers_stat(environment)
        for command in ("prune", "autoload"):
            assert command in environment.python(CLI, "stat", "-h")
            assert command in call(environment.folder / "bin" / "optimum-stat", "-h")
        assert environment.python(CLI, "stat", "autoload", "status").startswith("off: ")
        environment.pip("uninstall", "--yes", "optimum-stat")
        assert environment.files() == before
        assert not offers_stat(environment)

        environment.pip("install", "--no-deps", *what)
        assert environment.python(CLI, "stat", "autoload", "on").startswith("on: ")
        assert (environment.site / "optimum_stat.pth").is_file()
        assert environment.python("import sys; print('optimum_stat' in sys.modules)") == "True\n"
        environment.pip("uninstall", "--yes", "optimum-stat")
        assert environment.files() == before

    def test_autoload_hooks_transformers_in_a_program_that_never_names_us(self, environment: Environment, wheel: Path):
        environment.pip("install", "--no-deps", wheel)
        environment.python(CLI, "stat", "autoload", "on")
        code = "from transformers import PreTrainedModel; print(hasattr(PreTrainedModel.post_init, '_optimum_stat'))"
        assert environment.python(code) == "True\n"
        environment.python(CLI, "stat", "autoload", "off")
        assert environment.python("import sys; print('optimum_stat' in sys.modules)") == "False\n"

    def test_optimum_cli_starts_as_fast_as_before(self, environment: Environment, wheel: Path):
        without = start_up(environment)
        environment.pip("install", "--no-deps", wheel)
        environment.python(CLI, "stat", "autoload", "on")
        with_us = start_up(environment)
        assert "torch" not in with_us.modules - without.modules
        assert "transformers" not in with_us.modules - without.modules
        assert with_us.seconds - without.seconds < 0.5


def offers_stat(environment: Environment) -> bool:
    return re.search(r"^ *stat\b", environment.python(CLI, "-h"), flags=re.MULTILINE) is not None


@dataclass(frozen=True)
class StartUp:
    modules: frozenset[str]
    seconds: float


def start_up(environment: Environment) -> StartUp:
    """Processor time, not the clock's, of the fastest of five runs: other processes on the machine do not count."""
    environment.python(CLI, "-h")  # compiles what has not been compiled yet
    taken = []
    for _ in range(5):
        start = resource.getrusage(resource.RUSAGE_CHILDREN)
        environment.python(CLI, "-h")
        end = resource.getrusage(resource.RUSAGE_CHILDREN)
        taken.append(end.ru_utime + end.ru_stime - start.ru_utime - start.ru_stime)
    exits = "import atexit, sys; atexit.register(lambda: print('\\n' + ' '.join(sys.modules)));"
    modules = environment.python(exits + CLI, "-h").splitlines()[-1]
    return StartUp(frozenset(modules.split()), min(taken))


def test_what_is_imported_with_the_package_is_asked_for():
    """Not what an extra brings, or another package happens to need."""
    tomllib = pytest.importorskip("tomllib")
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    asked = {re.split(r"[^\w.-]", requirement)[0].lower() for requirement in dependencies}
    found = {name for path in (ROOT / "optimum_stat").rglob("*.py") for name in imported(ast.parse(path.read_text()).body)}
    foreign = found - set(sys.stdlib_module_names) - {"optimum_stat"}
    owners = {name: {owner.lower() for owner in packages_distributions()[name]} for name in foreign}
    assert {name for name, own in owners.items() if not own & asked} == set()
    assert {owner for own in owners.values() for owner in own} >= asked


def imported(body: list[ast.stmt]) -> Iterator[str]:
    """The modules that are imported as soon as this is: by their first name, and not in functions or for types alone."""
    for statement in body:
        if isinstance(statement, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in statement.names)
        elif isinstance(statement, ast.ImportFrom) and not statement.level:
            yield str(statement.module).partition(".")[0]
        elif isinstance(statement, (ast.If, ast.Try, ast.With)) and "TYPE_CHECKING" not in ast.unparse(statement):
            yield from imported(statement.body)


def test_every_direct_dependency_is_pinned():
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [
        *project["dependencies"],
        *(name for extra in project["optional-dependencies"].values() for name in extra),
    ]
    pinned = {line.split("==")[0] for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line}
    names = {re.split(r"[^\w.-]", requirement)[0].lower().replace("_", "-") for requirement in wanted}
    assert names <= pinned
