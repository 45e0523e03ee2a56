"""Convolutional networks train: gradients by our own formulas are torch's, on every engine; library models are adapted."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from export.build import export_bundle
from export.graphs.cut import cut_stage, find_pools, find_segments
from export.graphs.trace import forward_graph
from export.lowering.parity import check_parity
from export.lowering.worker import lower
from export.models.adapters.cnn import adapt_cnn
from export.models.adapters.common import run_trunk
from export.ops.convolutions import convolution, convolution_backward, max_pool_backward
from export.ops.decompositions import LEAN, constant_pad
from export.ops.rewrites import fold_batch_norm
from export.plans.resolve import resolve
from lamina.errors import ConfigError, CutError
from tests.export.adapters.timm_beside_cpu_torch import import_timm
from tests.export.training_blocks import ENGINES, check_trains

CLOSE = {"atol": 1e-4, "rtol": 1e-5}


@st.composite
def geometries(draw):
    """(sizes, kernel, stride, padding, dilation) for one or two size axes."""
    axes = draw(st.integers(1, 2))
    return tuple([draw(st.integers(low, high)) for _ in range(axes)] for low, high in ((4, 9), (1, 4), (1, 3), (0, 3), (1, 2)))


@settings(max_examples=60)
@given(geometries(), st.integers(1, 3), st.integers(1, 2), st.integers(1, 2), st.booleans())
def test_convolution_and_its_gradients_are_those_of_torch(geometry, groups, per_group, out_per_group, has_bias):
    sizes, kernel, stride, padding, dilation = geometry
    assume(all(n + 2 * p >= d * (k - 1) + 1 for n, k, p, d in zip(sizes, kernel, padding, dilation, strict=True)))
    torch.manual_seed(0)
    none = [0 for _ in sizes]
    x = torch.randn(2, groups * per_group, *sizes, requires_grad=True)
    weight = torch.randn(groups * out_per_group, per_group, *kernel, requires_grad=True)
    bias = torch.randn(groups * out_per_group, requires_grad=True) if has_bias else None
    leaves = [x, weight] + ([bias] if has_bias else [])
    y = torch.ops.aten.convolution(x, weight, bias, stride, padding, dilation, False, none, groups)
    gradient = torch.randn_like(y)

    torch.testing.assert_close(convolution(x, weight, bias, stride, padding, dilation, False, none, groups), y, **CLOSE)
    expected = torch.autograd.grad(y, leaves, gradient)
    found = convolution_backward(
        gradient, x, weight, None, stride, padding, dilation, False, none, groups, [True, True, has_bias]
    )
    for left, right in zip(found[: len(leaves)], expected, strict=True):
        torch.testing.assert_close(left, right, **CLOSE)


@settings(max_examples=30)
@given(geometries(), st.integers(1, 2), st.integers(1, 2))
def test_transposed_convolution_and_its_gradients_are_those_of_torch(geometry, groups, per_group):
    sizes, kernel, stride, _, dilation = geometry
    torch.manual_seed(0)
    x = torch.randn(2, groups * per_group, *sizes, requires_grad=True)
    weight = torch.randn(groups * per_group, 2, *kernel, requires_grad=True)
    options = (stride, [0 for _ in sizes], dilation, True, [s - 1 for s in stride], groups)
    expected = torch.ops.aten.convolution(x, weight, None, *options)
    torch.testing.assert_close(convolution(x, weight, None, *options), expected, **CLOSE)
    gradient = torch.randn_like(expected)
    found = convolution_backward(gradient, x, weight, None, *options, [True, True, False])
    for left, right in zip(found[:2], torch.autograd.grad(expected, (x, weight), gradient), strict=True):
        torch.testing.assert_close(left, right, **CLOSE)


@pytest.mark.parametrize(("kernel", "stride", "padding", "dilation"), [(3, 2, 1, 1), (2, 2, 0, 1), (2, 3, 0, 1), (3, 2, 1, 2)])
def test_the_gradient_of_a_max_pool_is_that_of_torch_also_where_values_are_equal(kernel, stride, padding, dilation):
    x = torch.randn(2, 3, 11, 9).relu().requires_grad_()  # many equal zeros
    y, indices = F.max_pool2d(x, kernel, stride, padding, dilation, return_indices=True)
    gradient = torch.randn_like(y)
    (expected,) = torch.autograd.grad(y, x, gradient)
    found = max_pool_backward(gradient, x.detach(), [kernel], [stride], [padding], [dilation], False, indices)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", ["silu", "mish"])
def test_the_gradient_of_an_activation_is_that_of_torch(name):
    x, gradient = torch.linspace(-9, 9, 50), torch.randn(50)
    operation = getattr(torch.ops.aten, f"{name}_backward").default
    torch.testing.assert_close(LEAN[operation](gradient, x), operation(gradient, x))


class Residual(nn.Module):
    """Two 3x3 convolutions around a shortcut, which a stride makes a convolution too."""

    def __init__(self, channels, out, stride, norm):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(channels, out, 3, stride, 1, bias=False), norm(out)
        self.conv2, self.norm2 = nn.Conv2d(out, out, 3, 1, 1, bias=False), norm(out)
        self.shortcut = nn.Identity() if stride == 1 else nn.Conv2d(channels, out, 1, stride)

    def forward(self, x):
        y = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(y + self.shortcut(x))


def folded_residual():
    block = Residual(2, 4, 2, nn.BatchNorm2d)
    for _ in range(3):
        block(torch.randn(4, 2, 6, 6) + 1)
    return fold_batch_norm(block)[0]


def depthwise():
    return nn.Sequential(
        nn.Conv2d(4, 4, 3, 1, 1, groups=4), nn.Hardswish(), nn.Conv2d(4, 4, 3, 2, 1, groups=4), nn.SiLU(), nn.Conv2d(4, 6, 1)
    )


# The others, and ExecuTorch with all of them, take minutes to lower: `make bench-fidelity`.
@pytest.mark.parametrize(
    ("engine", "make", "shape"),
    [
        pytest.param("onnxruntime", folded_residual, (2, 6, 6), id="onnxruntime-residual-folded-batch-norm-stride-2"),
        pytest.param("onnxruntime", depthwise, (4, 6, 6), id="onnxruntime-depthwise"),
        pytest.param("executorch", lambda: nn.Conv2d(2, 3, 3, 2, 1), (2, 6, 6), id="executorch-stride-2"),
    ],
)
def test_a_convolutional_block_trains_on_every_engine(engine, make, shape):
    check_trains(engine, make(), *shape)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_frozen_convolution_runs_on_every_engine(engine):
    block, x = nn.Sequential(nn.Conv2d(2, 4, 3, padding="same"), nn.ReLU()), torch.randn(2, 2, 6, 6)
    check_parity(lower(engine, forward_graph(block, (x,), 4)).data, engine, "frozen", "the block", block, (x,))


def timm_resnet():
    from timm.models.resnet import BasicBlock, ResNet

    return ResNet(BasicBlock, [2, 1, 1, 1], channels=(4, 6, 8, 8), stem_width=4, num_classes=3)


def timm_of(name):
    return lambda: import_timm().create_model(name, pretrained=False, num_classes=3)


def torchvision_resnet():
    from torchvision.models import resnet18

    return resnet18(num_classes=3)


@pytest.mark.parametrize(
    ("build", "layers", "width"),
    [
        pytest.param(timm_resnet, 5, 8, id="timm-resnet"),
        pytest.param(timm_of("resnet26d"), 8, 2048, id="timm-resnet-d"),
        pytest.param(timm_of("mobilenetv3_small_050"), 12, 288, id="timm-mobilenetv3"),
        pytest.param(timm_of("efficientnet_lite0"), 17, 1280, id="timm-efficientnet"),
        pytest.param(torchvision_resnet, 8, 512, id="torchvision-resnet"),
    ],
)
def test_a_library_s_network_becomes_a_trunk_with_a_layer_for_each_block(build, layers, width):
    import_timm()
    model = build()
    trunk = adapt_cnn(model, size=64)
    assert len(trunk.layers) == layers
    assert run_trunk(trunk, torch.randn(2, 3, 64, 64)).shape == (2, width)
    assert any(each.kind == "batch norm folded" and "never measured" in each.note for each in trunk.rewrites)
    assert any(True for _ in model.buffers())  # the user's model stays as it is


def test_an_image_size_that_cannot_be_is_refused():
    import_timm()
    with pytest.raises(ConfigError, match="size=-1 must be 1 or more pixels"):
        adapt_cnn(timm_resnet(), size=-1)


def test_a_network_that_grows_wider_trains_layer_by_layer(tmp_path):
    """The heads are shared by all stages: after a narrow block, they see zeros for the channels that are not there yet."""
    import_timm()
    found = resolve("tests.export.user_models:small_resnet", {"classes": 3, "rounds": 2, "layers_per_stage": 2})
    manifest = export_bundle(found.plan, tmp_path / "b", ("torch",), model=found.model, cache=tmp_path / "c")
    assert [encoder.feature_shape(depth)[0] for encoder in found.plan.model.encoders for depth in (2, 4)] == [6, 8]
    assert len(manifest.stages) == 2


def test_a_pool_that_gives_another_width_in_the_middle_is_refused_with_the_way_out():
    found = resolve("tests.export.user_models:narrow_then_wide", {"classes": 3})
    segments = find_segments(found.model, found.plan.model)
    with pytest.raises(CutError, match=r"stage 0 ends .*makes \(2, 4\) of 2 samples.* take \(2, 8\).*fill up with zeros"):
        cut_stage(segments, found.plan.model, found.plan.stages[0], pools=find_pools(found.model, found.plan.model))


@settings(max_examples=40)
@given(st.lists(st.integers(-2, 2), min_size=2, max_size=4).filter(lambda widths: len(widths) % 2 == 0 and min(widths) < 0))
def test_a_pad_by_negative_widths_is_made_of_slices(widths):
    x = torch.randn(2, 5, 6)
    assert torch.equal(constant_pad(x, widths, 1.5), torch.ops.aten.constant_pad_nd(x, widths, 1.5))
