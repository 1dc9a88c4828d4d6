"""Nothing that others wrote is ever run. The source is held to a list of forbidden calls, and a hostile checkpoint is loaded under
an audit hook that sees every process, connection, unpickled class and opened script."""

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[1] / "src"

MODULES = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "telnetlib", "xmlrpc"}
CALLS = {  # by the name it is called by, dots included; a bare name also stands for `from module import name`
    "eval", "exec", "compile", "__import__", "os.system", "os.popen", "os.execv", "os.execve", "os.execvp", "torch.load",
    "torch.hub.load", "torch.jit.load", "torch.ops.load_library", "ctypes.CDLL", "runpy.run_path", "runpy.run_module",
    "yaml.load", "yaml.load_all", "yaml.full_load", "yaml.full_load_all", "yaml.unsafe_load", "yaml.unsafe_load_all",
    "jinja2.Environment", "jinja2.Template", "jinja2.sandbox.SandboxedEnvironment", "tempfile.mktemp",
}  # fmt: skip
LOADERS = ("yaml.Loader", "yaml.FullLoader", "yaml.UnsafeLoader", "yaml.CLoader")


def dotted(node: ast.AST) -> str:
    """`a.b.c` of an attribute chain; "" for anything else."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (before := dotted(node.value)):
        return f"{before}.{node.attr}"
    return ""


def faults(text: str) -> Iterator[tuple[int, str]]:
    """(line, what) for each forbidden thing in a module's source."""
    tree = ast.parse(text)
    full: dict[str, str] = {}  # what a name of this module is elsewhere
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            full |= {a.asname: a.name for a in node.names if a.asname}
        elif isinstance(node, ast.ImportFrom) and node.module:
            full |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}

    def known(node: ast.AST) -> str:
        first, dot, rest = dotted(node).partition(".")
        return full.get(first, first) + dot + rest

    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, f"import {a.name}") for a in node.names if a.name.partition(".")[0] in MODULES)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in MODULES:
            yield node.lineno, f"from {node.module} import"
        elif isinstance(node, ast.Attribute) and known(node) in LOADERS:
            yield node.lineno, known(node)
        elif isinstance(node, ast.Call):
            name = known(node.func)
            if name in CALLS:
                yield node.lineno, f"{name}()"
            for keyword in node.keywords:
                off = isinstance(keyword.value, ast.Constant) and not keyword.value.value
                if keyword.arg in ("shell", "trust_remote_code", "allow_pickle", "weights_only") and not off:
                    yield node.lineno, f"{keyword.arg}={ast.unparse(keyword.value)}"
            if name in ("numpy.load", "np.load") and "allow_pickle" not in {k.arg for k in node.keywords}:
                yield node.lineno, "np.load without allow_pickle=False"
        elif isinstance(node, ast.Dict):  # f(**{"trust_remote_code": True})
            for key, value in zip(node.keys, node.values, strict=True):
                on = isinstance(value, ast.Constant) and value.value is True
                if on and isinstance(key, ast.Constant) and key.value in ("shell", "trust_remote_code", "allow_pickle"):
                    yield node.lineno, f"{key.value}: True"


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from pickle import loads",
        "import torch as t\nt.load(x)",
        "from torch import load\nload(x)",
        "import marshal",
        "import subprocess\nsubprocess.run(x, shell=True)",
        "import yaml\nyaml.load(x, Loader=yaml.SafeLoader)",
        "import yaml\nclass L(yaml.Loader): ...",
        "eval(x)",
        "exec(x)",
        "AutoModel.from_pretrained(x, trust_remote_code=True)",
        "AutoModel.from_pretrained(x, trust_remote_code=flag)",
        "f(**{'trust_remote_code': True})",
        "import jinja2\njinja2.Environment()",
        "from jinja2 import Template\nTemplate(x)",
        "import numpy as np\nnp.load(x)",
        "import numpy as np\nnp.load(x, allow_pickle=True)",
        "import os\nos.system(x)",
    ],
)
def test_a_forbidden_line_is_found(line: str) -> None:
    assert list(faults(line))


