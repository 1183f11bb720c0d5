"""What every method's configuration shares."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

BUDGETS = ("params", "macs", "memory", "latency")
STRUCTURES = ("heads", "neurons", "pairs", "values", "experts", "hidden", "layers")
PHASES = ("prefill", "decode")
C = TypeVar("C", bound="PruningConfig")


@dataclass(frozen=True)
class PruningConfig:
    """How much to keep, and on how much data to decide it.

    Parameters and multiply-adds are counted of the transformer blocks only, and embeddings and the head on top do not change.
    """

    keep: float = 0.5
    """Share of the blocks' cost that stays, or of the whole model's memory or latency, in (0, 1]. Of all layers together."""
    budget: str = "params"
    """What `keep` counts: "params", "macs" (multiply-adds of one example of the calibration data's mean length), "memory" (bytes
    of all weights and, of language models, of the keys and values of what `serve_...` say), or "latency" (measured time of the
    whole model, on the device it is on, for what they say)."""
    round_to: int = 8
    """MLP widths become multiples of this, for the matrix kernels (reported for VTrans: 8 gives 1.52x, 64 1.75x, none 1.25x)."""
    seq_len: int | None = None
    """Tokens per example (encoders truncate) or per window (causal language models). None: 512, or what the model takes."""
    num_tokens: int | None = 65_536
    """Stop reading data after about this many real tokens. None reads everything."""
    max_examples: int | None = None
    """Stop reading data after this many examples (encoders) or windows (causal language models)."""
    batch_size: int = 8
    """Examples in one forward pass. Memory for activations grows with it; the result hardly depends on it."""
    seed: int = 0
    """Of everything a method draws at random."""
    distill_epochs: int = 0
    """Afterwards, train the weights that stay for so many passes over the calibration data, to predict what the dense model
    predicts. No labels; each pass costs about five forward passes. 0: nothing is trained."""
    serve_batch_size: int = 1
    """Examples in the batch that a latency or memory budget counts."""
    serve_seq_len: int | None = None
    """Tokens of each of them; for memory and while decoding, those in the cache. None: the mean length of the calibration
    data's examples."""
    serve_phase: str = "prefill"
    """Whose latency: "prefill" (a forward pass over all tokens), or "decode" (over one more token, with a cache)."""
    serve_compiled: bool = False
    """Whether the latency is that of the model under torch.compile. Compiling every size takes its time."""
    milliseconds: float | None = None
    """What a latency budget allows, as a time; `keep` then follows from it. None: `keep` says it as a share."""
    latency_table: str | None = None
    """A file with latencies that an earlier run measured: a recipe (stat_recipe.json), or a table of its own. None: they are
    measured, and remembered for the next run on this device."""

    structures: tuple[str, ...] = ("heads", "neurons")
    """What may go: "heads" (of key/value heads with the query heads that read them), "neurons" of the MLPs, "values" (single
    dimensions of what heads hand on) and, beside these instead of heads, "pairs" (of query and key dimensions that a rotary
    embedding turns together; both of STAT alone, and only our loader can read the results), dimensions of the "hidden" states
    (the residual stream), whole "experts" with their rows of the router and whole "layers". Outside the blocks, only "hidden"
    changes anything. Under a latency budget, heads and neurons alone; movement pruning knows these only, and VTrans no
    experts."""

    divides_heads: ClassVar[bool] = False
    """Whether the method knows single dimensions of heads."""

    def __post_init__(self) -> None:
        """Refuse values that no run could honour."""
        if isinstance(self.structures, str):
            raise ValueError(
                f"structures={self.structures!r} asked; it must be a tuple of names, such as ({self.structures!r},)."
            )
        object.__setattr__(self, "structures", tuple(self.structures))  # JSON has lists
        self._check_structures()
        if not isinstance(self.keep, (int, float)) or not 0 < self.keep <= 1:
            raise ValueError(f"keep={self.keep} asked; it is the share of the model that stays and must lie in (0, 1].")
        if self.budget not in BUDGETS:
            raise ValueError(f"budget={self.budget!r} asked; it must be one of {', '.join(map(repr, BUDGETS))}.")
        if self.milliseconds is not None and (self.budget != "latency" or not 0 < self.milliseconds < math.inf):
            what = f"milliseconds={self.milliseconds} asked under budget={self.budget!r}"
            raise ValueError(f'{what}; it must be a time above 0, under budget="latency".')
        if self.serve_phase not in PHASES:
            raise ValueError(f"serve_phase={self.serve_phase!r} asked; it must be one of {', '.join(map(repr, PHASES))}.")
        if not isinstance(self.distill_epochs, int) or self.distill_epochs < 0:
            raise ValueError(f"distill_epochs={self.distill_epochs!r} asked; it must be a whole number of at least 0.")
        for name in ("round_to", "batch_size", "seq_len", "num_tokens", "max_examples", "serve_batch_size", "serve_seq_len"):
            value = getattr(self, name)
            if value is None and name not in ("round_to", "batch_size", "serve_batch_size"):
                continue
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value!r} asked; it must be a whole number of at least 1.")

    @property
    def trunk(self) -> tuple[str, ...]:
        """Those of `structures` that are decided and cut before heads and neurons."""
        return tuple(name for name in ("layers", "experts", "hidden") if name in self.structures)

    def _check_structures(self) -> None:
        wrong = [name for name in self.structures if name not in STRUCTURES]
        if wrong or not self.structures or len(set(self.structures)) < len(self.structures):
            raise ValueError(
                f"structures={self.structures!r} asked; it must name some of {', '.join(map(repr, STRUCTURES))}, each once."
            )
        others = [name for name in self.structures if name not in ("heads", "neurons")]
        if others and self.budget == "latency":
            raise ValueError(f"{others[0]!r} asked under a latency budget, whose table has times of heads and neurons only.")
        divided = [name for name in ("values", "pairs") if name in self.structures]
        if divided and not self.divides_heads:
            raise ValueError(
                f"{divided[0]!r} asked of {type(self).__name__}, whose heads go or stay whole; STAT can divide them."
            )
        if {"heads", "pairs"} <= {*self.structures}:
            raise ValueError(
                "'heads' and 'pairs' asked together; pairs have a price only where heads stay: ask for neurons, pairs, values."
            )
        if {"layers", "experts"} <= {*self.structures}:
            raise ValueError("'layers' and 'experts' asked together: ask for one of them, then prune the result for the other.")

    def refuse_trunk(self, by: str) -> None:
        """Say no where layers and hidden dimensions cannot go."""
        if self.trunk:
            raise ValueError(f"structures={self.structures!r} asked of {by}, which has no way to drop {' or '.join(self.trunk)}.")

    def to_dict(self) -> dict[str, Any]:
        """Every field, as plain JSON values."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in dataclasses.asdict(self).items()}

    @classmethod
    def from_dict(cls: type[C], values: Mapping[str, Any]) -> C:
        """The inverse of `to_dict`; unknown names are refused."""
        known = [f.name for f in dataclasses.fields(cls)]
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise ValueError(f"{cls.__name__} has no field {', '.join(unknown)}; it has {', '.join(known)}.")
        return cls(**values)
