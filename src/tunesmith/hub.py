"""A name becomes a local folder: a model or dataset on the Hugging Face hub, a folder on this disk, the model in the package.

Downloads are pinned to a commit and take named kinds of files only: safetensors, configs, tokenizers; rows. No pickles, no scripts.
What was downloaded once is found again without a network. No torch; huggingface_hub is imported when it is needed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

import yaml

from tunesmith.errors import DataError, ModelError, TunesmithError
from tunesmith.files import write_atomic

if TYPE_CHECKING:
    from huggingface_hub.hf_api import DatasetInfo

EMBEDDED = Path(__file__).parent / "assets" / "embedded"

WORDS_FILES = (  # all that check and plan read: some megabytes
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json",
    "README.md",  # names the licence, which what is made of it inherits
)  # fmt: skip
WEIGHT_FILES = ("model*.safetensors", "model.safetensors.index.json")
NOT_THESE = ("*/*",)  # patterns match slashes too: nothing below the top folder, where some keep a second copy of the weights
ROWS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".txt", ".md")
NOT_ROWS = {"readme.md", "license.md", "license.txt", "dataset_info.json", "dataset_infos.json", "config.json"}

HUB_NAME = re.compile(r"(?P<repo>[\w][\w.-]*/[\w][\w.-]*)(@(?P<revision>[^\s@]+))?")
COMMIT = re.compile(r"[0-9a-f]{40}")
LICENCE = {"license": r"[\w.+-]{1,64}", "license_name": r"[\w.+ -]{1,96}", "license_link": r"https://[\w./%~+:?=&#-]{1,300}"}


@dataclass(frozen=True, slots=True)
class ResolvedModel:
    """Where a model lies. `name` is what others can find it by; `revision` the commit, None for a folder."""

    path: Path
    name: str
    revision: str | None = None


# ------------------------------------------------------------------ models
def resolve_model(
    name: str | Path, *, weights: bool = True, words: bool = True, beside: tuple[str, ...] = (), offline: bool = False
) -> ResolvedModel:
    """`embedded`, a checkpoint folder, or `owner/name[@revision]` on the hub (a folder of that name wins).

    Without `weights` only config and tokenizer are downloaded, into the same folder, without `words` only the config. `beside`
    names small files that are wanted too where the repository has them. `offline` takes only what was downloaded before.
    Raises ModelError: no such folder or repository, gated, no network, no safetensors.
    """
    name = str(name)
    if name == "embedded":
        if not (EMBEDDED / "config.json").is_file():
            raise ModelError(
                "this installation has no embedded model", "install the package again, or name a model folder or a hub id"
            )
        return ResolvedModel(EMBEDDED, name)
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            what = "an adapter without its base" if (folder / "adapter_config.json").is_file() else "no config.json in it"
            raise ModelError(
                f"{name}: {what}", "name the folder of a Hugging Face checkpoint (config.json beside its *.safetensors)"
            )
        return ResolvedModel(folder, name)
    if folder.is_file():
        raise ModelError(f"{name}: a file", "name the checkpoint's folder; GGUF and single weight files are not read")
    match = HUB_NAME.fullmatch(name)
    if not match or name.startswith("runs/"):  # where run folders are, so that a slip in one's name is not asked of the hub
        raise ModelError(f"{name}: no such folder", "check the path; a model on the hub is named owner/name or owner/name@revision")
    repo, revision = match["repo"], match["revision"]
    wanted = [*(WORDS_FILES if words else ["config.json"]), *(WEIGHT_FILES if weights else ())]
    with _explained("model", name, ModelError):
        how = {"repo_id": repo, "local_files_only": True} if offline else {"repo_id": repo}
        path = Path(_snapshot(**how, revision=revision, allow_patterns=wanted, ignore_patterns=list(NOT_THESE)))
        if beside:
            _snapshot(**how, revision=path.name, allow_patterns=list(beside))
    if not (path / "config.json").is_file():
        raise ModelError(
            f"{name}: the repository has no config.json", "name a repository with a whole model, not an adapter or a GGUF file"
        )
    if weights and not any(path.glob("*.safetensors")):
        fix = "look for a copy or a revision (refs/pr/...) of it with safetensors, or convert it once in an environment you trust"
        raise ModelError(f"{name}: the repository has no safetensors, and pickled weights (.bin) are never opened", fix)
    return ResolvedModel(path, repo, path.name if COMMIT.fullmatch(path.name) else revision)


# ------------------------------------------------------------------ datasets
def licence_of(folder: Path | None) -> dict[str, str]:
    """The base's licence as its card names it: `license`, and for `other` its `license_name` and `license_link`; empty where it
    names none."""
    try:
        text = (folder / "README.md").read_text("utf-8") if folder else ""
        front = yaml.safe_load(text.split("---")[1]) if text.startswith("---") else None
    except (OSError, UnicodeDecodeError, IndexError, yaml.YAMLError):
        return {}
    found = {key: front.get(key) for key in LICENCE} if isinstance(front, dict) else {}
    found = {key: text for key, text in found.items() if isinstance(text, str) and re.fullmatch(LICENCE[key], text)}
    return found if "license" in found else {}


def resolve_dataset(name: str) -> Path:
    """`[hub:]owner/name[@revision][/split]` -> a folder that holds that split's files of rows and nothing else.

    `split` is one or more words that each file's path must hold, such as `test` or `main/train`. Without it, the train split is
    taken where the repository has one, else all files. Raises DataError: no such dataset or split, gated, no network, only scripts.
    """
    text = name.removeprefix("hub:")
    match = re.fullmatch(r"(?P<repo>[\w][\w.-]*/[\w][\w.-]*)(@(?P<revision>[^\s@/]+))?(/(?P<split>[^\s@]+))?", text)
    if not match:
        raise DataError(
            f"{name}: no hub dataset's name", "write hub:owner/name, hub:owner/name/split or hub:owner/name@revision/split"
        )
    repo, revision, split = match["repo"], match["revision"] or "main", match["split"] or ""
    home = _cache() / "datasets" / repo.replace("/", "--")
    known = home / "refs" / re.sub(r"[^\w.-]", "--", revision)
    info = None
    try:
        with _explained("dataset", name, DataError):
            info = _dataset_info(repo, revision=revision)
        commit = str(info.sha)
    except DataError:  # found once, it is found again without a network
        commit = revision if COMMIT.fullmatch(revision) else known.read_text().strip() if known.is_file() else ""
        if not commit or not _whole(home / commit, split):
            raise
    folder = home / commit / (re.sub(r"[^\w.-]", "--", split) or "all")
    if info is not None and not _whole(home / commit, split):
        files = _rows_of(name, [str(s.rfilename) for s in info.siblings or ()], split)
        with _explained("dataset", name, DataError):
            _snapshot(
                repo_id=repo,
                repo_type="dataset",
                revision=commit,
                allow_patterns=[_literal(f) for f in files],
                local_dir=str(folder),
            )
        write_atomic(folder / ".whole.json", json.dumps({"repo": repo, "commit": commit, "split": split, "files": files}, indent=1))
        known.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(known, commit + "\n")
    return folder


def _whole(commit_folder: Path, split: str) -> bool:
    return (commit_folder / (re.sub(r"[^\w.-]", "--", split) or "all") / ".whole.json").is_file()


def _rows_of(name: str, files: list[str], split: str) -> list[str]:
    """The files with rows that belong to the split."""
    rows = [f for f in files if _suffix(f) in ROWS and PurePosixPath(f).name.lower() not in NOT_ROWS and not f.startswith(".")]
    with_fields = [f for f in rows if _suffix(f) not in (".txt", ".md")]
    rows = with_fields or rows  # beside files with fields, text is documentation
    if not rows:
        scripts = ", ".join(f for f in files if f.endswith(".py"))
        what = f"it is made by a script ({scripts}), which is never run" if scripts else "it holds no file of rows"
        raise DataError(
            f"{name}: {what}", "name a dataset with jsonl, json, csv or parquet files, such as the hub's parquet copy of it"
        )
    chosen = (
        [f for f in rows if set(split.lower().split("/")) <= _words(f)]
        if split
        else [f for f in rows if "train" in _words(f)] or rows
    )
    if not chosen:
        words = sorted({w for f in rows for w in _words(f) if not w.isdigit()})
        raise DataError(f"{name}: no file of it belongs to {split!r}", f"its files' names hold: {', '.join(words[:20])}")
    return sorted(chosen)


def _suffix(file: str) -> str:
    return PurePosixPath(file.lower().removesuffix(".gz")).suffix


def _words(file: str) -> set[str]:
    """`main/train-00000-of-00001.parquet` -> {main, train, 00000, of, 00001}; folders also whole."""
    path = PurePosixPath(file.lower().removesuffix(".gz"))
    return {w for part in (*path.parts[:-1], path.stem) for w in (part, *re.split(r"[^a-z0-9]+", part)) if w}


def _literal(file: str) -> str:
    """A file's name as a pattern that matches only itself."""
    return re.sub(r"([*?\[])", r"[\1]", file)


