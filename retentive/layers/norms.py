"""RMSNorm. Shapes: x `[...,D]`, weight `[D]`."""

from torch import Tensor, nn

from retentive.layers import cpu_training


class RMSNorm(nn.RMSNorm):
    """nn.RMSNorm, faster for many tokens on a CPU (`cpu_training`)."""

    def forward(self, x: Tensor) -> Tensor:
        if cpu_training.suits_rms_norm(x, self.weight):
            assert self.eps is not None
            return cpu_training.rms_norm(x, self.weight, self.eps)
        return super().forward(x)
