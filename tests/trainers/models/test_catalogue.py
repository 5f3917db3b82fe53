"""The list of models, and what is said of each."""

import pytest

from bigbatch.trainers.models.catalogue import describe, main, matching


def test_a_pattern_or_a_word() -> None:
    assert {"resnet18", "seresnet18", "torchvision:resnet18"} < set(matching("resnet18"))
    assert matching("resnet1[0-9]") == ["resnet18"]
    assert "torchvision:resnet18" not in matching("resnet*")
    assert set(matching("torchvision:*")) & {"torchvision:vgg11", "torchvision:vit_b_16"}
    assert {"lenet5", "zfnet", "nin", "resnet50", "torchvision:alexnet"} <= set(matching("*"))
    assert matching("no such model") == []


@pytest.mark.parametrize(
    ("name", "parameters", "gflops", "size"),
    [
        # He et al. 2016, and torchvision's tables: 1.81 and 0.71 G multiply-additions.
        ("resnet18", 11_689_512, 3.63, [3, 224, 224]),
        ("torchvision:alexnet", 61_100_840, 1.43, [3, 224, 224]),
        ("torchvision:inception_v3", 23_834_568, 11.4, [3, 299, 299]),  # without its second head
        ("vit_tiny_patch16_224", 5_717_416, 2.51, [3, 224, 224]),
        ("lenet5", 61_706 - 850 + 85_000, 0.001, [1, 32, 32]),
    ],
)
def test_parameters_flops_and_size(
    name: str, parameters: int, gflops: float, size: list[int]
) -> None:
    found = describe(name, classes=1000)
    assert found["parameters"] == parameters
    assert found["flops"] / 1e9 == pytest.approx(gflops, rel=0.03)
    assert found["input_size"] == size


def test_only_so_many_are_measured() -> None:
    found = main("resnet18*", 1, 10)
    assert len(found["names"]) > 1
    assert [model["name"] for model in found["models"]] == ["resnet18"]
    assert found["models"][0]["parameters"] == 11_689_512 - 513 * 990
