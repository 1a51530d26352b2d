import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from kernels import Chip
from lmcl.config import Config, load_config
from lmcl.errors import ConfigError
from lmcl.method.objective import ObjectiveConfig, Terms, error_costs, objective, plan_objective
from lmcl.models.encoder import EncoderConfig
from lmcl.models.quality_model import StudentOutput
from lmcl.training.setup import check_network_precision

IMAGES, RANDOM, WIDTH = 3, 4, 8
CONFIG = ObjectiveConfig(backend="dense")


def output(views: int = RANDOM + 1, *, seed: int = 0) -> StudentOutput:
    generator = torch.Generator().manual_seed(seed)
    raw = torch.randn(IMAGES * views, WIDTH, generator=generator)
    score = torch.rand(IMAGES * views, generator=generator)
    embedding = functional.normalize(raw, dim=-1).requires_grad_()
    return StudentOutput(embedding, score.requires_grad_())


def terms(
    out: StudentOutput,
    config: ObjectiveConfig = CONFIG,
    *,
    images: int = IMAGES,
    weights: torch.Tensor | None = None,
) -> Terms:
    return objective(
        out,
        torch.tensor([0.1, 0.5, 0.9]),
        torch.tensor([7, 3, 5]),
        config,
        images=images,
        random=RANDOM,
        overlap=None,
        keys=None,
        images_by_rank=(images,) if images else (0, IMAGES),
        weights=weights,
    )


