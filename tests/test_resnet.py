"The residual block against one written with PyTorch's functions, and the network from our layers and from torch.nn's."
import copy
import io

import pytest
import torch
import torch.nn.functional as F
from common import exact
from torch import nn
from torch.testing import assert_close

from miniai import norm
from miniai.callbacks import MixedPrecisionCB
from miniai.gradcheck import check_grads
from miniai.learner import Learner
from miniai.losses import CrossEntropyLoss
from miniai.module import check_twin
from miniai.optim import AdamW
from miniai.resnet import ResBlock, conv_bn, layers, resnet
from miniai.training import Dataset, get_dls

F64 = torch.float64
SHAPES = [(3, 3, 1), (3, 5, 1), (5, 3, 1), (3, 3, 2), (3, 5, 2), (4, 2, 3)]   # channels in, out, stride
SIZES = [(1, 8, 8), (2, 7, 7), (3, 5, 6), (2, 1, 4)]                          # images, height, width


class Twin(nn.Module):
    "The block without `miniai`: names of parameters as in `ResBlock`, arithmetic in PyTorch's functions"
    def __init__(self, c, o, stride):
        super().__init__()
        self.stride, conv = stride, lambda *args: nn.Conv2d(*args, bias=False)
        self.convs = nn.Sequential(conv(c, o, 3), nn.BatchNorm2d(o), nn.ReLU(), conv(o, o, 3), nn.BatchNorm2d(o))
        if stride > 1 or c != o:
            pool = [nn.Identity()] if stride > 1 else []
            self.shortcut = nn.Sequential(*pool, *([conv(c, o, 1), nn.BatchNorm2d(o)] if c != o else []))

    def forward(self, x):
        conv1, norm1, _, conv2, norm2 = self.convs
        f = norm2(F.conv2d(norm1(F.conv2d(x, conv1.weight, stride=self.stride, padding=1)).clamp(min=0), conv2.weight, padding=1))
        if self.stride > 1:
            edge = F.pad(x, (1, 1, 1, 1)).unfold(2, 3, self.stride).unfold(3, 3, self.stride)
            x = edge.mean((-1, -2))
        if hasattr(self, 'shortcut'):
            for m in self.shortcut: x = m(x)
        return F.relu(x + f)


def awake(m):
    "No weight at its start value: the zeros would hide half of the block"
    gen = torch.Generator().manual_seed(0)
    for p in m.parameters():
        if p.ndim == 1: p.data.copy_(torch.rand(p.shape, generator=gen) + .5)
    return m


