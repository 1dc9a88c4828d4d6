"""Secrets do not reach a file: tokens, keys and passwords become `[redacted]`, whatever else is said stays as it is.

Three ways to know one: its own shape (hf_..., sk-..., AKIA...), the name before it (password=..., Authorization: Bearer ...), and
the values of this process's environment variables whose names say so.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

HIDDEN = "[redacted]"
EDGE = r"(?<![A-Za-z0-9])"
NAME = (
    r"(?:[A-Za-z0-9_.-]*(?:api[_-]?key|access[_-]?key|secret[_-]?key|private[_-]?key|secret|passwd|password|passphrase|credentials?"
    r"|(?:auth|access|refresh|bearer|hub|hf|api|session|github|wandb)[_-]?token)|pwd)"
)
SHAPES = re.compile(
    EDGE + r"(?:hf_[A-Za-z0-9]{16,}"  # Hugging Face
    r"|api_org_[A-Za-z0-9]{16,}"
    r"|(?<![_-])sk-[A-Za-z0-9_-]*[A-Za-z0-9]{16,}[A-Za-z0-9_-]*"  # OpenAI, Anthropic and their likes
    r"|gh[opusr]_[A-Za-z0-9]{20,}|github_pat_[A-Za-z0-9_]{20,}|glpat-[A-Za-z0-9_-]{16,}"
    r"|(?:AKIA|ASIA)[A-Z0-9]{16}(?![A-Za-z0-9])"  # AWS key ids
    r"|AIza[A-Za-z0-9_-]{35}|ya29\.[A-Za-z0-9_-]{20,}"  # Google
    r"|xox[abeprs]-[A-Za-z0-9-]{10,}|npm_[A-Za-z0-9]{30,}|pypi-[A-Za-z0-9_-]{40,}"
    r"|[sr]k_(?:live|test)_[A-Za-z0-9]{16,}|whsec_[A-Za-z0-9+/=]{24,}|sq0[a-z]{3}-[A-Za-z0-9_-]{22,}"  # payments
    r"|SG\.[A-Za-z0-9_-]{16,}\.[A-Za-z0-9_-]{16,}|key-[0-9a-f]{32}(?![0-9a-f])"  # mail
    r"|do[opr]_v1_[0-9a-f]{64}|shp(?:at|ss|ca|pa)_[0-9a-fA-F]{32}|dapi[0-9a-f]{32}|gl(?:ptt|dt|rt)-[A-Za-z0-9_-]{20,}"
    r"|gsk_[A-Za-z0-9]{40,}|r8_[A-Za-z0-9]{30,}|xai-[A-Za-z0-9]{40,}|pplx-[A-Za-z0-9]{40,}|lin_api_[A-Za-z0-9]{30,}|sntrys_[A-Za-z0-9_=+/-]{40,}"
    r"|GOCSPX-[A-Za-z0-9_-]{20,}|ATATT3[A-Za-z0-9_=-]{40,}|EAACEdEose0cBA[A-Za-z0-9]{20,}|AccountKey=[A-Za-z0-9+/]{80,}=*"
    r"|hooks\.slack\.com/services/T[A-Z0-9]{6,}/B[A-Z0-9]{6,}/[A-Za-z0-9]{16,}|discord(?:app)?\.com/api/webhooks/\d{15,}/[A-Za-z0-9_-]{40,}"
    r"|eyJ[A-Za-z0-9_-]{10,}\.eyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]+)"  # JSON web tokens
)
PEM_BEGIN = re.compile(r"-----BEGIN [A-Z0-9 ]*PRIVATE KEY(?: BLOCK)?-----|---- BEGIN [A-Z0-9 ]*PRIVATE KEY ----")
PEM = re.compile(rf"(?:{PEM_BEGIN.pattern}).*?(?:-----?[ ]?END [A-Z0-9 ]*PRIVATE KEY(?: BLOCK)? ?-----?|\Z)", re.DOTALL)
# The password of a URL, or its bare login.
URL_LOGIN = re.compile(r"(?P<keep>(?<![A-Za-z0-9+.-])[A-Za-z][A-Za-z0-9+.-]*://(?:[^\s/:@?#]*:)?)(?P<secret>[^\s/?#]+)(?=@)")
AUTHORIZATION = re.compile(r"(?P<keep>\b(?:Bearer|Basic)\s+)(?P<secret>[A-Za-z0-9._~+/=-]{8,})", re.IGNORECASE)
VALUE = r"""(?P<secret>"[^"\n]{4,}"|'[^'\n]{4,}'|(?!\[redacted\])[^\s"'&})]{4,})"""
NAMED = re.compile(rf"(?P<keep>(?<![A-Za-z0-9_.-]){NAME}[\"']?\s*[=:]\s*){VALUE}", re.IGNORECASE)
# A bare `token` has another meaning in this house: `stop token: </s>` is no secret, 16 characters without a gap may be one.
TOKEN = re.compile(r"(?P<keep>(?<![A-Za-z0-9_.-])token[\"']?\s*[=:]\s*[\"']?)(?P<secret>[A-Za-z0-9_.~+/=-]{16,})", re.IGNORECASE)
OPTION = re.compile(rf"--?(?:{NAME}|token)", re.IGNORECASE)
SECRET_NAME = re.compile(rf"{NAME}|token", re.IGNORECASE)
ENV_NAME = re.compile(r".*(?:TOKEN|SECRET|PASSWORD|PASSWD|API_?KEY|ACCESS_KEY|PRIVATE_KEY|CREDENTIALS?)", re.IGNORECASE)
PLACEHOLDERS = {"null", "none", "true", "false", "auto", HIDDEN}


