"""The network under the tools that people run networks with: compilation, export, autocast, checkpointing, DDP."""

from __future__ import annotations

import copy
import io
import pickle
import shutil
import socket

import gloo
import pytest
import torch
from networks import tiny_network
from torch import distributed as dist
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from nnunet_lgms import LGMSNet
from nnunet_lgms.nnunet.loss import deep_supervision_weights

ODD = {2: (20, 13), 3: (10, 7, 9)}  # padding, cropping and masks are part of what is compiled


@pytest.fixture(params=[2, 3], ids=["2D", "3D"])
def dim(request) -> int:
    torch.manual_seed(0)
    return request.param


def step(network: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """(output, gradients of the parameters) of a squared loss."""
    out = network(x)
    out.float().square().mean().backward()
    return out.detach(), [p.grad for p in network.parameters() if p.requires_grad]


def every_block(dim: int) -> nn.Module:
    """All kinds of block in two stages, because each of them costs the compiler seconds."""
    torch._dynamo.reset()
    return tiny_network(dim, 2, encoder_blocks=["LMS", "GMS"], decoder_blocks=[["Fusion", "GMS"]])


@pytest.mark.slow
def test_compiles_as_one_graph(dim):
    """Forward and backward through dynamo and AOTAutograd, which is where a graph would break."""
    network = every_block(dim)
    x = torch.randn(2, 1, *ODD[dim])
    expected, expected_gradients = step(copy.deepcopy(network), x)
    out, gradients = step(torch.compile(network, fullgraph=True, backend="aot_eager"), x)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
    for gradient, value in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, value, rtol=1e-3, atol=1e-3 * float(value.abs().max()) + 1e-6)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="inductor needs a C++ compiler")
def test_inductor_generates_code():
    from torch._inductor import config

    network = every_block(3).eval()
    x = torch.randn(1, 1, *ODD[3])
    # or it first tries the compiler on every set of vector instructions that this machine has
    with torch.no_grad(), config.patch({"cpp.simdlen": 256, "cpp.vec_isa_ok": True}):
        out = torch.compile(network, fullgraph=True)(x)
        torch.testing.assert_close(out, network(x), rtol=1e-3, atol=1e-4)


@pytest.mark.gpu
def test_training_step_compiles_on_the_gpu(dim):
    """What nnU-Net runs by default on CUDA."""
    network = every_block(dim).cuda()
    x = torch.randn(2, 1, *ODD[dim], device="cuda")
    expected, expected_gradients = step(copy.deepcopy(network), x)
    out, gradients = step(torch.compile(network, fullgraph=True), x)
    torch.testing.assert_close(out, expected, rtol=1e-2, atol=1e-2)
    for gradient, value in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, value, rtol=5e-2, atol=5e-2 * float(value.abs().max()) + 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("deep_supervision", [False, True])
def test_compiled_network_follows_the_switch(deep_supervision):
    """nnU-Net switches deep supervision of a network that is compiled already."""
    torch._dynamo.reset()
    network = tiny_network(2, 4, deep_supervision=deep_supervision)
    compiled = torch.compile(network, fullgraph=True, backend="eager")
    x = torch.randn(1, 1, *ODD[2])
    for enabled in (deep_supervision, not deep_supervision, deep_supervision):
        network.decoder.deep_supervision = enabled
        assert isinstance(compiled(x), list) == enabled


@pytest.mark.slow
def test_exports_to_a_file_that_runs(dim, tmp_path):
    network = tiny_network(dim, 4).eval()
    x = torch.randn(1, 1, *ODD[dim])
    torch.export.save(torch.export.export(network, (x,)), tmp_path / "network.pt2")
    out = torch.export.load(tmp_path / "network.pt2").module()(x)
    # Eager, the same in other operators on the CPU; 3D norms of two voxels enlarge the difference.
    torch.testing.assert_close(out, network(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("device", "dtype"), [("cpu", torch.bfloat16), pytest.param("cuda", torch.float16, marks=pytest.mark.gpu)]
)
def test_autocast(dim, device, dtype):
    # At least 4 voxels per axis at every level: PyTorch 2.13 on the CPU reads uninitialised memory in the bfloat16
    # weight gradient of conv3d on maps such as 2 x 2 x 2, seen as NaN in half of the runs.
    size = {2: (50, 45), 3: (26, 25, 27)}[dim]
    network = tiny_network(dim, 4).to(device)
    x = torch.randn(2, 1, *size, device=device)
    with torch.autocast(device, dtype):
        out, gradients = step(network, x)
    assert out.dtype is dtype
    assert all(p.dtype is torch.float32 for p in network.parameters())
    assert all(torch.isfinite(g).all() and g.dtype is torch.float32 for g in gradients)

    network.eval()
    expected = copy.deepcopy(network).double()(x.double()).detach()
    with torch.autocast(device, dtype):
        out = network(x).detach().double()
    error = (out - expected).square().mean().sqrt() / expected.std()
    assert error < (0.15 if dtype is torch.bfloat16 else 0.02)  # 8 and 11 bits of precision, some 30 layers


@pytest.mark.gpu
def test_fp16_has_room_for_large_intensities(dim):
    """CT that nobody normalised: fp16 ends at 65504, and what overflows there becomes NaN in the norm behind it."""
    network = tiny_network(dim).cuda()
    with torch.autocast("cuda", torch.float16):
        out, gradients = step(network, 3000 * torch.randn(2, 1, *ODD[dim], device="cuda"))
    assert torch.isfinite(out).all() and all(torch.isfinite(g).all() for g in gradients)


def test_channels_last(dim):
    memory_format = torch.channels_last if dim == 2 else torch.channels_last_3d
    network = tiny_network(dim).double()
    x = torch.randn(2, 1, *ODD[dim], dtype=torch.float64)
    expected, expected_gradients = step(copy.deepcopy(network), x)
    network = network.to(memory_format=memory_format)
    out, gradients = step(network, x.to(memory_format=memory_format))
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)
    for gradient, value in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, value, rtol=1e-6, atol=1e-9)


