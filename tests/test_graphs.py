"""CUDA graphs of training and prediction: the same numbers as without, and gone when the weights move."""

import copy
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch
from torch import distributed as dist
from torch import nn
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode

from nnunet_lgms import LGMSNet
from nnunet_lgms.graphs import network as graphed
from nnunet_lgms.graphs import recorded
from nnunet_lgms.graphs.network import GraphedLGMSNet
from nnunet_lgms.graphs.recording import can_be_recorded
from nnunet_lgms.ops import backend, exchange, kernels, set_kernels

SHAPE = {2: (4, 3, 96, 120), 3: (2, 1, 40, 48, 44)}


def test_without_a_gpu_it_is_lgmsnet():
    torch.manual_seed(0)
    network = GraphedLGMSNet.paper(1, 2, dim=2)
    plain = LGMSNet.paper(1, 2, dim=2)
    plain.load_state_dict(network.state_dict())
    x = torch.randn(2, 1, 33, 40)
    torch.testing.assert_close(network(x), plain(x), rtol=0, atol=0)
    assert torch.export.export(network.eval(), (x,)).module()(x).shape == (2, 2, 33, 40)


def test_parameters_by_name_take_the_place_of_the_networks_own():
    torch.manual_seed(0)
    network, other = (GraphedLGMSNet.paper(1, 2, dim=2) for _ in range(2))
    x = torch.randn(2, 1, 16, 24)
    names = dict(graphed._WithoutGraphs(other).named_parameters())
    weights = {name: p.detach().requires_grad_() for name, p in names.items()}
    out = network._with_converted_weights(x, weights)
    torch.testing.assert_close(out, other(x), rtol=0, atol=0)
    gradients = torch.autograd.grad(out.square().mean(), list(weights.values()))
    other(x).square().mean().backward()
    for gradient, parameter in zip(gradients, other.parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad)
    assert all(p.grad is None for p in network.parameters())


def test_autograd_keeps_the_gradients_of_a_graph_where_they_are():
    """Whatever the strides of weights and gradients, so that an update of the weights finds them in the same place."""
    torch.manual_seed(0)
    weights = [
        torch.randn(8, 4, 3, 3),
        torch.randn(8, 4, 3, 3).to(memory_format=torch.channels_last),
        torch.randn(8, 1, 3, 3, 3).to(memory_format=torch.channels_last_3d),
        torch.randn(6, 5).t(),
        torch.randn(8, 4)[:, :3],  # not dense
        torch.randn(7),
    ]
    parameters = [torch.nn.Parameter(weight) for weight in weights]
    gradients = [torch.randn(weight.shape) for weight in weights]
    gradients[0] = gradients[0].to(memory_format=torch.channels_last)
    together, parts = recorded._together(gradients, parameters)
    assert together.shape == (sum(weight.numel() for weight in weights),)
    step = replayed(parameters, parts)
    for _ in range(2):
        for parameter in parameters:
            parameter.grad = None
        recorded._Replay.apply(step, *parameters)[0].sum().backward()
        for parameter, gradient, part in zip(parameters, gradients, parts, strict=True):
            assert torch.equal(parameter.grad, gradient)
            assert parameter.grad.data_ptr() == part.data_ptr()


def replayed(parameters, gradients, values=None) -> recorded.RecordedStep:
    """A step whose graphs are stand-ins; the backward one writes the next of the values to all gradients."""
    step = object.__new__(recorded.RecordedStep)
    step._parameters, step._gradients, step._output_gradients = parameters, gradients, [torch.zeros(3)]
    step._outputs, step._forward = torch.ones(3), SimpleNamespace(replay=lambda: None)
    write = (lambda: None) if values is None else lambda: [g.fill_(v) for v in [next(values)] for g in gradients]
    step._backward = SimpleNamespace(replay=write)
    return step


@pytest.mark.parametrize(("in_place", "expected"), [(None, 11.0), (True, 10.0), (False, 10.0)])
def test_backward_passes_of_a_graph_add_up(in_place, expected):
    """As PyTorch's do, though the gradients that parameters hold are the memory of the graph."""
    parameters = [torch.nn.Parameter(torch.randn(4, 3)), torch.nn.Parameter(torch.randn(5))]
    _, gradients = recorded._together([torch.zeros(4, 3), torch.zeros(5)], parameters)
    step = replayed(parameters, gradients, iter([1.0, 10.0]))
    optimizer = torch.optim.SGD(parameters, 0.1)
    for i in range(2):
        if i and in_place is not None:
            optimizer.zero_grad(set_to_none=not in_place)
        recorded._Replay.apply(step, *parameters)[0].sum().backward()
    assert all((p.grad == expected).all() for p in parameters)


