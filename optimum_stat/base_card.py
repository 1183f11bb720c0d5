"""What the base model's card says that holds of the pruned model, too: its licence and its languages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import constants, hf_hub_download, metadata_load

from .hub import is_hub_id

INHERITED = ("license", "license_name", "license_link", "language")
README = "README.md"


def inherited(source: str | None, revision: str | None = None) -> dict[str, Any]:
    """Of a folder's card, or that of a repo on the Hub at `revision`; nothing where there is none that can be read."""
    if source is None:
        return {}
    place = source.rpartition("/")[0] if source.endswith(".gguf") else source
    try:
        path = hf_hub_download(place, README, revision=revision) if is_hub_id(place) else Path(place, README)
        found = metadata_load(path) or {}
    except Exception:  # no network, no card, a damaged one: the model is worth saving all the same
        return {}
    said = {name: found[name] for name in INHERITED if found.get(name)}
    link = str(said.get("license_link", ""))
    if "://" not in link:  # a file beside the base model, which does not come along
        said.pop("license_link", None)
        if link and is_hub_id(place):
            said["license_link"] = f"{constants.ENDPOINT}/{place}/blob/{revision or 'main'}/{link.removeprefix('./')}"
    return said
