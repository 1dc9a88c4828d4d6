"""The gate's arithmetic and judgement on numbers made up for it."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tests.export.cases import export

from tunesmith.export import parity
from tunesmith.export.gguf import K_QUANTS, OURS


def distributions(seed: int, places: int = 7, words: int = 50) -> tuple[np.ndarray, np.ndarray]:
    generator = torch.Generator().manual_seed(seed)
    p = torch.randn(places, words, generator=generator).log_softmax(-1)
    return p.numpy(), (p + 0.3 * torch.randn(places, words, generator=generator)).log_softmax(-1).numpy()


def top(logp: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    ids = np.argsort(-logp, 1)[:, :count]
    return ids, np.take_along_axis(logp, ids, 1)


def test_divergence_is_torchs_and_a_lower_bound_where_tokens_are_left_out():
    p, q = distributions(0)
    exact = torch.nn.functional.kl_div(torch.tensor(q), torch.tensor(p), log_target=True, reduction="none").sum(1).numpy()
    assert parity.divergence(p, *top(q, 50)) == pytest.approx(exact, rel=1e-5)
    before = np.zeros(len(p))
    for count in (1, 5, 20, 49):
        found = parity.divergence(p, *top(q, count))
        assert (found >= before - 1e-9).all() and (found <= exact + 1e-6).all() and (found > 0).all()
        before = found
    assert parity.divergence(p, *top(p, 10)) == pytest.approx(0, abs=1e-6)


def test_a_padded_vocabulary_costs_what_it_takes():
    """Ids that the live model lacks have a probability in the artefact alone."""
    p, _ = distributions(1)
    q = np.concatenate([p, np.full((7, 3), -30.0, np.float32)], 1)
    assert parity.divergence(p, *top(q, 53)) == pytest.approx(0, abs=1e-6)
    q[:, -1] = np.log(0.5)
    q[:, :-1] += np.log(0.5)
    assert parity.divergence(p, *top(q, 53)) == pytest.approx(np.log(2), rel=1e-3)


def test_every_quantisation_has_bounds_and_fewer_bits_have_wider_ones():
    found = [parity.bounds_of(q) for q in ("", "q8_0", "q6_k", "q5_1", "q4_k_m", "q3_k_s", "q2_k")]
    assert found == sorted(found) and all(warns < refuses for warns, refuses in found)
    assert parity.bounds_of("bf16") == parity.bounds_of("") == (1e-3, 5e-2)
    assert all(parity.bounds_of(q) for q in (*OURS, *K_QUANTS))


GOOD = {
    "words": {"conversations": 6, "different": [], "template_same": True, "stops": {"live": [2], "artefact": [2]},
              "eos": {"live": 2, "artefact": 2}, "bos": {"live": 1, "artefact": 1}, "adds_bos": {"live": True, "artefact": True},
              "probes": 10, "probes_same": 10, "probes_different": []},
    "numbers": {"kl_mean": 1e-5, "bounds": [1e-3, 5e-2]},
    "answers": {"went_on": 0},
}  # fmt: skip


@pytest.mark.parametrize(
    ("part", "change", "refused", "told"),
    [
        ("numbers", {}, 0, 0),
        ("numbers", {"kl_mean": 2e-3}, 0, 1),
        ("numbers", {"kl_mean": 6e-2}, 1, 0),
        ("numbers", {"kl_mean": float("nan")}, 1, 0),
        ("words", {"probes_same": 9, "probes_different": ["x"]}, 0, 1),
        ("words", {"different": [{}]}, 1, 0),
        ("words", {"template_same": False}, 1, 0),
        ("words", {"stops": {"live": [2, 7], "artefact": [2]}}, 1, 0),
        ("words", {"stops": {"live": [2], "artefact": None}}, 0, 0),
        ("words", {"eos": {"live": 2, "artefact": 0}}, 1, 0),
        ("words", {"bos": {"live": None, "artefact": 11}}, 0, 0),
        ("words", {"bos": {"live": 1, "artefact": 11}}, 1, 0),
        ("words", {"adds_bos": {"live": False, "artefact": True}}, 1, 0),
        ("answers", {"went_on": 1}, 1, 0),
    ],
)
def test_what_is_refused_and_what_is_told(part, change, refused, told):
    found = {**GOOD, part: GOOD[part] | change}
    assert tuple(map(len, parity._judged(found["words"], found["numbers"], found["answers"]))) == (refused, told)


def test_a_run_without_held_out_rows_is_compared_on_its_own_answers(trained, tmp_path):
    run = trained("llama", data={"held_out": 0})
    done = export(run, "gguf", tmp_path / "out", quant="f16")
    found = done.parity.measured
    assert done.parity.state == "verified" and found["numbers"]["positions"] >= 4 and found["answers"]["count"] == 4
    assert any("no held-out rows" in note for note in done.parity.notes) and "metric" not in found["answers"]


def test_a_runtime_that_dies_is_told_with_its_last_words(tmp_path):
    job = {"artefact": str(tmp_path / "none.gguf"), "adapter": None, "rows": [[1]], "positions": [[0]], "top": 4, "asked": []}
    with pytest.raises(parity.RuntimeFailed, match="exit code"):
        parity.ask("llama.cpp", job | {"prompts": [], "max_tokens": 1})


def test_paths_may_be_relative(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert export(trained("llama"), "gguf", Path("out"), quant="f16").parity.state == "verified"


def test_what_no_runtime_has_seen_can_be_told():
    unseen = parity.Parity(
        "merged", "transformers", reasons=["transformers not installed"], measured={"other_base": {"kl_mean": 1.0}}
    )
    assert unseen.lines() == [("loaded in", "transformers")]


def test_losses_are_compared_over_the_same_tokens():
    """The artefact tells its likeliest tokens alone; a target that is none of them is in neither loss."""
    p, _ = distributions(3, places=200)
    ids, logp = top(p, 10)
    found = SimpleNamespace(logp_PV=p, targets=np.random.default_rng(0).integers(0, 50, 200))
    numbers = parity._numbers(found, ids, logp, (1e-3, 5e-2))
    told = (ids == found.targets[:, None]).any(1)
    assert 10 < told.sum() < 100 and numbers["loss_live"] == numbers["loss_artefact"]
    assert numbers["loss_live"] == pytest.approx(-p[np.arange(200), found.targets][told].mean(), rel=1e-6)
    nothing = SimpleNamespace(logp_PV=p, targets=p.argmin(1))
    assert parity._numbers(nothing, ids, logp, (1e-3, 5e-2))["loss_live"] is None
