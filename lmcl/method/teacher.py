"""The teacher: a slow copy of the student that says where to look.

"Mutual learning" is this loop: the teacher hands the student coordinates, the student hands the
teacher weights. No soft targets flow.
"""

import copy
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lmcl.method.lr_schedule import step_momentum
from lmcl.models.quality_model import QualityModel, StudentOutput
from lmcl.models.stem import PixelsOrFeatures


@dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """How the student's weights reach the teacher."""

    update: Literal["step", "epoch", "frozen", "copy"] = "step"
    """`step`: moving average at every step [ours]; `epoch`: once an epoch [paper]; `frozen`: the
    first weights for good; `copy`: the student itself after every step."""
    beta: float = 0.5
    """What remains of the teacher's weights after one epoch, in [0, 1). The paper's is unknown."""

    def __post_init__(self) -> None:
        if not 0 <= self.beta < 1:
            raise ValueError(f"teacher.beta must be in [0, 1), got {self.beta}")


class Teacher:
    """A gradient-free copy of the student and the rule by which it follows."""

    def __init__(self, student: QualityModel, config: TeacherConfig) -> None:
        self.config = config
        self.model = copy.deepcopy(student).eval().requires_grad_(False)

    def update_after_step(self, student: QualityModel, *, steps_per_epoch: int) -> None:
        """Move after an optimiser step, if the rule is `step` or `copy`."""
        if self.config.update == "step":
            self._move(student, step_momentum(self.config.beta, steps_per_epoch=steps_per_epoch))
        elif self.config.update == "copy":
            self._move(student, 0.0)

    def update_after_epoch(self, student: QualityModel) -> None:
        """Move at the end of an epoch, if the rule is `epoch` [paper]."""
        if self.config.update == "epoch":
            self._move(student, self.config.beta)

    @torch.no_grad()
    def cls_attention(self, view: PixelsOrFeatures, *, layers: int) -> Float[Tensor, "b g g"]:
        """CLS attention over whole images (method.md, step 2)."""
        return self.model.encoder.cls_attention(view, layers=layers)

    @torch.no_grad()
    def embed(self, pixels: PixelsOrFeatures) -> Float[Tensor, "n d"]:
        """Embeddings without gradients, for `objective.keys = "teacher"`."""
        output: StudentOutput = self.model(pixels)
        return output.embedding

    @torch.no_grad()
    def _move(self, student: nn.Module, momentum: float) -> None:
        ours = [value for value in self.model.state_dict().values() if value.is_floating_point()]
        theirs = [value for value in student.state_dict().values() if value.is_floating_point()]
        torch._foreach_lerp_(ours, theirs, 1.0 - momentum)
