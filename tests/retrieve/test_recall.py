"""On real stories and questions: bm25s' recall on the same chunks, less 1 % at most; docs/retrieval.md says what was measured."""

import importlib.util
import json
import re
from pathlib import Path

import pytest

from tunesmith.retrieve.search import MEANING, RRF_K

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("bench_retrieve", ROOT / "bench" / "retrieve.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_recall_is_within_1_percent_of_bm25s(bench, shared_data):
    pytest.importorskip("bm25s")
    pytest.importorskip("Stemmer")
    found = bench.recall(shared_data, None, "test")
    assert found["questions"] > 900
    for k in bench.KS:
        for peer in ("bm25s", "bm25s, our stop words"):
            assert found["BM25 (FTS5)"]["recall"][k] >= 0.99 * found[peer]["recall"][k], (k, peer)


def test_the_page_says_what_was_measured():
    """Each number of docs/retrieval.md's tables stands in bench/results/retrieve.json."""
    found = json.loads((ROOT / "bench/results/retrieve.json").read_text())
    page = (ROOT / "docs/retrieval.md").read_text()
    for name, m in found["recall"].items():
        if isinstance(m, dict) and name != "fusions":
            numbers = [m["recall"]["1"], m["recall"]["5"], m["recall"]["10"], m["hit"]["5"], m["mrr"], m["ndcg"]["10"]]
            assert f"| {name} | " + " | ".join(f"{n:.3f}" for n in numbers) + " |" in page, name
    for name, sides in found["recall"]["fusions"].items():
        numbers = [n for side in sides.values() for n in (*side["recall"].values(), side["mrr"])]
        assert f"| {name} | " + " | ".join(f"{n:.3f}" for n in numbers) + " |" in page, name
    plain, chosen = (found["recall"]["fusions"][name]["held_out"] for name in ("BM25 alone", f"RRF, k = {RRF_K}, {MEANING}"))
    assert all(chosen["recall"][k] >= plain["recall"][k] for k in plain["recall"]) and chosen["mrr"] >= plain["mrr"], "hybrid"
    for name in ("BM25", "BM25, every word scored", "hybrid"):
        wall, cpu = (found["latency"][name][kind] for kind in ("wall", "cpu"))
        assert f"| {name} | {wall['p50_ms']:.0f} | {wall['p95_ms']:.0f} | {cpu['p95_ms']:.0f} |" in page, name
    assert found["latency"]["BM25"]["wall"]["p95_ms"] <= 100 and found["latency"]["hybrid"]["wall"]["p95_ms"] <= 250
    for support, shares in found["cite"].items():
        if re.fullmatch(r"0\.\d", support):
            assert f"| {support} | " + " | ".join(f"{v:.3f}" for v in shares.values()) + " |" in page
