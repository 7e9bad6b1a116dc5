"""Files: official weights, our checkpoints and the released ones, tokenizers, conversion. Nothing here knows a model."""
