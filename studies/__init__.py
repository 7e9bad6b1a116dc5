"""The ablation, the cost on paper, benchmarks: from the project's root, `python -m studies.ablation` and so on."""
