"""Secrets: 500 of them in every shape are hidden wherever they stand, and plain text is left as it is."""

import random
import string
import timeit

import pytest

from tunesmith.redact import HIDDEN, redact, redact_command, redact_tree

LETTERS = string.ascii_letters + string.digits


def secrets(seed=0):
    """(text, secret) for 500 secrets of 25 shapes."""
    g = random.Random(seed)

    def some(n, alphabet=LETTERS):
        return "".join(g.choices(alphabet, k=n))

    key = lambda: some(40, LETTERS + "/+")  # noqa: E731
    shapes = [
        lambda: ("{}", "hf_" + some(34)),
        lambda: ("token: {}", "hf_" + some(34)),
        lambda: ("{}", "sk-" + some(48)),
        lambda: ("{}", "sk-proj-" + some(20) + "_" + some(30) + "-" + some(20)),
        lambda: ("{}", "sk-ant-api03-" + some(40) + "-" + some(40)),
        lambda: ("key={}", "sk-or-v1-" + some(64, "0123456789abcdef")),
        lambda: ("{}", "AKIA" + some(16, string.ascii_uppercase + "234567")),
        lambda: ("{}", "ASIA" + some(16, string.ascii_uppercase + "234567")),
        lambda: ("aws_secret_access_key = {}", key()),
        lambda: ("AWS_SECRET_ACCESS_KEY={}", key()),
        lambda: ('{{"SecretAccessKey": "{}"}}', key()),
        lambda: ("https://user:{}@host/path", some(12, LETTERS + "!$&*+,;=.-_~%")),
        lambda: ("postgres://me:{}@db.example.com:5432/x", some(16)),
        lambda: ("https://{}@github.com/owner/repo", "x" + some(20)),
        lambda: ("s3://id:{}@bucket/key", some(24)),
        lambda: ("Authorization: Bearer {}", some(32)),
        lambda: ("curl -H 'authorization: bearer {}'", some(40)),
        lambda: ("password={}", some(14)),
        lambda: ("password: '{}'", "pass word " + some(6)),
        lambda: ("https://host/file?X-Api-Key={}&b=1", some(30)),
        lambda: ("HF_TOKEN={} python train.py", some(30)),
        lambda: ("{}", "ghp_" + some(36)),
        lambda: ("{}", "github_pat_" + some(22) + "_" + some(59)),
        lambda: ("{}", "eyJ" + some(30) + ".eyJ" + some(50) + "." + some(43)),
        lambda: ("{}", "xoxb-" + some(12, string.digits) + "-" + some(24)),
    ]
    return [(text.format(secret), secret) for text, secret in (shapes[i % len(shapes)]() for i in range(500))]


AROUND = ["{}", "OSError: cannot read {}", '{{"model": "{}", "n": 3}}', "a\n{}\nb", "({})", "see {}, then {}"]


@pytest.mark.parametrize("around", AROUND)
def test_none_of_500_secrets_is_left(around):
    for text, secret in secrets():
        shown = redact(around.format(*[text] * around.count("{}")), env={})
        assert secret not in shown and HIDDEN in shown, (text, shown)
        assert redact(shown, env={}) == shown


PLAIN = [
    "the token count is 512 tokens, max_new_tokens: 128, tokenizer: tokenizer.json",
    "special_tokens: [<|im_start|>, <|im_end|>] eos_token: </s> pad_token: <pad>",
    "bos_token=<s> unk_token: <unk> new_tokens: []",
    "sk-learn is scikit-learn; risk-adjusted; task-based-evaluation-of-models",
    "meta-llama/Llama-3.1-8B-Instruct@0e9e39f249a16976918f6564b8830bc894c89659",
    "sha256 9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",
    "/home/user/data/chats.jsonl:17: no assistant turn",
    "user@example.com wrote to me@example.org",
    "https://huggingface.co/owner/name/blob/main/README.md?download=true#top",
    "http://127.0.0.1:8080/v1/chat/completions",
    "git@github.com:owner/repo.git",
    "hf_model and hf_hub are names; HF_HOME=/data/hf",
    "learning_rate: 0.0002 batch_size: 8 keys: 4 password: null token: none",
    "the secret of a good answer: be kind. Password reset: click the link",
    "AKIA is a prefix; api_key is a field",
    "basic usage of bearer bonds",
    "time 10:30, ratio 3:1, ns: std::vector<int>",
]


@pytest.mark.parametrize("text", PLAIN)
def test_plain_text_is_left_as_it_is(text):
    assert redact(text, env={"HF_HOME": "/data/hf", "SSH_AUTH_SOCK": "/tmp/x", "TOKEN": "short"}) == text


def test_values_of_the_environment_are_hidden_wherever_they_stand():
    env = {
        "MY_SERVICE_TOKEN": "correct-horse-battery",
        "PATH": "/usr/bin:/bin",
        "DB_PASSWORD": "tr0ub4dor&3",
        "API_KEY_FILE": "/etc/key",
    }
    text = "x correct-horse-battery y /usr/bin:/bin z tr0ub4dor&3 /etc/key"
    assert redact(text, env) == f"x {HIDDEN} y /usr/bin:/bin z {HIDDEN} /etc/key"


def test_trees_and_commands():
    tree = {"data": {"train": [{"path": "https://u:secretpw@h/x"}]}, "api_key": "abc", "n": 3, "token": None, "f": 0.1}
    assert redact_tree(tree) == {
        "data": {"train": [{"path": f"https://u:{HIDDEN}@h/x"}]}, "api_key": HIDDEN, "n": 3, "token": None, "f": 0.1,
    }  # fmt: skip
    command = ["tunesmith", "train", "--token", "abcdef", "--api-key=abcdef", "run.yaml", "--max-tokens", "12"]
    assert redact_command(command) == [
        "tunesmith",
        "train",
        "--token",
        HIDDEN,
        f"--api-key={HIDDEN}",
        "run.yaml",
        "--max-tokens",
        "12",
    ]


def test_private_keys():
    pem = "-----BEGIN OPENSSH PRIVATE KEY-----\nabc\ndef\n-----END OPENSSH PRIVATE KEY-----"
    assert redact(f"a {pem} b", env={}) == f"a {HIDDEN} b"
    assert "def" not in redact(pem[:50], env={})


STARTS = [
    "a",
    "a.",
    "sk-",
    "sk-a-",
    "hf_",
    "token:",
    "http://",
    "a:",
    "password: ",
    "eyJ",
    "-----BEGIN PRIVATE KEY",
    "xoxb-",
    "bearer ",
]


@pytest.mark.parametrize("piece", STARTS)
def test_the_work_grows_with_the_text_and_not_with_its_square(piece):
    """Texts that make a pattern start over and over: 32 times the text takes about 32 times the time, a square would take 1,024.
    The bar lies 6 times from either, which is what a busy machine can swing."""

    def seconds(text):
        return min(timeit.repeat(lambda: redact(text, env={}), number=1, repeat=3))

    assert seconds(piece * 16_000) < 190 * seconds(piece * 500)
