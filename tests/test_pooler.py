"""The pooler: prefixes, patch order, parity with torch's own attention, and that it learns."""

import pytest
import torch
from PIL import Image
from torch import nn

from vilex.config import PoolerConfig
from vilex.pooler import CrossAttention, PoolerBlock, VilexPooler, sample_num_tokens

CONFIG = PoolerConfig(num_queries=11, num_blocks=2, width=12, heads=3, patch_width=10, text_width=14)
BATCH, PATCHES = 2, 9


@pytest.fixture
def pooler() -> VilexPooler:
    torch.manual_seed(0)
    return VilexPooler(CONFIG)


@pytest.fixture
def patch_tokens() -> torch.Tensor:
    return torch.randn(BATCH, PATCHES, 10, generator=torch.Generator().manual_seed(1))


def test_shapes(pooler, patch_tokens):
    assert pooler(patch_tokens).shape == (BATCH, 11, 14)
    assert pooler(patch_tokens, 4).shape == (BATCH, 4, 14)
    assert pooler.attention_maps(patch_tokens, 4).shape == (BATCH, 4, PATCHES)


@pytest.mark.parametrize("num_tokens", [1, 2, 5, 10, 11])
def test_dropping_tail_tokens_equals_encoding_fewer(pooler, patch_tokens, num_tokens):
    kept = pooler.double()(patch_tokens.double())[:, :num_tokens]
    torch.testing.assert_close(pooler(patch_tokens.double(), num_tokens), kept, rtol=0, atol=1e-13)


def test_biases_of_tokens_start_at_nothing_and_move_their_own_token_alone(pooler, patch_tokens):
    plain = pooler(patch_tokens)
    pooler.add_token_bias()
    torch.testing.assert_close(pooler(patch_tokens), plain, rtol=0, atol=0)
    with torch.no_grad():
        pooler.token_bias[2] = 1.0
    moved = pooler(patch_tokens) - plain
    torch.testing.assert_close(moved[:, 2], torch.ones(BATCH, 14))
    assert not moved[:, [0, 1, *range(3, 11)]].any() and not (pooler(patch_tokens, 2) - plain[:, :2]).any()
    again = VilexPooler(pooler.config)
    again.load_state_dict(pooler.state_dict())
    torch.testing.assert_close(again(patch_tokens), pooler(patch_tokens), rtol=0, atol=0)


def test_patch_order_does_not_matter(pooler, patch_tokens):
    order = torch.randperm(PATCHES, generator=torch.Generator().manual_seed(2))
    shuffled = pooler.double()(patch_tokens[:, order].double())
    torch.testing.assert_close(shuffled, pooler(patch_tokens.double()), rtol=0, atol=1e-13)


def test_patches_and_queries_matter(pooler, patch_tokens):
    changed = patch_tokens.clone()
    changed[0, 3] += torch.arange(10)
    moved = (pooler(changed) - pooler(patch_tokens)).abs().amax((1, 2))
    assert moved[0] > 1e-3 and moved[1] == 0
    assert (pooler(patch_tokens).diff(dim=1).abs().amax(-1) > 1e-2).all()


@pytest.mark.parametrize("num_tokens", [0, -1, 12])
def test_token_counts_outside_the_range_are_refused(pooler, patch_tokens, num_tokens):
    with pytest.raises(ValueError, match=f"num_tokens must be between 1 and 11, got {num_tokens}"):
        pooler(patch_tokens, num_tokens)


def _reference(attention: CrossAttention, width: int, patch_width: int) -> nn.MultiheadAttention:
    """torch's attention with the same weights."""
    reference = nn.MultiheadAttention(width, attention.heads, kdim=patch_width, vdim=patch_width, batch_first=True)
    with torch.no_grad():
        reference.q_proj_weight.copy_(attention.query.weight)
        reference.k_proj_weight.copy_(attention.key.weight)
        reference.v_proj_weight.copy_(attention.value.weight)
        biases = (attention.query.bias, attention.key.bias, attention.value.bias)
        reference.in_proj_bias.copy_(torch.cat(biases))
        reference.out_proj.load_state_dict(attention.out.state_dict())
    return reference


def test_block_equals_torch_attention_and_mlp(patch_tokens):
    torch.manual_seed(3)
    block = PoolerBlock(12, 10, 3)
    queries = torch.randn(BATCH, 5, 12)
    normed = block.norm_attention(queries)
    read, weights = _reference(block.attention, 12, 10)(normed, patch_tokens, patch_tokens)
    expected = queries + read
    expected = expected + block.mlp(block.norm_mlp(expected))
    torch.testing.assert_close(block(queries, patch_tokens), expected)
    torch.testing.assert_close(block.attention_map(queries, patch_tokens), weights)


