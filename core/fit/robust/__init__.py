"""Fits with the Huber loss by reweighted least squares."""
