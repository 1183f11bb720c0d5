"""Everything runs in processes of its own: what is tested is what happens at their start."""

from __future__ import annotations

import base64
import csv
import hashlib
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

import optimum_stat

PACKAGE = Path(optimum_stat.__file__).parent
WRAPPED = "from transformers import PreTrainedModel; assert PreTrainedModel.post_init._optimum_stat is True"
TINY = (
    "from transformers import BertConfig, BertModel;"
    "BertModel(BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8))"
)


def run(code: str, *flags: str, folder: Path = PACKAGE.parent, **environ: str) -> subprocess.CompletedProcess[str]:
    """Run `code` with the package that lies in `folder`."""
    environ = {**os.environ, "PYTHONPATH": str(folder), **environ}
    command = [sys.executable, *flags, "-c", code]
    return subprocess.run(command, cwd=folder, env=environ, capture_output=True, text=True, check=False)


def succeed(code: str, *flags: str, **environ: str) -> str:
    done = run(code, *flags, **environ)
    assert done.returncode == 0, done.stderr
    assert "optimum" not in done.stderr, done.stderr
    return done.stdout


class TestInstall:
    def test_importing_the_package_imports_no_heavy_library_and_only_one_finder(self):
        code = f"""if True:
            import sys
            sys.path.insert(0, {str(PACKAGE.parent)!r})
            finders = len(sys.meta_path)
            import optimum_stat
            from optimum_stat import autoload
            autoload.install()
            assert len(sys.meta_path) == finders + 1, sys.meta_path
            heavy = {{"torch", "transformers", "optimum", "numpy", "importlib.metadata", "typing", "dataclasses"}}
            print(sorted(heavy & set(sys.modules)))
        """
        assert succeed(code, "-I", "-S") == "[]\n"

    def test_ours_first(self):
        module = succeed(f"""if True:
            import sys, optimum_stat
            {WRAPPED}
            module = sys.modules["transformers.modeling_utils"]
            print(module.__loader__ is module.__spec__.loader, type(module.__loader__).__name__)
            print([finder for finder in sys.meta_path if "optimum_stat" in type(finder).__module__])
        """)
        assert module == "True SourceFileLoader\n[]\n"

    def test_transformers_first(self):
        succeed(f"import transformers.modeling_utils, optimum_stat; {WRAPPED}")

    def test_a_module_of_ours_is_what_imports_transformers(self):
        own = "assert PreTrainedModel.post_init.__module__ != 'optimum_stat.autoload'"
        succeed(f"import optimum_stat.pruner; {WRAPPED}; {TINY}; {WRAPPED}; {own}")

    def test_a_broken_hook_warns_and_leaves_transformers_usable(self, tmp_path: Path):
        copy = shutil.copytree(PACKAGE, tmp_path / "optimum_stat", ignore=shutil.ignore_patterns("__pycache__"))
        (copy / "structure.py").write_text("raise ZeroDivisionError('broken on purpose')\n")
        done = run(f"import optimum_stat; {TINY}", folder=tmp_path)
        assert done.returncode == 0, done.stderr
        assert "RuntimeWarning: optimum-stat could not be hooked into transformers" in done.stderr
        assert "broken on purpose" in done.stderr

    def test_a_transformers_that_cannot_be_imported_says_so_itself(self, tmp_path: Path):
        (tmp_path / "transformers").mkdir()
        (tmp_path / "transformers" / "__init__.py").touch()
        shutil.copytree(PACKAGE, tmp_path / "optimum_stat", ignore=shutil.ignore_patterns("__pycache__"))
        done = run("import optimum_stat, transformers.modeling_utils", folder=tmp_path)
        assert done.stderr.splitlines()[-1] == "ModuleNotFoundError: No module named 'transformers.modeling_utils'"


@pytest.fixture
def environment(tmp_path: Path) -> Path:
    """site-packages of a new environment with our package and a RECORD as pip writes it, without anything else."""
    venv.create(tmp_path / "env", symlinks=True)
    site = next((tmp_path / "env").glob("lib/python*/site-packages"))
    shutil.copytree(PACKAGE, site / "optimum_stat", ignore=shutil.ignore_patterns("__pycache__"))
    info = site / "optimum_stat-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: optimum-stat\nVersion: 1\n")
    (info / "RECORD").write_bytes(b'"optimum_stat/a,b.py",,\r\noptimum_stat-1.dist-info/RECORD,,\r\n')
    return site


def in_environment(site: Path, code: str, **environ: str) -> subprocess.CompletedProcess[str]:
    environ = {**os.environ, "PYTHONPATH": "", **environ}
    command = [site.parents[2] / "bin" / "python", "-I" if not environ["PYTHONPATH"] else "-s", "-c", code]
    return subprocess.run(command, env=environ, capture_output=True, text=True, check=False)