def test_channels_last_input_alone(dim):
    """A batch of one channel is in both layouts at once; two samples of two channels are not."""
    memory_format = torch.channels_last if dim == 2 else torch.channels_last_3d
    network = tiny_network(dim, 4).eval()
    maps = network.encoder(torch.randn(2, 1, *ODD[dim]))
    expected = network.decoder(maps)
    out = network.decoder([m.to(memory_format=memory_format) for m in maps])
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(dim, use_reentrant):
    network = tiny_network(dim).double()
    x = torch.randn(2, 1, *ODD[dim], dtype=torch.float64)
    expected, expected_gradients = step(copy.deepcopy(network), x)
    for stage in [*network.encoder.stages, *network.decoder.stages]:
        stage.forward = checkpointed(stage.forward, use_reentrant)
    out, gradients = step(network, x)
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)
    for gradient, value in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, value, rtol=1e-7, atol=1e-10)


def checkpointed(forward, use_reentrant):
    return lambda x: checkpoint(forward, x, use_reentrant=use_reentrant)


@pytest.mark.parametrize("deep_supervision", [False, True])
def test_pickles_and_copies(dim, deep_supervision):
    network = tiny_network(dim, deep_supervision=deep_supervision).eval()
    x = torch.randn(1, 1, *ODD[dim])
    file = io.BytesIO()
    torch.save(network, file)
    file.seek(0)
    for other in (
        pickle.loads(pickle.dumps(network)),
        copy.deepcopy(network),
        torch.load(file, weights_only=False),
    ):
        torch.testing.assert_close(other(x), network(x), rtol=0, atol=0)
        assert {n for n, p in other.named_parameters() if p.requires_grad} == {
            n for n, p in network.named_parameters() if p.requires_grad
        }


def test_every_parameter_is_saved_once(dim):
    network = tiny_network(dim)
    addresses = [value.data_ptr() for value in network.state_dict().values()]
    assert len(addresses) == len(set(addresses))


# --- DDP -----------------------------------------------------------------------------------------------------------

N_PROCESSES = 2


def ddp_network(deep_supervision: bool) -> nn.Module:
    """Statistics of a batch differ between half a batch and a whole one, so BatchNorm keeps its running ones here."""
    torch.manual_seed(0)
    network = tiny_network(3, deep_supervision=deep_supervision).double()
    for module in network.modules():
        if isinstance(module, _BatchNorm):
            module.eval()
    return network


def ddp_loss(out: torch.Tensor | list[torch.Tensor]) -> torch.Tensor:
    outputs = out if isinstance(out, list) else [out]
    weights = deep_supervision_weights(len(outputs), every_head_needs_gradient=True)
    return sum(w * o.square().mean() for w, o in zip(weights, outputs, strict=True))


def ddp_batch() -> torch.Tensor:
    return torch.randn(4, 1, *ODD[3], dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def ddp_process(rank: int, port: int, deep_supervision: bool, path: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"tcp://127.0.0.1:{port}",
        rank=rank,
        world_size=N_PROCESSES,
        timeout=gloo.TIMEOUT,
    )
    network = DistributedDataParallel(ddp_network(deep_supervision))
    part = ddp_batch().chunk(N_PROCESSES)[rank]
    for _ in range(2):  # a parameter without a gradient stops DDP at the second step
        network.zero_grad()
        ddp_loss(network(part)).backward()
    network.module.decoder.deep_supervision = False  # as at the end of nnU-Net's training
    with torch.no_grad():
        assert isinstance(network.module(part), torch.Tensor)
    if rank == 0:
        torch.save([p.grad for p in network.module.parameters()], path)
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("deep_supervision", [False, True])
def test_ddp_gives_the_gradients_of_the_whole_batch(deep_supervision, tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    path = tmp_path / "gradients.pt"
    gloo.processes(ddp_process, (port, deep_supervision, str(path)), N_PROCESSES)

    network = ddp_network(deep_supervision)
    ddp_loss(network(ddp_batch())).backward()
    heads = sum(p.grad is None for p in network.parameters())
    assert heads == (0 if deep_supervision else 2 * 3)
    for gradient, p in zip(torch.load(path), network.parameters(), strict=True):
        assert (gradient is None) == (p.grad is None)
        if gradient is not None:
            torch.testing.assert_close(gradient, p.grad, rtol=1e-7, atol=1e-10)


def test_tracing_is_refused_in_one_sentence():
    network = LGMSNet.paper(1, 2, dim=2).eval()
    with pytest.raises(RuntimeError, match="cannot be recorded by torch.jit.trace: use torch.export"):
        torch.jit.trace(network, torch.randn(1, 1, 32, 32))
