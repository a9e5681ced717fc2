"""Prediction and what surrounds it: checked reading, checks of folders, orientation, model packages, and scoring."""
