"""The model of a run as it is before the first step."""

import torch

from lmcl.config import Config
from lmcl.models.precision import choose_precision
from lmcl.models.quality_model import QualityModel, select_attention_impl
from lmcl.models.weights import load_weights


def make_student(config: Config, device: torch.device) -> QualityModel:
    """The model of a run as it is before the first step, laid out as the device likes it."""
    torch.manual_seed(config.train.seed)
    student = QualityModel(
        config.encoder,
        config.decoder,
        crop_size=config.crops.size,
        view_size=config.saliency.view,
        sets=len(config.data.sets),
    )
    load_weights(student.encoder, config.encoder)
    student.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    precision = choose_precision(config.runtime.precision, device).dtype
    select_attention_impl(student, device, precision)
    return student
