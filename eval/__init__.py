"""Judge any engine: perplexity, latency and memory, measured the same way for all."""
