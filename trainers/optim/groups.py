"""Which parameters decay and adapt: by the type of the module that owns them."""

import difflib
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from bigbatch.configs.errors import UserError

# Layers whose parameters are scales and shifts of normalised activations. Decaying them has
# no regularising meaning, and a layer-wise rate computed from their norm is noise.
NORM_LAYERS = (
    nn.modules.batchnorm._NormBase,  # batch and instance norms of every dimension
    nn.GroupNorm,
    nn.LayerNorm,
    nn.RMSNorm,
)
# And timm's: every layer that these modules define. By their names, for timm takes two seconds
# to import, and whoever has such a layer has imported it.
TIMM_NORMS = frozenset(
    f"timm.layers.{name}"
    for name in ("evo_norm", "filter_response_norm", "grn", "layer_scale", "norm", "norm_act")
)
_TIMM_EMBEDDINGS = "timm.layers.patch_embed"


def is_norm(module: nn.Module) -> bool:
    """Whether a layer's own parameters are scales and shifts of normalised activations."""
    if isinstance(module, NORM_LAYERS):
        return True
    return any(kind.__module__ in TIMM_NORMS for kind in type(module).__mro__)


def is_bias(attribute: str) -> bool:
    """Whether a module's own attribute is a bias: bias, q_bias, in_proj_bias, bias_ih_l0."""
    return attribute == "bias" or attribute.startswith("bias_") or attribute.endswith("_bias")


def named_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter, bool]]:
    """(name, parameter, plain) of each trainable parameter, once, in the model's order.

    Plain parameters take neither weight decay nor a layer-wise rate: those of norm layers and of
    modules that say `no_decay`, slopes of PReLU (arXiv:1502.01852, section 2.1), biases of any
    module, and what the model itself names in `no_weight_decay()` (timm's position tables and
    tokens). A parameter shared by modules is plain if any of them says so.
    """
    excluded = _excluded_by_model(model)
    plain = set()
    for prefix, module in model.named_modules(remove_duplicate=False):
        for attribute, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            name = f"{prefix}.{attribute}" if prefix else attribute
            kind = is_norm(module) or isinstance(module, nn.PReLU)
            kind = kind or getattr(module, "no_decay", False)
            if kind or is_bias(attribute) or name in excluded:
                plain.add(parameter)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            yield name, parameter, parameter in plain


def parameter_groups(
    model: nn.Module,
    weight_decay: float,
    layer_decay: float = 1.0,
    decays: Mapping[nn.Parameter, float] | None = None,
    factors: Mapping[str, float] | None = None,
    starts: Mapping[str, float] | None = None,
) -> list[dict[str, Any]]:
    """Groups for a torch optimizer: weights, and plain parameters without decay.

    `decays` are those of single weights, which form groups of their own. With `layer_decay`
    below 1 there are groups for each layer, and `lr_scale` is layer_decay^k for the k-th layer
    from the top (BEiT, arXiv:2106.08254), else 1; `factors` multiply it and `starts` are the
    finished steps from which parameters learn, both by name. `adapt` says whether a layer-wise
    optimizer adapts the group. Empty groups are left out.
    """
    depths = _depths(model) if layer_decay < 1.0 else {}
    groups: dict[tuple[int, bool, float, float, float], dict[str, Any]] = {}
    for name, parameter, plain in named_parameters(model):
        depth = depths.get(name, 0)
        decay = 0.0 if plain else (decays or {}).get(parameter, weight_decay)
        factor, start = (factors or {}).get(name, 1.0), (starts or {}).get(name, 0.0)
        group = groups.setdefault(
            (depth, plain, decay, -factor, start),
            {
                "params": [],
                "weight_decay": decay,
                "adapt": not plain,
                "lr_scale": layer_decay**depth * factor,
                "start": start,
            },
        )
        group["params"].append(parameter)
    return [groups[key] for key in sorted(groups)]


