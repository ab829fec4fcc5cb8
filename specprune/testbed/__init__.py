"""The testbed: image data, small networks, and their training, to try pruning and bounds on."""

from specprune.testbed.catalog import CATALOG, cache_folder
from specprune.testbed.datasets import Dataset, load_dataset, randomize_labels, read_cifar_binary, read_idx
from specprune.testbed.download import download_dataset
from specprune.testbed.networks import BasicBlock, ImageTask, TaskShape, build_network, mlp, resnet, vgg
from specprune.testbed.training import (
    Recipe,
    TrainedNetwork,
    default_recipe,
    evaluate,
    initial_network,
    load_checkpoint,
    save_checkpoint,
    train,
)

__all__ = [
    "CATALOG",
    "BasicBlock",
    "Dataset",
    "ImageTask",
    "Recipe",
    "TaskShape",
    "TrainedNetwork",
    "build_network",
    "cache_folder",
    "default_recipe",
    "download_dataset",
    "evaluate",
    "initial_network",
    "load_checkpoint",
    "load_dataset",
    "mlp",
    "randomize_labels",
    "read_cifar_binary",
    "read_idx",
    "resnet",
    "save_checkpoint",
    "train",
    "vgg",
]