@pytest.fixture
def without_cuda(monkeypatch):
    """What is recorded is computed, at once."""
    graph = SimpleNamespace(pool=lambda: None, reset=lambda: None, replay=lambda: None)
    stream = SimpleNamespace(wait_stream=lambda other: None)
    for name, stand_in in (("CUDAGraph", graph), ("Stream", stream), ("current_stream", stream)):
        monkeypatch.setattr(torch.cuda, name, lambda stand_in=stand_in: stand_in)
    monkeypatch.setattr(torch.cuda, "stream", nullcontext)
    monkeypatch.setattr(recorded, "recording", lambda *_: nullcontext())


def test_processes_exchange_nothing_before_all_have_rehearsed(without_cuda, monkeypatch):
    """Then twice, of which the second time is recorded, and each time in between they ask whether all could do it."""
    network, group = GraphedLGMSNet.paper(1, 2, dim=2), SimpleNamespace()
    statistics, exchanged, computed = [b.clone() for b in network.buffers()], [], []
    compute = network._with_converted_weights

    def computes(x, parameters):
        computed.append(exchange._exchanges)
        return compute(x, parameters)

    monkeypatch.setattr(dist, "all_reduce", lambda tensor, op, group: exchanged.append(tensor.numel()))
    monkeypatch.setattr(network, "_with_converted_weights", computes)
    network.record_training(torch.zeros(2, 1, 16, 24), group)
    weights = sum(p.numel() for p in network.parameters())
    assert exchanged == [1, weights, weights, 1]
    assert computed == [False, False, True, True]
    gradients = zip(network.parameters(), network._training_step._gradients, strict=True)
    assert all(gradient.shape == p.shape and gradient.stride() == p.stride() for p, gradient in gradients)
    assert all(torch.equal(b, before) for b, before in zip(network.buffers(), statistics, strict=True))


def test_a_step_that_was_not_recorded_leaves_nothing(without_cuda, monkeypatch):
    network = GraphedLGMSNet.paper(1, 2, dim=2)
    statistics = [b.clone() for b in network.buffers()]
    compute, computed = network._with_converted_weights, []

    def runs_out_of_memory(x, parameters):
        computed.append(compute(x, parameters))
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(network, "_with_converted_weights", runs_out_of_memory)
    with pytest.raises(torch.OutOfMemoryError):
        network.record_training(torch.ones(2, 1, 16, 24))
    assert computed and network._training_step is None and network._training_kind is None
    assert all(torch.equal(b, before) for b, before in zip(network.buffers(), statistics, strict=True))


class Recorder:
    """Stands in for a recorded prediction."""

    made = 0

    def __init__(self, forward, x, weights):
        Recorder.made += 1
        self.forward = forward

    def weights_may_have_changed(self):
        pass

    def __call__(self, x):
        return self.forward(x)


@pytest.fixture
def recorder(monkeypatch):
    monkeypatch.setattr(graphed, "RecordedPrediction", Recorder)
    monkeypatch.setattr(GraphedLGMSNet, "_has_graphs", staticmethod(lambda x: True))
    monkeypatch.setattr(graphed, "only_compiling", torch.no_grad)
    Recorder.made = 0
    return Recorder


@torch.no_grad()
def test_predictions_are_recorded_when_a_shape_comes_again(recorder):
    network = GraphedLGMSNet.paper(1, 2, dim=2).eval()
    small, large = torch.zeros(1, 1, 16, 16), torch.zeros(1, 1, 32, 16)
    for made in (0, 0, 1, 1):
        network(small)
        assert recorder.made == made
    for x in (large, large, small, small, large):  # never often enough in a row
        network(x)
    assert recorder.made == 1
    network(large), network(large)
    assert recorder.made == 2
    for _ in range(3):  # what takes statistics of its own is no prediction
        network.train()(large)
    assert recorder.made == 2


