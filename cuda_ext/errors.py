"""What goes wrong, each in one sentence."""


class CudaExtError(RuntimeError):
    """The engine cannot be built, loaded or used as asked."""


class CheckpointError(CudaExtError):
    """A model folder is damaged or holds what the engine cannot run."""
