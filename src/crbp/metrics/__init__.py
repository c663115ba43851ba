"""What results are reported in: quality of traced contours, panoptic quality, average precision of detections."""

from crbp.metrics.contour import contour_metrics
from crbp.metrics.detection import DetectionAP
from crbp.metrics.panoptic import PanopticQuality
from crbp.metrics.panoptic_files import PanopticWriter, evaluate_panoptic_files

__all__ = ["DetectionAP", "PanopticQuality", "PanopticWriter", "contour_metrics", "evaluate_panoptic_files"]
