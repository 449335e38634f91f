"""ZNorm with the Trainer of Hugging Face's transformers: an optimizer of your own, with the method attached.

The attached method runs right before each step: after accumulation, after the Trainer's clipping (which it undoes), and
after a ``GradScaler`` has unscaled the gradients, whatever the Trainer's arguments are. Attach it before you give the
optimizer to the Trainer. A callback's ``on_pre_optimizer_step`` does not work in fp16 without clipping: there, the
gradients are still scaled.

The program trains a small vision transformer, made from its configuration without a download, on the 1,797 handwritten
digits that come with scikit-learn.

    pip install transformers accelerate
    python examples/huggingface.py
"""

import tempfile

import torch
from sklearn.datasets import load_digits
from torch.utils.data import random_split
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification, set_seed

from lightning_znorm.functional import attach

EPOCHS = 20


def main() -> None:
    set_seed(0)
    pixels, digits = load_digits(return_X_y=True)
    images = torch.as_tensor(pixels / 16, dtype=torch.float32).view(-1, 1, 8, 8)
    data = [{"pixel_values": image, "labels": int(digit)} for image, digit in zip(images, digits, strict=True)]
    train_set, test_set = random_split(data, [0.8, 0.2])

    config = ViTConfig(
        image_size=8,
        patch_size=2,
        num_channels=1,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        num_labels=10,
    )
    model = ViTForImageClassification(config)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    attach(optimizer)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            num_train_epochs=EPOCHS,
            per_device_train_batch_size=64,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
        )
        trainer = Trainer(
            model=model,
            args=arguments,
            train_dataset=train_set,
            eval_dataset=test_set,
            optimizers=(optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)),
            compute_metrics=lambda result: {"accuracy": (result.predictions.argmax(1) == result.label_ids).mean()},
        )
        trainer.train()
        print(f"test accuracy {trainer.evaluate()['eval_accuracy']:.3f}")


if __name__ == "__main__":
    main()
