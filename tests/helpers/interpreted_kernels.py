"""The GPU's kernels in Triton's interpreter, on tensors of the CPU.

The path on a CPU is held to formulas in NumPy elsewhere; here the kernels are held to it. Run
by tests/trainers/optim/test_gpu.py, in a process of its own: TRITON_INTERPRET=1 must be there
from the start.
"""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bigbatch.trainers.optim import layerwise
from bigbatch.trainers.optim.lamb import LAMB
from bigbatch.trainers.optim.lars import LARS

CHUNK = 64  # small, so that small layers have several
SHAPES = [(8, 3, 3, 3), (130,), (64,), (5,), (4, 32), (7,)]

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "lars": lambda p: LARS(p, lr=0.5, weight_decay=0.01),
    "lars nesterov": lambda p: LARS(p, lr=0.5, weight_decay=0.01, nesterov=True),
    "lars lr_outside": lambda p: LARS(
        p, lr=0.5, weight_decay=0.01, momentum_form="lr_outside", eps=1e-3
    ),
    "lars lr_outside nesterov": lambda p: LARS(
        p, lr=0.5, momentum=0.8, momentum_form="lr_outside", nesterov=True
    ),
    "lars trust_clip": lambda p: LARS(p, lr=0.002, weight_decay=0.01, trust_clip=True),
    "lars no momentum": lambda p: LARS(p, lr=torch.tensor(0.5), momentum=0),
    "lamb": lambda p: LAMB(p, lr=0.05, weight_decay=0.1),
    "lamb no correction": lambda p: LAMB(p, lr=0.05, bias_correction=False),
    "lamb bounds": lambda p: LAMB(p, lr=torch.tensor(0.05), trust_bounds=(0, 0.5)),
    "lamb betas and eps 0": lambda p: LAMB(p, lr=0.05, betas=(0.0, 0.9), eps=0.0),
}


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module that launches the kernels, with chunks as small as the layers here."""
    from bigbatch.trainers.optim import gpu

    monkeypatch.setattr(gpu, "CHUNK", CHUNK)
    monkeypatch.setattr(gpu, "SUMMED", 2)
    return gpu


def use_kernels(monkeypatch: pytest.MonkeyPatch, gpu: ModuleType | None) -> None:
    """Steps as on a GPU: all layers together, by the kernels where there are any."""
    monkeypatch.setattr(layerwise, "gpu_kernels", lambda kind, device: gpu)
    monkeypatch.setattr(layerwise, "on_cpu", lambda tensors: gpu is None)


def make_params(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(shape).to(dtype)) for shape in SHAPES]
    params[0].data = params[0].data.to(memory_format=torch.channels_last)
    params[3].data.zero_()  # no length: a trust ratio of 1
    return params


def set_gradients(params: list[nn.Parameter], step: int) -> None:
    """A contiguous one for the channels-last weight, one that starts at no multiple of 16
    bytes, and one of zeros."""
    torch.manual_seed(1 + step)
    for p in params:
        p.grad = torch.randn(p.shape).to(p.dtype).contiguous()
    room = torch.randn(1 + SHAPES[4][0] * SHAPES[4][1]).to(params[4].dtype)
    params[4].grad = room[1:].view(SHAPES[4])
    params[2].grad = torch.zeros_like(params[2])


def after_steps(
    make: Callable[[Any], torch.optim.Optimizer], dtype: torch.dtype
) -> tuple[list[nn.Parameter], torch.optim.Optimizer, Tensor]:
    params = make_params(dtype)
    optimizer = make(
        [{"params": params[:5]}, {"params": params[5:], "adapt": False, "weight_decay": 0.0}]
    )
    for step in range(2):  # the second has state to go on with
        set_gradients(params, step)
        optimizer.step()
    return params, optimizer, torch.cat([ratios for _, ratios in optimizer.last_ratios])  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_kernels_step_as_the_path_on_a_cpu_does(
    name: str, interpreted: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_kernels(monkeypatch, None)
    wanted, reference, wanted_ratios = after_steps(OPTIMIZERS[name], torch.float32)
    use_kernels(monkeypatch, interpreted)
    found, optimizer, ratios = after_steps(OPTIMIZERS[name], torch.float32)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=1e-6, equal_nan=True)
        for key, value in reference.state[b].items():
            torch.testing.assert_close(optimizer.state[a][key], value, rtol=2e-6, atol=1e-7)
    torch.testing.assert_close(ratios, wanted_ratios, rtol=2e-6, atol=1e-7, equal_nan=True)


@pytest.mark.parametrize("name", ["lars", "lamb"])
def test_kernels_keep_float32_state_of_half_precision_weights(
    name: str, interpreted: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_kernels(monkeypatch, None)
    wanted, reference, _ = after_steps(OPTIMIZERS[name], torch.float16)
    use_kernels(monkeypatch, interpreted)
    found, optimizer, _ = after_steps(OPTIMIZERS[name], torch.float16)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-3, atol=1e-3)  # the last bit of float16
        for key, value in reference.state[b].items():
            assert optimizer.state[a][key].dtype == torch.float32
            torch.testing.assert_close(optimizer.state[a][key], value, rtol=2e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["lars", "lamb"])
def test_pieces_of_layers_step_as_the_whole_does(
    name: str, interpreted: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two ranks hold a part of each layer, one of them nothing of the last."""
    use_kernels(monkeypatch, interpreted)
    torch.manual_seed(0)
    sizes, cuts = (200, 9, 40), (70, 3, 0)
    weights, grads = ([torch.randn(n) for n in sizes] for _ in range(2))

    def stepping(weights: list[Tensor], grads: list[Tensor]) -> tuple[Any, list[nn.Parameter]]:
        params = [nn.Parameter(w.clone()) for w in weights]
        for p, g in zip(params, grads, strict=True):
            p.grad = g.clone()
        return OPTIMIZERS[name](params), params

    optimizer, whole = stepping(weights, grads)
    optimizer.step()
    pieces = [
        [[t[:n] for t, n in zip(tensors, cuts, strict=True)] for tensors in (weights, grads)],
        [[t[n:] for t, n in zip(tensors, cuts, strict=True)] for tensors in (weights, grads)],
    ]
    sent: list[Tensor] = []
    for piece in pieces:
        optimizer, _ = stepping(*piece)
        optimizer.sum_over_ranks = lambda squares: sent.append(squares) or squares
        optimizer.step()
    stepped = []
    for piece in pieces:
        optimizer, params = stepping(*piece)
        optimizer.sum_over_ranks = lambda squares: sent[0] + sent[1]
        optimizer.step()
        stepped.append(params)
    for joined, p in zip(zip(*stepped, strict=True), whole, strict=True):
        torch.testing.assert_close(torch.cat(joined), p.data, rtol=1e-6, atol=1e-7)


