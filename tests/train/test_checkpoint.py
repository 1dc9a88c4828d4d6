"""Checkpoints: safetensors reads them, every damage is named and stepped over, state is exact. Crashes: test_crash.py."""

import json
import math
import os
import pickle
import random
import shutil
import struct
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from tunesmith import files
from tunesmith.errors import DoesNotFit, RunError
from tunesmith.train import checkpoint


def write(folder, step, seed=0):
    g = torch.Generator().manual_seed(seed + step)
    return checkpoint.save(
        folder, step, {"w": torch.randn(4, 3, generator=g), "m": torch.randn(5, generator=g)}, {"rate": 0.1 * step}
    )


@pytest.fixture
def two(tmp_path):
    """Checkpoints of steps 10 and 20."""
    write(tmp_path, 10)
    write(tmp_path, 20)
    return tmp_path


ALL = {str(d).removeprefix("torch."): d for d in checkpoint.DTYPES}


def every_dtype():
    raw = torch.arange(1, 33, dtype=torch.uint8)  # bit patterns: no conversion can hide a mistake
    tensors = {name: (raw % 2).bool() if d == torch.bool else raw.view(d) for name, d in ALL.items()}
    tensors |= {
        "scalar": torch.tensor(3.5),
        "nothing": torch.zeros(0, 4),
        "transposed": torch.arange(6.0).reshape(2, 3).T,
        "part": torch.arange(20.0)[3:7],
        "parameter": nn.Parameter(torch.ones(2, 2)),
        "nan": torch.tensor([math.nan, -math.inf, -0.0]),
    }
    return tensors


def bits(t):
    return t.detach().contiguous().reshape(-1).view(torch.uint8)


def test_files_are_byte_for_byte_those_of_safetensors(tmp_path):
    tensors = every_dtype()
    for metadata in ({"format": "pt"}, None):
        checkpoint.write_safetensors(tmp_path / "ours", tensors, metadata)
        save_file(
            {n: t.detach().clone(memory_format=torch.contiguous_format) for n, t in tensors.items()}, tmp_path / "theirs", metadata
        )
        assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ours", "theirs"]


def test_tensors_come_back_bit_for_bit(tmp_path):
    tensors = every_dtype()
    path = checkpoint.save(tmp_path, 1, tensors, {})
    for back in (checkpoint.load(path)[0], load_file(path / "tensors.safetensors")):
        assert back.keys() == tensors.keys()
        for name, t in tensors.items():
            assert (back[name].dtype, back[name].shape) == (t.dtype, t.shape) and torch.equal(bits(back[name]), bits(t)), name


def test_bytes_needed_is_what_the_folder_takes(tmp_path):
    tensors, state = {"w": torch.randn(300, 70), "m": torch.randn(9).bfloat16()}, {"rng": list(range(600))}
    path = checkpoint.save(tmp_path, 1, tensors, state)
    taken = sum(f.stat().st_size for f in path.iterdir())
    assert taken <= checkpoint.bytes_needed(tensors, state) <= 1.1 * taken


def test_too_small_a_disk_is_refused_before_anything_is_written(two, monkeypatch):
    monkeypatch.setattr(files, "free_bytes", lambda path: 900)
    with pytest.raises(DoesNotFit, match=r"checkpoint of step 30 needs [\d,]+ bytes .* 900 are free"):
        write(two, 30)
    assert sorted(p.name for p in two.iterdir()) == ["step-00000010", "step-00000020"]
    weights = {"w": torch.zeros(1000)}
    whole = weights | {"m": torch.zeros(2000)}
    needed = 3 * (checkpoint.bytes_needed(weights) + checkpoint.bytes_needed(whole))
    kept = {two / "new": whole, two / "best": weights}
    monkeypatch.setattr(files, "free_bytes", lambda path: needed - 1)
    with pytest.raises(DoesNotFit, match=f"{needed:,}"):
        checkpoint.preflight(kept, keep=2)
    monkeypatch.setattr(files, "free_bytes", lambda path: needed)
    checkpoint.preflight(kept, keep=2)
    there = sum(f.stat().st_size for f in checkpoint.save(two / "best", 10, weights, {}).iterdir())
    monkeypatch.setattr(files, "free_bytes", lambda path: needed - there)  # what is there already is not needed again
    checkpoint.preflight(kept, keep=2)


