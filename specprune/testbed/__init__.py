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
from specprune.testbed.zoo import ZOO_GRIDS, ZooSetting, zoo_grid, zoo_network, zoo_training_set
from specprune.testbed.zoo_store import Zoo, ZooNetwork, load_zoo, train_zoo

__all__ = [
    "CATALOG",
    "ZOO_GRIDS",
    "BasicBlock",
    "Dataset",
    "ImageTask",
    "Recipe",
    "TaskShape",
    "TrainedNetwork",
    "Zoo",
    "ZooNetwork",
    "ZooSetting",
    "build_network",
    "cache_folder",
    "default_recipe",
    "download_dataset",
    "evaluate",
    "initial_network",
    "load_checkpoint",
    "load_dataset",
    "load_zoo",
    "mlp",
    "randomize_labels",
    "read_cifar_binary",
    "read_idx",
    "resnet",
    "save_checkpoint",
    "train",
    "train_zoo",
    "vgg",
    "zoo_grid",
    "zoo_network",
    "zoo_training_set",
]