@pytest.mark.parametrize(
    "line",
    ["model.eval()", "import yaml\nyaml.safe_load(x)", "import numpy as np\nnp.load(x, allow_pickle=False)", "re.compile(x)",
     "import jinja2.sandbox\njinja2.sandbox.ImmutableSandboxedEnvironment()", "f(trust_remote_code=False)",
     "import jinja2\nx: jinja2.Environment"],
)  # fmt: skip
def test_an_innocent_line_is_not(line: str) -> None:
    assert not list(faults(line))


def test_the_source_holds_nothing_forbidden() -> None:
    files = sorted(SOURCE.rglob("*.py"))
    assert len(files) > 50
    found = [f"{file.relative_to(SOURCE)}:{line}: {what}" for file in files for line, what in faults(file.read_text("utf-8"))]
    assert not found, "\n".join(found)


# ---- a hostile checkpoint ------------------------------------------------------------------------------------------------------

EVIL = "import pathlib\npathlib.Path(__file__).with_name('PWNED').write_text('x')\nclass Evil: ...\n"
ATTACK = (
    "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
    "{{ cycler.__init__.__globals__.os.system('touch PWNED') }}"
)
WATCH = """
import json, sys
folder, events = sys.argv[1], []
SEEN = ("os.exec", "os.system", "os.posix_spawn", "os.startfile", "socket.connect", "socket.getaddrinfo", "pickle.find_class",
        "ctypes.dlopen")
def hook(event, args):
    if event == "subprocess.Popen":
        events.append([event, [str(a) for a in args[1]]])
    elif event in SEEN:
        events.append([event, repr(args)])
    elif event == "open" and str(args[0]).startswith(folder) and str(args[0]).endswith((".py", ".bin", ".pt", ".pkl")):
        events.append([event, str(args[0])])
    elif event == "exec" and folder in getattr(args[0], "co_filename", ""):
        events.append([event, args[0].co_filename])
import torch, tunesmith.models, tunesmith.adapters, tunesmith.data.render
from tunesmith.chat import Talker
from tunesmith.errors import TunesmithError
if sys.argv[2] == "fallback":
    import transformers, transformers.models.gpt2.modeling_gpt2
sys.addaudithook(hook)
try:
    talker = Talker.open(folder)
    said = "answered: " + repr(talker.answer(["Hi"], max_tokens=2))
except TunesmithError as fault:
    said = str(fault)
print(json.dumps([said, events]))
"""  # the processes and connections that count are those of loading: what importing torch does is another's affair


def watched(folder: Path, kind: str = "native") -> tuple[str, list[list]]:
    """(what opening `folder` to talk to it said, the events of WATCH but the template's child)."""
    done = subprocess.run([sys.executable, "-c", WATCH, str(folder), kind], capture_output=True, text=True, cwd=folder.parent)
    assert done.returncode == 0, done.stderr
    said, events = json.loads(done.stdout.splitlines()[-1])
    child = str(SOURCE / "tunesmith" / "data" / "template_child.py")
    assert not [*folder.rglob("PWNED"), *folder.parent.glob("PWNED")]
    return said, [e for e in events if not (e[0] == "subprocess.Popen" and e[1][:3] == [sys.executable, "-I", child])]


def hostile(folder: Path) -> Path:
    """Code, a pickle and auto_map beside a checkpoint, everywhere transformers would look for them."""
    for name in ("modeling_evil.py", "configuration_evil.py", "tokenization_evil.py", "sitecustomize.py", "torch.py", "jinja2.py"):
        (folder / name).write_text(EVIL)
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(EVIL)
    # protocol 0 of: os.system("touch PWNED")
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch PWNED'\ntR.")
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "configuration_evil.Evil", "AutoModelForCausalLM": "modeling_evil.Evil"}
    (folder / "config.json").write_text(json.dumps(config))
    words = json.loads((folder / "tokenizer_config.json").read_text())
    words["auto_map"] = {"AutoTokenizer": ["tokenization_evil.Evil", None]}
    (folder / "tokenizer_config.json").write_text(json.dumps(words))
    return folder


