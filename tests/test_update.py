"""The recorded update of the weights: what is launched without, also where rates change and steps are skipped."""

from __future__ import annotations

import copy
from contextlib import contextmanager, nullcontext
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny_trainer import make_batch, make_trainer
from torch import Tensor, nn

from nnunet_lgms.graphs import update
from nnunet_lgms.graphs.optimizer import FusedSGD
from nnunet_lgms.graphs.update import RecordedUpdate, update_weights

RATES = (0.02, 0.02, 0.013, 0.013, 0.4, 0.001, 0.001)
BEFORE_RECORDING = 2  # for tests


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.SiLU(), nn.Conv2d(8, 4, 3).to(memory_format=torch.channels_last))


def with_gradients(device: str, second_group: bool = False) -> tuple[nn.Module, list[nn.Parameter], FusedSGD]:
    """A network, its parameters, whose gradients stay where they are, as those of a recorded backward pass, and SGD."""
    net = network().to(device)
    parameters = list(net.parameters())
    for p in parameters:
        p.grad = torch.zeros_like(p)
    first = parameters[:2] if second_group else parameters
    optimizer = FusedSGD(first, 0.02, momentum=0.9, weight_decay=1e-4)
    if second_group:
        optimizer.add_param_group({"params": parameters[2:], "lr": 0.1})
    return net, parameters, optimizer


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    monkeypatch.setattr(update, "BEFORE_RECORDING", BEFORE_RECORDING)


class OnMPS(Tensor):
    """A tensor that says it is on Apple's GPU."""

    device = torch.device("mps")


@pytest.mark.parametrize("left_out", [True, False])
def test_a_step_is_left_out_by_the_host_where_the_fused_one_does_not_listen(left_out):
    _, parameters, optimizer = with_gradients("cpu")
    for p in parameters:
        p.grad.fill_(torch.nan if left_out else 1.0)
    before, told = [p.detach().clone() for p in parameters], []
    step = optimizer.step
    optimizer.step = lambda: told.append(hasattr(optimizer, "found_inf")) or step()
    update._step_unless(torch.tensor(left_out).as_subclass(OnMPS), optimizer)
    assert told == ([] if left_out else [False])
    assert all(torch.equal(p, old) == left_out for p, old in zip(parameters, before, strict=True))


# --- when it records --------------------------------------------------------------------------------------------------


@pytest.fixture
def recorded(monkeypatch) -> SimpleNamespace:
    """A `RecordedUpdate` with a stand-in for graphs, and what it did."""
    did = []
    graph = SimpleNamespace(replay=lambda: did.append(("replay", rates())))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: graph)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
    monkeypatch.setattr(update, "recording", lambda graph, stream: nullcontext())
    net, parameters, optimizer = with_gradients("cpu", second_group=True)
    optimizer.add_param_group({"params": [], "lr": 0.3})  # nothing forbids it

    def launch(*of: object) -> None:
        assert of == (net, optimizer, scaler)
        given = [group["lr"] for group in optimizer.param_groups]
        did.append(("record" if isinstance(given[0], Tensor) else "launch", list(map(float, given))))

    def rates() -> list[float]:
        return [float(rate) for rate in step._rates]

    monkeypatch.setattr(update, "update_weights", launch)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    scaler.scale(torch.ones(()))
    step = RecordedUpdate(net, optimizer, scaler)
    return SimpleNamespace(step=step, did=did, parameters=parameters, optimizer=optimizer, scaler=scaler)


def what_was_done(recorded: SimpleNamespace) -> list[str]:
    recorded.did.clear()
    recorded.step()
    return [what for what, _ in recorded.did]


def test_steps_are_recorded_when_all_has_stayed_and_rates_are_those_of_the_step(recorded):
    groups = recorded.optimizer.param_groups
    assert what_was_done(recorded) == ["launch"]
    assert what_was_done(recorded) == ["launch"]
    assert what_was_done(recorded) == ["record", "replay"]
    assert [group["lr"] for group in groups] == [0.02, 0.1, 0.3]
    groups[0]["lr"], groups[1]["lr"] = 0.5, 0.25
    versions = [p._version for p in recorded.parameters]
    assert what_was_done(recorded) == ["replay"]
    assert all(p._version > before for p, before in zip(recorded.parameters, versions, strict=True))
    assert recorded.did == [("replay", pytest.approx([0.5, 0.25, 0.3]))]


