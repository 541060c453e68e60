"""Warm-start a ConvMix twin from a plain timm model and fine-tune it: real images, no network, under a minute.

The images are scikit-learn's 1,797 scanned digits. A small plain network is trained on 400 of them; its twin starts as
exactly that network and goes on with all of the training images. No comparison: the first part saw fewer images.

    python examples/finetune_digits.py
"""

import timm
import torch
from sklearn.datasets import load_digits
from timm.optim import create_optimizer_v2
from torch.nn import functional as F

from timm_convmix import ConvMixNet


def train(model: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor, *, epochs: int, lr: float) -> None:
    """Minimise the cross-entropy with timm's AdamW, 16 images a step."""
    optimizer = create_optimizer_v2(model, opt="adamw", lr=lr, weight_decay=0.05)
    model.train()
    for _ in range(epochs):
        for batch in torch.randperm(len(images)).split(16):
            optimizer.zero_grad()
            F.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()


@torch.no_grad()
def accuracy(model: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    """Share of right predictions."""
    return float((model.eval()(images).argmax(1) == labels).float().mean())


def main() -> None:
    """Train the plain network, warm-start its twin, fine-tune that."""
    torch.manual_seed(0)
    digits = load_digits()
    images = F.interpolate(torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16, size=32, mode="bilinear")
    labels = torch.tensor(digits.target)
    test = images[-297:], labels[-297:]

    plain = timm.create_model("test_resnet", num_classes=10, in_chans=1)
    train(plain, images[:400], labels[:400], epochs=4, lr=2e-3)
    print(f"plain test_resnet, 400 images         {accuracy(plain, *test):.1%} of {len(test[0])} test images")

    model = ConvMixNet(plain, warm_start=True)
    print(f"convmix_test_resnet, as it starts     {accuracy(model, *test):.1%}")

    train(model, images[:1500], labels[:1500], epochs=4, lr=5e-4)
    print(f"convmix_test_resnet, fine-tuned       {accuracy(model, *test):.1%}")


if __name__ == "__main__":
    main()
