"""Embeddings and vocabulary matrices that start from the base model's own."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor


class BaseRows:
    """A matrix of the base, [V, H], of which a speculator's tables take as much as their widths hold.

    Rows lose their mean, which no softmax over them sees and which would be the first thing that a fit keeps.
    """

    def __init__(self, matrix: Tensor) -> None:
        rows = matrix.detach().float()
        self._rows = rows - rows.mean(dim=0)

    def fit(self, width: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """The rows in `width` dimensions: themselves where that is H, else the closest that there are.

        These are by the leading singular vectors: of all matrices of that rank the closest (Eckart and Young 1936). A
        random rotation then makes all columns alike in size: a speculator's outputs are, and would otherwise see little
        but the first column.

        Returns:
            The fitted rows [V, width], and the matrix [width, H] that brings vectors of the base to those dimensions:
            both float32, with a root mean square of 1.
        """
        rows = self._rows
        if width == rows.shape[1]:
            to_width = torch.eye(width, device=rows.device)
        else:
            axes = self._axes[:, -width:]
            gaussian = torch.randn(width, axes.shape[1], generator=generator, dtype=torch.float64)
            # With orthonormal columns: where `width` is above H no row changes its length or its angles.
            rotation = torch.linalg.qr(gaussian).Q.to(axes.device)
            to_width = (rotation @ axes.T).float()
            rows = rows @ to_width.T
        return _of_size_one(rows), _of_size_one(to_width)

    @cached_property
    def _axes(self) -> Tensor:
        """The right singular vectors [H, H], the leading ones last, from the small matrix of the columns' products."""
        return torch.linalg.eigh((self._rows.T @ self._rows).double()).eigenvectors


def _of_size_one(matrix: Tensor) -> Tensor:
    return matrix / matrix.square().mean().sqrt()
