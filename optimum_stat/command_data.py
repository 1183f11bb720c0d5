"""From what a user types after `--dataset` to a dataset."""

from __future__ import annotations

from pathlib import Path
from typing import Any

FILES = {".txt": "text", ".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
BUNDLED = "the public-domain text that ships with optimum-stat"
CALIBRATION_SHARE = 0.9  # of the bundled text; the rest is for evaluation, so that nobody measures on what was pruned with


def check(name: str | None) -> None:
    """Raise if `name` can only be a file, and is none that can be read. Imports nothing: for before the slow imports."""
    path = Path(name or ".")
    suffix = path.suffix.lower()
    if path.is_file() and suffix not in FILES:
        raise ValueError(f"--dataset {name} is a file of unknown kind {suffix!r}; known are {', '.join(FILES)}.")
    if not path.exists() and (suffix in FILES or name != str(path) or path.is_absolute()):
        raise FileNotFoundError(f"--dataset {name} asked, but there is no such file (looked in {Path.cwd()}).")


def load(name: str | None, config_name: str | None, split: str | None, *, streaming: bool, for_evaluation: bool) -> Any:
    """A `datasets` dataset, under the name that the user gave it.

    Without `split`: "train"; for evaluation the first there is of "validation", "test" and "train".
    """
    import datasets

    if name is None:
        return _bundled(split or ("test" if for_evaluation else "train"))
    check(name)
    path = Path(name)
    saved = path.is_dir() and (path / "state.json").is_file()  # what Dataset.save_to_disk writes
    if config_name is not None and (saved or path.is_file()):
        raise ValueError(f"--dataset-config {config_name} asked, but {name} is one dataset, which has no configurations.")
    if saved:
        found = _part(datasets.load_from_disk(name), name, split)
        found = found.to_iterable_dataset() if streaming else found
    else:
        file = {"data_files": name} if path.is_file() else {}
        source, kind = (FILES[path.suffix.lower()], None) if file else (name, config_name)
        if split is None:
            split = _evaluation_split(name, config_name) if for_evaluation and not file else "train"
        try:
            found = datasets.load_dataset(source, kind, split=split, streaming=streaming, **file)
        except (datasets.exceptions.DatasetGenerationError, StopIteration) as error:  # the latter if a JSON file is empty
            raise ValueError(f"--dataset {name} cannot be read: {error.__cause__ or str(error) or 'it is empty'}") from error
        except OSError as error:
            place, wrong = Path(datasets.config.HF_DATASETS_CACHE), Path(error.filename or "")
            if place not in (wrong, *wrong.parents) and wrong not in place.parents:
                raise
            raise OSError(
                f"--dataset {name} cannot be read: `datasets` keeps a copy in {place}, and cannot write there ({error}). "
                "HF_DATASETS_CACHE names another place."
            ) from error
    found.info.dataset_name = path.name if path.exists() else name  # without the folder: it ends in the model card
    return found


def _part(saved: Any, name: str, split: str | None) -> Any:
    """What a split such as "train[:100]" takes of the one split that was saved."""
    if split is None or split == str(saved.split):
        return saved
    import datasets

    kept = str(saved.split or "train")
    own = kept.partition("[")[0]  # it may be a slice itself
    try:
        (part,) = datasets.ReadInstruction.from_spec(split).to_absolute({own: len(saved)})
    except ValueError:
        raise ValueError(f"--split {split} asked, but {name} holds {kept} alone: {own}, {own}[:100], {own}[50%:] ...") from None
    return saved.select(range(part.from_, part.to))


def dataset(args: Any, *, for_evaluation: bool) -> Any:
    """`load` what the options of `command_options.add_data_options` say."""
    return load(args.dataset, args.dataset_config, args.split, streaming=args.streaming, for_evaluation=for_evaluation)


def text_columns(args: Any) -> list[str] | None:
    """The columns given, with spaces or commas between them."""
    return [name for part in args.text_columns for name in part.split(",")] if args.text_columns else None


def _evaluation_split(name: str, config_name: str | None) -> str:
    from datasets import get_dataset_split_names

    names = get_dataset_split_names(name, config_name)
    return next((split for split in ("validation", "test", "train") if split in names), names[0])


def _bundled(split: str) -> Any:
    from datasets import Dataset, DatasetInfo, NamedSplit

    if split not in ("train", "test"):
        raise ValueError(f"--split {split} asked, but {BUNDLED} has the splits train and test.")
    speeches = (Path(__file__).parent / "shakespeare.txt").read_text("utf-8").split("\n\n")
    cut = int(CALIBRATION_SHARE * len(speeches))
    own = speeches[:cut] if split == "train" else speeches[cut:]
    rows = [f"{speech.strip()}\n" for speech in own]  # where rows are joined by newlines, a blank line stays between them
    return Dataset.from_dict({"text": rows}, info=DatasetInfo(dataset_name=BUNDLED), split=NamedSplit(split))
