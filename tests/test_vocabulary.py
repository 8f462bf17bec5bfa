"""What lies near a token is named in words that are there, and words move tokens as they should."""

import pytest
import torch
from builders import build_tokenizer
from torch import Tensor

from vilex import vocabulary
from vilex.prompt import embedding_module
from vilex.vocabulary import Neighbour, nearest_words, ordinary_words, word_distance

WIDTH = 7


def tokens_of(count: int, seed: int) -> Tensor:
    return torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def tokenizer():
    tokenizer = build_tokenizer("bert")
    tokenizer.add_tokens(["[unused12]", "##ing"])
    return tokenizer


@pytest.fixture
def table(tokenizer) -> Tensor:
    """Word embeddings that share one large part, with two rows more than there are words."""
    return tokens_of(len(tokenizer) + 2, 8) + 5


def test_only_whole_words_in_letters_count(tokenizer, table):
    names = set(tokenizer.convert_ids_to_tokens(ordinary_words(tokenizer, len(table)).tolist()))
    assert names == {word for word in tokenizer.get_vocab() if word.isalpha() and len(word) > 1}
    assert "dog" in names and "##ing" in tokenizer.get_vocab()


class Pieces:
    """A tokenizer with nothing but its pieces."""

    all_special_ids = (0,)

    def __init__(self, *pieces: str) -> None:
        self.pieces = pieces

    def __len__(self) -> int:
        return len(self.pieces)

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        return [self.pieces[i] for i in ids]


@pytest.mark.parametrize(
    ("pieces", "words"),
    [
        (("</s>", "ing", "▁dog", "▁", "▁a"), ["▁dog"]),  # T5
        (("<s>", "ing", "Ġdog", "!"), ["Ġdog"]),  # GPT
        (("<s>", "ing", "dog</w>", "!</w>"), ["dog</w>"]),  # CLIP
        (("[CLS]", "##ing", "dog", "[unused3]", "そ"), ["dog"]),  # BERT
        (("[CLS]", "##ing", "[unused3]", "そ"), ["##ing", "そ"]),
    ],
)
def test_whole_words_are_told_by_the_marks_of_each_tokenizer(pieces, words):
    tokenizer = Pieces(*pieces)
    assert tokenizer.convert_ids_to_tokens(ordinary_words(tokenizer, 99).tolist()) == words


def test_a_words_embedding_is_nearest_to_that_word_whatever_its_length(tokenizer, table):
    ids = tokenizer.convert_tokens_to_ids(["dog", "red", "monet"])
    found = nearest_words(table.mean(0) + 3 * (table[ids] - table.mean(0)), table, tokenizer, 4)
    assert [row[0] for row in found] == [Neighbour("dog", 1.0), Neighbour("red", 1.0), Neighbour("monet", 1.0)]
    for row in found:
        similarities = [neighbour.similarity for neighbour in row]
        assert len(row) == 4 and similarities == sorted(similarities, reverse=True) and similarities[1] < 0.99


def test_only_whole_words_are_neighbours_and_no_more_than_there_are(tokenizer, table):
    [row] = nearest_words(table[tokenizer.cls_token_id][None], table, tokenizer, 10**6)
    whole = {word for word in tokenizer.get_vocab() if word.isalpha() and len(word) > 1}
    assert {neighbour.word for neighbour in row} == whole and row[0].similarity < 1


def test_word_distance_counts_in_steps_from_word_to_word(tokenizer):
    table = 100 + 3.0 * torch.arange(len(tokenizer))[:, None] * torch.eye(1, WIDTH)  # words 3 apart on a line
    dog = table[tokenizer.convert_tokens_to_ids("dog")]
    tokens = torch.stack([dog, dog + _along(1, 6)])
    torch.testing.assert_close(word_distance(tokens, table, tokenizer), torch.tensor([0.0, 2.0]), atol=1e-3, rtol=0)


def _along(axis: int, length: float) -> Tensor:
    return length * torch.eye(WIDTH)[axis]


@pytest.mark.parametrize(("chunk", "sampled"), [(1, 9), (2, 512), (512, 512)])
def test_word_distance_does_not_depend_on_its_chunks(tokenizer, table, monkeypatch, chunk, sampled):
    ids = ordinary_words(tokenizer, len(table))
    tokens = tokens_of(5, 9) + 5
    own = torch.cdist(table[ids], table[ids]).fill_diagonal_(torch.inf).amin(1)
    own = own[torch.linspace(0, len(ids) - 1, min(sampled, len(ids))).long()]
    expected = torch.cdist(tokens, table[ids]).amin(1) / own.median()
    monkeypatch.setattr(vocabulary, "_CHUNK", chunk)
    monkeypatch.setattr(vocabulary, "_SAMPLED_WORDS", sampled)
    torch.testing.assert_close(word_distance(tokens, table, tokenizer), expected)


def test_a_pipeline_reads_tokens_in_the_words_of_its_text_encoder(pipeline):
    table = embedding_module(pipeline.t2i.text_encoder).weight
    ids = pipeline.t2i.tokenizer.convert_tokens_to_ids(["beach", "monet"])
    readings = pipeline.vocabulary.read(table[ids], 3)
    assert [reading.neighbours[0].word for reading in readings] == ["beach", "monet"]
    assert all(len(reading.neighbours) == 3 for reading in readings)
    assert [reading.distance for reading in readings] == pytest.approx([0, 0], abs=0.01)
    [between] = pipeline.vocabulary.read(table[ids].mean(0, keepdim=True), 3)
    assert between.distance > 0.1
