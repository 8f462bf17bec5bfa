"""Training of the embedded text-to-image model and of ViLex; runs from the checkout, is not packaged."""

import vilex  # first: it mends a mismatched torchvision before diffusers or transformers import it

__all__ = ["vilex"]
