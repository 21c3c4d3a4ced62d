"""What the CPU benchmark runs: one module a way of running the model, each with `convert` and `load`."""
