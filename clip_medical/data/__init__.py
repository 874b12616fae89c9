"""Image and caption data: where it comes from (sources.py) and how an image becomes CLIP's pixels (images.py)."""
