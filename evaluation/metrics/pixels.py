"""How near reconstructions are to their originals, pixel by pixel and to a perceptual network."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torchmetrics import MeanMetric, MeanSquaredError, SumMetric
from torchmetrics.image import StructuralSimilarityIndexMeasure

from scq.engine.errors import UserError
from scq.engine.measurements import Reconstruction


class ReconstructionMetrics:
    """Accumulates MSE, PSNR, SSIM and, given a network, LPIPS over batches of image pairs.

    Args:
        device: where the sums are kept and computed.
        across_processes: `compute` adds the sums of all distributed processes, and every one of them must call it.
        perceptual: maps two batches (b, 3, H, W) in [-1, 1] on ``device`` to their mean distance, such as
            `stage1_tokenizer.perceptual.PerceptualLoss`. A network that a model was trained on flatters that model.
    """

    def __init__(
        self,
        device: str | torch.device = "cpu",
        across_processes: bool = False,
        perceptual: Callable[[Tensor, Tensor], Tensor] | None = None,
    ):
        self._perceptual = perceptual
        self._lpips = MeanMetric(sync_on_compute=across_processes).set_dtype(torch.float64).to(device)
        self._lpips.update(0, weight=0)  # as for the images below
        self._mse = MeanSquaredError(sync_on_compute=across_processes).set_dtype(torch.float64).to(device)
        ssim = StructuralSimilarityIndexMeasure(data_range=1.0, sync_on_compute=across_processes)
        # In float32 the variance of flat areas cancels: identical emoji on white would get 0.9999.
        self._ssim = ssim.set_dtype(torch.float64).to(device)
        self._images = SumMetric(sync_on_compute=across_processes).set_dtype(torch.float64).to(device)
        self._images.update(0)  # a process may have no share of a small set

    def update(self, originals: Tensor, reconstructions: Tensor) -> None:
        """Add pairs of images.

        Args:
            originals, reconstructions: uint8 (b, 3, H, W), what would be written to PNG, so that rounding is part of
                the measure.

        Raises:
            TypeError: images of another dtype.
            ValueError: the shapes differ, or the images are not larger than 5 pixels.
        """
        if originals.dtype != torch.uint8 or reconstructions.dtype != torch.uint8:
            raise TypeError(f"images must be uint8, not {originals.dtype} and {reconstructions.dtype}")
        if originals.shape != reconstructions.shape or min(originals.shape[2:]) <= 5:
            raise ValueError(
                f"shapes {tuple(originals.shape)} and {tuple(reconstructions.shape)} must be equal, above 5x5 pixels"
            )
        self._images.update(len(originals))
        a, b = (images.to(self._mse.device).double() / 255 for images in (originals, reconstructions))
        self._mse.update(b.flatten(), a.flatten())
        self._ssim.update(b, a)
        if self._perceptual is not None:
            with torch.no_grad():
                distance = self._perceptual(a.float() * 2 - 1, b.float() * 2 - 1)
            self._lpips.update(distance, weight=len(originals))

    def compute(self) -> Reconstruction:
        """The measures over every pair seen; FID and rates are for others to add.

        Raises:
            UserError: there was no pair.
        """
        count = int(self._images.compute())
        if not count:
            raise UserError("there are no reconstructions to measure")
        mse = float(self._mse.compute())
        return Reconstruction(
            mse=mse,
            psnr=-10 * math.log10(mse) if mse > 0 else math.inf,
            ssim=float(self._ssim.compute()),
            count=count,
            lpips=float(self._lpips.compute()) if self._perceptual is not None else None,
        )