STATE = {
    "data": {"epoch": 2, "position": 12345678901234567890, "order": [3, 1, 2]},
    "tenth": 0.1, "tiny": 5e-324, "huge": 1.7976931348623157e308, "third": 1 / 3, "minus": -0.0,
    "nan": math.nan, "inf": math.inf, "nested": [[-math.inf, {"a": None, "b": True}]], "text": "\u00e9 \U0001f600 \"'\\\n",
}  # fmt: skip


def hexes(value):
    """Every float by its bits."""
    if isinstance(value, float):
        return struct.pack("<d", value)
    if isinstance(value, dict):
        return {k: hexes(v) for k, v in value.items()}
    return [hexes(v) for v in value] if isinstance(value, list) else (type(value), value)


def test_state_comes_back_exactly(tmp_path):
    _, state = checkpoint.load(checkpoint.save(tmp_path, 7, {}, STATE))
    assert state.pop("step") == 7 and state.pop("format") == checkpoint.FORMAT
    assert hexes(state) == hexes(STATE)
    g = random.Random(0)
    values = [struct.unpack("<d", g.randbytes(8))[0] for _ in range(2000)]
    values = [v for v in values if v == v]  # a nan's payload is not kept, its being nan is
    assert hexes(checkpoint.load(checkpoint.save(tmp_path, 8, {}, {"v": values}))[1]["v"]) == hexes(values)


@pytest.mark.parametrize("bad", [{1: 2}, {"x": torch.zeros(1)}, {"x": {1, 2}}, {"x": np.float32(1)}, {"x": b"bytes"}])
def test_state_that_json_cannot_give_back_is_refused(tmp_path, bad):
    with pytest.raises(AssertionError, match="state"):
        checkpoint.save(tmp_path, 1, {}, bad)
    assert not list(tmp_path.iterdir())


def test_there_is_no_pickle_in_it(tmp_path):
    """An audit hook (which stays for the process, hence the switch) sees every class a pickle asks for, and every command."""
    seen, on = [], [True]
    sys.addaudithook(lambda name, args: seen.append(name) if on and name.startswith(("pickle.", "subprocess.")) else None)
    pickle.loads(pickle.dumps(print))
    assert seen == ["pickle.find_class"], "the hook sees"
    tensors, rng = checkpoint.rng_state()
    checkpoint.save(tmp_path, 1, {"w": torch.zeros(3), **tensors}, {"rng": rng})
    tensors, state = checkpoint.load(checkpoint.newest_valid(tmp_path)[0])
    checkpoint.restore_rng(tensors, state["rng"])
    on.clear()
    assert seen == ["pickle.find_class"]


# ---- damage --------------------------------------------------------------------------------------------------------------------


