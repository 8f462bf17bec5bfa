"""Training of the embedded text-to-image model and of ViLex; runs from the checkout, is not packaged."""
