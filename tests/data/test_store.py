"""Examples on disk: what goes in comes out, in any grouping; a store that was not closed or was cut is not one."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tunesmith.data.store import PARTS, ExampleStore, Packed, StoreWriter
from tunesmith.errors import DataError
from tunesmith.files import sha256_file
from tunesmith.types import Example, Origin


def some_examples(sizes, seed=0):
    draw = np.random.default_rng(seed)
    out = []
    for n in sizes:
        learn = draw.random(n) < 0.5
        learn[0] = False
        out.append(Example(draw.integers(0, 2**31, n).astype(np.int32), learn, Origin("", int(draw.integers(1, 1000)))))
    return out


def written(folder, groups):
    writer, row = StoreWriter(folder), 0
    for i, group in enumerate(groups):
        writer.append(Packed.of(group, range(row, row + len(group))), file=f"f{i % 3}.jsonl", source=i % 2)
        row += len(group)
    writer.close()
    assert writer.sums == {name: sha256_file(folder / name) for name in PARTS}
    return ExampleStore(folder)


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.lists(st.integers(1, 40), max_size=6), max_size=6))
def test_what_goes_in_comes_out(tmp_path, sizes):
    groups = [some_examples(s, i) for i, s in enumerate(sizes)]
    store = written(tmp_path / "s", groups)
    flat = [(e, i) for i, g in enumerate(groups) for e in g]
    assert len(store) == len(flat)
    for k, (e, i) in enumerate(flat):
        got = store[k]
        assert got.ids.tolist() == e.ids.tolist() and got.learn.tolist() == e.learn.tolist()
        assert got.origin == Origin(f"f{i % 3}.jsonl", e.origin.line)
        assert int(store.column("last")[k]) == max(np.flatnonzero(e.learn), default=0)
        assert int(store.column("source")[k]) == i % 2
    assert store.lengths.tolist() == [len(e.ids) for e, _ in flat]
    assert store.trained.tolist() == [int(e.learn.sum()) for e, _ in flat]
    assert store.column("row").tolist() == list(range(len(flat)))
    for position in (0, 1, 7, 8, 9, 30, 40):
        assert store.trained_from(position) == sum(int(e.learn[position:].sum()) for e, _ in flat)
        assert store.subset(np.arange(len(flat))[::-2]).trained_from(position) == sum(
            int(e.learn[position:].sum()) for e, _ in flat[::-2]
        )


def test_subset_and_indexing(tmp_path):
    many = some_examples(range(1, 21))
    store = written(tmp_path / "s", [many])
    odd = store.subset(np.arange(1, 20, 2))
    assert odd.lengths.tolist() == list(range(2, 21, 2))
    assert odd.subset(np.array([3, 0]))[1].ids.tolist() == many[1].ids.tolist()
    assert odd[-1].ids.tolist() == many[19].ids.tolist()
    assert [len(e.ids) for e in odd[2:5]] == [6, 8, 10]
    with pytest.raises(IndexError):
        odd[10]
    assert sum(1 for _ in odd) == 10


def test_the_store_is_on_disk_not_in_memory(tmp_path):
    store = written(tmp_path / "s", [some_examples([50])]).subset(np.array([0]))
    assert all(isinstance(part.base, np.memmap) for part in (store._ids, store._learn, store._index))


def test_a_store_of_another_version_is_refused(tmp_path):
    written(tmp_path / "s", [some_examples([5] * 8)])
    meta = tmp_path / "s" / "store.json"
    raw = meta.read_text()
    for harm in (raw.replace('"start"', '"begin"'), raw.replace('"columns"', '"fields"')):
        assert harm != raw
        meta.write_text(harm)
        with pytest.raises(DataError, match=r"another version|not a store"):
            ExampleStore(tmp_path / "s")


def test_an_unclosed_or_cut_store_is_refused(tmp_path):
    writer = StoreWriter(tmp_path / "s")
    writer.append(Packed.of(some_examples([5]), [0]), file="f", source=0)
    with pytest.raises(DataError, match="not a store"):
        ExampleStore(tmp_path / "s")
    writer.close()
    assert len(ExampleStore(tmp_path / "s")) == 1
    (tmp_path / "s" / "ids.bin").write_bytes(b"1234")
    with pytest.raises(DataError, match="other sizes"):
        ExampleStore(tmp_path / "s")