# ------------------------------------------------------------------ the hub
def _snapshot(**arguments: object) -> str:
    import huggingface_hub

    return huggingface_hub.snapshot_download(**arguments)


def _dataset_info(repo: str, *, revision: str) -> DatasetInfo:
    import huggingface_hub

    return huggingface_hub.HfApi().dataset_info(repo, revision=revision)


def _cache() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HOME) / "tunesmith"


@contextmanager
def _explained(what: str, name: str, error: Callable[[str, str], TunesmithError]) -> Iterator[None]:
    """The hub's errors as ours, each with its fix."""
    from huggingface_hub import errors as hub

    local = f"or give the path of a local {'folder' if what == 'model' else 'file or folder'}"
    here = "no such folder, and " if what == "model" else ""  # a slip in a folder's name looks like a name on the hub
    try:
        yield
    except hub.GatedRepoError:
        fix = f"accept its terms on its page, then log in with `hf auth login` (or set HF_TOKEN), {local}"
        raise error(f"{name}: the {what} is gated and this account has no access", fix) from None
    except hub.RepositoryNotFoundError:
        fix = f"check the spelling; for a private {what} log in with `hf auth login` (or set HF_TOKEN), {local}"
        raise error(f"{name}: {here}the hub has no such {what}, or it is private", fix) from None
    except hub.RevisionNotFoundError:
        raise error(f"{name}: the {what} has no such revision", "name a branch, a tag or a commit after the @") from None
    except (hub.LocalEntryNotFoundError, hub.OfflineModeIsEnabled):
        fix = f"connect (HF_HUB_OFFLINE must not be set) and run it once, {local}"
        raise error(f"{name}: {here}the hub cannot be reached to download the {what}", fix) from None
    except hub.HFValidationError:
        raise error(f"{name}: not a name the hub allows", f"write owner/name, {local}") from None
    except hub.HfHubHTTPError as e:
        raise error(f"{name}: the hub answered with an error: {str(e).splitlines()[0]}", f"try again later, {local}") from None
    except hub.HTTPError as e:  # the connection, below the hub's own errors
        raise error(
            f"{name}: {here}the hub cannot be reached ({type(e).__name__})", f"check the connection and try again, {local}"
        ) from None
