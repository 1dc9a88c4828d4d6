"""ops/paged.py: the kernel over blocks is its reference, at ragged lengths, odd widths, with windows, caps and splits."""

import pytest
import torch

from tunesmith.ops import backend, paged
from tunesmith.ops.paged import BLOCK

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if DEVICE == "cuda" else [])]  # the interpreter's bf16 is wrong


def case(lengths, heads, kv, width, dtype, seed=0):
    """A cache whose blocks lie in no order, with nan wherever no sequence has a token."""
    g = torch.Generator().manual_seed(seed)
    counts = [-(-n // BLOCK) for n in lengths]
    blocks = (torch.randperm(sum(counts) + 5, generator=g) + 1)[: sum(counts)].split(counts)
    tables = torch.zeros(len(lengths), max(counts) + 1, dtype=torch.int32)
    keys = torch.full((((sum(counts) + 6) * BLOCK), kv, width), float("nan"))
    values = keys.clone()
    for n, mine in enumerate(blocks):
        tables[n, : len(mine)] = mine
        for t in range(lengths[n]):
            slot = int(mine[t // BLOCK]) * BLOCK + t % BLOCK
            keys[slot], values[slot] = torch.randn(kv, width, generator=g), torch.randn(kv, width, generator=g)
    q = torch.randn(len(lengths), heads, width, generator=g)
    lengths = torch.tensor(lengths, dtype=torch.int32)
    return [x.to(DEVICE) for x in (q.to(dtype), keys.to(dtype), values.to(dtype), tables, lengths)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("heads", "kv", "width"), [(4, 2, 16), (6, 2, 64), (3, 3, 24), (8, 1, 80)])
@pytest.mark.parametrize("splits", [1, 4])
def test_the_kernel_is_the_reference(dtype, heads, kv, width, splits):
    q, keys, values, tables, lengths = case([1, 15, 16, 17, 100, 300], heads, kv, width, dtype)
    for window, softcap in ((None, None), (20, None), (None, 5.0), (64, 3.0)):
        wanted = paged.reference(q, keys, values, tables, lengths, 0.3, window, softcap)
        with backend.use("triton"):
            found = paged.decode(q, keys, values, tables, lengths, 0.3, window, softcap, splits)
        tolerance = 2e-5 if dtype == torch.float32 else 4e-3 if dtype == torch.float16 else 3e-2
        assert (found.float() - wanted.float()).abs().max() < tolerance * wanted.float().abs().max(), (window, softcap)


def test_a_sequence_is_not_moved_by_its_neighbours():
    q, keys, values, tables, lengths = case([40, 90, 7], 4, 2, 32, torch.float32)
    with backend.use("triton"):
        whole = paged.decode(q, keys, values, tables, lengths, 0.2)
        alone = paged.decode(q[1:2], keys, values, tables[1:2], lengths[1:2], 0.2)
    assert torch.equal(whole[1:2], alone)


def test_a_place_without_a_sequence_gives_zeros():
    q, keys, values, tables, lengths = case([9, 9], 4, 2, 32, torch.float32)
    lengths[0] = 0
    with backend.use("triton"):
        for splits in (1, 2):
            found = paged.decode(q, keys, values, tables, lengths, 0.2, splits=splits)
            assert not found[0].any() and found[1].isfinite().all()


@pytest.mark.parametrize("mode", ["triton", "reference"])
def test_store_puts_each_token_in_its_slot(mode):
    g = torch.Generator().manual_seed(1)
    whole = torch.randn(5, 12, 8, generator=g).to(DEVICE)  # queries, keys and values side by side, as a projection leaves them
    k, v = whole[:, 4:8], whole[:, 8:]
    keys, values = torch.zeros(64, 4, 8, device=DEVICE), torch.zeros(64, 4, 8, device=DEVICE)
    slots = torch.tensor([63, 0, 17, 5, 40], device=DEVICE)
    with backend.use(mode):
        paged.store(k, v, keys, values, slots)
    assert torch.equal(keys[slots], k) and torch.equal(values[slots], v)
    assert keys.count_nonzero() == k.count_nonzero() and values.count_nonzero() == v.count_nonzero()


def test_splits_fill_a_card_and_do_not_cut_too_small():
    assert paged.splits_for(64, 8, 32_768) == 1 and paged.splits_for(1, 8, 32_768) == 32
    assert paged.splits_for(1, 8, 1_000) == 2 and paged.splits_for(1, 8, 100) == 1  # a power of two: tl.arange takes no other
