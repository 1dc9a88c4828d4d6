"""Duplicates: planted ones are found, different rows stay apart, and the same text gives the same answer in any company."""

from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tunesmith.data import clusters
from tunesmith.data.clusters import BANDS, NEAR, PERMUTATIONS, Finder, held_out_rows, normalised, signatures, text_hashes
from tunesmith.types import Conversation, Message, Origin

WORDS = [f"{a}{b}{c}" for a in "bdfgk" for b in "aeiou" for c in "lmnrst"]


def texts(n, length, seed=0):
    draw = np.random.default_rng(seed)
    return [" ".join(draw.choice(WORDS, length)) for _ in range(n)]


def changed(text, share, seed=0):
    """The text with one run of its words replaced."""
    draw, words = np.random.default_rng(seed), text.split()
    n = round(share * len(words))
    start = int(draw.integers(0, len(words) - n))
    words[start : start + n] = draw.choice(WORDS, n)
    return " ".join(words)


def clustered(hashes, many_signatures, step=37):
    """The clusters of rows that are added `step` at a time."""
    with TemporaryDirectory() as folder:
        finder = Finder(Path(folder) / "rows")
        for i in range(0, len(hashes), step):
            finder.add(hashes[i : i + step], many_signatures[i : i + step])
        return finder.clusters()


def found(many):
    return clustered(text_hashes(many), signatures(many))


def said(*texts, **more):
    roles = ("user", "assistant") * len(texts)
    return Conversation(tuple(Message(r, t) for r, t in zip(roles, texts, strict=False)), Origin("a", 1), **more)


def test_exact_is_to_the_letter_and_near_is_by_words():
    rows = [said("5 - 3?", "2"), said("5 + 3?", "8"), said("5 - 3?", "2"), said(" 5 - 3? ", "2\n"), said("5 - 3?", "2!")]
    c = clustered(text_hashes([clusters.letters(r) for r in rows]), signatures([normalised(r) for r in rows]))
    assert c.exact.tolist() == [0, 1, 0, 0, 4] and c.near.tolist() == [0, 1, 0, 0, 0]
    assert (c.exact_duplicates, c.near_duplicates) == (2, 1)


def test_who_says_it_and_what_is_learned_tell_rows_apart():
    one = said("a", "b")
    others = [
        Conversation((Message("user", "a"), Message("assistant", "b", False)), one.origin),
        Conversation((Message("user", "a"), Message("assistant", "b", None, (("name", "x"),))), one.origin),
        Conversation((Message("system", "a"), Message("assistant", "b")), one.origin),
        said("a", "b", tools=({"name": "f"},)),
        said("a\nb"),
        said("a", "b", kind="completion"),
    ]
    assert len({clusters.letters(c) for c in [one, *others]}) == 7


# ---- the definition: all in memory, every candidate of every band compared


def definition(hashes, many_signatures):
    """(exact, near) of all rows."""
    n = len(hashes)
    _, first, which = np.unique(hashes, return_index=True, return_inverse=True)
    exact = first[which]
    lead = np.flatnonzero(exact == np.arange(n))  # one row of each exact group
    pairs_a, pairs_b = [np.flatnonzero(exact != np.arange(n))], [exact[exact != np.arange(n)]]
    width = PERMUTATIONS // BANDS
    for band in range(BANDS):
        key = np.zeros(len(lead), np.uint64)
        for column in range(band * width, (band + 1) * width):
            key = key * clusters._BASE + many_signatures[lead, column]
        order = np.argsort(key, kind="stable")
        heads = np.flatnonzero(np.append(True, key[order][1:] != key[order][:-1])[: len(order)])
        head_of = np.repeat(heads, np.diff(np.append(heads, len(order))))
        here = np.arange(len(order))
        later = here > head_of  # each row against the first of its bucket and against the one before it
        for other in (head_of, here - 1):
            a, b = lead[order[here[later]]], lead[order[other[later]]]
            close = (many_signatures[a] == many_signatures[b]).mean(1) >= NEAR
            pairs_a.append(a[close])
            pairs_b.append(b[close])
    return exact, clusters._components(n, np.concatenate(pairs_a), np.concatenate(pairs_b))


def definition_held_out(near, wanted, seed):
    roots, which, sizes = np.unique(near, return_inverse=True, return_counts=True)
    if len(roots) < 2 or wanted < 1:
        return np.zeros(0, np.int64)
    chosen, left = [], min(wanted, len(near) - 1)
    for root in np.random.default_rng([seed, 0x5EED]).permutation(len(roots)):
        if sizes[root] <= left:
            chosen.append(root)
            left -= sizes[root]
        if not left:
            break
    return np.flatnonzero(np.isin(which, chosen))


