"""Text for tests."""

import numpy as np


def prose(seed: int, paragraphs: int) -> str:
    """Made-up sentences, the same for the same seed, each line longer than 100 characters."""
    words = "the cat dog hat mat sat saw ran on and other old red big bird sang when under over tree house"
    rng = np.random.default_rng(seed)
    return "\n\n".join(" ".join(rng.choice(words.split(), 40)) + "." for _ in range(paragraphs)) + "\n"
