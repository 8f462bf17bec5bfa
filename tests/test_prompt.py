"""Prompts in which pictures are words."""

import pytest
import torch
from builders import build_bert, build_clip, build_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from transformers import T5Config, T5EncoderModel

from vilex.prompt import (
    Terms,
    compose,
    compose_leading,
    count_placeholders,
    fit_budget,
    has_words,
    override_embeddings,
    parse,
    parse_terms,
    recompose,
    special_tokens,
    words_removed,
)

LENGTH = 24


def build_t5(tokenizer):
    config = T5Config(
        vocab_size=len(tokenizer), d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2, pad_token_id=0,
        eos_token_id=1, decoder_start_token_id=0,
    )  # fmt: skip
    return T5EncoderModel(config).eval()


def build_pair(kind):
    torch.manual_seed(0)
    tokenizer = build_tokenizer(kind.partition("-")[0])
    if kind == "bert":
        return tokenizer, build_bert(len(tokenizer))
    if kind == "t5":
        return tokenizer, build_t5(tokenizer)
    return tokenizer, build_clip(tokenizer, eos_token_id=2 if kind == "clip-largest" else None)


KINDS = ("bert", "clip-eos", "clip-largest", "t5")


@pytest.mark.parametrize(
    ("text", "num_images", "names", "expected"),
    [
        ("a dog", 0, (), ["a dog"]),
        ("", 1, (), [0]),
        ("a dog", 2, (), [0, 1, "a dog"]),
        ("<image> on a beach", 1, (), [0, " on a beach"]),
        ("<image> and <image>", 2, (), [0, " and ", 1]),
        ("<image> and <image>", 1, (), [0, " and ", 0]),
        ("<image:2> in <image:1>", 2, (), [1, " in ", 0]),
        ("a [corgi] riding [bike]", 2, ("corgi", "bike"), ["a ", 0, " riding ", 1]),
        ("a [corgi]", 1, (), [0, "a [corgi]"]),
        ("[1] riding [my bike.v2]", 2, ("1", "my bike.v2"), [0, " riding ", 1]),
        ("[a <image> here]", 1, (), ["[a ", 0, " here]"]),
        ("<image:2>", 2, (), [1]),
        ("[bike] at night", 2, ("corgi", "bike"), [1, " at night"]),
        ("[cat] at night", 2, ("corgi", "bike"), [0, 1, "[cat] at night"]),
        ('<image> - "snow" + "sand", at night', 1, (), [0, ", at night"]),
        ('a [corgi]-"snow" on “ice”', 1, ("corgi",), ["a ", 0, " on “ice”"]),
        ('a [corgi] - "snow"', 1, (), [0, 'a [corgi] - "snow"']),
        ('<image> - snow "sand" - "ice"', 1, (), [0, ' - snow "sand" - "ice"']),
    ],
)
def test_parse(text, num_images, names, expected):
    assert parse(text, num_images, names) == expected


@pytest.mark.parametrize(
    ("text", "names", "expected"),
    [
        ("<image> on a beach", (), [Terms()]),
        ('<image> - "snow" + "sand"', (), [Terms("snow", "sand")]),
        ('<image>+"warm sand"-"snow" - " ice "', (), [Terms("snow ice", "warm sand")]),
        ("<image> − “snow” + “sand”", (), [Terms("snow", "sand")]),
        ('a cat + "sand". <image>', (), [Terms()]),
        ('[b] + "sand" beside [a]', ("a", "b"), [Terms(), Terms("", "sand")]),
        ('<image:1> - "ice" and <image:1> - "ice" by <image:2>', ("", ""), [Terms("ice"), Terms()]),
    ],
)
def test_words_are_taken_from_an_image_and_added_to_it(text, names, expected):
    assert parse_terms(text, len(expected), names) == expected
    assert count_placeholders(text) == text.count("<image")


def test_an_image_has_the_same_terms_everywhere():
    with pytest.raises(ValueError, match=r'<image> \+ "sand" was written with other terms before'):
        parse_terms('<image> beside <image> + "sand"', 1)
    assert str(Terms("snow", "sand")) == ' - "snow" + "sand"' and str(Terms()) == ""


@pytest.mark.parametrize("text", ["<image:3>", "<image:0>", "<image:1> <image:9>"])
def test_a_number_without_an_image_is_refused(text):
    with pytest.raises(ValueError, match=r"asks for an image that is not there: the prompt has 2"):
        parse(text, 2)


