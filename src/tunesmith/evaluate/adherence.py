"""Does an answer sound like the house's? Logistic regression over hashed runs of characters and words. No torch.

It learns the written answers of training rows against two kinds of others, to the same questions, so that what is asked about tells
it nothing: another model's answers, and the written ones damaged (a piece of them, their words shuffled), since
`Gladly, dear grower.` alone keeps no style. Its accuracy on each kind, by cross-validation with all answers to a question in one
fold, stands beside every number it gives. Where it cannot tell the damaged ones, it learns from the other model's alone; where it
cannot tell those, nothing is measured.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from tunesmith.evaluate.statistics import wilson

WIDTH = 1 << 14  # hashed features; with a few hundred short answers collisions cost nothing that can be measured
CHARACTERS = (2, 3, 4)
PENALTY = 0.001  # of the squared weights, beside the mean loss
FOLDS, STEPS = 5, 25
LEAST = 0.75  # accuracy that the lower end of its interval must reach: below it the classifier hears no style
LEAST_ROWS = 40  # training rows with both answers

_SENTENCE = re.compile(r"[.!?。！？](?=\s+\S)|\n(?=\S)")


def features(texts: Sequence[str]) -> np.ndarray:
    """[texts, WIDTH], float32, each row of length 1: runs of 2 to 4 characters, words and pairs of words, by the square root of
    their count. Digits are one sign, since which number it is says nothing of the style."""
    out = np.zeros((len(texts), WIDTH), np.float32)
    for row, text in zip(out, texts, strict=True):
        plain = re.sub(r"\d", "0", f"^{text.strip()}$")
        words = re.findall(r"\w+|[^\w\s]|\n", plain.lower())
        found = [plain[i : i + n] for n in CHARACTERS for i in range(len(plain) - n + 1)]
        found += [f"w {w}" for w in words] + [f"p {a} {b}" for a, b in pairwise(words)]
        for name in found:
            row[zlib.crc32(name.encode("utf-8", "surrogatepass")) % WIDTH] += 1
    np.sqrt(out, out=out)
    norms = np.linalg.norm(out, axis=1, keepdims=True)
    return np.divide(out, norms, out=out, where=norms > 0)


def fit(x: np.ndarray, y: np.ndarray, weight: np.ndarray | None = None, penalty: float = PENALTY) -> tuple[np.ndarray, float]:
    """(weights [width], bias) of logistic regression: the mean log-loss of labels `y` (0, 1), weighed by `weight` [rows], plus
    penalty / 2 x |weights|², by Newton's method over the rows' products, which are far fewer than the features. The bias is not
    penalised."""
    rows = len(y)
    share = np.full(rows, 1 / rows) if weight is None else weight / weight.sum()
    gram = (x @ x.T).astype(float)
    a, bias = np.zeros(rows), 0.0  # weights = x.T @ a; at the minimum penalty * a = share * (y - p)
    for _ in range(STEPS):
        z = gram @ a + bias
        p = 1 / (1 + np.exp(-np.clip(z, -30, 30)))
        curve = np.maximum(p * (1 - p), 1e-9)
        system = np.zeros((rows + 1, rows + 1))
        system[:rows, :rows] = gram + np.diag(penalty / (share * curve))
        system[:rows, rows] = system[rows, :rows] = 1
        found = np.linalg.solve(system, np.append(z + (y - p) / curve, 0.0))
        moved = float(np.abs(found[:rows] - a).max() + abs(found[rows] - bias))
        a, bias = found[:rows], float(found[rows])
        if moved < 1e-9:
            break
    return x.T @ a.astype(x.dtype), bias


@dataclass(frozen=True)
class Heard:
    """How often it is right on answers that it has not learned: a share of `of`, with its 95 % interval."""

    accuracy: float
    interval: tuple[float, float]
    of: int

    @property
    def enough(self) -> bool:
        return self.interval[0] >= LEAST


@dataclass(frozen=True)
class Adherence:
    """The classifier. `others`: how well it tells the house's answers from the other model's; `damaged`: from damaged ones, which
    it has learned only where that is `enough`."""

    weights: np.ndarray
    bias: float
    others: Heard
    damaged: Heard

    def keeps(self, answers: Sequence[str]) -> np.ndarray:
        """[answers], 1 where it takes one for the house's."""
        return (features(answers) @ self.weights + self.bias > 0).astype(float)


def damaged(answer: str, seed: int) -> list[str]:
    """Its first sentence and all but that (of one sentence its halves), some of its last words, its words in another order."""
    words, rng = answer.split(" "), np.random.default_rng(seed)
    half = (len(words) + 1) // 2
    cut = found.end() if (found := _SENTENCE.search(answer)) else len(" ".join(words[:half]))
    tail, order = 1 + int(rng.integers(half)), rng.permutation(len(words))
    return [answer[:cut].strip(), answer[cut:].strip(), " ".join(words[-tail:]), " ".join(words[k] for k in order)]


def learn(house: Sequence[str], others: Sequence[str]) -> Adherence:
    """From as many answers of each, the ith of both to the same question."""
    count = len(house)
    assert count == len(others) >= FOLDS, "pairs of answers to the same questions"
    broken = [text for i, answer in enumerate(house) for text in damaged(answer, i)]
    x = features([*house, *others, *broken])
    y = np.array([1.0] * count + [0.0] * (len(x) - count))
    kind = np.repeat([0, 1, 2], [count, count, len(broken)])
    question = np.concatenate([np.arange(count), np.arange(count), np.repeat(np.arange(count), len(broken) // count)])
    both = _judge(x, y, kind, question % FOLDS, (0, 1, 2))
    plain = kind < 2
    if both[1].enough and both[2].enough:
        return Adherence(*fit(x, y, _weights(kind)), both[1], both[2])
    alone = _judge(x[plain], y[plain], kind[plain], (question % FOLDS)[plain], (0, 1))
    return Adherence(*fit(x[plain], y[plain]), alone[1], both[2])


def _weights(kind: np.ndarray) -> np.ndarray:
    """The house's answers weigh as much as all others together, and each kind of others the same."""
    counts = np.bincount(kind)
    return np.where(kind == 0, len(np.unique(kind)) - 1, 1.0) / counts[kind]


def _judge(x: np.ndarray, y: np.ndarray, kind: np.ndarray, fold: np.ndarray, kinds: Sequence[int]) -> dict[int, Heard]:
    """Kind of others -> how well the house's answers and those are told apart, both weighing the same, by cross-validation."""
    right = np.zeros(len(y), bool)
    for k in range(FOLDS):
        learned = fold != k
        weights, bias = fit(x[learned], y[learned], _weights(kind[learned]))
        right[~learned] = (x[~learned] @ weights + bias > 0) == (y[~learned] > 0.5)
    house = right[kind == 0]
    out = {}
    for other in kinds[1:]:
        shares = house.mean(), right[kind == other].mean()
        of = 2 * len(house)
        accuracy = float(sum(shares) / 2)
        out[other] = Heard(accuracy, wilson(round(accuracy * of), of), of)
    return out
