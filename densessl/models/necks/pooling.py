"""Necks without weights of their own: the class token, and the average."""

from __future__ import annotations

from torch import Tensor, nn

from densessl.errors import DenseSSLError
from densessl.models.features import Tokens
from densessl.registry import MODELS


class Neck(nn.Module):
    """How tokens become one representation, ``(B, D)`` each.

    A neck answers three questions: the representation of a view (``pool``), of a patch
    before its projector (``normalize``), and of a set of patches (``aggregate``).

    Attributes:
        needs_patches: whether ``pool`` reads patch tokens.
    """

    needs_patches = True

    def pool(self, tokens: Tokens) -> Tensor:
        """Representation of each image, ``(B, D)``."""
        raise NotImplementedError

    def normalize(self, patches: Tensor) -> Tensor:
        """Patch tokens ``(..., D)`` as the pooled representation is normalised."""
        return patches

    def aggregate(self, patches: Tensor, index: Tensor, valid: Tensor) -> Tensor:
        """Representation of a set of patches around each of ``M`` places.

        Args:
            patches: ``(B, N, D)``, not normalised.
            index: ``(B, M, k)`` raster indices of each set.
            valid: ``(B, M, k)`` bool, which of them count; at least one a set.

        Returns:
            ``(B, M, D)``.
        """
        chosen = gather_patches(patches, index)
        share = valid[..., None].to(patches.dtype)
        return self.normalize((chosen * share).sum(2) / share.sum(2))


def gather_patches(patches: Tensor, index: Tensor) -> Tensor:
    """``patches[b, index[b, m, j]]``, ``(B, M, k, D)`` of ``(B, N, D)``."""
    flat = index.flatten(1)[..., None].expand(-1, -1, patches.shape[-1])
    return patches.gather(1, flat).unflatten(1, index.shape[1:])


@MODELS.register_module()
class ClassTokenNeck(Neck):
    """The class token is the view's representation (DINO on ViT).

    Args:
        embed_dims: width of the tokens; given by the algorithm.
    """

    needs_patches = False

    def __init__(self, embed_dims: int) -> None:
        super().__init__()

    def pool(self, tokens: Tokens) -> Tensor:
        """The class token, ``(B, D)``."""
        if tokens.cls is None:
            raise DenseSSLError(
                'ClassTokenNeck: the backbone has no class token; set cls_token=True, '
                'or use AveragePoolNeck or ClassAttentionNeck'
            )
        return tokens.cls


@MODELS.register_module()
class AveragePoolNeck(Neck):
    """The mean patch token is the view's representation (Swin, ResNet).

    Args:
        embed_dims: width of the tokens; given by the algorithm.
        norm: LayerNorm after the mean, for backbones without a final norm.
    """

    def __init__(self, embed_dims: int, norm: bool = False) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(embed_dims, eps=1e-6) if norm else nn.Identity()

    def pool(self, tokens: Tokens) -> Tensor:
        """The mean over patches, ``(B, D)``."""
        return self.norm(tokens.patches.mean(1))

    def normalize(self, patches: Tensor) -> Tensor:
        """The same LayerNorm on patches."""
        return self.norm(patches)
