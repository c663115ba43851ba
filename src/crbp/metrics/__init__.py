"""What results are reported in: quality of traced contours, panoptic quality, average precision of detections."""

from crbp.metrics.contour import contour_metrics
from crbp.metrics.detection import DetectionAP
from crbp.metrics.panoptic import PanopticQuality

__all__ = ["DetectionAP", "PanopticQuality", "contour_metrics"]
