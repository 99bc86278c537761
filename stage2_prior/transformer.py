"""The prior: a bidirectional transformer that fills in masked tokens (MaskGIT, Chang et al., CVPR 2022)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from timm.models.vision_transformer import Block
from torch import nn


class MaskedTransformer(ModelMixin, ConfigMixin):
    """Predicts the code of every masked place from all the others at once.

    Args:
        codebook_size: K; the mask token is the number K.
        grid: (h, w) of the token grid.
        width: size of a token's embedding.
        depth: number of blocks (timm's ViT block: pre-norm, query-key norm, scaled dot-product attention).
        heads: attention heads.
        num_classes: 0 for an unconditional prior; else the class 'num_classes' stands for 'no class', which training
            shows now and then so that sampling can guide away from it (Ho and Salimans, 2022).
        dropout: of attention outputs and MLPs, against memorising small sets.
        tied: whether output weights are the input embeddings (Press and Wolf, arXiv 1608.05859): what a code means is
            learned once.
        tokenizer_fingerprint: of the tokenizer whose codes these are.
    """

    _supports_gradient_checkpointing = True

    @register_to_config
    def __init__(
        self,
        codebook_size: int = 512,
        grid: tuple[int, int] = (8, 8),
        width: int = 192,
        depth: int = 6,
        heads: int = 6,
        num_classes: int = 0,
        dropout: float = 0.0,
        tied: bool = True,
        tokenizer_fingerprint: str = "",
    ):
        super().__init__()
        length = grid[0] * grid[1]
        self.token_embedding = nn.Embedding(codebook_size + 1, width)
        self.position_embedding = nn.Parameter(torch.zeros(1, length, width))
        self.class_embedding = nn.Embedding(num_classes + 1, width) if num_classes else None
        self.blocks = nn.ModuleList(
            Block(width, heads, qkv_bias=True, qk_norm=True, proj_drop=dropout) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width)
        self.to_embedding = nn.Linear(width, width)
        self.to_logits = None if tied else nn.Linear(width, codebook_size, bias=False)
        self.bias = nn.Parameter(torch.zeros(codebook_size))
        self.gradient_checkpointing = False
        self.apply(_initialise)
        nn.init.trunc_normal_(self.position_embedding, std=0.02)

    @property
    def mask_token(self) -> int:
        return self.config.codebook_size

    @property
    def length(self) -> int:
        return self.config.grid[0] * self.config.grid[1]

    def forward(self, tokens: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        """Logits over the codes at every place.

        Args:
            tokens: (B, L) int64, codes in [0, K) or the mask token K; L = h * w in row-major order.
            labels: (B,) int64 classes, 'num_classes' for none; None stands for no class at all.

        Returns:
            (B, L, K) logits.
        """
        x = self.token_embedding(tokens) + self.position_embedding  # (B, L, width)
        if self.class_embedding is not None:
            if labels is None:
                labels = torch.full((len(tokens),), self.config.num_classes, device=tokens.device)
            x = x + self.class_embedding(labels)[:, None]
        for block in self.blocks:
            checkpointed = self.gradient_checkpointing and torch.is_grad_enabled()
            x = self._gradient_checkpointing_func(block, x) if checkpointed else block(x)
        x = F.gelu(self.to_embedding(self.norm(x)))
        weight = self.token_embedding.weight[:-1] if self.to_logits is None else self.to_logits.weight
        return F.linear(x, weight, self.bias)


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
        nn.init.trunc_normal_(module.weight, std=0.02)
