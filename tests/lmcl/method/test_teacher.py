import pytest
import torch

from lmcl.method.teacher import Teacher, TeacherConfig
from lmcl.models.encoder import EncoderConfig
from lmcl.models.quality_model import DecoderConfig, QualityModel


def student() -> QualityModel:
    torch.manual_seed(0)
    encoder = EncoderConfig(name="conv-vit", width=24, depth=1, heads=3, patch=8)
    return QualityModel(encoder, DecoderConfig(heads=3), crop_size=16, view_size=16)


def distance(teacher: Teacher, model: QualityModel) -> float:
    return float((teacher.model.panel.head.weight - model.panel.head.weight).detach().norm())


def moved(update: str, *, beta: float = 0.25) -> tuple[Teacher, QualityModel, float]:
    model = student()
    teacher = Teacher(model, TeacherConfig(update=update, beta=beta))
    with torch.no_grad():
        model.panel.head.weight += 1.0
    return teacher, model, distance(teacher, model)


def test_a_teacher_begins_as_the_student_and_asks_for_no_gradient() -> None:
    model = student()
    teacher = Teacher(model, TeacherConfig())
    assert distance(teacher, model) == 0
    assert not any(value.requires_grad for value in teacher.model.parameters())


def test_the_steps_of_an_epoch_leave_beta_of_the_old_weights() -> None:
    teacher, model, before = moved("step")
    for _ in range(7):
        teacher.update_after_step(model, steps_per_epoch=7)
    assert distance(teacher, model) == pytest.approx(0.25 * before, rel=1e-4)


def test_the_paper_moves_once_an_epoch() -> None:
    teacher, model, before = moved("epoch")
    teacher.update_after_step(model, steps_per_epoch=7)
    assert distance(teacher, model) == before
    teacher.update_after_epoch(model)
    assert distance(teacher, model) == pytest.approx(0.25 * before, rel=1e-4)


@pytest.mark.parametrize(("update", "remains"), [("frozen", 1.0), ("copy", 0.0)])
def test_frozen_never_moves_and_copy_is_the_student(update: str, remains: float) -> None:
    teacher, model, before = moved(update)
    teacher.update_after_step(model, steps_per_epoch=7)
    teacher.update_after_epoch(model)
    assert distance(teacher, model) == pytest.approx(remains * before)


def test_looking_leaves_no_hooks_behind() -> None:
    model = student()
    Teacher(model, TeacherConfig()).cls_attention(torch.randn(1, 3, 16, 16), layers=1)
    assert all(not module._forward_pre_hooks for module in model.modules())
