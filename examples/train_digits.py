"""Train the demo Vision Transformer of `fxlrp.demo` on scikit-learn's digits.

    python examples/train_digits.py

Trains on the first 1,437 images and prints the accuracy on the 360 after them, which play no part in
training: the number of epochs is fixed and the last weights, averaged, are kept.
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from fxlrp.demo._weights import write_weights
from fxlrp.demo.digits import DigitsViT, load_digits_data

REPO = Path(__file__).resolve().parents[1]


def augment(images: Tensor) -> Tensor:
    """Turn, scale and shift each image [B, 1, 8, 8] a little."""
    batch = images.shape[0]
    angle = (torch.rand(batch) - 0.5) * 0.5
    scale = 1 + (torch.rand(batch) - 0.5) * 0.3
    shift = (torch.rand(batch, 2) - 0.5) * 0.4
    rows = [
        torch.stack([angle.cos() * scale, -angle.sin() * scale, shift[:, 0]], dim=1),
        torch.stack([angle.sin() * scale, angle.cos() * scale, shift[:, 1]], dim=1),
    ]
    grid = F.affine_grid(torch.stack(rows, dim=1), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


def train(epochs: int, batch: int, rate: float) -> DigitsViT:
    """Return the averaged model after `epochs` epochs."""
    images, labels = load_digits_data("train")
    model = DigitsViT()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.99))
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.05)
    steps = epochs * -(-len(images) // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.1)
    progress = tqdm(range(epochs), desc="digits")
    for _ in progress:
        model.train()
        for rows in torch.randperm(len(images)).split(batch):
            loss = F.cross_entropy(model(augment(images[rows])), labels[rows], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            average.update_parameters(model)
        progress.set_postfix(loss=f"{loss.item():.3f}")
    module = average.module
    assert isinstance(module, DigitsViT)
    return module.eval()


def main() -> None:
    """Train, write the weights and print the accuracy."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--out", type=Path, default=REPO / "fxlrp/demo/weights")
    parser.add_argument("--epochs", type=int, default=150)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)

    model = train(options.epochs, options.batch, options.rate)
    state = model.state_dict()
    write_weights(state, options.out / "digits.safetensors")
    # Rounded as the file is, so that what is measured is what is shipped.
    model.load_state_dict({key: value.half().float() for key, value in state.items()})
    images, labels = load_digits_data("held_out")
    with torch.no_grad():
        hits = (model(images).argmax(dim=1) == labels).float().mean().item()
    print(f"held-out accuracy {hits:.4f}")


if __name__ == "__main__":
    main()
