"""Room `transforms`: orthogonal matrices, parametrised, trained, composed, recorded and rebuilt."""

from rdopt.transforms.bases import BASES, row_moments, starting_gauges
from rdopt.transforms.block_gauges import BlockGauges, sides_of
from rdopt.transforms.cayley import (
    apply_block_cayley,
    block_cayley,
    block_cayley_blocks,
    block_cayley_size,
    cayley,
    inverse_cayley,
    skew,
    skew_size,
)
from rdopt.transforms.compose import compose, identity, orthogonality_error
from rdopt.transforms.files import (
    AlignmentFiles,
    alignment_of,
    architecture_of_original,
    fixed_record,
    gauges_of,
    load_alignment,
    save_alignment,
)
from rdopt.transforms.frequency import dct, fourier
from rdopt.transforms.gauges import Gauges, fold, fold_block, fold_end_moments, fold_ends, fold_moments, unfold
from rdopt.transforms.givens import (
    Pairs,
    angle_count,
    apply_givens,
    as_pairs,
    butterfly,
    givens_matrix,
    round_robin,
)
from rdopt.transforms.hadamard import apply_hadamard, hadamard, hadamard_factors
from rdopt.transforms.jacobi import joint_cost, joint_diagonalizer
from rdopt.transforms.maps import Map, Sides
from rdopt.transforms.metadata import TransformRecord, rebuild, record_from_dict, record_to_dict
from rdopt.transforms.modules import (
    CayleyRotation,
    ComposedRotation,
    GivensRotation,
    Stretch,
    materialize,
    record_of,
)
from rdopt.transforms.pairing import (
    fitted_angles,
    greedy_matching,
    learned_pairs,
    pair_gains,
    pairing_bits,
    turned_moments,
)
from rdopt.transforms.pca import near_identity, pca, spectrum
from rdopt.transforms.random import random_orthogonal
from rdopt.transforms.stored import (
    STRUCTURES,
    Stored,
    StoredTurn,
    Structure,
    fold_stored,
    fold_stored_moments,
)
from rdopt.transforms.stretch import stretch, stretch_size
from rdopt.transforms.turns import Meeting, Turn, TurnedSides, meeting

__all__ = [
    "BASES",
    "AlignmentFiles",
    "alignment_of",
    "architecture_of_original",
    "fixed_record",
    "gauges_of",
    "load_alignment",
    "save_alignment",
    "BlockGauges",
    "Gauges",
    "fold",
    "fold_block",
    "fold_end_moments",
    "fold_ends",
    "fold_moments",
    "sides_of",
    "starting_gauges",
    "unfold",
    "STRUCTURES",
    "Meeting",
    "Stored",
    "StoredTurn",
    "Structure",
    "Turn",
    "TurnedSides",
    "fold_stored",
    "fold_stored_moments",
    "meeting",
    "CayleyRotation",
    "Map",
    "Sides",
    "Stretch",
    "stretch",
    "stretch_size",
    "ComposedRotation",
    "GivensRotation",
    "Pairs",
    "TransformRecord",
    "angle_count",
    "apply_block_cayley",
    "apply_givens",
    "apply_hadamard",
    "as_pairs",
    "block_cayley",
    "block_cayley_blocks",
    "block_cayley_size",
    "fitted_angles",
    "learned_pairs",
    "near_identity",
    "butterfly",
    "cayley",
    "compose",
    "dct",
    "fourier",
    "givens_matrix",
    "greedy_matching",
    "hadamard",
    "hadamard_factors",
    "identity",
    "inverse_cayley",
    "joint_cost",
    "joint_diagonalizer",
    "materialize",
    "orthogonality_error",
    "pair_gains",
    "pairing_bits",
    "pca",
    "random_orthogonal",
    "rebuild",
    "record_from_dict",
    "record_of",
    "record_to_dict",
    "round_robin",
    "row_moments",
    "skew",
    "skew_size",
    "spectrum",
    "turned_moments",
]
