"""Frame rules, sizes and defaults of a spec, against counting."""

import pytest

from lvdm.errors import UserError
from vae.spec import VAESpec

RULES = {  # (time factor, first frames): the rule, and lengths with their latents
    (4, 1): ("4n+1", {1: 1, 2: 2, 5: 2, 6: 3, 17: 5, 25: 7}),
    (8, 1): ("8n+1", {1: 1, 9: 2, 10: 3, 25: 4}),
    (6, 1): ("6n+1", {1: 1, 7: 2, 8: 3}),
    (4, 4): ("4n", {1: 1, 4: 1, 5: 2, 16: 4, 17: 5}),
    (1, 1): ("any", {1: 1, 2: 2, 17: 17}),
}


@pytest.mark.parametrize(("rule", "expected"), RULES.items())
def test_lengths_and_latents(rule, expected):
    spec = VAESpec(rule[0], 8, 4, first_frames=rule[1])
    name, latents = expected
    assert spec.frame_rule == name
    for frames, count in latents.items():
        assert spec.latent_frames(frames) == count
        valid = spec.frames(count)
        assert valid == spec.valid_frames(frames) >= frames
        assert valid - frames < spec.time_factor  # the least that fits
        assert spec.valid_frames(valid) == valid
        spec.check_frames(valid)


@pytest.mark.parametrize(
    ("rule", "frames", "fits"),
    [
        ((4, 1), 16, "4n\\+1, e.g. 13 or 17"),
        ((4, 1), 2, "1 or 5"),
        ((4, 4), 17, "4n, e.g. 16 or 20"),
        ((4, 4), 3, "e.g. 4$"),
    ],
)
def test_lengths_off_the_rule_are_named_with_their_neighbours(rule, frames, fits):
    with pytest.raises(UserError, match=f"^{frames} frames: expected .*{fits}"):
        VAESpec(rule[0], 8, 4, first_frames=rule[1]).check_frames(frames)


def test_defaults_a_channel_and_exactness():
    spec = VAESpec(4, 8, 3)
    assert spec.latent_mean == (0.0,) * 3 and spec.latent_std == (1.0,) * 3
    assert spec.exact_streaming and not VAESpec(4, 8, 3, inexact="why").exact_streaming
    assert VAESpec(4, 8, 2, latent_std=[2, 3]).latent_std == (2, 3)