def test_code_beside_a_native_checkpoint_is_not_even_opened(tiny, tmp_path: Path) -> None:
    said, events = watched(hostile(tiny.checkpoint(tmp_path / "m")))
    assert said.startswith("answered") and not events, (said, events)


def test_a_template_that_reaches_for_the_system_is_refused(tiny, tmp_path: Path) -> None:
    folder = hostile(tiny.checkpoint(tmp_path / "m"))
    words = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(words | {"chat_template": ATTACK}))
    said, events = watched(folder)
    assert "unsafe" in said or "security" in said.lower(), said
    assert not events, events


def test_pickled_weights_are_refused_unopened(tiny, tmp_path: Path) -> None:
    folder = hostile(tiny.checkpoint(tmp_path / "m"))
    (folder / "model.safetensors").unlink()
    said, events = watched(folder)
    assert "pickle" in said and not events, (said, events)


def test_an_architecture_that_brings_its_own_code_is_refused(tiny, tmp_path: Path) -> None:
    folder = hostile(tiny.checkpoint(tmp_path / "m"))
    config = json.loads((folder / "config.json").read_text()) | {"model_type": "evil", "architectures": ["EvilForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(config))
    said, events = watched(folder)
    assert "evil" in said and not said.startswith("answered") and not events, (said, events)


def test_code_beside_a_fallback_checkpoint_is_not_even_opened(tiny, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    folder = tiny.checkpoint(tmp_path / "m")
    small = transformers.GPT2Config(vocab_size=260, n_positions=128, n_embd=32, n_layer=2, n_head=2, eos_token_id=257)
    transformers.GPT2LMHeadModel(small).save_pretrained(folder)
    said, events = watched(hostile(folder), "fallback")
    assert said.startswith("answered") and not events, (said, events)


# ---- no call home ----------------------------------------------------------------------------------------------------------------

SILENT = """
import io, sys
def hook(event, args):
    if event.startswith("socket."):
        raise RuntimeError(f"a call home: {event} {args}")
sys.addaudithook(hook)
import tunesmith
from rich.console import Console
base, data, out = sys.argv[1:]
console = Console(file=io.StringIO())
(config := open(out + ".yaml", "w")).write(tunesmith.init(data, model=base, output=out))
config.close()
settings = ["train.max_steps=2", "train.batch_size=4", "eval.sample_tokens=3", "memory.device=cpu", "data.workers=2"]
tunesmith.check(out + ".yaml", console=console).print(console)
tunesmith.prepare(out + ".yaml", out=out + "-mended", fix="all", console=console).print(console)
tunesmith.plan(out + ".yaml").print(console)
run = tunesmith.train(out + ".yaml", *settings, console=console)
assert run.status().state == "finished"
assert len(tunesmith.generate(run.path, ["hi"], max_tokens=3)) == 1
list(tunesmith.stream(run.path, "hi", max_tokens=3))
tunesmith.report(run.path)
tunesmith.merge(run.path, out + "-merged")
print("silent")
"""


@pytest.mark.parametrize("kind", ["native", "fallback"])
def test_no_verb_opens_a_socket(tiny, tmp_path: Path, kind: str) -> None:
    """From the first look at the data to the merged model: an audit hook makes the first socket an error."""
    folder = tiny.checkpoint(tmp_path / "m")
    if kind == "fallback":
        transformers = pytest.importorskip("transformers")
        small = transformers.GPT2Config(vocab_size=260, n_positions=128, n_embd=32, n_layer=2, n_head=2, eos_token_id=257)
        transformers.GPT2LMHeadModel(small).save_pretrained(folder)
    line = [sys.executable, "-c", SILENT, str(folder), str(tiny.train), str(tmp_path / "out")]
    done = subprocess.run(line, capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.endswith("silent\n"), done.stderr


def test_a_socket_would_be_seen() -> None:
    code = SILENT.partition("import tunesmith")[0] + "import socket\nsocket.socket()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode and "a call home: socket.__new__" in done.stderr
