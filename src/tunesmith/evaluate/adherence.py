"""Does an answer sound like the house's? Logistic regression over hashed runs of characters and words. No torch.

It learns the written answers of training rows against another model's answers to the same questions, so that what is asked about
tells it nothing. Its own accuracy, by cross-validation with both answers of a question in one fold, stands beside every number it
gives; where it cannot tell the two apart, nothing is measured.
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
PENALTY = 0.01  # of the squared weights, beside the mean loss
FOLDS = 5
LEAST = 0.75  # accuracy that the lower end of its interval must reach: below it the classifier hears no style
LEAST_ROWS = 40  # training rows with both answers


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


def fit(x: np.ndarray, y: np.ndarray, penalty: float = PENALTY, steps: int = 25) -> tuple[np.ndarray, float]:
    """(weights [width], bias) of logistic regression: the mean log-loss of labels `y` (0, 1) plus penalty / 2 x |weights|², by
    Newton's method over the rows' products, which are far fewer than the features. The bias is not penalised."""
    rows = len(y)
    gram = (x @ x.T).astype(float)
    a, bias = np.zeros(rows), 0.0  # weights = x.T @ a
    for _ in range(steps):
        p = 1 / (1 + np.exp(-np.clip(gram @ a + bias, -30, 30)))
        curve = np.maximum(p * (1 - p), 1e-9)
        # stationary where penalty * a = (y - p) / rows; Newton's step on z = gram @ a + bias
        target = gram @ a + bias + (y - p) / curve
        system = np.zeros((rows + 1, rows + 1))
        system[:rows, :rows] = gram + np.diag(rows * penalty / curve)
        system[:rows, rows] = system[rows, :rows] = 1
        found = np.linalg.solve(system, np.append(target, 0.0))
        moved = float(np.abs(found[:rows] - a).max() + abs(found[rows] - bias))
        a, bias = found[:rows], float(found[rows])
        if moved < 1e-9:
            break
    return x.T.astype(float) @ a, bias


@dataclass(frozen=True)
class Adherence:
    """The classifier, and how often it is right on answers that it has not learned: `accuracy` of `of`, with its 95 % interval."""

    weights: np.ndarray
    bias: float
    accuracy: float
    interval: tuple[float, float]
    of: int

    @property
    def hears(self) -> bool:
        """Whether it tells the house's answers from the others."""
        return self.interval[0] >= LEAST

    def probability(self, answers: Sequence[str]) -> np.ndarray:
        """[answers], of being the house's."""
        return 1 / (1 + np.exp(-np.clip(features(answers) @ self.weights + self.bias, -30, 30)))

    def keeps(self, answers: Sequence[str]) -> np.ndarray:
        """[answers], 1 where it takes one for the house's."""
        return (self.probability(answers) > 0.5).astype(float)


def learn(house: Sequence[str], others: Sequence[str]) -> Adherence:
    """From as many answers of each, the ith of both to the same question."""
    assert len(house) == len(others) >= FOLDS, "pairs of answers to the same questions"
    x, y = features([*house, *others]), np.repeat([1.0, 0.0], len(house))
    fold = np.tile(np.arange(len(house)) % FOLDS, 2)
    right = 0
    for k in range(FOLDS):
        weights, bias = fit(x[fold != k], y[fold != k])
        right += int(((x[fold == k] @ weights + bias > 0) == (y[fold == k] > 0.5)).sum())
    weights, bias = fit(x, y)
    return Adherence(weights, bias, right / len(y), wilson(right, len(y)), len(y))