def truncate(path, other):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path, other):
    raw = bytearray(path.read_bytes())
    raw[len(raw) * 2 // 3] ^= 1
    path.write_bytes(raw)


def swap(path, other):
    a, b = path.read_bytes(), other.read_bytes()
    path.write_bytes(b)
    other.write_bytes(a)


def zeros(path, other):
    path.write_bytes(bytes(path.stat().st_size))


DAMAGE = {
    "truncate": truncate, "flip": flip, "zeros": zeros, "delete": lambda p, o: p.unlink(), "empty": lambda p, o: p.write_bytes(b""),
    "copy": lambda p, o: shutil.copy(o, p), "append": lambda p, o: p.write_bytes(p.read_bytes() + b"\0"),
}  # fmt: skip
FILES = ["tensors.safetensors", "state.json", "manifest.json"]


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", FILES)
def test_any_damage_falls_back_to_the_older_one_and_is_named(two, name, damage):
    want = checkpoint.load(two / "step-00000010")
    newest = two / "step-00000020"
    DAMAGE[damage](newest / name, two / "step-00000010" / name)
    found, problems = checkpoint.newest_valid(two)
    assert found == checkpoint.Found(two / "step-00000010", 10)
    assert any(p.startswith("step-00000020/") for p in problems)
    # a foreign manifest makes the other files wrong, not itself
    assert any(p.startswith(f"step-00000020/{name}: ") for p in problems) or (name == "manifest.json" and damage == "copy"), (
        problems
    )
    tensors, state = checkpoint.load(found)
    assert state == want[1] and all(torch.equal(tensors[k], want[0][k]) for k in want[0])
    with pytest.raises(RunError, match="step-00000020/"):
        checkpoint.load(newest)


@pytest.mark.parametrize("name", FILES)
def test_a_swap_between_checkpoints_leaves_none_valid(two, name):
    swap(two / "step-00000020" / name, two / "step-00000010" / name)
    found, problems = checkpoint.newest_valid(two)
    assert found is None and {p.split("/")[0] for p in problems} == {"step-00000010", "step-00000020"}


def test_whole_folders_swapped_are_noticed(two):
    a, b = two / "step-00000010", two / "step-00000020"
    a.rename(two / "x")
    b.rename(a)
    (two / "x").rename(b)
    found, problems = checkpoint.newest_valid(two)
    assert found is None
    assert problems == [
        "step-00000020/state.json: belongs to step 10, not to this folder",
        "step-00000010/state.json: belongs to step 20, not to this folder",
    ]


def test_a_later_format_is_named(two):
    path = two / "step-00000020"
    state = json.loads((path / "state.json").read_text()) | {"format": 99}
    with files.folder_atomic(path) as temp:
        shutil.copy(path / "tensors.safetensors", temp)
        (temp / "state.json").write_text(json.dumps(state))
    found, problems = checkpoint.newest_valid(two)
    assert found.step == 10 and problems == ["step-00000020/state.json: format 99, this version reads 1"]


def test_any_flipped_bit_of_any_file(two):
    g = random.Random(1)
    for name in FILES:
        path = two / "step-00000020" / name
        raw = path.read_bytes()
        places = g.sample(range(len(raw) * 8), 120)
        for bit in places:
            broken = bytearray(raw)
            broken[bit // 8] ^= 1 << bit % 8
            path.write_bytes(broken)
            assert checkpoint.newest_valid(two)[0].step == 10, (name, bit)
        path.write_bytes(raw)
    assert checkpoint.newest_valid(two) == (checkpoint.Found(two / "step-00000020", 20), [])


def test_an_unreadable_disk_falls_back(two, monkeypatch):
    real = files.sha256_file

    def broken(path):
        if "step-00000020" in str(path):
            raise OSError(5, "Input/output error")
        return real(path)

    monkeypatch.setattr(files, "sha256_file", broken)
    found, problems = checkpoint.newest_valid(two)
    assert found.step == 10 and "step-00000020/state.json: cannot be read: Input/output error" in problems


def test_strange_names_and_no_folder(two):
    (two / "step-abc").mkdir()
    (two / "notes.txt").touch()
    (two / ".DS_Store").touch()
    (two / "step-00000030").touch()  # a file, not a folder
    found, problems = checkpoint.newest_valid(two)
    assert found.step == 20 and len(problems) == 1 and problems[0].startswith("step-00000030/manifest.json: cannot be read")
    assert checkpoint.newest_valid(two / "nothing") == (None, [])


# ---- order, pruning ------------------------------------------------------------------------------------------------------------


def test_order_is_by_step_whatever_the_clock_says(tmp_path):
    for i, step in enumerate((9, 100_000_000, 20)):
        os.utime(write(tmp_path, step), (i * 1e9, i * 1e9))
    assert checkpoint.newest_valid(tmp_path)[0].step == 100_000_000


def test_prune_keeps_the_newest(tmp_path):
    for step in range(1, 6):
        write(tmp_path, step)
    assert [p.name for p in checkpoint.prune(tmp_path, 2)] == ["step-00000001", "step-00000002", "step-00000003"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000004", "step-00000005"]
    with pytest.raises(AssertionError):
        checkpoint.prune(tmp_path, 1)


def test_prune_never_removes_the_last_valid_one(tmp_path):
    for step in range(1, 7):
        write(tmp_path, step)
    for step in (2, 4, 5, 6):
        truncate(tmp_path / f"step-{step:08d}" / "tensors.safetensors", None)
    assert checkpoint.prune(tmp_path, 2) == []
    found, problems = checkpoint.newest_valid(tmp_path)
    assert found.step == 3 and len(problems) == 3
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"step-{n:08d}" for n in (1, 2, 3, 4, 5, 6)]  # 3 and 1 are the newest two
    for path in tmp_path.iterdir():
        truncate(path / "state.json", None)
    before = sorted(tmp_path.iterdir())
    assert checkpoint.prune(tmp_path, 2) == [] and sorted(tmp_path.iterdir()) == before


def test_what_a_crash_left_is_cleared_by_the_next_save(two):
    (two / ".step-00000030.tmp-99-0123abcd").mkdir()
    (two / ".step-00000030.tmp-99-0123abcd/tensors.safetensors").touch()
    write(two, 40)
    assert sorted(p.name for p in two.iterdir()) == ["step-00000010", "step-00000020", "step-00000040"]


def test_what_was_loaded_outlives_its_files(two):
    tensors, _ = checkpoint.load(two / "step-00000010")
    before = tensors["w"].clone()
    (two / "step-00000010/tensors.safetensors").write_bytes(b"")
    assert torch.equal(tensors["w"], before)


# ---- random numbers ------------------------------------------------------------------------------------------------------------


def draws():
    return (
        torch.randn(5).tolist(),
        torch.rand(3).tolist(),
        random.gauss(0, 1),
        random.random(),
        np.random.randn(3).tolist(),
        np.random.rand(),
    )


def test_every_generator_goes_on_where_it_was(tmp_path):
    draws()  # leaves both gauss caches half full
    tensors, rng = checkpoint.rng_state()
    path = checkpoint.save(tmp_path, 1, {"w": torch.zeros(1), **tensors}, {"rng": rng})
    want = draws()
    torch.manual_seed(99), random.seed(99), np.random.seed(99)
    assert draws() != want
    tensors, state = checkpoint.load(path)
    assert checkpoint.restore_rng(tensors, state["rng"]) == []
    assert draws() == want


def test_a_device_that_is_not_here_is_named():
    tensors, rng = checkpoint.rng_state()
    missing = checkpoint.restore_rng({**tensors, "rng/cuda/7": torch.zeros(16, dtype=torch.uint8)}, rng)
    assert len(missing) == 1 and "cuda:7" in missing[0]


# ---- the point of it -----------------------------------------------------------------------------------------------------------


def test_going_on_from_a_checkpoint_is_bit_identical(tmp_path):
    """A tiny net with dropout and AdamW: six steps in one go, or three, through the disk, and three."""

    def fresh():
        torch.manual_seed(5)
        net = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.3), nn.Linear(8, 1))
        return net, torch.optim.AdamW(net.parameters(), lr=0.01)

    def steps(net, opt, n):
        losses = []
        for _ in range(n):
            loss = net(torch.randn(4, 6)).square().mean()
            opt.zero_grad()
            loss.backward()
            opt.step()
            losses.append(loss.item().hex())
        return losses

    want = steps(*fresh(), 6)
    net, opt = fresh()
    got = steps(net, opt, 3)
    moments = {f"opt/{i}/{k}": v for i, s in opt.state_dict()["state"].items() for k, v in s.items()}
    weights = {f"net/{k}": v for k, v in net.state_dict().items()}
    tensors, rng = checkpoint.rng_state()
    checkpoint.save(tmp_path, 3, {**weights, **moments, **tensors}, {"rng": rng})

    net, opt = fresh()
    steps(net, opt, 2)  # another past
    found, _ = checkpoint.newest_valid(tmp_path)
    tensors, state = checkpoint.load(found)
    net.load_state_dict({k.removeprefix("net/"): v for k, v in tensors.items() if k.startswith("net/")})
    groups = opt.state_dict()
    for name, value in tensors.items():
        if name.startswith("opt/"):
            _, i, key = name.split("/")
            groups["state"][int(i)][key] = value
    opt.load_state_dict(groups)
    checkpoint.restore_rng(tensors, state["rng"])
    assert got + steps(net, opt, 3) == want
