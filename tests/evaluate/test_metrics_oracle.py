"""Our metrics equal rouge-score's, sacrebleu's and scikit-learn's, on written cases and on random ones. Each test skips without its
package."""

import random

import numpy as np
import pytest

from tunesmith.evaluate.metrics import METRICS, chrf, rouge_l

CASES = [
    ("", ""),
    ("", "a"),
    ("a", ""),
    ("The cat sat on the mat.", "The cat sat on the mat."),
    ("the the the the", "the cat the"),
    ("It's 3.5 km -- far!", "its 3 5 km far"),
    ("Gladly, dear grower.\nIt carries 4 pots.", "It carries 4 pots, so 4 plants is the most.\nGrow well."),
    ("Der Fluß heißt Ötz", "Der Fluss heisst Oetz"),
    ("猫は好きです", "犬は好きです"),
    ("ab", "abcdefgh"),
    ("a b c d e f g", "g f e d c b a"),
    ("x" * 40, "x" * 7),
]


def drawn(count=300):
    rng = random.Random(5)
    words = ["a", "the", "Cat", "dog.", "run", "ran", "é", "12", "x-y", "\n", "so", "猫"]
    for _ in range(count):
        yield tuple(" ".join(rng.choices(words, k=rng.randrange(0, 14))) for _ in range(2))


def test_rouge_l():
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(["rougeL"], use_stemmer=False)
    for answer, gold in [*CASES, *drawn()]:
        assert rouge_l(answer, gold) == pytest.approx(scorer.score(gold, answer)["rougeL"].fmeasure, abs=1e-12), (answer, gold)


def test_chrf():
    sacrebleu = pytest.importorskip("sacrebleu")
    for answer, gold in [*CASES, *drawn()]:
        assert 100 * chrf(answer, gold) == pytest.approx(sacrebleu.sentence_chrf(answer, [gold]).score, abs=1e-9), (answer, gold)


def test_accuracy_and_macro_f1():
    found = pytest.importorskip("sklearn.metrics")
    rng = random.Random(3)
    for _ in range(60):
        names = [f"class {c}" for c in "abcde"[: rng.randrange(2, 6)]]
        golds = [rng.choice(names) for _ in range(rng.randrange(10, 60))]
        answers = [rng.choice([*names, "none of these"]) for _ in golds]
        labels = sorted(set(golds))
        ours = {name: METRICS[name].score(answers, golds).whole for name in ("accuracy", "macro_f1")}
        assert ours["accuracy"] == pytest.approx(found.accuracy_score(golds, answers), abs=1e-12)
        wanted = found.f1_score(golds, answers, labels=labels, average="macro", zero_division=0.0)
        assert ours["macro_f1"] == pytest.approx(wanted, abs=1e-12)


def test_macro_f1_of_a_resample_is_that_of_the_drawn_rows():
    found = pytest.importorskip("sklearn.metrics")
    golds, answers = list("aabbbcab"), list("abbbccaa")
    scored = METRICS["macro_f1"].score(answers, golds)
    counts = np.array([[2, 0, 1, 1, 0, 1, 2, 1], [1, 1, 0, 0, 0, 0, 1, 0]])
    for row, value in zip(counts, scored.statistic(counts), strict=True):
        rows = [i for i, n in enumerate(row) for _ in range(n)]
        there = sorted({golds[i] for i in rows} | {answers[i] for i in rows})
        own, said = ([x[i] for i in rows] for x in (golds, answers))
        assert value == pytest.approx(found.f1_score(own, said, labels=there, average="macro", zero_division=0.0))
