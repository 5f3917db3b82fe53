"""Structured pruning: whole channels go, and a smaller dense network is left."""

import copy
import warnings
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bigbatch.configs.errors import UserError
from bigbatch.trainers.compress.pruning import Batch
from bigbatch.trainers.models.compressed import reshape
from bigbatch.trainers.optim.groups import classifiers


def prune_channels(
    model: nn.Module, fresh: nn.Module, share: float, images: Tensor, batches: Sequence[Batch] = ()
) -> nn.Module:
    """A network without `share` of the channels of each group of layers that depend on another.

    Channels are scored over all layers of their group: by the mean over its layers of the sum
    of |w| (Li et al. 2017, arXiv:1608.08710), or, where there are `batches`, of |w dL/dw| with
    their mean gradient (Molchanov et al. 2019, arXiv:1906.10771), in which Torch-Pruning 1.6
    leaves BatchNorm out (findings/torch-pruning-taylor-batchnorm.sh). Which layers depend on
    another is found by Torch-Pruning (Fang et al. 2023, arXiv:2301.12900), by a forward pass of
    `images` [B, C, H, W]. The classifier's outputs stay. `fresh` is a network of the same name,
    not changed, which is made to take the weights as it will be when they are loaded; UserError
    where that gives another network, or the sizes of layers do not fit together any more.
    """
    import torch_pruning as tp

    pruned = copy.deepcopy(model).eval().requires_grad_(True)
    try:
        if batches:
            for seen, labels in batches:
                (F.cross_entropy(pruned(seen), labels) / len(batches)).backward()
            scores = tp.importance.GroupTaylorImportance()
        else:
            scores = tp.importance.GroupMagnitudeImportance(p=1)
        with warnings.catch_warnings(action="ignore"):  # of parameters outside of layers
            tp.pruner.BasePruner(
                pruned,
                images,
                importance=scores,
                pruning_ratio=share,
                ignored_layers=classifiers(pruned),
            ).step()
        network = copy.deepcopy(fresh).eval()
        tensors = pruned.state_dict()
        reshape(network, tensors)
        network.load_state_dict(tensors)
        same = _same(network, pruned, images)
    except Exception as error:  # whatever a model's own code does with sizes that have changed
        raise _impossible(str(error).strip().partition("\n")[0]) from error
    if not same:
        raise _impossible("the sizes of its layers do not say how it computes")
    return network


@torch.no_grad()
def _same(a: nn.Module, b: nn.Module, images: Tensor) -> bool:
    return torch.equal(a(images), b(images))


def _impossible(why: str) -> UserError:
    return UserError(
        f"channels of this network cannot be pruned ({why:.200}); use --method prune or lowrank"
    )
