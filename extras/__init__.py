"""What the paper does not have, or what a first reader skips: several processes, instructions that the LLM writes."""