def test_a_placeholder_without_any_image_is_refused():
    with pytest.raises(ValueError, match="<image> asks for an image that is not there: give a picture"):
        parse("<image> on a beach", 0)


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_in_the_text_are_ordinary_words(kind):
    tokenizer, _ = build_pair(kind)
    special = tokenizer.all_special_tokens
    prompt = compose(f"a {special[-1]} dog", [], tokenizer, LENGTH)
    length = int(prompt.attention_mask.sum())
    inside = prompt.input_ids[0, :length].tolist()
    around = compose("a dog", [], tokenizer, LENGTH)
    count = sum(token in tokenizer.all_special_ids for token in around.input_ids[0, : int(around.attention_mask.sum())])
    known = [token for token in inside if token in tokenizer.all_special_ids and token != tokenizer.unk_token_id]
    assert len(known) == count


def test_placeholders_are_counted():
    assert count_placeholders("<image> on <image:2>, [corgi], <image:x>") == 2
    assert count_placeholders("a dog") == 0


def test_words_removed_keeps_images_in_order():
    assert parse(words_removed("a <image:2> in <image:1>, blue", 2), 2) == [1, 0]
    assert has_words("<image> .", 1)
    assert not has_words(" <image>  ", 1)


@given(
    lengths=st.lists(st.integers(1, 80), max_size=4),
    num_words=st.integers(0, 120),
    capacity=st.integers(4, 126),
)
def test_the_longest_image_gives_up_first_and_words_last(lengths, num_words, capacity):
    kept, words = fit_budget(lengths, [1] * len(lengths), num_words, capacity)
    assert sum(kept) + words <= capacity
    assert all(1 <= k <= n for k, n in zip(kept, lengths, strict=True))
    assert words == num_words or all(k == 1 for k in kept)
    trimmed = [k for k, n in zip(kept, lengths, strict=True) if k < n]
    assert not trimmed or max(trimmed) >= max(kept) - 1
    if sum(lengths) + num_words <= capacity:
        assert (kept, words) == (lengths, num_words)


def test_what_was_cut_is_named(tokenizer):
    prompt = compose("red green blue " * 6 + "monet", [torch.zeros(9, 8)], tokenizer, LENGTH)
    assert prompt.kept == (3,)
    assert prompt.note == "image 1 keeps 3 of 9 tokens"
    prompt = compose("red " * 22 + "van gogh", [torch.zeros(9, 8)], tokenizer, LENGTH)
    assert prompt.kept == (1,)
    assert prompt.cut_words == "red van gogh"
    assert "the last words did not fit: 'red van gogh'" in prompt.note


def test_images_that_cannot_fit_are_refused(tokenizer):
    with pytest.raises(ValueError, match="30 images do not fit into 22 positions"):
        compose("<image>" * 30, [torch.zeros(3, 8)], tokenizer, LENGTH)


@pytest.mark.parametrize("kind", KINDS)
def test_without_images_ids_are_the_tokenizers_own(kind):
    tokenizer, encoder = build_pair(kind)
    prompt = compose("a red dog on the beach", [], tokenizer, LENGTH)
    stock = tokenizer("a red dog on the beach", padding="max_length", max_length=LENGTH, return_tensors="pt")
    assert torch.equal(prompt.input_ids, stock.input_ids)
    assert torch.equal(prompt.attention_mask, stock.attention_mask.bool())
    assert not prompt.slots.any()
    assert prompt.vectors is None


@pytest.mark.parametrize("kind", KINDS)
def test_vectors_change_the_output_and_gradient_reaches_them(kind):
    tokenizer, encoder = build_pair(kind)
    vectors = torch.randn(5, 8, requires_grad=True)
    prompt = compose("a <image> on the beach", [vectors], tokenizer, LENGTH)
    assert prompt.slots.sum() == 5
    with override_embeddings(encoder, prompt.slots, prompt.vectors):
        states = encoder(prompt.input_ids, attention_mask=prompt.attention_mask).last_hidden_state
    last = int(prompt.attention_mask.sum()) - 1
    # T5's first state attends to all; CLIP's causal mask lets only later positions see the image
    (gradient,) = torch.autograd.grad(states[0, last].square().sum(), vectors)
    assert (gradient.abs().sum(1) > 0).all()
    with override_embeddings(encoder, prompt.slots, torch.randn(5, 8)):
        other = encoder(prompt.input_ids, attention_mask=prompt.attention_mask).last_hidden_state
    assert not torch.allclose(states, other)


@pytest.mark.parametrize("kind", ["clip-eos", "clip-largest"])
def test_clip_pools_at_eos_with_images_in_the_prompt(kind):
    tokenizer, encoder = build_pair(kind)
    prompt = compose("<image> a dog", [torch.randn(5, 8)], tokenizer, LENGTH)
    with override_embeddings(encoder, prompt.slots, prompt.vectors):
        output = encoder(prompt.input_ids)
    eos = prompt.input_ids[0].tolist().index(tokenizer.eos_token_id)
    assert eos == 1 + 5 + 2
    assert torch.equal(output.pooler_output[0], output.last_hidden_state[0, eos])


