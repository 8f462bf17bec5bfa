"""Tiny random tokenizers and text encoders, by kind."""

import vilex  # noqa: F401, I001  first: it mends a mismatched torchvision

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel, CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast

WORDS = """
a an the of in on photo painting sketch red green blue dog cat style monet van gogh beach rows mostly
""".split()  # noqa: SIM905


def build_tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """A word-level tokenizer with the special tokens of BERT, CLIP or T5 around a text."""
    names = {
        "bert": ["[PAD]", "[UNK]", "[CLS]", "[SEP]"],
        "clip": ["!", "[UNK]"],
        "t5": ["<pad>", "</s>", "[UNK]"],
    }[kind]
    tail = ["<|start|>", "<|end|>"] if kind == "clip" else []  # CLIP's EOS has the largest id
    vocabulary = {word: i for i, word in enumerate([*names, *WORDS, ",", ".", *tail])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    around = {"bert": "[CLS] $A [SEP]", "clip": "<|start|> $A <|end|>", "t5": "$A </s>"}[kind]
    used = [(name, vocabulary[name]) for name in around.split() if name != "$A"]
    core.post_processor = processors.TemplateProcessing(single=around, special_tokens=used)
    special = {
        "bert": {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"},
        "clip": {"pad_token": "<|end|>", "bos_token": "<|start|>", "eos_token": "<|end|>"},
        "t5": {"pad_token": "<pad>", "eos_token": "</s>"},
    }[kind]
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="[UNK]", model_max_length=24, **special)


def build_bert(vocabulary: int, width: int = 8) -> BertModel:
    """A random BERT of one layer."""
    config = BertConfig(
        vocab_size=vocabulary, hidden_size=width, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=128,
    )  # fmt: skip
    return BertModel(config).eval()


def build_clip(tokenizer: PreTrainedTokenizerFast, eos_token_id: int | None = None, width: int = 8) -> CLIPTextModel:
    """A random CLIP text encoder of one layer; `eos_token_id` 2 selects pooling at the largest id."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=width, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16, max_position_embeddings=24, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id if eos_token_id is None else eos_token_id, pad_token_id=1,
    )  # fmt: skip
    return CLIPTextModel(config).eval()
