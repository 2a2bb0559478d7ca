"Metrics against torchmetrics and NumPy: dtypes, ties, absent classes, every batch size, states; and no update waits for the device."
import copy
import io
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from miniai.callbacks import F1, Accuracy, ConfusionMatrix, FBeta, Mean, Metric, Precision, Recall, TopK

tm = pytest.importorskip('torchmetrics.classification')
AVERAGES = 'micro', 'macro', 'weighted', None
SCORES = Accuracy, Precision, Recall, F1


def over(metric, *tensors, size=64):
    "The metric over these examples in batches of `size`, reset first"
    metric.reset()
    for batch in zip(*(t.split(size) for t in tensors)): metric.update(*batch)
    return metric.compute()


def rows(n=203, c=7, seed=0, absent=(), unpredicted=(), ties=False, dtype=torch.float32):
    "Logits and labels, about half of them right; some classes never a label, some never predicted"
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(c, (n,), generator=g)
    for k in absent: labels[labels == k] = (k + 1) % c
    scores = torch.randn(n, c, generator=g) + F.one_hot(labels, c)
    if ties: scores = scores.round()
    for k in unpredicted: scores[:, k] = -100
    return scores.to(dtype), labels


def twin(ours, c):
    "The same metric of torchmetrics"
    kwargs = dict(num_classes=c, validate_args=False)
    kind = type(ours)
    if kind is ConfusionMatrix: return tm.MulticlassConfusionMatrix(**kwargs)
    if kind is TopK: return tm.MulticlassAccuracy(average='micro', top_k=ours.k, **kwargs)
    if kind is FBeta: return tm.MulticlassFBetaScore(beta=(1/ours.share - 1)**.5, average=ours.average, **kwargs)
    return {Accuracy: tm.MulticlassAccuracy, Precision: tm.MulticlassPrecision, Recall: tm.MulticlassRecall,
            F1: tm.MulticlassF1Score}[kind](average=ours.average, **kwargs)


def family(c):
    "One of each, with every average"
    every = [kind(average) for kind in SCORES for average in AVERAGES] + [FBeta(b, average) for b in (.5, 2, 3) for average in AVERAGES]
    return every + [ConfusionMatrix(), ConfusionMatrix(c)] + [TopK(k) for k in range(1, c + 1) if k < 8 or k == c]


def agree(scores, labels, size=64):
    c = scores.shape[1]
    for ours in family(c):
        got, want = over(ours, scores, labels, size=size), over(twin(ours, c), scores, labels, size=size)
        where = f'{type(ours).__name__}, average {getattr(ours, "average", None)}, k {getattr(ours, "k", None)}'
        assert got.shape == want.shape, where
        assert_close(got.double(), want.double(), rtol=1e-6, atol=1e-7, msg=f'{where}: {got}, expected {want}')
        assert got.dtype == (torch.int64 if type(ours) is ConfusionMatrix else torch.float64), where


@pytest.mark.parametrize('kind', [dict(), dict(c=2), dict(c=3, n=1), dict(c=40), dict(n=2), dict(absent=(0, 6)), dict(unpredicted=(0, 3)),
                                  dict(absent=(2, 3), unpredicted=(3, 4)), dict(absent=range(6)), dict(unpredicted=range(1, 7)),
                                  dict(ties=True), dict(c=40, ties=True), dict(ties=True, absent=(1,), unpredicted=(1, 2))], ids=str)
@pytest.mark.parametrize('size', [64, 29, 1000])
def test_torchmetrics(kind, size): agree(*rows(**kind), size=size)


@pytest.mark.parametrize('seed', range(8))
def test_random_tables(seed):
    g = torch.Generator().manual_seed(seed)
    c, n = (torch.randint(low, high, (), generator=g).item() for low, high in ((2, 9), (1, 150)))
    agree(*rows(n, c, seed, ties=seed % 2 == 1, absent=(0,) if seed % 3 == 0 else ()), size=1 + 5*seed)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.int32])
def test_types_of_scores(dtype):
    scores, labels = rows(ties=not dtype.is_floating_point)
    scores = scores.to(dtype)
    if dtype.is_floating_point: agree(scores, labels)
    for ours in family(7):
        if type(ours) is not TopK: # which of equal scores torch.topk takes depends on their type
            assert torch.equal(over(ours, scores, labels), over(ours, scores.double(), labels))


