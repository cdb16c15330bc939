"""What moves and what is kept: one layout from end to end, no fp32 in bf16, little kept for the backward pass."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import vae
import vae.blocks
from lvdm.metrics.lpips import LPIPS
from lvdm.rng import generator
from vae.blocks import GroupCausalConv3d, Norm, ResBlock, interleaved, interpolated, repeated
from vae.cvvae import ChannelUpsample
from vae.discriminators import PatchGAN
from vae.ivvae import RMSNorm

MOVES = {"aten::clone", "aten::copy_", "aten::_to_copy", "aten::contiguous"}
AFTER = ("aten::convolution", "aten::cat", "aten::add", "aten::native_group_norm", "aten::silu")


class Watch(TorchDispatchMode):
    """Notes every operator: its name, its inputs and its output."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        out = operator(*args, **(kwargs or {}))
        first = out[0] if isinstance(out, list | tuple) else out
        if isinstance(first, torch.Tensor):
            self.seen.append((operator._schema.name, args, first))
        return out


def clip(*shape):
    return torch.rand(shape, generator=generator(0, "clip")) * 2 - 1


def ndhwc(x):
    return x.contiguous(memory_format=torch.channels_last_3d)


@pytest.mark.parametrize(("name", "grown", "other"), [("univae", 14, 2), ("odvae", 1, 0), ("ivvae", 25, 3)])
@torch.no_grad()
def test_ndhwc_goes_through_the_model_without_a_copy(name, grown, other):
    """Copies are made where frames or pixels are repeated or grouped (`grown`); others are two where features of D1
    enter D2, its frames and the even ones of D1, and IV-VAE's choice of frames."""
    model = vae.build(name, **vae.registry.entry(name).tiny, **({"refine": True} if name == "univae" else {})).eval()
    x = ndhwc(clip(2, 3, 9, 24, 16))
    with Watch() as watch:
        z = model._moments(x).chunk(2, 1)[0]
        model._frames(z)
        if name == "univae":
            model._refined(z)
    for operator, given, out in watch.seen:
        if operator.startswith(AFTER) and out.ndim in (4, 5):
            assert out.stride(1) == 1, (operator, out.shape, out.stride())
        if operator == "aten::convolution":
            assert given[0].stride(1) == 1, (given[0].shape, given[0].stride())
    moved = [out for operator, _, out in watch.seen if operator in MOVES and out.ndim >= 4]
    assert sum(out.ndim > 5 for out in moved) == grown
    assert sum(out.ndim <= 5 for out in moved) == other


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d])
@pytest.mark.parametrize("size", [(1, 2), (2, 1), (4, 1), (4, 2)])
def test_growth_is_interpolation_and_keeps_ndhwc(layout, size):
    x = clip(2, 6, 4, 3, 5).double().contiguous(memory_format=layout)
    factors = (float(size[0]), float(size[1]), float(size[1]))
    for frames in (x, x[:, :, 1:]):
        for grow, mode, atol in ((repeated, "nearest", 0), (interpolated, "trilinear", 1e-12)):
            y = grow(frames, *size)
            torch.testing.assert_close(y, F.interpolate(frames, scale_factor=factors, mode=mode), rtol=0, atol=atol)
            if layout == torch.channels_last_3d and (mode == "nearest" or frames is x):
                assert y.is_contiguous(memory_format=layout)
    assert repeated(x[:, :, :1], 4, 1)._base is not None  # of one frame, a view
    assert interpolated(x.to("meta"), *size).shape == repeated(x, *size).shape  # which has no autocast


def test_clips_are_interleaved_in_one_layout():
    a, b, c = (clip(2, 6, 4, 3, 5) for _ in range(3))
    expected = torch.stack([a, b + 1, c + 2], 3).flatten(2, 3)
    assert torch.equal(interleaved(a, b + 1, c + 2), expected)
    grown = interleaved(ndhwc(a), ndhwc(b + 1), ndhwc(c + 2))
    assert torch.equal(grown, expected) and grown.is_contiguous(memory_format=torch.channels_last_3d)


def test_time_grows_out_of_channels_in_one_layout():
    """As CV-VAE has it, whose convolution takes its input as it is."""
    up, x = ChannelUpsample(8, 2).requires_grad_(False), ndhwc(clip(2, 8, 3, 4, 6))
    with Watch() as watch:
        y = up(x)
    torch.testing.assert_close(y, up(x.contiguous()))
    assert y.shape == (2, 8, 5, 8, 12) and y.stride(1) == 1
    assert sum(name in MOVES for name, *_ in watch.seen) == 1  # where pixels are repeated


def test_group_causal_convolution_works_in_one_layout():
    conv = GroupCausalConv3d(8, 8).requires_grad_(False)
    with Watch() as watch:
        y = conv(ndhwc(clip(2, 8, 9, 8, 8)))
    assert y.stride(1) == 1 and all(x[0].stride(1) == 1 for name, x, _ in watch.seen if name == "aten::convolution")


