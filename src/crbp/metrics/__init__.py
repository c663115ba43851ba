"""What results are reported in: quality of traced contours, over all pixels of a data set; panoptic quality."""

from crbp.metrics.contour import contour_metrics
from crbp.metrics.panoptic import PanopticQuality

__all__ = ["PanopticQuality", "contour_metrics"]
