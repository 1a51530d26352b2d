"""LoRA: a pretrained ViT keeps its weights, and small matrices beside its layers learn (`peft`).

They exist while training only: the model folder has them added to the weights they stand beside, so
scoring and export know nothing of them.

Source: [Hu, Shen, Wallis, Allen-Zhu, Li, Wang, Wang, Chen, 2021], "LoRA: Low-Rank Adaptation of
Large Language Models".
"""

import copy
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import nn

from lmcl.config import TrainConfig
from lmcl.errors import ConfigError, LmclError
from lmcl.models.quality_model import QualityModel

_A, _B = "lora_A", "lora_B"


def add_lora(student: QualityModel, train: TrainConfig, *, crop_size: int) -> None:
    """Put matrices of `train.lora_rank` beside the ViT's layers; all else of the ViT is frozen.

    Their first values follow from the seed; the model's answers are the same as before.

    Raises:
        ConfigError: If the encoder is no ViT by name, does not call the layers meant, or these
            are narrower than the rank.
        LmclError: If peft is not installed; exit code 4.
    """
    if not train.lora_rank:
        return
    vit = getattr(student.encoder, "vit", None)
    if vit is None:
        raise ConfigError(
            f"train.lora_rank = {train.lora_rank} is for vision transformers by name, and this "
            "encoder is none; lower train.stem_lr_scale for a stem, or set train.lora_rank = 0"
        )
    peft = _import_peft()
    names = [name for name, module in vit.named_modules() if _is_meant(name, module, train)]
    _check_rank(vit, names, train.lora_rank)
    settings = peft.LoraConfig(
        r=train.lora_rank, lora_alpha=train.lora_alpha, target_modules=names, lora_dropout=0.0
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(train.seed)
        peft.inject_adapter_in_model(settings, vit)
    for name, parameter in vit.named_parameters():
        parameter.requires_grad_(_A in name or _B in name)
    _check_called(student, crop_size)


def merge_lora(model: QualityModel) -> QualityModel:
    """The model with its LoRA matrices added to the weights; the model itself without any."""
    if not any(_is_lora(module) for module in model.modules()):
        return model
    merged = copy.deepcopy(model)
    for name, module in list(merged.named_modules()):
        if _is_lora(module):
            module.merge(safe_merge=True)
            parent, _, child = name.rpartition(".")
            setattr(merged.get_submodule(parent), child, module.get_base_layer())
    return merged.requires_grad_(False)


def lora_words(model: QualityModel) -> str:
    """How much of the encoder learns by LoRA, as a line; empty without it."""
    layers = sum(_is_lora(module) for module in model.modules())
    if not layers:
        return ""
    of_encoder = list(model.encoder.named_parameters())
    matrices = sum(value.numel() for name, value in of_encoder if _A in name or _B in name)
    whole = sum(value.numel() for _, value in of_encoder) - matrices
    return f"LoRA beside {layers} layers: {matrices:,} numbers learn, {whole:,} of the encoder stay"


def _check_rank(vit: nn.Module, names: Sequence[str], rank: int) -> None:
    """Refuse matrices that could say no more than the layer itself, with more numbers.

    Raises:
        ConfigError: Names the narrowest layer.
    """
    sides = {name: min(cast(nn.Linear, vit.get_submodule(name)).weight.shape) for name in names}
    narrowest = min(sides, key=lambda name: sides[name], default="")
    if narrowest and rank > sides[narrowest]:
        raise ConfigError(
            f"train.lora_rank = {rank} is more than the rank of the layers beside which they "
            f"stand ({narrowest} has {sides[narrowest]}); set it to at most {sides[narrowest]}, 4 "
            "to 16 are usual"
        )


def _is_meant(name: str, module: nn.Module, train: TrainConfig) -> bool:
    inside = ("attn",) if train.lora_layers == "attention" else ("attn", "mlp")
    is_inside = name.startswith("blocks.") and any(part in name.split(".") for part in inside)
    return is_inside and isinstance(module, nn.Linear)


def _is_lora(module: nn.Module) -> bool:
    return hasattr(module, _A) and hasattr(module, "get_base_layer")


def _check_called(student: QualityModel, crop_size: int) -> None:
    """Refuse a ViT that multiplies by a layer's weight itself: nothing beside it would learn.

    Raises:
        ConfigError: Names the first such layer.
    """
    device = next(student.parameters()).device
    was_training = student.training
    with torch.enable_grad(), torch.random.fork_rng(devices=[]):
        student.eval()(
            torch.zeros(1, 3, crop_size, crop_size, device=device)
        ).score.sum().backward()
    student.train(was_training)
    unused = [n for n, p in student.named_parameters() if _B in n and p.grad is None]
    student.zero_grad(set_to_none=True)
    if unused:
        first = unused[0].partition(f".{_B}")[0]
        raise ConfigError(
            f"train.lora_rank: the encoder does not call its layer {first} ({len(unused)} such "
            "layers), so LoRA beside it would not learn; set train.lora_rank = 0 and lower "
            "train.layer_decay or train.backbone_lr_scale, or take another encoder"
        )


def _import_peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise LmclError(
            "train.lora_rank needs the package peft, which is not installed; `pip install "
            "'lmcl[lora]'`, or set train.lora_rank = 0",
            exit_code=4,
        ) from error
    return peft
