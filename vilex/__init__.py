"""ViLex: an image is a word.

A picture becomes 1 to 75 vectors in the input-embedding space of a frozen text-to-image model,
where they stand beside words (Visual Lexicon, CVPR 2025).

Dimension letters, used in every shape comment of the project:
B batch, P patches, N ViLex tokens, L sequence length, D text width,
C, h, w latent channels, height and width, H, W pixels.
"""

from vilex import compat
from vilex.version import __version__

compat.declare_torchvision_ops()


__all__ = ["__version__"]
