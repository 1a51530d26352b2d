"""Vision transformers of timm as encoders."""

import difflib
from collections.abc import Sequence

import timm
import torch
from jaxtyping import Float
from torch import Tensor, nn

from lmcl.errors import ConfigError
from lmcl.models.attention import SUPPORTED_ATTENTION
from lmcl.models.encoder import Encoder, EncoderConfig
from lmcl.models.stem import PixelsOrFeatures
from shards.text import printable


def _unknown(name: str, sizes: Sequence[int]) -> ConfigError:
    near = [one for one in near_models(name, count=12) if _is_accepted(one, sizes)][:3]
    near = near or ["deit3_small_patch16_224"]
    return ConfigError(
        f"encoder.name = {printable(name, 80)!r}: timm {timm.__version__} has no such model; try "
        f"one of {', '.join(near)}, or squeezenet-vit"
    )


def near_models(name: str, *, count: int = 3) -> list[str]:
    """Names of timm's models that a wrong name may stand for, the nearest first.

    Those of the family, which is what stands before the first `_`, where there are any.
    """
    known, asked = timm.list_models(), name[:80]
    family = asked.partition("_")[0]
    kin = [one for one in known if one.partition("_")[0] == family]
    return difflib.get_close_matches(asked, kin or known, n=count, cutoff=0.4) or kin[:count]


def _is_accepted(name: str, sizes: Sequence[int]) -> bool:
    try:
        with torch.device("meta"):
            TimmEncoder(EncoderConfig(name=name, width=48, depth=1, heads=3), sizes=sizes)
    except ConfigError:
        return False
    return True


def _as_stem(name: str) -> str:
    return f"set encoder.name = 'hybrid' and encoder.stem = {name!r}"


class TimmEncoder(Encoder):
    """A timm vision transformer without its classifier."""

    def __init__(self, config: EncoderConfig, *, sizes: Sequence[int]) -> None:
        super().__init__()
        changes = {
            "embed_dim": config.width,
            "depth": config.depth,
            "num_heads": config.heads,
            "patch_size": config.patch,
            "drop_path_rate": config.drop_path or None,
        }
        # Names with a scheme (hf-hub:, local-dir:) would fetch a configuration, or read a folder's.
        if not timm.is_model(config.name):
            raise _unknown(config.name, sizes)
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
            raise ConfigError(
                f"encoder.name = {config.name!r}: timm {timm.__version__} cannot make it "
                f"({printable(error)}); try another vision transformer, e.g. "
                "deit3_small_patch16_224, or squeezenet-vit"
            ) from error
        except TypeError as error:
            raise ConfigError(
                f"encoder.name = {config.name!r} is none of timm's plain vision transformers "
                f"({printable(error, 200)}); choose a vit_, deit or eva02 model, e.g. "
                f"deit3_small_patch16_224, or {_as_stem(config.name)}"
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
        if not hasattr(self.vit, "blocks"):
            raise ConfigError(
                f"encoder.name = {config.name!r} has no list of blocks, and the teacher's saliency "
                f"is their attention; {_as_stem(config.name)}"
            )
        if not all(
            isinstance(getattr(block, "attn", None), SUPPORTED_ATTENTION)
            for block in self.vit.blocks
        ):
            raise ConfigError(
                f"encoder.name = {config.name!r} has blocks without an attention that can be "
                "listened to, and the teacher's saliency is CLS attention; choose a plain ViT, "
                f"e.g. deit3_small_patch16_224, or {_as_stem(config.name)}"
            )
        self.has_own_cls = getattr(self.vit, "cls_token", None) is not None
        self.final_norm = config.final_norm
        self._leave_out_pooling()
        self.width, heads = int(self.vit.embed_dim), self.vit.blocks[0].attn.num_heads
        if self.width % heads:
            raise ConfigError(
                f"encoder.name = {config.name!r} has {heads} heads and a width of {self.width}; "
                "set encoder.width to a multiple of encoder.heads"
            )

    def _leave_out_pooling(self) -> None:
        """Take away, or freeze, what pools to one vector, where every token is wanted.

        A parameter that never gets a gradient stops training on several processes. Frozen ones
        stay under their names: models of earlier versions hold them.
        """
        pool = getattr(self.vit, "attn_pool", None)
        if pool is not None and not self.has_own_cls:
            self.vit.attn_pool = None
        elif pool is not None:
            pool.requires_grad_(False)
        if self.has_own_cls and not self.final_norm:
            self._norm_after_pooling().requires_grad_(False)

    def _norm_after_pooling(self) -> nn.Module:
        """The last norm, where timm puts it behind the pooling; else nothing."""
        found: nn.Module | None = getattr(self.vit, "fc_norm", None)
        return found if found is not None else nn.Identity()

    @property
    def is_half(self) -> bool:
        """Whether its weights are bfloat16 (`to_bfloat16`)."""
        return bool(next(self.vit.parameters()).dtype == torch.bfloat16)

    @property
    def prefix(self) -> int:
        """CLS, and registers where the model has them."""
        return int(self.vit.num_prefix_tokens)

    @property
    def has_cls(self) -> bool:
        """Whether the model has a CLS token of its own."""
        return self.has_own_cls

    def tokens(self, pixels: PixelsOrFeatures) -> Float[Tensor, "n t d"]:
        """CLS and patch tokens after the final norm; register tokens are dropped.

        Without a CLS token the mean of the patches stands in its place.
        """
        if self.is_half:
            # Autocast would take every norm back to float32, and each product to bfloat16 again.
            with torch.autocast(pixels.device.type, enabled=False):
                out = self._all_tokens(pixels.bfloat16()).float()
        else:
            out = self._all_tokens(pixels)
        patches = out[:, self.prefix :]
        if not self.has_own_cls:
            return torch.cat([patches.mean(dim=1, keepdim=True), patches], dim=1)
        return out if self.prefix == 1 else torch.cat([out[:, :1], patches], dim=1)

    def _all_tokens(self, pixels: PixelsOrFeatures) -> Tensor:
        out: Tensor = self.vit.forward_features(pixels)
        if self.has_own_cls and not self.final_norm:
            return out
        return self._norm_after_pooling()(out)  # type: ignore[no-any-return]

    def layers(self) -> Sequence[nn.Module]:
        """All blocks of the timm model."""
        return list(self.vit.blocks)
