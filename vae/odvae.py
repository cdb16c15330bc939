"""OD-VAE, variant 4: the published omni-dimensional compression VAE (its encoder's outer blocks are 2D)."""

from diffusers.configuration_utils import register_to_config

from lvdm.errors import UserError
from vae.univae import UniVAE


class ODVAE(UniVAE):
    """OD-VAE (variant 4) is UniVAE with one temporal kernel of 3, by default with the published norm and upsampling.

    `norm="frame", upsample="nearest"` makes it exactly causal, at the price of not being the published network.
    """

    ignore_for_config = ("kernels", "fuse", "refine", "inject")

    @register_to_config
    def __init__(
        self,
        z: int = 4,
        width: int = 128,
        mult: tuple[int, ...] = (1, 2, 4, 4),
        blocks: int = 2,
        variant: int = 4,
        norm: str = "clip",
        upsample: str = "trilinear",
        latent_mean: tuple[float, ...] | None = None,
        latent_std: tuple[float, ...] | None = None,
    ):
        if variant != 4:
            raise UserError(f"variant={variant}: expected 4, the published OD-VAE")
        super().__init__(
            z=z,
            width=width,
            mult=mult,
            blocks=blocks,
            kernels=(3,),
            norm=norm,
            upsample=upsample,
            latent_mean=latent_mean,
            latent_std=latent_std,
        )
