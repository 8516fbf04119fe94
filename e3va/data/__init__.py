"""Data sets of images with annotations, for any engine."""