def decay_by_layer(model: nn.Module, decays: Mapping[str, float]) -> dict[nn.Parameter, float]:
    """The decay of each weight of the layers that `decays` names; the last one that fits counts.

    A layer is named by its path, or a part of it from the top, in which * stands for any one
    name: never by a piece of a name. `type:Conv2d` names those of a class, or of one below it.
    Raises UserError for a name without any weight that decays.
    """
    found: dict[nn.Parameter, float] = {}
    plain = {parameter for _, parameter, is_plain in named_parameters(model) if is_plain}
    for wanted, decay in decays.items():
        matched = named_layers(wanted, model)
        weights = [p for m in matched for p in m.parameters() if p.requires_grad]
        if not set(weights) - plain:
            paths = [path for path, _ in model.named_modules() if path]
            near = difflib.get_close_matches(wanted, paths, 3) or paths[:3]
            kind = type(model).__name__
            why = f"names no layer with weights of {kind}"
            if weights:
                why = f"has nothing that decays in {kind}: norms and biases never do"
            elif any(True for module in matched for _ in module.parameters()):
                why = f"names what is frozen in {kind}, which does not decay"
            raise UserError(
                f"optimizer.weight_decay_of: {wanted!a:.80} {why}; layers are called "
                f"{', '.join(near)}, ..., or type:Conv2d"
            )
        found.update(dict.fromkeys(set(weights) - plain, decay))
    return found


def named_layers(wanted: str, model: nn.Module) -> list[nn.Module]:
    """The layers of a model that a path with *, or type:Conv2d, names."""
    return [m for path, m in model.named_modules() if path and _names(wanted, path, m)]


def _names(wanted: str, path: str, module: nn.Module) -> bool:
    """Whether `wanted` names this module itself."""
    if wanted.startswith("type:"):
        return wanted.removeprefix("type:") in {kind.__name__ for kind in type(module).__mro__}
    parts, pattern = path.split("."), wanted.split(".")
    pairs = zip(parts, pattern, strict=False)
    return len(parts) == len(pattern) and all(q in ("*", p) for p, q in pairs)


def hidden_matrices(model: nn.Module) -> set[nn.Parameter]:
    """What Muon takes (Jordan et al. 2024): trainable weights of linear layers and convolutions,
    apart from the classifier's and timm's patch embeddings, which take in the pixels of a ViT."""
    layers = nn.Linear | nn.modules.conv._ConvNd
    weights = (m.weight for m in model.modules() if isinstance(m, layers))
    found = {w for w in weights if isinstance(w, nn.Parameter)}
    embeddings = [m for m in model.modules() if type(m).__module__ == _TIMM_EMBEDDINGS]
    for module in (*classifiers(model), *embeddings):
        found -= set(module.parameters())
    return {p for p in found if p.requires_grad}


def _depths(model: nn.Module) -> dict[str, int]:
    """Each parameter's layer, counted from the top, as timm's own layer decay counts it."""
    matcher = getattr(model, "group_matcher", None)
    if not callable(matcher):
        raise UserError(
            f"optimizer.layer_decay: {type(model).__name__} does not say which parameters make "
            "a layer (timm's group_matcher); set layer_decay to 1 or choose another model"
        )
    from timm.models import group_parameters  # as above

    layers = group_parameters(model, matcher(coarse=False), reverse=True)
    top = max(layers.values())
    return {name: top - layer for name, layer in layers.items()}


def classifiers(model: nn.Module) -> list[nn.Module]:
    """The last layer or layers, as a model's get_classifier() names them, which timm's all have.

    Of a model without it the last linear layer or convolution, in the order in which it was built.
    """
    get = getattr(model, "get_classifier", None)
    if callable(get):
        found = get()
        return [found] if isinstance(found, nn.Module) else list(found)
    kinds = nn.Linear | nn.modules.conv._ConvNd
    layers: list[nn.Module] = [m for m in model.modules() if isinstance(m, kinds)]
    return layers[-1:]


def linear_classifier(model: nn.Module, why: str) -> tuple[str, nn.Linear]:
    """Path and layer of the one linear layer that gives a model's logits.

    UserError, with `why` it is needed, where there is no such layer.
    """
    found = classifiers(model)
    for path, module in model.named_modules():
        if [module] == found and isinstance(module, nn.Linear):
            return path, module
    kinds = ", ".join(type(layer).__name__ for layer in found) or "none that it names"
    raise UserError(
        f"{why} needs a model whose logits are one linear layer's; the classifier of this one is "
        f"{kinds}: choose another model, or leave it out"
    )


def _excluded_by_model(model: nn.Module) -> set[str]:
    names = getattr(model, "no_weight_decay", None)
    return set(names()) if callable(names) else set()
