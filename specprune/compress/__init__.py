"""Acting on models: measure, select, cut and reconstruct.  An `nn.Module` goes in, a smaller ordinary one comes out."""

from specprune.compress.batches import CalibrationData
from specprune.compress.checkpoint import load_pruned, save_pruned
from specprune.compress.cost import count_flops, count_params
from specprune.compress.groups import Structure, find_groups
from specprune.compress.low_rank_network import LowRank, LowRankLayer, low_rank
from specprune.compress.memory import CollectionCeiling, collection_ceiling
from specprune.compress.moments import LayerMoments, Moments, collect_moments, collection_bytes
from specprune.compress.pruning import prune, prune_sweep
from specprune.compress.report import GroupReport, Pruned, PruneReport
from specprune.compress.sampling import SampledGroup, SampledNetwork, prune_by_sampling
from specprune.compress.selection import NodeStatistics, greedy_nodes, information_losses, select_nodes
from specprune.compress.sparsify import SparseLayer, SparsifiedNetwork, sparsify_by_sampling
from specprune.compress.surgery import Group, Skipped, Slice, remove_nodes

__all__ = [
    "CalibrationData",
    "CollectionCeiling",
    "Group",
    "GroupReport",
    "LayerMoments",
    "LowRank",
    "LowRankLayer",
    "Moments",
    "NodeStatistics",
    "PruneReport",
    "Pruned",
    "SampledGroup",
    "SampledNetwork",
    "Skipped",
    "Slice",
    "SparseLayer",
    "SparsifiedNetwork",
    "Structure",
    "collect_moments",
    "collection_bytes",
    "collection_ceiling",
    "count_flops",
    "count_params",
    "find_groups",
    "greedy_nodes",
    "information_losses",
    "load_pruned",
    "low_rank",
    "prune",
    "prune_by_sampling",
    "prune_sweep",
    "remove_nodes",
    "save_pruned",
    "select_nodes",
    "sparsify_by_sampling",
]
