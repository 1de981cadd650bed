"""Reinforcement learning on the quantized model itself."""
