"""Devices: names as people type them, nvidia-smi's lines as drivers write them, this machine's own limits."""

import os
import subprocess

import pytest

from tunesmith import devices
from tunesmith.devices import CARDS, GIB, TABLE, local_device, parse_device, read_nvidia_smi, smallest_that_holds
from tunesmith.errors import ConfigError, ModelError


@pytest.mark.parametrize(
    ("typed", "name", "gib"),
    [
        ("4090", "RTX 4090", 24), ("RTX 4090", "RTX 4090", 24), ("NVIDIA GeForce RTX 4090", "RTX 4090", 24),
        ("rtx4090", "RTX 4090", 24),
        ("a100-40", "A100 40 GB", 40), ("A100-80GB", "A100 80 GB", 80), ("a100", "A100 40 GB", 40), ("h200", "H200", 140.4),
        ("H100", "H100 SXM", 79.6), ("Tesla T4", "T4", 15), ("rtx-6000-ada", "RTX 6000 Ada", 48), ("l40s", "L40S", 45),
        ("24GB", "a GPU with 24 GB", 24), ("24 gb", "a GPU with 24 GB", 24), ("11.5GiB", "a GPU with 11.5 GB", 11.5),
    ],
)  # fmt: skip
def test_names_as_people_type_them(typed, name, gib):
    device = parse_device(typed)
    assert (device.name, device.kind) == (name, "cuda") and device.total == device.free == round(gib * GIB)


@pytest.mark.parametrize(
    ("typed", "said"), [("4091", "'4090'"), ("h20o", "did you mean"), ("toaster", "known: "), ("0GB", "no memory"), ("", "known")]
)
def test_an_unknown_card_names_the_near_one(typed, said):
    with pytest.raises(ConfigError) as e:
        parse_device(typed)
    assert said in str(e.value)


def test_a_cpu_and_a_cpu_of_another_size():
    here, other = parse_device("cpu"), parse_device("cpu-16GB")
    assert here.kind == other.kind == "cpu" and 0 < here.free <= here.total and here.tflops > 0 and not here.bf16
    assert other.total == other.free == 16 * GIB


DRIVER = [  # name, MiB, compute capability as drivers print them; the table's TFLOP/s (0: not in the table)
    ("NVIDIA A100-SXM4-80GB", 81920, "8.0", 312), ("NVIDIA A100-PCIE-40GB", 40960, "8.0", 312),
    ("NVIDIA H100 80GB HBM3", 81559, "9.0", 989),
    ("NVIDIA H100 PCIe", 81559, "9.0", 756), ("NVIDIA H200", 143771, "9.0", 989), ("Tesla T4", 15360, "7.5", 65),
    ("NVIDIA GeForce RTX 4090", 24564, "8.9", 165), ("NVIDIA RTX 6000 Ada Generation", 49140, "8.9", 182),
    ("NVIDIA RTX A6000", 49140, "8.6", 155),
    ("Tesla V100-SXM2-32GB", 32768, "7.0", 125), ("NVIDIA GeForce GTX 1080 Ti", 11264, "6.1", 0),
]  # fmt: skip


@pytest.mark.parametrize(("name", "mib", "capability", "tflops"), DRIVER)
def test_driver_names_are_recognised(name, mib, capability, tflops):
    found = read_nvidia_smi(f"0, GPU-1, {name}, {mib}, {mib - 700}, {capability}\n")
    assert (found.total, found.free) == (mib << 20, (mib - 700) << 20) and found.local
    assert found.guessed == (tflops == 0) and (found.tflops == tflops or found.guessed)
    assert found.bf16 == (float(capability) >= 8) and found.fp8 == (float(capability) >= 8.9)


def test_cuda_visible_devices_decides_which_is_first():
    text = "0, GPU-aaa, Tesla T4, 15360, 15000, 7.5\n1, GPU-bbb, NVIDIA H200, 143771, 143000, 9.0\n"
    assert read_nvidia_smi(text).name == "Tesla T4"
    assert read_nvidia_smi(text, "1,0").name == read_nvidia_smi(text, "GPU-bbb").name == "H200"
    assert read_nvidia_smi(text, "") is None and read_nvidia_smi(text, "-1") is None
    assert read_nvidia_smi("") is None and read_nvidia_smi("No devices were found\n") is None
    assert read_nvidia_smi("0, GPU-a, NVIDIA GB10, [N/A], [N/A], 12.1\n") is None


@pytest.mark.parametrize(
    "fault",
    [FileNotFoundError("nvidia-smi"), subprocess.TimeoutExpired("nvidia-smi", 10), subprocess.CalledProcessError(9, "nvidia-smi")],
)
def test_without_a_driver_the_cpu_is_used_and_cuda_is_refused(monkeypatch, fault):
    def run(command, **kwargs):
        assert isinstance(command, list) and kwargs["timeout"] and not kwargs.get("shell")
        raise fault

    monkeypatch.setattr(devices.subprocess, "run", run)
    assert local_device().kind == local_device("cpu").kind == "cpu"
    with pytest.raises(ModelError, match="no NVIDIA GPU here"):
        local_device("cuda")


def test_a_containers_limits_count(monkeypatch):
    files = {
        "/sys/fs/cgroup/memory.max": str(2 * GIB),
        "/sys/fs/cgroup/memory.current": str(GIB // 2),
        "/sys/fs/cgroup/cpu.max": "100000 100000",
    }
    monkeypatch.setattr(devices, "_first_line", lambda path: files.get(path, ""))
    here = parse_device("cpu")
    assert here.total == 2 * GIB and here.free <= 1.5 * GIB and "1 core" in here.name and here.tflops == devices.CORE_TFLOPS


def test_the_table_is_sane():
    assert len({c.name for c in TABLE}) == len(TABLE)
    for card in TABLE:
        assert 8 <= card.gib <= 300 and 20 < card.tflops < 3000 and 200 < card.bandwidth < 9000, card
        assert parse_device(card.name).name == card.name
        assert not card.fp8 or card.bf16
    assert set(CARDS.values()) == set(TABLE)
    assert smallest_that_holds(20).gib == 22.5 and smallest_that_holds(100).name == "H200" and smallest_that_holds(500) is None


def test_nothing_here_needs_a_shell_or_the_environment_to_be_set():
    assert devices._nvidia({"CUDA_VISIBLE_DEVICES": ""}) is None or os.name == "nt"
