"""Input pipelines of timm's loader and transformers' example script.

Both are set up as in their authors' scripts, except for the augmentation, which is hfvit's policy `basic`: a random
crop of 80 to 100 % of the area, bicubic resize and a flip.
"""

MEAN = STD = (0.5, 0.5, 0.5)
SCALE = (0.8, 1.0)


def timm_dataset(folder: str):
    """Create timm's data set of the same Parquet files."""
    from timm.data import create_dataset

    return create_dataset(f"hfds/{folder}", root=None, split="train", input_img_mode="RGB")


def timm_loader(dataset, image_size: int, batch_size: int, workers: int, device: str):
    """Create timm's training loader with the benchmarks' augmentation."""
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
    """Load the train split with the example script's transforms."""
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
    """Collate like the example script."""
    import torch

    pixels = torch.stack([example["pixel_values"] for example in examples])
    return {"pixel_values": pixels, "labels": torch.tensor([example["label"] for example in examples])}
