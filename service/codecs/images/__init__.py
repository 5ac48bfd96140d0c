"""Codecs of images: PNG, JPEG, WebP and TIFF."""
