"""The mean of several checkpoints' weights, which began from the same one: better than any of them, for nothing more to run.

    python recipes/base/average.py --out runs/base/model runs/base-3-a/model runs/base-3-b/model

(Wortsman et al. 2022, Model soups.) Everything else in the folder is the first one's.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file


def average(out: Path, folders: list[Path]) -> None:
    """Added up in float32, rounded once into the first one's precision. ValueError where names or shapes differ."""
    models = [load_file(folder / "model.safetensors") for folder in folders]
    first, *rest = models
    for folder, other in zip(folders[1:], rest, strict=True):
        if {n: t.shape for n, t in other.items()} != {n: t.shape for n, t in first.items()}:
            raise ValueError(f"{folder}: other weights than {folders[0]}")
    shutil.copytree(folders[0], out, dirs_exist_ok=True)
    mean = {name: (sum(m[name].float() for m in models) / len(models)).to(tensor.dtype) for name, tensor in first.items()}
    save_file(mean, out / "model.safetensors", metadata={"format": "pt"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("folders", type=Path, nargs="+")
    args = parser.parse_args()
    average(args.out, args.folders)


if __name__ == "__main__":
    main()