@torch.no_grad()
def test_what_is_made_of_weights_is_made_again_when_they_may_have_changed(without_cuda, monkeypatch):
    monkeypatch.setattr(GraphedLGMSNet, "_has_graphs", staticmethod(lambda x: True))
    monkeypatch.setattr(torch.cuda, "device_of", nullcontext)
    network, x = GraphedLGMSNet.paper(1, 2, dim=2).eval(), torch.zeros(1, 1, 16, 16)
    weight = next(network.parameters())
    network(x), network(x), network(x)
    prediction, renewed = network._prediction, []
    monkeypatch.setattr(prediction._of_weights, "renew", lambda: renewed.append(True))

    def renewals(mode):
        renewed.clear()
        with mode():
            network(x)
        return len(renewed)

    changes = [
        lambda: None,
        lambda: weight.mul_(2),
        lambda: network.load_state_dict(network.state_dict()),
        lambda: (weight.data.mul_(2), network.eval()),  # the former of which nobody knows
        lambda: network.train().eval(),
    ]
    for mode in (torch.inference_mode, torch.no_grad):
        for change in changes:
            change()
            assert [renewals(mode), renewals(mode)] == [change is not changes[0], 0]
    assert network._prediction is prediction


@torch.no_grad()
def test_weights_that_do_not_tell_are_always_taken_as_changed(without_cuda):
    with torch.inference_mode():
        weights = [torch.zeros(3)]
    prediction = recorded.RecordedPrediction(torch.relu, torch.zeros(3), weights)
    renewed = prediction._of_weights.renew = MagicMock()
    prediction(torch.ones(3)), prediction(torch.ones(3))
    assert renewed.call_count == 2


@torch.no_grad()
def test_graphs_end_when_weights_move_and_are_not_copied(recorder):
    network = GraphedLGMSNet.paper(1, 2, dim=2).eval()
    for _ in range(3):
        network(torch.zeros(1, 1, 16, 16))
    network.load_state_dict(network.state_dict())
    network.to("cpu")
    assert network._prediction is not None
    other = copy.deepcopy(network)
    assert other._prediction is None
    network.load_state_dict(other.state_dict(), assign=True)
    assert network._prediction is None
    for _ in range(3):
        network(torch.zeros(1, 1, 16, 16))
    torch.nn.Sequential(network).load_state_dict(torch.nn.Sequential(other).state_dict())
    assert network._prediction is not None
    network.double()
    assert network._prediction is None


@torch.no_grad()
@pytest.mark.parametrize("recorded", [True, False])
def test_pytorchs_operators_are_recorded_where_no_kernels_run(recorded, recorder, monkeypatch):
    monkeypatch.undo()  # of what decides
    monkeypatch.setattr(graphed, "RecordedPrediction", Recorder)
    monkeypatch.setattr(graphed, "can_be_recorded", lambda x: recorded)
    monkeypatch.setattr(graphed, "only_compiling", lambda: pytest.fail("there are no kernels to compile"))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_of", nullcontext)
    torch.manual_seed(0)
    network = GraphedLGMSNet.paper(1, 2, dim=2).eval()
    x = torch.randn(1, 1, 16, 16)
    for _ in range(4):
        torch.testing.assert_close(network(x), LGMSNet.forward(network, x), rtol=0, atol=0)
    assert recorder.made == recorded and (network._prediction is not None) == recorded


@torch.no_grad()
def test_for_few_predictions_nothing_is_compiled_or_tried_out(recorder, monkeypatch):
    compiled, tried_out = [], []
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    monkeypatch.setattr(torch.cuda, "device_of", nullcontext)
    monkeypatch.setattr(backend, "_hardware", lambda index: backend.Decision("kernels", "There is a GPU."))
    monkeypatch.setattr(graphed, "use_kernels", lambda x: backend.kernels_for("cuda:0").path == "kernels")
    monkeypatch.setattr(graphed, "only_compiling", lambda: compiled.append(True) or nullcontext())
    network = GraphedLGMSNet.paper(1, 2, dim=2).eval()
    network.register_forward_pre_hook(lambda *_: compiled.clear())
    plain = network._with_converted_weights
    monkeypatch.setattr(
        network,
        "_with_converted_weights",
        lambda x: tried_out.append((bool(compiled), torch.backends.cudnn.benchmark)) or plain(x),
    )
    x = torch.zeros(1, 1, 16, 16)
    for few in (True, False, True):  # as many windows of one shape, for which graphs are made anew
        network.few_predictions, tried_out[:], recorder.made = few, [], 0
        network(x)
        assert tried_out == ([(False, False)] if few else [(True, True)] * 2) and network._prediction is None
        network(x), network(x)
        assert recorder.made == 1 and tried_out[-1] == (False, not few)
    set_kernels("on")
    try:
        network(x)
        assert tried_out[-1] == (True, True)
    finally:
        set_kernels("auto")


