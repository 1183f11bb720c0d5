"""What a latency budget knows of a model: the time of every size of every block, measured here or remembered."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from . import checkpoint
from .config import PruningConfig
from .dry_run import ranges
from .latency import LatencyTable
from .latency_cache import latency_table, place
from .probes import quiet
from .timing import Setting

SEQ_LEN = 128  # where nobody says otherwise; a profile has no calibration data


@dataclass(frozen=True)
class Profile:
    """A model's table of latencies. `str()` is a table for people; `to_dict()` is one for `latency_table=`."""

    model: str
    round_to: int
    table: LatencyTable
    origin: str
    """How `prune` gets at the same table."""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return self.table.to_dict()

    def __str__(self) -> str:
        table, rows = self.table, dict[tuple[Any, ...], list[int]]()
        for name, sizes in table.sizes.items():
            block, _, structure = name.partition(".")
            rows.setdefault((structure, tuple(sizes), tuple(table.times[name])), []).append(int(block))
        least = table.taken(table.fixed(table.times))
        lines = [
            f"{self.model}: {table.total / 1e6:.2f} ms for {table.setting}",
            f"with the fewest units everywhere: {least / 1e6:.2f} ms ({least / table.total:.2f})",
            f"{'blocks':<10}{'group':<10}{'units':>7}{'ms of a block':>15}{'of dense':>10}{'of the model':>14}",
        ]
        for (structure, sizes, times), blocks in rows.items():
            head = f"{ranges(blocks):<10}{structure:<10}"
            for size, time in zip(reversed(sizes), reversed(times), strict=True):
                saved = len(blocks) * (times[-1] - time)
                share = table.taken(table.total - saved) / table.total
                lines.append(f"{head}{size:>7,}{time / 1e6:>15.3f}{time / times[-1]:>10.3f}{share:>14.3f}")
                head = " " * len(head)
        return "\n".join([*lines, self.origin])


def profile(model: str, config: PruningConfig, *, task: str | None, device: Any, **kwargs: Any) -> Profile:
    """Of a model, for the work that the fields `serve_...` of `config` say; `kwargs` go to from_pretrained."""
    dense, _, _ = checkpoint.load(model, task=task, **kwargs)
    if device is not None:
        dense.to(device)
    length = config.serve_seq_len or SEQ_LEN
    with quiet(dense):
        setting = Setting.of(dense, config.serve_phase, config.serve_batch_size, length, config.serve_compiled)
        table = latency_table(dense, config.round_to, setting, config.latency_table)
        kept = place(dense, config.round_to, setting).is_file()
    loaded = {"--task": task, "--dtype": kwargs.get("dtype")}
    asked = [f"{option} {str(value).removeprefix('torch.')}" for option, value in loaded.items() if value is not None]
    options = " ".join([*_options(table.setting, config.round_to), *asked])
    if config.latency_table is not None:
        return Profile(model, config.round_to, table, f"from a file, for: {options} --latency-table {config.latency_table}")
    return Profile(model, config.round_to, table, f"remembered for: {options}" if kept else "not remembered: write it with -o")


def _options(setting: Setting, round_to: int) -> list[str]:
    """Of `prune`, for a budget that counts this table."""
    return [
        f"--budget latency --serve-phase {setting.phase} --serve-batch-size {setting.batch_size}",
        f"--serve-seq-len {setting.seq_len}",
        *(["--serve-compiled"] if setting.compiled else []),
        f"--round-to {round_to}",
    ]
