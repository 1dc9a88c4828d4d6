"""--push: a finished export onto the Hugging Face hub, as a private repository unless it is there already. Never by default."""

from __future__ import annotations

from pathlib import Path

from tunesmith.errors import RunError
from tunesmith.hub import HUB_NAME

IGNORED = ["parity.json", "manifest.json", ".*"]  # parity.json quotes held-out rows; the card has its numbers


def check_name(repo: str) -> str:
    """Raises RunError for what is no owner/name."""
    match = HUB_NAME.fullmatch(repo)
    if not match or match["revision"]:
        raise RunError(f"--push {repo}: not a repository's name", "write owner/name")
    return repo


def check_login(repo: str) -> None:
    """Raises RunError where nobody is logged in: told before an hour of work, not after it."""
    import huggingface_hub

    if huggingface_hub.get_token() is None:
        raise RunError(f"--push {repo}: nobody is logged in to the hub", "hf auth login, or set HF_TOKEN")


def push(folder: Path, repo: str, *, what: str) -> str:
    """Upload `folder` and return its address. Raises RunError with the fix for a missing login, right or connection."""
    import huggingface_hub
    from huggingface_hub import errors as hub

    api = huggingface_hub.HfApi()
    try:
        api.create_repo(repo, private=True, exist_ok=True)
        done = api.upload_folder(folder_path=str(folder), repo_id=repo, commit_message=what, ignore_patterns=IGNORED)
    except hub.LocalTokenNotFoundError:
        raise RunError(f"--push {repo}: nobody is logged in to the hub", "hf auth login, or set HF_TOKEN") from None
    except hub.HfHubHTTPError as e:
        status = getattr(e.response, "status_code", None)
        fix = "hf auth login with a token that may write there" if status in (401, 403, 404) else "try again later"
        raise RunError(
            f"--push {repo}: the hub refused it: {str(e).splitlines()[0]}; the export itself is at {folder}", fix
        ) from None
    except (hub.HTTPError, OSError) as e:
        raise RunError(
            f"--push {repo}: the hub cannot be reached ({type(e).__name__}); the export itself is at {folder}",
            "check the connection and try again",
        ) from None
    return str(getattr(done, "commit_url", done))