def move_a_gradient(recorded: SimpleNamespace) -> None:
    recorded.parameters[1].grad = recorded.parameters[1].grad.clone()


def drop_a_gradient(recorded: SimpleNamespace) -> None:
    recorded.parameters[1].grad = None


def load_a_checkpoint(recorded: SimpleNamespace) -> None:
    recorded.optimizer.load_state_dict(copy.deepcopy(recorded.optimizer.state_dict()))


def change_weight_decay(recorded: SimpleNamespace) -> None:
    recorded.optimizer.param_groups[1]["weight_decay"] = 0.5


def change_the_scaler(recorded: SimpleNamespace) -> None:
    recorded.scaler.set_growth_interval(7)


@pytest.mark.parametrize(
    "change", [change_the_scaler, move_a_gradient, drop_a_gradient, load_a_checkpoint, change_weight_decay]
)
def test_what_changed_is_launched_and_recorded_anew(recorded, change):
    for _ in range(4):
        recorded.step()
    before = [p.data_ptr() for p in recorded.parameters], recorded.parameters[1].grad  # the memory is not given away
    change(recorded)
    assert what_was_done(recorded) == ["launch"]
    assert what_was_done(recorded) == ["launch"]
    assert what_was_done(recorded) == ["record", "replay"]
    assert what_was_done(recorded) == ["replay"]
    assert before[0] == [p.data_ptr() for p in recorded.parameters]


def test_gradients_that_move_all_the_time_are_never_recorded(recorded):
    for i in range(9):
        if i % BEFORE_RECORDING == 0:
            move_a_gradient(recorded)
        assert what_was_done(recorded) == ["launch"]


def test_hooks_of_a_step_are_called(recorded):
    for _ in range(4):
        recorded.step()
    hook = recorded.optimizer.register_step_post_hook(lambda *_: None)
    assert what_was_done(recorded) == ["launch"]
    hook.remove()
    assert what_was_done(recorded) == ["record", "replay"]


def test_rates_may_be_of_any_kind(recorded):
    for group, rate in zip(recorded.optimizer.param_groups, (np.float64(0.5), 1, 0.25), strict=True):
        group["lr"] = rate
    for _ in range(3):
        recorded.step()
    recorded.optimizer.param_groups[1]["lr"] = 0.02
    recorded.step()
    assert recorded.did[-1] == ("replay", pytest.approx([0.5, 0.02, 0.25]))
    assert {rate.dtype for rate in recorded.step._rates} == {torch.float32}


def test_an_update_that_cannot_be_recorded_is_launched(monkeypatch):
    """And nothing is left of the attempt: neither rates that are tensors nor a scaler that has unscaled already."""
    net, parameters, optimizer = with_gradients("cpu")
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    scaler.scale(torch.ones(()))
    step = RecordedUpdate(net, optimizer, scaler)

    @contextmanager
    def fails(graph, stream):
        scaler.unscale_(optimizer)  # would only be recorded
        raise RuntimeError("no memory")
        yield

    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: None)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
    monkeypatch.setattr(update, "recording", fails)
    for _ in range(BEFORE_RECORDING):
        step()
    with pytest.warns(UserWarning, match="not recorded as a CUDA graph .no memory"):
        step()
    for _ in range(3):
        step()  # not tried again
    assert optimizer.param_groups[0]["lr"] == 0.02 and scaler.get_scale() == 64.0


# --- what it computes -------------------------------------------------------------------------------------------------


def trained(recorded: bool, overflow: tuple[int, ...]) -> tuple[list[Tensor], float]:
    """Weights and momentum after steps with gradients of many sizes, those in ``overflow`` infinite; the last scale."""
    net, parameters, optimizer = with_gradients("cuda", second_group=True)
    scaler = torch.amp.GradScaler("cuda", init_scale=1024.0, growth_interval=3)
    scaler.scale(torch.zeros((), device="cuda"))
    step = RecordedUpdate(net, optimizer, scaler) if recorded else partial(update_weights, net, optimizer, scaler)
    for i, rate in enumerate(RATES):
        torch.manual_seed(i)
        for group in optimizer.param_groups:
            group["lr"] = rate
        for p in parameters:
            gradient = torch.randn(p.shape, device="cuda") * 10.0 ** (i - 2)  # from some that are not clipped on
            p.grad.copy_(gradient * scaler.get_scale() * (float("inf") if i in overflow else 1))
        step()
    assert not recorded or step._graph is not None
    return [*parameters, *(optimizer.state[p]["momentum_buffer"] for p in parameters)], scaler.get_scale()