def test_a_graph_is_for_nvidias_gpus(monkeypatch):
    on_gpu = SimpleNamespace(is_cuda=True)
    monkeypatch.setattr(torch.version, "hip", None)
    assert can_be_recorded(on_gpu) and not can_be_recorded(torch.zeros(1))
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert not can_be_recorded(on_gpu)


class Followed(TorchDispatchMode):
    """Custom operators are run as on a GPU, where otherwise only their sizes are known."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        definition = OPDEFS.get(function._schema.name)
        if definition is not None and function._schema.name.startswith("nnunet_lgms::"):
            with self:
                return definition._init_fn(*args, **(kwargs or {}))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(("dim", "options"), [(2, {}), (3, {}), (3, {"norm_op": partial(nn.GroupNorm, 4)})])
def test_pytorchs_operators_ask_for_no_number(dim, options, monkeypatch):
    """On the meta device tensors have none, so whoever asks fails; a graph cannot hold the answer either."""
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: nullcontext())  # which the meta device has not
    with torch.device("meta"), kernels("off"), Followed():
        network = LGMSNet.paper(1, 2, dim=dim, **options)
        for training in (True, False):
            network.train(training)
            with torch.set_grad_enabled(training):
                out = network(torch.empty(2, 1, *SHAPE[dim][2:]))
            if training:
                out.sum().backward()
        assert all(p.grad is not None for p in network.parameters())
        with pytest.raises(RuntimeError):  # as for one who asks
            bool(out.sum() > 0)


@torch.no_grad()
def test_a_graph_that_does_not_fit_is_done_without(recorder, monkeypatch):
    def fails(forward, x, weights):
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(graphed, "RecordedPrediction", fails)
    network = GraphedLGMSNet.paper(1, 2, dim=2).eval()
    x = torch.zeros(1, 1, 16, 16)
    network(x), network(x)
    with pytest.warns(UserWarning, match="no memory"):
        assert network(x).shape == (1, 2, 16, 16)
    network(x)  # not tried again


def steps(network, batches):
    """Losses of nnU-Net's training steps, and of validations in between, on batches of one shape."""
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9)
    losses = []
    for x in batches:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cuda"):
            loss = network(x).float().square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 12)
        optimizer.step()
        network.eval()
        with torch.no_grad(), torch.autocast("cuda"):
            validation = network(x).float().square().mean()
        network.train()
        losses += [loss.item(), validation.item()]
    return losses


def relative(actual, expected):
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


def gradients(network, x):
    network.zero_grad(set_to_none=True)
    with torch.autocast("cuda"):
        out = network(x)
    grad = torch.linspace(-1, 1, out.numel(), device="cuda").view_as(out)
    (1024 * (out.float() * grad).mean()).backward()
    found = torch.cat([p.grad.flatten().double() for p in network.parameters() if p.grad is not None])
    network.zero_grad(set_to_none=True)
    return found


@pytest.fixture(params=["auto", "off"])
def operators(request):
    """The kernels, or PyTorch's operators, as on cards that have none."""
    with kernels(request.param):
        yield


