"""What the denoiser reads of a prompt, without drawing: by this, prompts are compared as the denoiser sees them."""

from contextlib import ExitStack

import torch
from torch import Tensor, nn

from train.state import step_generator
from vilex.diffusion import EmbeddedModel
from vilex.loss import draw_noise
from vilex.t2i import Conditioning

_QUERIES = 32  # of each cross-attention, from all over the pictures
_MASKED = -1e4  # as diffusers has it


class PromptReader:
    """The outputs of each cross-attention for fixed queries, and the embedding of the pooled state.

    The queries are what places of noisy pictures ask; of how the text encoder's states differ it counts what moves
    these answers. Nothing is denoised.
    """

    @torch.no_grad()
    def __init__(self, t2i: EmbeddedModel, pixels: Tensor, condition: Conditioning, seed: int) -> None:
        """Asks with pixels (B,3,H,W), noisy at timesteps of all kinds, under the condition of each."""
        self.t2i = t2i
        self.attentions = [module for name, module in t2i.denoiser.named_modules() if name.endswith("attn2")]
        generator = step_generator(seed, 0, device=t2i.device)
        noise = draw_noise(t2i, len(pixels), generator)
        asked: dict[nn.Module, Tensor] = {}
        with ExitStack() as hooks:
            for attention in self.attentions:
                hooks.enter_context(
                    attention.register_forward_pre_hook(lambda module, inputs: asked.update({module: inputs[0]}))
                )
            t2i.denoise(t2i.add_noise(t2i.encode(pixels), noise.values, noise.timesteps), noise.timesteps, condition)
        self.queries = [_some(asked[attention].flatten(0, 1), generator) for attention in self.attentions]

    def __call__(self, condition: Conditioning) -> list[Tensor]:
        """An answer (B,Q,C) of each cross-attention, and the embedding (B,1,T) of the pooled states."""
        prompt = self.t2i.placed(condition.prompt_embeds)  # (B,L,D)
        bias = (~condition.mask.bool()).to(prompt)[:, None] * _MASKED  # (B,1,L)
        answers = [
            attention(queries.expand(len(prompt), -1, -1), encoder_hidden_states=prompt, attention_mask=bias)
            for attention, queries in zip(self.attentions, self.queries, strict=True)
        ]
        return [*answers, self.t2i.denoiser.class_embedding(condition.pooled)[:, None]]


def _some(queries: Tensor, generator: torch.Generator) -> Tensor:
    """_QUERIES of them (N,C), drawn with replacement."""
    return queries[torch.randint(len(queries), (_QUERIES,), generator=generator, device=queries.device)]