def test_a_step_is_checked_before_kernels_are_trusted(
    interpreted: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = torch.device("cpu")
    refusal = interpreted.refusal.__wrapped__
    assert refusal(LARS, device) is None
    assert refusal(LAMB, device) is None
    monkeypatch.setattr(interpreted.Tables, "lamb_update", lambda self, squares, group: None)
    assert "off by" in refusal(LAMB, device)
    monkeypatch.setattr(interpreted.kernels, "lars_squares", None)
    assert "TypeError" in refusal(LARS, device)


def test_addresses_are_copied_only_where_one_has_moved(interpreted: ModuleType) -> None:
    params = make_params()
    tables = interpreted.Tables(params)
    tables.point_at(params, params)
    first = tables.addresses
    tables.point_at(params, params)
    assert tables.addresses is first
    params[1].data = params[1].data.clone()
    tables.point_at(params, params)
    assert tables.addresses.tolist() == [[p.data_ptr() for p in params]] * 2


def test_a_copy_of_addresses_that_a_graph_captured_serves_that_graph_alone(
    interpreted: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It runs when the graph does: a step before that would read what nobody has written."""
    monkeypatch.setattr(Tensor, "pin_memory", lambda self: self)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    params: list[Tensor] = [torch.empty(4, device="meta")]
    tables = interpreted.Tables(params)
    tables.point_at(params)
    captured = tables.addresses
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    tables.point_at(params)
    copied = tables.addresses
    assert copied is not captured
    tables.point_at(params)
    assert tables.addresses is copied
    assert interpreted.Tables(params, tables)._captured == [tables]  # the graph still reads it


def test_kernels_start_on_the_device_of_their_tensors(
    interpreted: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Triton would take the current device, where these addresses mean nothing."""
    entered: list[int] = []

    class Device:
        def __init__(self, index: int) -> None:
            self.index = index

        def __enter__(self) -> None:
            entered.append(self.index)

        def __exit__(self, *exception: object) -> None:
            entered.pop()

    class Kernel:
        def __getitem__(self, grid: Any) -> Any:
            return lambda *arguments, **options: started.append((grid, list(entered)))

    started: list[Any] = []
    monkeypatch.setattr(torch.cuda, "device", Device)
    for name in ("lars_squares", "layer_sums", "lars_update", "lamb_moments", "lamb_update"):
        monkeypatch.setattr(interpreted.kernels, name, Kernel())
    tables = interpreted.Tables(make_params())
    tables._on_device = Device(1)
    lars, lamb = LARS(make_params(), lr=0.1), LAMB(make_params(), lr=0.1)
    tables.lars_update(tables.lars_squares(), lars.param_groups[0])
    tables.lamb_update(tables.lamb_moments(lamb.param_groups[0]), lamb.param_groups[0])
    assert len(started) == 6
    assert all(devices == [1] for _, devices in started)


def test_state_of_another_dtype_is_left_to_torch(
    interpreted: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch's own `load_state_dict` rounds state to the dtype of the weights; kernels that take
    its addresses would read beyond its end."""
    stepped = []
    for kernels in (None, interpreted):
        use_kernels(monkeypatch, kernels)
        monkeypatch.setattr(layerwise, "on_cpu", lambda tensors: False)
        params = make_params(torch.float16)
        optimizer = OPTIMIZERS["lars"](params)
        for step in range(2):
            set_gradients(params, step)
            optimizer.step()
            optimizer.load_state_dict(optimizer.state_dict())
        assert optimizer.state[params[1]]["momentum_buffer"].dtype == torch.float16
        stepped.append(params)
    for a, b in zip(*stepped, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-3, atol=1e-3)
