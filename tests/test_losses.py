"What must hold of the losses beyond the chapter: edge cases, types, wrong targets, and what a layer keeps."
import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn, tensor
from torch.testing import assert_close

from miniai.gradcheck import check_grads
from miniai.losses import CrossEntropyLoss, cross_entropy, log_softmax, logsumexp, nll
from miniai.module import check_twin

inf, nan = torch.inf, torch.nan
integers = torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8
batch = {
    'small': [[1., 2., 3.], [0., -1., .5]],
    'thousands': [[1000., 0., -1000.], [-1000., -1000., -1001.]],
    '1e30': [[1e30, 1e30, 0.], [-1e30, 1e30, 3.]],
    'ties': [[0., 0., 0.], [2., 2., 2.]],
    'one_class': [[5.], [-3.]],
    'one_example': [[.3, -.2, 1.]],
    'masked': [[1., -inf, 3.], [-inf, 2., -inf]],
    'all_masked': [[-inf, -inf], [1., 2.]],
    'infinite': [[inf, 0.], [1., 2.]],
    'two_infinite': [[inf, inf], [1., -inf]],
    'nan': [[nan, 0.], [1., 2.]],
}
z64 = 3*torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
y = tensor([0, 3, 1, 1, 2])


def nodes(fn):
    "The names of all nodes of autograd's graph from `fn` on"
    return {fn.name()}.union(*(nodes(f) for f, _ in fn.next_functions if f is not None))


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
@pytest.mark.parametrize('logits', batch.values(), ids=batch)
def test_equals_torch(logits, dtype):
    z = tensor(logits, dtype=dtype)
    for ours, theirs in (logsumexp, torch.logsumexp), (log_softmax, torch.log_softmax):
        assert_close(ours(z), theirs(z, -1), equal_nan=True)
    assert_close(logsumexp(z, keepdim=True), torch.logsumexp(z, -1, keepdim=True), equal_nan=True)


@pytest.mark.parametrize('logits', batch.values(), ids=batch)
@pytest.mark.parametrize('label', [0, -1])
def test_cross_entropy_and_its_gradient_equal_torch(logits, label):
    a, b = (tensor(logits, requires_grad=True) for _ in range(2))
    target = torch.full((len(a),), range(a.shape[1])[label])
    ours, theirs = cross_entropy(a, target), F.cross_entropy(b, target)
    ours.backward()
    theirs.backward()
    assert_close((ours, a.grad), (theirs, b.grad), equal_nan=True)


def test_known_values():
    assert_close(logsumexp(tensor([[0., 3.]]).log()), tensor([3.]).log())
    assert_close(logsumexp(tensor([[5.]])), tensor([5.]))
    assert_close(logsumexp(tensor([[-inf, -inf], [inf, 0.], [-inf, 3.]])), tensor([-inf, inf, 3.]))
    assert_close(log_softmax(tensor([[1., 1.]])), -tensor([[2., 2.]]).log())
    assert_close(log_softmax(tensor([[-inf, 2., -inf]])).exp(), tensor([[0., 1., 0.]]))
    assert log_softmax(tensor([[-inf, -inf], [inf, 0.]])).isnan().all()
    assert cross_entropy(tensor([[1., -inf, 3.]]), tensor([1])) == inf


def test_more_and_fewer_dimensions():
    z = torch.randn(3, 2, 5)
    for part in z, z[0], z[0, 0]:
        assert_close(logsumexp(part), torch.logsumexp(part, -1))
        assert_close(log_softmax(part), torch.log_softmax(part, -1))


def test_close_large_logits_keep_their_digits():
    near = tensor([[10_000., 10_000.5]])
    want = torch.log_softmax(near.double(), -1).float()
    assert_close(log_softmax(near), want, rtol=1e-6, atol=0.)
    assert_close(CrossEntropyLoss()(near, tensor([0])), -want[0, 0], rtol=1e-6, atol=0.)


def test_gradients():
    check_grads(lambda z: logsumexp(z).square().sum(), [z64])
    check_grads(lambda z: (log_softmax(z)*z64.cos()).sum(), [z64])
    check_grads(lambda z: nll(z, y), [z64])
    check_grads(cross_entropy, [z64, y])


@pytest.mark.parametrize('column', [0, 1, 2])
def test_gradient_of_masked_classes(column):
    a, b = (tensor(batch['masked'], dtype=torch.float64, requires_grad=True) for _ in range(2))
    log_softmax(a)[:, column][1].backward()
    torch.log_softmax(b, -1)[:, column][1].backward()
    assert_close(a.grad, b.grad)


def test_the_maximum_is_a_constant_for_autograd():
    z = z64.clone().requires_grad_()
    for out in logsumexp(z), logsumexp(z, keepdim=True), log_softmax(z):
        assert not any('max' in name.lower() for name in nodes(out.grad_fn))