@pytest.mark.parametrize('dtype', [torch.int8, torch.uint8, torch.int16, torch.int32, torch.bool, torch.uint16, torch.uint32, torch.uint64])
def test_types_of_labels(dtype):
    c = 2 if dtype == torch.bool else 7
    scores, labels = rows(c=c)
    for ours in family(c): assert torch.equal(over(ours, scores, labels.to(dtype)), over(ours, scores, labels))


@pytest.mark.parametrize('dtype,value', [(torch.uint8, 255), (torch.int8, -128), (torch.int8, 7), (torch.int64, 2**63 - 1),
                                         (torch.int64, -2**63), (torch.int32, 2**31 - 1), (torch.uint64, 2**64 - 1), (torch.int16, -1)])
def test_extreme_labels(dtype, value):
    scores, labels = rows()
    labels = labels.to(dtype)
    labels[-1] = torch.tensor(value, dtype=dtype)
    for ours in family(7):
        with pytest.raises(ValueError, match='1 of 203 labels are out of range, must be 0 to 6'): over(ours, scores, labels)


def test_any_batch_size():
    "One batch, batches of every size, an empty batch between them: equal bit for bit"
    scores, labels = rows(31)
    for ours in family(7):
        want = over(ours, scores, labels, size=31)
        for size in (1, 2, 3, 7, 15, 16, 30): assert torch.equal(over(ours, scores, labels, size=size), want)
        ours.update(scores[:0], labels[:0])
        assert torch.equal(ours.compute(), want)


def test_examples_in_any_order_and_at_any_scale():
    scores, labels = rows()
    order = torch.randperm(203, generator=torch.Generator().manual_seed(1))
    for ours in family(7):
        want = over(ours, scores, labels)
        assert torch.equal(over(ours, scores[order], labels[order]), want)
        assert torch.equal(over(ours, (2*scores).contiguous(), labels), want)
        wide = torch.empty(203, 14)[:, ::2].copy_(scores)       # not contiguous
        assert torch.equal(over(ours, wide, labels), want)


def test_micro_is_accuracy():
    scores, labels = rows(absent=(0,), unpredicted=(3,))
    share = (scores.numpy().argmax(1) == labels.numpy()).mean()
    for kind in SCORES: assert over(kind('micro'), scores, labels).item() == pytest.approx(share, abs=1e-15)
    assert over(Recall('weighted'), scores, labels).item() == pytest.approx(share, abs=1e-15)
    assert over(Mean(lambda p, t: (p.argmax(1) == t).double().mean(), 'share'), scores, labels).item() == pytest.approx(share, abs=1e-15)


@pytest.mark.parametrize('beta', [0, .1, 1, 7, float('inf')])
def test_fbeta_is_a_weighted_harmonic_mean(beta):
    scores, labels = rows()
    p, r, f = (over(m, scores, labels) for m in (Precision(None), Recall(None), FBeta(beta, None)))
    share = 1/(1 + beta**2)
    assert_close(f, 1/(share/p + (1 - share)/r), rtol=1e-12, atol=0)


# ---- Mean

