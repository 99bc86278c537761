"""A short name for the weights of a network."""

import hashlib

import torch
from torch import nn


def weights_fingerprint(module: nn.Module) -> str:
    """16 hexadecimal digits of all that a module's ``state_dict`` holds: equal weights have equal ones."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]