@pytest.mark.parametrize("module", ["vae", "critic", "frame critic", "lpips"])
def test_nothing_large_is_fp32_under_autocast(module):
    """But for the frames themselves, weights, statistics and what LPIPS compares."""
    torch.manual_seed(0)
    x = clip(1, 3, 5, 32, 32)
    if module == "vae":
        model = vae.build("univae", **vae.registry.entry("univae").tiny, refine=True)
        run = partial(_encoded_and_refined, model, x)
    elif module == "lpips":
        run = partial(_features, LPIPS("vgg", pretrained=False), x)
    else:
        run = partial(PatchGAN(2 if module == "frame critic" else 3, 8), x)
    with torch.autocast("cpu", torch.bfloat16), Watch() as watch:
        run()
    products = [out.dtype for name, _, out in watch.seen if name == "aten::convolution"]
    assert products and set(products) == {torch.bfloat16}
    wide = [(name, tuple(out.shape)) for name, _, out in watch.seen if out.dtype == torch.float32 and out.ndim >= 4]
    wide = [(name, shape) for name, shape in wide if 3 not in shape[1:3] and shape[0] in (1, 5)]
    assert not wide


@pytest.mark.parametrize("name", ["cvvae", "ivvae", "ospvae", "osvae"])
@torch.no_grad()
def test_what_goes_from_block_to_block_is_bf16_under_autocast(name):
    torch.manual_seed(0)
    model = vae.build(name, **vae.registry.entry(name).tiny).eval()
    with torch.autocast("cpu", torch.bfloat16), Watch() as watch:
        model._frames(model._moments(clip(1, 3, 8 if name == "osvae" else 5, 32, 32)).chunk(2, 1)[0])
    wide = [(name, tuple(out.shape)) for name, _, out in watch.seen if out.dtype == torch.float32 and out.ndim >= 4]
    assert not [case for case in wide if case[0].startswith(AFTER) and 3 not in case[1][1:3]]


def test_the_norm_of_ivvae_gives_the_dtype_it_is_given():
    x = clip(1, 8, 2, 4, 4).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        assert RMSNorm(8)(x).dtype == torch.bfloat16
    torch.testing.assert_close(RMSNorm(8)(x), RMSNorm(8)(x.float()).bfloat16(), rtol=0.02, atol=0.02)


def _encoded_and_refined(model, x):
    return model._refined(model._moments(x).chunk(2, 1)[0])


def _features(distance, x):
    return list(distance._features(x[0].transpose(0, 1)))


# ---------------------------------------------------------------------------------------------------------------------
# What training keeps


def block():
    torch.manual_seed(0)
    return ResBlock(16, 16, "3d", partial(Norm, mode="frame"))


def kept_and_gradients(module, x):
    """The bytes that a forward pass keeps beside weights, and the gradients of a backward pass."""
    kept = {}

    def keep(tensor):
        if not isinstance(tensor, nn.Parameter):
            kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = module(x)
    y.square().mean().backward()
    return sum(kept.values()), [x.grad, *(p.grad for p in module.parameters())]


def test_a_residual_block_keeps_two_tensors_and_the_same_gradients(monkeypatch):
    """Its input and what its convolutions pass on; else also what each norm and SiLU makes, and the padding."""
    x = clip(1, 16, 9, 16, 16)
    kept, gradients = kept_and_gradients(block(), x.clone().requires_grad_())
    assert kept == 2 * x.nbytes
    monkeypatch.setattr(vae.blocks, "recomputed", lambda function, *inputs: function(*inputs))
    plain, expected = kept_and_gradients(block(), x.clone().requires_grad_())
    assert plain > 6 * x.nbytes
    for a, b in zip(gradients, expected, strict=True):
        assert torch.equal(a, b)


def test_two_backward_passes_through_one_graph_agree():
    """As the adaptive weight of the adversarial loss takes them."""
    module, x = block(), clip(1, 16, 5, 8, 8)
    y = module(x).square().mean()
    first, second = (torch.autograd.grad(y, module.conv2.weight, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_compiled_blocks_are_one_graph_whose_backward_repeats_no_convolution():
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.partitioners import min_cut_rematerialization_partition

    graphs = []

    def note(graph, inputs):
        graphs.append([str(node.target) for node in graph.graph.nodes])
        return make_boxed_func(graph.forward)

    backend = aot_autograd(fw_compiler=note, bw_compiler=note, partition_fn=min_cut_rematerialization_partition)
    module, x = block(), clip(1, 16, 5, 8, 8).requires_grad_()
    y = torch.compile(module, fullgraph=True, backend=backend)(x)
    y.sum().backward()
    torch.testing.assert_close(y, module(x))
    forward, backward = graphs
    assert forward.count("aten.convolution.default") == 2 and backward.count("aten.convolution.default") == 0
