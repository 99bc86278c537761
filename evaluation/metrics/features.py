"""Features of an image set: extracted once, merged over processes, kept in a file, and fed to every metric.

An image set is an iterable of batches. A batch is either a uint8 tensor (b, 3, H, W) or anything with `.images` (such a
tensor) and `.positions` (int64 (b,), each image's own number in the set), such as `data.stream.Batch`. Where the images
come from, a disk or a model, nothing here can tell.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from scq.engine.errors import UserError, first_line
from scq.engine.files import write_file
from scq.engine.measurements import RealSet
from scq.engine.plain_json import parse_json
from scq.engine.processes import gather_objects, rank_and_world_size
from scq.evaluation.metrics.networks import FeatureNetwork


@dataclass(frozen=True, eq=False)
class FeatureSet:
    """The features of one image set, in the order of the images' positions.

    Attributes:
        features: (N, D) float32 on the CPU.
        positions: (N,) int64, ascending; each image's own number, so that the same set gathered from any number of
            processes is the same tensor, and so the same KID subsets are drawn from it.
        name: what the images are, for messages and tables ("real", "scq samples").
        network: fingerprint of the feature network; sets of different networks are never compared.
    """

    features: Tensor
    positions: Tensor
    name: str
    network: str

    @property
    def count(self) -> int:
        """Number of images."""
        return len(self.features)

    @staticmethod
    def merge(parts: Sequence[FeatureSet]) -> FeatureSet:
        """One set from the parts that several processes, or several batches, gave.

        Raises:
            UserError: the parts are of different networks, or two of them hold the same position. A sampler that pads
                its last batch with images seen before would otherwise count them twice.
        """
        networks = {part.network for part in parts}
        if len(networks) != 1:
            raise UserError(f"parts of {parts[0].name!r} come from different feature networks: {sorted(networks)}")
        features = torch.cat([part.features for part in parts])
        positions, order = torch.cat([part.positions for part in parts]).sort(stable=True)
        twice = positions[1:][positions[1:] == positions[:-1]]
        if len(twice):
            raise UserError(f"image {int(twice[0])} of {parts[0].name!r} is in two of the parts to be merged")
        return FeatureSet(features[order], positions, parts[0].name, parts[0].network)

    def gather(self) -> FeatureSet:
        """This set merged with those of all other processes, on every process; itself when there is only one.

        Every process must call it.
        """
        return FeatureSet.merge(gather_objects(self))


def extract_features(
    batches: Iterable[Any],
    network: FeatureNetwork,
    *,
    name: str,
    limit: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> FeatureSet:
    """Run every image through the network once; see `extract_with_each`."""
    return extract_with_each(batches, [network], name=name, limit=limit, progress=progress)[0]


def extract_with_each(
    batches: Iterable[Any],
    networks: Sequence[FeatureNetwork],
    *,
    name: str,
    limit: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[FeatureSet]:
    """Run every image through every network once, in one pass over the images.

    Args:
        batches: the image set (see the head of this file). Bare tensors are numbered in order, from 0.
        networks: such as `load_inception` and `load_transformer` return.
        name: what the images are.
        limit: stop after this many images; None: all. An endless iterator needs it.
        progress: called with the number of images after each batch.

    Returns:
        one set for each network.

    Raises:
        UserError: there is no image.
    """
    features: list[list[Tensor]] = [[] for _ in networks]
    positions, count = [], 0
    for batch in batches:
        images = batch if isinstance(batch, Tensor) else batch.images  # (b, 3, H, W) uint8
        numbers = torch.arange(count, count + len(images)) if isinstance(batch, Tensor) else batch.positions
        left = len(images) if limit is None else min(len(images), limit - count)
        for network, parts in zip(networks, features, strict=True):
            parts.append(network(images[:left]).float().cpu())  # (b, D)
        positions.append(numbers[:left].cpu())
        count += left
        if progress is not None:
            progress(left)
        if count == limit:
            break
    if not count:
        raise UserError(f"the image set {name!r} is empty")
    return [
        FeatureSet.merge([FeatureSet(torch.cat(parts), torch.cat(positions), name, network.fingerprint)])
        for network, parts in zip(networks, features, strict=True)
    ]


def cached_features(
    path: str | Path,
    real_set: RealSet,
    network: FeatureNetwork,
    batches: Callable[[], Iterable[Any]],
    progress: Callable[[int], None] | None = None,
    alone: bool = False,
) -> FeatureSet:
    """The features of a real set, from the file ``path``, which is written first when it is not there.

    The file is safetensors whose header says what it holds. With several processes every one must call this, and every
    one gets the whole set.

    Args:
        real_set: what ``batches`` gives, for the header.
        batches: opens this process's share of the images.
        progress: called with the number of images after each batch.
        alone: ``batches`` gives the whole set, and no other process is asked.

    Raises:
        UserError: the file is damaged or holds something else than was asked for, and the message names each
            difference; or there are not ``real_set.count`` images.
    """
    path = Path(path)
    asked = {**asdict(real_set), "network": network.fingerprint, "protocol": network.protocol}
    if path.exists():
        return _read_cache(path, asked)
    features = extract_features(batches(), network, name="real", limit=real_set.count, progress=progress)
    features = features if alone else features.gather()
    if features.count != real_set.count:
        raise UserError(
            f"{real_set.dataset} ({real_set.split}) gave {features.count} images, not {real_set.count} as asked"
        )
    if rank_and_world_size()[0] > 0 and not alone:
        return features
    tensors = {"features": features.features.contiguous(), "positions": features.positions.contiguous()}
    write_file(path, save(tensors, metadata={"real_set": json.dumps(asked)}))
    return features


def _read_cache(path: Path, asked: dict[str, Any]) -> FeatureSet:
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get("real_set", "{}")
            features, positions = (file.get_tensor(name) for name in ("features", "positions"))
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"the cached features {path} cannot be read ({first_line(error)}): delete the file to start anew"
        ) from error
    held = parse_json(text, str(path), "delete the file to start anew")
    held = held if isinstance(held, dict) else {}
    different = [f"{key} is {held.get(key)!r}, not {asked[key]!r}" for key in asked if held.get(key) != asked[key]]
    if different:
        raise UserError(
            f"the cached features {path} are of another real set: {'; '.join(different)}. "
            "Give another path, or delete the file to start anew"
        )
    sound = features.ndim == 2 and features.dtype == torch.float32 and positions.shape == features.shape[:1]
    if not sound or not features.isfinite().all():
        raise UserError(f"the cached features {path} are damaged: delete the file to start anew")
    return FeatureSet(features, positions, "real", held["network"])
