"""Retention in a vision transformer of timm: train with attention, replace it, train on; and retention from the start.

    python docs/examples/vision.py

The images are scikit-learn's digits, 8 x 8 pixels, which come with the library. Retention on an image decays with the
distance in rows plus that in columns. The script takes about a minute on a CPU.
"""

from __future__ import annotations

import argparse

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from timm.models import VisionTransformer
from torch.nn import functional as F

from retention.integrations.swap import replace_attention
from retention.integrations.timm import retention_layer

Data = tuple[torch.Tensor, torch.Tensor]  # images and their classes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=20, help="epochs of each training")
    options = parser.parse_args()
    torch.manual_seed(0)
    train, test = digits()

    model = new_model()
    fit(model, train, options.epochs)
    print(f"attention: {accuracy(model, test):.1f} %")

    images, _ = train
    print(replace_attention(model, calibrate_on={"x": images[:64]}))
    print(f"replaced by retention, not trained on: {accuracy(model, test):.1f} %")
    fit(model, train, max(1, options.epochs // 4))
    print(f"replaced by retention, trained on for a quarter as long: {accuracy(model, test):.1f} %")

    scratch = new_model(attn_layer=retention_layer(features=False, gate="silu"))
    fit(scratch, train, options.epochs)
    print(f"retention from the start: {accuracy(scratch, test):.1f} %")


def digits() -> tuple[Data, Data]:
    pixels, classes = load_digits(return_X_y=True)
    images = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8) / 16
    learnt, tested = train_test_split(range(len(images)), test_size=500, random_state=0, stratify=classes)
    labels = torch.tensor(classes)
    return (images[learnt], labels[learnt]), (images[tested], labels[tested])


def new_model(**options: object) -> VisionTransformer:
    sizes = dict(img_size=8, patch_size=2, in_chans=1, embed_dim=64, depth=4, num_heads=4, mlp_ratio=2)
    return VisionTransformer(num_classes=10, **sizes, **options)


def fit(model: VisionTransformer, data: Data, epochs: int) -> None:
    images, classes = data
    steps = epochs * (len(images) // 64)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 1e-3, total_steps=steps, pct_start=0.1)
    model.train()
    for _ in range(steps):
        chosen = torch.randint(len(images), (64,))
        F.cross_entropy(model(images[chosen]), classes[chosen]).backward()
        optimiser.step()
        schedule.step()
        optimiser.zero_grad()


@torch.inference_mode()
def accuracy(model: VisionTransformer, data: Data) -> float:
    """In percent."""
    images, classes = data
    return 100 * (model.eval()(images).argmax(1) == classes).float().mean().item()


if __name__ == "__main__":
    main()
