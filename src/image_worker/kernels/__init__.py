"""Fused operations of the transformer's forward: Triton kernels, and what they compute in torch.

`reference` defines each operation and runs anywhere; `fused` has the same functions for a card.
"""
