"""A gallery: embedded pictures on disk, to search."""

from vicvlm_cli.gallery.store import Gallery, GalleryItem

__all__ = ["Gallery", "GalleryItem"]
