"""Pictures, as PNG files: the cells of a genotype, the curves of a run, a search's alpha and beta."""

from figures.curves import draw_curves, draw_genotype

__all__ = ["draw_curves", "draw_genotype"]
