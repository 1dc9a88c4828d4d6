"""merged: one Hugging Face folder with the adapter in the weights, which needs neither the base nor PEFT."""

from __future__ import annotations

from pathlib import Path

from tunesmith.errors import RunError
from tunesmith.export.source import Source, open_run
from tunesmith.files import folder_atomic


def write(source: Source, folder: Path, onto: str) -> None:
    source.write_model(folder, onto)


def usable_place(out: Path) -> Path:
    """Where a folder can be put in one step; what a link leads to. RunError, before any work, where none can."""
    if out.is_symlink() or out.name in ("", ".."):
        out = out.resolve()
    if out.is_dir() and (out.is_mount() or out.samefile(Path())):
        raise RunError(f"{out}: is {'a mounted disk' if out.is_mount() else 'the folder you are in'}", "name a new folder in it")
    home = next(p for p in out.absolute().parents if p.exists())
    if not home.is_dir():
        raise RunError(f"{home}: is a file", "name another folder")
    return out


def free_place(out: Path) -> Path:
    """`usable_place`, and RunError where something is there already."""
    out = usable_place(out)
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise RunError(f"{out}: is {'not empty' if out.is_dir() else 'a file'}", "name a new folder")
    return out


def merge_run(path: Path, out: Path, *, onto: str) -> Path:
    """Merge the run at `path` into a new folder `out`, unchecked: `tunesmith export --to merged` writes the same and checks it.

    `onto`: nf4, the dequantised 4-bit base that a QLoRA run was trained over; dense, the original weights; auto, what was trained
    over. Raises RunError for a run without an adapter, a base that is another than it was, or an `out` that holds something.
    """
    source = open_run(path)
    if source.full:
        raise RunError(
            f"{path}: method full has no adapter to merge", f"its weights are a Hugging Face folder already: {source.run.model}"
        )
    source.store(onto)
    with folder_atomic(free_place(out)) as temp:
        write(source, temp, onto)
    return out
