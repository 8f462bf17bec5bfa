"""Attention pooler: learned queries read the patch tokens and become ViLex tokens."""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vilex.config import DEFAULT_TOKENS, PoolerConfig, token_budgets

_ANCHOR_PROBABILITY = 0.15  # of each token budget that the ladder shows


class CrossAttention(nn.Module):
    """Multi-head attention from `queries` to `patch_tokens`."""

    def __init__(self, width: int, patch_width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(patch_width, width)
        self.value = nn.Linear(patch_width, width)
        self.out = nn.Linear(width, width)

    def forward(self, queries: Tensor, patch_tokens: Tensor) -> Tensor:
        """What each of queries (B,N,width) read from patch_tokens (B,P,D_vit): (B,N,width)."""
        query, key, value = map(self._split, self._project(queries, patch_tokens))  # (B,heads,N or P,width/heads)
        read = F.scaled_dot_product_attention(query, key, value)
        return self.out(read.transpose(1, 2).flatten(2))  # (B,N,width)

    def attention_map(self, queries: Tensor, patch_tokens: Tensor) -> Tensor:
        """Attention weights (B,N,P), mean over heads; each row sums to 1."""
        query, key, _ = map(self._split, self._project(queries, patch_tokens))
        scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5  # (B,heads,N,P)
        return scores.softmax(-1).mean(1)  # (B,N,P)

    def _project(self, queries: Tensor, patch_tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.query(queries), self.key(patch_tokens), self.value(patch_tokens)

    def _split(self, tokens: Tensor) -> Tensor:
        return tokens.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class PoolerBlock(nn.Module):
    """Pre-norm cross-attention and MLP; no query sees another."""

    def __init__(self, width: int, patch_width: int, heads: int):
        super().__init__()
        self.norm_attention = nn.LayerNorm(width)
        self.attention = CrossAttention(width, patch_width, heads)
        self.norm_mlp = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, queries: Tensor, patch_tokens: Tensor) -> Tensor:
        """queries (B,N,width) after reading patch_tokens (B,P,D_vit)."""
        queries = queries + self.attention(self.norm_attention(queries), patch_tokens)
        return queries + self.mlp(self.norm_mlp(queries))

    def attention_map(self, queries: Tensor, patch_tokens: Tensor) -> Tensor:
        """Where each query looks: (B,N,P)."""
        return self.attention.attention_map(self.norm_attention(queries), patch_tokens)


class VilexPooler(nn.Module):
    """ViLex tokens from patch tokens: n learned queries (the paper: 75) through blocks of cross-attention.

    Queries do not see one another, so the first N tokens are the same whether N or all are computed:
    dropping tail tokens equals encoding fewer. Patches carry no position here, so their order is ignored.
    Source: ViLex (CVPR 2025), section 3.
    """

    def __init__(self, config: PoolerConfig):
        super().__init__()
        self.config = config
        self.queries = nn.Parameter(torch.randn(config.num_queries, config.width))
        self.norm_patches = nn.LayerNorm(config.patch_width)
        self.blocks = nn.ModuleList(
            PoolerBlock(config.width, config.patch_width, config.heads) for _ in range(config.num_blocks)
        )
        self.norm_out = nn.LayerNorm(config.width)
        self.out = nn.Linear(config.width, config.text_width)
        self.register_parameter("token_bias", self._new_token_bias() if config.token_bias else None)

    def forward(self, patch_tokens: Tensor, num_tokens: int | None = None) -> Tensor:
        """The first `num_tokens` ViLex tokens (B,N,D), all of them without it, of patch_tokens (B,P,D_vit).

        Raises ValueError when num_tokens is not in 1..num_queries.
        """
        queries, patch_tokens = self._start(patch_tokens, num_tokens)  # (B,N,width), (B,P,D_vit)
        for block in self.blocks:
            queries = block(queries, patch_tokens)
        vilex_tokens = self.out(self.norm_out(queries))  # (B,N,D)
        return vilex_tokens if self.token_bias is None else vilex_tokens + self.token_bias[: queries.shape[1]]

    def attention_maps(self, patch_tokens: Tensor, num_tokens: int | None = None) -> Tensor:
        """Where each ViLex token looked in the last block (B,N,P), mean over heads; each row sums to 1."""
        queries, patch_tokens = self._start(patch_tokens, num_tokens)
        for block in self.blocks[:-1]:
            queries = block(queries, patch_tokens)
        return self.blocks[-1].attention_map(queries, patch_tokens)

    @torch.no_grad()
    def init_output(self, mean: Tensor, std: Tensor) -> None:
        """Starts the ViLex tokens where words are: `mean` and `std` (D,) of the word-embedding table."""
        self.out.bias.copy_(mean)
        # norm_out gives vectors of length sqrt(width), so a row of this deviation gives `std`.
        nn.init.normal_(self.out.weight, std=self.config.width**-0.5).mul_(std[:, None].to(self.out.weight))

    def add_token_bias(self) -> None:
        """Gives each token a bias of its own, at first 0, unless they have them.

        What is common to all tokens grows large in training; with its own bias a token need not share it.
        """
        if self.token_bias is None:
            self.config = replace(self.config, token_bias=True)
            self.token_bias = self._new_token_bias()

    def _new_token_bias(self) -> nn.Parameter:
        return nn.Parameter(self.out.weight.new_zeros(self.config.num_queries, self.config.text_width))

    def _start(self, patch_tokens: Tensor, num_tokens: int | None) -> tuple[Tensor, Tensor]:
        count = self.config.num_queries if num_tokens is None else num_tokens
        if not 1 <= count <= self.config.num_queries:
            raise ValueError(f"num_tokens must be between 1 and {self.config.num_queries}, got {count}")
        return self.queries[:count].expand(len(patch_tokens), -1, -1), self.norm_patches(patch_tokens)


def sample_num_tokens(generator: torch.Generator, max_tokens: int = DEFAULT_TOKENS) -> int:
    """How many tokens TailDrop keeps in one training step, 1..max_tokens.

    Each budget of the ladder, and the maximum, has probability 0.15; the rest is uniform.
    """
    anchors = token_budgets(max_tokens)
    anchor = int(torch.rand((), generator=generator).item() / _ANCHOR_PROBABILITY)
    if anchor < len(anchors):
        return anchors[anchor]
    return int(torch.randint(1, max_tokens + 1, (), generator=generator))
