"""Input pipelines of the peers: timm, transformers, torchvision and DALI.

timm's loader and the pipeline of transformers' example script are set up as in the scripts of their authors, the
others as in their documentation: uint8 tensors until the batch is on the device. Augmentation: random crop of 80 to
100 % of the area, bicubic resize and flip (hfvit's policy `basic`).
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


def v2_crop(image_size: int):
    """Return torchvision's v2 transform of a PIL image or a uint8 tensor to a uint8 crop."""
    from torchvision.transforms import v2

    crop = v2.RandomResizedCrop(image_size, SCALE, interpolation=v2.InterpolationMode.BICUBIC, antialias=True)
    return v2.Compose([crop, v2.RandomHorizontalFlip(), v2.PILToTensor()])  # keeps tensors


def decode_to_tensor(encoded: bytes):
    """Decode a file with torchvision: `decode_jpeg` or `decode_png`, by its content."""
    import torch
    from torchvision.io import ImageReadMode, decode_image

    return decode_image(torch.frombuffer(bytearray(encoded), dtype=torch.uint8), ImageReadMode.RGB)


def v2_dataset(folder: str, image_size: int, source: str):
    """Load the train split with torchvision's v2 transforms.

    Args:
        folder: data set.
        image_size: height and width in pixels.
        source: input of the transforms: `PIL` images of `datasets`, `decode_jpeg` for tensors that torchvision
            decodes, or `torch` for those of `with_format("torch")`.
    """
    from datasets import Image, load_dataset
    from torch.utils.data import Dataset

    dataset = load_dataset(folder, split="train")
    if source == "decode_jpeg":
        dataset = dataset.cast_column("image", Image(decode=False))
    elif source == "torch":
        dataset = dataset.with_format("torch")
    read = {
        "PIL": lambda image: image.convert("RGB"),
        "decode_jpeg": lambda image: decode_to_tensor(image["bytes"]),
        "torch": lambda image: image,
    }[source]
    crop = v2_crop(image_size)

    class Crops(Dataset):
        def __len__(self) -> int:
            return len(dataset)

        def __getitem__(self, row: int) -> dict:
            example = dataset[row]
            return {"pixel_values": crop(read(example["image"])), "label": int(example["label"])}

    return Crops()


def normalized(pixels):
    """Convert uint8 pixels to normalized floats."""
    from torchvision.transforms.v2 import functional

    return functional.normalize(functional.to_dtype(pixels, scale=True), MEAN, STD)


def has_dali() -> bool:
    """Return whether NVIDIA DALI is installed."""
    from importlib.util import find_spec

    return find_spec("nvidia") is not None and find_spec("nvidia.dali") is not None


def dali_loader(folder: str, image_size: int, batch_size: int, threads: int, normalize: bool):
    """Create an epoch of batches of NVIDIA DALI on the CPU.

    Args:
        folder: data set.
        image_size: height and width in pixels.
        batch_size: images per batch.
        threads: threads that decode.
        normalize: return normalized floats instead of uint8, which a GPU would normalize.
    """
    import numpy as np
    from datasets import Image, load_dataset
    from nvidia.dali import fn, pipeline_def, types
    from nvidia.dali.plugin.pytorch import DALIGenericIterator, LastBatchPolicy

    dataset = load_dataset(folder, split="train").cast_column("image", Image(decode=False)).with_format("arrow")
    order = np.random.default_rng().permutation(len(dataset))

    def read(sample):
        if sample.iteration >= len(dataset) // batch_size:
            raise StopIteration
        example = dataset[int(order[sample.idx_in_epoch])]
        file = example["image"][0]["bytes"].as_buffer()
        return np.frombuffer(file, dtype=np.uint8), np.array([example["label"][0].as_py()])

    @pipeline_def(batch_size=batch_size, num_threads=threads, device_id=None)
    def pipeline():
        files, labels = fn.external_source(read, num_outputs=2, batch=False, dtype=[types.UINT8, types.INT64])
        images = fn.decoders.image_random_crop(
            files, device="cpu", random_area=SCALE, random_aspect_ratio=(3 / 4, 4 / 3)
        )
        images = fn.resize(images, size=(image_size, image_size), interp_type=types.INTERP_CUBIC, antialias=True)
        mirror = fn.random.coin_flip(probability=0.5)
        if not normalize:
            return fn.flip(images, horizontal=mirror), labels
        mean, std = ([255 * value for value in values] for values in (MEAN, STD))
        return fn.crop_mirror_normalize(images, mirror=mirror, mean=mean, std=std, output_layout="CHW"), labels

    built = pipeline()
    built.build()
    batches = DALIGenericIterator(built, ["pixel_values", "labels"], last_batch_policy=LastBatchPolicy.DROP)
    return (outputs[0] for outputs in batches)  # one dict for each GPU; there is one pipeline
