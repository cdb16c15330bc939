"""The patch discriminators: the published sizes, their patches, and independence of the batch."""

import pytest
import torch

from vae.discriminators import PatchGAN


@pytest.mark.parametrize("norm", ["group", "batch"])
@pytest.mark.parametrize(("dims", "published"), [(3, 4_665_729), (2, 2_765_633)])
def test_published_parameter_count(dims, published, norm):
    with torch.device("meta"):
        critic = PatchGAN(dims, norm=norm)
    assert sum(p.numel() for p in critic.parameters()) == published


@pytest.mark.parametrize(
    ("dims", "clip", "patches"),
    [
        *((3, (17, 64, 64), (5, 8, 8)), (3, (25, 64, 96), (7, 8, 12)), (3, (1, 64, 64), (1, 8, 8))),
        *((3, (9, 32, 16), (3, 4, 2)), (2, (5, 256, 256), (5, 30, 30)), (2, (1, 24, 32), (1, 1, 2))),
    ],
)
def test_logits_a_patch(dims, clip, patches):
    assert PatchGAN(dims, 4)(torch.rand(2, 3, *clip)).shape == (2, 1, *patches)


def test_two_dimensions_judge_each_frame_alone_and_three_do_not():
    x = torch.rand(1, 3, 5, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    for dims, alone in ((2, True), (3, False)):
        torch.manual_seed(0)
        critic = PatchGAN(dims, 8)
        assert torch.allclose(critic(x)[:, :, :1], critic(x[:, :, :1]), atol=1e-6) == alone


def test_initial_weights_are_narrow_normals():
    torch.manual_seed(0)
    critic = PatchGAN(3, 16)
    convs = torch.cat([conv.weight.flatten() for conv in (*critic.convs, critic.out)])
    norms = torch.cat([norm.weight for norm in critic.norms])
    assert convs.std().item() == pytest.approx(0.02, rel=0.02) and abs(convs.mean().item()) < 1e-3
    assert norms.std().item() == pytest.approx(0.02, rel=0.3) and norms.mean().item() == pytest.approx(1.0, abs=0.01)
    assert all(not norm.bias.any() for norm in critic.norms)


def test_group_norm_judges_each_clip_alone_and_batch_norm_does_not():
    x = torch.rand(3, 3, 5, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    for norm, alone in (("group", True), ("batch", False)):
        torch.manual_seed(0)
        critic = PatchGAN(3, 8, norm)
        assert torch.allclose(critic(x)[:1], critic(x[:1]), atol=1e-6) == alone


@pytest.mark.parametrize("frames", [1, 2, 4, 5, 8, 9])
def test_bf16_gradients_are_those_of_fp32_within_rounding(frames):
    """From 2 to 8 frames some layer sees two, whose padding oneDNN gets wrong."""

    def gradients(**autocast):
        torch.manual_seed(0)
        critic, x = PatchGAN(3, 8), torch.rand(2, 3, frames, 16, 16) * 2 - 1
        junk = [torch.full_like(p, torch.nan, dtype=torch.bfloat16) for p in critic.parameters()]
        del junk  # what an allocation finds
        with torch.autocast("cpu", torch.bfloat16, **autocast):
            logits = critic(x)
        (logits.float() * torch.linspace(0, 1, logits.numel()).view_as(logits)).sum().backward()
        return [p.grad for p in critic.parameters()]

    for exact, rounded in zip(gradients(enabled=False), gradients(), strict=True):
        assert (rounded - exact).norm() < 0.3 * exact.norm()


def test_two_frames_are_padded_with_zeros_as_any_others():
    torch.manual_seed(0)
    critic = PatchGAN(3, 8)
    x = torch.rand(1, 3, 2, 16, 16) * 2 - 1
    expected, convs = x, [*critic.convs, critic.out]
    for i, conv in enumerate(convs):
        expected = conv(expected)
        if conv is not critic.out:
            expected = torch.nn.functional.leaky_relu(critic.norms[i - 1](expected) if i else expected, 0.2)
    torch.testing.assert_close(critic(x), expected)