def redact(text: str, env: Mapping[str, str] | None = None) -> str:
    """`text` with every secret replaced. Redacting twice changes nothing more. `env` stands in for os.environ."""
    for value in _environment(os.environ if env is None else env):
        text = text.replace(value, HIDDEN)
    text = PEM.sub(HIDDEN, text)
    text = URL_LOGIN.sub(lambda m: m["keep"] + HIDDEN, text)
    text = AUTHORIZATION.sub(lambda m: m["keep"] + HIDDEN, text)
    text = TOKEN.sub(lambda m: m["keep"] + HIDDEN, text)
    text = NAMED.sub(_named, text)
    return SHAPES.sub(HIDDEN, text)


def redact_tree(value: Any) -> Any:
    """Every text in nested dicts and lists, and whole values whose key names a secret."""
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, Mapping):
        return {k: HIDDEN if _names_secret(k, v) else redact_tree(v) for k, v in value.items()}
    return [redact_tree(v) for v in value] if isinstance(value, (list, tuple)) else value


def redact_command(command: Sequence[str]) -> list[str]:
    """A command line: also the word after `--token`, `--api-key` ..."""
    before = ["", *command]
    return [
        HIDDEN if OPTION.fullmatch(b) and not word.startswith("-") else redact(word)
        for b, word in zip(before, command, strict=False)
    ]


def _named(m: re.Match[str]) -> str:
    bare = m["secret"].strip("\"'").rstrip(",;")
    if bare.lower() in PLACEHOLDERS or bare.isdigit():
        return m[0]
    return m["keep"] + m["secret"].replace(bare, HIDDEN)


def _names_secret(key: Any, value: Any) -> bool:
    return (
        isinstance(key, str) and isinstance(value, str) and bool(SECRET_NAME.fullmatch(key)) and value.lower() not in PLACEHOLDERS
    )


def _environment(env: Mapping[str, str]) -> list[str]:
    """Longest first. Short values and paths are no secrets, and replacing them would harm plain text."""
    values = {
        v for k, v in env.items() if ENV_NAME.fullmatch(k) and len(v) >= 8 and not v.startswith(("/", "~", ".")) and " " not in v
    }
    return sorted(values, key=lambda v: (-len(v), v))
