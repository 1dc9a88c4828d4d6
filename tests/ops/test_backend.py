"""Which kernels run: each mode, each obstacle, and every kernel compiles for the GPUs it is meant for."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tunesmith.errors import TunesmithError
from tunesmith.ops import backend

CPU = torch.zeros(1)


def test_auto_takes_plain_torch_on_a_cpu_and_says_why():
    assert not backend.triton_for(CPU)
    if not torch.cuda.is_available():
        assert backend.why().startswith("kernels: plain PyTorch (")


def test_triton_is_an_error_where_it_cannot_run(monkeypatch):
    monkeypatch.setattr(backend, "obstacle", lambda device, needs=None: "no such thing")
    with backend.use("triton"), pytest.raises(TunesmithError, match=r"no such thing\nfix:"):
        backend.triton_for(CPU)


def test_the_obstacles(monkeypatch):
    look = backend.obstacle.__wrapped__  # without its cache
    monkeypatch.setattr(backend, "INTERPRETED", False)
    assert "not on an NVIDIA GPU" in look(CPU.device)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    assert look(torch.device("cuda", 0)) == ""
    assert look(torch.device("cuda", 0), backend.NEEDS_FP8) == "the GPU has compute capability 8.6, below 8.9"
    monkeypatch.setattr(backend, "INTERPRETED", True)
    assert look(CPU.device) == "" and "TRITON_INTERPRET" in look(torch.device("cuda", 0))
    monkeypatch.setattr(backend, "triton", None)
    assert look(CPU.device) == "triton is not installed"


def test_a_mode_lasts_as_long_as_its_body():
    with backend.use("reference"):
        assert not backend.triton_for(CPU) and "as asked" in backend.why()
    assert backend._mode == "auto"
    with pytest.raises(TunesmithError, match="cuda"):
        backend.set_mode("cuda")


def test_the_package_works_without_triton():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "from tunesmith.ops import backend, fp8, int8, linear_ce, nf4, rms_norm, rotary, swiglu\n"
        "import torch; nf4.decode(nf4.quantise(torch.ones(4, 64)), torch.empty(4, 64)); print(backend.why())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "triton is not installed" in done.stdout, done.stderr


@pytest.mark.parametrize("capability", [pytest.param(80, marks=pytest.mark.soak), 90, pytest.param(100, marks=pytest.mark.soak)])
def test_every_kernel_compiles(capability, tmp_path):
    """Ampere, Hopper, Blackwell; Triton brings its own assembler, so no GPU is needed. 10 to 20 s each: Hopper's are the most."""
    pytest.importorskip("triton")
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    script = Path(__file__).with_name("compile_kernels.py")
    done = subprocess.run([sys.executable, script, str(capability)], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(set(line.split()[0] for line in done.stdout.splitlines())) == (17 if capability < 89 else 21)
