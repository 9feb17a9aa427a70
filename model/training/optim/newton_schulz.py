"""Orthogonalization of Muon's updates by Newton-Schulz iteration, batched over matrices of one shape.

Legend: `N` matrices of one shape, `R` rows, `C` columns.
"""

from typing import Literal

import torch
from torch import Tensor

Quintic = tuple[float, float, float]
Coefficients = Literal["jordan", "polar_express"]
# Of every step, from Keller Jordan, "Muon: an optimizer for hidden layers in neural networks" (2024).
JORDAN: Quintic = (3.4445, -4.7750, 2.0315)
# Of each step: the best for the singular values that the step before leaves, from 0.001 to 1 at first. Amsel et al.,
# "The Polar Express" (https://arxiv.org/abs/2505.16932), with their safety factor for rounding; later steps converge.
POLAR_EXPRESS: tuple[Quintic, ...] = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
POLAR_EXPRESS_LIMIT: Quintic = (1.875, -1.25, 0.375)
SAFETY = 1.02
WIDE = 2
"""Aspect ratio from which iterating on the Gram matrix X X^T is used; FLOPs break even at 1.5."""


def quintics(steps: int, coefficients: Coefficients) -> list[Quintic]:
    """The coefficients (a, b, c) of each step, X to a X + b X X^T X + c (X X^T)^2 X."""
    if coefficients == "jordan":
        return [JORDAN] * steps
    return [*POLAR_EXPRESS[:steps], *[POLAR_EXPRESS_LIMIT] * (steps - len(POLAR_EXPRESS))]


def orthogonalize(matrices_NRC: Tensor, steps: int = 5, *, coefficients: Coefficients = "jordan") -> Tensor:
    """Approximates the nearest semi-orthogonal matrices (Newton-Schulz).

    Singular values end between 0.7 and 1.2; with five steps of "polar_express" between 0.85 and 1.15.

    matrices_NRC: shape (N, R, C); computes in their dtype and returns it. X is scaled by sqrt(||X X^T||_F), a tighter
    bound of the spectral norm than ||X||_F (3.4 times for 128 equal singular values), which saves one step; the first
    step needs X X^T anyway.

    In float32, wide matrices iterate on the Gram matrix X X^T: each step multiplies X by a polynomial of it, so the
    polynomials are multiplied first and X only once, which saves a quarter to a third of the FLOPs (`bench/LOG.md`).
    """
    each = quintics(steps, coefficients)
    x_NRC = matrices_NRC
    tall = x_NRC.size(-2) > x_NRC.size(-1)
    if tall:  # the product below is square in the first dimension: keep it the smaller one
        x_NRC = x_NRC.mT.contiguous()
    # Normalize before squaring: the square of a large or small gradient would leave the range of bfloat16 or float32.
    x_NRC = x_NRC / x_NRC.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    gram_NRR = x_NRC @ x_NRC.mT
    bound = gram_NRR.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-14)
    if coefficients == "polar_express":  # it diverges above 1, which rounding must not reach
        bound = bound * SAFETY**2
    x_NRC, gram_NRR = x_NRC / bound.sqrt(), gram_NRR / bound
    if x_NRC.dtype != torch.bfloat16 and x_NRC.size(-1) >= WIDE * x_NRC.size(-2):
        x_NRC = _polynomial(gram_NRR, each) @ x_NRC
    else:
        for step, (a, b, c) in enumerate(each):
            if step:
                gram_NRR = x_NRC @ x_NRC.mT
            update_NRR = torch.baddbmm(gram_NRR, gram_NRR, gram_NRR, beta=b, alpha=c)
            x_NRC = torch.baddbmm(x_NRC, update_NRR, x_NRC, beta=a)
    return x_NRC.mT if tall else x_NRC


def _polynomial(gram_NRR: Tensor, each: list[Quintic]) -> Tensor:
    """The polynomial p(G), G = X X^T, with Newton-Schulz(X) = p(G) X; all commute, so a step with factor P maps G to P
    G P.
    """
    product_NRR = None
    for step, (a, b, c) in enumerate(each):
        factor_NRR = torch.baddbmm(gram_NRR, gram_NRR, gram_NRR, beta=b, alpha=c)
        factor_NRR.diagonal(dim1=-2, dim2=-1).add_(a)
        product_NRR = factor_NRR if product_NRR is None else factor_NRR @ product_NRR
        if step < len(each) - 1:
            gram_NRR = factor_NRR @ (factor_NRR @ gram_NRR)
    assert product_NRR is not None
    return product_NRR
