"""Orthogonalization of Muon's updates by Newton-Schulz iteration, batched over matrices of one shape.

Legend: `N` matrices of one shape, `R` rows, `C` columns.
"""

import torch
from torch import Tensor

# Quintic coefficients of Keller Jordan, "Muon: an optimizer for hidden layers in neural networks" (2024).
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
WIDE = 2
"""Aspect ratio from which iterating on the Gram matrix X X^T is used; FLOPs break even at 1.5."""


def orthogonalize(matrices_NRC: Tensor, steps: int = 5) -> Tensor:
    """Approximates the nearest semi-orthogonal matrices: singular values end between 0.7 and 1.2 (Newton-Schulz).

    matrices_NRC: shape (N, R, C); computes in their dtype and returns it. X is scaled by sqrt(||X X^T||_F), a tighter
    bound of the spectral norm than ||X||_F (3.4 times for 128 equal singular values), which saves one step; the first
    step needs X X^T anyway.

    In float32, wide matrices iterate on the Gram matrix X X^T: each step multiplies X by a polynomial of it, so the
    polynomials are multiplied first and X only once, which saves a quarter to a third of the FLOPs (`bench/LOG.md`).
    """
    a, b, c = COEFFICIENTS
    x_NRC = matrices_NRC
    tall = x_NRC.size(-2) > x_NRC.size(-1)
    if tall:  # the product below is square in the first dimension: keep it the smaller one
        x_NRC = x_NRC.mT.contiguous()
    # Normalize before squaring: the square of a large or small gradient would leave the range of bfloat16 or float32.
    x_NRC = x_NRC / x_NRC.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    gram_NRR = x_NRC @ x_NRC.mT
    bound = gram_NRR.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-14)
    x_NRC, gram_NRR = x_NRC / bound.sqrt(), gram_NRR / bound
    if x_NRC.dtype != torch.bfloat16 and x_NRC.size(-1) >= WIDE * x_NRC.size(-2):
        x_NRC = _polynomial(gram_NRR, steps) @ x_NRC
    else:
        for step in range(steps):
            if step:
                gram_NRR = x_NRC @ x_NRC.mT
            update_NRR = torch.baddbmm(gram_NRR, gram_NRR, gram_NRR, beta=b, alpha=c)
            x_NRC = torch.baddbmm(x_NRC, update_NRR, x_NRC, beta=a)
    return x_NRC.mT if tall else x_NRC


def _polynomial(gram_NRR: Tensor, steps: int) -> Tensor:
    """The polynomial p(G), G = X X^T, with Newton-Schulz(X) = p(G) X; all commute, so a step with factor P maps G to P
    G P.
    """
    a, b, c = COEFFICIENTS
    product_NRR = None
    for step in range(steps):
        factor_NRR = torch.baddbmm(gram_NRR, gram_NRR, gram_NRR, beta=b, alpha=c)
        factor_NRR.diagonal(dim1=-2, dim2=-1).add_(a)
        product_NRR = factor_NRR if product_NRR is None else factor_NRR @ product_NRR
        if step < steps - 1:
            gram_NRR = factor_NRR @ (factor_NRR @ gram_NRR)
    assert product_NRR is not None
    return product_NRR
