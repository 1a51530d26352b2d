"""Crops become tokens: any timm ViT by name, or a convolutional stem under a few ViT blocks.

Every encoder gives CLS first and then the patch tokens of a square map, after its final norm, and
can say where CLS looked in its last layers. Attention weights are computed only when asked for:
the training forward keeps the fused attention.
"""

import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import timm
import torch
from jaxtyping import Float
from timm.layers import Attention, AttentionRope, build_sincos2d_pos_embed
from timm.models import load_pretrained, load_state_dict
from timm.models.eva import EvaAttention
from timm.models.vision_transformer import Block, checkpoint_filter_fn
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from lmcl.errors import ConfigError, LmclError
from lmcl.models.stem import Cells, PixelsOrFeatures, SqueezeLevels, small_stem
from lmcl.utils.validators import check_bounds

_SUPPORTED_ATTENTION = (Attention, AttentionRope, EvaAttention)
"""Attention modules whose queries and keys reach one fused call a layer, and no mask with them."""
_STEM_WIDTH, _STEM_HEADS = 192, 3
"""Of the blocks above a convolutional stem, unless the configuration says otherwise."""
_SUMMARY_HIDDEN = 512
_BRANCH_SCALE = 0.1
"""LayerScale of the blocks above a stem: they start close to passing the stem's features on, which
is what little data can use at once (docs/decisions/0006)."""


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """Which encoder, and where its first weights come from."""

    name: str = "deit3_small_patch16_224"
    """Any timm vision transformer, `squeezenet-vit` (ImageNet SqueezeNet 1.1 convolutions, read at
    three depths, as the patch embedding) or `conv-vit` (a small convolutional stem, to be trained
    from scratch)."""
    weights: str = ""
    """Empty: random. A file (.safetensors, .pth; .npz with torchvision's names for the SqueezeNet
    part), or `timm` for the named model's weights from the hub."""
    width: int | None = None
    """Token width; None: as the timm model is named, 192 otherwise."""
    depth: int | None = None
    """Transformer layers; None: as the timm model is named, 3 otherwise."""
    heads: int | None = None
    """Attention heads; None: as the timm model is named, 3 otherwise."""
    patch: int | None = None
    """Patch side in pixels; None: as the timm model is named, 16 otherwise. `squeezenet-vit` can
    have 16 or 32."""
    frozen: int = 0
    """How many of the stem's first modules keep their weights (`squeezenet-vit` only); all 13 of
    them can be run once and kept (`runtime.cells`)."""

    def __post_init__(self) -> None:
        check_bounds(
            "encoder", self, least={"width": 1, "depth": 1, "heads": 1, "patch": 1, "frozen": 0}
        )
        width, heads = self.token_width, self.heads or (_STEM_HEADS if self.has_stem else None)
        if width is not None and heads is not None and width % heads:
            raise ValueError(
                f"encoder.heads is {heads}, which does not divide encoder.width = {width}; set "
                f"encoder.width to a multiple of {heads}"
            )
        if self.has_stem and (self.width or _STEM_WIDTH) % 4:
            raise ValueError(
                f"encoder.width is {self.width}, and the positions of {self.name} are sines and "
                "cosines along two axes; set it to a multiple of 4"
            )

    @property
    def has_stem(self) -> bool:
        """Whether convolutions make its tokens, rather than a timm model."""
        return self.name in ("squeezenet-vit", "conv-vit")

    @property
    def token_width(self) -> int | None:
        """Width of the tokens, where it is known without asking timm."""
        return self.width or (_STEM_WIDTH if self.has_stem else None)


