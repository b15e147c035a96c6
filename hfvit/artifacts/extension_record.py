"""extension.json: accuracies of a checkpoint with added classes."""

from dataclasses import dataclass
from typing import ClassVar

from hfvit.artifacts.json_record import Count, FileRecord, Share


@dataclass(kw_only=True)
class ExtensionRecord(FileRecord):
    """Result of `hfvit extend`.

    Attributes:
        hfvit_version: version that wrote the file.
        new_classes: names of the added classes.
        images: number of images of each.
        old_images: number of labeled images of the old classes that the accuracies are of.
        old_accuracy_before: accuracy of the old classes without the new ones.
        old_accuracy: accuracy of the old classes among all.
        new_accuracy: leave-one-out accuracy of the new images among all classes, None if each class has one image.
    """

    FILE: ClassVar[str] = "extension.json"
    REMEDY: ClassVar[str] = "Make the checkpoint again with `hfvit extend`, or delete the file."

    hfvit_version: str
    new_classes: list[str]
    images: list[Count]
    old_images: Count
    old_accuracy_before: Share
    old_accuracy: Share
    new_accuracy: Share | None
