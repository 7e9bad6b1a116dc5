"""The ablation, the cost on paper, benchmarks: `python -m studies.ablation`, `.cost`, `.benchmark`, from the project's root."""
