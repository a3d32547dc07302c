"""Training with DeepSpeed, generation with vLLM, weight transfer between them: the only users of those libraries."""
