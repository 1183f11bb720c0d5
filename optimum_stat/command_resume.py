"""What `prune` writes down on the way, beside what it will write, and when that goes."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import folders, locks
from .command_base import LOGGER, MAIN


@dataclass(frozen=True)
class Unfinished:
    """The folder OUTPUT.resume of a run that is under way, or was stopped."""

    output: Path
    resume: bool
    """Whether the user wants to go on with what is in it."""
    written: bool
    """Whether the run that was stopped had written OUTPUT."""

    @classmethod
    def of(cls, output: Path, *, resume: bool) -> Unfinished:
        """Look what is there.

        Raises:
            FileExistsError: something is there, and the user does not want to go on with it.
            InUse: another run is at work in it.
        """
        moving = folders.moving(output) if resume else []
        found = cls(output, resume, bool(moving) or (resume and (output / folders.RECIPE).is_file() and _folder(output).exists()))
        if found.folder.exists() and not _is_ours(found.folder):
            raise FileExistsError(
                f"{found.folder} is in the way: what is finished would be kept there, and it holds something else. Nothing was "
                "done; choose another OUTPUT, or move it."
            )
        for own in found.folder.iterdir() if found.folder.exists() else ():
            locks.refuse_in_use(own)
        if not resume and found.folder.exists():
            raise FileExistsError(
                f"{found.folder} holds what a run that was stopped has finished; nothing was done. The same command with "
                "--resume goes on from there; delete the folder to begin anew."
            )
        for whole in moving if MAIN else ():
            folders.finish_moving(whole)
        return found

    @property
    def folder(self) -> Path:
        """Where it is."""
        return _folder(self.output)

    def arguments(self, pruner: Any) -> dict[str, Any]:
        """For `prune`: to write down what is finished, if it can be done or the user insists."""
        from .calibration import unjournaled

        if not self.resume and unjournaled(pruner) is not None:
            return {}
        if not self.resume and not folders.is_writable(folders.nearest(self.folder)):
            LOGGER.warning("%s cannot be made, so this run cannot be resumed if it is stopped.", self.folder)
            return {}
        return {"resume_from_checkpoint": self.folder}

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Afterwards the folder is gone; not if the run was stopped by something that the same command need not meet again."""
        try:
            yield
        except locks.InUse:
            raise
        except (ValueError, TypeError, ImportError):
            if not self.resume:
                self._remove()
            raise
        except BaseException:
            if self.folder.exists():
                LOGGER.info("what is finished is in %s: the same command with --resume goes on from there.", self.folder)
            raise
        self._remove()

    def half_written(self) -> list[Path]:
        """The folders that the run that was stopped left half-written; they may go."""
        return folders.half_written(self.output) if self.resume else []

    def clear_half_written(self) -> None:
        """Delete them."""
        for folder in self.half_written() if MAIN else ():
            shutil.rmtree(folder, ignore_errors=True)

    def _remove(self) -> None:
        """The folder, or the link to it: where that leads is the user's. Not that of another run, which began meanwhile."""
        if not MAIN or not self.folder.exists():
            return
        try:
            for own in self.folder.glob("1-of-*"):  # this process's; the rest may be held by others of this run
                locks.refuse_in_use(own)
        except locks.InUse:
            return
        for own in self.folder.iterdir():
            shutil.rmtree(own, ignore_errors=True)
        with suppress(OSError):  # somebody else's disk may be mounted there
            self.folder.unlink() if self.folder.is_symlink() else self.folder.rmdir()


def _is_ours(folder: Path) -> bool:
    """Whether nothing but a journal is in it."""
    return folder.is_dir() and all(re.fullmatch(r"\d+-of-\d+", path.name) for path in folder.iterdir())


def _folder(output: Path) -> Path:
    output = output.absolute()
    return output.with_name(f"{output.name}.resume")