def test_attention_maps_are_those_of_the_last_block(pooler, patch_tokens):
    inputs = []
    handle = pooler.blocks[-1].attention.register_forward_pre_hook(lambda _, args: inputs.append(args))
    pooler(patch_tokens)
    handle.remove()
    queries, patches = inputs[0]
    _, weights = _reference(pooler.blocks[-1].attention, 12, 10)(queries, patches, patches)
    torch.testing.assert_close(pooler.attention_maps(patch_tokens), weights)


def test_output_starts_at_the_statistics_of_the_words():
    torch.manual_seed(4)
    pooler = VilexPooler(PoolerConfig(num_blocks=1, width=96, heads=3, patch_width=10, text_width=7))
    mean, std = torch.linspace(-1, 1, 7), torch.linspace(0.05, 0.4, 7)
    weights = torch.stack([_output_samples(pooler, mean, std) for _ in range(20)]).flatten(0, 2)
    torch.testing.assert_close(weights.mean(0), mean, rtol=0, atol=0.06)
    torch.testing.assert_close(weights.std(0), std, rtol=0.15, atol=0)


def _output_samples(pooler: VilexPooler, mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    pooler.init_output(mean, std)
    return pooler(torch.randn(3, 9, 10)).detach()


def test_one_batch_can_be_overfitted(pooler, patch_tokens):
    target = torch.randn(BATCH, 5, 14)
    optimizer = torch.optim.Adam(pooler.parameters(), lr=1e-2)
    losses = []
    for _ in range(200):
        loss = nn.functional.mse_loss(pooler(patch_tokens, 5), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.01 * losses[0]


def test_every_weight_gets_a_gradient_and_unused_queries_none(pooler, patch_tokens):
    pooler(patch_tokens, 4).square().sum().backward()
    # A constant added to every key moves all scores alike, so softmax leaves key biases without gradient.
    still = [n for n, p in pooler.named_parameters() if not n.endswith("key.bias") and not p.grad.any()]
    assert still == []
    assert pooler.queries.grad.abs().sum(1).gt(0).tolist() == [True] * 4 + [False] * 7


@pytest.mark.parametrize("max_tokens", [1, 3, 16, 30, 75])
def test_tail_drop_stays_in_range_and_prefers_the_budgets_of_the_ladder(max_tokens):
    generator = torch.Generator().manual_seed(5)
    drawn = [sample_num_tokens(generator, max_tokens) for _ in range(4000)]
    anchors = {budget for budget in (1, 4, 16, 75) if budget < max_tokens} | {max_tokens}
    uniform = (1 - 0.15 * len(anchors)) / max_tokens
    for count in range(1, max_tokens + 1):
        expected = uniform + 0.15 * (count in anchors)
        assert drawn.count(count) / 4000 == pytest.approx(expected, abs=4 * (expected * (1 - expected) / 4000) ** 0.5)
    assert set(drawn) <= set(range(1, max_tokens + 1))


def test_tail_drop_is_a_function_of_the_generator():
    first, second = (
        [sample_num_tokens(generator) for _ in range(20)]
        for generator in (torch.Generator().manual_seed(6), torch.Generator().manual_seed(6))
    )
    assert first == second


def test_attention_lies_on_the_picture_as_the_encoder_sees_it(pipeline, picture, monkeypatch):
    maps = pipeline.attention(picture, "pad")
    queries, side = pipeline.vilex.pooler.config.num_queries, pipeline.vilex.encoder.image_size // 8
    assert maps.shape == (queries, side, side)
    torch.testing.assert_close(maps.sum((1, 2)), torch.ones(queries))
    assert not torch.equal(maps, pipeline.attention(picture, "crop"))

    def light_up(patch_tokens: torch.Tensor) -> torch.Tensor:
        return (patch_tokens[:1] - dark).norm(dim=-1)[:, None]  # (1,1,P)

    dark = pipeline.vilex.encoder(torch.full((1, 3, 8 * side, 8 * side), -1.0))
    monkeypatch.setattr(pipeline.vilex.pooler, "attention_maps", light_up)
    night = Image.new("RGB", (8 * side, 8 * side))
    night.paste("white", (16, 8, 24, 16))  # third patch of the second row
    assert pipeline.attention(night)[0].argmax() == 1 * side + 2


def test_patches_that_form_no_square_are_refused(pipeline, picture, monkeypatch):
    monkeypatch.setattr(pipeline.vilex.pooler, "attention_maps", lambda _: torch.ones(1, 4, 15) / 15)
    with pytest.raises(ValueError, match="the encoder's 15 patches form no grid"):
        pipeline.attention(picture)
