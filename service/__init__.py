"""HTTP service and command line of corr2d."""
