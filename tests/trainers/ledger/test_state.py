"""What is digested of a model, against the tensors that a checkpoint would hold."""

import torch
from torch import Tensor, nn

from bigbatch.trainers.engine.ddp import DdpEngine
from bigbatch.trainers.ledger.multipliers import MASK, digest_bytes
from bigbatch.trainers.ledger.state import StateDigests


class Tied(nn.Module):
    """One weight under two names, one that nobody trains, and a buffer that no file has."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.norm = nn.Linear(3, 3), nn.Linear(3, 3), nn.BatchNorm1d(3)
        self.second.weight = self.first.weight
        self.first.bias.requires_grad_(False)
        self.register_buffer("table", torch.ones(4), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.second(self.first(x)))


def test_weights_and_buffers_are_those_of_a_state_dict() -> None:
    torch.manual_seed(0)
    model = Tied()
    engine = DdpEngine("fp32", "exact")
    trained = [p for p in model.parameters() if p.requires_grad]
    engine.prepare(model, torch.optim.SGD(trained, 0.1), 1)
    digests = StateDigests(engine)

    def found() -> int:
        return int(digests.weights() + digests.buffers()) & MASK

    def expected() -> int:
        parts = model.state_dict().items()
        sums = (
            digest_bytes(
                n, t.reshape(-1).view(torch.uint8).numpy().tobytes(), t.element_size(), t.shape
            )
            for n, t in parts
        )
        return sum(sums) & MASK

    before = found()
    assert before == expected()
    with torch.no_grad():
        model.first.weight[1, 2] += 1
    assert found() == expected() != before
    model.table += 1
    assert found() == expected()
