"""Files: official weights, our checkpoints and the released ones, tokenizers. No model is known here."""
