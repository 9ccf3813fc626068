"""A gallery: embedded pictures on disk, to search."""

from vicvlm_cli.gallery.items import GalleryItem
from vicvlm_cli.gallery.store import Gallery

__all__ = ["Gallery", "GalleryItem"]
