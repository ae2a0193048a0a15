"""Train with these in PyTorch; ship what :func:`refold.fold` makes of them."""

from refold.torch.blocks import ACBlock as ACBlock
from refold.torch.blocks import DiverseBranchBlock as DiverseBranchBlock
from refold.torch.blocks import ExpressionBlock as ExpressionBlock
from refold.torch.blocks import MobileOneBlock as MobileOneBlock
from refold.torch.blocks import RepVGGBlock as RepVGGBlock
from refold.torch.checkpoints import convert_state as convert_state
from refold.torch.normalization import initialize_from_data as initialize_from_data
from refold.torch.normalization import weight_normalization as weight_normalization