@pytest.mark.gpu
@pytest.mark.usefixtures("operators")
@pytest.mark.parametrize("dim", [2, 3])
def test_training_on_graphs_is_training(dim, monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    shape = SHAPE[dim]
    plain = LGMSNet.paper(shape[1], 3, dim=dim).cuda()
    network = GraphedLGMSNet.paper(shape[1], 3, dim=dim).cuda()
    network.load_state_dict(plain.state_dict())
    batches = [torch.randn(shape, device="cuda") for _ in range(5)]
    with torch.autocast("cuda"):
        network.record_training(torch.zeros(shape, device="cuda"))
    for a, b in zip(network.state_dict().values(), plain.state_dict().values()):
        assert torch.equal(a, b)
    for x in batches[:2]:
        actual, expected = gradients(network, x), gradients(plain, x)
        assert relative(actual, expected) < 2e-2  # float16; a wrong gradient is off by about 1
        assert torch.equal(gradients(network, x), actual)
    network.load_state_dict(plain.state_dict())  # running statistics
    assert steps(network, batches) == pytest.approx(steps(plain, batches), rel=3e-2)
    assert network._prediction is not None  # validations were recorded


@pytest.mark.gpu
@pytest.mark.usefixtures("operators")
@pytest.mark.parametrize("dim", [2, 3])
def test_predictions_on_graphs_are_predictions(dim):
    """Results live on, as nnU-Net sums mirrored ones, and follow the weights."""
    torch.manual_seed(0)
    shape = SHAPE[dim]
    plain = LGMSNet.paper(shape[1], 3, dim=dim).cuda().eval()
    network = GraphedLGMSNet.paper(shape[1], 3, dim=dim).cuda().eval()
    images = [torch.randn(shape, device="cuda") for _ in range(6)]
    for seed in range(2):  # the second time with other weights in the same graph
        torch.manual_seed(seed)
        for p in plain.parameters():
            p.data.normal_(0, 0.1)
        network.load_state_dict(plain.state_dict())
        with torch.inference_mode(), torch.autocast("cuda"):
            results = [network(x) for x in images]
            expected = [plain(x) for x in images]
        assert max(map(relative, results, expected)) < 1e-3
    assert network._prediction is not None
    changes = [lambda p: p.mul_(0.9), lambda p: p.data.mul_(0.9), lambda p: p.copy_(p * 1.1)]
    for change in changes:  # in place, also where it is not seen but by the call of eval() behind it
        for of in (plain, network):
            with torch.no_grad():
                list(map(change, of.parameters()))
            of.eval()
        with torch.inference_mode(), torch.autocast("cuda"):
            expected[0] = plain(images[0])
            assert relative(network(images[0]), expected[0]) < 1e-3
    with torch.no_grad(), torch.autocast("cuda"):  # a tensor of inference mode stays usable outside of it
        assert relative(network(images[0]), expected[0]) < 1e-3
    network.half().float()
    assert network._prediction is None


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [2, 3])
def test_few_predictions_compile_nothing_and_repeat(dim, monkeypatch):
    from triton.runtime.jit import JITFunction

    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    torch.manual_seed(0)
    plain = LGMSNet.paper(SHAPE[dim][1], 3, dim=dim).cuda().eval()
    x = torch.randn(SHAPE[dim], device="cuda")
    with torch.inference_mode(), torch.autocast("cuda"):
        expected = plain(x)
        monkeypatch.setattr(JITFunction, "_do_compile", lambda *_, **__: pytest.fail("a kernel is compiled"))
        results = []
        for _ in range(2):
            network = GraphedLGMSNet.paper(SHAPE[dim][1], 3, dim=dim).cuda().eval()
            network.load_state_dict(plain.state_dict())
            network.few_predictions = True
            results += [network(x) for _ in range(4)]
            assert network._prediction is not None
    assert relative(results[0], expected) < 2e-2  # float16
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.gpu
def test_only_compiling_leaves_nothing_to_compile():
    from triton.runtime.jit import JITFunction

    network = GraphedLGMSNet.paper(1, 2, dim=2).cuda()
    x = torch.zeros(2, 1, 64, 64, device="cuda")
    with torch.autocast("cuda"):
        network.record_training(x)
        network.eval()
        with torch.no_grad():
            network(x)  # its kernels are compiled before it as well
    network.train()
    compiled, do_compile = [], JITFunction._do_compile
    JITFunction._do_compile = lambda self, *a, **k: compiled.append(self) or do_compile(self, *a, **k)
    try:
        with torch.autocast("cuda"):
            out = network._with_converted_weights(x)
            out.backward(torch.ones_like(out))  # in the memory format that a loss gives it
            network.eval()
            with torch.no_grad():
                network._with_converted_weights(x)
    finally:
        JITFunction._do_compile = do_compile
    assert not compiled
