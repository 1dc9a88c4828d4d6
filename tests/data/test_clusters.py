"""Duplicates: planted ones are found, different rows stay apart, and the same text gives the same answer in any company."""

import numpy as np
import pytest

from tunesmith.data import clusters
from tunesmith.data.clusters import cluster, held_out_rows, normalised, signatures, text_hashes
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


def found(many):
    return cluster(text_hashes(many), signatures(many))


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
