"""The job of peers.py as users of Lightning write it. Prints one line of JSON at its end.

python benchmarks/peers_lightning.py IMAGES PROCESSES SIZE BATCH EPOCHS LR
"""

import json
import statistics
import sys
import time
from pathlib import Path

import lightning
import timm
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

images, (processes, size, batch, epochs) = Path(sys.argv[1]), map(int, sys.argv[2:6])
lr, micro = float(sys.argv[6]), 64


class Classifier(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = timm.create_model("test_resnet", num_classes=2)
        self.loss = nn.CrossEntropyLoss()
        self.steps: list[float] = []
        self.accuracies: list[float] = []

    def training_step(self, pair: list[Tensor], number: int) -> Tensor:
        found: Tensor = self.loss(self.model(pair[0]), pair[1])
        return found

    def on_before_zero_grad(self, optimizer: torch.optim.Optimizer) -> None:
        self.steps.append(time.perf_counter())

    def validation_step(self, pair: list[Tensor], number: int) -> None:
        right = (self.model(pair[0]).argmax(1) == pair[1]).float().mean()
        self.log("accuracy", right, sync_dist=True, batch_size=len(pair[0]))

    def on_validation_epoch_end(self) -> None:
        self.accuracies.append(float(self.trainer.callback_metrics["accuracy"]))

    def configure_optimizers(self) -> dict[str, object]:
        optimizer = torch.optim.SGD(
            self.parameters(), lr=lr, momentum=0.9, nesterov=True, weight_decay=2e-5
        )
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }


def loader(split: str) -> DataLoader[tuple[Tensor, Tensor]]:
    normalise = transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    if split == "train":
        view = [transforms.RandomResizedCrop(size, (0.35, 1.0)), transforms.RandomHorizontalFlip()]
    else:
        view = [transforms.Resize(round(size / 0.875)), transforms.CenterCrop(size)]
    return DataLoader(
        ImageFolder(images / split, transforms.Compose([*view, transforms.ToTensor(), normalise])),
        micro,
        shuffle=split == "train",
        drop_last=split == "train",
        num_workers=1,
        persistent_workers=True,
    )


if __name__ == "__main__":
    classifier = Classifier()
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=processes,
        strategy="ddp" if processes > 1 else "auto",
        max_epochs=epochs,
        accumulate_grad_batches=batch // (micro * processes),
        num_sanity_val_steps=0,
        enable_progress_bar=False,
        logger=True,
        log_every_n_steps=1,
    )
    trainer.fit(classifier, loader("train"), loader("val"))
    if trainer.is_global_zero:
        pairs = zip(classifier.steps[1:], classifier.steps, strict=False)
        step = statistics.median(later - earlier for later, earlier in pairs)
        found = {"images_per_s": batch / step, "accuracy": 100 * max(classifier.accuracies)}
        print(json.dumps(found))