@pytest.mark.parametrize('size', [1, 10, 64, 203])
def test_mean_of_a_function(size):
    from torchmetrics.regression import MeanAbsoluteError, MeanSquaredError
    p, t = torch.randn(2, 203, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    for func, theirs, want in (F.l1_loss, MeanAbsoluteError, np.abs(p.numpy() - t.numpy()).mean()), \
                              (F.mse_loss, MeanSquaredError, ((p.numpy() - t.numpy())**2).mean()):
        got = over(Mean(func), p, t, size=size)
        assert_close(got, torch.as_tensor(want), rtol=1e-13, atol=0)
        flat = theirs()
        assert_close(got.float(), over(flat, p.reshape(-1), t.reshape(-1), size=3*size).float(), rtol=1e-6, atol=0)


def test_mean_of_values():
    from torchmetrics.aggregation import MeanMetric
    ours, theirs = Mean(), MeanMetric()
    values = [(1.5, 4), (torch.tensor(-2.), 1), (torch.tensor(.25, dtype=torch.float64), torch.tensor(3)), (7, 2.5)]
    for value, weight in values:
        ours.update(value, weight)
        theirs.update(value, weight)
    ours.update(3.)
    theirs.update(3.)
    assert_close(ours.compute().float(), theirs.compute(), rtol=1e-6, atol=0)
    assert ours.compute().dtype == torch.float64 and ours.compute().shape == ()


def test_mean_of_targets_that_are_no_tensor():
    first = lambda p, t: (p[0] - torch.tensor(t)).abs().mean()
    metric = Mean(first, 'first')
    metric.update([torch.tensor([1., 2.])], [1., 0.])
    metric.update([torch.tensor([5.])], [1.])
    assert metric.compute().item() == 2


def test_many_small_values():
    "A thousand values after a thousand million examples: float64 loses nothing visible"
    metric = Mean()
    metric.update(.1, 10**9)
    for _ in range(1000): metric.update(.1)
    assert metric.compute().item() == pytest.approx(.1, rel=1e-15)


# ---- bad examples, counted

@pytest.mark.parametrize('seed', range(4))
def test_every_bad_example_is_counted(seed):
    g = torch.Generator().manual_seed(seed)
    scores, labels = rows(97, 5, seed)
    bad = torch.rand(97, generator=g) < .2
    nan = torch.rand(97, 5, generator=g) < .05
    wild = torch.where(torch.rand(97, generator=g) < .5, -3, 9)
    spoiled = scores.masked_fill(nan, torch.nan)
    for ours in family(5):
        with pytest.raises(ValueError, match=f'{ours.name}: {bad.sum()} of 97 lab'): over(ours, scores, labels.where(~bad, wild), size=10)
        with pytest.raises(ValueError, match=f'{ours.name}: {nan.any(1).sum()} of 97 examples have NaN'):
            over(ours, spoiled, labels, size=10)
        with pytest.raises(ValueError, match=f'{bad.sum()} of 97 labels'): over(ours, spoiled, labels.where(~bad, wild), size=10)
        over(ours, scores, labels)                               # reset clears the count


def test_infinite_scores_are_scores():
    scores = torch.tensor([[torch.inf, 0, 1], [-torch.inf, 0, 1], [-torch.inf]*3])
    agree(scores, torch.tensor([0, 1, 0]))


def test_mean_counts_examples_that_are_not_finite():
    p, t = torch.zeros(50), torch.zeros(50)
    p[7], p[49], p[31] = torch.nan, torch.inf, -torch.inf
    with pytest.raises(ValueError, match='mse: 18 of 50 examples are in batches whose value is nan or inf'): # 8 + 8 + a last batch of 2
        over(Mean(F.mse_loss, 'mse'), p, t, size=8)


@pytest.mark.parametrize('preds,targs', [((4, 3), (4, 1)), ((4, 3), (3,)), ((4,), (4,)), ((4, 1), (4,)), ((4, 3, 2), (4, 2)), ((4, 3), ()),
                                         ((3,), ())])
def test_shapes(preds, targs):
    for ours in family(3):
        with pytest.raises(ValueError, match=f'{ours.name}: preds has shape .* and targs .*; must be'):
            ours.update(torch.zeros(preds), torch.zeros(targs, dtype=torch.int64))
        assert ours.sums is None


@pytest.mark.parametrize('dtype', [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_float_labels(dtype):
    with pytest.raises(ValueError, match='must be integers'): Accuracy().update(torch.zeros(4, 3), torch.zeros(4, dtype=dtype))


def test_another_number_of_classes():
    metric = F1()
    over(metric, *rows(c=7))
    with pytest.raises(ValueError, match='f1: preds has 5 classes, must have 7'): metric.update(*rows(c=5))
    assert metric.sums.sum() == 203
    with pytest.raises(ValueError, match='preds has 5 classes, must have 4'): ConfusionMatrix(4).update(*rows(c=5))


def test_mean_shapes():
    for p, t in ((8, 1), (8,)), ((8,), (8, 1)), ((2, 3), (3, 2)):
        with pytest.raises(ValueError, match='must be equal'): Mean(F.mse_loss).update(torch.zeros(p), torch.zeros(t))
    Mean(F.cross_entropy).update(torch.zeros(8, 3), torch.zeros(8, dtype=torch.int64))


def test_names():
    for name in 'top 5', '', '5', 'a-b', '<lambda>':
        with pytest.raises(ValueError, match='is not a valid name'): Metric(name)
    assert [Accuracy(name='a').name, Precision(name='p').name, Recall(name='r').name, F1(name='f').name, TopK(3, 't').name] == list('aprft')


# ---- no wait for the device

class NoSync(TorchDispatchMode):
    "Raises at any call that brings a number to Python or whose shape depends on numbers; counts the other calls"
    WAITS = {'_local_scalar_dense', 'is_nonzero', 'equal', 'item', 'nonzero', 'masked_select', 'unique_dim', '_unique2', 'bincount'}
    calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        masks = name in ('index', 'index_put_') and any(i is not None and i.dtype == torch.bool for i in args[1])
        assert name not in self.WAITS and not masks, f'{name} waits for the device'
        self.calls += 1
        return func(*args, **(kwargs or {}))


def test_trap():
    x = torch.arange(3)
    for ask in (lambda: x[0].item(), lambda: bool(x.any()), lambda: float(x[1]), lambda: x[x > 1], lambda: torch.bincount(x),
                lambda: int(x.sum()), lambda: x.nonzero()):
        with pytest.raises(AssertionError, match='waits'), NoSync(): ask()


def test_updates_do_not_wait():
    scores, labels = rows()
    metrics = [(m, (scores, labels)) for m in family(7)] + [(Mean(F.cross_entropy), (scores, labels)), (Mean(F.mse_loss), (scores, scores))]
    metrics += [(Mean(), (scores.mean(), torch.tensor(3)))]
    for metric, batch in metrics:
        with NoSync() as watch:
            for _ in range(2): metric.update(*batch)
        assert watch.calls <= 2*20
        metric.compute()
        metric.update(*(b.to('meta') for b in batch))             # where there are no numbers at all
        assert metric.sums.device.type == 'meta'


def test_no_graph_is_kept():
    scores, labels = rows()
    scores.requires_grad_()
    for metric in (*family(7), Mean(F.cross_entropy)):
        metric.update(scores, labels)
        assert not metric.sums.requires_grad and not metric.compute().requires_grad


def test_inputs_are_left_alone():
    scores, labels = rows()
    before = scores.clone(), labels.clone()
    for metric in (*family(7), Mean(F.cross_entropy)): over(metric, scores, labels)
    assert torch.equal(scores, before[0]) and torch.equal(labels, before[1])


# ---- states and copies

def test_saved_and_continued():
    scores, labels = rows()
    for metric in (*family(7), Mean(F.cross_entropy)):
        want = over(metric, scores, labels)
        for k in 0, 1, 2, 3:
            metric.reset()
            batches = list(zip(scores.split(64), labels.split(64)))
            for batch in batches[:k]: metric.update(*batch)
            file = io.BytesIO()
            torch.save(metric.state_dict(), file)
            file.seek(0)
            others = copy.deepcopy(metric), pickle.loads(pickle.dumps(metric))
            metric.reset()
            metric.load_state_dict(torch.load(file, weights_only=True))
            for m in (metric, *others):
                for batch in batches[k:]: m.update(*batch)
                assert torch.equal(m.compute(), want)


def test_states_are_copies():
    scores, labels = rows()
    for metric in (*family(7), Mean(F.cross_entropy)):
        metric.update(scores, labels)
        want, state = metric.compute(), metric.state_dict()
        state['sums'].zero_()
        metric.compute().zero_()
        assert torch.equal(metric.compute(), want)
        metric.load_state_dict(mine := metric.state_dict())
        metric.update(scores, labels)
        assert not torch.equal(mine['sums'], metric.sums)


def test_foreign_states():
    for metric, sums in (Mean(), torch.zeros(4, 4)), (F1(), torch.zeros(3)):
        metric.update(*((1.,) if type(metric) is Mean else rows()))
        kept = metric.state_dict()['sums']
        with pytest.raises(ValueError, match='is it the state of another metric'): metric.load_state_dict({'sums': sums})
        with pytest.raises(KeyError): metric.load_state_dict({'tp': sums})
        assert torch.equal(metric.sums, kept)


@pytest.mark.parametrize('make', [Mean, Accuracy, F1, ConfusionMatrix, lambda: TopK(2)])
def test_nothing_counted(make):
    metric = make()
    for _ in range(2):
        with pytest.raises(ValueError, match=f'{metric.name}: no examples were counted; call update'): metric.compute()
        assert metric.state_dict() == {}
        metric.update(*((1.,) if make is Mean else rows()))
        metric.compute()
        metric.reset()


def test_beyond_float32():
    metric = Accuracy()
    metric.load_state_dict({'sums': torch.tensor([[2**60, 0, 0], [0, 5, 0], [0, 0, 0]])})
    metric.update(torch.tensor([[1., 0.]]*3), torch.tensor([0, 0, 1]))
    assert metric.sums.tolist() == [[2**60 + 2, 0, 0], [1, 5, 0], [0, 0, 0]]