@pytest.mark.parametrize('dtype', integers)
def test_integer_types(dtype):
    logp = log_softmax(z64)
    assert_close(nll(logp, y.to(dtype)), F.nll_loss(logp, y))
    check_twin(CrossEntropyLoss(), nn.CrossEntropyLoss(), z64, y)
    z, w = (z64.clone().requires_grad_() for _ in range(2))
    CrossEntropyLoss()(z, y.to(dtype)).backward()
    F.cross_entropy(w, y).backward()
    assert_close(z.grad, w.grad)


def test_a_byte_label_of_200():
    z = torch.randn(2, 256)
    assert_close(cross_entropy(z, tensor([200, 3], dtype=torch.uint8)), F.cross_entropy(z, tensor([200, 3])))


wrong = {
    'float': (lambda: (z64, y.float()), TypeError, r'target has dtype torch.float32; labels must be integers: use target.long\(\)'),
    'double': (lambda: (z64, y.double()), TypeError, 'target has dtype torch.float64'),
    'bool': (lambda: (z64, y > 1), TypeError, 'target has dtype torch.bool'),
    'probabilities': (lambda: (z64, torch.softmax(z64, -1)), TypeError, 'target has dtype torch.float64'),
    'list': (lambda: (z64, y.tolist()), (AttributeError, TypeError), 'dtype|tensor'),
    'column': (lambda: (z64, y[:, None]), ValueError, r'target \(5, 1\).* use target.squeeze\(1\)'),
    'one_hot': (lambda: (z64, F.one_hot(y)), ValueError, r'target \(5, 4\)'),
    'too_few': (lambda: (z64, y[:4]), ValueError, r'input has shape \(5, 4\) and target \(4,\); required are \(n, c\) and \(n,\)'),
    'too_many': (lambda: (z64[:4], y), ValueError, r'target \(5,\)'),
    'scalar': (lambda: (z64, y[0]), ValueError, r'target \(\)'),
    'one_dimension': (lambda: (z64[0], y), ValueError, r'\(4,\)'),
    'one_dimension_c_labels': (lambda: (z64[0], y[:4]), ValueError, r'\(4,\)'),
    'three_dimensions': (lambda: (z64[None], y[:1]), ValueError, r'\(1, 5, 4\)'),
    'no_examples': (lambda: (z64[:0], y[:0]), ValueError, 'n at least 1'),
    'no_classes': (lambda: (z64[:, :0], y), (IndexError, RuntimeError), 'dim'),
    'negative': (lambda: (z64, tensor([0, 3, -1, 1, 2])), RuntimeError, 'index -1 is out of bounds for dimension 1 with size 4'),
    'too_large': (lambda: (z64, tensor([0, 3, 4, 1, 2])), RuntimeError, 'index 4 is out of bounds'),
    'torch_ignores': (lambda: (z64, tensor([0, 3, -100, 1, 2])), RuntimeError, 'index -100 is out of bounds'),
}


@pytest.mark.parametrize('func', [nll, cross_entropy, CrossEntropyLoss(), CrossEntropyLoss(label_smoothing=.1)],
                         ids=['nll', 'cross_entropy', 'layer', 'smoothed'])
@pytest.mark.parametrize(('args', 'error', 'match'), wrong.values(), ids=wrong)
def test_wrong_arguments_raise_and_change_nothing(func, args, error, match):
    args = args()
    before = [copy.deepcopy(a) for a in args]
    with pytest.raises(error, match=match): func(*args)
    for a, b in zip(args, before): assert torch.equal(a, b) if torch.is_tensor(a) else a == b


options = [{}, {'reduction': 'sum'}, {'label_smoothing': .1}, {'reduction': 'sum', 'label_smoothing': .3},
           {'label_smoothing': 1.}, {'label_smoothing': 0}]


@pytest.mark.parametrize('options', options, ids=str)
@pytest.mark.parametrize('n, c', [(5, 3), (1, 7), (6, 1), (1, 1), (33, 10)])
def test_layer_is_a_twin(options, n, c):
    ours, theirs, g = CrossEntropyLoss(**options), nn.CrossEntropyLoss(**options), torch.Generator().manual_seed(4)
    z, y = torch.randn(n, c, dtype=torch.float64, generator=g), torch.randint(c, (n,), generator=g)
    for factor in 1, 0, 1e3, 1e30: check_twin(ours, theirs, z*factor, y)
    check_twin(ours, theirs, z.float(), y.to(torch.uint8), rtol=1e-5, atol=1e-6)
    check_grads(ours, [z, y])


