"""Language-model alignment in plain PyTorch: reward models, REINFORCE, WARP."""

__version__ = "0.1.0"
