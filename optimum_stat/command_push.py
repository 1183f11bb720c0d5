"""The command that publishes a saved model: `push`."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any, final

from . import command_options, folders
from .command_base import LOGGER, Command, Result


@final
class PushCommand(Command):
    """`push`."""

    @staticmethod
    def parse_args(parser: Any) -> None:
        """Declare the options."""
        parser.description = (
            "Push a pruned model that is saved, all that is in its folder but hidden files, in one commit. Weights that the repo "
            "held before are removed; a card that nobody has changed gets the repo's name."
        )
        parser.add_argument("folder", metavar="FOLDER", type=Path, help="a pruned model")
        parser.add_argument("repo_id", metavar="REPO_ID", nargs="?", help="where to (default: under the name of the folder)")
        parser.add_argument("--private", action="store_true", help="make the repo private if it is new")
        parser.add_argument("--revision", metavar="BRANCH", help="another branch than main; made if it is missing")
        parser.add_argument("--create-pr", action="store_true", help="open a pull request instead")
        parser.add_argument("--commit-message", metavar="TEXT", help="what the commit says")
        command_options.add_output_options(parser)

    def work(self) -> Result:
        """Push it."""
        args = self.args
        url = push(args.folder, args.repo_id, args.private, args.commit_message, args.revision, args.create_pr)
        return f"pushed: {url}", {"url": url}


def push(
    folder: Path,
    repo_id: str | None,
    private: bool,
    message: str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
) -> str:
    """Look whether all is there, ask the Hub, push; returns the commit's address. No repo_id: the name of the folder."""
    recipe = _whole(folder)
    from . import publishing
    from .hub import Destination

    name = repo_id or Path(os.path.abspath(folder)).name
    try:
        to = Destination.checked(name, private=private or None)
    except ValueError as error:
        own = "" if repo_id else f" {name!r} is FOLDER's name; REPO_ID takes another. Nothing was pushed."
        raise ValueError(f"{error}{own}") from error
    card = {"README.md": text} if (text := _card(folder, recipe, to.repo_id)) else {}
    return publishing.publish(folder, to, message, revision, create_pr, instead=card)


def _whole(folder: Path) -> dict[str, Any]:
    """The recipe of a folder that holds a model.

    Raises:
        FileNotFoundError: something is missing.
        ValueError: something is damaged.
    """
    from .hub import WEIGHTS

    if not (folder / folders.RECIPE).is_file():
        raise FileNotFoundError(
            f"{folder} has no {folders.RECIPE}, so neither `prune` nor a pruner's save_pretrained wrote it. Nothing was pushed."
        )
    weights = {each.name for each in folder.iterdir() if WEIGHTS.fullmatch(each.name)}
    shards = {each for name in weights if ".index." in name for each in _read(folder / name, "weight_map")["weight_map"].values()}
    missing = sorted(({"config.json"} | shards) - {each.name for each in folder.iterdir()})
    if all(re.search(r"-\d{5}-of-\d{5}\.", name) for name in weights):
        missing.append("the index of its weights" if weights else "weights")
    if missing:
        raise FileNotFoundError(f"{folder} lacks {', '.join(missing)}, without which nothing can load it. Nothing was pushed.")
    return _read(folder / folders.RECIPE, "method", "base_model", "architecture", "config", "record", "report")


def _read(path: Path, *names: str) -> dict[str, Any]:
    """An object of JSON that has all of `names`."""
    try:
        found: dict[str, Any] = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}. Nothing was pushed.") from error
    lacking = [name for name in names if not isinstance(found, dict) or name not in found]
    if lacking:
        raise ValueError(f"{path} is damaged: it has no {', '.join(lacking)}. Nothing was pushed.")
    return found


def _card(folder: Path, recipe: dict[str, Any], repo_id: str) -> bytes | None:
    """The card under the repo's name, whatever the folder was called when it was written; None: somebody has changed it, or
    there is none, and so it stays.
    """
    from . import card
    from .recipe_update import paper_of

    path, paper = folder / "README.md", paper_of(folder, recipe)
    if not path.is_file():
        return None
    pictures = [each.stem for each in (folder / card.PICTURES).glob("*.png")]
    found = path.read_text("utf-8", "replace")
    name = re.search(r'from_pretrained\("(.+?)"', found)
    if name and found == card.render(recipe, name[1], paper, pictures):
        return card.render(recipe, repo_id, paper, pictures).encode()
    LOGGER.info("%s is no longer as it was written, so it is pushed as it is.", path)
    return None
