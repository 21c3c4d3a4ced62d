"""Headroom: compress GPT-2, run it, and know what each step cost and gained."""

__version__ = "0.1.0"
