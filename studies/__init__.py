"""Results, the cost on paper, benchmarks: from the project's root, `python -m studies.results` and so on."""
