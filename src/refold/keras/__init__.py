"""refold for Keras 3, on its TensorFlow, JAX and torch backends: layers and blocks to train with.

The verbs (``refold.inspect``, ``refold.fold``, ``refold.prove``, ``refold.bench``) take Keras models as
they take all others.
"""

from refold.keras.adaptation import LowRankAdaptation as LowRankAdaptation
from refold.keras.blocks import ExpressionBlock as ExpressionBlock
from refold.keras.continuing import continue_training as continue_training
from refold.keras.data_initialization import initialize_from_data as initialize_from_data
from refold.keras.named_blocks import ACBlock as ACBlock
from refold.keras.named_blocks import DiverseBranchBlock as DiverseBranchBlock
from refold.keras.named_blocks import MobileOneBlock as MobileOneBlock
from refold.keras.named_blocks import RepVGGBlock as RepVGGBlock
from refold.keras.normalization import WeightNormalization as WeightNormalization
from refold.keras.normalization import weight_normalization as weight_normalization
from refold.keras.orthogonal import OrthogonalWeights as OrthogonalWeights
from refold.keras.spectral import SpectralNormalization as SpectralNormalization
