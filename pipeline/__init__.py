"""Headroom: compress GPT-2, run it, and know what each step cost and gained."""

import logging

# Imported along with transformers, both complain of extensions that nothing here uses.
for _chatty in ("torchao", "torch.utils._pytree"):
    logging.getLogger(_chatty).setLevel(logging.ERROR)

__version__ = "0.1.0"
