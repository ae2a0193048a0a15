"""refold for PaddlePaddle: layers and blocks to train with.

The verbs (``refold.inspect``, ``refold.fold``, ``refold.prove``, ``refold.bench``) take Paddle Layers as they
take all other models.
"""

from refold.paddle.blocks import ACBlock as ACBlock
from refold.paddle.blocks import DiverseBranchBlock as DiverseBranchBlock
from refold.paddle.blocks import ExpressionBlock as ExpressionBlock
from refold.paddle.blocks import MobileOneBlock as MobileOneBlock
from refold.paddle.blocks import RepVGGBlock as RepVGGBlock
from refold.paddle.normalization import weight_normalization as weight_normalization
from refold.paddle.ppdet import RepVggBlock as RepVggBlock
