"""Input pipelines of the peers: timm's loader, and that of transformers' example script.

They are set up as in the scripts of their authors, except for the augmentation: random crop of 80 to 100 % of the
area, bicubic resize and flip (hfvit's policy `basic`).
"""

MEAN = STD = (0.5, 0.5, 0.5)
SCALE = (0.8, 1.0)


def timm_dataset(folder: str):
    """Create timm's data set over the parquet files."""
    from timm.data import create_dataset

    return create_dataset(f"hfds/{folder}", root=None, split="train", input_img_mode="RGB")


def timm_loader(dataset, image_size: int, batch_size: int, workers: int, device: str):
    """Create timm's training loader.

    Args:
        dataset: data set of timm.
        image_size: height and width in pixels.
        batch_size: images per batch.
        workers: number of workers.
        device: device to normalize on.
    """
    import torch
    from timm.data import create_loader

    return create_loader(
        dataset,
        (3, image_size, image_size),
        batch_size,
        is_training=True,
        scale=SCALE,
        hflip=0.5,
        color_jitter=None,
        auto_augment=None,
        re_prob=0.0,
        interpolation="bicubic",
        mean=MEAN,
        std=STD,
        num_workers=workers,
        pin_memory=device == "cuda",
        device=torch.device(device),
        use_prefetcher=True,
    )


def transformed_dataset(folder: str, image_size: int):
    """Load the train split with the transforms of the example script."""
    from datasets import load_dataset
    from torchvision import transforms

    transform = transforms.Compose(
        [
            transforms.RandomResizedCrop(image_size, SCALE, interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )

    def apply(examples: dict) -> dict:
        examples["pixel_values"] = [transform(image.convert("RGB")) for image in examples["image"]]
        return examples

    dataset = load_dataset(folder, split="train")
    dataset.set_transform(apply)
    return dataset


def stack(examples: list[dict]) -> dict:
    """Collate as the example script does."""
    import torch

    pixels = torch.stack([example["pixel_values"] for example in examples])
    return {"pixel_values": pixels, "labels": torch.tensor([example["label"] for example in examples])}
