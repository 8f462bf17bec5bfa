"""The words that ViLex tokens stand among: what lies near a token, and words as directions to move tokens in."""

import re
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from vilex.prompt import embedding_module, tokenize
from vilex.t2i import TextToImage
from vilex.words import shift, weigh

# whole words, by the marks of T5 and GPT, of CLIP, and of BERT, which marks the other pieces
_WHOLE_WORDS = tuple(map(re.compile, (r"[▁Ġ][A-Za-z]{2,}", r"[A-Za-z]{2,}</w>", r"[A-Za-z]{2,}")))
_UNUSED = re.compile(r"\[unused\d+\]")  # entries that BERT vocabularies keep free
_SAMPLED_WORDS = 512  # words whose own nearest word is looked for; their median stands for all
_CHUNK = 64  # rows of a distance matrix at a time: 8 MB for 30,522 words


@dataclass(frozen=True)
class Neighbour:
    """A piece of the vocabulary, as the tokenizer writes it, and its cosine similarity to a token, -1..1."""

    word: str
    similarity: float


@dataclass(frozen=True)
class Reading:
    """A hint on what one token says: the words nearest to it, the nearest first, and how far that one is.

    A distance of 1 is as far as words lie from one another.
    """

    neighbours: tuple[Neighbour, ...]
    distance: float


def ordinary_words(tokenizer: PreTrainedTokenizerBase, vocabulary_size: int) -> Tensor:
    """Ids int64 (V',) of whole words in Latin letters, as pieces of words say nothing to a reader.

    Where the vocabulary has none, of all that is neither special nor kept free.
    """
    ids = range(min(vocabulary_size, len(tokenizer)))  # some tables have more rows than there are words
    special = set(tokenizer.all_special_ids)
    names = zip(ids, tokenizer.convert_ids_to_tokens(list(ids)), strict=True)
    pieces = {i: piece for i, piece in names if i not in special and not _UNUSED.fullmatch(piece)}
    for rule in _WHOLE_WORDS:
        if words := [i for i, piece in pieces.items() if rule.fullmatch(piece)]:
            return torch.tensor(words)
    return torch.tensor(list(pieces))


def nearest_words(
    vilex_tokens: Tensor, table: Tensor, tokenizer: PreTrainedTokenizerBase, count: int = 5
) -> list[list[Neighbour]]:
    """The `count` words most like each of vilex_tokens (N,D) by cosine, the most alike first: a hint, not a fact.

    table (V,D) holds the word embeddings. Tokens and words count as seen from the table's mean: word embeddings
    share one large common part, beside which every word would look alike.
    """
    ids, mean = ordinary_words(tokenizer, len(table)), table.mean(0)
    words = F.normalize(table[ids] - mean, dim=-1)  # (V',D)
    similarities = F.normalize(vilex_tokens.to(table) - mean, dim=-1) @ words.T  # (N,V')
    values, places = similarities.topk(min(count, len(ids)))  # (N,count)
    names = [tokenizer.convert_ids_to_tokens(ids[row].tolist()) for row in places.cpu()]
    return [
        [Neighbour(name, round(value, 4)) for name, value in zip(row, similarity, strict=True)]
        for row, similarity in zip(names, values.tolist(), strict=True)
    ]


def word_distance(vilex_tokens: Tensor, table: Tensor, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """How far each of vilex_tokens (N,D) lies from its nearest word, (N,): 1 is as far as words lie from one another.

    That unit is the median distance between a word of `table` (V,D) and the word nearest to it. A hint, not a fact.
    """
    words = table[ordinary_words(tokenizer, len(table))]  # (V',D)
    sample = torch.linspace(0, len(words) - 1, min(_SAMPLED_WORDS, len(words))).long()
    typical = torch.cat([_to_another(chunk.to(table.device), words) for chunk in sample.split(_CHUNK)]).median()
    return torch.cat([torch.cdist(part, words).amin(1) for part in vilex_tokens.to(words).split(_CHUNK)]) / typical


def _to_another(places: Tensor, words: Tensor) -> Tensor:
    """Distance from the words at `places` (S,) to the nearest other word: (S,)."""
    distances = torch.cdist(words[places], words)  # (S,V')
    return distances.scatter_(1, places[:, None], torch.inf).amin(1)


class Vocabulary:
    """The word embeddings of a text-to-image model's text encoders."""

    def __init__(self, t2i: TextToImage) -> None:
        self.t2i = t2i

    @cached_property
    def average(self) -> Tensor:
        """The average word (D,), in every text encoder there is."""
        return self.t2i.word_statistics()[0]

    def weigh(self, vilex_tokens: Tensor, weight: float) -> Tensor:
        """vilex_tokens (N,D) that say more or less: 0 is the average word, 1 leaves them alone.

        Raises ValueError for a weight outside 0..2.
        """
        return weigh(vilex_tokens, weight, self.average.to(vilex_tokens))

    def shift(self, vilex_tokens: Tensor, minus: str, plus: str, strength: float = 1.0) -> Tensor:
        """vilex_tokens (N,D) with words taken from them and added to them; best give both, and "" for neither.

        Raises ValueError for a text without any word piece and a strength that is not finite.
        """
        means = (None if mean is None else mean.to(vilex_tokens) for mean in map(self._mean, (minus, plus)))
        return shift(vilex_tokens, *means, strength)

    def _mean(self, words: str) -> Tensor | None:
        """The mean (1,D) of the embeddings of some words, in every text encoder there is; None without words."""
        if not words:
            return None
        ids = [tokenize(tokenizer, words).input_ids for tokenizer in self.t2i.tokenizers]
        if not all(ids):
            raise ValueError(f"there is no word in {words!r:.60}")
        tables = [embedding_module(encoder).weight for encoder in self.t2i.text_encoders]
        return torch.cat([table[torch.tensor(i)].mean(0) for table, i in zip(tables, ids, strict=True)])[None]

    def read(self, vilex_tokens: Tensor, count: int = 5) -> list[Reading]:
        """A Reading with `count` words of each of vilex_tokens (N,D): a hint, not a fact.

        With several text encoders the first one's words count, and its columns of the tokens.
        """
        table, tokenizer = embedding_module(self.t2i.text_encoder).weight.float(), self.t2i.tokenizer
        tokens = vilex_tokens[:, : self.t2i.text_widths[0]]
        nearest = nearest_words(tokens, table, tokenizer, count)
        distances = word_distance(tokens, table, tokenizer).tolist()
        return [Reading(tuple(words), distance) for words, distance in zip(nearest, distances, strict=True)]
