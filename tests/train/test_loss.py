"""The loss of a step: sum over trained tokens by their number, documents that cannot see each other, NEFTune's noise."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tunesmith.config import schema
from tunesmith.data.pack import collate
from tunesmith.train.loss import batch_loss, draw, neftune, per_document

CPU = torch.device("cpu")


def grads(bench, model, batches):
    for p in bench.parameters(model).values():
        p.grad = None
    total = sum(batch_loss(model, b, CPU)[0] for b in batches)
    total.backward()
    return total.item(), {n: p.grad.clone() for n, p in bench.parameters(model).items()}


@pytest.mark.parametrize("method", ["lora", "qlora", "full"])
def test_packed_is_one_by_one(bench, method):
    model, rows = bench.warm(bench.model(method, torch.float64)), bench.examples(9)
    packed, packed_grads = grads(bench, model, [collate(rows)])
    single, single_grads = grads(bench, model, [collate([e]) for e in rows])
    assert abs(packed - single) < 1e-10
    for name, g in packed_grads.items():
        assert g.abs().max() > 0, name
        assert (g - single_grads[name]).abs().max() < 1e-10, name


def test_a_document_cannot_see_another(bench):
    """Exactly: what stands in A does not change a bit of B, wherever B stands."""
    model, (a, b, other) = bench.warm(bench.model()), bench.examples(3, low=12, high=13)
    for order in ((0, 1), (1, 0)):
        first, second = [collate([x[i] for i in order]) for x in ([a, b], [other, b])]
        one, two = (per_rows(model, batch, order.index(1)) for batch in (first, second))
        assert np.array_equal(one, two) and len(one)


def per_rows(model, batch, document):
    _, rows = batch_loss(model, batch, CPU)
    return rows.numpy()[np.searchsorted(batch.cu_seqlens, batch.rows, side="right") - 1 == document]


def test_the_loss_is_the_mean_over_trained_tokens(bench):
    """Against the definition written out: logits of the whole row, cross-entropy of each trained token, sum by count."""
    model, rows = bench.warm(bench.model(dtype=torch.float64)), bench.examples(5)
    total, count = 0.0, 0
    for e in rows:
        logits = model(torch.from_numpy(e.ids.astype(np.int64)))
        wanted = F.cross_entropy(logits[:-1], torch.from_numpy(e.ids[1:].astype(np.int64)), reduction="none")
        total, count = total + wanted[torch.from_numpy(e.learn[1:])].sum().item(), count + int(e.learn.sum())
    loss, _ = bench.gradient(model, rows)
    assert loss == pytest.approx(total / count, abs=1e-12)
    batch = collate(rows)
    sums, counts = per_document(batch_loss(model, batch, CPU)[1].detach().numpy(), batch)
    assert counts.tolist() == [int(e.learn.sum()) for e in rows] and sums.sum() == pytest.approx(total, abs=1e-10)


def test_a_head_that_is_trained_takes_the_general_path_to_the_same_numbers(bench):
    rows, plain, headed = bench.examples(6), bench.model(), bench.model(modules_to_save=("lm_head",))
    assert plain.plain_head() is not None and headed.plain_head() is None
    one, two = (grads(bench, m, [collate(rows)]) for m in (plain, headed))
    assert one[0] == pytest.approx(two[0], rel=1e-6)
    for name, g in one[1].items():
        torch.testing.assert_close(g, two[1][name], rtol=1e-4, atol=1e-6)


def test_neftune_noise_is_the_papers(bench):
    """Uniform within alpha / sqrt(tokens x width) of its own document, whatever that is packed with; none for alpha 0."""
    rows, width, alpha = bench.examples(4, low=60, high=120), 32, 5.0
    batch, seeds = collate(rows), [draw(1, 2, j) for j in range(4)]
    noise = neftune(alpha, batch, seeds)(torch.zeros(len(batch.tokens), width))
    for j, (start, end) in enumerate(zip(batch.cu_seqlens, batch.cu_seqlens[1:], strict=False)):
        bound, own = alpha / ((end - start) * width) ** 0.5, noise[start:end]
        assert 0.99 * bound < own.abs().max() <= bound and own.std() == pytest.approx(bound / 3**0.5, rel=0.03)
        alone = neftune(alpha, collate([rows[j]]), [seeds[j]])(torch.zeros(end - start, width))
        assert torch.equal(own, alone)
    assert neftune(0.0, batch, seeds) is None
    assert not torch.equal(
        noise[: batch.cu_seqlens[1]], neftune(alpha, batch, seeds[::-1])(torch.zeros_like(noise))[: batch.cu_seqlens[1]]
    )


def test_seeds_of_neighbours_are_unrelated():
    seeds = {
        draw(seed, step, i, *kind) for seed in (0, 1, 2**32 - 1) for step in range(40) for i in range(40) for kind in ((), (1,))
    }
    assert len(seeds) == 3 * 40 * 40 * 2 and all(0 <= s < 2**64 for s in seeds)
    torch.manual_seed(max(seeds))


def test_dropout_is_off_where_nothing_is_trained(bench):
    model, batch = bench.warm(bench.model(dropout=0.5)), collate(bench.examples(3))
    train = [batch_loss(model.train(), batch, CPU)[0].item() for _ in range(2)]
    still = [batch_loss(model.eval(), batch, CPU)[0].item() for _ in range(2)]
    assert train[0] != train[1] and still[0] == still[1] not in train


def test_neftune_is_a_setting_of_training_alone(bench):
    model, rows = bench.warm(bench.model()), bench.examples(4)
    plain, _ = bench.gradient(model, rows)
    noisy, _ = bench.gradient(model, rows, alpha=10.0)
    assert plain != noisy and schema.Train().neftune_alpha == 0
