"""Programs that measure or show the whole project: run as `python -m benchmarks.NAME`."""
