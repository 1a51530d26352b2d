"""The student's objective: scores near the MOS, crops of an image around its salient crop.

loss = (1 - a) * L1 + a * contrastive (method.md, step 5). The contrastive term is the kernels'
room; here only its inputs are put together: which rows count, whose they are, how crops overlap.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from lmcl.method.batch_losses import fidelity_loss, gather_images, margin_loss, plcc_loss
from lmcl.models.quality_model import StudentOutput
from lmcl.utils.kernels import Chip, LossPlan, manifold_contrastive_loss, plan_loss
from lmcl.utils.validators import check_bounds
from pipeline.batch import BatchSets


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """The terms of the loss (method.md, section 2, has the options' meaning)."""

    contrastive_weight: float = 0.1
    """The a of the loss, in [0, 1]; 0 leaves plain regression. Unknown in the paper."""
    regression: Literal["l1", "l2", "huber"] = "l1"
    """What the error of a crop's score costs: itself [paper], its square, or its square below
    `huber_delta` and itself beyond (divided so that the slope there is 1)."""
    huber_delta: float = 0.1
    """Where `huber` turns from a square to a line, in [0, 1] units, > 0."""
    plcc_weight: float = 0.0
    """Weight of (1 - PLCC) / 2 over the images of a step, added to the regression; 0 = off."""
    rank_weight: float = 0.0
    """Weight of the loss over all pairs of images of a step, added to the regression; 0 = off."""
    rank_loss: Literal["fidelity", "margin"] = "fidelity"
    """What a pair costs: `fidelity`, by the probability that one image is the better one; `margin`,
    by how far the better one is short of `rank_scale` ahead."""
    rank_scale: float = 0.1
    """Of `fidelity` the deviation of an image's quality, of `margin` the margin; in [0, 1] units,
    > 0."""
    temperature: float = 0.1
    """Similarities are divided by it, > 0. Unknown in the paper."""
    intra_weight: float | Literal["balanced"] = 1.0
    """Weight of crops of the same image among the negatives [paper: 1]; `balanced` keeps their
    share of the softmax at every batch size."""
    overlap_aware: bool = False
    """Discount two crops of one image by the share of pixels (IoU) they have in common."""
    include_positive: bool = False
    """Put the positive into the denominator (InfoNCE) [paper: no]."""
    keys: Literal["student", "teacher"] = "student"
    """Whose embeddings rows are compared with [paper: student]."""
    across_sets: bool = False
    """Of a run that learns from several sets (`data.sets`): whether crops of other sets' images are
    negatives too; else each set's crops are contrasted among themselves."""
    hub: Literal["salient", "random", "centre"] = "salient"
    """What an image's crops are drawn to: the teacher's crop [paper], one more random crop (the
    paper's ablation), or the crop in the middle of the image [ours], which needs no teacher."""
    image_weight: Literal["equal", "inverse-variance"] = "equal"
    """How much an image counts in the regression: all the same, or by how well its score is known,
    1 / (error^2 + error_floor^2), the error being the deviation of its ratings over the root of
    their number, in [0, 1] units; 1 on average. The set must have deviations."""
    ratings: int | None = None
    """Ratings each score is the mean of, for `image_weight`; None: what is on file for the set. 1:
    the set's deviations are those of the means themselves."""
    error_floor: float = 0.05
    """What a model is off by beyond the raters, in [0, 1] units, > 0: with it much larger than the
    errors all images weigh nearly the same."""
    distribution_weight: float = 1.0
    """With `decoder.bins`: weight of the divergence (nats) of each crop's distribution from the
    image's ratings, added to the regression."""
    deviation: float | None = None
    """With `decoder.bins`: deviation of every image's ratings, in [0, 1] units, > 0, for sets that
    have none; None: the set's own."""
    backend: Literal["auto", "triton", "chunked", "dense"] = "auto"
    """Which implementation of the loss; `auto`: fused on a GPU, chunked elsewhere."""
    precision: Literal["auto", "bf16", "fp16", "tf32", "fp32"] = "auto"
    """What the contrastive term multiplies in, whatever `runtime.precision` is; its sums are
    float32. `auto`: bf16 on a GPU that has the fused kernels, float32 elsewhere
    (docs/kernels.md has the price)."""

    def __post_init__(self) -> None:
        if not 0 <= self.contrastive_weight <= 1:
            raise ValueError(
                f"objective.contrastive_weight must be in [0, 1], got {self.contrastive_weight}"
            )
        check_bounds(
            "objective",
            self,
            least={"intra_weight": 0, "ratings": 1, "plcc_weight": 0, "rank_weight": 0}
            | {"distribution_weight": 0},
            most={"distribution_weight": 10**6, "deviation": 10}
            | {"ratings": 10**6, "error_floor": 10, "plcc_weight": 10**6, "rank_weight": 10**6}
            | {"rank_scale": 10**3},
            above={"huber_delta": 0, "temperature": 0, "error_floor": 0, "rank_scale": 0}
            | {"deviation": 0},
        )

    @property
    def compares_images(self) -> bool:
        """Whether a term is about the images of a step together."""
        return self.plcc_weight > 0 or self.rank_weight > 0


class Terms(NamedTuple):
    """The loss of one step and what it is made of; all but `loss` are detached."""

    loss: Float[Tensor, ""]
    """What is differentiated; scaled so that averaging over ranks gives the global mean."""
    l1: Float[Tensor, ""]
    """Mean absolute error of this rank's crops, in [0, 1] units, all images weighing the same."""
    contrastive: Float[Tensor, ""]
    """Contrastive loss over all ranks, nats; 0 when switched off."""
    intra_share: Float[Tensor, ""]
    """Share of the softmax that other crops of the same image hold."""
    intra_similarity: Float[Tensor, ""]
    """Mean cosine of two random crops of one image; near 1 the manifold has collapsed."""
    positive_similarity: Float[Tensor, ""]
    """Mean cosine of a random crop and its image's hub."""
    plcc_loss: Float[Tensor, ""]
    """(1 - PLCC) / 2 over the images of all ranks; 0 when switched off."""
    rank_loss: Float[Tensor, ""]
    """Mean over pairs of images of all ranks; 0 when switched off."""
    distribution_loss: Float[Tensor, ""]
    """Mean divergence of this rank's crops from their images' ratings, nats; 0 without bins."""


class _Contrast(NamedTuple):
    """The contrastive term and its figures, as in `Terms`."""

    loss: Float[Tensor, ""]
    intra_share: Float[Tensor, ""]
    intra_similarity: Float[Tensor, ""]
    positive_similarity: Float[Tensor, ""]


def objective(
    output: StudentOutput,
    mos: Float[Tensor, " b"],
    ids: Int64[Tensor, " b"],
    config: ObjectiveConfig,
    *,
    images: int,
    random: int,
    overlap: Float[Tensor, "b h h"] | None,
    keys: Float[Tensor, "n d"] | None,
    images_by_rank: tuple[int, ...],
    weights: Float[Tensor, " b"] | None = None,
    sets: BatchSets | None = None,
    labels: Float[Tensor, "b k"] | None = None,
    validate: bool = True,
) -> Terms:
    """Regression and contrastive terms of one batch.

    Args:
        output: The student's view of all crops, image-major, the hub (if any) last of each image.
        mos: Targets in [0, 1], higher = better.
        ids: Sample ids; unique over ranks among valid images.
        config: Weights and options.
        images: Images that count; they stand first, and the padding after them counts in neither
            term. A number and not a mask, which would have to be read back from a GPU.
        random: Random crops per image: the ones that are scored and contrasted.
        overlap: IoU of the random crops of each image, if overlap-aware.
        keys: The teacher's embeddings of the same crops, if keys = teacher.
        images_by_rank: Images that count on every rank, (images,) in one process.
        weights: Of the images in the regression (`image_weight`); None: all 1.
        sets: Whose images they are, if they are of several sets; scores then stand on each set's
            own scale.
        labels: Distributions of the images' ratings, where the head gives one.
        validate: Check the values that the contrastive term gets; waits for a GPU.

    Source: [Local Manifold Learning, 2024]; options are ours (method.md, section 2).
    """
    error = crop_errors(output.score, mos, images=images, random=random)
    # A rank whose images are all padding still needs a graph through every weight.
    l1 = error.mean() if len(error) else output.score.sum() * 0.0
    weighted = l1
    if len(error):
        costs = regression_costs(output, mos, config, weights, images=images, random=random)
        weighted = costs.mean()
    divergence = torch.zeros_like(l1)
    if labels is not None and output.logits is not None and len(error):
        logits = output.logits
        crops = logits.reshape(len(mos), -1, logits.shape[-1])[:images, :random]
        divergence = _divergence(crops, labels[:images], weights)
        weighted = weighted + config.distribution_weight * divergence
    # With it the average over ranks of local means is the global mean (1 in one process).
    regression = weighted * (len(images_by_rank) * images / sum(images_by_rank))
    nothing = torch.zeros_like(l1)
    figures = (nothing, nothing, divergence.detach())
    apart = sets if sets is not None and not config.across_sets else None
    if config.compares_images:
        scores = output.score.reshape(len(mos), -1)[:images, :random]
        if sets is None:
            by_plcc, by_rank = _compare_images(scores, mos[:images], config, images_by_rank)
        else:
            by_plcc, by_rank = _compare_within_sets(scores, mos, config, sets)
        both = config.plcc_weight * by_plcc + config.rank_weight * by_rank
        # Every rank has the whole loss and the gradient of its own images: their sum is wanted.
        regression = regression + (both * len(images_by_rank)).to(regression.dtype)
        figures = (by_plcc.detach().to(l1.dtype), by_rank.detach().to(l1.dtype), figures[2])
    if config.contrastive_weight == 0:
        return Terms(regression, l1.detach(), nothing, nothing, nothing, nothing, *figures)
    if apart is None:
        found = _contrast(
            output.embedding, ids, config, images=images, images_by_rank=images_by_rank,
            random=random, overlap=overlap, keys=keys, validate=validate,
        )  # fmt: skip
    else:
        found = _contrast_within_sets(
            output.embedding, ids, config, sets=apart,
            random=random, overlap=overlap, keys=keys, validate=validate,
        )  # fmt: skip
    weight = config.contrastive_weight
    return Terms(
        (1 - weight) * regression + weight * found.loss,
        l1.detach(),
        found.loss.detach(),
        found.intra_share,
        found.intra_similarity,
        found.positive_similarity,
        *figures,
    )


def _divergence(
    logits: Float[Tensor, "k h c"],
    labels: Float[Tensor, "k c"],
    weights: Float[Tensor, " b"] | None,
) -> Float[Tensor, ""]:
    """Mean divergence (Kullback-Leibler) of the images' ratings from what is said of each crop."""
    own = torch.special.xlogy(labels, labels).sum(dim=-1)
    by_crop = own[:, None] - (labels[:, None] * logits.log_softmax(dim=-1)).sum(dim=-1)
    found: Tensor = by_crop if weights is None else by_crop * weights[: len(logits), None]
    return found.mean()


def _compare_images(
    scores: Float[Tensor, "k h"],
    mos: Float[Tensor, " k"],
    config: ObjectiveConfig,
    images_by_rank: tuple[int, ...],
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """PLCC and rank loss over the images of all ranks; 0 for one that is not asked for."""
    every, labels = gather_images(scores, mos, images_by_rank)
    rank_loss = {"fidelity": fidelity_loss, "margin": margin_loss}[config.rank_loss]
    nothing = every.sum() * 0.0
    return (
        plcc_loss(every, labels) if config.plcc_weight else nothing,
        rank_loss(every, labels, scale=config.rank_scale) if config.rank_weight else nothing,
    )


def _compare_within_sets(
    scores: Float[Tensor, "k h"], mos: Float[Tensor, " b"], config: ObjectiveConfig, sets: BatchSets
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """The same over each set's images alone, the mean over images: scales differ between sets."""
    images = [sum(counts) for counts in sets.images_by_rank]
    found = [
        (count / sum(images), _compare_images(scores[rows], mos[rows], config, counts))
        for rows, counts, count in zip(sets.rows, sets.images_by_rank, images, strict=True)
        if count
    ]
    return (
        torch.stack([share * by_plcc for share, (by_plcc, _) in found]).sum(),
        torch.stack([share * by_rank for share, (_, by_rank) in found]).sum(),
    )


def regression_costs(
    output: StudentOutput,
    mos: Float[Tensor, " b"],
    config: ObjectiveConfig,
    weights: Float[Tensor, " b"] | None,
    *,
    images: int,
    random: int,
) -> Float[Tensor, "k h"]:
    """What every random crop of the first `images` images adds to the regression.

    Where several readouts make up a score, it is the mean of what they cost each for itself:
    readouts that only learned to be right together would be of one opinion, and their mean no
    better than one of them (decision 0016).
    """
    judged = [output.score] if output.readouts is None else output.readouts.unbind(dim=1)
    errors = [crop_errors(one, mos, images=images, random=random) for one in judged]
    return torch.stack([error_costs(one, config, weights) for one in errors]).mean(dim=0)


def crop_errors(
    score: Float[Tensor, " n"], mos: Float[Tensor, " b"], *, images: int, random: int
) -> Float[Tensor, "k h"]:
    """Absolute error of every random crop of the first `images` images."""
    scores = score.reshape(len(mos), -1)[:images, :random]
    return (scores - mos[:images, None]).abs()


def error_costs(
    error: Float[Tensor, "k h"], config: ObjectiveConfig, weights: Float[Tensor, " b"] | None
) -> Float[Tensor, "k h"]:
    """What each crop's absolute error adds to the regression.

    Args:
        error: Of `crop_errors`.
        config: Has the kind of regression.
        weights: Of the batch's images, padding last; None: all 1.
    """
    cost = error
    if config.regression == "l2":
        cost = error**2
    elif config.regression == "huber":
        delta = config.huber_delta
        cost = torch.where(error < delta, error**2 / (2 * delta), error - delta / 2)
    return cost if weights is None else cost * weights[: len(error), None]


def plan_objective(config: ObjectiveConfig, chip: Chip, *, width: int) -> LossPlan | None:
    """What the contrastive term of a run computes in, before a step is taken; None without one.

    Args:
        config: Backend and precision as asked for.
        chip: Where the embeddings lie: `kernels.read_chip(device)`.
        width: Width of the embeddings.

    Raises:
        ValueError: If it cannot be had on that chip; the message begins with the key.
    """
    if config.contrastive_weight == 0:
        return None
    try:
        return plan_loss(chip, width=width, precision=config.precision, backend=config.backend)
    except ValueError as error:
        raise ValueError(f"objective.{error}") from error


def _contrast_within_sets(
    embedding: Float[Tensor, "n d"],
    ids: Int64[Tensor, " b"],
    config: ObjectiveConfig,
    *,
    sets: BatchSets,
    random: int,
    overlap: Float[Tensor, "b h h"] | None,
    keys: Float[Tensor, "n d"] | None,
    validate: bool,
) -> _Contrast:
    """One contrastive loss a set, over that set's crops alone; the mean over all rows."""
    width = embedding.shape[-1]
    crops = embedding.reshape(len(ids), -1, width)
    by_image = None if keys is None else keys.reshape(len(ids), -1, width)
    images = [sum(counts) for counts in sets.images_by_rank]
    found = []
    for rows, counts in zip(sets.rows, sets.images_by_rank, strict=True):
        # Every rank leaves the same sets out, so all meet in the others' exchanges.
        if not sum(counts):
            continue
        one = _contrast(
            crops[rows].flatten(0, 1),
            ids[rows],
            config,
            images=len(rows),
            images_by_rank=counts,
            random=random,
            overlap=None if overlap is None else overlap[rows],
            keys=None if by_image is None else by_image[rows].flatten(0, 1),
            validate=validate,
        )
        share = sum(counts) / sum(images)
        found.append([share * value for value in one])
    return _Contrast(*(torch.stack(values).sum() for values in zip(*found, strict=True)))


def _contrast(
    embedding: Float[Tensor, "n d"],
    ids: Int64[Tensor, " b"],
    config: ObjectiveConfig,
    *,
    images: int,
    images_by_rank: tuple[int, ...],
    random: int,
    overlap: Float[Tensor, "b h h"] | None,
    keys: Float[Tensor, "n d"] | None,
    validate: bool,
) -> _Contrast:
    """Split embeddings into rows and hubs, leave padding out, and call the kernel."""
    crops = embedding.reshape(len(ids), -1, embedding.shape[-1])[:images]
    rows, hubs = crops[:, :random], crops[:, random]
    teacher_rows = None
    if keys is not None:
        by_image = keys.reshape(len(ids), -1, keys.shape[-1])[:images]
        teacher_rows = by_image[:, :random].flatten(0, 1)
        hubs = by_image[:, random]
    found = manifold_contrastive_loss(
        rows.flatten(0, 1),
        hubs,
        ids[:images].repeat_interleave(random),
        temperature=config.temperature,
        intra_weight=config.intra_weight,
        overlap=overlap[:images].flatten(0, 1) if overlap is not None else None,
        include_positive=config.include_positive,
        keys=teacher_rows,
        gather=True,
        rank_sizes=[(count * random, count) for count in images_by_rank],
        backend=config.backend,
        precision=config.precision,
        validate=validate,
    )
    return _Contrast(
        found.loss, found.intra_share, found.intra_similarity, found.positive_similarity
    )
