"""Compressed weights: packed, and read into the network that they fit."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from bigbatch.configs.errors import UserError
from bigbatch.trainers.models.compressed import (
    compression_of,
    decode,
    load_compressed,
    pack,
    reshape,
    unpack,
)
from bigbatch.trainers.models.weights_file import COMPRESSION, open_weights


@given(st.integers(1, 8), st.data())
def test_packed_indices_take_their_bits_and_come_back(bits: int, data: st.DataObject) -> None:
    numbers = data.draw(st.lists(st.integers(0, 2**bits - 1), max_size=50))
    packed = pack(np.array(numbers, np.uint8), bits)
    assert len(packed) == -(-len(numbers) * bits // 8)
    as_one = int.from_bytes(packed.tobytes(), "big") >> (-len(numbers) * bits % 8)
    by_hand = [(as_one >> bits * i) % 2**bits for i in reversed(range(len(numbers)))]
    assert by_hand == numbers
    assert unpack(packed, bits, len(numbers)).tolist() == numbers


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.Conv2d(8, 8, 3, groups=8),
        nn.GroupNorm(2, 8),
        nn.Flatten(),
        nn.Linear(8, 5),
        nn.LayerNorm(5),
    ).eval()


def test_layers_become_as_large_as_their_tensors() -> None:
    model = network()
    model[0].weight.requires_grad_(False)
    shapes = {
        "0.weight": (4, 3, 3, 3), "0.bias": (4,), "1.weight": (4,), "1.bias": (4,),
        "1.running_mean": (4,), "1.running_var": (4,), "2.weight": (4, 1, 3, 3), "2.bias": (4,),
        "3.weight": (4,), "3.bias": (4,), "5.weight": (3, 4), "5.bias": (3,), "6.weight": (3,),
        "6.bias": (3,),
    }  # fmt: skip
    reshape(model, {name: torch.ones(shape) for name, shape in shapes.items()})
    found = {n: tuple(t.shape) for n, t in model.state_dict().items() if t.ndim}
    assert found == shapes
    assert (model[0].in_channels, model[0].out_channels) == (3, 4)
    assert (model[2].in_channels, model[2].out_channels, model[2].groups) == (4, 4, 4)
    assert (model[1].num_features, model[3].num_channels) == (4, 4)
    assert (model[5].in_features, model[5].out_features) == (4, 3)
    assert model[6].normalized_shape == (3,)
    assert not model[0].weight.requires_grad
    assert model[5].weight.requires_grad
    assert model(torch.zeros(2, 3, 5, 5)).shape == (2, 3)


def save(path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    save_file(tensors, path, {COMPRESSION: "codebook"})
    return path


def test_no_run_starts_from_tensors_that_its_model_does_not_have(tmp_path: Path) -> None:
    path = save(tmp_path / "a.safetensors", {"weight.codebook": torch.ones(4)})
    with pytest.raises(UserError, match=r"was compressed by codebook, .* give the weights that it"):
        open_weights(path)


def test_a_file_says_what_it_is(tmp_path: Path) -> None:
    assert compression_of(save(tmp_path / "a", {})) == "codebook"
    save_file({}, tmp_path / "plain", {"format": "pt"})
    (tmp_path / "damaged").write_bytes(b"no")
    for name in ("plain", "damaged", "missing"):
        assert compression_of(tmp_path / name) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"5.weight": None}, "Missing key"),
        ({"9.weight": torch.ones(2)}, "Unexpected key"),
        ({"5.weight": torch.ones(5, 8, 1)}, "5.weight has shape .5, 8, 1., the model's .5, 8."),
        ({"5.weight": None, "5.weight.codebook": torch.ones(4)}, "belongs to no tensor"),
        (
            {"5.weight.codebook": torch.ones(3), "5.weight.indices": torch.ones(5).byte()},
            "of 3 entries belongs to no tensor",
        ),
        (
            {"5.weight.codebook": torch.ones(4), "5.weight.indices": torch.ones(9).byte()},
            "9 bytes of indices for 40 weights of 2 bits",
        ),
    ],
)
def test_a_file_that_does_not_fit_is_one_error(
    change: dict[str, torch.Tensor | None], message: str, tmp_path: Path
) -> None:
    tensors = {**network().state_dict(), **change}
    path = save(tmp_path / "a", {name: t for name, t in tensors.items() if t is not None})
    with pytest.raises(UserError, match=f"(?s){message}.*make it again with `bigbatch compress`"):
        load_compressed(network(), path)


def test_a_codebook_of_four_values_by_hand() -> None:
    model = nn.Linear(2, 3, bias=False)
    book = torch.tensor([-1.0, 0.0, 0.5, 2.0])
    packed = torch.tensor([0b00011011, 0b11100000], dtype=torch.uint8)
    (weight,) = decode({"weight.codebook": book, "weight.indices": packed}, model).values()
    assert weight.tolist() == [[-1.0, 0.0], [0.5, 2.0], [2.0, 0.5]]
