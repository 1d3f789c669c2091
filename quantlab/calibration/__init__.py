"""Calibration: streamed statistics of activations."""

from quantlab.calibration.ranges import calibrate as calibrate
