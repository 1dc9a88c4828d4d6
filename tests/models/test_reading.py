"""Bytes read in pieces by several threads come out whole and in order."""

import os
import sys

import pytest
import torch

from tunesmith.errors import ModelError
from tunesmith.models import reading

CPU = torch.device("cpu")


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "PIECE", 100)
    values = torch.randint(0, 256, (5000,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    (tmp_path / "a").write_bytes(bytes(values.tolist()))
    return tmp_path / "a", values


def test_spans_come_whole_and_in_order(file):
    path, values = file
    bounds = [(8, 8), (8, 108), (108, 109), (109, 3000), (0, 5000), (4999, 5000)]
    found = list(reading.to_device([(path, a, b) for a, b in bounds], CPU))
    assert [len(x) for x in found] == [b - a for a, b in bounds]
    assert all(torch.equal(x, values[a:b]) for x, (a, b) in zip(found, bounds, strict=True))


def test_a_file_that_ends_early_is_told_and_nothing_stays_open(file):
    path, _ = file
    before = os.listdir("/proc/self/fd") if sys.platform == "linux" else []
    with pytest.raises(ModelError, match=rf"{path.name}: ended while it was being read"):
        list(reading.to_device([(path, 0, 900), (path, 4000, 5001)], CPU))
    assert not before or len(os.listdir("/proc/self/fd")) == len(before)


def test_a_reader_that_goes_away_early_closes_its_files(file):
    path, values = file
    stream = reading.to_device([(path, 0, 300), (path, 300, 5000)], CPU)
    assert torch.equal(next(stream), values[:300])
    stream.close()
    with pytest.raises(StopIteration):
        next(stream)
