"""refold for PaddlePaddle: layers and blocks to train with.

The verbs (``refold.inspect``, ``refold.fold``, ``refold.prove``, ``refold.bench``) take Paddle Layers as they
take all other models.
"""

from refold.paddle.adaptation import low_rank_adaptation as low_rank_adaptation
from refold.paddle.blocks import ACBlock as ACBlock
from refold.paddle.blocks import DiverseBranchBlock as DiverseBranchBlock
from refold.paddle.blocks import ExpressionBlock as ExpressionBlock
from refold.paddle.blocks import MobileOneBlock as MobileOneBlock
from refold.paddle.blocks import RepVGGBlock as RepVGGBlock
from refold.paddle.continuing import continue_training as continue_training
from refold.paddle.data_initialization import initialize_from_data as initialize_from_data
from refold.paddle.normalization import force_magnitudes as force_magnitudes
from refold.paddle.normalization import weight_normalization as weight_normalization
from refold.paddle.orthogonal import orthogonal_weights as orthogonal_weights
from refold.paddle.ppdet import RepVggBlock as RepVggBlock
from refold.paddle.spectral import settle as settle
from refold.paddle.spectral import spectral_errors as spectral_errors
from refold.paddle.spectral import spectral_normalization as spectral_normalization