class Encoder(nn.Module):
    """What student and teacher see with; subclasses fill in `tokens` and `layers`."""

    width: int

    def tokens(self, pixels: PixelsOrFeatures) -> Float[Tensor, "n t d"]:
        """CLS and patch tokens after the final norm; CLS first, patches in reading order."""
        raise TypeError(f"{type(self).__name__} is abstract; use make_encoder")

    def layers(self) -> Sequence[nn.Module]:
        """The transformer blocks, first to last."""
        raise TypeError(f"{type(self).__name__} is abstract; use make_encoder")

    def attentions(self) -> Sequence[nn.Module]:
        """The attention modules of all layers, first to last."""
        return [layer.attn for layer in self.layers()]  # type: ignore[misc]

    @property
    def prefix(self) -> int:
        """How many tokens stand before the patches inside the layers (CLS and registers)."""
        return 1

    def cls_attention(self, pixels: PixelsOrFeatures, *, layers: int) -> Float[Tensor, "n g g"]:
        """CLS -> patch attention, mean over heads and the last `layers` layers.

        Returns:
            Non-negative maps over the g x g patch tokens, float32; register tokens are left out.

        Source: [Local Manifold Learning, 2024], saliency; the mean over heads is ours.
        """
        modules = self.attentions()
        if layers > len(modules):
            raise ConfigError(
                f"saliency.layers is {layers}, but the encoder has {len(modules)} layers; "
                f"set saliency.layers to at most {len(modules)}"
            )
        with _fused(modules), ClsAttentionRecorder() as seen:
            self.tokens(pixels)
        patches = torch.stack(seen.rows[-layers:]).mean(dim=0)[:, self.prefix :]
        grid = round(patches.shape[1] ** 0.5)
        return patches.reshape(-1, grid, grid)


class TimmEncoder(Encoder):
    """A timm vision transformer without its classifier."""

    def __init__(self, config: EncoderConfig, *, sizes: Sequence[int]) -> None:
        super().__init__()
        changes = {
            "embed_dim": config.width,
            "depth": config.depth,
            "num_heads": config.heads,
            "patch_size": config.patch,
        }
        try:
            self.vit = timm.create_model(
                config.name,
                pretrained=False,
                num_classes=0,
                img_size=sizes[0],
                dynamic_img_size=len(set(sizes)) > 1,
                **{name: value for name, value in changes.items() if value is not None},
            )
        except RuntimeError as error:
            near = timm.list_models(f"*{config.name.split('_')[0]}*vit*")[:3]
            hint = near or timm.list_models("deit3_*patch16_224")
            raise ConfigError(
                f"encoder.name = {config.name!r}: timm {timm.__version__} has no such model "
                f"({error}); try one of {', '.join(hint)}, or squeezenet-vit"
            ) from error
        except TypeError as error:
            raise ConfigError(
                f"encoder.name = {config.name!r} is none of timm's plain vision transformers "
                f"({error}); choose a vit_, deit or eva02 model, e.g. deit3_small_patch16_224"
            ) from error
        except AssertionError as error:
            raise ConfigError(
                f"encoder.name = {config.name!r} at {sizes[0]} pixels with {changes}: timm refuses "
                f"these sizes ({error}); encoder.width must be a multiple of the heads, and "
                "crops.size one of the patch"
            ) from error
        side = self.vit.patch_embed.patch_size[0] if hasattr(self.vit, "patch_embed") else 1
        if any(size % side for size in sizes):
            raise ConfigError(
                f"encoder.name = {config.name!r} cuts patches of {side} pixels, but the crop and "
                f"the view have {sizes[0]} and {sizes[-1]}; choose crops.size and saliency.view "
                f"as multiples of {side}"
            )
        if getattr(self.vit, "cls_token", None) is None or not hasattr(self.vit, "blocks"):
            raise ConfigError(
                f"encoder.name = {config.name!r} has no CLS token, and the teacher's saliency is "
                "CLS attention; choose a ViT with one, e.g. deit3_small_patch16_224"
            )
        if not all(
            isinstance(getattr(block, "attn", None), _SUPPORTED_ATTENTION)
            for block in self.vit.blocks
        ):
            raise ConfigError(
                f"encoder.name = {config.name!r} has blocks without an attention that can be "
                "listened to, and the teacher's saliency is CLS attention; choose a plain ViT, "
                "e.g. deit3_small_patch16_224"
            )
        self.width, heads = int(self.vit.embed_dim), self.vit.blocks[0].attn.num_heads
        if self.width % heads:
            raise ConfigError(
                f"encoder.name = {config.name!r} has {heads} heads and a width of {self.width}; "
                "set encoder.width to a multiple of encoder.heads"
            )

    @property
    def is_half(self) -> bool:
        """Whether its weights are bfloat16 (`to_bfloat16`)."""
        return bool(self.vit.cls_token.dtype == torch.bfloat16)

    @property
    def prefix(self) -> int:
        """CLS, and registers where the model has them."""
        return int(self.vit.num_prefix_tokens)

    def tokens(self, pixels: PixelsOrFeatures) -> Float[Tensor, "n t d"]:
        """CLS and patch tokens; register tokens are dropped."""
        if self.is_half:
            # Autocast would take every norm back to float32, and each product to bfloat16 again.
            with torch.autocast(pixels.device.type, enabled=False):
                out: Tensor = self.vit.forward_features(pixels.bfloat16()).float()
        else:
            out = self.vit.forward_features(pixels)
        if self.prefix == 1:
            return out
        return torch.cat([out[:, :1], out[:, self.prefix :]], dim=1)

    def layers(self) -> Sequence[nn.Module]:
        """All blocks of the timm model."""
        return list(self.vit.blocks)


