"""What results are reported in: quality of traced contours, over all pixels of a data set."""

from crbp.metrics.contour import contour_metrics

__all__ = ["contour_metrics"]
