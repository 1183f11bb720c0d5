"""What the base model's card says that holds of the pruned model, too: its licence and its languages."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from huggingface_hub import constants, hf_hub_download, metadata_load
from huggingface_hub.errors import RemoteEntryNotFoundError

from .hub import is_hub_id
from .sources import Source

logger = logging.getLogger(__name__)

INHERITED = ("license", "license_name", "license_link", "language")
README = "README.md"


def inherited(source: Source) -> dict[str, Any]:
    """Of a folder's card, or that of a repo on the Hub, read as the model was; nothing where there is none that can be read."""
    place, on_hub = source.place, is_hub_id(source.place)
    try:
        path = hf_hub_download(place, README, revision=source.revision, **source.access) if on_hub else Path(place, README)
        found = metadata_load(path) or {}
    except (RemoteEntryNotFoundError, FileNotFoundError) as error:
        if on_hub and isinstance(error, FileNotFoundError):
            _warn(place, error)  # there may be one, but it cannot be asked for
        return {}
    except Exception as error:  # a damaged one, or what odd answers make the client raise: the model is worth saving all the same
        _warn(place, error)
        return {}
    if "language" in found:
        found["language"] = _languages(found["language"])
    said = {name: found[name] for name in INHERITED if found.get(name)}
    link = str(said.get("license_link", ""))
    if "://" not in link:  # a file beside the base model, which does not come along
        said.pop("license_link", None)
        if link and on_hub:
            said["license_link"] = f"{constants.ENDPOINT}/{place}/blob/{source.revision or 'main'}/{link.removeprefix('./')}"
    return said


def _languages(said: Any) -> Any:
    """YAML takes `no`, which is Norwegian, for false."""
    return ["no" if each is False else each for each in said] if isinstance(said, list) else "no" if said is False else said


def _warn(place: str, error: Exception) -> None:
    reason = " ".join(str(error).split())
    logger.warning("the card of %s cannot be read, so its licence and languages are missing in the new one: %s", place, reason)
