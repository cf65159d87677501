"""A local page to look with: drop an image, see its segmentation, download the mask."""