def images(*shape, dtype=F64): return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize('mode', ['train', 'eval'])
@pytest.mark.parametrize('size', SIZES)
@pytest.mark.parametrize('c, o, stride', SHAPES)
def test_the_block_is_the_twin_of_one_in_pytorchs_functions(c, o, stride, size, mode):
    n, h, w = size
    ours, twin = ResBlock(c, o, stride).to(F64), awake(Twin(c, o, stride).to(F64))
    x = images(n, c, h, w)
    if mode == 'train' and n*-(-h//stride)*-(-w//stride) < 2: return
    check_twin(getattr(ours, mode)(), getattr(twin, mode)(), x)
    assert ours(x).shape == (n, o, -(-h//stride), -(-w//stride))


@pytest.mark.parametrize('c, o, stride', SHAPES)
def test_the_block_from_torch_layers_is_the_same(c, o, stride):
    check_twin(ResBlock(c, o, stride).to(F64), awake(ResBlock(c, o, stride, nn=nn).to(F64)), images(2, c, 5, 7))


def test_gradients_by_central_differences():
    torch.manual_seed(0)
    block = awake(ResBlock(2, 3, 2).to(F64))
    x, *params = (t.detach().clone() for t in (images(2, 2, 5, 5), *block.parameters()))
    names = [name for name, _ in block.named_parameters()]

    def loss(x, *params): return torch.func.functional_call(block, dict(zip(names, params)), x).square().sum()
    check_grads(loss, [x, *params], rtol=1e-5)


@pytest.mark.parametrize('c, o, stride', SHAPES)
def test_a_new_block_is_the_relu_of_its_shortcut(c, o, stride):
    block, x = ResBlock(c, o, stride), images(2, c, 6, 6, dtype=torch.float32)
    assert not block.convs[-1].weight.any()
    exact(block(x), (x if block.shortcut is None else block.shortcut(x)).relu())
    assert (block.shortcut is None) == (c == o and stride == 1)


def test_only_the_last_weight_of_a_block_starts_at_zero():
    block = ResBlock(3, 5, 2)
    zero = [name for name, p in block.named_parameters() if name.endswith('weight') and not p.any()]
    assert zero == ['convs.4.weight']


def test_from_zero_all_weights_learn_within_two_steps():
    torch.manual_seed(0)
    block = ResBlock(3, 3)
    before, opt = copy.deepcopy(block.state_dict()), torch.optim.SGD(block.parameters(), lr=.1)
    for _ in range(2):
        opt.zero_grad()
        (block(images(4, 3, 6, 6, dtype=torch.float32)) - 1).square().sum().backward()
        opt.step()
    assert [name for name, p in block.named_parameters() if torch.equal(p, before[name])] == []


@pytest.mark.parametrize('kernel_size, stride', [(1, 1), (3, 1), (3, 2), (5, 2)])
def test_conv_bn(kernel_size, stride):
    conv, bn = conv_bn(2, 3, kernel_size, stride)
    assert conv.bias is None and type(bn) is norm.BatchNorm2d and conv.weight.shape == (3, 2, kernel_size, kernel_size)
    assert bn(conv(images(2, 2, 7, 8, dtype=torch.float32))).shape == (2, 3, -(-7//stride), -(-8//stride))
    assert [type(m) for m in conv_bn(2, 3, nn=nn)] == [nn.Conv2d, nn.BatchNorm2d]


def test_the_namespace_has_our_layers_under_torchs_names():
    for name, kind in vars(layers).items():
        assert kind.__name__ == name and kind.__module__.startswith('miniai.') and hasattr(nn, name)


@pytest.mark.parametrize('lib', [layers, nn], ids=['ours', 'torch'])
@pytest.mark.parametrize('widths, in_channels, size', [((24, 48, 96, 192), 1, (28, 28)), ((4, 6), 3, (9, 13)), ((5,), 2, (6, 6)),
                                                       ((4, 4, 4), 1, (32, 20))])
def test_resnet_takes_images_of_any_size(lib, widths, in_channels, size):
    net = resnet(widths, in_channels, 7, nn=lib)
    assert net(images(2, in_channels, *size, dtype=torch.float32)).shape == (2, 7)
    assert sum(isinstance(m, ResBlock) for m in net) == len(widths) - 1


def test_the_default_resnet():
    net = resnet()
    assert sum(p.numel() for p in net.parameters()) == 681_586
    x, shapes = images(2, 1, 28, 28, dtype=torch.float32), []
    for m in net:
        x = m(x)
        if isinstance(m, ResBlock): shapes.append(tuple(x.shape[1:]))
    assert shapes == [(48, 14, 14), (96, 7, 7), (192, 4, 4)] and x.shape == (2, 10)
    assert [type(m).__name__ for m in net[:4]] == ['Conv2d', 'MaxPool2d', 'BatchNorm2d', 'ReLU']
    assert all(m.bias is None for m in net.modules() if hasattr(m, 'kernel_size') and hasattr(m, 'bias'))


@pytest.mark.parametrize('mode', ['train', 'eval'])
def test_resnet_is_the_twin_of_the_one_in_torch_layers(mode):
    ours, theirs = (getattr(resnet((2, 3, 4), nn=lib).to(F64), mode)() for lib in (layers, nn))
    check_twin(ours, awake(theirs), images(3, 1, 11, 14))


def test_without_arguments_by_name_there_is_no_layer_library_by_position():
    with pytest.raises(TypeError): ResBlock(2, 2, 1, nn)
    with pytest.raises(TypeError): resnet((2, 3), 1, 10, nn)


@pytest.mark.parametrize('ours_first', [True, False])
def test_a_state_loads_either_way_with_its_buffers(ours_first):
    a, b = (resnet((3, 4, 5), nn=lib) for lib in ((layers, nn) if ours_first else (nn, layers)))
    awake(a)(images(8, 1, 12, 12, dtype=torch.float32))
    file = io.BytesIO()
    torch.save(a.state_dict(), file)
    file.seek(0)
    assert [*a.state_dict()] == [*b.state_dict()]
    b.load_state_dict(torch.load(file, weights_only=True))
    x = images(4, 1, 12, 12, dtype=torch.float32)
    assert_close(a.eval()(x), b.eval()(x), rtol=1e-4, atol=1e-5)
    assert b[2].num_batches_tracked == 1 and b[2].running_mean.abs().sum() > 0


@pytest.mark.parametrize('lib', [layers, nn], ids=['ours', 'torch'])
def test_channels_last_changes_the_layout_and_not_the_result(lib):
    torch.manual_seed(0)
    net = awake(resnet((4, 6, 8), 3, nn=lib)).eval()
    x = images(3, 3, 12, 12, dtype=torch.float32)
    want = net(x)
    net.to(memory_format=torch.channels_last)
    mid = net[:5](x.contiguous(memory_format=torch.channels_last))
    assert mid.is_contiguous(memory_format=torch.channels_last)
    assert_close(net(x.contiguous(memory_format=torch.channels_last)), want, rtol=1e-4, atol=1e-5)


def test_autocast_is_near_torchs_in_outputs_and_gradients():
    torch.manual_seed(0)
    theirs = awake(resnet((4, 6, 8), nn=nn))
    ours = resnet((4, 6, 8))
    ours.load_state_dict(theirs.state_dict())
    x, grads = images(8, 1, 12, 12, dtype=torch.float32), []
    for net in ours, theirs:
        with torch.autocast('cpu', torch.bfloat16): out = net(x)
        assert out.dtype == torch.bfloat16
        out.float().square().sum().backward()
        assert all(p.grad.dtype == torch.float32 for p in net.parameters())
        grads.append(torch.cat([p.grad.flatten() for p in net.parameters()]))
    assert torch.cosine_similarity(*grads, dim=0) > .995


def test_a_learner_trains_it_in_bfloat16():
    torch.manual_seed(0)
    x, y = images(64, 1, 8, 8, dtype=torch.float32), torch.arange(64) % 2
    x[y == 1, :, :4] += 2
    net = resnet((4, 8), n_classes=2).to(memory_format=torch.channels_last)
    ds = Dataset(x, y)
    learn = Learner(net, get_dls(ds, ds, 16), CrossEntropyLoss(), AdamW, .02, [MixedPrecisionCB(torch.bfloat16)])
    records = learn.fit(4, progress=False)
    assert records[-1]['train_loss'] < .6*records[0]['train_loss']


def test_one_image_of_one_pixel_raises_in_training_and_works_in_evaluation():
    block = ResBlock(2, 3)
    with pytest.raises(ValueError): block(torch.ones(1, 2, 1, 1))
    assert block.eval()(torch.ones(1, 2, 1, 1)).shape == (1, 3, 1, 1)


def test_a_copy_shares_nothing():
    net = resnet((2, 3))
    twin = copy.deepcopy(net)
    assert not {p.data_ptr() for p in net.parameters()} & {p.data_ptr() for p in twin.parameters()}
