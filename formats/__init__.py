"""Files: official weights, our checkpoints and the released ones, tokenizers, conversion. No model is known here."""