class ConvVit(Encoder):
    """A convolutional stem whose cells are the patches of a short vision transformer.

    Positions are fixed two-dimensional sines, so any crop size can be used.
    """

    def __init__(self, stem: SqueezeLevels | Cells, config: EncoderConfig) -> None:
        super().__init__()
        self.width = config.width or _STEM_WIDTH
        self.stem = stem
        self.project = nn.Linear(stem.channels, self.width)
        self.about = (
            nn.Sequential(
                nn.Linear(stem.summary, _SUMMARY_HIDDEN),
                nn.GELU(),
                nn.Linear(_SUMMARY_HIDDEN, self.width),
            )
            if stem.summary
            else None
        )
        self.cls = nn.Parameter(torch.randn(1, 1, self.width) * 0.02)
        # Sines of full size would drown the features at first; where a crop lies matters little.
        self.position_scale = nn.Parameter(torch.full((1,), 0.1))
        self.blocks = nn.ModuleList(
            Block(self.width, config.heads or _STEM_HEADS, qkv_bias=True, init_values=_BRANCH_SCALE)
            for _ in range(config.depth or 3)
        )
        self.norm = nn.LayerNorm(self.width)

    def tokens(self, pixels: PixelsOrFeatures) -> Float[Tensor, "n t d"]:
        """CLS and patch tokens."""
        cells, whole = self.stem(pixels)
        patches = self.project(cells)
        grid = round(patches.shape[1] ** 0.5)
        patches = patches + self.position_scale * _positions(grid, self.width, patches)
        # CLS starts with what is known of the crop: it is about this crop from the first step.
        about = self.about(whole)[:, None] if self.about else patches.mean(dim=1, keepdim=True)
        cls = self.cls.to(patches.dtype) + about
        out = torch.cat([cls, patches], dim=1)
        for block in self.blocks:
            out = block(out)
        return self.norm(out)  # type: ignore[no-any-return]

    def layers(self) -> Sequence[nn.Module]:
        """The blocks above the stem."""
        return list(self.blocks)


def make_encoder(config: EncoderConfig, *, sizes: Sequence[int]) -> Encoder:
    """An encoder with random weights; never touches the network or a file.

    Args:
        config: Which encoder.
        sizes: Pixel sides it will be shown: the crop's first, then the whole-image view's.

    Raises:
        ConfigError: If the name is unknown or cannot serve the method.
    """
    if config.name == "squeezenet-vit":
        return ConvVit(SqueezeLevels(frozen=config.frozen, patch=config.patch or 16), config)
    if config.frozen:
        raise ConfigError(
            f"encoder.frozen = {config.frozen} is for squeezenet-vit, not {config.name!r}; "
            "set it to 0"
        )
    if config.name == "conv-vit":
        return ConvVit(small_stem(config.patch or 16), config)
    return TimmEncoder(config, sizes=sizes)