def by_hand(out: StudentOutput, *, temperature: float = 0.1) -> float:
    """method.md section 2 in plain loops, float64."""
    crops = out.embedding.detach().double().unflatten(0, (IMAGES, -1))
    rows, hubs = crops[:, :RANDOM].flatten(0, 1), crops[:, RANDOM]
    losses = []
    for i in range(len(rows)):
        others = [j for j in range(len(rows)) if j != i]
        logits = torch.stack([rows[i] @ rows[j] / temperature for j in others])
        losses.append(torch.logsumexp(logits, 0) - rows[i] @ hubs[i // RANDOM] / temperature)
    return float(torch.stack(losses).mean())


def test_the_contrastive_term_is_the_papers() -> None:
    out = output()
    assert float(terms(out).contrastive) == pytest.approx(by_hand(out), rel=1e-5)


def test_the_divergence_is_that_of_the_ratings_and_none_where_they_are_met() -> None:
    plain = ObjectiveConfig(contrastive_weight=0.0, distribution_weight=2.0)
    labels = torch.tensor([[0.2, 0.5, 0.3], [1.0, 0.0, 0.0], [0.1, 0.1, 0.8]])
    logits = torch.randn(IMAGES * RANDOM, 3, generator=torch.Generator().manual_seed(1))
    score = torch.full((IMAGES * RANDOM,), 0.5)

    def found(logits: torch.Tensor) -> Terms:
        return objective(
            StudentOutput(torch.zeros(IMAGES * RANDOM, WIDTH), score, logits=logits),
            torch.tensor([0.1, 0.5, 0.9]),
            torch.tensor([7, 3, 5]),
            plain,
            images=IMAGES,
            random=RANDOM,
            overlap=None,
            keys=None,
            images_by_rank=(IMAGES,),
            labels=labels,
        )

    rows = labels.repeat_interleave(RANDOM, dim=0)
    truth = functional.kl_div(logits.log_softmax(-1), rows, reduction="batchmean")
    terms_found = found(logits)
    assert float(terms_found.distribution_loss) == pytest.approx(float(truth), rel=1e-5)
    assert float(terms_found.loss.detach()) == pytest.approx(
        float(terms_found.l1) + 2 * float(truth)
    )
    met = found(rows.clamp(min=1e-9).log())
    assert float(met.distribution_loss) == pytest.approx(0, abs=1e-6)


def test_weights_of_images_change_the_regression_and_not_the_reported_error() -> None:
    out, plain = output(), ObjectiveConfig(contrastive_weight=0.0)
    scores = out.score.detach().unflatten(0, (IMAGES, -1))[:, :RANDOM]
    by_image = (scores - torch.tensor([[0.1], [0.5], [0.9]])).abs().mean(dim=1)
    found = terms(out, plain, weights=torch.tensor([0.5, 2.0, 0.25]))
    expected = (by_image * torch.tensor([0.5, 2.0, 0.25])).mean()
    assert found.loss.item() == pytest.approx(float(expected), rel=1e-6)
    assert float(found.l1) == float(terms(out, plain).l1)


def test_every_readout_pays_for_its_own_error() -> None:
    plain = ObjectiveConfig(contrastive_weight=0.0)
    apart = torch.linspace(-0.4, 0.4, len(output().score))
    out = output()._replace(
        readouts=torch.stack([output().score + apart, output().score - apart], dim=1)
    )
    found = terms(out, plain)
    alone = [out._replace(score=one, readouts=None) for one in out.readouts.unbind(dim=1)]
    by_readout = [float(terms(one, plain).l1) for one in alone]
    assert float(found.l1) == float(terms(output(), plain).l1)
    assert found.loss.item() == pytest.approx(sum(by_readout) / 2, rel=1e-6)
    assert found.loss.item() > float(found.l1)


@pytest.mark.parametrize("kind", ["l1", "l2", "huber"])
def test_the_cost_of_an_error_is_pytorchs(kind: str) -> None:
    error = torch.tensor([[0.0, 0.05], [0.1, 0.4]], dtype=torch.float64)
    config = ObjectiveConfig(regression=kind, huber_delta=0.1)
    nothing = torch.zeros_like(error)
    expected = {
        "l1": functional.l1_loss(error, nothing, reduction="none"),
        "l2": functional.mse_loss(error, nothing, reduction="none"),
        "huber": functional.smooth_l1_loss(error, nothing, reduction="none", beta=0.1),
    }[kind]
    torch.testing.assert_close(error_costs(error, config, None), expected)
    weights = torch.tensor([2.0, 0.5, 9.0])
    torch.testing.assert_close(
        error_costs(error, config, weights), expected * weights[:2, None].double()
    )


def test_l1_counts_random_crops_only() -> None:
    out = output()
    scores = out.score.detach().unflatten(0, (IMAGES, -1))[:, :RANDOM]
    expected = (scores - torch.tensor([[0.1], [0.5], [0.9]])).abs().mean()
    assert float(terms(out).l1) == pytest.approx(float(expected), rel=1e-6)


def test_the_terms_are_mixed_by_the_contrastive_weight() -> None:
    found = terms(output(), replace(CONFIG, contrastive_weight=0.25))
    expected = 0.75 * float(found.l1) + 0.25 * float(found.contrastive)
    assert float(found.loss.detach()) == pytest.approx(expected, rel=1e-5)


def test_without_the_contrastive_term_no_hub_is_needed() -> None:
    found = terms(output(RANDOM), replace(CONFIG, contrastive_weight=0.0))
    assert float(found.loss.detach()) == pytest.approx(float(found.l1))
    assert float(found.contrastive) == 0


def test_padding_counts_in_neither_term_and_gets_no_gradient() -> None:
    out = output()
    found = terms(out, images=2)
    found.loss.backward()
    padding = slice(2 * (RANDOM + 1), None)
    assert out.embedding.grad is not None
    assert out.embedding.grad[padding].abs().max() == 0
    assert out.score.grad is not None
    assert out.score.grad[padding].abs().max() == 0


def test_a_batch_of_nothing_but_padding_has_a_graph_and_no_gradient() -> None:
    out = output()
    found = terms(out, images=0)
    found.loss.backward()
    assert out.score.grad is not None
    assert out.score.grad.abs().max() == 0
    assert torch.isfinite(found.loss)


@pytest.mark.parametrize(
    ("changes", "word"),
    [({"contrastive_weight": 1.5}, "contrastive_weight"), ({"temperature": 0.0}, "temperature")],
)
def test_impossible_weights_are_refused(changes: dict[str, float], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        ObjectiveConfig(**changes)


CONFIGS = Path(__file__).resolve().parents[3] / "configs"
SHIPPED = sorted(CONFIGS.rglob("*.toml"))
CHIPS = {
    "sm_80": Chip(kind="cuda", capability=80),
    "sm_90": Chip(kind="cuda", capability=90),
    "sm_100": Chip(kind="cuda", capability=100),
    "sm_70": Chip(kind="cuda", capability=70),
    "ROCm": Chip(kind="cuda", capability=94, is_hip=True),
    "CPU": Chip(kind="cpu"),
}
FUSED = ("triton", torch.bfloat16)
FLOAT32 = ("chunked", torch.float32)
EXPECTED = {
    "sm_80": FUSED, "sm_90": FUSED, "sm_100": FUSED,
    "sm_70": FLOAT32, "ROCm": FLOAT32, "CPU": FLOAT32,
}  # fmt: skip
WHY = {
    "sm_70": "this GPU is sm_70 and the fused kernels begin at sm_80",
    "ROCm": "this is ROCm and the fused kernels are for CUDA",
    "CPU": "rows are on cpu and the fused kernels need CUDA",
}


@functools.cache
def width_of(encoder: EncoderConfig) -> int:
    """Width of the embeddings, asking timm where the configuration does not say."""
    with torch.device("meta"):
        return encoder.token_width or timm.create_model(encoder.name, num_classes=0).num_features


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
@pytest.mark.parametrize("chip", CHIPS)
def test_every_shipped_configuration_knows_what_its_loss_computes_in(
    chip: str, precision: str
) -> None:
    """The precision of the networks changes nothing; embeddings leave them as float32."""
    if (chip, precision) == ("CPU", "fp16"):
        with pytest.raises(ConfigError, match=r"runtime.precision = 'fp16' needs a GPU"):
            check_network_precision("fp16", has_gpu=False)
        return
    check_network_precision(precision, has_gpu=chip != "CPU")
    for path in SHIPPED:
        config = load_config(path, [f"runtime.precision='{precision}'"])
        plan = plan_objective(config.objective, CHIPS[chip], width=width_of(config.encoder))
        if config.objective.contrastive_weight == 0:
            assert plan is None, path
            continue
        assert plan is not None
        assert (plan.backend, plan.dtype) == EXPECTED[chip], path
        assert plan.reason == WHY.get(chip, "its fused kernels take this width")


@pytest.mark.parametrize(
    ("chip", "width", "changes", "words"),
    [
        ("sm_70", 384, {"precision": "bf16"}, "objective.precision: asked for 'bf16'.*sm_70"),
        ("sm_90", 1024, {"precision": "bf16"}, "1024 wide and the fused kernels stop at 768"),
        ("sm_90", 1024, {"backend": "triton"}, "objective.backend: .* 1024 wide"),
        ("CPU", 384, {"precision": "tf32"}, "objective.precision: asked for 'tf32'.*on cpu"),
        ("CPU", 384, {"precision": "fp16"}, "objective.precision: asked for 'fp16'.*on cpu"),
        ("CPU", 384, {"backend": "triton"}, "objective.backend: asked for 'triton'.*on cpu"),
        ("ROCm", 384, {"precision": "bf16"}, "objective.precision: .* is ROCm"),
    ],
)
def test_what_a_chip_lacks_is_said_before_the_first_step(
    chip: str, width: int, changes: dict[str, str], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        plan_objective(ObjectiveConfig(**changes), CHIPS[chip], width=width)


class Calls(TorchDispatchMode):
    """Operations by name, and the arguments of the loss's own."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.loss: list[tuple[tuple[Any, ...], Any]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.names.append(str(func))
        if func is torch.ops.lmcl.contrastive_forward.default:
            self.loss.append((args, result))
        return result


def fake_batch(config: Config, width: int) -> tuple[StudentOutput, dict[str, Any]]:
    """What a step of a run on a GPU hands to the objective: float32, outside autocast."""
    images, random = config.train.batch_size, config.crops.random
    crops = images * (random + 1)
    raw = torch.randn(crops, width, device="cuda", requires_grad=True)
    out = StudentOutput(functional.normalize(raw, dim=-1), torch.rand(crops, device="cuda"))
    goal = config.objective
    boxes = torch.rand(images, random, random, device="cuda")
    return out, {
        "overlap": boxes if goal.overlap_aware else None,
        "keys": out.embedding.detach() if goal.keys == "teacher" else None,
    }


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: str(path.relative_to(CONFIGS)))
def test_a_default_step_on_a_gpu_takes_the_fused_kernels_and_waits_for_nothing(path: Path) -> None:
    """Fake CUDA tensors: they exist without a GPU, and every operation but its arithmetic runs."""
    config = load_config(path)
    if config.objective.contrastive_weight == 0:
        pytest.skip("this configuration has no contrastive term")
    width, images = width_of(config.encoder), config.train.batch_size
    with FakeTensorMode(allow_non_fake_inputs=False):
        out, options = fake_batch(config, width)
        mos, ids = torch.rand(images, device="cuda"), torch.arange(images, device="cuda")
        with Calls() as calls:
            found = objective(
                out, mos, ids, config.objective,
                images=images, random=config.crops.random, images_by_rank=(images,), validate=False,
                **options,
            )  # fmt: skip
        assert found.loss.requires_grad
        ((given, made),) = calls.loss
        names = [one.name for one in torch.ops.lmcl.contrastive_forward.default._schema.arguments]
        asked = dict(zip(names, given, strict=True))
        assert (asked["backend"], asked["precision"]) == ("triton", "bf16")
        columns = made[3]
        assert (columns.dtype, columns.shape[1]) == (torch.bfloat16, width)
        # Autograd's own backward would want a device, so its operation is called by itself.
        d_rows, d_hubs, _ = torch.ops.lmcl.contrastive_backward(
            found.loss.detach(), *given[:5], *made[2:], *given[6:-1]
        )
    assert d_rows.dtype == d_hubs.dtype == torch.float32
    assert d_rows.shape == given[0].shape
    waits = ("_local_scalar_dense", "nonzero", "masked_select", "unique")
    assert [name for name in calls.names if any(wait in name for wait in waits)] == []