@pytest.mark.parametrize('options', options[:4], ids=str)
@pytest.mark.parametrize('target', [[2, 1, 0], [1, 1, 0]], ids=['masked', 'label_masked'])
def test_layer_with_masked_classes(options, target):
    z = tensor([[1., -inf, 3.], [-inf, 2., -inf], [0., 0., 0.]], dtype=torch.float64)
    check_twin(CrossEntropyLoss(**options), nn.CrossEntropyLoss(**options), z, tensor(target))


@pytest.mark.parametrize('logits', batch.values(), ids=batch)
@pytest.mark.parametrize('options', options, ids=str)
def test_layer_equals_torch_on_extreme_logits(logits, options):
    a, b = (tensor(logits, dtype=torch.float64, requires_grad=True) for _ in range(2))
    target = torch.zeros(len(a), dtype=torch.int64)
    ours, theirs = CrossEntropyLoss(**options)(a, target), nn.CrossEntropyLoss(**options)(b, target)
    ours.backward()
    theirs.backward()
    assert_close((ours, a.grad), (theirs, b.grad), equal_nan=True)


@pytest.mark.parametrize('options', options, ids=str)
def test_smoothing_is_a_mixture_of_targets(options):
    eps, c = options.get('label_smoothing', 0), 4
    t = (1 - eps)*F.one_hot(y, c).double() + eps/c
    check_twin(CrossEntropyLoss(**options), nn.CrossEntropyLoss(**options), z64, y)
    losses = -(t*torch.log_softmax(z64, -1)).sum(1)
    want = losses.sum() if 'reduction' in options else losses.mean()
    assert_close(CrossEntropyLoss(**options)(z64, y), want)


@pytest.mark.parametrize(('options', 'error', 'match'), [
    ({'reduction': 'none'}, ValueError, "reduction must be 'mean' or 'sum', got 'none'"),
    ({'label_smoothing': -.1}, ValueError, 'label_smoothing must be from 0 to 1, got -0.1'),
    ({'label_smoothing': 1.1}, ValueError, 'got 1.1'),
    ({'label_smoothing': nan}, ValueError, 'got nan'),
    ({'ignore_index': 0}, TypeError, 'ignore_index'),
    ({'weight': torch.ones(4)}, TypeError, 'weight')], ids=str)
def test_wrong_options_raise(options, error, match):
    with pytest.raises(error, match=match): CrossEntropyLoss(**options)


def test_defaults_equal_torch():
    ours, theirs = CrossEntropyLoss(), nn.CrossEntropyLoss()
    assert (ours.reduction, ours.label_smoothing) == (theirs.reduction, theirs.label_smoothing) == ('mean', 0.0)
    assert dict(ours.state_dict()) == dict(theirs.state_dict()) == {}


def test_nothing_is_kept_on_the_layer_or_the_loss():
    layer, z = CrossEntropyLoss(), z64.clone().requires_grad_()
    before = set(vars(layer))
    loss = layer(z, y)
    assert set(vars(layer)) == before and not vars(loss)
    assert not layer(z64, y).requires_grad
    with torch.no_grad(): assert not layer(z, y).requires_grad


def test_used_twice_and_added_up():
    layer, z, w = CrossEntropyLoss(), z64.clone().requires_grad_(), (z64/2).requires_grad_()
    by_hand = (torch.softmax(z64, -1) - F.one_hot(y, 4))/5
    loss = layer(z, y)
    (loss/2 + 3*loss + layer(w, y)).backward()
    assert_close(z.grad, 3.5*by_hand)
    assert_close(w.grad, (torch.softmax(z64/2, -1) - F.one_hot(y, 4))/5)
    assert_close(z.detach(), z64, rtol=0, atol=0)


def test_retain_graph_and_a_second_backward():
    z = z64.clone().requires_grad_()
    loss = CrossEntropyLoss()(z, y)
    loss.backward(retain_graph=True)
    first = z.grad.clone()
    loss.backward()
    assert_close(z.grad, 2*first)
    with pytest.raises(RuntimeError, match='second time'): loss.backward()


def test_labels_changed_between_forward_and_backward_are_noticed():
    target, z = y.clone(), z64.clone().requires_grad_()
    loss = CrossEntropyLoss()(z, target)
    target[0] = 1
    with pytest.raises(RuntimeError, match='modified by an inplace operation'): loss.backward()


def test_copy_and_pickle():
    layer = CrossEntropyLoss('sum', .1)
    for other in copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)):
        assert_close(other(z64, y), layer(z64, y), rtol=0, atol=0)


def test_bfloat16():
    z = z64.bfloat16().requires_grad_()
    loss = CrossEntropyLoss()(z, y)
    loss.backward()
    w = z.detach().float().requires_grad_()
    want = F.cross_entropy(w, y)
    want.backward()
    assert loss.dtype == z.grad.dtype == torch.bfloat16
    assert_close((loss.float(), z.grad.float()), (want, w.grad), rtol=1e-2, atol=1e-2)