def load_weights(encoder: Encoder, config: EncoderConfig) -> Literal["random", "file", "hub"]:
    """Fill the encoder with the weights its configuration names, and say where they came from.

    Raises:
        ConfigError: If the file's tensors do not fit the encoder (exit code 5).
        LmclError: If the file is missing (exit code 4) or damaged (exit code 5), or the hub cannot
            be reached.
    """
    if not config.weights:
        return "random"
    if config.weights == "timm":
        _load_from_hub(encoder, config)
        return "hub"
    path = Path(config.weights)
    if not path.is_file():
        raise LmclError(
            f"encoder.weights = {config.weights!r}: there is no such file (looked in "
            f"{path.absolute().parent}); name an existing file, or leave it empty: random weights",
            exit_code=4,
        )
    try:
        if path.suffix == ".npz":
            _load_stem(encoder, path)
        else:
            _load_vit(encoder, path)
    except (RuntimeError, ValueError, KeyError) as error:
        raise ConfigError(
            f"encoder.weights = {config.weights!r} does not fit encoder.name = {config.name!r}: "
            f"{str(error).splitlines()[0]}; use the weights of that very architecture",
            exit_code=5,
        ) from error
    return "file"


class ClsAttentionRecorder(TorchFunctionMode):
    """Listens to the attention of every layer: where CLS looks, mean over heads, in float32.

    Queries and keys are taken as the layer hands them over: what it does to them before (rotary
    positions, biases kept apart, norms) differs from model to model.
    """

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[Float[Tensor, "n t"]] = []

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> object:
        """Call `func`; where it is attention, keep its first row."""
        if func is functional.scaled_dot_product_attention:
            query, key = args[:2]
            scaled = query[:, :, :1].float() * query.shape[-1] ** -0.5
            row = (scaled @ key.float().transpose(-2, -1)).softmax(dim=-1)
            self.rows.append(row[:, :, 0].mean(dim=1))
        return func(*args, **(kwargs or {}))


@contextmanager
def _fused(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Attention in one call, in which it can be listened to, also where it is spelled out."""
    before = [module.fused_attn for module in modules]
    for module in modules:
        module.fused_attn = True  # type: ignore[assignment]
    try:
        yield
    finally:
        for module, was in zip(modules, before, strict=True):
            module.fused_attn = was


def _positions(grid: int, width: int, like: Tensor) -> Float[Tensor, "t d"]:
    table: Tensor = build_sincos2d_pos_embed(
        [grid, grid], dim=width, interleave_sin_cos=True, device=like.device, dtype=torch.float32
    )
    found: Tensor = table.to(like.dtype)
    return found


def _load_stem(encoder: Encoder, path: Path) -> None:
    stem = encoder.stem if isinstance(encoder, ConvVit) else None
    if not isinstance(stem, SqueezeLevels):
        raise ValueError("an .npz file holds the SqueezeNet part of squeezenet-vit only")
    try:
        # numpy would leave such a file open.
        if not zipfile.is_zipfile(path):
            raise zipfile.BadZipFile("it is no .npz archive")
        stem.load(path)
    except RuntimeError:
        raise  # names or shapes that do not fit
    except Exception as error:
        raise _unreadable(path, error) from error


def _load_vit(encoder: Encoder, path: Path) -> None:
    if not isinstance(encoder, TimmEncoder):
        raise ValueError("a checkpoint file holds a timm model; this encoder takes an .npz file")

    def without_head(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
        kept = {name: value for name, value in state.items() if not name.startswith("head")}
        return checkpoint_filter_fn(kept, model)  # type: ignore[no-any-return]

    try:
        state = without_head(load_state_dict(str(path), weights_only=True), encoder.vit)
    except Exception as error:
        raise _unreadable(path, error) from error
    encoder.vit.load_state_dict(state)


def _unreadable(path: Path, error: Exception) -> LmclError:
    """Parsers say in any way they like that a file is none of theirs."""
    said = (str(error).splitlines() or ["nothing more is known"])[0]
    return LmclError(
        f"encoder.weights = {str(path)!r}: cannot be read as weights ({type(error).__name__}: "
        f"{said}); it is damaged or of another format: copy it again, or name a .safetensors, .pth "
        "or .npz file",
        exit_code=5,
    )


def _load_from_hub(encoder: Encoder, config: EncoderConfig) -> None:
    if not isinstance(encoder, TimmEncoder):
        raise ConfigError(f"encoder.weights = 'timm' is for timm models, not {config.name!r}")
    try:
        load_pretrained(encoder.vit, num_classes=0, filter_fn=checkpoint_filter_fn)
    except Exception as error:
        raise LmclError(
            f"encoder.weights = 'timm': the weights of {config.name!r} could not be fetched "
            f"({error}); on a machine without a network give encoder.weights a local file",
            exit_code=4,
        ) from error
