"""What can be converted to shards: the sources that come with the package, and how to write one."""

from gcahng.data.sources.source import Fault, Listing, Published, Source, SourceItem

__all__ = ["Fault", "Listing", "Published", "Source", "SourceItem"]