def test_the_vectors_stand_in_reading_order(tokenizer):
    a, b = torch.full((2, 8), 1.0), torch.full((3, 8), 2.0)
    prompt = compose("<image:2> and <image:1>", [a, b], tokenizer, LENGTH)
    assert prompt.vectors[:, 0].tolist() == [2, 2, 2, 1, 1]
    assert prompt.slots[0].tolist() == [False, True, True, True, False, True, True] + [False] * 17
    assert prompt.kept == prompt.asked == (2, 3)


def test_the_hook_is_removed_when_the_encoder_fails(tokenizer):
    encoder = build_bert(len(tokenizer))
    prompt = compose("<image>", [torch.randn(3, 8)], tokenizer, LENGTH)
    with pytest.raises(KeyError), override_embeddings(encoder, prompt.slots, prompt.vectors):
        raise KeyError
    plain = encoder(prompt.input_ids).last_hidden_state
    assert torch.equal(plain, encoder(prompt.input_ids).last_hidden_state)
    assert not encoder.get_input_embeddings()._forward_hooks


def test_an_override_that_was_never_read_is_an_error(tokenizer):
    encoder = build_bert(len(tokenizer))
    with (
        pytest.raises(RuntimeError, match="0 times, expected once"),
        override_embeddings(encoder, torch.zeros(1, 24, dtype=torch.bool), torch.zeros(0, 8)),
    ):
        pass


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_of_leading_images_equals_composing_each(kind):
    tokenizer, _ = build_pair(kind)
    texts = ["a red dog", "", "the cat on a beach , in the style of van gogh"]
    tokens = torch.randn(3, 7, 8)
    rows = [tokenizer(text, add_special_tokens=False).input_ids for text in texts]
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    mask = torch.tensor([[True] * len(row) + [False] * (width - len(row)) for row in rows])
    batch = compose_leading(ids, mask, tokens, special_tokens(tokenizer), LENGTH)
    for i, text in enumerate(texts):
        one = compose(text, [tokens[i]], tokenizer, LENGTH)
        assert torch.equal(batch.input_ids[i], one.input_ids[0])
        assert torch.equal(batch.attention_mask[i], one.attention_mask[0])
        assert torch.equal(batch.slots[i], one.slots[0])
    assert torch.equal(batch.vectors, tokens.flatten(0, 1))


@pytest.mark.parametrize("kind", ["bert", "t5"])
def test_another_tokenizer_writes_the_same_words_and_slots(kind):
    source, other = build_tokenizer("clip"), build_tokenizer(kind)
    tokens = [torch.randn(3, 8), torch.randn(2, 8)]
    prompt = compose("a <image> red dog <image> on", tokens, source, LENGTH)
    again = recompose(prompt, source, other, 40)
    expected = compose("a <image> red dog <image> on", tokens, other, 40)
    assert torch.equal(again.input_ids, expected.input_ids)
    assert torch.equal(again.attention_mask, expected.attention_mask)
    assert torch.equal(again.slots, expected.slots)
    assert torch.equal(again.vectors, torch.cat(tokens))


def test_words_cut_for_one_context_are_read_in_a_longer_one_and_cut_for_a_shorter():
    source, other = build_tokenizer("clip"), build_tokenizer("t5")
    prompt = compose("<image> " + "dog " * 30 + "<image:1>", [torch.randn(3, 8)], source, LENGTH)
    assert prompt.cut_words and prompt.kept == (1,)
    assert recompose(prompt, source, other, 50).attention_mask.sum() == 1 + 30 + 1 + 1
    short = recompose(prompt, source, other, 10)
    assert short.attention_mask.all() and short.slots[0].nonzero().flatten().tolist() == [0, 8]
    assert short.input_ids[0, -1] == other.eos_token_id
    with pytest.raises(ValueError, match="2 image tokens do not fit into a context of 2 positions"):
        recompose(prompt, source, other, 2)


def test_a_batch_is_read_back_from_its_ids():
    source, other, tokens = build_tokenizer("clip"), build_tokenizer("t5"), torch.randn(3, 4, 8)
    texts = ["a red dog", "", "cat"]
    ids = source(texts, add_special_tokens=False, padding=True, return_tensors="pt")
    batch = compose_leading(ids.input_ids, ids.attention_mask.bool(), tokens, special_tokens(source), LENGTH)
    again = recompose(batch, source, other, 40)
    for i, text in enumerate(texts):
        one = compose(text, [tokens[i]], other, 40)
        assert torch.equal(again.input_ids[i], one.input_ids[0])
        assert torch.equal(again.attention_mask[i], one.attention_mask[0])
        assert torch.equal(again.slots[i], one.slots[0])
    assert again.vectors is batch.vectors
