"""Half-blocks on an NVIDIA GPU, where offloading really moves tensors: what comes back is what went, to the bit."""

import pytest
import torch

from tunesmith import adapters
from tunesmith.config.schema import Lora
from tunesmith.models.decoder import Decoder
from tunesmith.models.fast import FastLayers, policies
from tunesmith.models.linear import NF4Linear
from tunesmith.models.place import make_deterministic
from tunesmith.ops.attention import Layout
from tunesmith.spec import Spec

pytestmark = pytest.mark.gpu
SPEC = Spec(vocab=512, dim=1024, hidden=2816, layers=4, heads=8, kv_heads=4, head_dim=128, context=4096, norm_eps=1e-5)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    made = Decoder(SPEC, linear=lambda i, o, bias: NF4Linear(i, o, bias, dtype=torch.bfloat16, device="cuda"),
                   dtype=torch.bfloat16, device="cuda")  # fmt: skip
    for module in made.modules():
        if isinstance(module, NF4Linear):
            module.set_weight("weight", torch.randn(module.out_features, module.in_features, device="cuda") * 0.02)
    adapters.attach(made, Lora(rank=8), seed=0)
    for name, p in adapters.trainable(made).items():
        if "lora_B" in name:
            p.data.normal_(std=0.02)
    return made.train()


def step(model, level, lengths, fp8=False, cache=0, **how) -> list[torch.Tensor]:
    """Output and gradients of the third pass: by then the opening of weights is captured and replayed."""
    model.fast = FastLayers(model, policies(SPEC.layers, level, **how), fp8=fp8)
    assert model.fast.cache(cache) > 0 or not cache
    generator = torch.Generator("cuda").manual_seed(1)
    tokens = torch.randint(0, SPEC.vocab, (sum(lengths),), device="cuda", generator=generator)
    dy = torch.randn(sum(lengths), SPEC.dim, device="cuda", generator=generator, dtype=torch.bfloat16)
    return third(model, tokens, dy, lengths)


def third(model, tokens, dy, lengths) -> list[torch.Tensor]:
    for _ in range(3):
        x = model.hidden(tokens, Layout.of(lengths, "cuda"))
        grads = torch.autograd.grad(x, list(adapters.trainable(model).values()), dy)
    return [x.detach(), *grads]


@pytest.fixture
def deterministic():
    """FA2 then adds up dq in one order; cuDNN's attention, which cannot, is not taken."""
    make_deterministic()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("level", ["keep", "recompute", "attention", "checkpoint"])
def test_what_was_offloaded_comes_back_to_the_bit(model, deterministic, level):
    kept, moved = step(model, "keep", (700, 33, 291)), step(model, level, (700, 33, 291), offload=True)
    assert model.fast.pool.free, "nothing went through main memory"
    assert all(torch.equal(a, b) for a, b in zip(kept, moved, strict=True))


def test_fp8_made_again_is_close_to_what_was_kept(model):
    """keep completes gate and up in the forward, recompute in the backward kernel: one rounding may fall elsewhere."""
    kept, again = (torch.cat([t.flatten().float() for t in step(model, level, (512, 512), fp8=True)[1:]])
                   for level in ("keep", "recompute"))  # fmt: skip
    assert ((again - kept).norm() / kept.norm()).item() < 0.01


def test_cached_weights_give_the_same_and_so_does_giving_them_back(model, deterministic):
    decoded, cached = step(model, "keep", (300, 200)), step(model, "keep", (300, 200), cache=1 << 32)
    assert model.fast.evict()
    generator = torch.Generator("cuda").manual_seed(1)
    tokens = torch.randint(0, SPEC.vocab, (500,), device="cuda", generator=generator)
    dy = torch.randn(500, SPEC.dim, device="cuda", generator=generator, dtype=torch.bfloat16)
    back = third(model, tokens, dy, (300, 200))
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(decoded, cached, back, strict=True))
