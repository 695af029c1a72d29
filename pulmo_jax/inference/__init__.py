"""Score maps of whole images, one by one or for folders."""
