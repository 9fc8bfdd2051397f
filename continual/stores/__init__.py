"""Object stores: Amazon S3 and what speaks as it does, Google Cloud Storage, Azure, by the package `obstore`. What is
kept there, and in which order it is written, is the matter of `state`.

A path is on a disk or on an object store, and `Where` is either."""

from continual.stores.object_path import ObjectPath, Where, here, on_disk, where

__all__ = ["ObjectPath", "Where", "here", "on_disk", "where"]
