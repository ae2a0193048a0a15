"""Train with these in PyTorch; ship what :func:`refold.fold` makes of them."""

from refold.torch.adaptation import low_rank_adaptation as low_rank_adaptation
from refold.torch.blocks import ACBlock as ACBlock
from refold.torch.blocks import DiverseBranchBlock as DiverseBranchBlock
from refold.torch.blocks import ExpressionBlock as ExpressionBlock
from refold.torch.blocks import MobileOneBlock as MobileOneBlock
from refold.torch.blocks import RepVGGBlock as RepVGGBlock
from refold.torch.checkpoints import convert_state as convert_state
from refold.torch.continuing import continue_training as continue_training
from refold.torch.data_initialization import initialize_from_data as initialize_from_data
from refold.torch.normalization import force_magnitudes as force_magnitudes
from refold.torch.normalization import weight_normalization as weight_normalization
from refold.torch.orthogonal import orthogonal_weights as orthogonal_weights
from refold.torch.spectral import settle as settle
from refold.torch.spectral import spectral_errors as spectral_errors
from refold.torch.spectral import spectral_normalization as spectral_normalization
