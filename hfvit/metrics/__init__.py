"""Classification metrics and calibration."""
