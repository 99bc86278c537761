"""The prior: a bidirectional transformer that fills in masked tokens (MaskGIT, Chang et al., CVPR 2022)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from timm.layers import RotaryEmbeddingCat
from timm.models.eva import EvaBlock
from torch import nn

from scq.data.manifest import Classes
from scq.engine.checks import finite_number, one_of, shown, whole_number, yes_or_no
from scq.engine.errors import UserError
from scq.engine.network import Network
from scq.stage1_tokenizer.autoencoder import MOST_CHANNELS, MOST_LAYERS, QuantizerConfig
from scq.stage1_tokenizer.quantizers.interface import MOST_CODES

POSITIONS = ("learned", "rotary")
MOST_SIDE = 1024  # of a grid, in tokens
MOST_CLASSES = 2**20


@dataclass
class PriorArchitectureConfig:
    """The transformer, and the defaults of `MaskedTransformer`."""

    width: int = 192  # size of a token's embedding
    depth: int = 6  # number of blocks (timm's EVA block: pre-norm, query-key norm, scaled dot-product attention)
    heads: int = 6  # attention heads
    dropout: float = 0.0  # of attention outputs and MLPs, against memorising small sets
    class_conditional: bool = False  # whether the prior is told the class of an image
    # Use the input embeddings as output weights (Press and Wolf, arXiv 1608.05859), so that the meaning of a code is
    # learned only once.
    tied: bool = True
    # learned: an embedding for each position. rotary: queries and keys are rotated by row and column (RoPE, Su et al.,
    # arXiv 2104.09864, axial as in EVA-02), so that only distances matter.
    positions: str = "learned"
    code_features: bool = True  # start with embeddings in which codes that are close together are similar


class MaskedTransformer(Network):
    """Predicts the codes of all masked tokens at once from the visible ones.

    Args:
        codebook_size: K; the mask token has the number K.
        grid: (h, w) of the token grid.
        width, depth, heads, dropout, tied, positions: see `PriorArchitectureConfig`.
        num_classes: 0 for an unconditional prior. Otherwise the label ``num_classes`` stands for 'no class', which
            training shows now and then, so that sampling can guide away from it (Ho and Salimans, arXiv 2207.12598).
        code_dim: F, if the prior is given the vectors of its codes (see `describe`); 0: it learns embeddings alone.
        tokenizer_fingerprint: of the tokenizer whose codes these are.
        class_names: by label; empty if they are not known.

    Raises:
        UserError: a size is out of range, there are more or fewer names than classes, the kind of positions is unknown,
            or rotary with a head width that is not a multiple of four.
    """

    _supports_gradient_checkpointing = True

    @register_to_config
    def __init__(
        self,
        codebook_size: int = QuantizerConfig.codebook_size,
        grid: tuple[int, int] = (8, 8),
        width: int = PriorArchitectureConfig.width,
        depth: int = PriorArchitectureConfig.depth,
        heads: int = PriorArchitectureConfig.heads,
        num_classes: int = 0,
        dropout: float = PriorArchitectureConfig.dropout,
        tied: bool = PriorArchitectureConfig.tied,
        positions: str = PriorArchitectureConfig.positions,
        code_dim: int = 0,
        tokenizer_fingerprint: str = "",
        class_names: Sequence[str] = (),
    ):
        super().__init__()
        one_of("positions", positions, POSITIONS)
        for name, value, least, most in (
            ("codebook_size", codebook_size, 1, MOST_CODES),
            ("width", width, 1, MOST_CHANNELS),
            ("depth", depth, 1, MOST_LAYERS),
            ("heads", heads, 1, MOST_CHANNELS),
            ("num_classes", num_classes, 0, MOST_CLASSES),
            ("code_dim", code_dim, 0, MOST_CHANNELS),
        ):
            whole_number(name, value, least, most)
        if not isinstance(class_names, list | tuple) or not all(isinstance(name, str) for name in class_names):
            raise UserError(f"class_names={shown(class_names)} must be a list of names")
        if len(class_names) not in (0, num_classes):
            raise UserError(f"{len(class_names)} class_names for {num_classes} classes")
        if not isinstance(grid, list | tuple) or len(grid) != 2:
            raise UserError(f"grid={shown(grid)} must be two whole numbers, height and width in tokens")
        for side in grid:
            whole_number("grid", side, 1, MOST_SIDE)
        finite_number("dropout", dropout, 0, below=1)
        yes_or_no("tied", tied)
        if width % heads:
            raise UserError(f"width={width} must be a multiple of heads={heads}")
        if positions == "rotary" and width // heads % 4:
            raise UserError(f"rotary positions need a head width that is a multiple of four, not {width // heads}")
        rotary = positions == "rotary"
        self.token_embedding = nn.Embedding(codebook_size + 1, width)
        self.code_embedding = nn.Linear(code_dim, width, bias=False) if code_dim else None
        self.register_buffer("codes", torch.zeros(codebook_size, code_dim) if code_dim else None)
        self.position_embedding = None if rotary else nn.Parameter(torch.zeros(1, grid[0] * grid[1], width))
        self.rotary = RotaryEmbeddingCat(width // heads, in_pixels=False, feat_shape=list(grid)) if rotary else None
        self.class_embedding = nn.Embedding(num_classes + 1, width) if num_classes else None
        self.blocks = nn.ModuleList(
            EvaBlock(width, heads, attn_type="rope", qk_norm=True, proj_drop=dropout, num_prefix_tokens=0)
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width)
        self.to_embedding = nn.Linear(width, width)
        self.to_logits = None if tied else nn.Linear(width, codebook_size, bias=False)
        self.bias = nn.Parameter(torch.zeros(codebook_size))
        self.gradient_checkpointing = False
        self.apply(_initialise)
        if self.position_embedding is not None:
            nn.init.trunc_normal_(self.position_embedding, std=0.02)

    @property
    def mask_token(self) -> int:
        """The number of the mask token: K."""
        return self.config.codebook_size

    @property
    def length(self) -> int:
        """The number of tokens of an image: L = h * w."""
        return self.config.grid[0] * self.config.grid[1]

    def classes(self, where: str) -> Classes:
        """What the prior's labels stand for; ``where`` is what messages call it (see `refuse_other_classes`)."""
        return Classes(where, self.config.num_classes, self.config.get("class_names", ()))

    @torch.no_grad()
    def describe(self, codes: torch.Tensor) -> None:
        """Copy the tokenizer's codes (K, F), each channel scaled to mean zero and variance one."""
        codes = codes - codes.mean(0)
        self.codes.copy_(codes / codes.square().mean(0).sqrt().clamp_min(1e-6))

    def attend_by_products(self) -> None:
        """Compute attention by plain matrix products instead of the fused kernel.

        In bf16 on a CPU, the fused kernel's backward pass takes half of a training step or more: without it, a small
        prior trains 1.7 times (64 tokens) to 2.7 times (16 tokens) as fast. In fp32, the fused kernel is faster.
        """
        for block in self.blocks:
            block.attn.fused_attn = False

    def _embeddings(self) -> torch.Tensor:
        """The embeddings (K + 1, width) of every code and of the mask token."""
        learned = self.token_embedding.weight
        return (
            learned if self.code_embedding is None else learned + F.pad(self.code_embedding(self.codes), (0, 0, 0, 1))
        )

    def forward(self, tokens: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        """Logits over the codes of every token.

        Args:
            tokens: (B, L) int64, codes in [0, K) or the mask token K; L = h * w in row-major order.
            labels: (B,) int64 classes, ``num_classes`` for 'no class'; None for 'no class' throughout.

        Returns:
            (B, L, K) logits.
        """
        embeddings = self._embeddings()
        x = F.embedding(tokens, embeddings)  # (B, L, width)
        if self.position_embedding is not None:
            x = x + self.position_embedding
        if self.class_embedding is not None:
            if labels is None:
                labels = torch.full((len(tokens),), self.config.num_classes, device=tokens.device)
            x = x + self.class_embedding(labels)[:, None]
        turns = None if self.rotary is None else self.rotary.get_embed()  # (L, 2 * width / heads)
        for block in self.blocks:
            checkpointed = self.gradient_checkpointing and torch.is_grad_enabled()
            x = self._gradient_checkpointing_func(block, x, turns) if checkpointed else block(x, turns)
        x = F.gelu(self.to_embedding(self.norm(x)))
        weight = embeddings[:-1] if self.to_logits is None else self.to_logits.weight
        return F.linear(x, weight, self.bias)


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
        nn.init.trunc_normal_(module.weight, std=0.02)