@pytest.mark.gpu
@pytest.mark.parametrize("overflow", [(), (0,), (1, 3), (0, 1, 4)])
def test_steps_are_those_that_are_launched(overflow):
    (replayed, scale), (launched, scale_launched) = trained(True, overflow), trained(False, overflow)
    assert scale == scale_launched
    for a, b in zip(replayed, launched, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


@pytest.mark.gpu
@pytest.mark.parametrize("patch_size", [(64, 48), (32, 24, 32)], ids=["2D", "3D"])
def test_a_training_on_graphs_records_its_update_once(patch_size, tmp_path, monkeypatch):
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        monkeypatch.setenv(name, str(tmp_path / name))
    torch.manual_seed(0)
    trainer = make_trainer(patch_size=patch_size)
    trainer.device, trainer.num_input_channels, trainer.steps_ahead = torch.device("cuda"), 1, 1
    trainer.network.cuda()
    trainer.grad_scaler = torch.amp.GradScaler("cuda")
    trainer.optimizer, trainer.lr_scheduler = trainer.configure_optimizers()
    trainer._record_step()
    batch, graphs, losses = make_batch(trainer), [], []
    trainer.on_train_epoch_start()
    for _ in range(BEFORE_RECORDING + 8):
        losses.append(trainer.train_step(batch))
        graphs.append(trainer.recorded_update._graph)
    assert graphs[:BEFORE_RECORDING] == [None] * BEFORE_RECORDING
    assert graphs[BEFORE_RECORDING] is not None and len(set(map(id, graphs[BEFORE_RECORDING:]))) == 1
    assert float(losses[-1]["loss"]) < float(losses[0]["loss"])


def test_without_a_scaler_it_is_clipping_and_sgd():
    net, parameters, optimizer = with_gradients("cpu")
    before = [p.detach().clone() for p in parameters]
    for p in parameters:
        p.grad.fill_(3.0)
    norm = 3.0 * sum(p.numel() for p in parameters) ** 0.5
    update_weights(net, optimizer)
    for p, old in zip(parameters, before, strict=True):
        torch.testing.assert_close(p.detach(), old - 0.02 * (3.0 * 12 / norm + 1e-4 * old))


OPTIMIZERS = {
    "fused": lambda parameters: FusedSGD(parameters, 0.02, momentum=0.9, weight_decay=1e-4),
    "plain": lambda parameters: torch.optim.SGD(parameters, 0.02, momentum=0.9, weight_decay=1e-4),
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, 0.02),
    "fused AdamW": lambda parameters: torch.optim.AdamW(parameters, 0.02, fused=True),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("scaled", [False, True], ids=["float32", "scaled"])
@pytest.mark.parametrize("bad", [float("inf"), float("nan"), 3e38], ids=["inf", "nan", "infinite norm"])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_step_without_a_finite_norm_leaves_everything_as_it_was(device, bad, scaled, optimizer):
    net = network().to(device)
    parameters = list(net.parameters())
    optimizer = OPTIMIZERS[optimizer](parameters)
    scaler = torch.amp.GradScaler(device, init_scale=4.0) if scaled else None

    def step(value: float) -> tuple[Tensor, list[Tensor]]:
        for p in parameters:
            p.grad = torch.ones_like(p)
        parameters[0].grad[0, 0] = value
        if scaled:
            scaler.scale(torch.ones((), device=device))
        norm = update_weights(net, optimizer, scaler)
        state = (value for of in optimizer.state.values() for value in of.values() if isinstance(value, Tensor))
        return norm, [t.detach().clone() for t in (*parameters, *state)]

    norm, before = step(1.0)
    assert norm.isfinite()
    norm, after = step(bad)
    assert not norm.isfinite()
    assert all(map(torch.equal, before, after))
    norm, moved = step(1.0)
    assert norm.isfinite() and not any(map(torch.equal, before, moved))
    assert not hasattr(optimizer, "found_inf")
