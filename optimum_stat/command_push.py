"""The command that publishes a saved model: `push`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, final

from . import command_options, folders
from .command_base import Command, Result


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
        """Look whether all is there, ask the Hub, push."""
        args = self.args
        recipe = _whole(args.folder)
        from . import publishing
        from .hub import Destination

        to = Destination.checked(args.repo_id or args.folder.absolute().name, private=args.private or None)
        card = {"README.md": text} if (text := _card(args.folder, recipe, to.repo_id)) else {}
        url = publishing.publish(args.folder, to, args.commit_message, args.revision, args.create_pr, instead=card)
        return f"pushed: {url}", {"url": url}


def _whole(folder: Path) -> dict[str, Any]:
    """The recipe of a folder that holds a model.

    Raises:
        FileNotFoundError: something is missing.
    """
    from .hub import WEIGHTS

    if not (folder / folders.RECIPE).is_file():
        raise FileNotFoundError(
            f"{folder} has no {folders.RECIPE}, so neither `prune` nor a pruner's save_pretrained wrote it. Nothing was pushed."
        )
    weights = {each.name for each in folder.iterdir() if WEIGHTS.fullmatch(each.name)}
    shards = {each for name in weights if ".index." in name for each in _read(folder / name)["weight_map"].values()}
    missing = sorted(({"config.json"} | shards) - {each.name for each in folder.iterdir()}) + ([] if weights else ["weights"])
    if missing:
        raise FileNotFoundError(f"{folder} lacks {', '.join(missing)}, without which nothing can load it. Nothing was pushed.")
    return _read(folder / folders.RECIPE)


def _read(path: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}. Nothing was pushed.") from error
    return found


def _card(folder: Path, recipe: dict[str, Any], repo_id: str) -> bytes | None:
    """The card under the repo's name; None: it is no longer as it was written, and what somebody made of it is to stay."""
    from . import card
    from .recipe_update import paper_of

    path, paper = folder / "README.md", paper_of(folder, recipe)
    pictures = [each.stem for each in (folder / card.PICTURES).glob("*.png")]
    unchanged = path.is_file() and path.read_text() == card.render(recipe, folder.absolute().name, paper, pictures)
    return card.render(recipe, repo_id, paper, pictures).encode() if unchanged else None
