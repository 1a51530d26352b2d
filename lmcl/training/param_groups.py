"""Parameter groups of the optimiser: who learns at which rate, and who keeps its weights.

The backbone is the network that has learned elsewhere: a timm vision transformer, or the layers of
a hybrid's stem. What is above it (a hybrid's blocks, the panel, the head) has the run's own rate.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from lmcl.config import TrainConfig
from lmcl.errors import ConfigError
from lmcl.models.quality_model import QualityModel

_SCALES, _SCALES_SHARE = "scales.", 10.0
"""Lines to the sets' own scales: a few numbers that have further to go than a network's weights,
each step of which moves thousands (decision 0017)."""
_NO_WEIGHT_DECAY = ("cls", "members", "pos_embed", "reg_token")
_STEM, _VIT = "encoder.stem.layers.", "encoder.vit."
_BLOCK = re.compile(r"blocks\.(\d+)\.")
_FIRST = (
    *("patch_embed.", "pos_embed", "cls_token", "reg_token", "dist_token", "norm_pre.", "rope."),
)
"""What stands before the first block of a timm ViT."""
_Key = tuple[bool, float, bool]


def freeze_backbone(student: QualityModel, train: TrainConfig) -> None:
    """Let the backbone keep its weights where its rate is 0 (`train.backbone_lr_scale`).

    Raises:
        ConfigError: If a stem has statistics that would move all the same: `encoder.frozen` keeps
            these too.
    """
    if train.backbone_lr_scale:
        return
    for name, module in student.named_modules():
        learns = any(one.requires_grad for one in module.parameters(recurse=False))
        is_norm = learns and isinstance(module, nn.modules.batchnorm._BatchNorm)
        if is_norm and name.startswith((_STEM, _VIT)):
            raise ConfigError(
                f"train.backbone_lr_scale = 0 keeps weights, but {name} also has statistics, which "
                "move in training; set encoder.frozen to all levels of the stem, and "
                "train.backbone_lr_scale = 1"
            )
    for name, parameter in student.named_parameters():
        if name.startswith((_STEM, _VIT)):
            parameter.requires_grad_(False)


def parameter_groups(student: QualityModel, train: TrainConfig) -> list[dict[str, object]]:
    """Weights with and without decay, each at its share of the learning rate (`lr_scale`).

    With `train.layer_decay` the share of a ViT's layer is that to the power of the number of layers
    above it; embeddings lie below the first block, and the last norm above the last.

    Raises:
        ConfigError: If layers of an encoder that is no ViT are to decay, or a ViT's stem is meant.

    Source: layer-wise decay as in [Bao, Dong, Piao, Wei, 2022], "BEiT", and [Clark, Luong, Le,
    Manning, 2020], "ELECTRA".
    """
    if train.layer_decay != 1 and not hasattr(student.encoder, "vit"):
        raise ConfigError(
            f"train.layer_decay = {train.layer_decay} is for vision transformers by name, and this "
            "encoder is none; lower train.stem_lr_scale for a stem, or set train.layer_decay = 1"
        )
    if train.stem_lr_scale != 1 and hasattr(student.encoder, "vit"):
        raise ConfigError(
            f"train.stem_lr_scale = {train.stem_lr_scale} is for a convolutional stem, and this "
            "encoder has none; set train.backbone_lr_scale in its place, and train.stem_lr_scale "
            "= 1"
        )
    groups: dict[_Key, list[nn.Parameter]] = {}
    for name, parameter in student.named_parameters():
        if parameter.requires_grad:
            scale = _share(name, train, layers=len(student.encoder.layers()))
            key = (name.startswith(_STEM), scale, _is_spared(name, parameter))
            groups.setdefault(key, []).append(parameter)
    return list(_as_torch_wants(groups, train))


def without_unused(state: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """An optimiser's state without parameters that never got a gradient, where there are fewer now.

    Earlier versions gave poolings that take no part to the optimiser, which has no state of them.
    """
    groups = []
    for saved, own in zip(state["param_groups"], optimizer.param_groups, strict=False):
        used = [number for number in saved["params"] if number in state["state"]]
        is_older = len(used) == len(own["params"]) < len(saved["params"])
        groups.append({**saved, "params": used} if is_older else saved)
    return {**state, "param_groups": groups}


def _share(name: str, train: TrainConfig, *, layers: int) -> float:
    """Of the learning rate, for one parameter."""
    if name.startswith(_STEM):
        return train.stem_lr_scale * train.backbone_lr_scale
    if name.startswith(_SCALES):
        return _SCALES_SHARE
    if not name.startswith(_VIT):
        return 1.0
    inner = name.removeprefix(_VIT)
    block = _BLOCK.match(inner)
    outside = layers + 1 if inner.startswith(_FIRST) else 0
    above = layers - int(block[1]) if block else outside
    return float(train.backbone_lr_scale * train.layer_decay**above)


def _is_spared(name: str, parameter: nn.Parameter) -> bool:
    """From weight decay."""
    return parameter.ndim <= 1 or any(part in name for part in _NO_WEIGHT_DECAY)


def _as_torch_wants(
    groups: dict[_Key, list[nn.Parameter]], train: TrainConfig
) -> Iterator[dict[str, object]]:
    # In this order since the first version: checkpoints hold the optimiser's state by group.
    for (_, scale, is_spared), parameters in sorted(groups.items(), key=lambda item: item[0]):
        yield {
            "params": parameters,
            "weight_decay": 0.0 if is_spared else train.weight_decay,
            "lr_scale": scale,
        }
