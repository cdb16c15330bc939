"""What a diffusion transformer draws while it trains: videos of its averaged weights, always from the same noise."""

from pathlib import Path
from typing import Any

import torch

import vae
from dit.conditioning import Condition
from dit.sampling import draw, guidance_of
from lvdm.errors import UserError
from lvdm.latents import LatentSpace
from lvdm.media import contact_sheet, to_uint8, write_mp4
from lvdm.rng import generator
from lvdm.samplers import make_scheduler
from lvdm.trackers import log_media
from train.configs import TrainDiT


class Preview:
    """Draws `config.preview_count` videos, of all classes in turn, from the noise that `lvdm sample` gives to them."""

    def __init__(self, config: TrainDiT, model: Any, space: LatentSpace):
        """Raises UserError where `config.preview_vae` is not the VAE of the store or the guidance not for the model."""
        self.config, self.model, self.space = config, model, space
        self.guidance = guidance_of(model, config.preview_guidance)
        self.vae = vae.load(config.preview_vae)
        if self.vae.latent_sha256() != self.space.vae_sha256:
            raise UserError(f"preview_vae={config.preview_vae}: not the VAE whose latents are in {config.latents}")

    @torch.no_grad()
    def show(self, folder: Path, samples: int, trackers: list[Any]) -> None:
        """Writes <samples>.mp4 (side by side) and .png (a row a video), and shows them to the trackers."""
        folder.mkdir(exist_ok=True)
        videos = self._draw()
        path = folder / f"{samples:09d}.mp4"
        write_mp4(path, torch.cat(list(videos), dim=2), self.space.fps)
        contact_sheet(list(videos), path.with_suffix(".png"), labels=self._names() or None)
        picture = torch.cat([torch.cat(list(video[:: max(1, len(video) // 8)]), dim=1) for video in videos])
        log_media(trackers, samples, {"preview": picture}, {"preview_video": path})

    def _draw(self) -> torch.Tensor:
        """uint8 (N, T, H, W, 3)."""
        config, model = self.config, self.model
        device, training = next(model.parameters()).device, model.training
        model.eval()
        generators = [generator(config.seed, "sample", i) for i in range(config.preview_count)]
        scheduler = make_scheduler(config.objective)
        latents = draw(model, self._condition(), generators, scheduler, config.preview_steps, self.guidance)
        model.train(training)
        self.vae.to(device)  # only for as long as it is needed
        z = self.space.scale.denormalise(latents)
        frames = [self.vae.decode(one[None], num_frames=self.space.num_frames).sample for one in z]
        self.vae.to("cpu")
        return to_uint8(torch.cat(frames).cpu()).permute(0, 2, 3, 4, 1)

    def _labels(self) -> list[int]:
        """Of all classes in turn; [] for an unconditional model."""
        count = self.model.config.num_classes
        return [i % count for i in range(self.config.preview_count)] if count else []

    def _names(self) -> list[str]:
        return [self.space.classes[label] for label in self._labels()]

    def _condition(self) -> Condition:
        labels = self._labels()
        return Condition.of_classes(labels, self.model.config.num_classes) if labels else Condition()
