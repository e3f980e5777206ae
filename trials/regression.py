"""Ridge regression, for predicting a cell's figure from its features. No torch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

PENALTIES = 10.0 ** np.arange(-1, 4)
"""What is tried, on standardised features."""


@dataclass(frozen=True)
class Ridge:
    """y = mean + scale * (x - centre) / spread @ coefficients. The penalty is the one that predicts left-out
    rows best."""

    centre: np.ndarray
    spread: np.ndarray
    mean: float
    scale: float
    coefficients: np.ndarray
    left_out_r2: float
    """The part of the variance that predictions of left-out rows explain; below 0 where they are no better
    than the mean."""

    @classmethod
    def fit(cls, x: np.ndarray, y: np.ndarray) -> Ridge:
        """Fit features (n, features) to figures (n,), n at least 2."""
        centre, spread = x.mean(0), x.std(0)
        spread = np.where(spread > 0, spread, np.inf)  # what does not vary has no say
        mean, scale = float(y.mean()), float(y.std()) or 1.0
        a, b = (x - centre) / spread, (y - mean) / scale
        u, s, vt = np.linalg.svd(a, full_matrices=False)
        best = None
        for penalty in PENALTIES:
            shrunk = s**2 / (s**2 + penalty)
            leverage = (u**2 @ shrunk) + 1 / len(y)
            residual = (b - u @ (shrunk * (u.T @ b))) / np.maximum(1 - leverage, 1e-3)
            error = float(np.mean(residual**2))
            if best is None or error < best[0]:
                best = (error, penalty)
        error, penalty = best
        coefficients = vt.T @ (s / (s**2 + penalty) * (u.T @ b))
        return cls(centre, spread, mean, scale, coefficients, 1 - error)

    def predict(self, x: np.ndarray) -> np.ndarray:
        return self.mean + self.scale * ((x - self.centre) / self.spread @ self.coefficients)
