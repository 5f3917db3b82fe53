"""Members' logits to one prediction, as a graph: combination.py says by which rules."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bigbatch.trainers.ensemble.combination import TIE, Combination
from bigbatch.trainers.ensemble.trees import Trees


class Combine(nn.Module):
    """`Combination.apply` as a graph: logits [M, N, C] -> probabilities float32 [N, C].

    In float32, therefore in logarithms, which keep what is far below 1 for the temperature.
    """

    log_weights: Tensor  # [M, 1, 1]
    coefficients: Tensor  # [C, M * C], of "stack" alone
    intercepts: Tensor  # [C]

    def __init__(self, combination: Combination, members: int) -> None:
        super().__init__()
        self.method, self.temperature = combination.method, combination.temperature
        weights = combination.weights or (1 / members,) * members
        self.register_buffer("log_weights", torch.tensor(weights).log()[:, None, None])
        for name in ("coefficients", "intercepts"):
            values = getattr(combination, name)
            tensor = None if values is None else torch.tensor(values, dtype=torch.float32)
            self.register_buffer(name, tensor)
        self.trees = None if combination.trees is None else TreeScores(combination.trees)

    def forward(self, logits: Tensor) -> Tensor:
        log_p = self._log_probabilities(logits) / self.temperature
        # Some runtimes' softmax, as a float32 mean of members, comes to 1.0000001.
        return log_p.softmax(1).clamp(max=1)

    def _log_probabilities(self, logits: Tensor) -> Tensor:
        """Up to a constant of each row."""
        if self.method == "logits":
            return logits.mean(0)
        members = logits.log_softmax(2)
        features = members.permute(1, 0, 2).flatten(1)  # [N, M * C]
        if self.method == "stack":
            return F.linear(features, self.coefficients, self.intercepts)
        if self.trees is not None:
            scores: Tensor = self.trees(features)
            return scores
        mixture = (members + self.log_weights).logsumexp(0)
        if self.method != "vote":
            return mixture
        classes = logits.shape[2]
        votes = F.one_hot(logits.argmax(2), classes).sum(0)
        return (votes.float() + TIE * mixture.exp()).log()


class TreeScores(nn.Module):
    """`Trees.scores` as a graph: features [N, D] -> scores [N, C]. All K trees go down together.

    A leaf leads to itself, so that every path is as long as the deepest tree.
    """

    feature: Tensor  # [nodes], 0 for a leaf
    number: Tensor
    left: Tensor
    right: Tensor
    roots: Tensor  # [K]
    outputs: Tensor  # [K, C], 1 where a tree adds to a class
    baseline: Tensor  # [C]

    def __init__(self, trees: Trees) -> None:
        super().__init__()
        own = range(len(trees.feature))
        leaf = [f < 0 for f in trees.feature]
        sides = {
            side: [
                i if end else to for i, end, to in zip(own, leaf, getattr(trees, side), strict=True)
            ]
            for side in ("left", "right")
        }
        depth = [0] * len(own)  # of the tree below each node; children come after it
        for i in reversed(own):
            if not leaf[i]:
                depth[i] = 1 + max(depth[trees.left[i]], depth[trees.right[i]])
        self.depth = max((depth[root] for root in trees.roots), default=0)
        columns = {"feature": [max(f, 0) for f in trees.feature], "roots": trees.roots, **sides}
        for name, column in columns.items():
            self.register_buffer(name, torch.tensor(column, dtype=torch.int64))
        for name in ("number", "baseline"):
            self.register_buffer(name, torch.tensor(getattr(trees, name), dtype=torch.float32))
        outputs = torch.tensor(trees.outputs, dtype=torch.int64)
        self.register_buffer("outputs", F.one_hot(outputs, len(trees.baseline)).float())

    def forward(self, features: Tensor) -> Tensor:
        node = self.roots.expand(features.shape[0], -1)  # not len(), which is fixed when traced
        for _ in range(self.depth):
            asked = features.gather(1, self.feature[node])
            node = torch.where(asked <= self.number[node], self.left[node], self.right[node])
        return self.number[node] @ self.outputs + self.baseline