def switch(site: Path, call: str, **environ: str) -> subprocess.CompletedProcess[str]:
    return in_environment(site, f"from optimum_stat import autoload; print(autoload.{call}())", **environ)


def loaded_at_start(site: Path, **environ: str) -> bool:
    done = in_environment(site, "import sys; print('optimum_stat' in sys.modules)", **environ)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout == "True\n"


class TestSwitch:
    def test_on_off_and_status_agree_and_may_be_repeated(self, environment: Path):
        record, pth = environment / "optimum_stat-1.dist-info" / "RECORD", environment / "optimum_stat.pth"
        before = record.read_bytes()
        assert switch(environment, "status").stdout.startswith("off: ")
        assert not loaded_at_start(environment)
        for _ in range(2):
            assert switch(environment, "turn_on").stdout == f"on: {switch(environment, 'status').stdout[4:]}"
        assert str(pth) in switch(environment, "status").stdout
        assert record.read_bytes().startswith(before)
        assert loaded_at_start(environment)
        for _ in range(2):
            assert switch(environment, "turn_off").stdout.startswith("off: ")
        assert record.read_bytes() == before
        assert not loaded_at_start(environment)
        assert sorted(path.name for path in environment.iterdir()) == ["optimum_stat", "optimum_stat-1.dist-info"]

    def test_the_line_in_record_is_what_the_format_asks_for(self, environment: Path):
        switch(environment, "turn_on")
        content = (environment / "optimum_stat.pth").read_bytes()
        assert content.count(b"\n") == 1
        with (environment / "optimum_stat-1.dist-info" / "RECORD").open(newline="") as file:
            *_, (name, digest, size) = csv.reader(file)
        assert (name, int(size)) == ("optimum_stat.pth", len(content))
        padded = digest.removeprefix("sha256=") + "="
        assert base64.urlsafe_b64decode(padded) == hashlib.sha256(content).digest()

    def test_the_environment_variable_turns_it_off_but_not_an_import(self, environment: Path):
        switch(environment, "turn_on")
        assert not loaded_at_start(environment, OPTIMUM_STAT_AUTOLOAD="0")
        assert loaded_at_start(environment, OPTIMUM_STAT_AUTOLOAD="1")
        done = switch(environment, "status", OPTIMUM_STAT_AUTOLOAD="0")
        assert done.stdout.startswith("off: OPTIMUM_STAT_AUTOLOAD=0 is set")
        finders = "import sys, optimum_stat; print(type(sys.meta_path[0]).__module__)"
        assert succeed(finders, OPTIMUM_STAT_AUTOLOAD="0") == "optimum_stat.autoload\n"

    def test_a_file_left_behind_does_nothing(self, environment: Path):
        switch(environment, "turn_on")
        shutil.rmtree(environment / "optimum_stat")
        assert not loaded_at_start(environment)

    def test_not_installed(self, environment: Path):
        shutil.rmtree(environment / "optimum_stat-1.dist-info")
        done = switch(environment, "turn_on")
        assert done.returncode == 1
        assert "RuntimeError: optimum-stat is not installed in" in done.stderr
        assert switch(environment, "status").stdout.startswith("off: optimum-stat is not installed in")
        assert not (environment / "optimum_stat.pth").exists()

    def test_installed_without_a_record(self, environment: Path):
        (environment / "optimum_stat-1.dist-info" / "RECORD").unlink()
        assert "RuntimeError: optimum-stat was installed without a RECORD" in switch(environment, "turn_on").stderr

    def test_installed_where_no_pth_file_is_read(self, environment: Path, tmp_path: Path):
        elsewhere = tmp_path / "target"
        elsewhere.mkdir()
        for path in list(environment.iterdir()):
            path.rename(elsewhere / path.name)
        done = switch(environment, "turn_on", PYTHONPATH=str(elsewhere))
        assert f"RuntimeError: optimum-stat is installed in {elsewhere}, where Python does not read .pth" in done.stderr

    def test_a_file_that_cannot_be_written_leaves_the_record_as_it_was(self, environment: Path):
        record = environment / "optimum_stat-1.dist-info" / "RECORD"
        before = record.read_bytes()
        (environment / "optimum_stat.pth").mkdir()
        done = switch(environment, "turn_on")
        assert f"RuntimeError: {environment / 'optimum_stat.pth'} cannot be written" in done.stderr
        assert record.read_bytes() == before
        assert not list(environment.glob("*.tmp"))