def random_rows(draw, n):
    """Hashes and signatures of rows among which are copies, near copies in chains, near misses at the threshold, and rows that
    share bands with many others and are no copies."""
    hashes = draw.integers(0, 1 << 64, n, dtype=np.uint64)
    many = draw.integers(0, 1 << 32, (n, PERMUTATIONS), dtype=np.uint32)
    for i in range(1, n):
        kind, other = draw.random(), int(draw.integers(0, i))
        if kind < 0.2:
            hashes[i], many[i] = hashes[other], many[other]
        elif kind < 0.5:
            same = draw.random(PERMUTATIONS) < draw.choice([0.5, 0.7, 0.72, 0.9])
            many[i, same] = many[other, same]
        elif kind < 0.6:
            many[i, :8] = many[0, :8]
    return hashes, many


@pytest.mark.parametrize("part_rows", [8, 100, 1 << 16])
def test_clusters_on_disk_are_those_of_the_definition(part_rows, monkeypatch):
    monkeypatch.setattr(clusters, "PART_ROWS", part_rows)
    joined = 0
    for seed, n in enumerate([1, 2, 3, 10, 50, 200, 200, 700, 700, 700]):
        draw = np.random.default_rng(seed)
        hashes, many = random_rows(draw, n)
        exact, near = definition(hashes, many)
        c = clustered(hashes, many, int(draw.integers(1, n + 1)))
        assert c.exact.tolist() == exact.tolist() and c.near.tolist() == near.tolist()
        assert c.exact_duplicates == (exact != np.arange(n)).sum()
        assert c.near_duplicates == (near != np.arange(n)).sum() - c.exact_duplicates
        for wanted in (0, 1, n // 10, n // 2, n):
            assert held_out_rows(c.near, wanted, seed).tolist() == definition_held_out(near, wanted, seed).tolist()
        half = c.among(n // 2)
        assert half.exact_duplicates == n // 2 - len(set(exact[: n // 2].tolist()))
        assert half.near_duplicates == n // 2 - len(set(near[: n // 2].tolist())) - half.exact_duplicates
        joined += c.near_duplicates
    assert joined > 300


def test_copies_are_compared_once_and_not_in_every_band(monkeypatch):
    compared = []
    real = clusters._alike
    monkeypatch.setattr(clusters, "_alike", lambda signatures, a, b: compared.append(len(a)) or real(signatures, a, b))
    a = texts(20, 100)
    c = found([changed(t, 0.01, i) for i in range(30) for t in a])
    assert c.exact_duplicates + c.near_duplicates == 580
    assert sum(compared) < 2 * 600  # all bands together would be 16 * 580 * 2


def test_any_number_of_threads_and_of_pairs_at_once_finds_the_same(tmp_path, monkeypatch):
    a = texts(300, 60)
    many = a + [changed(t, 0.05, i) for i, t in enumerate(a)] + a[:50]
    hashes, signed = text_hashes(many), signatures(many)
    want = clustered(hashes, signed)
    assert want.exact_duplicates == 50 and want.near_duplicates > 250
    monkeypatch.setattr(clusters, "PART_ROWS", 64)
    for threads, pairs, run in ((1, 5, 256), (3, 1 << 16, 1), (9, 64, 7)):
        monkeypatch.setattr(clusters, "PAIRS", pairs)
        monkeypatch.setattr(clusters, "RUN", run)
        finder = Finder(tmp_path / str(threads))
        finder.add(hashes, signed)
        c = finder.clusters(threads)
        assert np.array_equal(c.exact, want.exact) and np.array_equal(c.near, want.near)


def test_signatures_that_are_read_in_runs_are_those_of_the_pairs(tmp_path):
    draw = np.random.default_rng(3)
    signed = draw.integers(0, 3, (2_000, PERMUTATIONS), dtype=np.uint32)
    signed[1000:] = np.where(draw.random((1000, PERMUTATIONS)) < 0.2, 7, signed[:1000])
    a, b = draw.permutation(1000), np.arange(1000, 2000)
    a[:500] = b[:500] - 1000
    (tmp_path / "s").write_bytes(signed.tobytes())
    want = (signed[a] == signed[b]).mean(1) >= clusters.NEAR
    assert 300 < want.sum() < 700
    with (tmp_path / "s").open("rb", buffering=0) as f:
        assert np.array_equal(clusters._alike(f, a, b), want)


def test_memory_a_row_is_small(tmp_path):
    """Eight bytes a row stay; the rest is a part of fixed size."""
    import tracemalloc

    draw, peaks = np.random.default_rng(0), {}
    for n in (100_000, 400_000):
        finder = Finder(tmp_path / str(n))
        for _ in range(0, n, 10_000):
            finder.add(
                draw.integers(0, 1 << 64, 10_000, dtype=np.uint64),
                draw.integers(0, 1 << 32, (10_000, PERMUTATIONS), dtype=np.uint32),
            )
        tracemalloc.start()
        near = finder.clusters(threads=4).near
        held_out_rows(near, 500, 0)
        peaks[n] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert (peaks[400_000] - peaks[100_000]) / 300_000 < 20


def test_estimated_similarity_is_the_shingles_jaccard():
    a = texts(1, 300)[0]
    for share in (0.02, 0.1, 0.3, 0.6):
        b = changed(a, share)
        sets = [{tuple(t.split()[i : i + clusters.WORDS]) for i in range(300 - clusters.WORDS + 1)} for t in (a, b)]
        jaccard = len(sets[0] & sets[1]) / len(sets[0] | sets[1])
        s = signatures([a, b])
        assert abs((s[0] == s[1]).mean() - jaccard) < 4 * np.sqrt(max(jaccard * (1 - jaccard), 0.01) / clusters.PERMUTATIONS)


def test_planted_duplicates_are_found_and_only_they():
    own = texts(2000, 80)
    exact = [own[i] for i in range(0, 500, 5)]
    near = [changed(own[i], 0.05, i) for i in range(1000, 1500)]
    c = found(own + exact + near)
    assert c.exact_duplicates == 100
    assert c.exact[2000:2100].tolist() == list(range(0, 500, 5))
    assert (c.near[2100:] == np.arange(1000, 1500)).mean() > 0.98
    assert (c.near[:2000] == np.arange(2000)).all()


def test_chains_are_one_cluster_and_labels_are_first_members():
    a = texts(1, 200)[0]
    chain = [a]
    for i in range(6):
        chain.append(changed(chain[-1], 0.04, i))
    assert found([*texts(3, 200, 9), *chain]).near.tolist() == [0, 1, 2] + [3] * 7


@pytest.mark.parametrize(
    "short", [["", "a", "a b", "a b c d e f", "x"], ["東京は日本の首都です。" * 3, "大阪は西にある都市です。" * 3]]
)
def test_short_texts_and_texts_without_spaces(short):
    assert found(short).near.tolist() == list(range(len(short)))
    assert found(short + short).near.tolist() == list(range(len(short))) * 2


def test_near_duplicates_without_spaces():
    a = "".join(np.random.default_rng(0).choice(list("日月火水木金土山川田人口目耳手足力大小中"), 300))
    b = a[:150] + "雨" + a[151:]
    c = "".join(np.random.default_rng(1).choice(list("日月火水木金土山川田人口目耳手足力大小中"), 300))
    assert found([a, b, c]).near.tolist() == [0, 0, 2]


def test_a_signature_does_not_depend_on_the_other_rows():
    many = [*texts(50, 30), "short", "東京は日本の首都です" * 5]
    together = signatures(many)
    for i in (0, 17, 50, 51):
        assert (signatures([many[i]])[0] == together[i]).all()
    assert signatures([]).shape == (0, clusters.PERMUTATIONS)


def test_known_values_hold_on_every_machine_and_python():  # a split is the same tomorrow
    assert signatures(["the quick brown fox jumps over the lazy dog"])[0, :4].tolist() == [
        508076111,
        1508390981,
        72727121,
        358371976,
    ]


def test_normalised_leaves_out_what_all_rows_share():
    def chat(*messages):
        return Conversation(tuple(Message(r, t) for r, t in messages), Origin("f", 1))

    a = chat(("system", "Long text."), ("user", "What  is\n2+2?"), ("assistant", "Four!"))
    assert normalised(a) == normalised(chat(("user", "what is 2 2"), ("assistant", "FOUR"))) == "what is 2 2 four"
    assert normalised(chat(("user", "?!"))) == "?!"


def test_components_equal_a_plain_union_find():
    draw = np.random.default_rng(0)
    for n, m in ((1, 0), (30, 10), (200, 150), (200, 600)):
        a, b = draw.integers(0, n, m), draw.integers(0, n, m)
        parent = list(range(n))

        def root(i, parent=parent):
            while parent[i] != i:
                i = parent[i]
            return i

        for i, j in zip(a.tolist(), b.tolist(), strict=True):
            i, j = sorted((root(i), root(j)))
            parent[j] = i
        assert clusters._components(n, a, b).tolist() == [root(i) for i in range(n)]


def test_the_split_never_cuts_a_cluster_and_follows_the_seed():
    near = np.repeat(np.arange(0, 300, 3), 3)
    for seed in range(5):
        held = held_out_rows(near, 20, seed)
        assert len(held) == 18  # six clusters of three; a seventh does not fit
        assert not set(near[held]) & set(np.delete(near, held))
        assert held.tolist() == held_out_rows(near, 20, seed).tolist()
    assert held_out_rows(near, 20, 1).tolist() != held_out_rows(near, 20, 2).tolist()
    assert held_out_rows(np.zeros(10, np.int64), 3, 0).tolist() == []
    assert len(held_out_rows(np.arange(10), 10, 0)) == 9


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.text(st.sampled_from(" \t\n\r\v\f\x1c\x1d\x1e\x1f\x00aBZz09.,!?_~é\x85\xa0ſ東"), max_size=30))
def test_normalised_takes_bytes_and_characters_for_the_same(said):
    plain = " ".join(said.translate(clusters.PUNCTUATION).lower().split()) or said
    assert normalised(Conversation((Message("user", said),), Origin("f", 1))) == plain
