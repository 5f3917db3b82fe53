"""The seal on a file of weights: any change of what it holds is seen, and nothing else is."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from bigbatch.trainers.models.seal import check_seal, sealed
from bigbatch.trainers.models.weights_file import WeightsInfo, read_header, to_metadata
from bigbatch.trainers.recovery.tensor_files import write_tensors

INFO = WeightsInfo("resnet18", ("ant", 'naïve "bee"'), (0.1, 0.2), (1.0, 0.5), 32, 2)
TENSORS = {
    "weight": torch.arange(6.0).reshape(2, 3),
    "count": torch.zeros((), dtype=torch.int64),
    "half": torch.ones(3, dtype=torch.bfloat16),
    "mask": torch.tensor([True, False]),
    "empty": torch.zeros(0, 4),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("seal") / "w.safetensors"
    write_tensors(path, TENSORS, INFO)
    check_seal(path, load_file(path))
    return path.read_bytes()


@given(st.data())
def test_no_bit_of_the_tensors_flips_unseen(
    whole: bytes, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    start = 8 + int.from_bytes(whole[:8], "little")
    place = data.draw(st.integers(start, len(whole) - 1))
    bit = 0 if place >= len(whole) - 2 else data.draw(st.integers(0, 7))  # the mask has one a byte
    flipped = whole[place] ^ 1 << bit
    path = tmp_path_factory.mktemp("flipped") / "w.safetensors"
    path.write_bytes(whole[:place] + bytes([flipped]) + whole[place + 1 :])
    with pytest.raises(ValueError, match="not those that were written"):
        check_seal(path, load_file(path))


@pytest.mark.parametrize(("old", "new"), [(b"ant", b"aut"), (b"0.1", b"0.7")])
def test_metadata_are_sealed_too(whole: bytes, tmp_path: Path, old: bytes, new: bytes) -> None:
    path = tmp_path / "w.safetensors"
    path.write_bytes(whole.replace(old, new, 1))
    with pytest.raises(ValueError, match="not those that were written"):
        check_seal(path, load_file(path))


def test_names_shapes_and_dtypes_are_sealed() -> None:
    def seal(metadata: dict[str, str], tensors: dict[str, torch.Tensor]) -> str:
        return sealed(metadata, tensors)["bigbatch-sha256"]

    metadata, weight = to_metadata(INFO), TENSORS["weight"]
    others = [
        {**TENSORS, "weight": weight.reshape(3, 2)},
        {**TENSORS, "weight": weight.view(torch.int32)},
        {("other" if name == "weight" else name): t for name, t in TENSORS.items()},
        {name: t for name, t in TENSORS.items() if name != "empty"},
    ]
    assert seal(metadata, TENSORS) not in [seal(metadata, other) for other in others]
    turned = dict(reversed(metadata.items())), dict(reversed(TENSORS.items()))
    assert seal(*turned) == seal(metadata, TENSORS)


def test_files_of_others_have_none(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "w", {"format": "pt"})
    check_seal(tmp_path / "w", load_file(tmp_path / "w"))
    write_tensors(tmp_path / "plain", TENSORS)
    assert not read_header(tmp_path / "plain").metadata
    check_seal(tmp_path / "plain", load_file(tmp_path / "plain"))
