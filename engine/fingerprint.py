"""Which weights these are: what is computed from a network carries its fingerprint, and refuses another's."""

import hashlib

import torch
from torch import nn


def fingerprint(network: nn.Module) -> str:
    """16 hexadecimal digits of all parameters and buffers under their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]
